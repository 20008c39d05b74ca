/**
 * Adapters that were fetched, on disk under their digest: `<folder>/<hex>/` with the two files that PEFT writes. A folder is
 * there only when it is whole and its digest was checked. Engines of a node share it; the bytes in all are bounded, and
 * the least recently used leave.
 */
import { mkdir, readdir, rename, stat, utimes } from 'node:fs/promises';
import { join } from 'node:path';
import type { Dispatcher } from 'undici';
import { type DownloadLimits, type RequestOptions, unavailable } from '../download.ts';
import { EngineError } from '../errors.ts';
import { Slots } from '../slots.ts';
import { shownUri } from '../source-uri.ts';
import { fetchFiles } from '../sources/fetch-files.ts';
import type { RemoteFiles } from '../sources/remote-files.ts';
import type { Throttle } from '../sources/throttle.ts';
import { type Versions, versionKey } from '../sources/versions.ts';
import type { ListFiles } from '../sources.ts';
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
  throttle?: Throttle | null;
  /** What a URI's source has. */
  list: ListFiles;
  /** What stands for the URI's content, when the URI itself says so. */
  versionOf: (uri: string) => string | null;
  versions: Versions;
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
  done: Promise<string>;
}

export class AdapterCache {
  readonly #options: AdapterCacheOptions;
  readonly #slots: Slots;
  /** Under way, by digest or version in hex: the second who asks waits for the first. */
  readonly #fetches = new Map<string, Fetch>();
  /** Likewise, by URI. */
  readonly #listings = new Map<string, Promise<RemoteFiles>>();
  /** Bytes that fetches under way will have written, likewise. */
  readonly #reserved = new Map<string, number>();
  /** How many loads read a folder now, by hex digest. */
  readonly #numUsers = new Map<string, number>();
  readonly #closing = new AbortController();

  constructor(options: AdapterCacheOptions) {
    this.#options = options;
    this.#slots = new Slots(options.maxFetches, options.maxQueuedFetches, 'adapter fetches');
  }

  /**
   * @param uri of a scheme that is fetched
   * @param digest `sha256:<hex>` of the adapter that it holds; null, where the source's own version says what that is
   */
  source(uri: string, digest: string | null): AdapterSource {
    return { uri: shownUri(uri), digest, fetch: () => this.#open(uri, digest) };
  }

  /** Removes our copy of an adapter. @returns its bytes; 0: there was none */
  async purge(digest: string): Promise<number> {
    const hex = digest.slice('sha256:'.length);
    await this.#fetches.get(hex)?.done.catch(() => {});
    const listed = (await this.#list().catch(() => [])).find(({ name }) => name === hex);
    if (!listed) return 0;
    await this.#remove(join(this.#options.folder, hex), hex);
    return listed.sizeBytes;
  }

  /** Ends what is being fetched. */
  async close(): Promise<void> {
    this.#closing.abort(new EngineError('draining', 'the engine is shutting down'));
    await Promise.allSettled([...this.#listings.values()]);
    await Promise.allSettled([...this.#fetches.values()].map(({ done }) => done));
  }

  async #open(uri: string, digest: string | null): Promise<LocalFolder> {
    const beginMs = performance.now();
    const { versions, versionOf } = this.#options;
    let remote: RemoteFiles | null = null;
    let known = digest ?? (await versions.find('adapter', versionOf(uri)));
    if (known === null) {
      remote = await this.#listOnce(uri);
      known = await versions.find('adapter', remote.version);
    }
    let isFetched = false;
    if (known === null) {
      known = await this.#fetchOnce(versionKey('adapter', remote!.version ?? uri), uri, null, remote);
      isFetched = true;
    }
    const hex = known.slice('sha256:'.length);
    const path = join(this.#options.folder, hex);
    const release = this.#use(hex);
    try {
      while (!(await this.#touch(path))) {
        await this.#fetchOnce(hex, uri, known, remote);
        isFetched = true;
      }
      const seconds = isFetched ? (performance.now() - beginMs) / 1000 : 0;
      if (!isFetched) this.#options.onFetch({ kind: 'adapter', result: 'cached', seconds, bytes: 0 });
      const discardIfDamaged = () => this.#discardIfDamaged(path, known);
      return { path, seconds, release, discardIfDamaged };
    } catch (error) {
      release();
      throw error;
    }
  }

  #request(): RequestOptions {
    const { dispatcher, throttle, limits, maxFetchMs } = this.#options;
    const signal = AbortSignal.any([this.#closing.signal, AbortSignal.timeout(maxFetchMs)]);
    return { dispatcher, limits, signal, ...(throttle && { throttle }) };
  }

  /** Asks what there is, or waits for who does. */
  #listOnce(uri: string): Promise<RemoteFiles> {
    const underWay = this.#listings.get(uri);
    if (underWay) return underWay;
    const done = this.#slots.run(() => this.#listRemote(uri)).finally(() => this.#listings.delete(uri));
    this.#listings.set(uri, done);
    return done;
  }

  async #listRemote(uri: string): Promise<RemoteFiles> {
    const beginMs = performance.now();
    try {
      return await this.#options.list(uri, 'adapter', this.#request());
    } catch (error) {
      const seconds = (performance.now() - beginMs) / 1000;
      this.#options.onFetch({ kind: 'adapter', result: 'unavailable', seconds, bytes: 0 });
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

  /**
   * Fetches, or waits for who does. What failed for another URI may work for this one.
   * @param key hex of the digest, or of the version where that is not known
   * @returns the digest of what there is now
   */
  async #fetchOnce(
    key: string,
    uri: string,
    digest: string | null,
    remote: RemoteFiles | null,
  ): Promise<string> {
    for (let underWay = this.#fetches.get(key); underWay; underWay = this.#fetches.get(key)) {
      try {
        return await underWay.done;
      } catch (error) {
        if (underWay.uri === uri) throw error;
      }
    }
    const done = this.#slots
      .run(() => this.#fetch(key, uri, digest, remote))
      .finally(() => {
        this.#fetches.delete(key);
        this.#reserved.delete(key);
      });
    this.#fetches.set(key, { uri, done });
    return done;
  }

  async #fetch(key: string, uri: string, digest: string | null, listed: RemoteFiles | null): Promise<string> {
    const { folder, maxBytes, versions, onFetch } = this.#options;
    const beginMs = performance.now();
    let bytes = 0;
    const tell = (result: FetchResult) =>
      onFetch({ kind: 'adapter', result, seconds: (performance.now() - beginMs) / 1000, bytes });
    await mkdir(folder, { recursive: true }).catch(cannotWrite);
    await sweepTemporaries(folder);
    const temporary = temporaryPath(folder, key);
    try {
      await mkdir(temporary).catch(cannotWrite);
      const request = this.#request();
      const remote = listed ?? (await this.#options.list(uri, 'adapter', request));
      const files = await fetchFiles(remote, temporary, {
        ...{ kind: 'adapter', where: shownUri(uri), request },
        maxBytes: (name) =>
          name === 'adapter_config.json' ? maxConfigBytes : Math.min(maxWeightsBytes, maxBytes),
        onSize: (sizeBytes) => this.#makeRoom(key, sizeBytes),
      });
      bytes = files.reduce((sum, { sizeBytes }) => sum + sizeBytes, 0);
      const actual = await digestOfFolder(temporary);
      checkDigest({ uri: shownUri(uri), digest }, actual);
      await this.#makeRoom(key, bytes);
      await this.#publish(temporary, join(folder, actual.slice('sha256:'.length)));
      await versions.remember('adapter', remote.version, actual);
      tell('fetched');
      return actual;
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

function cannotWrite(cause: NodeJS.ErrnoException): never {
  throw unavailable(`the cache folder cannot be written (${cause.code})`, cause);
}
