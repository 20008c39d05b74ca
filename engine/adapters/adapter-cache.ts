/**
 * Adapters that were fetched, on disk under their digest: `<folder>/<hex>/` with the two files that PEFT writes. A folder is
 * there only when it is whole and its digest was checked. Engines of a node share it; the bytes in all are bounded, and
 * the least recently used leave.
 */
import { mkdir, open, readdir, rename, stat, utimes } from 'node:fs/promises';
import { join } from 'node:path';
import type { Dispatcher } from 'undici';
import { checkFreeSpace, type DownloadLimits, download, unavailable } from '../download.ts';
import { EngineError } from '../errors.ts';
import { Slots } from '../slots.ts';
import { shownUri } from '../source-uri.ts';
import { removeTemporary, sweepTemporaries, syncFolder, temporaryPath } from '../temporary-files.ts';
import { digestOfFolder } from './adapter-file.ts';
import { type AdapterSource, checkDigest, type LocalFolder } from './adapter-tiers.ts';

/** As adapter-file.ts reads it. */
const maxConfigBytes = 2 ** 20;
/** Rank 256 on every module of a 70B model is 3 GiB. */
const maxWeightsBytes = 8 * 2 ** 30;

export type FetchResult = 'fetched' | 'cached' | 'unavailable' | 'refused';

/** One adapter or model that was asked for. */
export interface FetchEvent {
  kind: 'adapter' | 'model';
  result: FetchResult;
  seconds: number;
  /** Over the network. */
  bytes: number;
}

export interface AdapterCacheOptions {
  folder: string;
  maxBytes: number;
  dispatcher: Dispatcher;
  limits: DownloadLimits;
  /** Of one adapter, in all. */
  maxFetchMs: number;
  /** Fetches that run at once, and that wait for one of them. */
  maxFetches: number;
  maxQueuedFetches: number;
  onFetch: (event: FetchEvent) => void;
}

interface Fetch {
  uri: string;
  done: Promise<void>;
}

export class AdapterCache {
  readonly #options: AdapterCacheOptions;
  readonly #slots: Slots;
  /** Under way, by hex digest: the second who asks waits for the first. */
  readonly #fetches = new Map<string, Fetch>();
  /** Bytes that fetches under way will have written, by hex digest. */
  readonly #reserved = new Map<string, number>();
  /** How many loads read a folder now, by hex digest. */
  readonly #numUsers = new Map<string, number>();
  readonly #closing = new AbortController();

  constructor(options: AdapterCacheOptions) {
    this.#options = options;
    this.#slots = new Slots(options.maxFetches, options.maxQueuedFetches, 'adapter fetches');
  }

  /** @param uri https://HOST/FOLDER  @param digest `sha256:<hex>` of the adapter that it holds */
  source(uri: string, digest: string): AdapterSource {
    return { uri: shownUri(uri), digest, fetch: () => this.#open(uri, digest) };
  }

  /** Ends what is being fetched. */
  async close(): Promise<void> {
    this.#closing.abort(new EngineError('draining', 'the engine is shutting down'));
    await Promise.allSettled([...this.#fetches.values()].map(({ done }) => done));
  }

  async #open(uri: string, digest: string): Promise<LocalFolder> {
    const hex = digest.slice('sha256:'.length);
    const path = join(this.#options.folder, hex);
    const beginMs = performance.now();
    const release = this.#use(hex);
    try {
      let isFetched = false;
      while (!(await this.#touch(path))) {
        await this.#fetchOnce(hex, uri, digest);
        isFetched = true;
      }
      const seconds = isFetched ? (performance.now() - beginMs) / 1000 : 0;
      if (!isFetched) this.#options.onFetch({ kind: 'adapter', result: 'cached', seconds, bytes: 0 });
      return { path, seconds, release, discardIfDamaged: () => this.#discardIfDamaged(path, digest) };
    } catch (error) {
      release();
      throw error;
    }
  }

  /** Marks it as in use, so that it does not leave. */
  #use(hex: string): () => void {
    this.#numUsers.set(hex, (this.#numUsers.get(hex) ?? 0) + 1);
    return () => {
      const numLeft = this.#numUsers.get(hex)! - 1;
      if (numLeft > 0) this.#numUsers.set(hex, numLeft);
      else this.#numUsers.delete(hex);
    };
  }

  /** Whether it is there; it is now the last to leave. */
  async #touch(path: string): Promise<boolean> {
    const info = await stat(path).catch(() => null);
    const now = new Date();
    if (info) await utimes(path, now, now).catch(() => {}); // another user's folder keeps its age
    return info !== null;
  }

  /** Fetches, or waits for who does. What failed for another URI may work for this one. */
  async #fetchOnce(hex: string, uri: string, digest: string): Promise<void> {
    const underWay = this.#fetches.get(hex);
    if (underWay) {
      return underWay.done.catch((error) => {
        if (underWay.uri === uri) throw error;
      });
    }
    const done = this.#slots
      .run(() => this.#fetch(hex, uri, digest))
      .finally(() => {
        this.#fetches.delete(hex);
        this.#reserved.delete(hex);
      });
    this.#fetches.set(hex, { uri, done });
    return done;
  }

  async #fetch(hex: string, uri: string, digest: string): Promise<void> {
    const { folder, onFetch } = this.#options;
    const beginMs = performance.now();
    let bytes = 0;
    const tell = (result: FetchResult) =>
      onFetch({ kind: 'adapter', result, seconds: (performance.now() - beginMs) / 1000, bytes });
    await mkdir(folder, { recursive: true }).catch(cannotWrite);
    await sweepTemporaries(folder);
    const temporary = temporaryPath(folder, hex);
    try {
      await mkdir(temporary).catch(cannotWrite);
      const file = (name: string, maxBytes: number) =>
        this.#fetchFile(hex, fileUrl(uri, name), join(temporary, name), maxBytes);
      bytes += await file('adapter_config.json', maxConfigBytes);
      bytes += await file('adapter_model.safetensors', Math.min(maxWeightsBytes, this.#options.maxBytes));
      checkDigest({ uri: shownUri(uri), digest }, await digestOfFolder(temporary));
      await this.#makeRoom(hex, bytes);
      await this.#publish(temporary, join(folder, hex));
      tell('fetched');
    } catch (error) {
      tell(error instanceof EngineError && error.status >= 500 ? 'unavailable' : 'refused');
      if (!(error instanceof EngineError) || !error.message.includes(temporary)) throw error;
      // The caller knows the URI, not our folders.
      const message = error.message.replaceAll(temporary, shownUri(uri));
      throw new EngineError(error.code, message, { param: 'lora_path', cause: error });
    } finally {
      await removeTemporary(temporary);
    }
  }

  /** @returns its bytes */
  async #fetchFile(hex: string, url: URL, path: string, maxBytes: number): Promise<number> {
    const { dispatcher, limits, maxFetchMs } = this.#options;
    const signal = AbortSignal.any([this.#closing.signal, AbortSignal.timeout(maxFetchMs)]);
    const file = await open(path, 'wx+').catch(cannotWrite);
    try {
      const { sizeBytes } = await download(url, file, {
        dispatcher,
        limits,
        maxBytes,
        signal,
        onSize: async (bytes, missingBytes) => {
          await this.#makeRoom(hex, bytes);
          await checkFreeSpace(path, missingBytes);
        },
      });
      return sizeBytes;
    } finally {
      await file.close();
    }
  }

  async #publish(temporary: string, path: string): Promise<void> {
    await syncFolder(temporary);
    await rename(temporary, path).catch((error) => {
      // Another engine was faster.
      if (error.code !== 'ENOTEMPTY' && error.code !== 'EEXIST') cannotWrite(error);
    });
    await syncFolder(this.#options.folder);
  }

  /** Lets folders leave, the least recently used first, until `bytes` more fit beside what fetches under way will need. */
  async #makeRoom(hex: string, bytes: number): Promise<void> {
    const { folder, maxBytes } = this.#options;
    this.#reserved.set(hex, bytes);
    // What was published a moment ago may still be reserved.
    const kept = (await this.#list()).filter(({ name }) => !this.#reserved.has(name));
    const reservedBytes = [...this.#reserved.values()].reduce((sum, size) => sum + size, 0);
    let excess = kept.reduce((sum, { sizeBytes }) => sum + sizeBytes, reservedBytes) - maxBytes;
    const inOrder = kept.filter(({ name }) => !this.#numUsers.has(name)).sort((a, b) => a.usedMs - b.usedMs);
    for (const { name, sizeBytes } of inOrder) {
      if (excess <= 0) break;
      await this.#remove(join(folder, name), name);
      excess -= sizeBytes;
    }
    if (excess > 0) {
      throw unavailable(
        `${bytes} bytes do not fit into --source-cache now: it lacks ${excess} of ${maxBytes}`,
      );
    }
  }

  async #list(): Promise<{ name: string; sizeBytes: number; usedMs: number }[]> {
    const { folder } = this.#options;
    const names = (await readdir(folder)).filter((name) => /^[0-9a-f]{64}$/.test(name));
    const entries = names.map(async (name) => {
      const path = join(folder, name);
      const { mtimeMs } = await stat(path);
      const sizes = (await readdir(path)).map(async (file) => (await stat(join(path, file))).size);
      return { name, sizeBytes: (await Promise.all(sizes)).reduce((a, b) => a + b, 0), usedMs: mtimeMs };
    });
    // What another engine removes meanwhile is simply not there.
    const settled = await Promise.allSettled(entries);
    return settled.flatMap((entry) => (entry.status === 'fulfilled' ? [entry.value] : []));
  }

  /** Out of sight first: what is under its digest is whole, always. */
  async #remove(path: string, hex: string): Promise<void> {
    const temporary = temporaryPath(this.#options.folder, hex);
    await rename(path, temporary).catch(() => {}); // another engine may have removed it
    await removeTemporary(temporary);
  }

  async #discardIfDamaged(path: string, digest: string): Promise<boolean> {
    const isSame = await digestOfFolder(path).then(
      (actual) => actual === digest,
      () => false,
    );
    if (!isSame) await this.#remove(path, digest.slice('sha256:'.length));
    return !isSame;
  }
}

/** `name` in the folder that the URI names; a query stays behind it, as signed URLs need it. */
function fileUrl(uri: string, name: string): URL {
  const url = new URL(uri);
  url.pathname = `${url.pathname.replace(/\/+$/, '')}/${name}`;
  url.hash = '';
  return url;
}

function cannotWrite(cause: NodeJS.ErrnoException): never {
  throw unavailable(`the cache folder cannot be written (${cause.code})`, cause);
}
