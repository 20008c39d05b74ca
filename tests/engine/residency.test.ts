/** Adapters between device, host and disk, as requests see it: who waits, who leaves, and what comes back. */
import { describe, expect, test, vi } from 'vitest';
import type { Adapter } from '../../engine/adapters/adapter-tiers.ts';
import { EngineError } from '../../engine/errors.ts';
import { defaultSampling } from '../../engine/sampling.ts';
import { type EngineParts, readFakeAdapter, start, startEngine } from '../fixtures/fake-engine-parts.ts';
import { generateAlone } from '../fixtures/generate-alone.ts';
import { seededRandom } from '../fixtures/seeded-random.ts';

type Options = Parameters<typeof startEngine>[0];

/** Registered under `names`, each with content of its own and of that rank (which is its pages). */
async function withAdapters(names: string[], rank: number, options: Options): Promise<EngineParts> {
  const parts = startEngine(options);
  for (const name of names) await parts.tiers.load(name, pathOf(name, rank), false);
  await quiet(parts);
  return parts;
}
const pathOf = (name: string, rank: number) => `/${name}-r${rank}`;
const adapterOf = ({ tiers }: EngineParts, name: string) => tiers.get(name)!;
const tierOf = (parts: EngineParts, name: string) => parts.tiers.residency.tierOf(adapterOf(parts, name));
const tiersOf = (parts: EngineParts, names: string[]) => names.map((name) => tierOf(parts, name));

/** No copy is under way. */
const quiet = ({ tiers }: EngineParts) =>
  vi.waitFor(() => expect([...tiers.adapters].some(({ isMoving }) => isMoving)).toBe(false), { interval: 1 });
const ask = (parts: EngineParts, name: string, maxTokens = 8) =>
  start(parts, { prompt: `ask ${name}`, adapter: adapterOf(parts, name), params: { maxTokens } });

/** A sequence that runs, and may come to need six pages. */
async function running(parts: EngineParts, name: string) {
  const run = ask(parts, name, 90);
  await vi.waitFor(() => expect(run.handle.sequence.numOutputTokens).toBeGreaterThan(0), { interval: 1 });
  return run;
}

async function expectAlone(parts: EngineParts, name: string, tokens: number[]): Promise<void> {
  const { path } = adapterOf(parts, name).file;
  const prompt = new TextEncoder().encode(`ask ${name}`);
  const params = { ...defaultSampling(), temperature: 0, ignoreEos: true };
  expect(tokens).toEqual(await generateAlone(prompt, params, path, tokens.length));
}

/** Nothing is held but what is registered. */
function expectBooks({ arena, blocks, hostArena, engine, tiers, fatal }: EngineParts): void {
  expect(fatal).toEqual([]);
  arena.check();
  hostArena?.check();
  expect([engine.numRunning, engine.numWaiting, blocks.numHeldPages]).toEqual([0, 0, 0]);
  const adapters = [...tiers.adapters];
  const pages = (of: (adapter: Adapter) => boolean) =>
    adapters.filter(of).reduce((sum, { numPages }) => sum + numPages, 0);
  expect(arena.numUsed('adapter')).toBe(pages(({ device }) => device !== null));
  expect(hostArena?.numUsed('adapter') ?? 0).toBe(pages(({ host }) => host !== null));
  expect(adapters.every(({ numInFlight, numRunning }) => numInFlight === 0 && numRunning === 0)).toBe(true);
}

describe('more adapters than the device holds', () => {
  test('may be registered: the least valuable leaves, and host and disk keep it', async () => {
    const names = ['a', 'b', 'c', 'd'];
    const parts = await withAdapters(names, 3, { runtime: { numPages: 10, numHostPages: 9 } });
    // The host arena keeps the first three; what nobody used pushes nothing out of it.
    expect(tiersOf(parts, names)).toEqual(['host', 'device', 'device', 'device']);
    await ask(parts, 'd').done;
    await ask(parts, 'c').done;
    await ask(parts, 'a').done;
    expect(tiersOf(parts, names)).toEqual(['device', 'host', 'device', 'device']);
    await quiet(parts);
    expectBooks(parts);
  });

  test('come back from the host arena without their files, and give the same tokens', async () => {
    const parts = await withAdapters(['a', 'b'], 3, { runtime: { numPages: 5, numHostPages: 6 } });
    const load = vi.spyOn(parts.runtime, 'loadAdapter');
    for (const name of ['a', 'b', 'a', 'b'])
      await expectAlone(parts, name, (await ask(parts, name).done).tokens);
    expect(load).not.toHaveBeenCalled();
    expect(parts.runtime.copies.filter(({ direction }) => direction === 'toDevice')).toHaveLength(4);
  });

  test('come back from their files where there is no host arena, and are verified again', async () => {
    const readFile = vi.fn(readFakeAdapter);
    const parts = await withAdapters(['a', 'b'], 3, { runtime: { numPages: 5 }, tiers: { readFile } });
    expect(tiersOf(parts, ['a', 'b'])).toEqual(['disk', 'device']);
    await expectAlone(parts, 'a', (await ask(parts, 'a').done).tokens);
    expect(readFile).toHaveBeenCalledTimes(3);
    expect(tiersOf(parts, ['a', 'b'])).toEqual(['device', 'disk']);
  });

  test('leave the device for KV when nobody uses them', async () => {
    const parts = await withAdapters(['a', 'b'], 3, { runtime: { numPages: 8 } });
    const { last, tokens } = await start(parts, { params: { maxTokens: 80 } }).done;
    expect([last.finishReason, tokens.length]).toEqual(['length', 80]);
    expect(tiersOf(parts, ['a', 'b'])).not.toContain('host');
    expect(parts.arena.numUsed('adapter')).toBeLessThan(6);
    expectBooks(parts);
  });

  test('tell where each one is', async () => {
    const parts = await withAdapters(['a', 'b'], 3, { runtime: { numPages: 5, numHostPages: 3 } });
    expect(parts.tiers.statuses()).toMatchObject([
      { names: ['a'], tier: 'host', bytes: 3 * 1024, pinned: false },
      { names: ['b'], tier: 'device', bytes: 3 * 1024, pinned: false },
    ]);
  });
});

test('a tenant that asks for many cold ones does not hold up the cold one of another', async () => {
  const many = Array.from({ length: 12 }, (_, i) => `m${i}`);
  const parts = await withAdapters(['quiet', ...many, 'warm'], 3, { runtime: { numPages: 12 } });
  const load = vi.spyOn(parts.runtime, 'loadAdapter');
  const askAs = (tenant: string, name: string) =>
    start(parts, {
      prompt: `ask ${name}`,
      adapter: adapterOf(parts, name),
      params: { maxTokens: 4 },
      standing: { tenant, weight: 1, priority: 0 },
    }).done;
  const cold = many.filter((name) => tierOf(parts, name) === 'disk');
  expect(cold.length).toBeGreaterThan(8);
  const ended: string[] = [];
  const noteEnd = (name: string) => () => void ended.push(name);
  const flood = cold.map((name) => askAs('many', name).then(noteEnd(name)));
  await Promise.all([...flood, askAs('one', 'quiet').then(noteEnd('quiet'))]);
  // Two were being read when it came, and one may have been next.
  const read = load.mock.calls.map(([path]) => path);
  expect(read.findIndex((path) => path.includes('quiet'))).toBeLessThanOrEqual(3);
  expect(ended.indexOf('quiet')).toBeLessThanOrEqual(3);
  expect(ended).toHaveLength(cold.length + 1);
  expectBooks(parts);
});

describe('a load in place with a pin', () => {
  test('keeps what it brings up when the last other name goes meanwhile', async () => {
    const parts = await withAdapters(['a', 'b'], 3, { runtime: { numPages: 7 } });
    expect(tiersOf(parts, ['a', 'b'])).toEqual(['device', 'device']);
    await parts.tiers.load('c', pathOf('c', 3), false);
    expect(tierOf(parts, 'a')).toBe('disk');
    const loadAdapter = parts.runtime.loadAdapter.bind(parts.runtime);
    vi.spyOn(parts.runtime, 'loadAdapter').mockImplementationOnce((...args) => {
      parts.tiers.unload('a');
      return loadAdapter(...args);
    });
    await parts.tiers.load('again', pathOf('a', 3), false, true);
    expect(tierOf(parts, 'again')).toBe('device');
    expect(adapterOf(parts, 'again').isPinned).toBe(true);
    await quiet(parts);
    expectBooks(parts);
  });
});

describe('a sequence whose adapter is not on the device', () => {
  test('waits alone: those that run and those behind it go on', async () => {
    const parts = await withAdapters(['a', 'b'], 3, { runtime: { numPages: 12, numHostPages: 6 } });
    parts.tiers.residency.evictWaiting([adapterOf(parts, 'b')]);
    const { promise: copyGate, resolve: open } = Promise.withResolvers<void>();
    parts.runtime.copyGate = copyGate;
    const first = ask(parts, 'a');
    const others = [ask(parts, 'b'), start(parts, { params: { maxTokens: 8 } })];
    await Promise.all(others.map(({ done }) => done));
    expect(first.handle.sequence.status).toBe('waiting');
    open();
    await expectAlone(parts, 'a', (await first.done).tokens);
  });

  test('is one of a herd: one copy, or one read, for all of them', async () => {
    for (const numHostPages of [0, 6]) {
      const parts = await withAdapters(['a'], 3, { runtime: { numPages: 12, numHostPages } });
      parts.tiers.residency.evictWaiting();
      const load = vi.spyOn(parts.runtime, 'loadAdapter');
      const copy = vi.spyOn(parts.runtime, 'copyPages');
      const runs = await Promise.all(Array.from({ length: 20 }, () => ask(parts, 'a').done));
      expect(new Set(runs.map(({ tokens }) => `${tokens}`)).size).toBe(1);
      expect(load.mock.calls.length + copy.mock.calls.length).toBe(1);
    }
  });

  test('gets the reason when it cannot be brought up, and later ones may try again', async () => {
    const parts = await withAdapters(['a', 'b'], 3, { runtime: { numPages: 12 } });
    parts.tiers.residency.evictWaiting([adapterOf(parts, 'b')]);
    const other = await running(parts, 'b');
    parts.runtime.failNextLoad = new Error('input/output error');
    const runs = [ask(parts, 'a'), ask(parts, 'a')];
    for (const { done } of runs) {
      const { last } = await done;
      expect(last).toMatchObject({ finishReason: 'error', error: { code: 'adapter_invalid' } });
      expect(last.error?.message).toContain('input/output error');
    }
    await expectAlone(parts, 'a', (await ask(parts, 'a').done).tokens);
    await expectAlone(parts, 'b', (await other.done).tokens);
  });

  test('is refused when its files have become others, and names both digests', async () => {
    let isChanged = false;
    const readFile = async (path: string) => readFakeAdapter(isChanged ? '/other-r3' : path);
    const parts = await withAdapters(['a'], 3, { runtime: { numPages: 12 }, tiers: { readFile } });
    parts.tiers.residency.evictWaiting();
    isChanged = true;
    const { last } = await ask(parts, 'a').done;
    expect(last.error).toMatchObject({ code: 'adapter_digest_mismatch' });
    expect(parts.fatal).toEqual([]);
  });

  test('does not wait for pages for ever', async () => {
    const parts = await withAdapters(['a', 'b'], 3, {
      runtime: { numPages: 10 },
      tiers: { queueWaitMs: 5 },
    });
    parts.tiers.residency.evictWaiting([adapterOf(parts, 'b')]);
    await running(parts, 'b');
    parts.runtime.gate = new Promise(() => {});
    const { last } = await ask(parts, 'a').done;
    expect(last.error).toMatchObject({ code: 'arena_full' });
    expect(parts.tiers.residency.numWantedPages).toBe(0);
  });

  test('lets the wait for pages end when it is cancelled', async () => {
    const parts = await withAdapters(['a', 'b'], 3, { runtime: { numPages: 10 } });
    parts.tiers.residency.evictWaiting([adapterOf(parts, 'b')]);
    const { promise: gate, resolve: open } = Promise.withResolvers<void>();
    const other = await running(parts, 'b');
    parts.runtime.gate = gate;
    const run = ask(parts, 'a');
    await vi.waitFor(() => expect(parts.tiers.isBringing).toBe(true), { interval: 1 });
    run.handle.cancel();
    await run.done;
    await vi.waitFor(() => expect(parts.tiers.isBringing).toBe(false), { interval: 1 });
    expect([parts.tiers.residency.numWantedPages, tierOf(parts, 'a')]).toEqual([0, 'disk']);
    open();
    await expectAlone(parts, 'b', (await other.done).tokens);
  });

  test('gets its turn although others never stop asking for all that is on the device', async () => {
    const parts = await withAdapters(['a', 'b', 'c'], 3, { runtime: { numPages: 14, numHostPages: 9 } });
    let isOver = false;
    const keepAsking = async (name: string) => {
      let numDone = 0;
      while (!isOver) {
        await ask(parts, name, 6).done;
        numDone++;
      }
      return numDone;
    };
    const askers = ['a', 'a', 'b', 'b'].map(keepAsking);
    await vi.waitFor(() => expect(parts.runtime.steps.length).toBeGreaterThan(20), { interval: 1 });
    for (let i = 0; i < 5; i++) await expectAlone(parts, 'c', (await ask(parts, 'c').done).tokens);
    isOver = true;
    for (const numDone of await Promise.all(askers)) expect(numDone).toBeGreaterThan(1);
    await quiet(parts);
    expectBooks(parts);
  });
});

describe('a pinned adapter', () => {
  test('stays on the device while others come and go', async () => {
    const parts = await withAdapters([], 3, { runtime: { numPages: 8, numHostPages: 9 } });
    await parts.tiers.load('pinned', '/pinned-r3', false, true);
    const names = ['a', 'b', 'c'];
    for (const name of names) await parts.tiers.load(name, pathOf(name, 3), false);
    for (const name of [...names, ...names]) await ask(parts, name).done;
    expect(tierOf(parts, 'pinned')).toBe('device');
    expect(parts.tiers.statuses().find(({ pinned }) => pinned)?.names).toEqual(['pinned']);
  });

  test('hands its pin on to what is loaded in its place, and loses it with its name', async () => {
    const parts = startEngine();
    const first = await parts.tiers.load('a', '/v1-r3', false, true);
    const second = await parts.tiers.load('a', '/v2-r3', true);
    expect([first.isPinned, second.isPinned]).toEqual([false, true]);
    await parts.tiers.load('a', '/v2-r3', true, false);
    expect(second.isPinned).toBe(false);
  });

  test('is brought to the device when it is pinned later', async () => {
    const parts = await withAdapters(['a', 'b'], 3, { runtime: { numPages: 5, numHostPages: 6 } });
    expect(tierOf(parts, 'a')).toBe('host');
    await parts.tiers.load('a', '/a-r3', true, true);
    expect(tiersOf(parts, ['a', 'b'])).toEqual(['device', 'host']);
  });

  test('is refused when it would leave nothing for sequences', async () => {
    const parts = startEngine({ runtime: { numPages: 6 } });
    await parts.tiers.load('a', '/a-r3', false, true);
    await expect(parts.tiers.load('b', '/b-r3', false, true)).rejects.toMatchObject({
      code: 'arena_full',
      param: 'pinned',
    });
    expect(parts.tiers.get('b')).toBeUndefined();
    await parts.tiers.load('b', '/b-r3', false);
    expectBooks(parts);
  });
});

describe('an adapter that goes', () => {
  test('frees both arenas at once when nobody uses it', async () => {
    const parts = await withAdapters(['a'], 3, { runtime: { numPages: 10, numHostPages: 6 } });
    expect([parts.arena.numUsed('adapter'), parts.hostArena?.numUsed('adapter')]).toEqual([3, 3]);
    parts.tiers.unload('a');
    expect([parts.arena.numUsed('adapter'), parts.hostArena?.numUsed('adapter')]).toEqual([0, 0]);
  });

  test('ends with the sequences that waited for it, when it is replaced while it is on its way', async () => {
    const parts = await withAdapters(['a'], 3, { runtime: { numPages: 20, numHostPages: 6 } });
    parts.tiers.residency.evictWaiting();
    const { promise: copyGate, resolve: open } = Promise.withResolvers<void>();
    parts.runtime.copyGate = copyGate;
    const old = ask(parts, 'a');
    await vi.waitFor(() => expect(adapterOf(parts, 'a').isMoving).toBe(true), { interval: 1 });
    await parts.tiers.load('a', '/v2-r2', true);
    const fresh = ask(parts, 'a');
    open();
    const prompt = new TextEncoder().encode('ask a');
    const params = { ...defaultSampling(), temperature: 0, ignoreEos: true };
    expect((await old.done).tokens).toEqual(await generateAlone(prompt, params, '/a-r3', 8));
    expect((await fresh.done).tokens).toEqual(await generateAlone(prompt, params, '/v2-r2', 8));
    await quiet(parts);
    expect([parts.arena.numUsed('adapter'), parts.hostArena?.numUsed('adapter')]).toEqual([2, 2]);
    expectBooks(parts);
  });

  test('waits for its copy to the host arena to be over', async () => {
    const parts = startEngine({ runtime: { numPages: 10, numHostPages: 6 } });
    const { promise: copyGate, resolve: open } = Promise.withResolvers<void>();
    parts.runtime.copyGate = copyGate;
    await parts.tiers.load('a', '/a-r3', false);
    parts.tiers.unload('a');
    expect(parts.arena.numUsed('adapter')).toBe(3);
    open();
    await vi.waitFor(() => expect(parts.arena.numUsed('adapter')).toBe(0), { interval: 1 });
    expectBooks(parts);
  });
});

test('closing refuses what waits for pages and waits for what is copied', async () => {
  const parts = await withAdapters(['a', 'b'], 3, { runtime: { numPages: 10, numHostPages: 6 } });
  parts.tiers.residency.evictWaiting();
  const { promise: copyGate, resolve: open } = Promise.withResolvers<void>();
  parts.runtime.copyGate = copyGate;
  const run = ask(parts, 'a');
  await vi.waitFor(() => expect(adapterOf(parts, 'a').isMoving).toBe(true), { interval: 1 });
  const closing = Promise.all([parts.engine.close(), parts.tiers.close()]);
  expect((await run.done).last.finishReason).toBe('abort');
  open();
  await closing;
  parts.runtime.close();
  expect(parts.fatal).toEqual([]);
});

/**
 * Hundreds of adapters over room for a few, with sequences that end in every way; loads in place, unloads and read errors
 * between them.
 */
test.each(Array.from({ length: 6 }, (_, seed) => seed))(
  'random traffic over hundreds of adapters gives the tokens that each gives alone (seed %i)',
  async (seed) => {
    const random = seededRandom(seed);
    const numAdapters = 300;
    const parts = startEngine({
      runtime: { numPages: random.from(14, 30), numHostPages: random.pick([0, 20, 200]) },
      limits: { maxModelLen: 64, maxSequences: random.from(2, 8), maxWaiting: 10_000 },
      tiers: { pageWaitMs: 1000, queueWaitMs: 60_000, maxLoads: random.from(1, 3) },
    });
    const { tiers, arena, hostArena, runtime } = parts;
    const paths = new Map<string, string>();
    const load = async (i: number, version: number) => {
      const path = `/adapters/${i}-v${version}-r${1 + (i % 4)}`;
      await tiers.load(`${i}`, path, true);
      paths.set(`${i}`, path);
    };
    for (let i = 0; i < numAdapters; i++) await load(i, 0);

    let numFailed = 0;
    const runs: Promise<void>[] = [];
    for (let turn = 0; turn < 400; turn++) {
      const popular = random.below(3) > 0 ? random.below(12) : random.below(numAdapters);
      if (turn % 50 === 20) await load(popular, turn).catch(expectRefusal);
      if (turn % 100 === 70) runtime.failNextLoad = new Error('input/output error');
      const adapter = tiers.get(`${popular}`)!;
      const path = paths.get(`${popular}`)!;
      const promptTokens = Int32Array.from({ length: random.from(1, 40) }, () => random.below(256));
      const maxTokens = random.from(1, 20);
      const { handle, done } = start(parts, { promptTokens, adapter, params: { maxTokens } });
      if (random.below(12) === 0) setImmediate(() => handle.cancel());
      runs.push(
        done.then(async ({ tokens, last }) => {
          if (last.error) {
            expect(last.error.message).toContain('input/output error');
            numFailed++;
          }
          const params = { ...defaultSampling(), temperature: 0, ignoreEos: true };
          expect(tokens).toEqual(await generateAlone(promptTokens, params, path, tokens.length));
        }),
      );
      if (random.below(3) === 0) await new Promise((resolve) => setImmediate(resolve));
      arena.check();
      hostArena?.check();
    }
    await Promise.all(runs);
    expect(numFailed).toBeLessThan(40);
    await quiet(parts);
    await vi.waitFor(() => expectBooks(parts), { interval: 1 });
    for (let i = 0; i < numAdapters; i++) if (tiers.get(`${i}`)) tiers.unload(`${i}`);
    await parts.blocks.close();
    expect([arena.numFree, hostArena?.numFree]).toEqual([arena.numPages, hostArena?.numPages]);
    expect(runtime.adapters.size).toBe(0);
  },
);

/** For want of room, or by the error that the test made, whoever meets that first. */
function expectRefusal(error: unknown): void {
  expect(error).toBeInstanceOf(EngineError);
  const { code, message } = error as EngineError;
  if (code !== 'arena_full') expect(message).toContain('input/output error');
}
