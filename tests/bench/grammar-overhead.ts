/**
 * What does it cost to hold outputs to a form? Decode steps of SmolLM2-135M at batch 1, 8 and 32, with a JSON schema and without, in turn:
 * median length of a step, and of its sampling, where masks are made and applied; all sequences are greedy.
 *
 *   node tests/bench/grammar-overhead.ts [ROUNDS]
 */
import { Grammars } from '../../engine/grammar/grammars.ts';
import { schemaText } from '../../engine/grammar/output-format.ts';
import { readBaseModel } from '../../engine/model/base-model.ts';
import { openTextModel } from '../../engine/model/text-model.ts';
import { defaultSampling } from '../../engine/sampling.ts';
import { compileGrammar, type Grammar, openVocabulary, type Runtime } from '../../native/index.ts';
import { open, prepare, smollm2Path } from '../fixtures/models.ts';
import { wireEngine } from '../fixtures/wire-engine.ts';

const numRounds = Number(process.argv[2] ?? 7);
const numSteps = 48;
const numSkipped = 4;

const text = await openTextModel(await readBaseModel(smollm2Path, 'keep'));
const prompt = text.encode('A list of people with their name, age, and city as JSON:\n', {
  addSpecialTokens: false,
});
const runtime = await open(await prepare(smollm2Path), { deviceMemoryBytes: 512 * 2 ** 20 });
let steps: { ms: number; numSequences: number; numTokens: number }[] = [];
let samplingMs = 0;

const timed = new Proxy(runtime, {
  get(target, key) {
    if (key !== 'step') {
      const value = Reflect.get(target, key);
      return typeof value === 'function' ? value.bind(target) : value;
    }
    return async (batch: Parameters<Runtime['step']>[0]) => {
      const numSequences = batch.sequenceStarts.length - 1;
      const numTokens = batch.tokenIds.length;
      const result = await target.step(batch);
      steps.push({ ms: result.endedMs - result.beganMs, numSequences, numTokens });
      return result;
    };
  },
});
const { engine } = wireEngine({
  runtime: timed,
  limits: { maxModelLen: 1024, maxBatchTokens: 256, maxSequences: 32, maxWaiting: 64 },
  eosTokenIds: new Set(),
  createDetokenizer: text.createDetokenizer,
  tiers: { readFile: () => Promise.reject(new Error('no adapters here')), pageWaitMs: 1 },
});

// A list that does not end within the steps that are measured.
const person = {
  type: 'object',
  properties: {
    name: { type: 'string', maxLength: 40 },
    age: { type: 'integer', minimum: 0, maximum: 150 },
    city: { type: 'string', maxLength: 40 },
    email: { type: 'string', format: 'email' },
    tags: { type: 'array', items: { enum: ['friend', 'colleague', 'family'] } },
  },
  required: ['name', 'age', 'city'],
  additionalProperties: false,
};
const compileMs: number[] = [];
const grammars = new Grammars({
  library: { openVocabulary, compileGrammar },
  tokens: text,
  now: () => performance.now(),
  onCompiled: (seconds) => compileMs.push(1000 * seconds),
});
const schema = { type: 'array', minItems: 500, items: person };
const grammar = await grammars.get({
  kind: 'json_schema',
  text: schemaText(schema, 'schema'),
  field: 'schema',
});

async function run(batch: number, used: Grammar | null): Promise<{ stepMs: number; samplingMs: number }> {
  steps = [];
  const before = runtime.stepParts().sample;
  const done = Array.from({ length: batch }, (_, seed) => {
    const { promise, resolve } = Promise.withResolvers<void>();
    engine.add([
      {
        promptTokens: prompt,
        adapters: [],
        grammar: used,
        params: { ...defaultSampling(), seed: BigInt(seed), ignoreEos: true, maxTokens: numSteps },
        onOutput({ finishReason, error }) {
          if (error) throw error;
          if (finishReason) resolve();
        },
      },
    ]);
    return promise;
  });
  await Promise.all(done);
  samplingMs = runtime.stepParts().sample - before;
  const full = steps.filter(({ numSequences, numTokens }) => numSequences === batch && numTokens === batch);
  return {
    stepMs: median(full.slice(numSkipped).map(({ ms }) => ms)),
    samplingMs: samplingMs / steps.length,
  };
}

const median = (all: number[]) => all.toSorted((a, b) => a - b)[Math.floor(all.length / 2)]!;
const range = (all: number[], digits: number) =>
  `${median(all).toFixed(digits)} (${Math.min(...all).toFixed(digits)}–${Math.max(...all).toFixed(digits)})`;

console.log(
  `compiled in ${compileMs.map((ms) => ms.toFixed(1)).join(', ')} ms; ${numRounds} rounds, ${runtime.numThreads} threads`,
);
console.log(
  '| batch | step without, ms | step with, ms | with / without | sampling without, µs a token | with | of a step, % |',
);
console.log('|---|---|---|---|---|---|---|');
for (const batch of [1, 8, 32]) {
  await run(batch, grammar);
  const rows = {
    plain: [] as number[],
    held: [] as number[],
    ratio: [] as number[],
    plainUs: [] as number[],
    heldUs: [] as number[],
    share: [] as number[],
  };
  for (let round = 0; round < numRounds; round++) {
    // Each begins as often as the other.
    const order = round % 2 === 0 ? [null, grammar] : [grammar, null];
    const [first, second] = [await run(batch, order[0]!), await run(batch, order[1]!)];
    const [plain, held] = round % 2 === 0 ? [first, second] : [second, first];
    rows.plain.push(plain.stepMs);
    rows.held.push(held.stepMs);
    rows.ratio.push(held.stepMs / plain.stepMs);
    rows.plainUs.push((1000 * plain.samplingMs) / batch);
    rows.heldUs.push((1000 * held.samplingMs) / batch);
    rows.share.push((100 * (held.samplingMs - plain.samplingMs)) / plain.stepMs);
  }
  console.log(
    `| ${batch} | ${range(rows.plain, 2)} | ${range(rows.held, 2)} | ${range(rows.ratio, 3)} | ${range(rows.plainUs, 0)} | ${range(rows.heldUs, 0)} | ${range(rows.share, 1)} |`,
  );
}
await engine.close();
runtime.close();
