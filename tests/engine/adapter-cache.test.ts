import { readdir, readFile, utimes, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { describe, expect, onTestFinished, test, vi } from 'vitest';
import {
  AdapterCache,
  type AdapterCacheOptions,
  type FetchEvent,
} from '../../engine/adapters/adapter-cache.ts';
import { digestOfFolder } from '../../engine/adapters/adapter-file.ts';
import { httpsAgent } from '../../engine/download.ts';
import { listHttps } from '../../engine/sources/https.ts';
import { Versions } from '../../engine/sources/versions.ts';
import { certificates, type HttpsSource, sendTruncated, startHttpsSource } from '../fixtures/https-source.ts';
import { f32Tensor, safetensorsBytes, temporaryFolder, writeFolder } from '../fixtures/source-files.ts';

interface Adapter {
  uri: string;
  digest: string;
  hex: string;
  weights: Buffer;
}

/** Puts an adapter on the server under /name; other seeds are other adapters, of 8 KiB of weights each. */
async function publish(source: HttpsSource, name: string, seed = 1): Promise<Adapter> {
  const module = 'base_model.model.model.layers.0.self_attn.q_proj';
  const weights = safetensorsBytes({
    [`${module}.lora_A.weight`]: f32Tensor([32, 32], seed),
    [`${module}.lora_B.weight`]: f32Tensor([32, 32], seed + 1),
  });
  const config = { peft_type: 'LORA', r: 32, lora_alpha: 8, target_modules: ['q_proj'] };
  const folder = await writeFolder({ 'adapter_config.json': config, 'adapter_model.safetensors': weights });
  source.files.set(`/${name}/adapter_config.json`, Buffer.from(JSON.stringify(config)));
  source.files.set(`/${name}/adapter_model.safetensors`, weights);
  const digest = await digestOfFolder(folder);
  return { uri: `${source.url}/${name}`, digest, hex: digest.slice(7), weights };
}

async function startCache(options: Partial<AdapterCacheOptions> = {}) {
  const folder = options.folder ?? join(await temporaryFolder(), 'adapters');
  const events: FetchEvent[] = [];
  const dispatcher = httpsAgent(2000, certificates().ca);
  const cache = new AdapterCache({
    folder,
    maxBytes: 2 ** 20,
    dispatcher,
    list: listHttps,
    versionOf: () => null,
    versions: new Versions(join(folder, '../versions')),
    limits: { stallMs: 5000, maxTries: 2, backoffMs: 1 },
    maxFetchMs: 20_000,
    maxFetches: 2,
    maxQueuedFetches: 2,
    onFetch: (event) => events.push(event),
    ...options,
  });
  onTestFinished(async () => {
    await cache.close();
    await dispatcher.destroy();
  });
  const fetch = ({ uri, digest }: Pick<Adapter, 'uri' | 'digest'>) => cache.source(uri, digest).fetch();
  /** What is on disk, temporary or not. */
  const entries = async () => (await readdir(folder).catch(() => [])).sort();
  return { cache, folder, events, fetch, entries, results: () => events.map(({ result }) => result) };
}

const isWeights = (url: string) => url.includes('adapter_model.safetensors');

describe('an adapter from afar', () => {
  test('is fetched into a folder under its digest', async () => {
    const source = await startHttpsSource();
    const adapter = await publish(source, 'a');
    const { fetch, folder, entries, events } = await startCache();
    const { path, seconds } = await fetch(adapter);
    expect(path).toBe(join(folder, adapter.hex));
    expect(await digestOfFolder(path)).toBe(adapter.digest);
    expect(await entries()).toEqual([adapter.hex]);
    expect(seconds).toBeGreaterThan(0);
    const bytes = adapter.weights.length + (await readFile(join(path, 'adapter_config.json'))).length;
    expect(events).toEqual([{ kind: 'adapter', result: 'fetched', seconds: expect.any(Number), bytes }]);
  });

  test('needs no network a second time, also for another engine with the same cache folder', async () => {
    const source = await startHttpsSource();
    const adapter = await publish(source, 'a');
    const { fetch, folder, results } = await startCache();
    (await fetch(adapter)).release();
    await source.stop();
    expect((await fetch(adapter)).seconds).toBe(0);
    expect(results()).toEqual(['fetched', 'cached']);
    const other = await startCache({ folder });
    await other.fetch(adapter);
    expect(other.results()).toEqual(['cached']);
  });

  test('is fetched once for all who ask at the same time', async () => {
    const source = await startHttpsSource();
    const adapter = await publish(source, 'a');
    const { fetch } = await startCache();
    await Promise.all(Array.from({ length: 10 }, () => fetch(adapter)));
    expect(source.requests.length).toBe(2);
  });

  test('is fetched by two engines at once without one harming the other', async () => {
    const source = await startHttpsSource();
    const adapter = await publish(source, 'a');
    const { folder, fetch, entries } = await startCache();
    const other = await startCache({ folder });
    const [one, two] = await Promise.all([fetch(adapter), other.fetch(adapter)]);
    expect(one.path).toBe(two.path);
    expect(await digestOfFolder(one.path)).toBe(adapter.digest);
    expect(await entries()).toEqual([adapter.hex]);
  });

  test('may have a query, as signed URLs do, and it is shown nowhere', async () => {
    const source = await startHttpsSource();
    const { digest } = await publish(source, 'a');
    const { cache } = await startCache();
    const signed = cache.source(`${source.url}/a/?signature=secret`, digest);
    expect(signed.uri).toBe(`${source.url}/a/`);
    await signed.fetch();
    expect(source.requests.map(({ url }) => url)).toEqual([
      '/a/adapter_config.json?signature=secret',
      '/a/adapter_model.safetensors?signature=secret',
    ]);
  });

  test('that was cut off is gone on with', async () => {
    const source = await startHttpsSource();
    const adapter = await publish(source, 'a');
    let numCuts = 0;
    source.fault = (request, response) => {
      if (!isWeights(request.url!) || numCuts++ > 0) return false;
      sendTruncated(response, adapter.weights, 4096);
      return true;
    };
    const { fetch, results } = await startCache();
    await fetch(adapter);
    expect(results()).toEqual(['fetched']);
  });
});

describe('what is not as it should be', () => {
  test('is refused with both digests, and leaves nothing', async () => {
    const source = await startHttpsSource();
    const { uri, digest } = await publish(source, 'a');
    const asked = `sha256:${'0'.repeat(64)}`;
    const { fetch, entries, results } = await startCache();
    await expect(fetch({ uri: `${uri}?key=secret`, digest: asked })).rejects.toMatchObject({
      code: 'adapter_digest_mismatch',
      param: 'digest',
      message: `${uri}: expected digest ${asked}, got ${digest}`,
    });
    expect(await entries()).toEqual([]);
    expect(results()).toEqual(['refused']);
  });

  test('is refused when one bit of the weights is another', async () => {
    const source = await startHttpsSource();
    const adapter = await publish(source, 'a');
    const damaged = Buffer.from(adapter.weights);
    damaged[damaged.length - 1]! ^= 1;
    source.files.set('/a/adapter_model.safetensors', damaged);
    const { fetch, entries } = await startCache();
    await expect(fetch(adapter)).rejects.toMatchObject({ code: 'adapter_digest_mismatch' });
    expect(await entries()).toEqual([]);
  });

  test.each([
    ['adapter_config.json', '<html>not found</html>', 'adapter_config.json: expected JSON'],
    ['adapter_model.safetensors', '<html>not found</html>', 'header length'],
  ])('is refused when %s is something else, by the URI', async (name, text, message) => {
    const source = await startHttpsSource();
    const adapter = await publish(source, 'a');
    source.files.set(`/a/${name}`, Buffer.from(text));
    const { fetch, entries, folder } = await startCache();
    const error = await fetch(adapter).catch((thrown) => thrown);
    expect(error).toMatchObject({ code: 'adapter_invalid', message: expect.stringContaining(message) });
    expect(error.message).not.toContain(folder);
    expect(await entries()).toEqual([]);
  });

  test('is refused when the config is larger than a MiB', async () => {
    const source = await startHttpsSource();
    const adapter = await publish(source, 'a');
    source.files.set('/a/adapter_config.json', Buffer.alloc(2 ** 20 + 1));
    const { fetch } = await startCache();
    await expect(fetch(adapter)).rejects.toMatchObject({
      code: 'adapter_invalid',
      message: `${adapter.uri}/adapter_config.json: expected at most 1048576 bytes, got 1048577`,
    });
  });

  test('is forgotten when its copy was damaged, and kept when it was not', async () => {
    const source = await startHttpsSource();
    const adapter = await publish(source, 'a');
    const { fetch, entries } = await startCache();
    const copy = await fetch(adapter);
    expect(await copy.discardIfDamaged()).toBe(false);
    expect(await entries()).toEqual([adapter.hex]);
    await writeFile(join(copy.path, 'adapter_model.safetensors'), 'x');
    expect(await copy.discardIfDamaged()).toBe(true);
    expect(await entries()).toEqual([]);
  });
});

describe('a source that is away', () => {
  test('says so, and the next load tries again', async () => {
    const source = await startHttpsSource();
    const adapter = await publish(source, 'a');
    const { fetch, entries, results } = await startCache();
    await source.stop();
    await expect(fetch(adapter)).rejects.toMatchObject({
      code: 'source_unavailable',
      message: `${adapter.uri}/adapter_config.json: ECONNREFUSED`,
    });
    expect(await entries()).toEqual([]);
    await source.start();
    await fetch(adapter);
    expect(results()).toEqual(['unavailable', 'fetched']);
  });

  test('fails all who wait for it, once', async () => {
    const source = await startHttpsSource();
    const adapter = await publish(source, 'a');
    source.fault = (_request, response) => {
      response.writeHead(404).end();
      return true;
    };
    const { fetch } = await startCache();
    const outcomes = await Promise.allSettled([fetch(adapter), fetch(adapter), fetch(adapter)]);
    expect(outcomes.map(({ status }) => status)).toEqual(['rejected', 'rejected', 'rejected']);
    expect(source.requests.length).toBe(1);
  });

  test('does not fail who named another one for the same digest', async () => {
    const source = await startHttpsSource();
    const adapter = await publish(source, 'a');
    const gate = Promise.withResolvers<void>();
    source.fault = (request, response) => {
      if (!request.url!.startsWith('/none/')) return false;
      void gate.promise.then(() => response.writeHead(404).end());
      return true;
    };
    const { fetch } = await startCache();
    const first = fetch({ ...adapter, uri: `${source.url}/none` });
    await vi.waitFor(() => expect(source.requests.length).toBe(1));
    const second = fetch(adapter);
    gate.resolve();
    const [none, some] = await Promise.allSettled([first, second]);
    expect([none.status, some.status]).toEqual(['rejected', 'fulfilled']);
  });

  test('that trickles is given up', async () => {
    const source = await startHttpsSource();
    const adapter = await publish(source, 'a');
    source.fault = (_request, response) => {
      response.writeHead(200);
      const timer = setInterval(() => response.write('x'), 5);
      response.on('close', () => clearInterval(timer));
      return true;
    };
    const { fetch } = await startCache({ maxFetchMs: 200 });
    await expect(fetch(adapter)).rejects.toThrow('it took too long');
  });

  test('holds up a bounded number of others', async () => {
    const source = await startHttpsSource();
    const adapters = await Promise.all([1, 2, 3, 4].map((seed) => publish(source, `a${seed}`, seed * 10)));
    source.fault = () => true; // no answer
    const { fetch, cache } = await startCache({ maxFetches: 1, maxQueuedFetches: 2 });
    const fetches = adapters.map(fetch);
    await expect(Promise.race(fetches)).rejects.toMatchObject({ code: 'too_many_loads' });
    await cache.close();
    const codes = (await Promise.allSettled(fetches)).map(
      (outcome) => outcome.status === 'rejected' && outcome.reason.code,
    );
    expect(codes.sort()).toEqual(['draining', 'draining', 'draining', 'too_many_loads']);
  });
});

describe('the room on disk', () => {
  const sizeOf = ({ weights }: Adapter) => weights.length + 200;

  test('is made by the one that was used longest ago', async () => {
    const source = await startHttpsSource();
    const [a, b, c] = await Promise.all([1, 5, 9].map((seed) => publish(source, `s${seed}`, seed)));
    const { fetch, folder, entries } = await startCache({ maxBytes: 2.5 * sizeOf(a!) });
    for (const adapter of [a!, b!]) (await fetch(adapter)).release();
    // Times on disk, not in memory: another engine may have used it.
    await utimes(join(folder, a!.hex), new Date(2000), new Date(2000));
    await utimes(join(folder, b!.hex), new Date(1000), new Date(1000));
    (await fetch(c!)).release();
    expect(await entries()).toEqual([a!.hex, c!.hex].sort());
  });

  test('is not made by what a load reads', async () => {
    const source = await startHttpsSource();
    const [a, b] = await Promise.all([1, 5].map((seed) => publish(source, `s${seed}`, seed)));
    const { fetch, entries } = await startCache({ maxBytes: 1.5 * sizeOf(a!) });
    const held = await fetch(a!);
    await expect(fetch(b!)).rejects.toMatchObject({
      code: 'source_unavailable',
      message: expect.stringContaining('--source-cache'),
    });
    held.release();
    (await fetch(b!)).release();
    expect(await entries()).toEqual([b!.hex]);
  });

  test('is never more than was given, however many come at once', async () => {
    const source = await startHttpsSource();
    const adapters = await Promise.all(
      Array.from({ length: 12 }, (_, i) => publish(source, `s${i}`, 1 + 5 * i)),
    );
    const { fetch, entries } = await startCache({
      maxBytes: 3.5 * sizeOf(adapters[0]!),
      maxFetches: 1,
      maxQueuedFetches: 12,
    });
    await Promise.all(adapters.map(async (adapter) => (await fetch(adapter)).release()));
    expect((await entries()).length).toBe(3);
  });

  test('is not for an adapter that is larger than all of it', async () => {
    const source = await startHttpsSource();
    const adapter = await publish(source, 'a');
    const { fetch } = await startCache({ maxBytes: 5000 });
    await expect(fetch(adapter)).rejects.toMatchObject({
      code: 'adapter_invalid',
      message: expect.stringContaining('expected at most 5000 bytes'),
    });
  });
});
