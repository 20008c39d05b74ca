import { createHash } from 'node:crypto';
import { readdir, readFile, stat, utimes, writeFile } from 'node:fs/promises';
import { hostname } from 'node:os';
import { join } from 'node:path';
import { pino } from 'pino';
import { describe, expect, onTestFinished, test } from 'vitest';
import type { FetchEvent } from '../../engine/adapters/adapter-cache.ts';
import { httpsAgent } from '../../engine/download.ts';
import { Sources } from '../../engine/sources.ts';
import { certificates, startHttpsSource } from '../fixtures/https-source.ts';
import { temporaryFolder } from '../fixtures/source-files.ts';

const content = Buffer.from(Uint8Array.from({ length: 300_000 }, (_, i) => (i * 7) & 255));
const hex = createHash('sha256').update(content).digest('hex');
const digest = `sha256:${hex}`;

async function startSources(cacheFolder?: string) {
  const folder = cacheFolder ?? (await temporaryFolder());
  const lines: { msg: string; fraction?: number }[] = [];
  const events: FetchEvent[] = [];
  const dispatcher = httpsAgent(2000, certificates().ca);
  onTestFinished(() => dispatcher.destroy());
  const sources = new Sources({
    cacheFolder: folder,
    maxAdapterBytes: 2 ** 20,
    adapterRoot: null,
    log: pino({}, { write: (line) => lines.push(JSON.parse(line)) }),
    onFetch: (event) => events.push(event),
    dispatcher,
    modelLimits: { stallMs: 5000, maxTries: 2, backoffMs: 1 },
  });
  const entries = () => readdir(join(folder, 'sources'));
  return { sources, folder, lines, entries, results: () => events.map(({ result }) => result) };
}

const startServer = () => startHttpsSource({ '/m.gguf': content });

describe('a model', () => {
  test('on this machine is its path', async () => {
    const { sources } = await startSources();
    expect(await sources.model('/models/a.gguf', null)).toBe('/models/a.gguf');
    expect(await sources.model('file:///models/a.gguf', null)).toBe('/models/a.gguf');
  });

  test('in a claim is a path below the folder in which claims are mounted', async () => {
    const { sources } = await startSources();
    await expect(sources.model('pvc://models/a.gguf', null)).rejects.toThrow(
      'pvc://models/a.gguf: expected --claim-root, the folder in which claims are mounted, got none',
    );
    sources.options.claimRoot = '/claims';
    expect(await sources.model('pvc://models/a.gguf', null)).toBe('/claims/models/a.gguf');
    await expect(sources.adapter('pvc://models/none', null)).rejects.toMatchObject({
      code: 'adapter_file_not_found',
    });
  });

  test('from afar is fetched into the cache, and the log says how far it is', async () => {
    const server = await startServer();
    const { sources, folder, lines, entries, results } = await startSources();
    const path = await sources.model(`${server.url}/m.gguf?key=secret`, digest);
    expect(path).toBe(join(folder, 'sources', hex));
    expect((await readFile(path)).equals(content)).toBe(true);
    expect(await entries()).toEqual([hex]);
    expect(lines.filter(({ msg }) => msg === 'fetching').at(-1)?.fraction).toBe(1);
    expect(JSON.stringify(lines)).not.toContain('secret');
    expect(results()).toEqual(['fetched']);
  });

  test('that is in the cache needs no network and is not written again', async () => {
    const server = await startServer();
    const { sources, folder, results } = await startSources();
    const path = await sources.model(`${server.url}/m.gguf`, digest);
    const { mtimeMs, ino } = await stat(path);
    await server.stop();
    const other = await startSources(folder);
    expect(await other.sources.model(`${server.url}/m.gguf`, digest)).toBe(path);
    expect(await stat(path)).toMatchObject({ mtimeMs, ino });
    expect([results(), other.results()]).toEqual([['fetched'], ['cached']]);
  });

  test('whose copy is damaged is fetched again', async () => {
    const server = await startServer();
    const { sources, folder } = await startSources();
    const path = await sources.model(`${server.url}/m.gguf`, digest);
    await writeFile(path, Buffer.concat([content.subarray(0, -1), Buffer.of(1)]));
    const other = await startSources(folder);
    await other.sources.model(`${server.url}/m.gguf`, digest);
    expect((await readFile(path)).equals(content)).toBe(true);
  });

  test('fetched by two at once is there once, whole', async () => {
    const server = await startServer();
    const { sources, folder, entries } = await startSources();
    const other = await startSources(folder);
    const uri = `${server.url}/m.gguf`;
    const [one, two] = await Promise.all([sources.model(uri, digest), other.sources.model(uri, digest)]);
    expect(one).toBe(two);
    expect((await readFile(one)).equals(content)).toBe(true);
    expect(await entries()).toEqual([hex]);
  });

  test('with another sha256 is refused with both, and leaves nothing', async () => {
    const server = await startServer();
    const { sources, entries, results } = await startSources();
    const asked = `sha256:${'0'.repeat(64)}`;
    await expect(sources.model(`${server.url}/m.gguf`, asked)).rejects.toMatchObject({
      code: 'model_invalid',
      message: `${server.url}/m.gguf: expected digest ${asked}, got ${digest}`,
    });
    expect(await entries()).toEqual([]);
    expect(results()).toEqual(['refused']);
  });

  test('that cannot be had says why', async () => {
    const server = await startServer();
    const { sources, results } = await startSources();
    await expect(sources.model(`${server.url}/none.gguf`, digest)).rejects.toMatchObject({
      code: 'source_unavailable',
      message: `${server.url}/none.gguf: the server answered 404`,
    });
    expect(results()).toEqual(['unavailable']);
  });
});

describe('what a start that was cut off has left', () => {
  /** In the name of a process on that host. No process has the number 2^22: Linux stops below. */
  async function leave(bytes: Uint8Array, host = hostname(), ageMs = 0) {
    const { sources, folder, entries } = await startSources();
    const server = await startServer();
    await sources.model(`${server.url}/m.gguf`, digest); // makes the folder
    const path = join(folder, 'sources', `.${hex}.${host}.${2 ** 22}.abcdef.tmp`);
    await writeFile(join(folder, 'sources', hex), 'damaged');
    await writeFile(path, bytes);
    const when = new Date(Date.now() - ageMs);
    await utimes(path, when, when);
    server.requests.length = 0;
    return { server, sources, entries, uri: `${server.url}/m.gguf` };
  }

  test('is gone on with', async () => {
    const { server, sources, uri, entries } = await leave(content.subarray(0, 100_000));
    expect((await readFile(await sources.model(uri, digest))).equals(content)).toBe(true);
    expect(server.requests).toEqual([{ url: '/m.gguf', range: 'bytes=100000-' }]);
    expect(await entries()).toEqual([hex]);
  });

  test('is gone on with when another host left it long ago, and is let be when it is new', async () => {
    const old = await leave(content.subarray(0, 100_000), 'elsewhere', 3600_000);
    await old.sources.model(old.uri, digest);
    expect(old.server.requests[0]?.range).toBe('bytes=100000-');
    const fresh = await leave(content.subarray(0, 100_000), 'elsewhere');
    await fresh.sources.model(fresh.uri, digest);
    expect(fresh.server.requests[0]?.range).toBe(undefined);
    expect((await fresh.entries()).length).toBe(2);
  });

  test('is thrown away when it does not fit', async () => {
    const { server, sources, uri, entries } = await leave(Buffer.alloc(100_000, 1));
    expect((await readFile(await sources.model(uri, digest))).equals(content)).toBe(true);
    expect(server.requests.map(({ range }) => range)).toEqual(['bytes=100000-', undefined]);
    expect(await entries()).toEqual([hex]);
  });
});
