/**
 * The disk tier on real folders. Full and read-only disks are real ones too (a tmpfs, which takes root; without it a folder that
 * may not be written stands in for the second, and the first is not tested). No disk can be made slow or sick here, so those are
 * real files behind operations that wait or fail.
 *
 * `MOTET_KV_KILLS=200 npx vitest run tests/engine/ladder/kv-disk.test.ts -t kill` makes the long proof of what a kill leaves.
 */
import { execFileSync, spawn } from 'node:child_process';
import { once } from 'node:events';
import {
  chmod,
  copyFile,
  mkdir,
  mkdtemp,
  open,
  readdir,
  readFile,
  rename,
  rm,
  stat,
  symlink,
  truncate,
  writeFile,
} from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { describe, expect, onTestFinished, test, vi } from 'vitest';
import { modelKeyOf } from '../../../engine/ladder/block-file.ts';
import type { BlockHash } from '../../../engine/ladder/block-hash.ts';
import type { DiskFiles } from '../../../engine/ladder/disk-files.ts';
import { KvDisk, type KvDiskOptions } from '../../../engine/ladder/kv-disk.ts';
import {
  bigBlockBytes,
  bigFileBytes,
  blockBytes,
  blockHash,
  bytesOf,
  diskOptions,
  fileBytes,
  modelKey,
} from '../../fixtures/kv-blocks.ts';
import { seededRandom } from '../../fixtures/seeded-random.ts';
import { ioError, sickFiles } from '../../fixtures/sick-files.ts';

const voiceA = `sha256:${'a'.repeat(64)}`;
const voiceB = `sha256:${'b'.repeat(64)}`;

async function newFolder(): Promise<string> {
  const folder = await mkdtemp(join(tmpdir(), 'motet-kv-disk-'));
  onTestFinished(() => rm(folder, { recursive: true, force: true }));
  return folder;
}

async function openDisk(folder: string, numBlocks = 100, overrides: Partial<KvDiskOptions> = {}) {
  const disk = await KvDisk.open(diskOptions(folder, numBlocks, overrides));
  onTestFinished(() => disk.close());
  return disk;
}

/** Offers a block that is used now, whatever its clock says. */
function write(
  disk: KvDisk,
  hash: BlockHash,
  overrides: { voice?: string; depth?: number; uses?: number } = {},
) {
  const block = { hash, voice: '', depth: 0, uses: 1, lastUsedMs: Number.POSITIVE_INFINITY, ...overrides };
  return disk.write(block, bytesOf(hash));
}

/** Plain files of a folder and those below, by path below it. */
async function filesIn(folder: string): Promise<string[]> {
  const entries = await readdir(folder, { recursive: true, withFileTypes: true });
  const files = entries.filter((entry) => entry.isFile());
  return files.map((entry) => join(entry.parentPath, entry.name)).sort();
}

async function bytesIn(folder: string): Promise<number> {
  const sizes = (await filesIn(folder)).map(async (path) => {
    // Meanwhile it may have got its name, or be gone.
    const { size } = (await stat(path).catch(() => null)) ?? { size: 0 };
    return Math.ceil(size / 4096) * 4096;
  });
  return (await Promise.all(sizes)).reduce((a, b) => a + b, 0);
}

async function fileOf(folder: string, hash: BlockHash): Promise<string> {
  const hex = Buffer.from(hash, 'latin1').toString('hex');
  return (await filesIn(folder)).find((path) => path.includes(hex))!;
}

async function expectRight(disk: KvDisk, hash: BlockHash) {
  expect((await disk.read(hash))?.equals(bytesOf(hash))).toBe(true);
}

/** What is logged, one word a line: what failed or worked again. */
function logLines() {
  const lines: string[] = [];
  const log = {
    info: (_: object, message: string) => lines.push(message),
    warn: (_: object, message: string) => lines.push(message),
  } as unknown as KvDiskOptions['log'];
  return { lines, log };
}

describe('blocks', () => {
  test('are read back as they were written, also by who opens the folder later', async () => {
    const folder = await newFolder();
    const hashes = Array.from({ length: 20 }, (_, i) => blockHash(i));
    const disk = await openDisk(folder);
    for (const [i, hash] of hashes.entries()) expect(write(disk, hash, { depth: i })).toBe(true);
    // From the line first, then from files.
    for (const hash of hashes) await expectRight(disk, hash);
    await disk.settle();
    for (const hash of hashes) await expectRight(disk, hash);
    expect([disk.numBlocks, disk.numBytes]).toEqual([20, 20 * fileBytes]);
    await disk.close();
    const next = await openDisk(folder);
    expect(next.numBytes).toBe(20 * fileBytes);
    for (const hash of hashes) {
      expect(next.has(hash)).toBe(true);
      await expectRight(next, hash);
    }
    expect(next.has(blockHash(20))).toBe(false);
    expect(await next.read(blockHash(20))).toBeNull();
  });

  test('are written once', async () => {
    const folder = await newFolder();
    const disk = await openDisk(folder);
    for (let i = 0; i < 3; i++) expect(write(disk, blockHash(1))).toBe(true);
    await disk.settle();
    expect(write(disk, blockHash(1))).toBe(true);
    await disk.settle();
    expect([disk.counts.written, (await filesIn(folder)).length]).toEqual([1, 1]);
  });

  test('of another size than a page are refused', async () => {
    const disk = await openDisk(await newFolder());
    const block = { hash: blockHash(1), voice: '', depth: 0, uses: 1, lastUsedMs: 0 };
    expect(() => disk.write(block, Buffer.alloc(5))).toThrow('bytes: expected 10000 of one block, got 5');
  });

  test('are for the eyes of their owner, under names that tell nothing', async () => {
    const folder = await newFolder();
    await chmod(folder, 0o755);
    const disk = await openDisk(folder);
    write(disk, blockHash(1), { voice: voiceA });
    await disk.settle();
    const [path] = await filesIn(folder);
    for (let at = path!; at.length >= folder.length; at = dirname(at)) {
      expect((await stat(at)).mode & 0o777, at).toBe(at === path ? 0o600 : 0o700);
    }
    expect(path).not.toContain('a'.repeat(16));
  });

  test('are not found by another model', async () => {
    const folder = await newFolder();
    const disk = await openDisk(folder);
    write(disk, blockHash(1));
    await disk.settle();
    const other = await openDisk(folder, 100, { modelKey: 'c'.repeat(64) });
    expect([other.has(blockHash(1)), other.numBlocks, other.numBytes]).toEqual([false, 0, fileBytes]);
  });
});

describe('a model key', () => {
  const origin = {
    ...{ weightsSha256: 'ab', activations: 'int8', kvType: 'auto', adapterQuantization: 'keep' },
    ...{ pageBytes: 1024, blockTokens: 16, kernelsSha256: 'cd' },
    dims: { numLayers: 2, slidingWindows: Int32Array.of(1, 2) } as never,
  };
  test('is the same for the same origin, in whatever order it is written', () => {
    const turned = Object.fromEntries(Object.entries(origin).reverse()) as typeof origin;
    expect(modelKeyOf(turned)).toBe(modelKeyOf(origin));
    expect(modelKeyOf(origin)).toMatch(/^[0-9a-f]{64}$/);
  });
  test.each([
    { weightsSha256: 'ac' },
    { dims: { numLayers: 2, slidingWindows: Int32Array.of(1, 3) } as never },
    { activations: 'f32' },
    { kvType: 'int8' },
    { adapterQuantization: 'int8' },
    { pageBytes: 2048 },
    { blockTokens: 32 },
    { kernelsSha256: 'ce' },
  ])('is another one with %o', (change) => {
    expect(modelKeyOf({ ...origin, ...change })).not.toBe(modelKeyOf(origin));
  });
});

describe('a file that is not right', () => {
  const flip = (offset: number) => async (path: string) => {
    const file = await open(path, 'r+');
    const at = offset < 0 ? (await file.stat()).size + offset : offset;
    const byte = Buffer.alloc(1);
    await file.read(byte, 0, 1, at);
    byte[0]! ^= 1;
    await file.write(byte, 0, 1, at);
    await file.close();
  };
  const cases: [string, (path: string, other: string) => Promise<unknown>][] = [
    ['is empty', (path) => truncate(path, 0)],
    ['lacks its last byte', (path) => truncate(path, 112 + blockBytes - 1)],
    ['is cut within its header', (path) => truncate(path, 50)],
    ['has one byte more', (path) => writeFile(path, 'x', { flag: 'a' })],
    [
      'has zeros for an end',
      async (path) => {
        await truncate(path, 5000);
        await truncate(path, 112 + blockBytes);
      },
    ],
    ['is another block', (path, other) => copyFile(other, path)],
    [
      'is a link to another block',
      async (path, other) => {
        await rm(path);
        await symlink(other, path);
      },
    ],
    [
      'is a folder',
      async (path) => {
        await rm(path);
        await mkdir(path);
      },
    ],
    [
      'is a pipe that nobody writes to',
      async (path) => {
        await rm(path);
        execFileSync('mkfifo', [path]);
      },
    ],
    ...[0, 8, 12, 16, 48, 80, 112, 5000, -1].map((offset): [string, (path: string) => Promise<unknown>] => [
      `has one bit changed, at ${offset}`,
      flip(offset),
    ]),
  ];
  test.each(cases)('because it %s is not served, and gone', async (_, damage) => {
    const folder = await newFolder();
    const disk = await openDisk(folder);
    const [hash, other] = [blockHash(1), blockHash(2)];
    for (const one of [hash, other]) write(disk, one);
    await disk.settle();
    const path = await fileOf(folder, hash);
    await damage(path, await fileOf(folder, other));
    expect(await disk.read(hash)).toBeNull();
    expect([disk.counts.reads.damaged, disk.has(hash)]).toEqual([1, false]);
    await expectRight(disk, other);
    // It is written again, and is right then.
    if ((await stat(path).catch(() => null))?.isDirectory()) await rm(path, { recursive: true });
    await disk.settle();
    write(disk, hash);
    await disk.settle();
    await expectRight(disk, hash);
    disk.check();
  });

  test.each(cases.slice(0, 9))(
    'because it %s is not served by who opens the folder then',
    async (_, damage) => {
      const folder = await newFolder();
      const disk = await openDisk(folder);
      const [hash, other] = [blockHash(1), blockHash(2)];
      for (const one of [hash, other]) write(disk, one);
      await disk.close();
      await damage(await fileOf(folder, hash), await fileOf(folder, other));
      const next = await openDisk(folder);
      expect(await next.read(hash)).toBeNull();
      await expectRight(next, other);
    },
  );

  test('because it is the same block of another model is not served', async () => {
    const folder = await newFolder();
    const hash = blockHash(1);
    const foreign = await openDisk(folder, 100, { modelKey: 'c'.repeat(64) });
    write(foreign, hash);
    await foreign.settle();
    const disk = await openDisk(folder);
    write(disk, hash);
    await disk.settle();
    const paths = await filesIn(folder);
    const [theirs, ours] = paths[0]!.includes('c'.repeat(32)) ? paths : paths.reverse();
    await rename(theirs!, ours!);
    expect(await disk.read(hash)).toBeNull();
    expect(disk.counts.reads.damaged).toBe(1);
  });
});

describe('the budget', () => {
  test('is kept, and what is worth least leaves', async () => {
    const folder = await newFolder();
    // Two that are written within a millisecond would be worth the same.
    let wallMs = Date.now();
    const disk = await openDisk(folder, 4, { wallClock: () => wallMs });
    for (let i = 0; i < 4; i++) {
      write(disk, blockHash(i), { depth: i });
      await disk.settle();
      wallMs += 1000;
    }
    disk.touch(blockHash(0));
    write(disk, blockHash(4));
    await disk.settle();
    expect(await bytesIn(folder)).toBe(4 * fileBytes);
    expect([0, 1, 2, 3, 4].map((i) => disk.has(blockHash(i)))).toEqual([true, false, true, true, true]);
    expect(disk.counts.removed.budget).toBe(1);
  });

  test('is not spent on a block that is worth less than all that are there', async () => {
    const disk = await openDisk(await newFolder(), 2);
    for (const i of [1, 2]) write(disk, blockHash(i), { uses: 5 });
    await disk.settle();
    write(disk, blockHash(3), { uses: 1 });
    await disk.settle();
    expect([disk.has(blockHash(3)), disk.counts.dropped.worth_least]).toEqual([false, 1]);
  });

  test('goes by what a block costs to make', async () => {
    const disk = await openDisk(await newFolder(), 2, { restoreSeconds: (depth) => 1 + depth });
    write(disk, blockHash(1), { depth: 100 });
    write(disk, blockHash(2), { depth: 0 });
    write(disk, blockHash(3), { depth: 50 });
    await disk.settle();
    expect([1, 2, 3].map((i) => disk.has(blockHash(i)))).toEqual([true, false, true]);
  });

  test('is kept from the start when it became smaller', async () => {
    const folder = await newFolder();
    const disk = await openDisk(folder);
    for (let i = 0; i < 10; i++) write(disk, blockHash(i));
    await disk.close();
    const next = await openDisk(folder, 3);
    expect([next.numBytes, await bytesIn(folder)]).toEqual([3 * fileBytes, 3 * fileBytes]);
  });

  test('is shared with other models, of which the oldest leaves first', async () => {
    const folder = await newFolder();
    let wallMs = Date.now() - 3_600_000;
    const wallClock = () => wallMs;
    const foreign = await openDisk(folder, 100, { modelKey: 'c'.repeat(64), wallClock });
    for (let i = 0; i < 4; i++) {
      write(foreign, blockHash(i));
      await foreign.settle();
      wallMs += 60_000;
    }
    await foreign.close();
    const disk = await openDisk(folder, 4);
    for (const i of [10, 11]) write(disk, blockHash(i));
    await disk.settle();
    expect([disk.numBlocks, disk.numBytes, await bytesIn(folder)]).toEqual([2, 4 * fileBytes, 4 * fileBytes]);
    const again = await openDisk(folder, 4, { modelKey: 'c'.repeat(64) });
    expect([0, 1, 2, 3].map((i) => again.has(blockHash(i)))).toEqual([false, false, true, true]);
    write(disk, blockHash(12));
    write(disk, blockHash(13));
    await disk.settle();
    await disk.settle();
    expect(await readdir(folder)).toEqual([modelKey.slice(0, 32)]);
  });

  test('remembers over a restart what was used last', async () => {
    const folder = await newFolder();
    let wallMs = Date.now() - 600_000;
    const wallClock = () => wallMs;
    const disk = await openDisk(folder, 100, { wallClock });
    for (let i = 0; i < 3; i++) {
      write(disk, blockHash(i));
      await disk.settle();
      wallMs += 60_000;
    }
    disk.touch(blockHash(0));
    await disk.close();
    const next = await openDisk(folder, 2);
    expect([0, 1, 2].map((i) => next.has(blockHash(i)))).toEqual([true, false, true]);
  });

  test('without room for one block is told, and takes none', async () => {
    const { lines, log } = logLines();
    const disk = await openDisk(await newFolder(), 0, { log });
    expect(lines).toEqual(['KV on disk: the budget has no room for one block']);
    write(disk, blockHash(1));
    await disk.settle();
    expect([disk.numBytes, disk.counts.dropped.worth_least]).toEqual([0, 1]);
  });
});

describe('what a dead process left half written', () => {
  test('is removed, and what a living one writes is not', async () => {
    const folder = await newFolder();
    const temporary = (pid: number, host: string) =>
      join(folder, `.${'ab'.repeat(32)}.${host}.${pid}.0123456789ab.tmp`);
    const host = encodeURIComponent((await import('node:os')).hostname());
    const child = spawn(process.execPath, ['-e', '']);
    await once(child, 'exit');
    await writeFile(temporary(child.pid!, host), 'half');
    await writeFile(temporary(process.ppid, host), 'half');
    await writeFile(temporary(1, 'another-host'), 'half');
    await openDisk(folder);
    expect((await filesIn(folder)).sort()).toEqual(
      [temporary(process.ppid, host), temporary(1, 'another-host')].sort(),
    );
  });
});

describe('two engines on one folder', () => {
  test('do without what the other one removed, and find what it wrote', async () => {
    const folder = await newFolder();
    const [a, b] = [await openDisk(folder, 3), await openDisk(folder, 3)];
    write(a, blockHash(1));
    await a.settle();
    expect(b.has(blockHash(1))).toBe(false);
    await b.settle();
    await expectRight(b, blockHash(1));
    for (let i = 2; i < 5; i++) write(b, blockHash(i), { uses: 5 });
    await b.settle();
    expect(await a.read(blockHash(1))).toBeNull();
    expect([a.counts.reads.gone, a.numBlocks]).toEqual([1, 0]);
    await a.settle();
    expect([a.numBytes, b.numBytes, await bytesIn(folder)]).toEqual(Array(3).fill(3 * fileBytes));
  });

  test('write and remove the same blocks at once, and each reads what is right or nothing', async () => {
    const folder = await newFolder();
    const disks = [await openDisk(folder, 6), await openDisk(folder, 6)];
    const random = seededRandom(7);
    let numRead = 0;
    for (let turn = 0; turn < 300; turn++) {
      const disk = random.pick(disks);
      const hash = blockHash(random.below(12));
      if (random.below(3) > 0) write(disk, hash, { voice: random.pick(['', voiceA]) });
      else if (random.below(20) === 0) await disk.purge(voiceA);
      const bytes = await disk.read(hash);
      if (bytes) numRead++;
      expect(bytes === null || bytes.equals(bytesOf(hash)), `turn ${turn}`).toBe(true);
      if (random.below(10) === 0) await disk.settle();
      disk.check();
    }
    for (const disk of [...disks, ...disks]) await disk.settle();
    expect(numRead).toBeGreaterThan(50);
    for (const disk of disks) {
      expect(disk.numBytes).toBe(await bytesIn(folder));
      expect(disk.numBytes).toBeLessThanOrEqual(6 * fileBytes);
      expect([disk.counts.reads.damaged, disk.counts.reads.failed, disk.resting.writes]).toEqual([
        0,
        0,
        false,
      ]);
    }
  });
});

describe('a purge', () => {
  const voices = ['', voiceA, voiceB, `${voiceB}@0.5+${voiceA}@1`, voiceA];
  const fill = async (disk: KvDisk) => {
    for (const [i, voice] of voices.entries()) write(disk, blockHash(i), { voice });
  };
  const kept = (disk: KvDisk) => voices.map((_, i) => disk.has(blockHash(i)));

  test('removes all that was made with the adapter, alone or in a composition', async () => {
    const folder = await newFolder();
    const disk = await openDisk(folder);
    await fill(disk);
    await disk.settle();
    const files = await Promise.all((await filesIn(folder)).map((path) => readFile(path)));
    expect(files.length).toBe(5);
    expect(await disk.purge(voiceA)).toEqual({ device: 0, host: 0, disk: 3 * fileBytes });
    expect(kept(disk)).toEqual([true, false, true, false, false]);
    expect((await filesIn(folder)).length).toBe(2);
    expect(await disk.purge(voiceA)).toEqual({ device: 0, host: 0, disk: 0 });
  });

  test('finds what an earlier process and another model have of it', async () => {
    const folder = await newFolder();
    for (const key of [modelKey, 'c'.repeat(64)]) {
      const disk = await openDisk(folder, 100, { modelKey: key });
      await fill(disk);
      await disk.close();
    }
    const disk = await openDisk(folder);
    expect(await disk.purge(voiceA)).toMatchObject({ disk: 6 * fileBytes });
    expect([kept(disk), disk.numBytes]).toEqual([[true, false, true, false, false], 4 * fileBytes]);
    disk.check();
  });

  test('finds compositions of more adapters than a name has room for', async () => {
    const disk = await openDisk(await newFolder());
    const digests = Array.from({ length: 40 }, (_, i) => `sha256:${`${i + 10}`.repeat(32)}`);
    write(disk, blockHash(1), { voice: digests.map((digest) => `${digest}@1`).join('+') });
    await disk.settle();
    expect(disk.has(blockHash(1))).toBe(true);
    expect(await disk.purge(digests[37]!)).toMatchObject({ disk: fileBytes });
  });

  test('takes what stands in line, and what is being written and read', async () => {
    const folder = await newFolder();
    const { sick, affected, files } = sickFiles();
    const disk = await openDisk(folder, 100, { files });
    write(disk, blockHash(9), { voice: voiceA });
    await disk.settle();
    const gate = Promise.withResolvers<void>();
    sick.gate = gate.promise;
    affected.add('rename').add('read');
    await fill(disk);
    const read = disk.read(blockHash(9));
    await vi.waitFor(() => expect(sick.numAsked).toBe(2), { interval: 1 });
    const purge = disk.purge(voiceA);
    expect([disk.has(blockHash(9)), disk.has(blockHash(1))]).toEqual([false, false]);
    gate.resolve();
    expect(await read).toBeNull();
    await purge;
    await disk.settle();
    expect(kept(disk)).toEqual([true, false, true, false, false]);
    expect((await filesIn(folder)).length).toBe(2);
    disk.check();
  });

  test('that the disk refuses says so, and is done when it is asked again', async () => {
    const folder = await newFolder();
    const { sick, affected, files } = sickFiles();
    const disk = await openDisk(folder, 100, { files });
    await fill(disk);
    await disk.settle();
    sick.failure = ioError('EROFS');
    affected.add('remove');
    await expect(disk.purge(voiceA)).rejects.toMatchObject({ code: 'purge_incomplete', status: 503 });
    expect(kept(disk)).toEqual([true, false, true, false, false]);
    expect(disk.numBytes).toBe(5 * fileBytes);
    sick.failure = null;
    expect(await disk.purge(voiceA)).toMatchObject({ disk: 3 * fileBytes });
  });

  test('does not wait for ever for a disk that stalls', async () => {
    const { sick, affected, files } = sickFiles();
    const disk = await openDisk(await newFolder(), 100, { files, limits: { purgeMs: 20 } });
    await fill(disk);
    await disk.settle();
    const gate = Promise.withResolvers<void>();
    sick.gate = gate.promise;
    affected.add('remove');
    await expect(disk.purge(voiceA)).rejects.toMatchObject({ code: 'purge_incomplete' });
    gate.resolve();
    await disk.settle();
    expect(disk.numBytes).toBe(2 * fileBytes);
  });
});

describe('a disk that is slow or sick', () => {
  test('costs a read no more than its time, and the next ones nothing', async () => {
    const { lines, log } = logLines();
    const { sick, affected, files } = sickFiles();
    let nowMs = 0;
    const disk = await openDisk(await newFolder(), 100, {
      files,
      log,
      now: () => nowMs,
      limits: { readMs: 20 },
    });
    for (let i = 0; i < 10; i++) write(disk, blockHash(i));
    await disk.settle();
    const gate = Promise.withResolvers<void>();
    sick.gate = gate.promise;
    affected.add('read');
    const reads = [0, 1, 2, 3].map((i) => disk.read(blockHash(i)));
    expect(await Promise.all(reads)).toEqual([null, null, null, null]);
    expect([disk.counts.reads.late, disk.has(blockHash(0))]).toEqual([4, false]);
    // It rests; and then it is tried again, but not while it still owes an answer.
    nowMs += 1001;
    expect(disk.has(blockHash(0))).toBe(true);
    expect(await disk.read(blockHash(0), 600_000)).toBeNull();
    expect(disk.counts.reads.busy).toBe(1);
    expect([sick.numAsked, lines]).toEqual([2, ['KV on disk: reads fail and rest']]);
    gate.resolve();
    await vi.waitFor(() => expect(lines).toHaveLength(2), { interval: 1 });
    expect(lines[1]).toBe('KV on disk: reads work again');
    for (let i = 0; i < 10; i++) await expectRight(disk, blockHash(i));
  });

  test('holds up no more reads than stand in line', async () => {
    const { sick, affected, files } = sickFiles();
    const disk = await openDisk(await newFolder(), 100, { files, limits: { maxWaitingReads: 3 } });
    for (let i = 0; i < 8; i++) write(disk, blockHash(i));
    await disk.settle();
    const gate = Promise.withResolvers<void>();
    sick.gate = gate.promise;
    affected.add('read');
    const reads = Array.from({ length: 8 }, (_, i) => disk.read(blockHash(i)));
    expect(disk.counts.reads.busy).toBe(3);
    gate.resolve();
    expect((await Promise.all(reads)).filter((bytes) => bytes !== null).length).toBe(5);
  });

  test('that does not take writes drops them and rests, and comes back', async () => {
    const { lines, log } = logLines();
    const { sick, affected, files } = sickFiles();
    let nowMs = 0;
    const limits = { maxLineBytes: 4 * blockBytes, changeMs: 20 };
    const folder = await newFolder();
    const disk = await openDisk(folder, 100, { files, log, limits, now: () => nowMs });
    const gate = Promise.withResolvers<void>();
    sick.gate = gate.promise;
    affected.add('write');
    const taken = Array.from({ length: 7 }, (_, i) => write(disk, blockHash(i)));
    expect(taken).toEqual([true, true, true, true, false, false, false]);
    expect(disk.counts.dropped.line_full).toBe(3);
    await vi.waitFor(() => expect(disk.resting.writes).toBe(true), { interval: 1 });
    expect([write(disk, blockHash(7)), disk.has(blockHash(0))]).toEqual([false, false]);
    expect(disk.counts.dropped).toMatchObject({ failed: 4, resting: 1 });
    gate.resolve();
    nowMs += 1001;
    expect(write(disk, blockHash(8))).toBe(true);
    await disk.settle();
    await expectRight(disk, blockHash(8));
    expect(lines).toEqual(['KV on disk: writes fail and rest', 'KV on disk: writes work again']);
    expect([(await filesIn(folder)).length, disk.numBytes]).toEqual([1, fileBytes]);
  });

  test.each(['EIO', 'ENOSPC', 'EROFS', 'EACCES', 'EMFILE', 'EDQUOT'])(
    'says once that writes fail with %s, however many do, and waits longer each time',
    async (code) => {
      const { lines, log } = logLines();
      const { sick, affected, files } = sickFiles();
      let nowMs = 0;
      const folder = await newFolder();
      const disk = await openDisk(folder, 100, { files, log, now: () => nowMs });
      write(disk, blockHash(100));
      await disk.settle();
      sick.failure = ioError(code);
      affected.add('write');
      for (let i = 0; i < 200_000; i += 500) {
        nowMs = i;
        write(disk, blockHash(i));
        await disk.settle();
      }
      // After 0, 1, 3, 7, 15, 31, 63, 123 and 183 seconds.
      expect(sick.numAsked).toBe(9);
      expect(lines).toEqual(['KV on disk: writes fail and rest']);
      sick.failure = null;
      nowMs += 61_000;
      write(disk, blockHash(1));
      await disk.settle();
      expect([lines.length, disk.resting.writes, disk.has(blockHash(1))]).toEqual([2, false, true]);
      disk.check();
      expect(await bytesIn(folder)).toBe(disk.numBytes);
    },
  );

  test('that cannot read a block is left alone, and read again later', async () => {
    const { lines, log } = logLines();
    const { sick, affected, files } = sickFiles();
    let nowMs = 0;
    const disk = await openDisk(await newFolder(), 100, { files, log, now: () => nowMs });
    for (let i = 0; i < 3; i++) write(disk, blockHash(i));
    await disk.settle();
    sick.failure = ioError();
    affected.add('read');
    for (let i = 0; i < 3; i++) expect(await disk.read(blockHash(i))).toBeNull();
    expect([sick.numAsked, disk.counts.reads.failed]).toEqual([1, 1]);
    sick.failure = null;
    nowMs += 1001;
    // The first one may be the only one that cannot be read.
    expect(await disk.read(blockHash(0))).toBeNull();
    await expectRight(disk, blockHash(1));
    expect(lines).toEqual(['KV on disk: reads fail and rest', 'KV on disk: reads work again']);
  });

  test('is measured, and a measure is forgotten', async () => {
    let nowMs = 0;
    const { affected, files } = sickFiles();
    const slow = {
      ...files,
      read: async (...args: Parameters<DiskFiles['read']>) => {
        nowMs += 400;
        return files.read(...args);
      },
    };
    const disk = await openDisk(await newFolder(), 100, { files: slow, now: () => nowMs });
    expect(affected.size).toBe(0);
    const guessed = disk.secondsPerBlock;
    write(disk, blockHash(1));
    await disk.settle();
    await disk.read(blockHash(1));
    expect(disk.secondsPerBlock).toBeCloseTo(0.4);
    nowMs += 3_600_000;
    expect(disk.secondsPerBlock).toBeCloseTo(guessed);
  });

  test('does not keep the engine from opening or closing', async () => {
    const { sick, affected, files } = sickFiles();
    const gate = Promise.withResolvers<void>();
    sick.gate = gate.promise;
    affected.add('list').add('write');
    const folder = await newFolder();
    const disk = await openDisk(folder, 100, { files, limits: { openMs: 10, closeMs: 10 } });
    write(disk, blockHash(1));
    await disk.close();
    expect([disk.has(blockHash(1)), write(disk, blockHash(2)), await disk.read(blockHash(1))]).toEqual([
      false,
      false,
      null,
    ]);
    gate.resolve();
  });

  test('does not lose what was in line when it is closed in time', async () => {
    const folder = await newFolder();
    const disk = await openDisk(folder);
    for (let i = 0; i < 50; i++) write(disk, blockHash(i));
    await disk.close();
    const next = await openDisk(folder);
    expect(next.numBlocks).toBe(50);
  });
});

describe('a real disk', () => {
  const isRoot = process.getuid?.() === 0;

  /** A disk of its own, of so many bytes. */
  async function mount(sizeBytes: number) {
    const folder = await newFolder();
    execFileSync('mount', ['-t', 'tmpfs', '-o', `size=${sizeBytes}`, 'tmpfs', folder]);
    const remount = (how: 'ro' | 'rw') => execFileSync('mount', ['-o', `remount,${how}`, folder]);
    onTestFinished(async () => void execFileSync('umount', ['-l', folder]));
    return { folder, remount };
  }

  /** What is written to a read-only folder fails; what is there is read. */
  async function seesReadOnly(folder: string, set: (how: 'ro' | 'rw') => unknown) {
    const { lines, log } = logLines();
    let nowMs = 0;
    const disk = await openDisk(folder, 100, { log, now: () => nowMs });
    write(disk, blockHash(1));
    await disk.settle();
    await set('ro');
    for (let i = 2; i < 50; i++) write(disk, blockHash(i));
    await disk.settle();
    expect([disk.numBlocks, lines]).toEqual([1, ['KV on disk: writes fail and rest']]);
    await expectRight(disk, blockHash(1));
    const next = await openDisk(folder, 100, { log });
    await expectRight(next, blockHash(1));
    await set('rw');
    nowMs += 1001;
    write(disk, blockHash(2));
    await disk.settle();
    await expectRight(disk, blockHash(2));
    expect(disk.resting.writes).toBe(false);
  }

  if (isRoot) {
    test('that is full takes a new block for an old one, and grows when there is room again', async () => {
      const { lines, log } = logLines();
      const { folder } = await mount(2 ** 20);
      await writeFile(join(folder, 'of-others'), Buffer.alloc(600_000));
      let nowMs = 0;
      const disk = await openDisk(folder, 1000, { log, now: () => nowMs });
      for (let i = 0; i < 200; i++) {
        write(disk, blockHash(i));
        if (i % 10 === 0) await disk.settle();
        nowMs += 2000;
      }
      await disk.settle();
      expect(disk.numBytes).toBe((await bytesIn(folder)) - Math.ceil(600_000 / 4096) * 4096);
      expect(disk.numBlocks).toBeGreaterThan(20);
      await expectRight(disk, blockHash(199));
      disk.check();
      // Whatever it took to find out, it does not go on failing.
      const numLines = lines.length;
      for (let i = 200; i < 250; i++) write(disk, blockHash(i));
      await disk.settle();
      expect(lines.length).toBe(numLines);
      const before = disk.numBlocks;
      await rm(join(folder, 'of-others'));
      await disk.settle();
      for (let i = 300; i < 350; i++) write(disk, blockHash(i));
      await disk.settle();
      expect(disk.numBlocks).toBeGreaterThan(before + 30);
    });

    test('that others fill up between two looks makes writes rest, and they go on with what room there is', async () => {
      const { lines, log } = logLines();
      const { folder } = await mount(2 ** 20);
      let nowMs = 0;
      const disk = await openDisk(folder, 1000, { log, now: () => nowMs });
      for (let i = 0; i < 10; i++) write(disk, blockHash(i));
      await disk.settle();
      const others = await open(join(folder, 'of-others'), 'w');
      await others.writeFile(Buffer.alloc(2 ** 20)).catch(() => {});
      await others.close();
      write(disk, blockHash(50));
      await vi.waitFor(() => expect(disk.resting.writes).toBe(true), { interval: 1 });
      nowMs += 1001;
      write(disk, blockHash(51));
      await vi.waitFor(() => expect(disk.resting.writes).toBe(false), { interval: 1 });
      await expectRight(disk, blockHash(51));
      expect([disk.numBlocks, lines.length]).toEqual([10, 2]);
    });

    test('that becomes read-only is read, and written again when it can be', async () => {
      const { folder, remount } = await mount(2 ** 20);
      await seesReadOnly(folder, remount);
    });
  } else {
    test('that may not be written is read, and written again when it can be (as root: a read-only mount, and full disks)', async () => {
      const folder = await newFolder();
      await seesReadOnly(folder, (how) => chmod(folder, how === 'ro' ? 0o500 : 0o700));
    });
  }

  test('whose folder is removed under it gets a new one', async () => {
    const folder = await newFolder();
    const disk = await openDisk(folder);
    write(disk, blockHash(1));
    await disk.settle();
    await rm(folder, { recursive: true });
    expect(await disk.read(blockHash(1))).toBeNull();
    write(disk, blockHash(2));
    await disk.settle();
    await expectRight(disk, blockHash(2));
    expect(disk.numBytes).toBe(fileBytes);
    expect(disk.resting).toEqual({ reads: false, writes: false });
  });
});

test.each([1, 2, 3])(
  'the books are what is on disk over a random run (seed %i)',
  async (seed) => {
    const folder = await newFolder();
    const random = seededRandom(seed);
    const numBlocks = random.from(4, 12);
    const voices = ['', voiceA, voiceB, `${voiceA}@1+${voiceB}@0.5`];
    const { sick, affected, files } = sickFiles();
    affected.add('write').add('rename').add('remove').add('read');
    let nowMs = 0;
    const reopen = () => openDisk(folder, numBlocks, { files, now: () => nowMs });
    let disk = await reopen();
    let numHits = 0;
    for (let turn = 0; turn < 400; turn++) {
      nowMs += random.below(1500);
      const index = random.below(20);
      const voice = voices[index % voices.length]!;
      const hash = blockHash(index);
      const action = random.below(100);
      if (action < 45) write(disk, hash, { voice, depth: index, uses: random.from(1, 4) });
      else if (action < 70) {
        const bytes = await disk.read(hash);
        if (bytes) numHits++;
        expect(bytes === null || bytes.equals(bytesOf(hash)), `turn ${turn}`).toBe(true);
      } else if (action < 75) disk.touch(hash);
      else if (action < 78) disk.forget(hash);
      else if (action < 81) await disk.purge(random.pick([voiceA, voiceB])).catch(() => {});
      else if (action < 84) {
        const path = await fileOf(folder, hash);
        if (path) await truncate(path, random.below(112 + blockBytes));
      } else if (action < 87)
        sick.failure = random.below(2) === 0 ? ioError(random.pick(['EIO', 'ENOSPC'])) : null;
      else if (action < 90) {
        await disk.close();
        disk = await reopen();
      } else if (action < 92) await rm((await filesIn(folder))[0] ?? '', { force: true });
      disk.check();
      expect(await bytesIn(folder), `turn ${turn}`).toBeLessThanOrEqual(numBlocks * fileBytes);
      if (random.below(10) > 0) continue;
      sick.failure = null;
      nowMs += 61_000;
      await disk.settle();
      await disk.settle();
      disk.check();
      expect(disk.numBytes, `turn ${turn}`).toBe(await bytesIn(folder));
    }
    expect(numHits).toBeGreaterThan(20);
  },
  60_000,
);

const numKills = Number(process.env.MOTET_KV_KILLS ?? 8);

test(
  `a kill at any moment leaves blocks that are right, and nothing else (${numKills} kills)`,
  async () => {
    const folder = await newFolder();
    const random = seededRandom(numKills);
    const size = { blockBytes: bigBlockBytes, budgetBytes: 12 * bigFileBytes };
    const childPath = join(import.meta.dirname, '../../fixtures/kv-disk-child.ts');
    let numRight = 0;
    let numLeft = 0;
    for (let kill = 0; kill < numKills; kill++) {
      const first = kill * 1000;
      const child = spawn(process.execPath, [childPath, folder, '12', `${first}`], {
        stdio: ['ignore', 'pipe', 'inherit'],
      });
      const exit = once(child, 'exit');
      // So many blocks after the first one, and wherever it is then.
      let numToSee = random.from(1, 25);
      // Its output stays open: one that cannot write would end by itself.
      await new Promise<void>((resolve) => {
        child.stdout.on('data', (chunk: Buffer) => {
          numToSee -= chunk.toString().split('\n').length - 1;
          if (numToSee <= 0) resolve();
        });
        child.once('exit', () => resolve());
      });
      await delay(random.unit() * 4);
      child.kill('SIGKILL');
      expect(await exit).toEqual([null, 'SIGKILL']);
      numLeft += (await filesIn(folder)).filter((path) => path.endsWith('.tmp')).length;
      const disk = await KvDisk.open(diskOptions(folder, 0, size));
      expect((await filesIn(folder)).filter((path) => path.endsWith('.tmp'))).toEqual([]);
      expect(disk.numBytes).toBe(await bytesIn(folder));
      expect(disk.numBytes).toBeLessThanOrEqual(size.budgetBytes);
      for (const path of await filesIn(folder)) {
        const [hex] = path.slice(path.lastIndexOf('/') + 1).split('.');
        const hash = Buffer.from(hex!, 'hex').toString('latin1');
        const bytes = await disk.read(hash);
        expect(bytes?.equals(bytesOf(hash, modelKey, bigBlockBytes))).toBe(true);
        numRight++;
      }
      expect(disk.counts.reads.damaged).toBe(0);
      await disk.close();
    }
    expect(numRight).toBeGreaterThan(numKills);
    // Some were hit in the middle of a file, or this shows nothing. About one in twenty is, so a short run may have none.
    if (numKills >= 100) expect(numLeft).toBeGreaterThan(0);
  },
  60_000 + numKills * 3000,
);
