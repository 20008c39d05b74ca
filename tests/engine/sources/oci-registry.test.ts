import { execFileSync } from 'node:child_process';
import { mkdir, readdir, readFile, symlink, writeFile } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import { gzipSync, zstdCompressSync } from 'node:zlib';
import { afterAll, beforeAll, describe, expect, onTestFinished, test } from 'vitest';
import {
  adapterFilesOf,
  type Files,
  fetchAdapter,
  modelFilesOf,
  startSources,
} from '../../fixtures/remote-models.ts';
import { temporaryFolder } from '../../fixtures/source-files.ts';
import {
  type Layer,
  type OciRegistry,
  sha256,
  startFaultProxy,
  startOciRegistry,
} from '../../fixtures/source-servers.ts';

let registry: OciRegistry;
const undo: (() => unknown)[] = [];
beforeAll(async () => {
  registry = await startOciRegistry((step) => undo.unshift(step));
});
afterAll(async () => {
  for (const step of undo) await step();
});

const title = (name: string) => ({ 'org.opencontainers.image.title': name });

/** As `oras push` makes them: each file a layer with its name. */
const orasLayers = (files: Record<string, Uint8Array>): Layer[] =>
  Object.entries(files).map(([name, bytes]) => ({
    ...{ bytes, annotations: title(name) },
    mediaType: 'application/vnd.oci.image.layer.v1.tar',
  }));

/** As GNU tar makes an archive of the files. */
async function tarOf(
  files: Record<string, Uint8Array | string>,
  links: Record<string, string> = {},
): Promise<Buffer> {
  const folder = await temporaryFolder();
  for (const [name, bytes] of Object.entries(files)) {
    await mkdir(dirname(join(folder, name)), { recursive: true });
    await writeFile(join(folder, name), bytes);
  }
  for (const [name, target] of Object.entries(links)) await symlink(target, join(folder, name));
  return execFileSync('tar', ['-C', folder, '-c', '.'], { maxBuffer: 2 ** 30 });
}

const below = (folder: string, files: Files): Files =>
  Object.fromEntries(Object.entries(files).map(([name, bytes]) => [`${folder}/${name}`, bytes]));

const imageType = 'application/vnd.oci.image.layer.v1.tar';

const start = (
  host = registry.open,
  env: Record<string, string> = {},
  cacheFolder?: string,
  stallMs = 10_000,
) =>
  startSources({
    stallMs,
    env,
    given: { ociPlainHttp: [registry.open, registry.basic, registry.token, host] },
    ...(cacheFolder && { cacheFolder }),
  });

/** A folder with a config.json as `docker login` writes it. */
async function dockerConfig(login: string): Promise<string> {
  const folder = await temporaryFolder();
  const auth = Buffer.from(login).toString('base64');
  const auths = { [registry.basic]: { auth }, [registry.token]: { auth } };
  await writeFile(join(folder, 'config.json'), JSON.stringify({ auths }));
  return folder;
}

describe('an adapter as an artifact', () => {
  test('needs no digest: a tag becomes one, and a digest is asked for once', async () => {
    const { files, digest } = await adapterFilesOf();
    const manifest = await registry.push(
      'team/poet',
      'v1',
      orasLayers({ ...files, 'README.md': Buffer.from('x') }),
    );
    const { sources, results } = await start();
    expect(await fetchAdapter(sources, `oci://${registry.open}/team/poet:v1`)).toBe(digest);
    expect(await fetchAdapter(sources, `oci://${registry.open}/team/poet:v1`)).toBe(digest);
    expect(await fetchAdapter(sources, `oci://${registry.open}/team/poet@${manifest}`)).toBe(digest);
    expect(results()).toEqual(['fetched', 'cached', 'cached']);
  });

  test('with another digest than was named is refused', async () => {
    const { files } = await adapterFilesOf(2);
    await registry.push('team/wrong', 'latest', orasLayers(files));
    const { sources } = await start();
    const asked = `sha256:${'0'.repeat(64)}`;
    await expect(fetchAdapter(sources, `oci://${registry.open}/team/wrong`, asked)).rejects.toMatchObject({
      code: 'adapter_digest_mismatch',
    });
  });

  test.each(['basic', 'token'] as const)('comes with a login, asked for by %s', async (kind) => {
    const { files, digest } = await adapterFilesOf(3);
    await registry.push('team/closed', 'v1', orasLayers(files));
    const { sources } = await start(registry[kind], { DOCKER_CONFIG: await dockerConfig(registry.login) });
    expect(await fetchAdapter(sources, `oci://${registry[kind]}/team/closed:v1`)).toBe(digest);
  });

  test.each([
    ['basic', 'a wrong login', 'motet:guess', 'answered 401 (UNAUTHORIZED; a login was sent)'],
    ['basic', 'no login', '', 'answered 401 (UNAUTHORIZED; no login was sent)'],
    ['token', 'a wrong login', 'motet:guess', 'asked for a token, it answered 401 (a login was sent)'],
    ['token', 'no login', '', 'asked for a token, it answered 401 (no login was sent)'],
  ] as const)('is not given by %s to who has %s', async (kind, _name, login, message) => {
    await registry.push('team/secret', 'v1', orasLayers((await adapterFilesOf()).files));
    const { sources, lines } = await start(registry[kind], { DOCKER_CONFIG: await dockerConfig(login) });
    const error = await fetchAdapter(sources, `oci://${registry[kind]}/team/secret:v1`).catch(
      (thrown) => thrown,
    );
    expect(error.code).toBe('source_unavailable');
    expect(error.message).toContain(message);
    const said = JSON.stringify([lines, error.message]);
    expect([said.includes('guess'), said.includes(Buffer.from('motet:guess').toString('base64'))]).toEqual([
      false,
      false,
    ]);
  });
});

describe('a model as an artifact', () => {
  test('is a folder of safetensors, and found again without the registry by its digest', async () => {
    const { files, digest } = await modelFilesOf();
    const manifest = await registry.push('models/llama', 'v1', orasLayers(files));
    const proxy = await startFaultProxy(Number(registry.open.split(':')[1]), onTestFinished);
    const { sources, folder } = await start(proxy.host);
    const path = await sources.model(`oci://${proxy.host}/models/llama@${manifest}`, null);
    expect(path).toBe(join(folder, 'sources', digest.slice(7)));
    expect((await readdir(path)).sort()).toEqual(Object.keys(files).sort());
    proxy.requests.length = 0;
    const again = await start(proxy.host, {}, folder);
    expect(await again.sources.model(`oci://${proxy.host}/models/llama@${manifest}`, null)).toBe(path);
    expect(proxy.requests).toEqual([]);
  });

  test('is a GGUF file, which comes in pieces though it is cut', async () => {
    const weights = Buffer.alloc(40 * 2 ** 20, 'motet');
    await registry.push('models/gguf', 'v1', orasLayers({ 'tiny.gguf': weights }));
    const proxy = await startFaultProxy(Number(registry.open.split(':')[1]), onTestFinished);
    let numBlobs = 0;
    proxy.fault = (url) =>
      url.includes('/blobs/') && numBlobs++ % 4 === 3 && numBlobs < 12 ? { cutAfterBytes: 2 ** 20 } : null;
    const { sources } = await start(proxy.host);
    const path = await sources.model(`oci://${proxy.host}/models/gguf:v1`, `sha256:${sha256(weights)}`);
    expect((await readFile(path)).equals(weights)).toBe(true);
  });

  test('whose layer or manifest is not what its digest says is not used', async () => {
    const manifest = await registry.push(
      'models/corrupt',
      'v1',
      orasLayers({ 'tiny.gguf': Buffer.from('weights') }),
    );
    const proxy = await startFaultProxy(Number(registry.open.split(':')[1]), onTestFinished);
    const { sources } = await start(proxy.host);
    proxy.fault = (url) => (url.includes('/blobs/') ? { flipByte: 0 } : null);
    await expect(sources.model(`oci://${proxy.host}/models/corrupt:v1`, null)).rejects.toThrow(
      `expected sha256 ${sha256('weights')}, as its source says`,
    );
    proxy.fault = () => ({ flipByte: 0 });
    await expect(sources.model(`oci://${proxy.host}/models/corrupt@${manifest}`, null)).rejects.toThrow(
      `expected a manifest with digest ${manifest}, got sha256:`,
    );
  });

  test.each([
    ['answers 500', { status: 500 }, 'the server answered 500'],
    ['stalls', 'stall', 'no byte came for 1 s'],
  ] as const)('is given up when its registry %s', async (_name, fault, message) => {
    const proxy = await startFaultProxy(Number(registry.open.split(':')[1]), onTestFinished);
    proxy.fault = () => fault;
    const { sources } = await start(proxy.host, {}, undefined, 1000);
    await expect(sources.model(`oci://${proxy.host}/models/x:v1`, null)).rejects.toThrow(message);
    expect(proxy.requests.length).toBe(3);
  });

  test('that is not there says so', async () => {
    const { sources } = await start();
    await expect(sources.model(`oci://${registry.open}/models/none:v1`, null)).rejects.toThrow(
      'answered 404 (MANIFEST_UNKNOWN)',
    );
  });
});

describe('an image', () => {
  test.each([
    ['gzip', `${imageType}+gzip`, gzipSync],
    ['gzip as Docker names it', 'application/vnd.docker.image.rootfs.diff.tar.gzip', gzipSync],
    ['zstd', `${imageType}+zstd`, zstdCompressSync],
    ['plain', imageType, (bytes: Buffer) => bytes],
  ])('has an adapter in a layer of %s', async (_name, mediaType, compress) => {
    const { files, digest } = await adapterFilesOf(30);
    const bytes = compress(await tarOf(below('voices/poet', files)));
    const name = `images/${mediaType.replace(/\W+/g, '-').toLowerCase()}`;
    await registry.push(name, 'v1', [{ bytes, mediaType }]);
    const { sources, entries } = await start();
    expect(await fetchAdapter(sources, `oci://${registry.open}/${name}:v1`)).toBe(digest);
    expect(await entries('adapters')).toEqual([digest.slice(7)]);
  });

  test('has a model over several layers, of which later ones replace and delete', async () => {
    const { files, digest } = await modelFilesOf();
    const [shard, ...others] = Object.keys(files).reverse();
    const rest = Object.fromEntries(others.map((name) => [name, files[name]!]));
    const layers = [
      await tarOf({
        ...below('models/llama', rest),
        'models/llama/config.json': 'old',
        'models/llama/gone.json': 'x',
        'etc/passwd': 'x',
        'old/a.gguf': 'x',
      }),
      await tarOf(
        {
          ...below('models/llama', { [shard!]: files[shard!]!, 'config.json': files['config.json']! }),
          'models/llama/.wh.gone.json': '',
          'old/.wh..wh..opq': '',
        },
        { 'link.gguf': '/etc/passwd' },
      ),
    ];
    await registry.push(
      'images/llama',
      'v1',
      layers.map((bytes) => ({ bytes: gzipSync(bytes), mediaType: `${imageType}+gzip` })),
    );
    const { sources, folder } = await start();
    expect(await sources.model(`oci://${registry.open}/images/llama:v1`, digest)).toBe(
      join(folder, 'sources', digest.slice(7)),
    );
  });

  test('for several machines gives the layers of this one', async () => {
    const { files, digest } = await adapterFilesOf(31);
    const size = 1;
    const own = await registry.push('images/multi', 'own', [
      { bytes: await tarOf(below('a', files)), mediaType: imageType },
    ]);
    const other = await registry.push('images/multi', 'other', [
      { bytes: await tarOf({ x: 'x' }), mediaType: imageType },
    ]);
    const manifest = (at: string, architecture: string) => ({
      ...{ mediaType: 'application/vnd.oci.image.manifest.v1+json', digest: at, size },
      platform: { os: 'linux', architecture },
    });
    const ours = process.arch === 'x64' ? 'amd64' : process.arch;
    await registry.pushIndex('images/multi', 'v1', [manifest(other, 's390x'), manifest(own, ours)]);
    await registry.pushIndex('images/multi', 'v2', [manifest(other, 's390x')]);
    const { sources } = await start();
    expect(await fetchAdapter(sources, `oci://${registry.open}/images/multi:v1`)).toBe(digest);
    await expect(fetchAdapter(sources, `oci://${registry.open}/images/multi:v2`)).rejects.toThrow(
      `expected a manifest for linux/${ours}`,
    );
  });

  test('cannot write outside of its folder', async () => {
    const { files, digest } = await adapterFilesOf(32);
    const folder = await temporaryFolder();
    await mkdir(join(folder, 'in'));
    await writeFile(join(folder, 'evil.json'), 'x');
    const evil = execFileSync('tar', ['-C', join(folder, 'in'), '-P', '-c', '../evil.json']);
    const mediaType = `${imageType}+gzip`;
    await registry.push('images/evil', 'v1', [
      { bytes: gzipSync(evil), mediaType },
      { bytes: gzipSync(await tarOf(below('a', files))), mediaType },
    ]);
    const { sources, folder: cache } = await start();
    expect(await fetchAdapter(sources, `oci://${registry.open}/images/evil:v1`)).toBe(digest);
    expect(await readdir(cache, { recursive: true })).not.toContainEqual(expect.stringContaining('evil'));
  });

  test('whose layer is no archive is refused', async () => {
    await registry.push('images/broken', 'v1', [
      { bytes: Buffer.from('no archive'), mediaType: `${imageType}+gzip` },
    ]);
    const { sources } = await start();
    await expect(fetchAdapter(sources, `oci://${registry.open}/images/broken:v1`)).rejects.toThrow(
      'a layer cannot be unpacked',
    );
  });
});
