import { describe, expect, test, vi } from 'vitest';
import type { LocalFolder } from '../../engine/adapters/adapter-tiers.ts';
import { type EngineParts, start, startEngine } from '../fixtures/fake-engine-parts.ts';

const digestOf = (path: string) => `sha256:${Buffer.from(path).toString('hex')}`;
const usedPages = ({ arena }: EngineParts) => arena.numUsed('adapter');
const statusOf = ({ tiers }: EngineParts, path: string) =>
  tiers.statuses().find(({ digest }) => digest === digestOf(path));

/** A sequence that runs until it is cancelled. */
async function running(parts: EngineParts, name: string | null, maxTokens = 300) {
  const adapter = name === null ? null : parts.tiers.get(name)!;
  const run = start(parts, { adapter, params: { maxTokens } });
  await vi.waitFor(() => expect(run.handle.sequence.numOutputTokens).toBeGreaterThan(0), { interval: 1 });
  return run;
}

describe('loading', () => {
  test('takes exactly the pages that the rank needs', async () => {
    const parts = startEngine();
    await parts.tiers.load('a', '/a-r3', false);
    expect(usedPages(parts)).toBe(3);
    expect(statusOf(parts, '/a-r3')).toMatchObject({
      names: ['a'],
      tier: 'device',
      rank: 3,
      bytes: 3 * 1024,
    });
  });

  test('loads the same content once under two names', async () => {
    const parts = startEngine();
    await parts.tiers.load('a', '/x-r3', false);
    await parts.tiers.load('b', '/x-r3', false);
    expect(usedPages(parts)).toBe(3);
    expect(statusOf(parts, '/x-r3')?.names).toEqual(['a', 'b']);
  });

  test('joins a load of the same content that is under way', async () => {
    const parts = startEngine();
    const load = vi.spyOn(parts.runtime, 'loadAdapter');
    await Promise.all(['a', 'b', 'c'].map((name) => parts.tiers.load(name, '/x-r3', false)));
    expect(load).toHaveBeenCalledTimes(1);
    expect(usedPages(parts)).toBe(3);
  });

  test('refuses a name that is taken', async () => {
    const parts = startEngine();
    await parts.tiers.load('a', '/a-r1', false);
    await expect(parts.tiers.load('a', '/b-r1', false)).rejects.toThrow("'a' has already been loaded");
    expect(usedPages(parts)).toBe(1);
  });

  test('refuses the second of two loads of one name at once', async () => {
    const parts = startEngine();
    const [first, second] = await Promise.allSettled([
      parts.tiers.load('a', '/a-r1', false),
      parts.tiers.load('a', '/b-r1', false),
    ]);
    expect([first.status, second.status]).toEqual(['fulfilled', 'rejected']);
    expect(usedPages(parts)).toBe(1);
  });

  test('gives the pages back when the native side refuses the file', async () => {
    const parts = startEngine();
    parts.runtime.failNextLoad = new Error('layer 3 q_proj: a number is not finite');
    await expect(parts.tiers.load('a', '/a-r3', false)).rejects.toThrow(
      'layer 3 q_proj: a number is not finite',
    );
    expect(usedPages(parts)).toBe(0);
    await parts.tiers.load('a', '/a-r3', false);
  });

  test('runs a bounded number at once and refuses beyond a bounded line', async () => {
    const parts = startEngine({ tiers: { maxLoads: 1, maxQueuedLoads: 2 } });
    const loads = ['a', 'b', 'c', 'd'].map((name) => parts.tiers.load(name, `/${name}-r1`, false));
    const outcomes = await Promise.allSettled(loads);
    expect(outcomes.map(({ status }) => status)).toEqual(['fulfilled', 'fulfilled', 'fulfilled', 'rejected']);
  });

  /** A source that counts how often it was asked, with a folder of that path and digest. */
  function sourceOf(path: string, digest: string | null, changes: Partial<LocalFolder> = {}) {
    const folder = { path, seconds: 1.5, release: vi.fn(), discardIfDamaged: async () => false, ...changes };
    const fetch = vi.fn(async () => folder);
    return { uri: `https://host${path}`, digest, fetch, folder };
  }

  test('fetches first, and tells how long it took and from where', async () => {
    const parts = startEngine();
    const source = sourceOf('/a-r3', digestOf('/a-r3'));
    await parts.tiers.load('a', source, false);
    expect(statusOf(parts, '/a-r3')).toMatchObject({
      path: 'https://host/a-r3',
      loadSeconds: { fetch: 1.5 },
    });
    expect(source.folder.release).toHaveBeenCalledTimes(1);
  });

  test('fetches nothing when the digest is resident', async () => {
    const parts = startEngine();
    await parts.tiers.load('a', '/a-r3', false);
    const source = sourceOf('/a-r3', digestOf('/a-r3'));
    await parts.tiers.load('b', source, false);
    expect(source.fetch).not.toHaveBeenCalled();
    expect(statusOf(parts, '/a-r3')?.names).toEqual(['a', 'b']);
  });

  test('takes no place of the others while it fetches', async () => {
    const parts = startEngine({ tiers: { maxLoads: 1, maxQueuedLoads: 0 } });
    const gate = Promise.withResolvers<void>();
    const slow = sourceOf('/slow-r1', null);
    slow.fetch.mockImplementation(async () => {
      await gate.promise;
      return slow.folder;
    });
    const load = parts.tiers.load('slow', slow, false);
    await parts.tiers.load('quick', '/quick-r1', false);
    gate.resolve();
    await load;
  });

  test('refuses another digest than was named, and lets the folder go', async () => {
    const parts = startEngine();
    const source = sourceOf('/a-r3', digestOf('/b-r3'));
    await expect(parts.tiers.load('a', source, false)).rejects.toMatchObject({
      code: 'adapter_digest_mismatch',
      message: `https://host/a-r3: expected digest ${digestOf('/b-r3')}, got ${digestOf('/a-r3')}`,
    });
    expect(source.folder.release).toHaveBeenCalledTimes(1);
    expect(usedPages(parts)).toBe(0);
  });

  test('fetches once more when the copy on disk was damaged', async () => {
    const parts = startEngine();
    const source = sourceOf('/a-r3', digestOf('/a-r3'));
    const damaged = { ...source.folder, path: '/damaged-r3', discardIfDamaged: async () => true };
    source.fetch.mockResolvedValueOnce(damaged);
    await parts.tiers.load('a', source, false);
    expect(source.fetch).toHaveBeenCalledTimes(2);
    source.fetch.mockResolvedValue(damaged);
    parts.tiers.unload('a');
    await expect(parts.tiers.load('a', source, false)).rejects.toMatchObject({
      code: 'adapter_digest_mismatch',
    });
    expect(source.fetch).toHaveBeenCalledTimes(4);
  });

  test('goes on while sequences decode', async () => {
    const parts = startEngine();
    const gate = Promise.withResolvers<void>();
    parts.runtime.loadGate = gate.promise;
    const load = parts.tiers.load('a', '/a-r1', false);
    const { last } = await start(parts, { params: { maxTokens: 20 } }).done;
    expect(last.finishReason).toBe('length');
    expect(parts.tiers.get('a')).toBeUndefined();
    gate.resolve();
    await load;
    expect(parts.tiers.get('a')).toBeDefined();
  });
});

describe('a full arena', () => {
  test('refuses at once what pinned adapters leave no room for, and names the bytes', async () => {
    const parts = startEngine({ runtime: { numPages: 10 }, tiers: { pageWaitMs: 60_000 } });
    await parts.tiers.load('a', '/a-r6', false, true);
    await expect(parts.tiers.load('b', '/b-r5', false)).rejects.toMatchObject({
      code: 'arena_full',
      message: expect.stringMatching(/needs 5120 bytes .* 4096 bytes are free/),
    });
  });

  test('waits for the pages of running sequences, and stops none for them', async () => {
    const parts = startEngine({ runtime: { numPages: 10 }, tiers: { pageWaitMs: 60_000 } });
    const run = await running(parts, null, 100);
    const load = parts.tiers.load('a', '/a-r8', false);
    await vi.waitFor(() => expect(parts.tiers.residency.numWantedPages).toBe(8), { interval: 1 });
    expect((await run.done).last.finishReason).toBe('length');
    await load;
    expect(usedPages(parts)).toBe(8);
    expect(parts.tiers.residency.numWantedPages).toBe(0);
  });

  test('gives up when the pages do not come in time', async () => {
    const parts = startEngine({ runtime: { numPages: 10 }, tiers: { pageWaitMs: 1 } });
    const gate = Promise.withResolvers<void>();
    parts.runtime.gate = gate.promise;
    start(parts, { params: { maxTokens: 100 } });
    await expect(parts.tiers.load('a', '/a-r8', false)).rejects.toMatchObject({ code: 'arena_full' });
    expect(parts.tiers.residency.numWantedPages).toBe(0);
    gate.resolve();
  });

  test('leaves the pages that the largest live sequence may come to need', async () => {
    const parts = startEngine({ runtime: { numPages: 10 }, tiers: { pageWaitMs: 1 } });
    const gate = Promise.withResolvers<void>();
    parts.runtime.gate = gate.promise;
    start(parts, { params: { maxTokens: 100 } }); // 105 tokens: 7 pages, of which it holds one
    await expect(parts.tiers.load('a', '/a-r4', false)).rejects.toMatchObject({ code: 'arena_full' });
    await parts.tiers.load('b', '/b-r3', false);
    gate.resolve();
  });
});

describe('unloading', () => {
  test('brings every byte back', async () => {
    const parts = startEngine();
    await parts.tiers.load('a', '/a-r3', false);
    parts.tiers.unload('a');
    expect(usedPages(parts)).toBe(0);
    expect(parts.runtime.adapters.size).toBe(0);
    expect(parts.tiers.statuses()).toEqual([]);
  });

  test('refuses a name that is not there', () => {
    expect(() => startEngine().tiers.unload('a')).toThrow("'a' cannot be found");
  });

  test('takes the name at once and the bytes after the last sequence', async () => {
    const parts = startEngine();
    await parts.tiers.load('a', '/a-r3', false);
    const run = await running(parts, 'a');
    parts.tiers.unload('a');
    expect(parts.tiers.get('a')).toBeUndefined();
    expect(statusOf(parts, '/a-r3')).toMatchObject({ names: [], inFlight: 1, requests: 1 });
    expect(usedPages(parts)).toBe(3);
    run.handle.cancel();
    await vi.waitFor(() => expect(usedPages(parts)).toBe(0), { interval: 1 });
    expect(parts.fatal).toEqual([]);
  });

  test('keeps the bytes while another name points at them', async () => {
    const parts = startEngine();
    await parts.tiers.load('a', '/x-r3', false);
    await parts.tiers.load('b', '/x-r3', false);
    parts.tiers.unload('a');
    expect(usedPages(parts)).toBe(3);
    parts.tiers.unload('b');
    expect(usedPages(parts)).toBe(0);
  });
});

describe('loading in place', () => {
  test('points the name at new content, and the old content ends with its last sequence', async () => {
    const parts = startEngine();
    await parts.tiers.load('a', '/v1-r3', false);
    const old = await running(parts, 'a');
    await parts.tiers.load('a', '/v2-r2', true);
    expect(parts.tiers.get('a')?.digest).toBe(digestOf('/v2-r2'));
    expect(usedPages(parts)).toBe(5);
    old.handle.cancel();
    await vi.waitFor(() => expect(usedPages(parts)).toBe(2), { interval: 1 });
  });

  test('changes nothing when the content is the same', async () => {
    const parts = startEngine();
    const first = await parts.tiers.load('a', '/v1-r3', false);
    expect(await parts.tiers.load('a', '/v1-r3', true)).toBe(first);
    expect(usedPages(parts)).toBe(3);
  });

  test('keeps the old content when the new one is refused', async () => {
    const parts = startEngine();
    await parts.tiers.load('a', '/v1-r3', false);
    parts.runtime.failNextLoad = new Error('no');
    await expect(parts.tiers.load('a', '/v2-r3', true)).rejects.toThrow();
    expect(parts.tiers.get('a')?.digest).toBe(digestOf('/v1-r3'));
  });
});
