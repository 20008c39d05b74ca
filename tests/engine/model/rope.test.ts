import { describe, expect, test } from 'vitest';
import { parseRopeScaling, ropeTable } from '../../../engine/model/rope.ts';

const scaling = (value: Record<string, unknown> | null) => parseRopeScaling(value, 'rope_scaling', 1024);

test('turns dimension pair i by theta^(−2i / headDim) a position', () => {
  const { inverseFrequencies, attentionFactor } = ropeTable(8, 10_000, scaling(null));
  expect([...inverseFrequencies]).toEqual([1, 0.1, 0.01, 0.001].map((f) => expect.closeTo(f, 12)));
  expect(attentionFactor).toBe(1);
});

// From transformers 5.23, ROPE_INIT_FUNCTIONS, headDim 16, theta 10000, computed in f32.
const yarn = { rope_type: 'yarn', factor: 4, original_max_position_embeddings: 256 };
test.each([
  [
    'llama3',
    {
      rope_type: 'llama3',
      factor: 8,
      low_freq_factor: 1,
      high_freq_factor: 4,
      original_max_position_embeddings: 64,
    },
    [1, 0.2443846, 0.01304226, 0.003952847, 0.00125, 0.0003952847, 0.000125, 3.952847e-5],
    1,
  ],
  [
    'linear',
    { type: 'linear', factor: 4 },
    [0.25, 0.07905694, 0.025, 0.007905695, 0.0025, 0.0007905695, 0.00025, 7.905695e-5],
    1,
  ],
  ['yarn', yarn, [1, 0.2569351, 0.0625, 0.01383497, 0.0025, 0.0007905695, 0.00025, 7.905695e-5], 1.13862944],
  [
    'yarn without rounding, with its own betas and mscales',
    { ...yarn, truncate: false, beta_fast: 16, beta_slow: 2, mscale: 1, mscale_all_dim: 0.5 },
    [1, 0.2915256, 0.0506644, 0.007905695, 0.0025, 0.0007905695, 0.00025, 7.905695e-5],
    1.06482163,
  ],
])('scales as transformers does: %s', (_name, value, frequencies, factor) => {
  const table = ropeTable(16, 10_000, scaling(value));
  for (const [i, expected] of frequencies.entries()) {
    expect(table.inverseFrequencies[i]! / expected, `pair ${i}`).toBeCloseTo(1, 5);
  }
  expect(table.attentionFactor).toBeCloseTo(factor, 7);
});

test('divides by factors of its own', () => {
  const { inverseFrequencies } = ropeTable(4, 100, { type: 'factors', factors: Float32Array.of(1, 4) });
  expect([...inverseFrequencies]).toEqual([1, 0.025]);
});

describe('refuses by name', () => {
  test.each([
    [
      { rope_type: 'longrope' },
      /rope_scaling.rope_type: expected default, linear, llama3 or yarn, got "longrope"/,
    ],
    [{ type: 'dynamic', factor: 2 }, /rope_scaling.type: .*got "dynamic"/],
    [{ type: 'linear' }, /rope_scaling.factor: expected a number above 0, got nothing/],
    [{ type: 'linear', factor: '4' }, /rope_scaling.factor: expected a number above 0, got "4"/],
    [{ type: 'yarn', factor: 4, beta_fast: -1 }, /rope_scaling.beta_fast/],
    [
      { rope_type: 'llama3', factor: 8, low_freq_factor: 4, high_freq_factor: 4 },
      /high_freq_factor: expected more than low_freq_factor, 4/,
    ],
    [{ rope_type: 'default', partial_rotary_factor: 0.5 }, /partial_rotary_factor: expected 1, got 0.5/],
  ])('%j', (value, message) => {
    expect(() => scaling(value)).toThrow(message);
  });
});
