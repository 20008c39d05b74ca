/** KV blocks that leave the device and come back, seen from outside the engine: what is computed, what is copied, and the tokens. */
import { describe, expect, test, vi } from 'vitest';
import {
  type EngineParts,
  numComputed,
  prompt,
  start,
  startEngine,
} from '../../fixtures/fake-engine-parts.ts';
import { greedyAlone } from '../../fixtures/generate-alone.ts';

const numCopied = ({ runtime }: EngineParts, direction: 'toHost' | 'toDevice') =>
  runtime.copies.reduce((sum, copy) => sum + (copy.direction === direction ? copy.numPages : 0), 0);

/** Nothing runs, and every copy is over. */
async function idle({ blocks, engine, arena, hostArena }: EngineParts): Promise<void> {
  await vi.waitFor(() => expect([engine.numRunning, blocks.numHeldPages]).toEqual([0, 0]), { interval: 1 });
  await blocks.settled();
  arena.check();
  hostArena?.check();
  blocks.check([]);
}

/** Copying a block costs a microsecond, computing one this much. */
function engineWith(options: { numPages: number; numHostPages: number; secondsPerToken?: number }) {
  const { numPages, numHostPages, secondsPerToken = 1 } = options;
  const parts = startEngine({
    runtime: { numPages, numHostPages },
    limits: { maxBatchTokens: 512, maxModelLen: 512 },
  });
  // The fake's steps take no time, which would always make them the cheaper way.
  vi.spyOn(parts.costs, 'observePrefill').mockImplementation(() => {});
  vi.spyOn(parts.costs, 'prefillSeconds').mockImplementation((numTokens) => numTokens * secondsPerToken);
  return parts;
}

async function ask(parts: EngineParts, promptTokens: Uint8Array, maxTokens = 1) {
  const { handle, done } = start(parts, { promptTokens, params: { maxTokens } });
  const { tokens } = await done;
  expect(tokens).toEqual(await greedyAlone(promptTokens, maxTokens));
  await idle(parts);
  return { sequence: handle.sequence, tokens };
}

describe('a conversation', () => {
  test('that left the device for others comes back from the host arena, and is not computed again', async () => {
    const parts = engineWith({ numPages: 10, numHostPages: 64 });
    await ask(parts, prompt(100));
    for (let other = 1; other < 5; other++) await ask(parts, prompt(100, 40 * other));
    const before = numComputed(parts);
    const { sequence } = await ask(parts, prompt(120));
    expect(sequence.numCachedTokens).toBe(96);
    expect(numComputed(parts) - before).toBe(24);
    expect(numCopied(parts, 'toDevice')).toBe(6);
    const { values } = await parts.metrics.registry.getSingleMetric('motet_kv_hit_tokens_total')!.get();
    expect(values.find(({ labels }) => labels.tier === 'host')?.value).toBe(96);
  });

  test('of which the device has a part gets only the rest copied', async () => {
    const parts = engineWith({ numPages: 10, numHostPages: 64 });
    await ask(parts, prompt(100));
    await ask(parts, prompt(100, 100));
    // Of the first one two blocks had room beside the seven of the second.
    const { sequence } = await ask(parts, prompt(120));
    expect(sequence.numCachedTokens).toBe(96);
    expect(numCopied(parts, 'toDevice')).toBeLessThan(6);
  });

  test('is computed again where that is cheaper than the copy', async () => {
    const parts = engineWith({ numPages: 10, numHostPages: 64, secondsPerToken: 1e-12 });
    await ask(parts, prompt(100));
    for (let other = 1; other < 5; other++) await ask(parts, prompt(100, 40 * other));
    const { sequence } = await ask(parts, prompt(120));
    expect(sequence.numCachedTokens).toBe(0);
    expect(numCopied(parts, 'toDevice')).toBe(0);
  });

  test('gets its head computed and its tail copied where the head is cheap', async () => {
    const parts = engineWith({ numPages: 10, numHostPages: 64 });
    vi.spyOn(parts.costs, 'prefillSeconds').mockImplementation((_, position) => (position < 48 ? 1e-12 : 1));
    await ask(parts, prompt(100));
    for (let other = 1; other < 5; other++) await ask(parts, prompt(100, 40 * other));
    const before = numComputed(parts);
    const { sequence } = await ask(parts, prompt(120));
    expect(sequence.numCachedTokens).toBe(48);
    expect(numComputed(parts) - before).toBe(48 + 24);
    expect(numCopied(parts, 'toDevice')).toBe(3);
  });
});

describe('a sequence that waits for its blocks', () => {
  /** One conversation in the host arena alone, and copies that do not end. */
  async function waiting() {
    const parts = engineWith({ numPages: 12, numHostPages: 64 });
    await ask(parts, prompt(100));
    for (let other = 1; other < 5; other++) await ask(parts, prompt(150, 40 * other));
    const { promise, resolve: open } = Promise.withResolvers<void>();
    parts.runtime.copyGate = promise;
    const first = start(parts, { promptTokens: prompt(100), params: { maxTokens: 1 } });
    await vi.waitFor(() => expect(parts.blocks.isFetching).toBe(true), { interval: 1 });
    return { parts, first, open };
  }

  test('holds up nobody else', async () => {
    const { parts, first, open } = await waiting();
    const other = start(parts, { promptTokens: prompt(20, 200), params: { maxTokens: 3 } });
    expect((await other.done).tokens).toEqual(await greedyAlone(prompt(20, 200), 3));
    expect(first.handle.sequence.numOutputTokens).toBe(0);
    open();
    expect((await first.done).tokens).toEqual(await greedyAlone(prompt(100), 1));
    await idle(parts);
  });

  test('shares the copy with another that wants the same', async () => {
    const { parts, first, open } = await waiting();
    const second = start(parts, { promptTokens: prompt(100), params: { maxTokens: 2 } });
    await vi.waitFor(() => expect(parts.engine.numRunning).toBe(2), { interval: 1 });
    open();
    expect((await first.done).tokens).toEqual(await greedyAlone(prompt(100), 1));
    expect((await second.done).tokens).toEqual(await greedyAlone(prompt(100), 2));
    expect(numCopied(parts, 'toDevice')).toBe(6);
    await idle(parts);
  });

  test('may be cancelled: its pages are free when the copy is over', async () => {
    const { parts, first, open } = await waiting();
    first.handle.cancel();
    expect((await first.done).last.finishReason).toBe('abort');
    expect(parts.blocks.numHeldPages).toBeGreaterThan(0);
    open();
    await idle(parts);
    await ask(parts, prompt(100), 4);
  });

  test('may be purged: nothing of it is found or kept after the copy', async () => {
    const { parts, first, open } = await waiting();
    first.handle.cancel();
    const purged = parts.blocks.purge('');
    open();
    const { host } = await purged;
    expect(host).toBeGreaterThan(0);
    await idle(parts);
    expect([parts.arena.numFree, parts.hostArena!.numFree]).toEqual([12, 64]);
  });

  test('does not hold up the end: closing waits for the copy', async () => {
    const { parts, open } = await waiting();
    const closing = Promise.all([parts.engine.close(), parts.tiers.close()]);
    open();
    await closing;
    parts.runtime.close();
    expect(parts.fatal).toEqual([]);
    expect([parts.arena.numFree, parts.hostArena!.numFree]).toEqual([12, 64]);
  });
});

test('sequences that are preempted swap: what was computed is copied back, but for the partial block', async () => {
  const parts = engineWith({ numPages: 12, numHostPages: 64 });
  const runs = [0, 100].map((first) =>
    start(parts, { promptTokens: prompt(60, first), params: { maxTokens: 100 } }),
  );
  for (const [i, { done }] of runs.entries())
    expect((await done).tokens).toEqual(await greedyAlone(prompt(60, i * 100), 100));
  await idle(parts);
  const { values } = await parts.metrics.registry.getSingleMetric('vllm:num_preemptions_total')!.get();
  const numPreempted = values[0]!.value;
  expect(numPreempted).toBeGreaterThan(0);
  expect(numCopied(parts, 'toDevice')).toBeGreaterThan(0);
  // 159 positions each, and a partial block and the token after it for each time one was put off.
  expect(numComputed(parts)).toBeLessThanOrEqual(2 * 159 + 17 * numPreempted);
});

describe('a full host arena', () => {
  test('gives the pages of what is worth least, and refuses what is worth less', async () => {
    const parts = engineWith({ numPages: 10, numHostPages: 12 });
    for (let turn = 0; turn < 12; turn++) await ask(parts, prompt(100, 30 * (turn % 4)));
    expect(parts.hostArena!.numFree).toBe(0);
    expect(parts.blocks.host!.numEvicted).toBeGreaterThan(0);
  });

  test('is shared with adapters, and its books add up', async () => {
    const parts = engineWith({ numPages: 14, numHostPages: 12 });
    for (const name of ['a', 'b', 'c']) await parts.tiers.load(name, `/${name}-r3`, false);
    for (let turn = 0; turn < 12; turn++) {
      const name = ['a', 'b', 'c'][turn % 3]!;
      const promptTokens = prompt(100, 7 * turn);
      const { done } = start(parts, {
        promptTokens,
        adapter: parts.tiers.get(name)!,
        params: { maxTokens: 2 },
      });
      expect((await done).tokens).toEqual(await greedyAlone(promptTokens, 2, `/${name}-r3`));
      await idle(parts);
    }
    const { hostArena } = parts;
    expect(hostArena!.numUsed('kv')).toBeGreaterThan(0);
    expect(hostArena!.numUsed('kv') + hostArena!.numUsed('adapter') + hostArena!.numFree).toBe(12);
  });

  test('of a single page does no harm', async () => {
    const parts = engineWith({ numPages: 10, numHostPages: 1 });
    for (let turn = 0; turn < 6; turn++) await ask(parts, prompt(100, 30 * (turn % 3)), 3);
  });
});

test('a block that leaves the device while it is copied is not taken for a good copy', async () => {
  const parts = engineWith({ numPages: 8, numHostPages: 64 });
  const { promise, resolve: open } = Promise.withResolvers<void>();
  parts.runtime.copyGate = promise;
  const first = start(parts, { promptTokens: prompt(100), params: { maxTokens: 1 } });
  await first.done;
  // It takes the very pages of the first, whose copies have not begun to read them.
  const second = start(parts, { promptTokens: prompt(110, 100), params: { maxTokens: 1 } });
  await second.done;
  open();
  await idle(parts);
  await ask(parts, prompt(100), 3);
});
