/** Sequences with more KV than the device arena has room for, on the fake runtime: a wrong block would give other tokens. */
import { describe, expect, test, vi } from 'vitest';
import { longShape, maxLongTokens } from '../../engine/ladder/long-context.ts';
import { type EngineParts, start, startEngine } from '../fixtures/fake-engine-parts.ts';
import { greedyAlone } from '../fixtures/generate-alone.ts';

const prompt = (numTokens: number, first = 0) =>
  Uint8Array.from({ length: numTokens }, (_, i) => (first + 7 * i) % 251);
/** 160 tokens on the device; 1,000 with the host. */
const small = (options: Parameters<typeof startEngine>[0] = {}) =>
  startEngine({
    ...options,
    runtime: { numPages: 10, numHostPages: 60, ...options.runtime },
    limits: { maxModelLen: 1000, ...options.limits },
  });
const stop = async ({ engine, tiers, arena, hostArena, fatal }: EngineParts) => {
  await vi.waitFor(() => expect(engine.numRunning).toBe(0), { interval: 1 });
  await Promise.all([engine.close(), tiers.close()]);
  expect(fatal).toEqual([]);
  arena.check();
  hostArena!.check();
  expect([arena.numFree, hostArena!.numFree]).toEqual([arena.numPages, hostArena!.numPages]);
};

describe('a long sequence', () => {
  test.each([1, 2] as const)(
    'of five times the device gives its tokens, with %i steps ahead',
    async (ahead) => {
      for (const isCaching of [true, false]) {
        const parts = small({ maxStepsInFlight: ahead, isCaching });
        const { done } = start(parts, { promptTokens: prompt(800), params: { maxTokens: 60 } });
        const { tokens, last } = await done;
        expect(tokens).toEqual(await greedyAlone(prompt(800), 60));
        expect(last.finishReason).toBe('length');
        expect(Math.max(...parts.runtime.steps.map(({ numHostBlocks }) => numHostBlocks))).toBeGreaterThan(
          45,
        );
        const streamed = await parts.metrics.registry.getSingleMetric('motet_kv_streamed_bytes_total')!.get();
        expect(streamed.values[0]!.value).toBeGreaterThan(0);
        await stop(parts);
      }
    },
  );

  test('runs with an adapter, whose pages are left to it', async () => {
    const parts = small();
    const adapter = await parts.tiers.load('a', '/adapters/a-r2', false);
    const { done } = start(parts, { promptTokens: prompt(500), params: { maxTokens: 20 }, adapter });
    expect((await done).tokens).toEqual(await greedyAlone(prompt(500), 20, '/adapters/a-r2'));
    parts.tiers.unload('a');
    await stop(parts);
  });

  test('neither keeps the short ones that come later waiting, nor waits for them', async () => {
    const parts = small({ runtime: { numPages: 20 } });
    const long = start(parts, { promptTokens: prompt(700), params: { maxTokens: 100 } });
    const order: string[] = [];
    void long.done.then(() => order.push('long'));
    const shorts = Array.from({ length: 12 }, (_, i) => {
      const run = start(parts, { promptTokens: prompt(20, i), params: { maxTokens: 20 } });
      void run.done.then(() => order.push('short'));
      return run;
    });
    const outcomes = await Promise.all(shorts.map(({ done }) => done));
    expect(order).not.toContain('long');
    for (const [i, { tokens }] of outcomes.entries())
      expect(tokens).toEqual(await greedyAlone(prompt(20, i), 20));
    expect((await long.done).tokens).toEqual(await greedyAlone(prompt(700), 100));
    await stop(parts);
  });

  test('that was preempted by an older sequence computes anew, and gives its tokens', async () => {
    const parts = small({ limits: { maxBatchTokens: 64 } });
    const old = start(parts, { promptTokens: prompt(10), params: { maxTokens: 140 } });
    const long = start(parts, { promptTokens: prompt(400), params: { maxTokens: 30 } });
    expect((await old.done).tokens).toEqual(await greedyAlone(prompt(10), 140));
    expect((await long.done).tokens).toEqual(await greedyAlone(prompt(400), 30));
    expect(long.handle.sequence.wasPreempted).toBe(true);
    await stop(parts);
  });

  test('that is cancelled while blocks are on their way to the host gives all back', async () => {
    const parts = small();
    const gate = Promise.withResolvers<void>();
    parts.runtime.copyGate = gate.promise;
    const { handle, done } = start(parts, { promptTokens: prompt(800) });
    await vi.waitFor(() => expect(parts.runtime.copies.length).toBeGreaterThan(0), { interval: 1 });
    handle.cancel();
    expect((await done).last.finishReason).toBe('abort');
    expect(parts.engine.numRunning).toBe(1);
    gate.resolve();
    await stop(parts);
  });

  test('ends with its step when that fails, and the next one runs', async () => {
    const parts = small();
    const params = { maxTokens: 4 };
    const first = start(parts, {
      promptTokens: prompt(400),
      params,
      onOutput: () => {
        parts.runtime.failNextStep = new Error('no');
      },
    });
    expect((await first.done).last.error?.code).toBe('step_failed');
    parts.runtime.failNextStep = null;
    const next = start(parts, { promptTokens: prompt(400, 3), params });
    expect((await next.done).tokens).toEqual(await greedyAlone(prompt(400, 3), 4));
    await stop(parts);
  });

  test('without a maximum has what the arenas have room for', async () => {
    const parts = small({ runtime: { numHostPages: 20 } });
    const most = parts.engine.maxTokensOfOne([]);
    const { tokens, last } = await start(parts, { promptTokens: prompt(300), params: { maxTokens: null } })
      .done;
    expect(last.finishReason).toBe('length');
    expect(300 + tokens.length).toBe(most);
    expect(tokens).toEqual(await greedyAlone(prompt(300), most - 300));
    await stop(parts);
  });

  test('is refused beyond both arenas, and where another one keeps the host arena', async () => {
    const parts = small({ runtime: { numHostPages: 20 } });
    const most = parts.engine.maxTokensOfOne([]);
    expect(most).toBeGreaterThan(20 * 16);
    expect(() => start(parts, { promptTokens: prompt(most), params: { maxTokens: 1 } })).toThrow(
      expect.objectContaining({ code: 'arena_full', message: expect.stringMatching(/--host-memory/) }),
    );
    const pages = new Int32Array(10);
    parts.hostArena!.take('adapter', 10, pages);
    const { last } = await start(parts, { promptTokens: prompt(300), params: { maxTokens: 10 } }).done;
    expect(last.error).toMatchObject({ code: 'arena_full', message: expect.stringMatching(/10 can be had/) });
    parts.hostArena!.giveBack('adapter', pages);
    const { tokens } = await start(parts, { promptTokens: prompt(300), params: { maxTokens: 10 } }).done;
    expect(tokens).toEqual(await greedyAlone(prompt(300), 10));
    await stop(parts);
  });

  test('takes pages of the host from what is only kept there', async () => {
    const parts = small({ runtime: { numHostPages: 12 } });
    for (const first of [1, 2]) await start(parts, { promptTokens: prompt(90, first) }).done;
    await parts.blocks.settled();
    expect(parts.hostArena!.numFree).toBeLessThan(8);
    const { tokens } = await start(parts, { promptTokens: prompt(190), params: { maxTokens: 10 } }).done;
    expect(tokens).toEqual(await greedyAlone(prompt(190), 10));
    await stop(parts);
  });
});

test('a sequence that fits the device reads nothing from the host', async () => {
  const parts = small();
  const { tokens } = await start(parts, { promptTokens: prompt(150), params: { maxTokens: 10 } }).done;
  expect(tokens).toEqual(await greedyAlone(prompt(150), 10));
  expect(parts.runtime.steps.every(({ numHostBlocks }) => numHostBlocks === 0)).toBe(true);
  await stop(parts);
});

describe('what a long sequence takes', () => {
  const limits = {
    numPages: 100,
    numHostPages: 400,
    minStagingPages: 2,
    blockTokens: 16,
    maxBatchTokens: 64,
  };

  test('is half of the device, and as much of the host as its window does not have', () => {
    // Of 44 window pages 8 are for two chunks: 36 blocks stay.
    expect(longShape(5000, limits)).toEqual({
      numDevicePages: 50,
      numStagingPages: 6,
      numSparePages: 8,
      numHostPages: 313 - 36,
    });
    expect(maxLongTokens(limits)).toBe((400 + 36) * 16);
    expect(longShape(maxLongTokens(limits), limits).numHostPages).toBe(400);
  });

  test('is never less than a staging area and four pages, and nothing where these do not fit', () => {
    const tiny = { ...limits, numPages: 6 };
    expect(longShape(200, tiny)).toMatchObject({ numDevicePages: 6, numStagingPages: 2, numSparePages: 2 });
    expect(maxLongTokens({ ...limits, numPages: 5 })).toBe(0);
    expect(maxLongTokens({ ...limits, numHostPages: 0 })).toBe(0);
  });
});
