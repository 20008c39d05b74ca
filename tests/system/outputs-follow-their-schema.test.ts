// Outputs of a model of random weights follow their JSON schemas, at any temperature, with an adapter and without, also when sequences
// are preempted and go on. tests/bench/json-schema.ts does the same with a real model and more of everything.

import { join } from 'node:path';
import { expect, test } from 'vitest';
import { checkConformance, configurationSchemas, suiteSchemas } from '../fixtures/schema-conformance.ts';

const folder = join(import.meta.dirname, '../goldens/tiny/llama3');

/** Between a whole number that is not meant and the next one. */
const bounds = [
  { exclusiveMinimum: 2, maximum: 2.5 },
  { exclusiveMinimum: 0, exclusiveMaximum: 0.75 },
  { minimum: -0.5, exclusiveMaximum: 0 },
  { minimum: 1, maximum: 2.5, not: { enum: [1, 2] } },
].map((bound, i) => ({
  name: `bound ${i}`,
  draft: '2020-12' as const,
  schema: { type: 'number', ...bound },
}));

test('every completion that ends by itself is an instance of its schema', { timeout: 120_000 }, async () => {
  const { numCompiled, refused, unjudged, completions, numPreemptions } = await checkConformance({
    modelPath: folder,
    schemas: [...suiteSchemas(), ...configurationSchemas(12), ...bounds],
    temperatures: [0, 1, 2],
    adapters: { tiny: join(folder, 'adapter') },
    maxTokens: 96,
    closingBias: 4,
    // Room for half of those that run at once, at their longest.
    numPages: 96,
  });
  expect(completions.filter(({ problem }) => problem !== null)).toEqual([]);
  expect(numCompiled).toBeGreaterThanOrEqual(460 + unjudged.length);
  expect(completions).toHaveLength((numCompiled - unjudged.length) * 6);
  expect(completions.filter(({ hasEnded }) => hasEnded).length).toBeGreaterThan(completions.length * 0.8);
  expect(numPreemptions).toBeGreaterThan(0);
  // What cannot be followed is refused with what it is.
  for (const { schema, message } of refused)
    expect(message, schema.name).toMatch(/^schema: expected .+, got: \S/);
  const notOf = refused.find(({ schema }) => schema.name === 'not: not');
  expect(notOf?.message).toContain('Unimplemented keys: ["not"]');
});
