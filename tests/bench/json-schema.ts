/**
 * Do outputs of a real model follow their JSON schemas? SmolLM2-135M with its five adapters and without, at temperature 0, 1 and 2, over the
 * schemas of JSON-Schema-Test-Suite and of Biome's configuration; every completion that ends by itself is judged by Ajv.
 *
 *   node tests/bench/json-schema.ts [--every N] [--part I/N]
 * --every N: each schema runs with one in N of the 18 pairs of temperature and adapter, in turn. --part I/N: that part of the schemas.
 */
import { readdirSync } from 'node:fs';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { examplesFolder, smollm2Path } from '../fixtures/models.ts';
import { checkConformance, configurationSchemas, suiteSchemas } from '../fixtures/schema-conformance.ts';

const { values } = parseArgs({
  options: { every: { type: 'string', default: '1' }, part: { type: 'string', default: '1/1' } },
});
const [part, numParts] = values.part.split('/').map(Number) as [number, number];
const all = [...suiteSchemas(), ...configurationSchemas(12)];
const names = readdirSync(examplesFolder, { withFileTypes: true }).filter((entry) => entry.isDirectory());

const beganMs = performance.now();
const { numCompiled, refused, unjudged, completions } = await checkConformance({
  modelPath: smollm2Path,
  schemas: all.filter((_, i) => i % numParts === part - 1),
  temperatures: [0, 1, 2],
  adapters: Object.fromEntries(names.map(({ name }) => [name, join(examplesFolder, name)])),
  every: Number(values.every),
  maxTokens: 64,
  // At temperature 2 nearly any token may come, and few outputs would end.
  closingBias: 4,
});
const seconds = (performance.now() - beganMs) / 1000;
console.log(
  `${numCompiled} schemas compiled, ${refused.length} refused, ${unjudged.length} that Ajv cannot read; ${seconds.toFixed(0)} s`,
);
const groups = Map.groupBy(
  completions,
  ({ temperature, adapter }) => `${adapter ?? 'base'} at ${temperature}`,
);
for (const [group, own] of groups) {
  const ended = own.filter(({ hasEnded }) => hasEnded);
  console.log(`${group}: ${own.length} completions, ${ended.length} ended`);
}
const bad = completions.filter(({ problem }) => problem !== null);
for (const { schema, text, problem } of bad) console.log(JSON.stringify({ schema, text, problem }));
console.log(`${completions.length} completions, ${bad.length} wrong`);
process.exitCode = bad.length > 0 ? 1 : 0;
