import { randomBytes } from 'node:crypto';
import { chmod, readdir, readFile, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, onTestFinished, test, vi } from 'vitest';
import { certificates } from '../../fixtures/https-source.ts';
import {
  adapterFilesOf,
  fetchAdapter,
  modelFilesOf,
  type RemoteSources,
  startSources,
} from '../../fixtures/remote-models.ts';
import { type S3Server, sha256, startFaultProxy, startS3Server } from '../../fixtures/source-servers.ts';

let server: S3Server;
const undo: (() => unknown)[] = [];
beforeAll(async () => {
  server = await startS3Server((step) => undo.unshift(step));
});
afterAll(async () => {
  for (const step of undo) await step();
});

const keysOf = (keys: S3Server['keys']) => ({
  AWS_ACCESS_KEY_ID: keys.accessKeyId,
  AWS_SECRET_ACCESS_KEY: keys.secretAccessKey,
});
const start = (endpoint = server.endpoint, stallMs = 10_000): Promise<RemoteSources> =>
  startSources({ env: keysOf(server.keys), given: { s3Endpoint: endpoint }, stallMs });

/** A file of more pieces than there are connections. */
const big = randomBytes(50 * 2 ** 20 + 17);

describe('an adapter in a bucket', () => {
  test('is fetched by its two names, and is what its digest says', async () => {
    const { files, digest } = await adapterFilesOf();
    server.put('voices', { 'team a/poet/adapter_config.json': files['adapter_config.json']! });
    server.put('voices', { 'team a/poet/adapter_model.safetensors': files['adapter_model.safetensors']! });
    const { sources, entries, results } = await start();
    expect(await fetchAdapter(sources, 's3://voices/team a/poet', digest)).toBe(digest);
    expect(await fetchAdapter(sources, 's3://voices/team a/poet', digest)).toBe(digest);
    expect(await entries('adapters')).toEqual([digest.slice(7)]);
    expect(results()).toEqual(['fetched', 'cached']);
  });

  test('with another digest is refused', async () => {
    const { files } = await adapterFilesOf(3);
    server.put('voices/other', files);
    const { sources, entries } = await start();
    const asked = `sha256:${'0'.repeat(64)}`;
    await expect(fetchAdapter(sources, 's3://voices/other', asked)).rejects.toMatchObject({
      code: 'adapter_digest_mismatch',
    });
    expect(await entries('adapters')).toEqual([]);
  });

  test('comes with keys from the credentials file', async () => {
    const { files, digest } = await adapterFilesOf(4);
    server.put('voices/file', files);
    const { sources, folder } = await startSources({
      env: { AWS_PROFILE: 'motet', AWS_SHARED_CREDENTIALS_FILE: '' },
      given: { s3Endpoint: server.endpoint },
    });
    const { accessKeyId, secretAccessKey } = server.keys;
    const path = join(folder, 'credentials');
    sources.access.s3.credentialsFile = path;
    await writeFile(
      path,
      `[default]\naws_access_key_id = wrong\n\n[motet]\naws_access_key_id = ${accessKeyId}\naws_secret_access_key=${secretAccessKey}\n`,
    );
    expect(await fetchAdapter(sources, 's3://voices/file', digest)).toBe(digest);
  });

  test('over TLS of a CA that is named', async () => {
    const { files, digest } = await adapterFilesOf(5);
    server.put('voices/tls', files);
    const proxy = await startFaultProxy(server.port, onTestFinished, true);
    const untrusting = await start(proxy.url);
    await expect(fetchAdapter(untrusting.sources, 's3://voices/tls', digest)).rejects.toThrow(
      'its certificate is refused',
    );
    const { sources } = await startSources({
      env: keysOf(server.keys),
      given: { s3Endpoint: proxy.url, ca: certificates().ca },
    });
    expect(await fetchAdapter(sources, 's3://voices/tls', digest)).toBe(digest);
  });
});

describe('who may not', () => {
  const digest = `sha256:${'1'.repeat(64)}`;
  test.each([
    [
      'a wrong secret',
      { AWS_ACCESS_KEY_ID: 'AKIAMOTETTEST', AWS_SECRET_ACCESS_KEY: 'not-the-one' },
      'SignatureDoesNotMatch; keys were sent',
    ],
    ['no keys', {}, 'AccessDenied; no keys were sent'],
  ])('with %s is told so, and no secret is', async (_name, env, reason) => {
    const { files } = await adapterFilesOf();
    server.put('closed/a', files);
    const { sources, lines } = await startSources({ env, given: { s3Endpoint: server.endpoint } });
    const error = await fetchAdapter(sources, 's3://closed/a', digest).catch((thrown) => thrown);
    expect(error.code).toBe('source_unavailable');
    expect(error.message).toBe(
      `${server.endpoint}/closed/a/adapter_config.json: the server answered 403 (${reason})`,
    );
    await expect(sources.model('s3://closed/folder', digest)).rejects.toThrow(`answered 403 (${reason})`);
    expect(JSON.stringify([lines, error.message, String(error.cause)])).not.toContain('not-the-one');
  });
});

describe('a model in a bucket', () => {
  test('is a folder of safetensors, without what does not belong to it', async () => {
    const { files, digest } = await modelFilesOf();
    server.put('models/llama', {
      ...files,
      'README.md': 'x',
      'consolidated.safetensors': 'x',
      'deep/config.json': '{}',
    });
    const { sources, folder, results } = await start();
    const path = await sources.model('s3://models/llama/', digest);
    expect(path).toBe(join(folder, 'sources', digest.slice(7)));
    expect((await readdir(path)).sort()).toEqual(Object.keys(files).sort());
    for (const [name, bytes] of Object.entries(files)) {
      expect((await readFile(join(path, name))).equals(bytes)).toBe(true);
    }
    expect(await sources.model('s3://models/llama', digest)).toBe(path);
    expect(results()).toEqual(['fetched', 'cached']);
  });

  test('whose copy is damaged is fetched again', async () => {
    const { files, digest } = await modelFilesOf();
    server.put('models/damaged', files);
    const { sources, entries } = await start();
    const path = await sources.model('s3://models/damaged', digest);
    const shard = join(path, 'model-00001-of-00002.safetensors');
    await chmod(shard, 0o644);
    await writeFile(shard, 'damaged');
    expect(await sources.model('s3://models/damaged', digest)).toBe(path);
    expect((await readFile(shard)).equals(files['model-00001-of-00002.safetensors']!)).toBe(true);
    expect(await entries('sources')).toEqual([digest.slice(7)]);
  });

  test('of a file comes in pieces over several connections', async () => {
    server.put('models', { 'big.gguf': big });
    const proxy = await startFaultProxy(server.port, onTestFinished);
    const { sources, lines } = await start(proxy.url);
    const path = await sources.model('s3://models/big.gguf', `sha256:${sha256(big)}`);
    expect((await readFile(path)).equals(big)).toBe(true);
    const ranges = proxy.requests.map(({ range }) => range);
    expect(ranges.length).toBe(13);
    expect(new Set(ranges).size).toBe(13);
    expect(lines.findLast(({ msg }) => msg === 'fetching')?.fraction).toBe(1);
  });

  test('goes on where it was when connections are cut', async () => {
    server.put('models', { 'cut.gguf': big });
    const proxy = await startFaultProxy(server.port, onTestFinished);
    let numCuts = 0;
    proxy.fault = () => (numCuts++ % 3 === 2 && numCuts < 20 ? { cutAfterBytes: 3 * 2 ** 20 } : null);
    const { sources } = await start(proxy.url);
    const path = await sources.model('s3://models/cut.gguf', `sha256:${sha256(big)}`);
    expect((await readFile(path)).equals(big)).toBe(true);
    expect(proxy.requests.length).toBeGreaterThan(13);
    // The first byte is asked for once.
    expect(
      proxy.requests.filter(({ range }) => range === undefined || range.startsWith('bytes=0-')).length,
    ).toBe(1);
  });

  test('keeps what came before a piece that fails', async () => {
    server.put('models', { 'hole.gguf': big });
    const proxy = await startFaultProxy(server.port, onTestFinished);
    let isCut = false;
    proxy.fault = (_url, range) => {
      if (isCut || !range?.startsWith(`bytes=${4 * 2 ** 20}-`)) return null;
      isCut = true;
      return { cutAfterBytes: 1000 };
    };
    const { sources } = await start(proxy.url);
    const path = await sources.model('s3://models/hole.gguf', `sha256:${sha256(big)}`);
    expect((await readFile(path)).equals(big)).toBe(true);
    const again = proxy.requests.slice(4).map(({ range }) => Number(/\d+/.exec(range ?? '0')![0]));
    expect(Math.min(...again)).toBeGreaterThanOrEqual(4 * 2 ** 20);
  });

  test.each([
    ['is away for a while', { status: 503 }, 2],
    ['stalls for a while', 'stall', 1],
  ] as const)('comes though its server %s', async (_name, fault, times) => {
    server.put('models', { 'shy.gguf': 'weights' });
    const proxy = await startFaultProxy(server.port, onTestFinished);
    let left: number = times;
    proxy.fault = () => (left-- > 0 ? fault : null);
    const { sources } = await start(proxy.url, 1000);
    const path = await sources.model('s3://models/shy.gguf', `sha256:${sha256('weights')}`);
    expect(await readFile(path, 'utf8')).toBe('weights');
  });

  test.each([
    ['answers 500', { status: 500 }, 'the server answered 500'],
    ['never answers', 'stall', 'no byte came for 1 s'],
  ] as const)('is given up when its server %s', async (_name, fault, message) => {
    const proxy = await startFaultProxy(server.port, onTestFinished);
    proxy.fault = () => fault;
    const { sources } = await start(proxy.url, 1000);
    await expect(sources.model('s3://models/x.gguf', `sha256:${sha256('x')}`)).rejects.toThrow(message);
    expect(proxy.requests.length).toBe(3);
  });

  test('with another digest is refused with both', async () => {
    server.put('models', { 'wrong.gguf': 'weights' });
    const { sources, entries } = await start();
    const asked = `sha256:${'0'.repeat(64)}`;
    await expect(sources.model('s3://models/wrong.gguf', asked)).rejects.toThrow(
      `s3://models/wrong.gguf: expected digest ${asked}, got sha256:${sha256('weights')}`,
    );
    expect(await entries('sources')).toEqual([]);
  });

  test('that is not there says so', async () => {
    const { sources } = await start();
    const digest = `sha256:${sha256('x')}`;
    await expect(sources.model('s3://models/none.gguf', digest)).rejects.toThrow(
      'the server answered 404 (NoSuchKey)',
    );
    await expect(sources.model('s3://models/none', digest)).rejects.toThrow(
      's3://models/none: expected one .gguf file, or one folder of safetensors with a config.json, got no files',
    );
  });
});

test('all bytes are counted against the pace that is set', async () => {
  server.put('models', { 'slow.gguf': big.subarray(0, 2 ** 20) });
  const { sources } = await startSources({
    env: keysOf(server.keys),
    given: { s3Endpoint: server.endpoint, bytesPerSecond: 2 ** 40 },
  });
  const take = vi.spyOn(sources.throttle!, 'take');
  await sources.model('s3://models/slow.gguf', `sha256:${sha256(big.subarray(0, 2 ** 20))}`);
  expect(take.mock.calls.reduce((sum, [numBytes]) => sum + numBytes, 0)).toBe(2 ** 20);
});
