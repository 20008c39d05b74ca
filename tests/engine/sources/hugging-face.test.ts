import { randomBytes } from 'node:crypto';
import { readdir, readFile, rename, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { downloadFile, listFiles, modelInfo } from '@huggingface/hub';
import { afterAll, beforeAll, describe, expect, onTestFinished, test } from 'vitest';
import { type FakeHub, startFakeHub } from '../../fixtures/fake-hub.ts';
import { adapterFilesOf, fetchAdapter, modelFilesOf, startSources } from '../../fixtures/remote-models.ts';
import { sha256, startFaultProxy } from '../../fixtures/source-servers.ts';

let hub: FakeHub;
const undo: (() => unknown)[] = [];
beforeAll(async () => {
  hub = await startFakeHub((step) => undo.unshift(step));
});
afterAll(async () => {
  for (const step of undo) await step();
});

const start = (
  env: Record<string, string> = {},
  endpoint = hub.url,
  cacheFolder?: string,
  stallMs = 10_000,
) => startSources({ stallMs, env, given: { hfEndpoint: endpoint }, ...(cacheFolder && { cacheFolder }) });

test('the fake hub is one to the own client of Hugging Face', async () => {
  const { files } = await modelFilesOf();
  const sha = hub.commit('org/oracle', 'main', files);
  const hubUrl = hub.url;
  const info = await modelInfo({
    name: 'org/oracle',
    revision: 'main',
    additionalFields: ['sha', 'filePaths'],
    hubUrl,
  });
  expect(info).toMatchObject({ sha, filePaths: Object.keys(files) });
  const listed: unknown[] = [];
  for await (const { path, size } of listFiles({ repo: 'org/oracle', hubUrl, recursive: true }))
    listed.push([path, size]);
  expect(listed).toEqual(Object.entries(files).map(([name, bytes]) => [name, bytes.length]));
  for (const [path, bytes] of Object.entries(files)) {
    const blob = await downloadFile({ repo: 'org/oracle', path, revision: sha, hubUrl });
    expect(Buffer.from(await blob!.arrayBuffer()).equals(bytes)).toBe(true);
  }
});

describe('an adapter on the hub', () => {
  test('needs no digest: a branch becomes a commit, and a commit is asked for once', async () => {
    const { files, digest } = await adapterFilesOf();
    const sha = hub.commit('org/poet', 'main', { ...files, 'README.md': 'x' });
    const { sources, results } = await start();
    expect(await fetchAdapter(sources, 'hf://org/poet@main')).toBe(digest);
    hub.requests.length = 0;
    expect(await fetchAdapter(sources, 'hf://org/poet')).toBe(digest);
    expect(hub.requests.map(({ url }) => url)).toEqual(['/api/models/org/poet/revision/main?blobs=true']);
    expect(await fetchAdapter(sources, `hf://org/poet@${sha}`)).toBe(digest);
    expect(hub.requests.length).toBe(1);
    expect(results()).toEqual(['fetched', 'cached', 'cached']);
  });

  test('follows its branch', async () => {
    const one = await adapterFilesOf(11);
    const two = await adapterFilesOf(12);
    hub.commit('org/moving', 'main', one.files);
    const { sources, entries } = await start();
    expect(await fetchAdapter(sources, 'hf://org/moving@main')).toBe(one.digest);
    hub.commit('org/moving', 'main', two.files);
    expect(await fetchAdapter(sources, 'hf://org/moving@main')).toBe(two.digest);
    expect(await entries('adapters')).toEqual([one.digest.slice(7), two.digest.slice(7)].sort());
  });

  test('may be in a folder of the repository, and a herd on it asks for it once', async () => {
    const { files, digest } = await adapterFilesOf(13);
    const inside = Object.fromEntries(
      Object.entries(files).map(([name, bytes]) => [`voices/poet/${name}`, bytes]),
    );
    hub.commit('org/many', 'main', { ...inside, 'voices/other/adapter_config.json': '{}' });
    const { sources, results } = await start();
    hub.requests.length = 0;
    const herd = Array.from({ length: 50 }, () => fetchAdapter(sources, 'hf://org/many@main/voices/poet'));
    expect(new Set(await Promise.all(herd))).toEqual(new Set([digest]));
    expect(hub.requests.length).toBe(3);
    expect(results().filter((result) => result === 'fetched')).toEqual(['fetched']);
  });

  test('with another digest than was named is refused', async () => {
    const { files } = await adapterFilesOf(14);
    hub.commit('org/wrong', 'main', files);
    const { sources } = await start();
    const asked = `sha256:${'0'.repeat(64)}`;
    await expect(fetchAdapter(sources, 'hf://org/wrong@main', asked)).rejects.toMatchObject({
      code: 'adapter_digest_mismatch',
    });
  });
});

describe('a private repository', () => {
  test('is read with the token of the variable or the file, which goes to the hub alone', async () => {
    const { files, digest } = await adapterFilesOf(20);
    hub.commit('org/private', 'main', files);
    hub.repositories.get('org/private')!.token = 'hf_secret';
    hub.cdnRequests.length = 0;
    const { sources, folder } = await start({ HF_TOKEN: 'hf_secret' });
    expect(await fetchAdapter(sources, 'hf://org/private@main')).toBe(digest);
    expect(hub.cdnRequests.map(({ authorization }) => authorization)).toEqual([undefined]);
    const path = join(folder, 'token');
    await writeFile(path, 'hf_secret\n');
    const other = await start({ HF_TOKEN_PATH: path });
    expect(await fetchAdapter(other.sources, 'hf://org/private@main')).toBe(digest);
  });

  test.each([
    ['a wrong token', { HF_TOKEN: 'hf_wrong' }, 'a token was sent'],
    ['no token', {}, 'no token was sent'],
  ])('with %s says so', async (_name, env, sent) => {
    hub.commit('org/closed', 'main', (await adapterFilesOf()).files);
    hub.repositories.get('org/closed')!.token = 'hf_secret';
    const { sources, lines } = await start(env);
    const error = await fetchAdapter(sources, 'hf://org/closed@main').catch((thrown) => thrown);
    expect(error.message).toBe(
      `hf://org/closed@main: 127.0.0.1:${hub.port} answered 401 (RepoNotFound; ${sent})`,
    );
    expect(error.code).toBe('source_unavailable');
    expect(JSON.stringify([lines, error])).not.toContain('hf_wrong');
  });
});

describe('a model on the hub', () => {
  test('is a folder of safetensors, found again without the hub when its commit is named', async () => {
    const { files, digest } = await modelFilesOf();
    const sha = hub.commit('org/llama', 'v1', {
      ...files,
      'original/consolidated.safetensors': 'x',
      'README.md': 'x',
    });
    const proxy = await startFaultProxy(hub.port, onTestFinished);
    const { sources, folder } = await start({}, proxy.url);
    const path = await sources.model('hf://org/llama@v1', null);
    expect(path).toBe(join(folder, 'sources', digest.slice(7)));
    expect((await readdir(path)).sort()).toEqual(Object.keys(files).sort());
    proxy.requests.length = 0;
    const again = await start({}, proxy.url, folder);
    expect(await again.sources.model(`hf://org/llama@${sha}`, null)).toBe(path);
    expect(proxy.requests).toEqual([]);
    expect(again.results()).toEqual(['cached']);
  });

  test('is a GGUF file when that is named, or when there is one', async () => {
    const weights = randomBytes(5000);
    hub.commit('org/gguf', 'main', { 'q4/tiny.gguf': weights, 'README.md': 'x' });
    const { sources, results } = await start();
    const path = await sources.model('hf://org/gguf@main/q4/tiny.gguf', null);
    expect((await readFile(path)).equals(weights)).toBe(true);
    expect(await sources.model('hf://org/gguf', null)).toBe(path);
    expect(results()).toEqual(['fetched', 'cached']);
    hub.commit('org/gguf', 'main', { 'a.gguf': weights, 'b.gguf': 'x' });
    await expect(sources.model('hf://org/gguf', null)).rejects.toThrow(
      'hf://org/gguf: expected one .gguf file, or one folder of safetensors with a config.json, got a.gguf, b.gguf; a URI may name the path of one',
    );
  });

  test('whose bytes are not what the hub says is not used', async () => {
    const { files } = await modelFilesOf();
    hub.commit('org/corrupt', 'main', files);
    const proxy = await startFaultProxy(hub.port, onTestFinished);
    proxy.fault = (url) => (url.endsWith('config.json') ? { flipByte: 3 } : null);
    const { sources, entries } = await start({}, proxy.url);
    await expect(sources.model('hf://org/corrupt', null)).rejects.toThrow(
      /hf:\/\/org\/corrupt: config.json: expected git [0-9a-f]{40}, as its source says/,
    );
    expect((await entries('sources')).filter((name) => !name.endsWith('.tmp'))).toEqual([]);
  });

  test('that was cut off is gone on with by the next start, file by file', async () => {
    const { files, digest } = await modelFilesOf();
    hub.commit('org/cut', 'main', files);
    const proxy = await startFaultProxy(hub.port, onTestFinished);
    proxy.fault = (url) => (url.endsWith('tokenizer.json') ? { status: 500 } : null);
    const first = await start({}, proxy.url);
    await expect(first.sources.model('hf://org/cut', null)).rejects.toThrow('the server answered 500');
    // As a process that is gone left it. None has the number 2^22: Linux stops below.
    const [left] = await first.entries('sources');
    const folder = join(first.folder, 'sources');
    await rename(join(folder, left!), join(folder, left!.replace(`.${process.pid}.`, `.${2 ** 22}.`)));
    hub.cdnRequests.length = 0;
    proxy.fault = () => null;
    const second = await start({}, proxy.url, first.folder);
    expect(await second.sources.model('hf://org/cut', null)).toBe(
      join(first.folder, 'sources', digest.slice(7)),
    );
    expect(hub.cdnRequests).toEqual([]);
    expect(await second.entries('sources')).toEqual([digest.slice(7)]);
  });

  test.each([
    ['answers 500', { status: 500 }, 'the server answered 500'],
    ['stalls', 'stall', 'no byte came for 1 s'],
  ] as const)('is given up when its hub %s', async (_name, fault, message) => {
    const proxy = await startFaultProxy(hub.port, onTestFinished);
    proxy.fault = () => fault;
    const { sources } = await start({}, proxy.url, undefined, 1000);
    await expect(sources.model('hf://org/llama', null)).rejects.toThrow(message);
    expect(proxy.requests.length).toBe(3);
  });

  test.each([
    ['a revision', 'hf://org/llama@none', 'answered 404 (RevisionNotFound; no token was sent)'],
    ['a file', 'hf://org/llama@v1/none.gguf', 'expected one .gguf file'],
    ['a repository', 'hf://org/nothing', 'answered 401 (RepoNotFound; no token was sent)'],
  ])('says when there is no such thing as %s', async (_name, uri, message) => {
    hub.commit('org/llama', 'v1', (await modelFilesOf()).files);
    const { sources } = await start();
    await expect(sources.model(uri, null)).rejects.toThrow(message);
  });

  test('with a pinned digest is checked against it', async () => {
    hub.commit('org/pinned', 'main', { 'tiny.gguf': 'weights' });
    const { sources } = await start();
    await sources.model('hf://org/pinned', `sha256:${sha256('weights')}`);
    const asked = `sha256:${'0'.repeat(64)}`;
    await expect(sources.model('hf://org/pinned', asked)).rejects.toThrow(
      `expected digest ${asked}, got sha256:${sha256('weights')}`,
    );
  });
});
