/** Removing an adapter for good: on the real runtime, whose memory is searched for what must be gone. */
import { cp, mkdir, mkdtemp, readdir, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { pino } from 'pino';
import { describe, expect, onTestFinished, test, vi } from 'vitest';
import { digestOfFolder } from '../../engine/adapters/adapter-file.ts';
import { alone as only } from '../../engine/adapters/composition.ts';
import { headerBytes } from '../../engine/ladder/block-file.ts';
import { KvDisk } from '../../engine/ladder/kv-disk.ts';
import { enginePaths } from '../../engine/protocol.ts';
import { purgeAdapter } from '../../engine/purge.ts';
import { defaultSampling } from '../../engine/sampling.ts';
import { Sources } from '../../engine/sources.ts';
import type { Runtime } from '../../native/index.ts';
import { readFakeAdapter, start, startEngine } from '../fixtures/fake-engine-parts.ts';
import { goldensFolder } from '../fixtures/golden.ts';
import { diskOptions, modelKey } from '../fixtures/kv-blocks.ts';
import { open, prepare } from '../fixtures/models.ts';
import { generate, startRealEngine } from '../fixtures/real-engine.ts';
import { serveFake } from '../fixtures/serve-fake.ts';

const log = pino({ level: 'silent' });
const chunkBytes = 64;

/** The chunks of a page that hold something. */
function chunksOf(page: Buffer): Set<string> {
  const chunks = new Set<string>();
  for (let at = 0; at < page.length; at += chunkBytes) {
    const chunk = page.subarray(at, at + chunkBytes);
    if (chunk.some((byte) => byte !== 0)) chunks.add(chunk.toString('latin1'));
  }
  return chunks;
}

/** A device page, by way of a host page that nobody else has. */
async function readDevicePage(runtime: Runtime, page: number, spare: Int32Array): Promise<Buffer> {
  await runtime.copyPages('toHost', Int32Array.of(page), spare);
  return runtime.readHostPages(spare);
}

async function filesBelow(folder: string): Promise<Buffer[]> {
  const entries = await readdir(folder, { recursive: true, withFileTypes: true });
  const files = entries.filter((entry) => entry.isFile());
  return Promise.all(files.map((entry) => readFile(join(entry.parentPath, entry.name))));
}

test('leaves no byte of the adapter, of its KV or of its files, and others go on', async () => {
  const cacheFolder = await mkdtemp(join(tmpdir(), 'motet-purge-'));
  onTestFinished(() => rm(cacheFolder, { recursive: true }));
  const model = await prepare(join(goldensFolder, 'tiny/llama3'));
  const runtime = await open(model, { deviceMemoryBytes: 32 << 20, hostMemoryBytes: 32 << 20 });
  const kvFolder = join(cacheFolder, 'kv');
  const blockBytes = runtime.pageBytes;
  const disk = await KvDisk.open(diskOptions(kvFolder, 0, { blockBytes, budgetBytes: 2 ** 30 }));
  const parts = startRealEngine(runtime, model, {}, runtime.numPages, disk);
  const { engine, tiers, arena, hostArena, blocks } = parts;
  const sources = new Sources({ cacheFolder, maxAdapterBytes: 2 ** 30, adapterRoot: null, log });
  onTestFinished(async () => {
    await Promise.all([engine.close(), tiers.close(), sources.close()]);
    runtime.close();
  });

  // As a fetch would have left it.
  const original = join(goldensFolder, 'tiny/llama3/adapter');
  const digest = await digestOfFolder(original);
  const copy = join(cacheFolder, 'adapters', digest.slice('sha256:'.length));
  await mkdir(join(cacheFolder, 'adapters'));
  await cp(original, copy, { recursive: true });
  await tiers.load('a', await sources.adapter('https://host.example/a', digest), false);
  await vi.waitFor(() => expect(tiers.get('a')?.host).not.toBeNull(), { interval: 1 });
  const adapter = tiers.get('a')!;

  // To look at device pages through; later there is none, since KV fills the host arena.
  const spare = new Int32Array(1);
  expect(hostArena!.take('kv', 1, spare)).toBe(true);

  // It was at other places of the arena before, its sequences wrote KV, and one of them runs.
  const prompt = (seed: number) => Array.from({ length: 90 }, (_, i) => (i * seed + 3) % 512);
  const alone = await generate(parts, { promptTokens: prompt(5), maxTokens: 200 });
  for (let i = 0; i < 3; i++) {
    const pages = arena.numFree + blocks.numReclaimablePages;
    await generate(parts, { promptTokens: prompt(7 + i), adapter, maxTokens: 4 });
    tiers.residency.evictWaiting();
    expect(arena.numFree + blocks.numReclaimablePages).toBeGreaterThanOrEqual(pages);
    await generate(parts, { promptTokens: prompt(11 + i), maxTokens: 30 });
  }
  // What is in the host arena goes on to the disk, as it would when that is full.
  await blocks.settled();
  for (const { block, page } of blocks.host!.leavingFirst(1000))
    disk.write(block, runtime.readHostPages(Int32Array.of(page)) as Buffer<ArrayBuffer>);
  await disk.settle();
  const voicesFolder = join(kvFolder, modelKey.slice(0, 32));
  const voices = await readdir(voicesFolder);
  const blocksOnDisk = async (folder: string) =>
    (await filesBelow(folder)).map((file) => file.subarray(headerBytes));
  const secrets = new Set<string>();
  for (const voice of voices.filter((name) => name !== 'base')) {
    for (const block of await blocksOnDisk(join(voicesFolder, voice)))
      for (const chunk of chunksOf(block)) secrets.add(chunk);
  }
  expect(voices.length).toBe(2);
  expect(secrets.size).toBeGreaterThan(500);

  const ended = Promise.withResolvers<unknown>();
  const isWell = Promise.withResolvers<void>();
  const [handle] = engine.add([
    {
      promptTokens: prompt(23),
      adapters: only(adapter),
      params: { ...defaultSampling(), temperature: 0, ignoreEos: true, maxTokens: 900 },
      onOutput({ finishReason, error }) {
        if (finishReason) ended.resolve(error);
        if (handle && handle.sequence.numOutputTokens > 20) isWell.resolve();
      },
    },
  ]);
  const other = generate(parts, { promptTokens: prompt(5), maxTokens: 200 });
  await isWell.promise;
  // Its first blocks are full and do not change any more.
  for (const page of [...handle!.sequence.blocks.slice(0, 5), ...adapter.device!.pages]) {
    for (const chunk of chunksOf(await readDevicePage(runtime, page, spare))) secrets.add(chunk);
  }
  runtime.clearPages('host', spare);
  expect(secrets.size).toBeGreaterThan(500);

  const report = await purgeAdapter({ ...parts, sources }, digest);
  expect(await ended.promise).toMatchObject({ code: 'adapter_purged', status: 410 });
  expect(report).toMatchObject({ digest, names: ['a'] });
  const numBytes = adapter.numPages * runtime.pageBytes;
  expect(report.adapterBytes).toMatchObject({ device: numBytes, host: numBytes });
  expect(report.adapterBytes.disk).toBeGreaterThan(1000);
  expect(report.kvBytes.disk).toBeGreaterThan(blockBytes);
  expect(await readdir(voicesFolder)).toEqual(['base']);
  expect(tiers.statuses()).toEqual([]);

  const isSecret = (page: Buffer) => [...chunksOf(page)].some((chunk) => secrets.has(chunk));
  for (let page = 0; page < runtime.numHostPages; page++) {
    expect(isSecret(runtime.readHostPages(Int32Array.of(page))), `host page ${page}`).toBe(false);
  }
  for (let page = 0; page < runtime.numPages; page++) {
    expect(isSecret(await readDevicePage(runtime, page, spare)), `device page ${page}`).toBe(false);
  }
  expect(await other).toEqual(alone);
  const weights = await readFile(join(original, 'adapter_model.safetensors'));
  const window = weights.subarray(weights.length - 256);
  for (const file of await filesBelow(cacheFolder)) expect(file.indexOf(window)).toBe(-1);
  const left = await blocksOnDisk(kvFolder);
  expect(left.length).toBeGreaterThan(0);
  expect(left.some(isSecret)).toBe(false);
});

describe('a purge', () => {
  const partsWith = async () => {
    const parts = startEngine({ runtime: { numPages: 20, numHostPages: 10 } });
    await parts.tiers.load('a', '/a-r3', false);
    const { digest } = await readFakeAdapter('/a-r3');
    const sources = { adapters: { purge: vi.fn(async () => 0) } };
    return { ...parts, digest, sources: sources as never, kvKeepers: [] };
  };

  test('waits for the steps and the copies that use the adapter', async () => {
    const parts = await partsWith();
    const gate = Promise.withResolvers<void>();
    parts.runtime.gate = gate.promise;
    const run = start(parts, { adapter: parts.tiers.get('a')!, params: { maxTokens: 50 } });
    await vi.waitFor(() => expect(parts.runtime.steps.length).toBeGreaterThan(0), { interval: 1 });
    const purge = purgeAdapter(parts, parts.digest);
    expect((await run.done).last.error).toMatchObject({ code: 'adapter_purged' });
    expect(parts.tiers.get('a')).toBeUndefined();
    gate.resolve();
    expect(await purge).toMatchObject({ names: ['a'], adapterBytes: { device: 3 * 1024 } });
    expect([parts.arena.numUsed('adapter'), parts.hostArena?.numUsed('adapter')]).toEqual([0, 0]);
    expect(parts.fatal).toEqual([]);
  });

  test('refuses loads of the adapter until it is over, and takes them after', async () => {
    const parts = await partsWith();
    const gate = Promise.withResolvers<void>();
    parts.runtime.gate = gate.promise;
    start(parts, { adapter: parts.tiers.get('a')!, params: { maxTokens: 50 } });
    await vi.waitFor(() => expect(parts.runtime.steps.length).toBeGreaterThan(0), { interval: 1 });
    const purge = purgeAdapter(parts, parts.digest);
    const refusal = { code: 'adapter_purged' };
    await expect(parts.tiers.load('b', '/a-r3', false)).rejects.toMatchObject(refusal);
    await expect(purgeAdapter(parts, parts.digest)).rejects.toMatchObject(refusal);
    gate.resolve();
    await purge;
    await parts.tiers.load('b', '/a-r3', false);
  });

  test('sums up what keepers of KV removed, also of an adapter that is not registered any more', async () => {
    const parts = await partsWith();
    parts.tiers.unload('a');
    const keeper = { purge: async () => ({ device: 5, host: 6, disk: 7 }) };
    const report = await purgeAdapter({ ...parts, kvKeepers: [keeper, keeper] }, parts.digest);
    expect(report).toMatchObject({ names: [], kvBytes: { device: 10, host: 12, disk: 14 } });
  });
});

describe('DELETE /v1/adapters/{digest}', () => {
  const hex = `sha256:${'ab'.repeat(32)}`;
  const readFile = async (path: string) => ({ ...(await readFakeAdapter(path)), digest: hex });
  const remove = ({ url }: { url: string }, digest: string, query = '') =>
    fetch(`${url}${enginePaths.adapters}/${digest}${query}`, { method: 'DELETE' });

  test('with purge=true answers what was removed, and then that there is nothing', async () => {
    const served = await serveFake({ tiers: { readFile } });
    await served.tiers.load('a', '/a-r3', false);
    const answer = await remove(served, hex, '?purge=true');
    expect([answer.status, await answer.json()]).toEqual([
      200,
      {
        digest: hex,
        names: ['a'],
        adapterBytes: { device: 3 * 1024, host: 0, disk: 0 },
        kvBytes: { device: 0, host: 0, disk: 0 },
      },
    ]);
    expect((await remove(served, hex, '?purge=true')).status).toBe(404);
  });

  test('without it takes all names', async () => {
    const served = await serveFake({ tiers: { readFile } });
    await served.tiers.load('a', '/a-r3', false);
    await served.tiers.load('b', '/a-r3', false);
    expect(await (await remove(served, hex)).json()).toEqual({ digest: hex, names: ['a', 'b'] });
    expect((await remove(served, hex)).status).toBe(404);
  });

  test.each([
    ['a', '', 'digest: expected sha256: and 64 hex digits'],
    [hex, '?purge=yes', 'purge: expected true or false'],
  ])('refuses %s%s by name', async (digest, query, message) => {
    const answer = await remove(await serveFake(), digest, query);
    const { error } = (await answer.json()) as { error: { message: string } };
    expect([answer.status, error.message]).toEqual([400, expect.stringContaining(message)]);
  });
});
