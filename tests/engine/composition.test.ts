/** Sequences on several weighted adapters: what they compute, who keeps what for them, and who waits for whom. */
import { describe, expect, test, vi } from 'vitest';
import { type Composition, compose, voiceOf } from '../../engine/adapters/composition.ts';
import { EngineError } from '../../engine/errors.ts';
import { purgeAdapter } from '../../engine/purge.ts';
import {
  type EngineParts,
  prompt,
  readFakeAdapter,
  start,
  startEngine,
} from '../fixtures/fake-engine-parts.ts';
import { greedyAlone } from '../fixtures/generate-alone.ts';
import { seededRandom } from '../fixtures/seeded-random.ts';

type Options = Parameters<typeof startEngine>[0];

/** Registered under `names`, each with content of its own, of that many pages. */
async function withAdapters(names: string[], numPages: number, options: Options = {}): Promise<EngineParts> {
  const parts = startEngine(options);
  for (const name of names) await parts.tiers.load(name, `/${name}-r${numPages}`, false);
  await vi.waitFor(() => expect([...parts.tiers.adapters].some(({ isMoving }) => isMoving)).toBe(false));
  return parts;
}

const sumOf = ({ tiers }: EngineParts, weights: Record<string, number>): Composition =>
  compose(Object.entries(weights).map(([name, weight]) => ({ adapter: tiers.get(name)!, weight })));
const adapterOf = ({ tiers }: EngineParts, name: string) => tiers.get(name)!;

async function expectAlone(adapters: Composition, tokens: number[], promptTokens: Uint8Array): Promise<void> {
  const voice = adapters.map(({ adapter, weight }) => ({ path: adapter.file.path, weight }));
  expect(tokens).toEqual(await greedyAlone(promptTokens, tokens.length, voice));
}

function expectAtRest({ arena, blocks, engine, tiers, fatal }: EngineParts): void {
  expect(fatal).toEqual([]);
  arena.check();
  expect([engine.numRunning, engine.numWaiting, blocks.numHeldPages]).toEqual([0, 0, 0]);
  for (const { numInFlight, numRunning } of tiers.adapters) expect([numInFlight, numRunning]).toEqual([0, 0]);
}

describe('a composition', () => {
  test('is the same whatever the order of its names, and an adapter alone is that adapter', async () => {
    const parts = await withAdapters(['a', 'b'], 1);
    const [a, b] = ['a', 'b'].map((name) => adapterOf(parts, name));
    expect(voiceOf(sumOf(parts, { b: -0.5, a: 2 }))).toBe(`${a!.digest}@2+${b!.digest}@-0.5`);
    expect(voiceOf(sumOf(parts, { a: 2, b: -0.5 }))).toBe(`${a!.digest}@2+${b!.digest}@-0.5`);
    expect(voiceOf(sumOf(parts, { a: 1 }))).toBe(a!.digest);
    expect(voiceOf(sumOf(parts, { a: 0.5 }))).toBe(`${a!.digest}@0.5`);
    expect(voiceOf(compose([]))).toBe('');
  });

  test('adds the weights of names of one adapter', async () => {
    const parts = await withAdapters(['a', 'b'], 1);
    await parts.tiers.load('again', '/a-r1', false);
    expect(voiceOf(sumOf(parts, { a: 0.25, again: 0.75 }))).toBe(adapterOf(parts, 'a').digest);
    expect(voiceOf(sumOf(parts, { a: 1, again: -1 }))).toBe('');
  });

  test('gives what it gives alone, beside its adapters, the base and other weights', async () => {
    const parts = await withAdapters(['a', 'b', 'c'], 1);
    const voices = [
      {},
      { a: 1 },
      { b: 1 },
      { a: 1, b: 1 },
      { a: 1, b: -1 },
      { a: 0.5, b: 0.5, c: 0.5 },
      { c: 0.5 },
    ];
    const runs = voices.map((weights) => {
      const adapters = sumOf(parts, weights);
      return { adapters, run: start(parts, { promptTokens: prompt(40), adapters }) };
    });
    const outputs = new Set<string>();
    for (const { adapters, run } of runs) {
      const { tokens } = await run.done;
      await expectAlone(adapters, tokens, prompt(40));
      outputs.add(`${tokens}`);
    }
    expect(outputs.size).toBe(voices.length);
    expectAtRest(parts);
  });

  test('shares KV with itself, in any order of names, and with nobody else', async () => {
    const parts = await withAdapters(['a', 'b'], 1);
    const cachedOf = async (weights: Record<string, number>) => {
      const { handle, done } = start(parts, { promptTokens: prompt(64), adapters: sumOf(parts, weights) });
      await done;
      return handle.sequence.numCachedTokens;
    };
    expect(await cachedOf({ a: 1, b: 0.5 })).toBe(0);
    expect(await cachedOf({ b: 0.5, a: 1 })).toBe(48);
    for (const weights of [{ a: 1 }, { b: 0.5 }, { a: 1, b: 0.25 }, { a: 0.5, b: 1 }, {}])
      expect(await cachedOf(weights)).toBe(0);
  });

  test('counts for each of its adapters', async () => {
    const parts = await withAdapters(['a', 'b', 'c'], 1);
    const { done } = start(parts, { promptTokens: prompt(40), adapters: sumOf(parts, { a: 1, b: 2 }) });
    const flights = () => parts.tiers.statuses().map(({ names, inFlight }) => [names[0], inFlight]);
    expect(flights()).toEqual([
      ['a', 1],
      ['b', 1],
      ['c', 0],
    ]);
    expect([...parts.engine.waitingAdapters].map(({ names }) => [...names][0])).toEqual(['a', 'b']);
    await done;
    const requests = parts.tiers.statuses().map(({ names, requests }) => [names[0], requests]);
    expect(requests).toEqual([
      ['a', 1],
      ['b', 1],
      ['c', 0],
    ]);
    for (const name of ['a', 'b'])
      expect(parts.blocks.countsOf(adapterOf(parts, name).digest)).toEqual({ queries: 40, hits: 0 });
  });
});

describe('room', () => {
  test('is wanted for all of its adapters: what cannot fit is refused at once', async () => {
    const parts = await withAdapters(['a', 'b', 'c'], 3, { runtime: { numPages: 10 } });
    start(parts, { adapters: sumOf(parts, { a: 1, b: 1 }), params: { maxTokens: 50 } });
    const ask = () =>
      start(parts, { adapters: sumOf(parts, { a: 1, b: 1, c: 1 }), params: { maxTokens: 50 } });
    expect(ask).toThrow('room for 16 beside its adapters and the pinned ones');
  });

  test('is made by what no member is: one of them never leaves for another', async () => {
    const parts = await withAdapters(['a', 'b', 'c'], 3, { runtime: { numPages: 8, numHostPages: 9 } });
    const moves: string[] = [];
    parts.tiers.residency.onMove = ({ from, to }) => moves.push(`${from} ${to}`);
    for (const weights of [
      { a: 1, b: 1 },
      { b: 1, c: 1 },
      { a: 1, c: 1 },
    ]) {
      moves.length = 0;
      const adapters = sumOf(parts, weights);
      const { tokens } = await start(parts, { adapters }).done;
      await expectAlone(adapters, tokens, new TextEncoder().encode('hello'));
      expect(moves.filter((move) => move === 'host device').length).toBeLessThanOrEqual(2);
    }
    expectAtRest(parts);
  });

  test('goes to the first sequence in the queue, when each of two holds half of what both want', async () => {
    const parts = await withAdapters(['a', 'b', 'c', 'd'], 3, {
      runtime: { numPages: 8 },
      tiers: { maxLoads: 1 },
    });
    // Before the queue is served, one adapter of each is there.
    parts.tiers.residency.evictWaiting();
    for (const name of ['a', 'd']) await start(parts, { adapters: sumOf(parts, { [name]: 1 }) }).done;
    const runs = [
      { a: 1, b: 1 },
      { c: 1, d: 1 },
      { b: 1, c: 1 },
      { a: 1, d: 1 },
    ].map((weights) => {
      const adapters = sumOf(parts, weights);
      return { adapters, run: start(parts, { adapters }) };
    });
    for (const { adapters, run } of runs)
      await expectAlone(adapters, (await run.done).tokens, new TextEncoder().encode('hello'));
    expectAtRest(parts);
  });

  test('comes to a composition although sequences on one of its adapters never cease', async () => {
    const parts = await withAdapters(['a', 'b'], 3, { runtime: { numPages: 12 } });
    parts.tiers.residency.evictWaiting([adapterOf(parts, 'a')]);
    let isOver = false;
    const busy = async (first: number) => {
      for (let i = 0; !isOver; i++) {
        const promptTokens = prompt(40, first + 7 * i);
        // Eight blocks of KV at most: with both adapters there is room for six.
        await start(parts, { promptTokens, adapters: sumOf(parts, { a: 1 }), params: { maxTokens: 80 } })
          .done;
      }
    };
    const others = [busy(0), busy(100)];
    const adapters = sumOf(parts, { a: 1, b: 1 });
    const { tokens, last } = await start(parts, { adapters }).done;
    isOver = true;
    expect(last.finishReason).toBe('length');
    await expectAlone(adapters, tokens, new TextEncoder().encode('hello'));
    await Promise.all(others);
    expectAtRest(parts);
  });

  test('is found for a composition whose adapter was unloaded while it waits behind others', async () => {
    const parts = await withAdapters(['a', 'b', 'c'], 3, { runtime: { numPages: 8 } });
    const held = Promise.withResolvers<void>();
    parts.tiers.residency.evictWaiting();
    await start(parts, { adapters: sumOf(parts, { a: 1 }) }).done;
    parts.runtime.loadGate = held.promise;
    const runs = [
      { b: 1, c: 1 },
      { a: 1, b: 1 },
    ].map((weights) => start(parts, { adapters: sumOf(parts, weights) }));
    parts.tiers.unload('a');
    held.resolve();
    for (const { done } of runs) expect((await done).last.finishReason).toBe('length');
    expectAtRest(parts);
    expect([...parts.tiers.adapters]).toHaveLength(2);
  });
});

describe('removing one of its adapters', () => {
  test('waits for it when it is only unloaded', async () => {
    const parts = await withAdapters(['a', 'b'], 1);
    const adapters = sumOf(parts, { a: 1, b: 1 });
    const run = start(parts, { adapters, params: { maxTokens: 40 } });
    await vi.waitFor(() => expect(run.handle.sequence.numOutputTokens).toBeGreaterThan(0), { interval: 1 });
    parts.tiers.unload('a');
    expect(parts.tiers.statuses().map(({ names }) => names)).toEqual([[], ['b']]);
    await expectAlone(adapters, (await run.done).tokens, new TextEncoder().encode('hello'));
    await vi.waitFor(() => expect(parts.tiers.statuses().map(({ names }) => names)).toEqual([['b']]));
  });

  test('ends it when it is purged, and takes the KV that both made', async () => {
    const parts = await withAdapters(['a', 'b'], 1);
    const adapters = sumOf(parts, { a: 1, b: 1 });
    await start(parts, { promptTokens: prompt(64), adapters }).done;
    const run = start(parts, { promptTokens: prompt(20, 5), adapters, params: { maxTokens: 400 } });
    await vi.waitFor(() => expect(run.handle.sequence.numOutputTokens).toBeGreaterThan(0), { interval: 1 });
    const sources = { adapters: { purge: async () => 0 } };
    const { digest } = adapterOf(parts, 'b');
    const report = await purgeAdapter(
      { ...parts, sources: sources as never, kvKeepers: [parts.blocks] },
      digest,
    );
    expect((await run.done).last.error).toMatchObject({ code: 'adapter_purged' });
    expect(report.kvBytes.device).toBeGreaterThanOrEqual(4 * parts.arena.pageBytes);
    expect([...parts.tiers.adapters].map(({ numInFlight }) => numInFlight)).toEqual([0]);
  });

  test('fails those that wait when it cannot be brought up', async () => {
    const parts = await withAdapters(['a', 'b'], 3, { runtime: { numPages: 12 } });
    parts.tiers.residency.evictWaiting([adapterOf(parts, 'a')]);
    parts.runtime.failNextLoad = new Error('input/output error');
    const { last } = await start(parts, { adapters: sumOf(parts, { a: 1, b: 1 }) }).done;
    expect(last.error).toBeInstanceOf(EngineError);
    expect(last.error).toMatchObject({ code: 'adapter_invalid' });
    expectAtRest(parts);
  });
});

/** Raised for a long proof. */
const numRounds = Number(process.env.MOTET_SCHEDULES ?? 200) / 10;

test(
  'whatever compositions wait together in a small arena, each runs in the end',
  async () => {
    for (let seed = 0; seed < numRounds; seed++) {
      const random = seededRandom(seed);
      const names = ['a', 'b', 'c', 'd', 'e', 'f', 'g', 'h'];
      const parts = startEngine({
        runtime: { numPages: random.from(11, 14), numHostPages: random.pick([0, 6, 30]) },
        limits: { maxSequences: random.from(1, 4) },
        tiers: { maxLoads: random.from(1, 2), readFile: readFakeAdapter },
      });
      for (const [i, name] of names.entries())
        await parts.tiers.load(name, `/${name}-r${1 + (i % 2)}`, false);
      const runs = Array.from({ length: 24 }, async () => {
        for (let i = random.below(6); i > 0; i--) await new Promise((resolve) => setImmediate(resolve));
        const weights = Object.fromEntries(
          Array.from({ length: random.from(1, 4) }, () => [random.pick(names), random.pick([1, 0.5])]),
        );
        const adapters = sumOf(parts, weights);
        const promptTokens = prompt(random.from(1, 16), random.below(200));
        const { done } = start(parts, { promptTokens, adapters, params: { maxTokens: random.from(1, 32) } });
        const { tokens, last } = await done;
        expect([seed, last.finishReason, last.error]).toEqual([seed, 'length', null]);
        await expectAlone(adapters, tokens, promptTokens);
      });
      await Promise.all(runs);
      expectAtRest(parts);
      await Promise.all([parts.engine.close(), parts.tiers.close()]);
    }
  },
  numRounds * 2000,
);
