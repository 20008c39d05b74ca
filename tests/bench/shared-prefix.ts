/**
 * What does it bring that requests have a long beginning in common? SmolLM2-135M, a system prompt of 1,000 tokens or so before 32
 * questions that come at once.
 *
 *   node tests/bench/shared-prefix.ts                         about three minutes
 *   node tests/bench/shared-prefix.ts --sequences 8 --prefix 256 --rounds 2
 *
 * Computed once: an engine with the prefix cache and one without take turns, with another system prompt in each round, so that
 * nothing is left of the round before. Read once per step: native decode steps in which the sequences have the prefix in the same
 * pages and steps in which each has a copy of its own take turns; both draw the same tokens, or the bench fails.
 */
import { parseArgs } from 'node:util';
import { defaultSampling } from '../../engine/sampling.ts';
import { cpuInfo, type Runtime } from '../../native/index.ts';
import { open, prepare, smollm2Path } from '../fixtures/models.ts';
import { seededRandom } from '../fixtures/seeded-random.ts';
import { type StepPart, stepBatch } from '../fixtures/steps.ts';
import { type WiredEngine, wireEngine } from '../fixtures/wire-engine.ts';
import { countsOf } from './count-option.ts';
import { percentile, ratios, showSpread, spread } from './peers/spread.ts';

const { values: options } = parseArgs({
  options: {
    sequences: { type: 'string', default: '32' },
    prefix: { type: 'string', default: '1008' },
    rounds: { type: 'string', default: '3' },
  },
});
const countOf = countsOf(options);
const numSequences = countOf('sequences', 1);
const numRounds = countOf('rounds', 1);
const questionTokens = 16;
const outputTokens = 32;
const numSteps = 24;
const numStepRounds = 3 * numRounds;

const model = await prepare(smollm2Path);
const probe = await open(model, { deviceMemoryBytes: 16 << 20 });
const { blockTokens, pageBytes } = probe;
probe.close();
const prefixTokens = countOf('prefix', blockTokens);
if (prefixTokens % blockTokens !== 0) {
  // The steps compared below share whole blocks.
  throw new RangeError(`--prefix: expected a multiple of ${blockTokens}, got ${prefixTokens}`);
}
const ownPages = Math.ceil((questionTokens + Math.max(outputTokens, numSteps)) / blockTokens);
const prefixPages = prefixTokens / blockTokens;
/** Enough for everybody's own copy: without the cache nobody waits for room. */
const deviceMemoryBytes = (numSequences * (prefixPages + ownPages) + 1) * pageBytes;
const draw = (random: ReturnType<typeof seededRandom>, count: number) =>
  Array.from({ length: count }, () => 10 + random.below(8000));

console.log(
  `SmolLM2-135M; ${numSequences} sequences, ${prefixTokens} tokens in common, ${questionTokens} of their own; ${cpuInfo().isa}\n`,
);

interface Burst {
  seconds: number;
  ttftMs: number;
  cachedTokens: number;
  answers: string;
}

/** All questions at once after the system prompt of that round. */
async function burst({ engine }: WiredEngine, round: number): Promise<Burst> {
  const random = seededRandom(round + 1);
  const system = draw(random, prefixTokens);
  const beginMs = performance.now();
  const ttfts: number[] = [];
  const all = Array.from({ length: numSequences }, () => {
    const { promise, resolve, reject } = Promise.withResolvers<void>();
    let isFirst = true;
    const [handle] = engine.add([
      {
        promptTokens: [...system, ...draw(random, questionTokens)],
        adapters: [],
        params: { ...defaultSampling(), temperature: 0, ignoreEos: true, maxTokens: outputTokens },
        onOutput({ finishReason, error }) {
          if (isFirst) ttfts.push(performance.now() - beginMs);
          isFirst = false;
          if (error) reject(error);
          else if (finishReason) resolve();
        },
      },
    ]);
    return { sequence: handle!.sequence, ended: promise };
  });
  await Promise.all(all.map(({ ended }) => ended));
  return {
    seconds: (performance.now() - beginMs) / 1000,
    ttftMs: percentile(ttfts, 50),
    cachedTokens: all.reduce((sum, { sequence }) => sum + sequence.numCachedTokens, 0),
    answers: all.map(({ sequence }) => sequence.outputTokens.join()).join(';'),
  };
}

async function compareEngines(): Promise<void> {
  const wired = async (isCaching: boolean) => {
    const runtime = await open(model, { deviceMemoryBytes });
    const parts = wireEngine({
      runtime,
      limits: {
        maxModelLen: 16_384,
        maxBatchTokens: 256,
        maxSequences: numSequences,
        maxWaiting: numSequences,
      },
      eosTokenIds: new Set(),
      createDetokenizer: () => ({ push: () => '', flush: () => '' }),
      tiers: { readFile: () => Promise.reject(new Error('no adapters here')), pageWaitMs: 10_000 },
      isCaching,
    });
    return { runtime, ...parts };
  };
  const engines = { on: await wired(true), off: await wired(false) };
  const bursts: Record<'on' | 'off', Burst[]> = { on: [], off: [] };
  for (let round = 0; round < numRounds; round++) {
    for (const name of ['off', 'on'] as const) {
      const done = await burst(engines[name], round);
      bursts[name].push(done);
      process.stderr.write(`round ${round + 1}, cache ${name}: ${done.seconds.toFixed(1)} s\n`);
    }
    if (bursts.on[round]!.answers !== bursts.off[round]!.answers) {
      throw new Error(`round ${round + 1}: expected the same tokens with the cache on and off, got others`);
    }
  }
  for (const { runtime, engine, tiers, fatal } of Object.values(engines)) {
    if (fatal.length > 0) throw fatal[0];
    await Promise.all([engine.close(), tiers.close()]);
    runtime.close();
  }
  console.log('| computed once | cache off | cache on | off / on |');
  console.log('|---|---|---|---|');
  const of = (name: 'on' | 'off', field: 'seconds' | 'ttftMs') => bursts[name].map((one) => one[field]);
  for (const [title, field] of [
    ['all answers, s', 'seconds'],
    ['TTFT p50, ms', 'ttftMs'],
  ] as const) {
    const [off, on] = [of('off', field), of('on', field)];
    console.log(
      `| ${title} | ${showSpread(spread(off))} | ${showSpread(spread(on))} | ${showSpread(ratios(off, on))} |`,
    );
  }
  const share = bursts.on[0]!.cachedTokens / (numSequences * (prefixTokens + questionTokens));
  console.log(
    `\nOf the prompts' tokens ${(100 * share).toFixed(1)} % were another sequence's; all tokens are the same.\n`,
  );
}

/** Sequences whose prefix is in the same pages, or in pages of their own. */
function partsOf(system: number[], isShared: boolean): StepPart[] {
  return Array.from({ length: numSequences }, (_, i) => {
    const firstOwn = numSequences * prefixPages + i * ownPages;
    const firstPrefix = isShared ? 0 : i * prefixPages;
    const pages = (first: number, count: number) => Array.from({ length: count }, (_, k) => first + k);
    return {
      tokens: [...system, ...draw(seededRandom(1000 + i), questionTokens + numSteps)],
      start: 0,
      count: 0,
      blocks: [...pages(firstPrefix, prefixPages), ...pages(firstOwn, ownPages)],
    };
  });
}

/** The prefix is computed into the first pages, and copied into everybody's own by way of the host arena. */
async function fill(runtime: Runtime, system: number[]): Promise<void> {
  const [first, ...others] = partsOf(system, false);
  for (let start = 0; start < prefixTokens; start += 256) {
    const count = Math.min(256, prefixTokens - start);
    await runtime.step(stepBatch([{ ...first!, start, count, sample: 'none' }]));
  }
  const hostPages = Int32Array.from({ length: prefixPages }, (_, i) => i);
  await runtime.copyPages('toHost', Int32Array.from(first!.blocks.slice(0, prefixPages)), hostPages);
  for (const { blocks } of others) {
    await runtime.copyPages('toDevice', hostPages, Int32Array.from(blocks.slice(0, prefixPages)));
  }
  for (const part of partsOf(system, false)) {
    await runtime.step(stepBatch([{ ...part, start: prefixTokens, count: questionTokens, sample: 'none' }]));
  }
}

async function compareSteps(): Promise<void> {
  const runtime = await open(model, { deviceMemoryBytes, hostMemoryBytes: prefixPages * pageBytes });
  const system = draw(seededRandom(1), prefixTokens);
  await fill(runtime, system);
  const stepMs: Record<'shared' | 'own', number[]> = { shared: [], own: [] };
  const parts = { shared: partsOf(system, true), own: partsOf(system, false) };
  let drawn = '';
  for (let round = 0; round <= numStepRounds; round++) {
    for (const name of ['own', 'shared'] as const) {
      const tokens: number[] = [];
      const beginMs = performance.now();
      for (let step = 0; step < numSteps; step++) {
        const start = prefixTokens + questionTokens + step;
        const result = await runtime.step(
          stepBatch(parts[name].map((part) => ({ ...part, start, count: 1 }))),
        );
        tokens.push(...result.tokens);
      }
      // The first round warms up.
      if (round > 0) stepMs[name].push((performance.now() - beginMs) / numSteps);
      drawn ||= tokens.join();
      if (tokens.join() !== drawn) throw new Error(`${name}: expected the same tokens, got others`);
    }
  }
  runtime.close();
  console.log('| read once per step | pages of their own | the same pages | own / same |');
  console.log('|---|---|---|---|');
  const { own, shared } = stepMs;
  console.log(
    `| decode step, ms | ${showSpread(spread(own))} | ${showSpread(spread(shared))} | ${showSpread(ratios(own, shared))} |`,
  );
  console.log(
    `\nMedians of ${numRounds} rounds of requests and ${numStepRounds} of ${numSteps} steps (lowest–highest); ratios round by round.`,
  );
}

await compareEngines();
await compareSteps();
