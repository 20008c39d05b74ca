/** KV blocks that leave the host arena for the disk and come back, seen from outside the engine. */
import { mkdtemp, readdir, readFile, rm, truncate, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { describe, expect, onTestFinished, test, vi } from 'vitest';
import { type DiskFiles, diskFiles } from '../../../engine/ladder/disk-files.ts';
import { KvDisk, type KvDiskOptions } from '../../../engine/ladder/kv-disk.ts';
import { purgeAdapter } from '../../../engine/purge.ts';
import { numComputed, prompt, start, startEngine } from '../../fixtures/fake-engine-parts.ts';
import { greedyAlone } from '../../fixtures/generate-alone.ts';
import { diskOptions } from '../../fixtures/kv-blocks.ts';
import { seededRandom } from '../../fixtures/seeded-random.ts';
import { ioError, sickFiles } from '../../fixtures/sick-files.ts';

const pageBytes = 1024;

async function newFolder(): Promise<string> {
  const folder = await mkdtemp(join(tmpdir(), 'motet-disk-blocks-'));
  onTestFinished(() => rm(folder, { recursive: true, force: true }));
  return folder;
}

interface Options {
  numPages?: number;
  numHostPages?: number;
  /** Of the disk, in files of 4 KiB. */
  numBlocks?: number;
  files?: DiskFiles;
  disk?: Partial<KvDiskOptions>;
  /** Computing costs this much; copying and reading nearly nothing. */
  secondsPerToken?: number;
}

async function engineOn(folder: string, options: Options = {}) {
  const {
    numPages = 10,
    numHostPages = 16,
    numBlocks = 1000,
    files = diskFiles,
    secondsPerToken = 1,
  } = options;
  const budgetBytes = numBlocks * 4096;
  const disk = await KvDisk.open(
    diskOptions(folder, 0, { budgetBytes, blockBytes: pageBytes, files, ...options.disk }),
  );
  const parts = startEngine({
    runtime: { numPages, numHostPages, pageBytes },
    limits: { maxBatchTokens: 512, maxModelLen: 512 },
    disk,
  });
  onTestFinished(() => parts.engine.close());
  vi.spyOn(parts.costs, 'observePrefill').mockImplementation(() => {});
  vi.spyOn(parts.costs, 'prefillSeconds').mockImplementation((numTokens) => numTokens * secondsPerToken);
  return { ...parts, disk };
}

type Parts = Awaited<ReturnType<typeof engineOn>>;

/** Nothing runs, and all that was to be copied or written is. */
async function idle({ blocks, engine, arena, hostArena, disk, fatal }: Parts): Promise<void> {
  await vi.waitFor(() => expect([engine.numRunning, blocks.numHeldPages]).toEqual([0, 0]), { interval: 1 });
  await blocks.settled();
  arena.check();
  hostArena!.check();
  blocks.check([]);
  disk.check();
  expect(fatal).toEqual([]);
}

async function ask(parts: Parts, promptTokens: Uint8Array, adapter: string | null = null, maxTokens = 1) {
  const request = { promptTokens, params: { maxTokens }, adapter: adapter ? parts.tiers.get('a')! : null };
  const { handle, done } = start(parts, request);
  const { tokens } = await done;
  expect(tokens).toEqual(await greedyAlone(promptTokens, maxTokens, adapter));
  await idle(parts);
  return handle.sequence;
}

/** Others come until nothing of the prompt is in the arenas. */
async function pushOut(parts: Parts): Promise<void> {
  for (let other = 1; other < 6; other++) {
    await ask(parts, prompt(100, 40 * other));
    await vi.waitFor(() => expect(ahead(parts)).toBe(true), { interval: 1 });
  }
}

/** What would leave the host arena next is on disk. */
const ahead = ({ blocks, disk, hostArena }: Parts) =>
  blocks.host!.leavingFirst(8 - hostArena!.numFree).every(({ block }) => disk.keeps(block.hash));

const hitTokens = async ({ metrics }: Parts, tier: string) => {
  const { values } = await metrics.registry.getSingleMetric('motet_kv_hit_tokens_total')!.get();
  return values.find(({ labels }) => labels.tier === tier)?.value ?? 0;
};

async function filesIn(folder: string): Promise<string[]> {
  const entries = await readdir(folder, { recursive: true, withFileTypes: true });
  return entries.filter((entry) => entry.isFile()).map((entry) => join(entry.parentPath, entry.name));
}

describe('a conversation', () => {
  test('that left both arenas comes back from the disk, and is not computed again', async () => {
    const parts = await engineOn(await newFolder());
    await ask(parts, prompt(100));
    await pushOut(parts);
    const before = numComputed(parts);
    const sequence = await ask(parts, prompt(120));
    expect(await hitTokens(parts, 'disk')).toBe(96);
    expect([sequence.numCachedTokens, numComputed(parts) - before]).toEqual([96, 24]);
    const { values } = await parts.metrics.registry.getSingleMetric('motet_kv_disk_wait_seconds')!.get();
    expect(
      values.find((value) => 'metricName' in value && value.metricName === 'motet_kv_disk_wait_seconds_count')
        ?.value,
    ).toBe(1);
  });

  test('comes back after a restart, of each adapter its own', async () => {
    const folder = await newFolder();
    const first = await engineOn(folder, { numPages: 40, numHostPages: 64 });
    await first.tiers.load('a', '/a-r1', false);
    await ask(first, prompt(100));
    await ask(first, prompt(60), '/a-r1');
    await first.engine.close();
    expect((await filesIn(folder)).length).toBe(6 + 3);

    const second = await engineOn(folder, { numPages: 40, numHostPages: 64 });
    await second.tiers.load('a', '/a-r1', false);
    const [base, ofA] = [await ask(second, prompt(120)), await ask(second, prompt(120), '/a-r1')];
    expect([base.numCachedTokens, ofA.numCachedTokens]).toEqual([96, 48]);
    expect(await hitTokens(second, 'disk')).toBe(144);
    await second.tiers.load('a', '/b-r1', true);
    expect((await ask(second, prompt(60), '/b-r1')).numCachedTokens).toBe(0);
  });

  test('is computed where that is cheaper than reading', async () => {
    const folder = await newFolder();
    const first = await engineOn(folder);
    await ask(first, prompt(100));
    await first.engine.close();
    const second = await engineOn(folder, { secondsPerToken: 1e-9 });
    expect((await ask(second, prompt(120))).numCachedTokens).toBe(0);
    expect(second.disk.counts.reads.hit).toBe(0);
  });

  test('that several continue at once is read once', async () => {
    const folder = await newFolder();
    const first = await engineOn(folder);
    await ask(first, prompt(100));
    await first.engine.close();
    const second = await engineOn(folder, { numPages: 40 });
    const runs = [1, 2, 3, 4].map((last) =>
      start(second, { promptTokens: [...prompt(100), last], params: { maxTokens: 2 } }),
    );
    for (const [i, { done }] of runs.entries())
      expect((await done).tokens).toEqual(await greedyAlone(Uint8Array.from([...prompt(100), i + 1]), 2));
    await idle(second);
    expect(second.disk.counts.reads.hit).toBe(6);
    expect(await hitTokens(second, 'disk')).toBe(96);
  });
});

describe('a sequence that waits for the disk', () => {
  /** An engine whose disk has the prompt, and reads only when the gate opens. */
  async function stalled(options: Options = {}) {
    const folder = await newFolder();
    const first = await engineOn(folder);
    await ask(first, prompt(100));
    await first.engine.close();
    const { sick, affected, files } = sickFiles();
    const gate = Promise.withResolvers<void>();
    sick.gate = gate.promise;
    affected.add('read');
    return { gate, parts: await engineOn(folder, { numPages: 40, files, ...options }) };
  }

  test('is passed by others', async () => {
    const { gate, parts } = await stalled();
    const waits = start(parts, { promptTokens: prompt(120), params: { maxTokens: 1 } });
    const others = [1, 2, 3].map((i) => start(parts, { promptTokens: prompt(100, 50 * i) }));
    for (const { done } of others) await done;
    expect(waits.handle.sequence.status).toBe('waiting');
    gate.resolve();
    expect((await waits.done).tokens).toEqual(await greedyAlone(prompt(120), 1));
    expect(waits.handle.sequence.numCachedTokens).toBe(96);
    await idle(parts);
  });

  test('keeps no page from others: the adapter that it waits on leaves for who needs all of them', async () => {
    const folder = await newFolder();
    const first = await engineOn(folder, { numPages: 12 });
    await first.tiers.load('a', '/a-r4', false);
    await ask(first, prompt(100), '/a-r4');
    await first.engine.close();
    const { sick, affected, files } = sickFiles();
    const gate = Promise.withResolvers<void>();
    sick.gate = gate.promise;
    affected.add('read');
    const parts = await engineOn(folder, { numPages: 12, files });
    await parts.tiers.load('a', '/a-r4', false);
    const adapter = parts.tiers.get('a')!;
    const waits = start(parts, { promptTokens: prompt(100), adapter, params: { maxTokens: 1 } });
    const large = start(parts, { promptTokens: prompt(140, 7), params: { maxTokens: 40 } });
    expect((await large.done).tokens).toEqual(await greedyAlone(prompt(140, 7), 40));
    expect(waits.handle.sequence.status).toBe('waiting');
    gate.resolve();
    expect((await waits.done).tokens).toEqual(await greedyAlone(prompt(100), 1, '/a-r4'));
    await idle(parts);
  });

  test('begins to compute when it has waited as long as that takes', async () => {
    const { gate, parts } = await stalled({ secondsPerToken: 1e-4 });
    const sequence = await ask(parts, prompt(120));
    expect([sequence.numCachedTokens, parts.disk.counts.reads.hit]).toEqual([0, 0]);
    gate.resolve();
    await parts.engine.close();
  });

  test('can be cancelled, and the engine closed', async () => {
    const { gate, parts } = await stalled();
    const [one, two] = [1, 2].map((last) => start(parts, { promptTokens: [...prompt(100), last] }));
    one!.handle.cancel();
    expect((await one!.done).last.finishReason).toBe('abort');
    const closed = parts.engine.close();
    expect((await two!.done).last.finishReason).toBe('abort');
    await closed;
    gate.resolve();
    await delay(1);
    expect(parts.fatal).toEqual([]);
  });

  test('finds nothing when its adapter is purged meanwhile', async () => {
    const folder = await newFolder();
    const { sick, affected, files } = sickFiles();
    const first = await engineOn(folder);
    await first.tiers.load('a', '/a-r1', false);
    await ask(first, prompt(100), '/a-r1');
    await first.engine.close();
    const gate = Promise.withResolvers<void>();
    sick.gate = gate.promise;
    affected.add('read');
    const parts = await engineOn(folder, { numPages: 40, files });
    await parts.tiers.load('a', '/a-r1', false);
    const adapter = parts.tiers.get('a')!;
    const { done } = start(parts, { promptTokens: prompt(120), adapter });
    const sources = { adapters: { purge: async () => 0 } } as never;
    const purge = purgeAdapter({ ...parts, sources }, adapter.digest);
    expect((await done).last.error).toMatchObject({ code: 'adapter_purged' });
    gate.resolve();
    expect((await purge).kvBytes).toEqual({ device: 0, host: 0, disk: 6 * 4096 });
    await idle(parts);
    expect([await filesIn(folder), parts.hostArena!.numUsed('kv')]).toEqual([[], 0]);
    await parts.tiers.load('a', '/a-r1', false);
    expect((await ask(parts, prompt(120), '/a-r1')).numCachedTokens).toBe(0);
  });
});

describe('a disk that fails', () => {
  const lines: string[] = [];
  const log = {
    info: (_: object, message: string) => lines.push(message),
    warn: (_: object, message: string) => lines.push(message),
  } as never;

  test.each(['ENOSPC', 'EROFS', 'EIO'])(
    'with %s at every write costs no request and no token',
    async (code) => {
      lines.length = 0;
      const { sick, affected, files } = sickFiles();
      sick.failure = ioError(code);
      affected.add('write').add('rename');
      const parts = await engineOn(await newFolder(), { files, disk: { log } });
      for (let turn = 0; turn < 3; turn++)
        for (let other = 0; other < 5; other++) await ask(parts, prompt(100 + turn, 40 * other), null, 3);
      await vi.waitFor(() => expect(parts.disk.counts.dropped.failed).toBeGreaterThan(0), { interval: 1 });
      expect(lines).toEqual(['KV on disk: writes fail and rest']);
      expect(parts.disk.numBytes).toBe(0);
      const { values } = await parts.metrics.registry.getSingleMetric('motet_kv_disk_writes_failing')!.get();
      expect(values[0]!.value).toBe(1);
    },
  );

  test('at every read costs no request and no token', async () => {
    lines.length = 0;
    const folder = await newFolder();
    const first = await engineOn(folder);
    for (let other = 0; other < 5; other++) await ask(first, prompt(100, 40 * other));
    await first.engine.close();
    const { sick, affected, files } = sickFiles();
    sick.failure = ioError();
    affected.add('read');
    const second = await engineOn(folder, { files, disk: { log } });
    for (let other = 0; other < 5; other++) await ask(second, prompt(120, 40 * other), null, 3);
    expect(second.disk.counts.reads.failed).toBeGreaterThan(0);
    expect(lines).toEqual(['KV on disk: reads fail and rest']);
  });

  test('takes nothing more from the host arena while its line is full', async () => {
    const { sick, affected, files } = sickFiles();
    const gate = Promise.withResolvers<void>();
    sick.gate = gate.promise;
    affected.add('write');
    const limits = { maxLineBytes: 3 * pageBytes };
    const parts = await engineOn(await newFolder(), { files, disk: { limits } });
    for (let turn = 0; turn < 2; turn++)
      for (let other = 0; other < 5; other++) await ask(parts, prompt(100, 40 * other), null, 3);
    expect(parts.disk.counts.written).toBe(0);
    gate.resolve();
    await vi.waitFor(() => expect(parts.disk.counts.written).toBeGreaterThan(0), { interval: 1 });
  });

  test.each<[string, (path: string) => Promise<void>]>([
    ['cut', (path) => truncate(path, 600)],
    [
      'changed',
      async (path) => {
        const bytes = await readFile(path);
        bytes[bytes.length - 1]! ^= 128;
        await writeFile(path, bytes);
      },
    ],
  ])('and has all files %s costs no token', async (_, damage) => {
    const folder = await newFolder();
    const first = await engineOn(folder);
    await ask(first, prompt(100));
    await first.engine.close();
    const second = await engineOn(folder);
    for (const path of await filesIn(folder)) await damage(path);
    expect((await ask(second, prompt(120))).numCachedTokens).toBe(0);
    expect(second.disk.counts.reads.damaged).toBe(6);
    await vi.waitFor(() => expect(second.disk.numBytes).toBe(0), { interval: 1 });
  });
});

test.each([1, 2, 3, 4])(
  'conversations over small tiers and a sick disk get their tokens (seed %i)',
  async (seed) => {
    const random = seededRandom(seed);
    const folder = await newFolder();
    const { sick, affected, files } = sickFiles();
    affected.add('write').add('rename').add('read').add('remove');
    let nowMs = 0;
    const now = () => nowMs;
    const open = () =>
      engineOn(folder, {
        numPages: 24,
        numHostPages: random.from(6, 20),
        numBlocks: 12,
        files,
        disk: { now },
      });
    let parts = await open();
    let numFromDisk = 0;
    for (let turn = 0; turn < 40; turn++) {
      nowMs += random.below(3000);
      sick.failure = random.below(4) === 0 ? ioError(random.pick(['EIO', 'ENOSPC'])) : null;
      const asked = Array.from({ length: random.from(1, 3) }, () => {
        const promptTokens = prompt(random.from(1, 120), 40 * random.below(5));
        const maxTokens = random.from(1, 12);
        return { promptTokens, maxTokens, ...start(parts, { promptTokens, params: { maxTokens } }) };
      });
      for (const { promptTokens, maxTokens, done } of asked)
        expect((await done).tokens, `turn ${turn}`).toEqual(await greedyAlone(promptTokens, maxTokens));
      await idle(parts);
      if (random.below(8) > 0) continue;
      numFromDisk += await hitTokens(parts, 'disk');
      await parts.engine.close();
      parts = await open();
    }
    numFromDisk += await hitTokens(parts, 'disk');
    expect(numFromDisk).toBeGreaterThan(0);
  },
);
