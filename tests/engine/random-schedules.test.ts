/**
 * Random loads on the fake runtime: small arenas that force preemption, small token budgets, cancellations, ends of every
 * kind, adapters that come and go, alone and in compositions; most with steps planned ahead, some without. Each sequence must give the tokens that
 * it gives alone, and at the end nothing may be held.
 */
import { expect, test, vi } from 'vitest';
import { type Composition, compose } from '../../engine/adapters/composition.ts';
import { EngineError } from '../../engine/errors.ts';
import { lowestPriority, type Standing } from '../../engine/protocol.ts';
import { defaultSampling, type SamplingParams } from '../../engine/sampling.ts';
import type { Sequence } from '../../engine/sequence.ts';
import type { FinishReason } from '../../engine/stop.ts';
import { start, startEngine } from '../fixtures/fake-engine-parts.ts';
import { fakeEos } from '../fixtures/fake-text.ts';
import { generateAlone } from '../fixtures/generate-alone.ts';
import { type SeededRandom, seededRandom } from '../fixtures/seeded-random.ts';

/** Raised to 10,000 and more for a long proof. */
const numSchedules = Number(process.env.MOTET_SCHEDULES ?? 1000);
const numGroups = 10;

function randomParams(random: SeededRandom): SamplingParams {
  return {
    ...defaultSampling(),
    temperature: random.pick([0, 1]),
    topK: random.below(3),
    presencePenalty: random.pick([0, 0, 0.5]),
    repetitionPenalty: random.pick([1, 1, 1.25]),
    seed: BigInt(random.below(1000)),
    biasIds: random.pick([[], [3], [5, 6]]),
    biasValues: random.pick([[], [1], [2, 3]]),
    maxTokens: random.below(8) === 0 ? null : random.from(1, 24),
    minTokens: random.pick([0, 0, 3]),
    ignoreEos: random.pick([true, false]),
    stopTokenIds: random.pick([[], [7], Array.from({ length: 20 }, (_, i) => 10 * i)]),
    stopStrings: random.pick([[], [], ['a', 'b', 'c', 'd', 'e', 'f', 'g', 'h']]),
    numLogprobs: random.pick([null, 0, 3]),
  };
}

interface Counts {
  /** Sequences. */
  numPreempted: number;
  /** Tokens that the prefix cache had. */
  numHits: number;
  /** Copies from the host arena. */
  numFetched: number;
  /** Steps that read the host arena. */
  numStreaming: number;
  /** Sequences of several adapters. */
  numComposed: number;
  /** Of places, to sequences of a higher priority. */
  numYields: number;
}

/** Every fourth has sequences that the device arena has no room for. */
async function runSchedule(seed: number): Promise<Counts> {
  const random = seededRandom(seed);
  const randomAlike = seededRandom(seed + 0.5 * 2 ** 31);
  const isLong = seed % 4 === 3;
  const parts = startEngine({
    runtime: {
      numPages: isLong ? randomAlike.from(8, 12) : random.from(6, 20),
      numHostPages: isLong ? randomAlike.from(12, 30) : random.pick([0, 3, 12]),
    },
    limits: {
      maxBatchTokens: random.from(8, 48),
      maxSequences: random.from(1, 8),
      maxModelLen: isLong ? 400 : 96,
    },
    tiers: { pageWaitMs: 5 },
    maxStepsInFlight: random.pick([2, 2, 1]),
    isCaching: randomAlike.below(4) > 0,
  });
  const { blocks, engine, tiers, arena } = parts;
  // The fake's steps take no time: whether a copy is cheaper is drawn instead.
  vi.spyOn(parts.costs, 'prefillSeconds').mockReturnValue(randomAlike.pick([1, 1, 1e-12]));
  const beginnings = [0, 1].map(() => Int32Array.from({ length: 60 }, () => randomAlike.below(256)));
  const runs: Promise<number>[] = [];
  const loads: Promise<unknown>[] = [];
  let numComposed = 0;
  // Names are loaded in place, with other content, while sequences use the old one.
  const names = ['a', 'b', 'c'];

  for (let turn = 0; turn < 10; turn++) {
    const action = random.below(10);
    if (action < 2) {
      const path = `/adapters/${random.below(4)}-r${random.from(1, 2)}`;
      const isPinned = random.pick([true, false, null, null]);
      loads.push(tiers.load(random.pick(names), path, true, isPinned).catch(expectRefusal));
    } else if (action < 3) {
      const name = random.pick(names);
      if (tiers.get(name)) tiers.unload(name);
    } else {
      const params = randomParams(random);
      params.biasValues = params.biasIds.map(() => 2);
      const chosen = random.below(3) === 0 ? [] : [random.pick(names)];
      if (chosen.length > 0 && randomAlike.below(3) === 0) chosen.push(randomAlike.pick(names));
      const adapters = composed(parts, chosen, randomAlike);
      if (adapters.length > 1) numComposed++;
      const length = isLong && randomAlike.below(3) === 0 ? randomAlike.from(100, 360) : random.from(1, 60);
      const promptTokens = Int32Array.from({ length }, () => random.below(256));
      if (randomAlike.below(2) === 0) {
        const numAlike = randomAlike.below(Math.min(60, promptTokens.length) + 1);
        promptTokens.set(randomAlike.pick(beginnings).subarray(0, numAlike));
      }
      const cancelAfter = random.below(4) === 0 ? random.below(6) : Number.POSITIVE_INFINITY;
      runs.push(runOne(parts, promptTokens, params, adapters, randomStanding(randomAlike), cancelAfter));
    }
    for (let i = random.below(8); i > 0; i--) await new Promise((resolve) => setImmediate(resolve));
    arena.check();
    if (turn === 5) void blocks.purge(`sha256:${Buffer.from('/adapters/0-r1').toString('hex')}`);
  }
  await Promise.all(loads);
  const yields = await Promise.all(runs);
  for (const name of names) if (tiers.get(name)) tiers.unload(name);
  await vi.waitFor(() => expect(engine.numRunning).toBe(0), { interval: 1 });
  await Promise.all([engine.close(), tiers.close()]);
  expect(parts.fatal).toEqual([]);
  expect(arena.numFree).toBe(arena.numPages);
  expect(parts.runtime.adapters.size).toBe(0);
  arena.check();
  expect(parts.hostArena?.numFree).toBe(parts.hostArena?.numPages);
  const numToDevice = parts.runtime.copies.filter(({ direction }) => direction === 'toDevice').length;
  const total = async (name: string) =>
    (await parts.metrics.registry.getSingleMetric(name)!.get()).values[0]?.value ?? 0;
  return {
    numPreempted: await total('vllm:num_preemptions_total'),
    numHits: await total('vllm:prefix_cache_hits_total'),
    numFetched: numToDevice,
    numStreaming: parts.runtime.steps.filter(({ numHostBlocks }) => numHostBlocks > 0).length,
    numComposed,
    numYields: yields.reduce((sum, count) => sum + count, 0),
  };
}

function randomStanding(random: SeededRandom): Standing {
  const priority = random.pick([lowestPriority, lowestPriority, 0, 0, 3]);
  return { tenant: random.pick(['', 'a', 'b']), weight: random.pick([1, 2, 0.5]), priority };
}

/** Those of the names that point at an adapter; of one, that adapter as it is. */
function composed(
  { tiers }: ReturnType<typeof startEngine>,
  names: readonly string[],
  random: SeededRandom,
): Composition {
  const weight = () => (names.length === 1 ? 1 : random.pick([1, 0.5, -2]));
  return compose(
    names.flatMap((name) => {
      const adapter = tiers.get(name);
      return adapter ? [{ adapter, weight: weight() }] : [];
    }),
  );
}

async function runOne(
  parts: ReturnType<typeof startEngine>,
  promptTokens: Int32Array,
  params: SamplingParams,
  adapters: Composition,
  standing: Standing,
  cancelAfter: number,
): Promise<number> {
  let outcome: Awaited<ReturnType<typeof start>['done']>;
  let sequence: Sequence;
  try {
    let numOutputs = 0;
    const { handle, done } = start(parts, {
      promptTokens,
      params,
      adapters,
      standing,
      onOutput: () => {
        if (numOutputs++ >= cancelAfter) handle.cancel();
      },
    });
    sequence = handle.sequence;
    if (cancelAfter === 0) handle.cancel();
    outcome = await done;
  } catch (error) {
    expectRefusal(error);
    return 0;
  }
  const { tokens, last } = outcome;
  // The host arena may have no room for a long one when its turn comes.
  if (last.finishReason === 'error') expectRefusal(last.error);
  else if (last.finishReason !== 'abort') {
    for (let count = 1; count < tokens.length; count++) expect(endAfter(tokens, count, params)).toBe(null);
    const isAtArenaLimit = last.finishReason === 'length' && params.maxTokens === null;
    if (!isAtArenaLimit) expect(endAfter(tokens, tokens.length, params)).toBe(last.finishReason);
  }
  const voice = adapters.map(({ adapter, weight }) => ({ path: adapter.file.path, weight }));
  const alone = await generateAlone(promptTokens, params, voice, tokens.length);
  expect(tokens).toEqual(alone);
  return sequence.numYields;
}

/** Why a sequence ends after `count` of its output tokens; null: it does not. */
function endAfter(tokens: readonly number[], count: number, params: SamplingParams): FinishReason | null {
  const token = tokens[count - 1]!;
  const isEnd = params.stopTokenIds.includes(token) || (!params.ignoreEos && token === fakeEos);
  const isStop = isEnd || params.stopStrings.includes(String.fromCharCode(token));
  if (isStop && count > params.minTokens) return 'stop';
  return count === params.maxTokens ? 'length' : null;
}

/** Too little room is an answer; anything else is a fault. */
function expectRefusal(error: unknown): void {
  expect(error).toBeInstanceOf(EngineError);
  expect((error as EngineError).code).toBe('arena_full');
}

test.each(Array.from({ length: numGroups }, (_, group) => group))(
  'every sequence of a random schedule gives the tokens it gives alone (group %i of 10)',
  async (group) => {
    let numPreempted = 0;
    let numHits = 0;
    let numFetched = 0;
    let numStreaming = 0;
    let numComposed = 0;
    let numYields = 0;
    for (let i = 0; i < numSchedules / numGroups; i++) {
      const seed = group * numSchedules + i;
      try {
        const counts = await runSchedule(seed);
        numPreempted += counts.numPreempted;
        numHits += counts.numHits;
        numFetched += counts.numFetched;
        numStreaming += counts.numStreaming;
        numComposed += counts.numComposed;
        numYields += counts.numYields;
      } catch (cause) {
        throw new Error(`schedule with seed ${seed} failed: ${(cause as Error).message}`, { cause });
      }
    }
    // Otherwise the arenas are too large or the prompts too different, and the test says less than its name.
    expect(numPreempted).toBeGreaterThan(0);
    expect(numHits).toBeGreaterThan(0);
    expect(numFetched).toBeGreaterThan(0);
    expect(numStreaming).toBeGreaterThan(0);
    expect(numComposed).toBeGreaterThan(0);
    expect(numYields).toBeGreaterThan(0);
  },
  numSchedules * 30,
);
