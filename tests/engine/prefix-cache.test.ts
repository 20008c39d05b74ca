/** What sequences share, seen from outside the engine: how many tokens are computed, and that none of them changes. */
import { describe, expect, test, vi } from 'vitest';
import { type EngineParts, numComputed, prompt, start, startEngine } from '../fixtures/fake-engine-parts.ts';
import { greedyAlone } from '../fixtures/generate-alone.ts';

const limits = { maxBatchTokens: 512 };
/** The step that runs for nothing when a sequence ends is over. */
const idle = ({ blocks, engine }: EngineParts) =>
  vi.waitFor(() => expect([engine.numRunning, blocks.numHeldPages]).toEqual([0, 0]), { interval: 1 });

describe('a prompt', () => {
  test('that was computed before is not computed again, but its last block', async () => {
    const parts = startEngine({ limits });
    const params = { maxTokens: 1 };
    await start(parts, { promptTokens: prompt(100), params }).done;
    await idle(parts);
    const before = numComputed(parts);
    const { handle, done } = start(parts, { promptTokens: prompt(100), params });
    expect((await done).tokens).toEqual(await greedyAlone(prompt(100), 1));
    expect(numComputed(parts) - before).toBe(4);
    expect(handle.sequence.numCachedTokens).toBe(96);
  });

  test('that ends with a block computes that block anew', async () => {
    const parts = startEngine({ limits });
    for (const numCached of [0, 80]) {
      const { handle, done } = start(parts, { promptTokens: prompt(96), params: { maxTokens: 3 } });
      expect((await done).tokens).toEqual(await greedyAlone(prompt(96), 3));
      expect(handle.sequence.numCachedTokens).toBe(numCached);
      await idle(parts);
    }
  });

  test('of 32 sequences that come at once is computed once', async () => {
    const parts = startEngine({ runtime: { numPages: 128 }, limits: { ...limits, maxSequences: 32 } });
    const runs = Array.from({ length: 32 }, (_, i) =>
      start(parts, { promptTokens: [...prompt(160), i, i], params: { maxTokens: 1 } }),
    );
    for (const [i, { done }] of runs.entries()) {
      expect((await done).tokens).toEqual(await greedyAlone(Uint8Array.from([...prompt(160), i, i]), 1));
    }
    expect(numComputed(parts)).toBe(160 + 32 * 2);
  });

  test('that follows an answer finds the answer too', async () => {
    const parts = startEngine({ limits });
    const { tokens } = await start(parts, { promptTokens: prompt(50), params: { maxTokens: 50 } }).done;
    await idle(parts);
    const next = Uint8Array.from([...prompt(50), ...tokens, 1, 2, 3]);
    const { handle, done } = start(parts, { promptTokens: next });
    expect((await done).tokens).toEqual(await greedyAlone(next, 8));
    // 99 positions were computed: the last drawn token never ran.
    expect(handle.sequence.numCachedTokens).toBe(96);
  });

  test('is computed whole when the cache is off', async () => {
    const parts = startEngine({ limits, isCaching: false });
    for (let i = 0; i < 2; i++) {
      const { handle, done } = start(parts, { promptTokens: prompt(100), params: { maxTokens: 1 } });
      await done;
      expect(handle.sequence.numCachedTokens).toBe(0);
    }
    expect(numComputed(parts)).toBe(200);
    await vi.waitFor(() => expect(parts.arena.numFree).toBe(parts.arena.numPages), { interval: 1 });
  });
});

describe('an adapter', () => {
  test('shares with itself alone, and not with what had its name before', async () => {
    const parts = startEngine({ limits });
    const ask = async (expected: string | null, numCached: number) => {
      const adapter = expected ? parts.tiers.get('a')! : null;
      const { handle, done } = start(parts, { promptTokens: prompt(64), adapter });
      expect((await done).tokens).toEqual(await greedyAlone(prompt(64), 8, expected));
      expect(handle.sequence.numCachedTokens).toBe(numCached);
      await idle(parts);
    };
    await ask(null, 0);
    await parts.tiers.load('a', '/old-r1', false);
    await ask('/old-r1', 0);
    await ask('/old-r1', 48);
    await parts.tiers.load('a', '/new-r1', true);
    await ask('/new-r1', 0);
    await parts.tiers.load('a', '/old-r1', true);
    // The old content is what it was.
    await ask('/old-r1', 48);
    expect(parts.blocks.countsOf(parts.tiers.get('a')!.digest)).toEqual({ queries: 192, hits: 96 });
  });

  test('finds room where only kept blocks are', async () => {
    const parts = startEngine({ runtime: { numPages: 8 }, limits });
    await start(parts, { promptTokens: prompt(100) }).done;
    await idle(parts);
    expect(parts.arena.numFree).toBeLessThan(4);
    await parts.tiers.load('a', '/a-r4', false);
    expect(parts.arena.numUsed('adapter')).toBe(4);
  });
});

describe('a step that fails', () => {
  test('takes with it who shares what it was to compute, and leaves nothing of it in the cache', async () => {
    const parts = startEngine({ limits });
    const { resolve: open, promise } = Promise.withResolvers<void>();
    parts.runtime.gate = promise;
    parts.runtime.failNextStep = new Error('broken');
    const first = start(parts, { promptTokens: prompt(64), params: { maxTokens: 1 } });
    await vi.waitFor(() => expect(parts.runtime.steps.length).toBe(1), { interval: 1 });
    // Its step waits behind the one that will fail.
    const second = start(parts, { promptTokens: prompt(64) });
    await vi.waitFor(() => expect(parts.runtime.steps.length).toBe(2), { interval: 1 });
    open();
    for (const { done } of [first, second]) expect((await done).last.error?.code).toBe('step_failed');
    await idle(parts);
    const { handle, done } = start(parts, { promptTokens: prompt(64) });
    expect((await done).tokens).toEqual(await greedyAlone(prompt(64), 8));
    expect(handle.sequence.numCachedTokens).toBe(0);
  });
});

test('sequences that are preempted find their own blocks again, if nobody took them', async () => {
  const numComputedWith = async (isCaching: boolean) => {
    const parts = startEngine({ runtime: { numPages: 12 }, limits, isCaching });
    const runs = [0, 100].map((first) =>
      start(parts, { promptTokens: prompt(60, first), params: { maxTokens: 60 } }),
    );
    for (const [i, { done }] of runs.entries()) {
      expect((await done).tokens).toEqual(await greedyAlone(prompt(60, i * 100), 60));
    }
    const { values } = await parts.metrics.registry.getSingleMetric('vllm:num_preemptions_total')!.get();
    expect(values[0]!.value).toBeGreaterThan(0);
    return numComputed(parts);
  };
  expect(await numComputedWith(true)).toBeLessThan(await numComputedWith(false));
});
