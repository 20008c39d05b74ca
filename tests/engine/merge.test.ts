import { describe, expect, test } from 'vitest';
import { mergeTensors } from '../../engine/adapters/merge.ts';
import type { MergeRule } from '../../engine/protocol.ts';

const tensors = [
  [0.0, 0.3, -0.27, -0.89, -0.45, -0.99, 0.06, 1.34, -0.49, -0.62, 0.49, 0.36],
  [0.11, -0.93, -0.03, 0.7, -1.34, -0.46, -1.9, -1.29, -1.84, -0.24, -1.27, 0.27],
  [0.16, -0.19, -2.52, -0.54, -0.05, 0.11, -1.53, -0.48, -0.98, -0.81, 1.06, -0.81],
];
const weights = [0.5, 1, -0.75];
const merge = (rule: Partial<MergeRule>, seeds = ['a', 'b', 'c']) =>
  mergeTensors(
    tensors.map((values, i) => ({
      values: Float32Array.from(values),
      weight: weights[i]!,
      seed: seeds[i]!,
    })),
    { method: 'ties', density: 0.5, majoritySign: 'total', ...rule },
  );

describe('gives what peft/utils/merge_utils.py of PEFT 0.21.2 gives', () => {
  const cases: [Partial<MergeRule>, number[]][] = [
    [
      { method: 'ties', density: 0.5 },
      [0, -0.93, 1.89, -0.445, -1.34, -0.495, -0.37625, 0.67, -0.45, 0.14875, -0.275, 0.6075],
    ],
    [
      { method: 'ties', density: 0.25 },
      [0, 0, 1.89, -0.445, -1.34, -0.495, -0.37625, 0.67, -1.84, 0, -0.795, 0],
    ],
    [
      { method: 'ties', density: 1, majoritySign: 'frequency' },
      [-0.005, -0.39375, 0.575, -0.02, -0.509167, -0.4775, -0.37625, -0.465, -0.45, 0.019167, -0.275, 0.225],
    ],
    [
      { method: 'magnitude_prune', density: 0.5 },
      [0, -0.93, 1.89, -0.445, -1.34, -0.495, -0.7525, -0.62, -1.35, 0.2975, -1.82, 0.6075],
    ],
    [
      { method: 'dare_linear', density: 1 },
      [-0.01, -0.6375, 1.725, 0.66, -1.5275, -1.0375, -0.7225, -0.26, -1.35, 0.0575, -1.82, 1.0575],
    ],
    [
      { method: 'dare_ties', density: 1 },
      [-0.005, -0.39375, 0.575, -0.02, -0.509167, -0.4775, -0.37625, -0.465, -0.45, 0.019167, -0.275, 0.6075],
    ],
  ];
  test.for(cases)('%o', ([rule, expected]) => {
    expect(expected).toHaveLength(12);
    const merged = merge(rule);
    for (const [i, value] of expected.entries()) expect(merged[i], `element ${i}`).toBeCloseTo(value, 5);
  });
});

test('keeps as many of the largest as the density says, of equal ones the first', () => {
  const ones = { values: new Float32Array(10).fill(1), weight: 1, seed: '' };
  const rule: MergeRule = { method: 'magnitude_prune', density: 0.35, majoritySign: 'total' };
  expect([...mergeTensors([ones], rule)]).toEqual([1, 1, 1, 0, 0, 0, 0, 0, 0, 0]);
  expect([...mergeTensors([ones], { ...rule, density: 0.05 })]).toEqual(Array(10).fill(0));
});

test('random values are drawn by the seed alone, as many as the density says, and scaled up', () => {
  const numValues = 20_000;
  const of = (seed: string, density: number) =>
    mergeTensors([{ values: new Float32Array(numValues).fill(1), weight: 1, seed }], {
      method: 'dare_linear',
      density,
      majoritySign: 'total',
    });
  expect(of('x', 0.2)).toEqual(of('x', 0.2));
  expect(of('x', 0.2)).not.toEqual(of('y', 0.2));
  for (const density of [0.1, 0.5, 0.9]) {
    const kept = of('x', density).filter((value) => value !== 0);
    // Five standard deviations.
    const spread = 5 * Math.sqrt((density * (1 - density)) / numValues);
    expect(Math.abs(kept.length / numValues - density)).toBeLessThan(spread);
    expect(new Set(kept)).toEqual(new Set([Math.fround(1 / density)]));
  }
  expect(merge({ method: 'dare_ties', density: 0.5 })).not.toEqual(
    merge({ method: 'dare_ties', density: 0.5 }, ['d', 'e', 'f']),
  );
});
