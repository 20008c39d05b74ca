/**
 * Which adapters are in the device arena: names to digests to native handles, counted while in use. An adapter is its
 * digest; a name is an alias. So the same content under two names is loaded once, new content under an old name is a
 * new adapter beside the old one, and an adapter without names waits for its last sequence, then its pages are free.
 *
 * A load runs beside the steps: fetch, verify (read, hash, check), then wait for pages, then copy. Loads of one digest are
 * one load; loads of one name run one after another; the number at once and the number in line are bounded.
 */
import type { AdapterModule } from '../../native/index.ts';
import { EngineError, InvariantError } from '../errors.ts';
import type { Arena } from '../ladder/arena.ts';
import type { AdapterStatus } from '../protocol.ts';
import { Slots } from '../slots.ts';

/** A checked adapter folder, as adapter-file.ts reads it. */
export interface AdapterFile {
  digest: string;
  /** The safetensors file. */
  path: string;
  modules: AdapterModule[];
  rank: number;
  targets: readonly string[];
  kind: string;
  sizeBytes: number;
}

/** Where an adapter comes from. */
export interface AdapterSource {
  /** As the caller named it, without what may be secret. */
  uri: string;
  /** What it must be; null: whatever is there. */
  digest: string | null;
  /** Brings it to this machine. Takes none of the loads' places: a slow source holds up its own load only. */
  fetch: () => Promise<LocalFolder>;
}

/** An adapter's folder on this machine. It stays until `release`, which is called once. */
export interface LocalFolder {
  path: string;
  /** How long it took to bring it here; 0 when it was here. */
  seconds: number;
  release: () => void;
  /** Forgets a copy of ours that is no longer what it was when it was fetched. @returns whether it was so */
  discardIfDamaged: () => Promise<boolean>;
}

/** A folder that is nobody's copy. */
export function folderSource(path: string, uri = path, digest: string | null = null): AdapterSource {
  const folder = { path, seconds: 0, release() {}, discardIfDamaged: async () => false };
  return { uri, digest, fetch: async () => folder };
}

export interface AdapterLoader {
  adapterPages(modules: AdapterModule[]): number;
  loadAdapter(path: string, modules: AdapterModule[], pages: Int32Array): Promise<number>;
  releaseAdapter(handle: number): void;
}

export interface AdapterTiersOptions {
  loader: AdapterLoader;
  arena: Arena;
  /** Reads and checks a folder against the base model; throws an EngineError. */
  readFile: (path: string) => Promise<AdapterFile>;
  /** Pages that must stay for KV, so that every live sequence fits alone. */
  numPagesKept: () => number;
  /** Called when a load begins or stops to wait for pages: the scheduler must look again. */
  onPagesWanted: () => void;
  /** Loads that run at once, and loads that wait for one of them. */
  maxLoads: number;
  maxQueuedLoads: number;
  /** How long a load waits for pages that running sequences hold. */
  pageWaitMs: number;
  /** Milliseconds, never going back. */
  now: () => number;
  /** Unix milliseconds. */
  wallClock: () => number;
}

/** A resident adapter. */
export interface Adapter {
  readonly digest: string;
  readonly file: AdapterFile;
  readonly pages: Int32Array;
  readonly handle: number;
  readonly names: Set<string>;
  /** As the client named it in the first load. */
  readonly sourceUri: string;
  /** Unix seconds. */
  readonly since: number;
  readonly loadSeconds: { fetch: number; verify: number; device: number };
  /** Sequences, waiting or running, that use it. */
  numInFlight: number;
  /** Sequences that have used it since it was loaded. */
  numRequests: number;
}

interface PageWaiter {
  numPages: number;
  resolve: (pages: Int32Array) => void;
  reject: (error: EngineError) => void;
  timer: NodeJS.Timeout;
}

export class AdapterTiers {
  readonly #options: AdapterTiersOptions;
  readonly #byName = new Map<string, Adapter>();
  readonly #byDigest = new Map<string, Adapter>();
  /** Loads under way by digest: the second one joins the first. */
  readonly #loading = new Map<string, Promise<Adapter>>();
  /** The last load of each name that has one. */
  readonly #nameTurns = new Map<string, Promise<unknown>>();
  /** First come, first served: a small adapter does not pass a large one for ever. */
  readonly #pageWaiters: PageWaiter[] = [];
  readonly #slots: Slots;
  #isClosed = false;
  /** Called with the seconds that each load took. */
  onLoaded: (seconds: number) => void = () => {};

  constructor(options: AdapterTiersOptions) {
    this.#options = options;
    this.#slots = new Slots(options.maxLoads, options.maxQueuedLoads, 'adapter loads');
  }

  get(name: string): Adapter | undefined {
    return this.#byName.get(name);
  }

  get adapters(): Iterable<Adapter> {
    return this.#byDigest.values();
  }

  get names(): Iterable<[string, Adapter]> {
    return this.#byName.entries();
  }

  /** Names whose load is under way. */
  get loadingNames(): Iterable<string> {
    return this.#nameTurns.keys();
  }

  /** Pages that loads wait for. */
  get numWantedPages(): number {
    return this.#pageWaiters.reduce((sum, waiter) => sum + waiter.numPages, 0);
  }

  /** One more sequence uses the adapter: its pages stay until `release`. */
  acquire(adapter: Adapter): void {
    adapter.numInFlight++;
    adapter.numRequests++;
  }

  release(adapter: Adapter): void {
    adapter.numInFlight--;
    this.#freeIfUnused(adapter);
  }

  /**
   * Loads an adapter and points `name` at it.
   * @param from a folder on this machine, or any source
   * @throws EngineError adapter_already_loaded, when the name is taken and `isInPlace` is false; adapter_digest_mismatch;
   *         arena_full, when the pages are not there in time; too_many_loads; or what fetch and readFile throw
   */
  async load(name: string, from: AdapterSource | string, isInPlace: boolean): Promise<Adapter> {
    const source = typeof from === 'string' ? folderSource(from) : from;
    const before = this.#nameTurns.get(name);
    const turn = (async () => {
      await before?.catch(() => {});
      if (!isInPlace && this.#byName.has(name)) {
        throw new EngineError(
          'adapter_already_loaded',
          `The lora adapter '${name}' has already been loaded. Set load_inplace to true to replace it.`,
          { param: 'lora_name' },
        );
      }
      let adapter = await this.#loadSource(source);
      // Between the load and this line another name may have let go of the same adapter.
      while (this.#byDigest.get(adapter.digest) !== adapter) adapter = await this.#loadSource(source);
      this.#point(name, adapter);
      return adapter;
    })();
    this.#nameTurns.set(name, turn);
    try {
      return await turn;
    } finally {
      if (this.#nameTurns.get(name) === turn) this.#nameTurns.delete(name);
    }
  }

  /** The name is gone at once; the bytes follow when its last sequence ends. */
  unload(name: string): void {
    const adapter = this.#byName.get(name);
    if (!adapter) {
      throw new EngineError('adapter_not_loaded', `The lora adapter '${name}' cannot be found.`, {
        param: 'lora_name',
      });
    }
    this.#byName.delete(name);
    adapter.names.delete(name);
    this.#freeIfUnused(adapter);
  }

  /** Hands free pages to the loads that wait for them. Call it when pages came back or sequences ended. */
  servePageWaiters(): void {
    while (this.#pageWaiters.length > 0) {
      const waiter = this.#pageWaiters[0]!;
      const pages = this.#tryTake(waiter.numPages);
      if (!pages) return;
      this.#pageWaiters.shift();
      clearTimeout(waiter.timer);
      waiter.resolve(pages);
    }
  }

  statuses(): AdapterStatus[] {
    return [...this.#byDigest.values()].map((adapter) => ({
      digest: adapter.digest,
      names: [...adapter.names].sort(),
      tier: 'device',
      rank: adapter.file.rank,
      modules: [...adapter.file.targets].sort(),
      kind: adapter.file.kind,
      bytes: adapter.pages.length * this.#options.arena.pageBytes,
      inFlight: adapter.numInFlight,
      requests: adapter.numRequests,
      path: adapter.sourceUri,
      since: adapter.since,
      loadSeconds: adapter.loadSeconds,
    }));
  }

  /** Refuses the loads that wait, and waits for those that copy. */
  async close(): Promise<void> {
    this.#isClosed = true;
    for (const waiter of this.#pageWaiters.splice(0)) {
      clearTimeout(waiter.timer);
      waiter.reject(new EngineError('draining', 'the engine is shutting down'));
    }
    await Promise.allSettled(this.#loading.values());
  }

  async #loadSource(source: AdapterSource, isSecondTry = false): Promise<Adapter> {
    if (this.#isClosed) throw new EngineError('draining', 'the engine is shutting down');
    // Who names a digest that is resident has named all there is to load.
    const known = source.digest === null ? undefined : this.#byDigest.get(source.digest);
    if (known) return known;
    const folder = await source.fetch();
    try {
      return await this.#slots.run(() => this.#loadFolder(source, folder));
    } catch (error) {
      const isRefused = error instanceof EngineError && error.status < 500;
      if (!isRefused || isSecondTry || !(await folder.discardIfDamaged())) throw error;
    } finally {
      folder.release();
    }
    return this.#loadSource(source, true);
  }

  async #loadFolder(source: AdapterSource, folder: LocalFolder): Promise<Adapter> {
    const begin = this.#options.now();
    const file = await this.#options.readFile(folder.path);
    const verifySeconds = (this.#options.now() - begin) / 1000;
    checkDigest(source, file.digest);
    const resident = this.#byDigest.get(file.digest);
    if (resident) return resident;
    const underWay = this.#loading.get(file.digest);
    if (underWay) return await underWay;
    const load = this.#bringToDevice(file, source.uri, folder.seconds, verifySeconds);
    this.#loading.set(file.digest, load);
    try {
      return await load;
    } finally {
      this.#loading.delete(file.digest);
    }
  }

  async #bringToDevice(
    file: AdapterFile,
    sourceUri: string,
    fetchSeconds: number,
    verifySeconds: number,
  ): Promise<Adapter> {
    const { loader, arena, now, wallClock } = this.#options;
    const numPages = loader.adapterPages(file.modules);
    const pages = await this.#takePages(numPages);
    const begin = now();
    let handle: number;
    try {
      handle = await loader.loadAdapter(file.path, file.modules, pages);
    } catch (cause) {
      arena.giveBack('adapter', pages);
      this.#options.onPagesWanted();
      const reason = cause instanceof Error ? cause.message : String(cause);
      throw new EngineError('adapter_invalid', `lora_path: the adapter was refused: ${reason}`, {
        param: 'lora_path',
        cause,
      });
    }
    const deviceSeconds = (now() - begin) / 1000;
    const adapter: Adapter = {
      digest: file.digest,
      file,
      pages,
      handle,
      names: new Set(),
      sourceUri,
      since: wallClock() / 1000,
      loadSeconds: { fetch: fetchSeconds, verify: verifySeconds, device: deviceSeconds },
      numInFlight: 0,
      numRequests: 0,
    };
    this.#byDigest.set(file.digest, adapter);
    this.onLoaded(verifySeconds + deviceSeconds);
    return adapter;
  }

  #point(name: string, adapter: Adapter): void {
    const old = this.#byName.get(name);
    this.#byName.set(name, adapter);
    adapter.names.add(name);
    if (!old || old === adapter) return;
    old.names.delete(name);
    this.#freeIfUnused(old);
  }

  #freeIfUnused(adapter: Adapter): void {
    if (adapter.numInFlight < 0) throw new InvariantError(`adapter ${adapter.digest} released too often`);
    if (adapter.numInFlight > 0 || adapter.names.size > 0) return;
    this.#byDigest.delete(adapter.digest);
    this.#options.loader.releaseAdapter(adapter.handle);
    this.#options.arena.giveBack('adapter', adapter.pages);
    this.#options.onPagesWanted();
  }

  #tryTake(numPages: number): Int32Array | null {
    const { arena, numPagesKept } = this.#options;
    if (arena.numUsed('adapter') + numPages + numPagesKept() > arena.numPages) return null;
    const pages = new Int32Array(numPages);
    return arena.take('adapter', numPages, pages) ? pages : null;
  }

  /** Pages at once, or when running sequences give some back within pageWaitMs. No sequence is stopped for them. */
  #takePages(numPages: number): Promise<Int32Array> {
    const { arena, pageWaitMs, onPagesWanted } = this.#options;
    if (this.#isClosed) throw new EngineError('draining', 'the engine is shutting down');
    if (this.#pageWaiters.length === 0) {
      const pages = this.#tryTake(numPages);
      if (pages) return Promise.resolve(pages);
    }
    // What sequences hold comes back; what adapters hold does not, unless someone unloads one.
    if (arena.numUsed('adapter') + numPages > arena.numPages)
      return Promise.reject(this.#arenaFull(numPages));
    return new Promise((resolve, reject) => {
      const waiter: PageWaiter = {
        numPages,
        resolve,
        reject,
        timer: setTimeout(() => {
          this.#pageWaiters.splice(this.#pageWaiters.indexOf(waiter), 1);
          reject(this.#arenaFull(numPages));
          this.servePageWaiters();
          onPagesWanted();
        }, pageWaitMs),
      };
      this.#pageWaiters.push(waiter);
      onPagesWanted();
    });
  }

  #arenaFull(numPages: number): EngineError {
    const { arena, pageWaitMs } = this.#options;
    const bytes = (pages: number) => `${pages * arena.pageBytes} bytes`;
    return new EngineError(
      'arena_full',
      `the adapter needs ${bytes(numPages)} of the device arena, ${bytes(arena.numFree)} are free ` +
        `(${bytes(arena.numUsed('adapter'))} hold adapters, ${bytes(arena.numUsed('kv'))} hold running sequences, ` +
        `${bytes(arena.numPages)} in all); unload an adapter, or give the engine more --device-memory`,
      { param: 'lora_path', retryAfterSeconds: Math.max(1, Math.ceil(pageWaitMs / 1000)) },
    );
  }
}

/** @throws EngineError adapter_digest_mismatch */
export function checkDigest({ uri, digest }: Pick<AdapterSource, 'uri' | 'digest'>, actual: string): void {
  if (digest === null || digest === actual) return;
  throw new EngineError('adapter_digest_mismatch', `${uri}: expected digest ${digest}, got ${actual}`, {
    param: 'digest',
  });
}
