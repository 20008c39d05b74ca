/**
 * Which adapters are registered: names to digests, counted while in use. An adapter is its digest; a name is an alias. So the
 * same content under two names is loaded once, new content under an old name is a new adapter beside the old one, and an
 * adapter without names waits for its last sequence, then its bytes are free. A registered adapter need not be on the
 * device: residency.ts moves its bytes, and brings them up when a sequence in the queue wants them.
 *
 * A load runs beside the steps: fetch, verify (read, hash, check), then wait for pages, then copy. Loads of one digest are
 * one load; loads of one name run one after another; the number at once and the number in line are bounded.
 */
import type { Logger } from 'pino';
import type { AdapterModule } from '../../native/index.ts';
import { EngineError, InvariantError, toEngineError } from '../errors.ts';
import { touch } from '../ladder/policy.ts';
import type { AdapterStatus, Tier } from '../protocol.ts';
import { type Place, Slots } from '../slots.ts';
import {
  isRegistered,
  type LoadReason,
  NobodyWaits,
  Residency,
  type ResidencyOptions,
  type Resident,
} from './residency.ts';

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

export interface AdapterTiersOptions extends Omit<ResidencyOptions, 'onChange'> {
  /** Reads and checks a folder against the base model; throws an EngineError. */
  readFile: (path: string) => Promise<AdapterFile>;
  /** Called when the scheduler must look again: pages came back or are wanted, an adapter is there. */
  onPagesWanted: () => void;
  /** Loads by name that run at once, and as many for the queue; and loads by name that wait for one of them. */
  maxLoads: number;
  maxQueuedLoads: number;
  /** Pages that the largest sequence, waiting or running, may come to need beside pins, its adapter's included. */
  numPagesPromised: () => number;
  log: Logger;
}

/** How an adapter was made of others. */
export interface Merge {
  /** As `mergeHeader` has it. */
  rule: string;
  members: readonly { digest: string; weight: number }[];
}

/** A registered adapter. */
export interface Adapter extends Resident {
  /** null: it is not kept as one. */
  merge: Merge | null;
  /** Brings its files again when no arena has it. */
  source: AdapterSource;
  /** As the client named it in the first load. */
  readonly sourceUri: string;
  /** Of the first load. */
  readonly loadSeconds: { fetch: number; verify: number };
  /** Sequences that have used it since it was registered. */
  numRequests: number;
  /** Loads that are about to name it: until they have, it stays without a name. */
  numNaming: number;
}

/** What a purge has let go of. */
export interface Purged {
  names: string[];
  deviceBytes: number;
  hostBytes: number;
}

/** Ways up for the queue that are begun at once, those included that still fetch: a bound, so that a long queue floods no source. */
const maxBroughtUp = 32;

export class AdapterTiers {
  readonly #options: AdapterTiersOptions;
  readonly residency: Residency;
  readonly #byName = new Map<string, Adapter>();
  readonly #byDigest = new Map<string, Adapter>();
  /** Loads under way by digest: the second one joins the first. */
  readonly #loading = new Map<string, Promise<Adapter>>();
  /** Ways up that are under way, from wherever it is: the second who needs it joins the first. */
  readonly #bringing = new Map<Adapter, Promise<void>>();
  /** Copies to the host arena that are under way. */
  readonly #writing = new Set<Promise<void>>();
  /** Adapters that sequences wait for, as the queue was when it was last shown. */
  #queue: Iterable<Adapter> = [];
  /** Digests that are being removed: none of them is registered meanwhile. */
  readonly #purging = new Set<string>();
  /** Who waits for an adapter's bytes to be gone. */
  readonly #onDropped = new Map<Adapter, (dropped: Omit<Purged, 'names'>) => void>();
  /** The last load of each name that has one. */
  readonly #nameTurns = new Map<string, Promise<unknown>>();
  readonly #slots: Slots;
  readonly #queueSlots: Slots;
  #isClosed = false;
  /** Called with the seconds that each way to the device took. */
  onLoaded: (seconds: number) => void = () => {};
  /** Called with the tier in which an adapter was when a sequence came for it. */
  onLookup: (tier: Tier) => void = () => {};
  /** Called with how long the queue waited for an adapter, in seconds. */
  onWaited: (seconds: number) => void = () => {};
  /** Called when an adapter that sequences wait for cannot be brought up. */
  onFailed: (adapter: Adapter, error: EngineError) => void = () => {};
  /** Called when an adapter is registered no more, and its bytes have left both arenas. */
  onGone: (adapter: Adapter) => void = () => {};

  constructor(options: AdapterTiersOptions) {
    this.#options = options;
    this.residency = new Residency({ ...options, onChange: options.onPagesWanted });
    this.#slots = new Slots(options.maxLoads, options.maxQueuedLoads, 'adapter loads');
    this.#queueSlots = new Slots(options.maxLoads, maxBroughtUp, 'adapters of the queue');
  }

  get(name: string): Adapter | undefined {
    return this.#byName.get(name);
  }

  withDigest(digest: string): Adapter | undefined {
    return this.#byDigest.get(digest);
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

  /** One more sequence waits for the adapter or runs on it: it stays registered until `release`. */
  acquire(adapter: Adapter): void {
    adapter.numInFlight++;
    adapter.numRequests++;
    touch(adapter, this.#options.now());
    this.onLookup(this.residency.tierOf(adapter));
  }

  release(adapter: Adapter): void {
    adapter.numInFlight--;
    if (adapter.numInFlight === 0 && this.#bringing.has(adapter)) this.residency.servePageWaiters();
    this.#freeIfUnused(adapter);
  }

  /** A sequence begins to run on the adapter, which is ready: it stays on the device until `letGo`. */
  hold(adapter: Adapter): void {
    if (!adapter.device)
      throw new InvariantError(`adapter ${adapter.digest} is run on and is not on the device`);
    adapter.numRunning++;
  }

  letGo(adapter: Adapter): void {
    if (--adapter.numRunning < 0) throw new InvariantError(`adapter ${adapter.digest} let go too often`);
  }

  /**
   * Shows what the queue waits for, in its order, and begins to bring up what is not on the device. Call it whenever the
   * queue may have changed.
   * @param queue  of each sequence its adapters
   */
  showQueue(queue: readonly (readonly Adapter[])[]): void {
    for (const adapter of this.#queue) adapter.queuePlace = Number.POSITIVE_INFINITY;
    this.#queue = inOrder(queue);
    for (const adapter of this.#queue) {
      if (this.#isClosed) break;
      if (adapter.device || this.#bringing.has(adapter)) continue;
      if (this.#bringing.size >= maxBroughtUp) {
        this.residency.giveWay(adapter);
        break;
      }
      const beginMs = this.#options.now();
      this.#bring(adapter, 'queue').then(
        () => this.onWaited((this.#options.now() - beginMs) / 1000),
        () => {}, // those who wait were told
      );
    }
    this.residency.servePageWaiters();
  }

  /** Whether something is on its way to the device, and be it that it waits. */
  get isBringing(): boolean {
    return this.#bringing.size > 0;
  }

  /**
   * Loads an adapter and points `name` at it.
   * @param from a folder on this machine, or any source
   * @param isPinned whether it may leave the device; null: as it was
   * @throws EngineError adapter_already_loaded, when the name is taken and `isInPlace` is false; adapter_digest_mismatch;
   *         arena_full, when the pages are not there in time; too_many_loads; or what fetch and readFile throw
   */
  async load(
    name: string,
    from: AdapterSource | string,
    isInPlace: boolean,
    isPinned: boolean | null = null,
  ): Promise<Adapter> {
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
      adapter.numNaming++;
      try {
        const replaced = this.#lastNamed(name, adapter);
        await this.#pin(adapter, isPinned ?? (adapter.isPinned || replaced?.isPinned === true), replaced);
        if (this.#purging.has(adapter.digest)) throw purged(adapter.digest);
        this.#point(name, adapter);
      } finally {
        adapter.numNaming--;
        this.#freeIfUnused(adapter);
      }
      this.#writeThrough(adapter);
      return adapter;
    })();
    this.#nameTurns.set(name, turn);
    try {
      return await turn;
    } finally {
      if (this.#nameTurns.get(name) === turn) this.#nameTurns.delete(name);
    }
  }

  /**
   * Registers an adapter that has no name, and keeps it until `unkeep`. It comes to the device when a sequence waits for it.
   * @param source  with a digest
   * @throws EngineError adapter_purged, adapter_digest_mismatch, or what fetch and readFile throw
   */
  async keep(source: AdapterSource, merge: Merge): Promise<Adapter> {
    const { readFile, now } = this.#options;
    const { file, verify } = await this.#withFolder(source, (folder) =>
      this.#slots.run(async () => {
        const beginMs = now();
        return { file: await readFile(folder.path), verify: (now() - beginMs) / 1000 };
      }),
    );
    checkDigest(source, file.digest);
    // Somebody may load the same by name.
    while (this.#loading.has(file.digest)) await this.#loading.get(file.digest)!.catch(() => {});
    if (this.#purging.has(file.digest)) throw purged(file.digest);
    const adapter = this.#byDigest.get(file.digest) ?? this.#newAdapter(file, source, { fetch: 0, verify });
    this.#byDigest.set(file.digest, adapter);
    adapter.isKept = true;
    adapter.merge = merge;
    return adapter;
  }

  /** It goes when its last sequence has ended, if no name points at it. */
  unkeep(adapter: Adapter): void {
    adapter.isKept = false;
    this.#freeIfUnused(adapter);
  }

  /** The name is gone at once; the bytes follow when its last sequence ends. */
  unload(name: string): void {
    const adapter = this.#byName.get(name);
    if (!adapter) {
      throw new EngineError('adapter_not_loaded', `The lora adapter '${name}' cannot be found.`, {
        param: 'lora_name',
      });
    }
    this.#takeName(name, adapter);
  }

  /**
   * Takes all names of an adapter. @returns them; empty: it was not here
   */
  unloadDigest(digest: string): string[] {
    const adapter = this.#byDigest.get(digest);
    const names = [...(adapter?.names ?? [])].sort();
    for (const name of names) this.#takeName(name, adapter!);
    return names;
  }

  /**
   * Takes all names of an adapter and waits until its bytes have left both arenas; loads of it that come meanwhile are refused.
   * @param endSequences ends those that use it, soon
   */
  async purge(digest: string, endSequences: (adapter: Adapter) => void): Promise<Purged> {
    if (this.#purging.has(digest)) throw purged(digest);
    this.#purging.add(digest);
    try {
      // What is being read already is here a moment later, and is removed then.
      await this.#loading.get(digest)?.catch(() => {});
      const adapter = this.#byDigest.get(digest);
      if (!adapter) return { names: [], deviceBytes: 0, hostBytes: 0 };
      const gone = new Promise<Omit<Purged, 'names'>>((resolve) => this.#onDropped.set(adapter, resolve));
      const names = this.unloadDigest(digest);
      adapter.isKept = false;
      endSequences(adapter);
      this.#freeIfUnused(adapter);
      return { names, ...(await gone) };
    } finally {
      this.#purging.delete(digest);
    }
  }

  statuses(): AdapterStatus[] {
    const { pageBytes } = this.#options.arena;
    return [...this.#byDigest.values()].map((adapter) => ({
      digest: adapter.digest,
      names: [...adapter.names].sort(),
      ...(adapter.merge && { merge: { ...adapter.merge, members: [...adapter.merge.members] } }),
      tier: this.residency.tierOf(adapter),
      pinned: adapter.isPinned,
      rank: adapter.file.rank,
      modules: [...adapter.file.targets].sort(),
      kind: adapter.file.kind,
      bytes: adapter.numPages * pageBytes,
      inFlight: adapter.numInFlight,
      requests: adapter.numRequests,
      path: adapter.sourceUri,
      since: adapter.since,
      loadSeconds: {
        ...adapter.loadSeconds,
        pages: adapter.seconds.pages,
        device: adapter.seconds.disk,
        host: adapter.seconds.host,
      },
    }));
  }

  /** Refuses the loads that wait, and waits for those that copy. */
  async close(): Promise<void> {
    this.#isClosed = true;
    this.residency.close();
    await Promise.allSettled([...this.#loading.values(), ...this.#bringing.values()]);
    await Promise.allSettled(this.#writing);
  }

  /** Fetches, and lets `work` use the folder; once more when it was a copy of ours and is damaged. */
  async #withFolder<T>(
    source: AdapterSource,
    work: (folder: LocalFolder) => Promise<T>,
    isSecondTry = false,
  ): Promise<T> {
    if (this.#isClosed) throw new EngineError('draining', 'the engine is shutting down');
    const folder = await source.fetch();
    try {
      return await work(folder);
    } catch (error) {
      const isRefused = error instanceof EngineError && error.status < 500;
      if (!isRefused || isSecondTry || !(await folder.discardIfDamaged())) throw error;
    } finally {
      folder.release();
    }
    return this.#withFolder(source, work, true);
  }

  async #loadSource(source: AdapterSource): Promise<Adapter> {
    // Who names a digest that is registered has named all there is to load.
    const known = source.digest === null ? undefined : this.#byDigest.get(source.digest);
    if (known) return known;
    return this.#withFolder(source, (folder) =>
      this.#slots.run((place) => this.#loadFolder(source, folder, place)),
    );
  }

  async #loadFolder(source: AdapterSource, folder: LocalFolder, place: Place): Promise<Adapter> {
    const beginMs = this.#options.now();
    const file = await this.#options.readFile(folder.path);
    const verify = (this.#options.now() - beginMs) / 1000;
    checkDigest(source, file.digest);
    if (this.#purging.has(file.digest)) throw purged(file.digest);
    const registered = this.#byDigest.get(file.digest);
    // It may have moved: what is read now is where it is.
    if (registered) registered.source = source;
    const underWay = registered ?? this.#loading.get(file.digest);
    if (underWay) return await underWay;
    const load = this.#register(file, source, { fetch: folder.seconds, verify }, place);
    this.#loading.set(file.digest, load);
    try {
      return await load;
    } finally {
      this.#loading.delete(file.digest);
    }
  }

  async #register(
    file: AdapterFile,
    source: AdapterSource,
    loadSeconds: Adapter['loadSeconds'],
    place: Place,
  ): Promise<Adapter> {
    const adapter = this.#newAdapter(file, source, loadSeconds);
    await this.residency.whileMoving(adapter, () => this.residency.load(adapter, file, 'name', place));
    this.#byDigest.set(file.digest, adapter);
    this.onLoaded(loadSeconds.verify + adapter.seconds.disk);
    return adapter;
  }

  #newAdapter(file: AdapterFile, source: AdapterSource, loadSeconds: Adapter['loadSeconds']): Adapter {
    return {
      digest: file.digest,
      merge: null,
      isKept: false,
      file,
      numPages: this.#options.loader.adapterPages(file.modules),
      usedBytes: this.#options.loader.adapterBytes(file.modules),
      device: null,
      host: null,
      isPinned: false,
      isMoving: false,
      names: new Set(),
      numInFlight: 0,
      numRunning: 0,
      queuePlace: Number.POSITIVE_INFINITY,
      uses: 0,
      lastUsedMs: this.#options.now(),
      since: 0,
      seconds: { pages: 0, disk: 0, host: 0 },
      source,
      sourceUri: source.uri,
      loadSeconds,
      numRequests: 0,
      numNaming: 0,
    };
  }

  /** Brings a registered adapter to the device, from where it is. */
  #bring(adapter: Adapter, why: LoadReason): Promise<void> {
    const underWay = this.#bringing.get(adapter);
    if (underWay) return underWay;
    const way = (async () => {
      try {
        if (!(await this.#raise(adapter, why))) await this.#loadAgain(adapter, why);
      } catch (error) {
        // Before it may be tried again: those who wait now have waited long enough.
        if (!(error instanceof NobodyWaits)) this.onFailed(adapter, toEngineError(error));
        throw error;
      } finally {
        this.#bringing.delete(adapter);
        this.#writeThrough(adapter);
        this.#freeIfUnused(adapter);
        this.#options.onPagesWanted();
      }
    })();
    this.#bringing.set(adapter, way);
    return way;
  }

  /** @returns false: the host arena does not have it */
  async #raise(adapter: Adapter, why: LoadReason): Promise<boolean> {
    if (!adapter.host) return false;
    return this.#slotsOf(why).run(
      async (place) => {
        if (!adapter.host) return false; // it left while this waited for its turn
        refuseUnwanted(adapter, why);
        await this.residency.whileMoving(adapter, () => this.residency.raise(adapter, why, place));
        this.onLoaded(adapter.seconds.host);
        return true;
      },
      rankOf(adapter, why),
    );
  }

  #loadAgain(adapter: Adapter, why: LoadReason): Promise<void> {
    const { readFile, now } = this.#options;
    return this.#withFolder(adapter.source, (folder) =>
      this.#slotsOf(why).run(
        async (place) => {
          refuseUnwanted(adapter, why);
          const beginMs = now();
          const file = await readFile(folder.path);
          const verifySeconds = (now() - beginMs) / 1000;
          checkDigest({ uri: adapter.sourceUri, digest: adapter.digest }, file.digest);
          await this.residency.whileMoving(adapter, () => this.residency.load(adapter, file, why, place));
          this.onLoaded(verifySeconds + adapter.seconds.disk);
        },
        rankOf(adapter, why),
      ),
    );
  }

  #slotsOf(why: LoadReason): Slots {
    return why === 'queue' ? this.#queueSlots : this.#slots;
  }

  /** Beside the steps. Without it the adapter comes back from its files. */
  #writeThrough(adapter: Adapter): void {
    if (this.#isClosed || adapter.isMoving || !this.residency.mayWriteThrough(adapter)) return;
    const writing = this.residency
      .whileMoving(adapter, () => this.residency.writeThrough(adapter))
      .catch((err) => this.#options.log.warn({ err, digest: adapter.digest }, 'not copied to the host arena'))
      .finally(() => {
        this.#writing.delete(writing);
        this.#freeIfUnused(adapter);
      });
    this.#writing.add(writing);
  }

  /**
   * Lets it leave the device from now on, or brings it there and keeps it.
   * @throws EngineError arena_full, when pins would leave no room for what must run beside them
   */
  async #pin(adapter: Adapter, isPinned: boolean, replaced: Adapter | null): Promise<void> {
    while (isPinned && !adapter.isPinned) {
      const { arena, numPagesPromised } = this.#options;
      const numLeaving = replaced?.isPinned ? replaced.numPages : 0;
      const numPinned = this.residency.numPagesBeside([adapter]) - numLeaving;
      if (arena.numPages - numPinned < Math.max(1, numPagesPromised())) {
        throw new EngineError(
          'arena_full',
          `pinned: with this adapter pins would take ${numPinned * arena.pageBytes} bytes of the device arena's ` +
            `${arena.numPages * arena.pageBytes}, and leave too few for sequences; unpin another one`,
          { param: 'pinned' },
        );
      }
      if (adapter.device) break;
      await this.#bring(adapter, 'name').catch((error) => {
        // It was on its way for the queue, where nobody waits any more.
        if (!(error instanceof NobodyWaits)) throw error;
      });
    }
    adapter.isPinned = isPinned;
  }

  /** What loses its last name when `name` points at the adapter, which takes over its pin. */
  #lastNamed(name: string, adapter: Adapter): Adapter | null {
    const old = this.#byName.get(name);
    return old && old !== adapter && old.names.size === 1 ? old : null;
  }

  #point(name: string, adapter: Adapter): void {
    const old = this.#byName.get(name);
    if (old && old !== adapter) this.#takeName(name, old);
    this.#byName.set(name, adapter);
    adapter.names.add(name);
  }

  #takeName(name: string, adapter: Adapter): void {
    this.#byName.delete(name);
    adapter.names.delete(name);
    if (adapter.names.size === 0) adapter.isPinned = false;
    this.#freeIfUnused(adapter);
  }

  /** Its bytes go when nobody keeps it, it has no name and gets none, has no sequence, and is not on its way. */
  #freeIfUnused(adapter: Adapter): void {
    if (adapter.numInFlight < 0) throw new InvariantError(`adapter ${adapter.digest} released too often`);
    if (adapter.numInFlight > 0 || isRegistered(adapter) || adapter.numNaming > 0) return;
    if (adapter.isMoving || this.#bringing.has(adapter)) return;
    if (this.#byDigest.get(adapter.digest) === adapter) this.#byDigest.delete(adapter.digest);
    const dropped = this.residency.drop(adapter);
    this.#onDropped.get(adapter)?.(dropped);
    this.#onDropped.delete(adapter);
    this.onGone(adapter);
  }
}

/**
 * Gives the adapters their places: one for all of a sequence, so that none of them leaves for another of them, and so that
 * one sequence after the other gets all of its own. An adapter without a name cannot leave before its sequence has ended:
 * that one goes first.
 */
function inOrder(queue: readonly (readonly Adapter[])[]): Set<Adapter> {
  const isNamed = (adapters: readonly Adapter[]) => adapters.every(isRegistered);
  const inOrder = new Set<Adapter>();
  let place = 0;
  for (const adapters of [...queue.filter((own) => !isNamed(own)), ...queue.filter(isNamed)]) {
    for (const adapter of adapters) {
      if (inOrder.has(adapter)) continue;
      adapter.queuePlace = place;
      inOrder.add(adapter);
    }
    place++;
  }
  return inOrder;
}

function purged(digest: string): EngineError {
  return new EngineError('adapter_purged', `the adapter ${digest} is being removed`, { param: 'lora_path' });
}

/** Of those for the queue the one whose sequence is first goes first; those by name as they came. */
function rankOf(adapter: Adapter, why: LoadReason): () => number {
  return () => (why === 'queue' ? adapter.queuePlace : 0);
}

function refuseUnwanted(adapter: Adapter, why: LoadReason): void {
  if (why === 'queue' && adapter.numInFlight === 0) throw new NobodyWaits();
}

/** @throws EngineError adapter_digest_mismatch */
export function checkDigest({ uri, digest }: Pick<AdapterSource, 'uri' | 'digest'>, actual: string): void {
  if (digest === null || digest === actual) return;
  throw new EngineError('adapter_digest_mismatch', `${uri}: expected digest ${digest}, got ${actual}`, {
    param: 'digest',
  });
}
