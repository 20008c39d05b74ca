/**
 * Where the bytes of registered adapters are: in the device arena, in the host arena, or only in their files. An adapter comes
 * up when a sequence wants it and goes when somebody needs its pages. Going is instant: what was read into the device is
 * written through to the host arena beside the steps, so leaving a tier is giving pages back, and never a copy.
 *
 * Pages are taken from adapters that no running sequence uses: those that nobody waits for, with what else is worth least
 * (ladder/reclaim.ts); and, for a load that the queue needs, those that only sequences further back in the queue wait for.
 * When even that is not enough, such a load chooses running adapters to drain: no sequence begins to run on those, so they
 * end, while all others go on. Pins never leave the device.
 *
 * A sequence may need several. It has one place in the queue for all of them, and pages are handed out in the order of
 * places: so the first sequence gets all of its adapters, whatever those behind it have, and two never wait for each other.
 */
import type { AdapterModule } from '../../native/index.ts';
import { EngineError, InvariantError } from '../errors.ts';
import type { Arena } from '../ladder/arena.ts';
import { copyShare, type EvictionRule, type Kept, rules } from '../ladder/policy.ts';
import { type Reclaimable, reclaim } from '../ladder/reclaim.ts';
import type { Tier } from '../protocol.ts';
import type { Place } from '../slots.ts';
import type { AdapterFile } from './adapter-tiers.ts';

export interface AdapterLoader {
  adapterPages(modules: AdapterModule[]): number;
  adapterBytes(modules: AdapterModule[]): number;
  loadAdapter(path: string, modules: AdapterModule[], pages: Int32Array): Promise<number>;
  attachAdapter(modules: AdapterModule[], pages: Int32Array): number;
  releaseAdapter(handle: number): void;
  copyPages(direction: 'toHost' | 'toDevice', from: Int32Array, to: Int32Array): Promise<{ seconds: number }>;
}

/** What residency keeps of an adapter. */
export interface Resident {
  readonly digest: string;
  readonly file: AdapterFile;
  readonly names: Set<string>;
  /** Somebody keeps it who needs no name for it. */
  isKept: boolean;
  /** In either arena; and how many bytes of those pages are its own. */
  readonly numPages: number;
  readonly usedBytes: number;
  device: { readonly pages: Int32Array; readonly handle: number } | null;
  /** Pages of the host arena with the same bytes, with or without those of the device. */
  host: Int32Array | null;
  /** Never leaves the device. */
  isPinned: boolean;
  /** On its way between tiers: it leaves none until that is over. */
  isMoving: boolean;
  /** Sequences, waiting or running, that use it. */
  numInFlight: number;
  /** Those of them that run: its pages and its handle stay. */
  numRunning: number;
  /** Place in the queue of the first sequence that waits for it; Infinity: none, or it just came. */
  queuePlace: number;
  /** As policy.ts counts them; 0 for one that was never used. */
  uses: number;
  lastUsedMs: number;
  /** Unix seconds of when it came to its tier. */
  since: number;
  /** Of its last way up: the wait for pages, and from its files or from the host arena; 0: it never went that way. */
  readonly seconds: { pages: number; disk: number; host: number };
}

/** Not so: its last sequences end, and it stays where it is until then, since its files may be others by now. */
export function isRegistered({ names, isKept }: Pick<Resident, 'names' | 'isKept'>): boolean {
  return names.size > 0 || isKept;
}

/** Bytes that went from one tier to another. */
export interface Move {
  from: Tier;
  to: Tier;
  seconds: number;
  bytes: number;
}

export interface ResidencyOptions {
  loader: AdapterLoader;
  arena: Arena;
  /** null: there is no host tier. */
  hostArena: Arena | null;
  /** Others who hold pages of the device arena that they could do without, and of the host arena. */
  holders?: readonly Reclaimable[];
  hostHolders?: readonly Reclaimable[];
  /** What leaves first. */
  rule: EvictionRule;
  /** Pages that must stay for KV, so that every running sequence can go on to its end. */
  numPagesKept: () => number;
  /** Called when a load begins or stops to wait for pages, and when pages came back: the scheduler must look again. */
  onChange: () => void;
  /** How long a load waits for pages that running sequences hold: one asked for by name, and one for the queue. */
  pageWaitMs: number;
  queueWaitMs: number;
  /** Milliseconds, never going back. */
  now: () => number;
  /** Unix milliseconds. */
  wallClock: () => number;
}

/** Why it comes up: sequences in the queue wait for it, or somebody asked for it by name. */
export type LoadReason = 'queue' | 'name';

interface PageWaiter {
  adapter: Resident;
  why: LoadReason;
  resolve: (pages: Int32Array) => void;
  reject: (error: Error) => void;
  timer: NodeJS.Timeout;
}

/** The last sequence that waited for the adapter has gone: there is nobody to be told. */
export class NobodyWaits extends Error {
  override name = 'NobodyWaits';
}

/** What copying a byte costs until it was measured; of adapters that were never brought back. */
const guessedBytesPerSecond = { host: 4e9, disk: 4e8 };

export class Residency {
  readonly #options: ResidencyOptions;
  readonly #onDevice = new Set<Resident>();
  readonly #onHost = new Set<Resident>();
  #numMoving = 0;
  /**
   * When they are served, those for the queue are first, in the order of their places; then those by name, first come,
   * first served. So a small one never passes a large one.
   */
  readonly #waiters: PageWaiter[] = [];
  readonly #draining = new Set<Resident>();
  /** Stay, and no sequence begins to run on them, so that KV comes back. */
  readonly #held = new Set<Resident>();
  /** What may leave the device for anybody: nobody wants it. */
  readonly idle: Reclaimable;
  readonly #hostCopies: Reclaimable;
  #isClosed = false;
  onMove: (move: Move) => void = () => {};
  onEviction: (tier: Tier) => void = () => {};

  constructor(options: ResidencyOptions) {
    this.#options = options;
    this.idle = this.#leavingDevice(isIdle);
    this.#hostCopies = this.#leavingHost(Number.POSITIVE_INFINITY);
  }

  /** Whether a sequence may begin to run on it. */
  isReady(adapter: Resident): boolean {
    return adapter.device !== null && !this.#draining.has(adapter) && !this.#held.has(adapter);
  }

  /** Whether something is on its way and has its pages: those that nothing could take now may be had when that is over. */
  get isCopying(): boolean {
    return this.#numMoving > this.#waiters.length;
  }

  /** Pages that loads wait for, without those that draining adapters will give back. */
  get numWantedPages(): number {
    let count = 0;
    for (const { adapter } of this.#waiters) count += adapter.numPages;
    for (const adapter of this.#draining) count -= adapter.numPages;
    return Math.max(0, count);
  }

  /** Pages that a sequence on those adapters can never have: those of pins, and theirs. */
  numPagesBeside(adapters: readonly Resident[]): number {
    let count = 0;
    for (const adapter of adapters) count += adapter.numPages;
    for (const other of this.#onDevice)
      if (other.isPinned && !adapters.includes(other)) count += other.numPages;
    return count;
  }

  tierOf(adapter: Resident): Tier {
    if (adapter.device) return 'device';
    return adapter.host ? 'host' : 'disk';
  }

  /**
   * Reads a checked file into pages of the device arena.
   * @throws EngineError adapter_invalid when the native side refuses it; arena_full when the pages are not there in time
   */
  async load(adapter: Resident, file: AdapterFile, why: LoadReason, place: Place): Promise<void> {
    const { loader } = this.#options;
    const seconds = await this.#bringUp(adapter, why, place, async (pages) => {
      try {
        return await loader.loadAdapter(file.path, file.modules, pages);
      } catch (cause) {
        const reason = cause instanceof Error ? cause.message : String(cause);
        throw new EngineError('adapter_invalid', `lora_path: the adapter was refused: ${reason}`, {
          param: 'lora_path',
          cause,
        });
      }
    });
    adapter.seconds.disk = seconds;
    this.#tell('disk', 'device', adapter, seconds);
  }

  /** Copies it from the host arena to the device arena. */
  async raise(adapter: Resident, why: LoadReason, place: Place): Promise<void> {
    const { loader } = this.#options;
    const seconds = await this.#bringUp(adapter, why, place, async (pages) => {
      const copy = loader.copyPages('toDevice', adapter.host!, pages);
      try {
        return loader.attachAdapter(adapter.file.modules, pages); // meanwhile: it reads no byte of them
      } finally {
        await copy;
      }
    });
    adapter.seconds.host = seconds;
    this.#tell('host', 'device', adapter, seconds);
  }

  /** Whether the host arena could take it and has not. */
  mayWriteThrough(adapter: Resident): boolean {
    return this.#options.hostArena !== null && adapter.device !== null && adapter.host === null;
  }

  /** Writes what the device holds through to the host arena, when there is room or what has it is worth less. */
  async writeThrough(adapter: Resident): Promise<void> {
    const { loader, hostArena, hostHolders = [], now } = this.#options;
    if (!this.mayWriteThrough(adapter)) throw new InvariantError('nothing to write through');
    const rank = hostRank(adapter, this.#options);
    if (!reclaim(hostArena!, adapter.numPages, [this.#leavingHost(rank), ...hostHolders], rank)) return;
    const pages = new Int32Array(adapter.numPages);
    hostArena!.take('adapter', pages.length, pages);
    const beginMs = now();
    try {
      await loader.copyPages('toHost', adapter.device!.pages, pages);
    } catch (error) {
      hostArena!.giveBack('adapter', pages);
      throw error;
    }
    adapter.host = pages;
    this.#onHost.add(adapter);
    this.#tell('device', 'host', adapter, (now() - beginMs) / 1000);
  }

  /** It is on its way while `work` runs: it leaves no tier, and no other work on it begins. */
  async whileMoving<T>(adapter: Resident, work: () => Promise<T>): Promise<T> {
    if (adapter.isMoving) throw new InvariantError(`adapter ${adapter.digest} is on its way already`);
    adapter.isMoving = true;
    this.#numMoving++;
    try {
      return await work();
    } finally {
      adapter.isMoving = false;
      this.#numMoving--;
      this.#options.onChange();
    }
  }

  /**
   * Its bytes leave both arenas.
   * @returns what it had there
   * @throws InvariantError when a sequence has it, or it is on its way
   */
  drop(adapter: Resident): { deviceBytes: number; hostBytes: number } {
    if (adapter.numInFlight > 0 || adapter.isMoving) {
      throw new InvariantError(`adapter ${adapter.digest} is dropped while it is used or on its way`);
    }
    const numBytes = adapter.numPages * this.#options.arena.pageBytes;
    const dropped = {
      deviceBytes: adapter.device ? numBytes : 0,
      hostBytes: adapter.host ? numBytes : 0,
    };
    if (adapter.device) this.#leaveDevice(adapter);
    if (adapter.host) this.#leaveHost(adapter);
    this.#options.onChange();
    return dropped;
  }

  /**
   * Everything on which no sequence runs leaves the device, wanted or not, but pins and `kept`: the last resort when nothing
   * else can go on. @returns whether anything left
   */
  evictWaiting(kept: readonly Resident[] = []): boolean {
    const resting = [...this.#onDevice].filter((adapter) => isResting(adapter) && !kept.includes(adapter));
    for (const adapter of resting) this.#evict(adapter);
    return resting.length > 0;
  }

  /** The host arena's pages of adapters, for others who need some there. */
  get hostCopies(): Reclaimable {
    return this.#hostCopies;
  }

  /** Hands pages to the loads that wait for them. Call it when pages came back or sequences ended. */
  servePageWaiters(): void {
    this.#waiters.sort(byUrgency);
    while (this.#waiters.length > 0) {
      const waiter = this.#waiters[0]!;
      const isWanted = waiter.why === 'name' || waiter.adapter.numInFlight > 0;
      const pages = isWanted ? this.#tryTake(waiter) : null;
      if (isWanted && !pages) break;
      this.#waiters.shift();
      clearTimeout(waiter.timer);
      if (pages) waiter.resolve(pages);
      else waiter.reject(new NobodyWaits());
    }
    this.#chooseDraining();
  }

  /** Too many come up for the queue for this one to begin: the last that only waits for pages, and is behind it, begins anew later. */
  giveWay({ queuePlace }: Resident): void {
    this.#waiters.sort(byUrgency);
    const waiter = this.#waiters.findLast(({ why }) => why === 'queue');
    if (!waiter || waiter.adapter.queuePlace <= queuePlace) return;
    this.#waiters.splice(this.#waiters.indexOf(waiter), 1);
    clearTimeout(waiter.timer);
    waiter.reject(new NobodyWaits());
  }

  /** Refuses the loads that wait for pages. */
  close(): void {
    this.#isClosed = true;
    for (const waiter of this.#waiters.splice(0)) {
      clearTimeout(waiter.timer);
      waiter.reject(new EngineError('draining', 'the engine is shutting down'));
    }
    this.#draining.clear();
    this.#held.clear();
  }

  /** @param fill writes the pages. @returns how long that took, in seconds */
  async #bringUp(
    adapter: Resident,
    why: LoadReason,
    place: Place,
    fill: (pages: Int32Array) => Promise<number>,
  ): Promise<number> {
    const { arena, now } = this.#options;
    const beginMs = now();
    const takePages = () => this.#takePages(adapter, why);
    // Loads by name are bounded by their places, those for the queue by how many come up at once: one that waits for pages
    // must not keep an adapter from coming up without which none of them may ever get any.
    const pages = why === 'name' ? await takePages() : await place.leave(takePages);
    const takenMs = now();
    try {
      adapter.device = { pages, handle: await fill(pages) };
    } catch (error) {
      arena.giveBack('adapter', pages);
      throw error;
    }
    this.#onDevice.add(adapter);
    adapter.since = this.#options.wallClock() / 1000;
    adapter.seconds.pages = (takenMs - beginMs) / 1000;
    return (now() - takenMs) / 1000;
  }

  /** Pages at once, or when they come back in time. No sequence is stopped for them. */
  #takePages(adapter: Resident, why: LoadReason): Promise<Int32Array> {
    const { arena, pageWaitMs, queueWaitMs, onChange } = this.#options;
    if (this.#isClosed) throw new EngineError('draining', 'the engine is shutting down');
    // What sequences and other adapters hold comes back; what pins hold does not, unless someone unloads one.
    if (this.numPagesBeside([adapter]) > arena.numPages) throw this.#arenaFull(adapter);
    const { resolve, reject, promise } = Promise.withResolvers<Int32Array>();
    const giveUp = () => {
      this.#waiters.splice(this.#waiters.indexOf(waiter), 1);
      reject(this.#arenaFull(adapter));
      this.servePageWaiters();
      onChange();
    };
    const timer = setTimeout(giveUp, why === 'queue' ? queueWaitMs : pageWaitMs);
    const waiter: PageWaiter = { adapter, why, resolve, reject, timer };
    this.#waiters.push(waiter);
    this.servePageWaiters();
    onChange();
    return promise;
  }

  #tryTake(waiter: PageWaiter): Int32Array | null {
    const { arena, holders = [], numPagesKept } = this.#options;
    const { adapter } = waiter;
    const mayLeave = (other: Resident) => isIdle(other) || (isForQueue(waiter) && isBehind(other, adapter));
    const leaving = this.#leavingDevice(mayLeave);
    const numStaying = arena.numUsed('adapter') - leaving.numReclaimablePages;
    if (numStaying + adapter.numPages + numPagesKept() > arena.numPages) return null;
    if (!reclaim(arena, adapter.numPages, [leaving, ...holders])) return null;
    const pages = new Int32Array(adapter.numPages);
    arena.take('adapter', pages.length, pages);
    return pages;
  }

  /**
   * While the first load for the queue has no pages: which running adapters no sequence may begin on, so that theirs come.
   * Those are the ones with the fewest sequences running, and none that a sequence waits for before it. The others that the
   * same sequence waits for stay; when all that is not enough none begins on them, so that they end and their KV is back.
   */
  #chooseDraining(): void {
    const { arena, numPagesKept } = this.#options;
    this.#draining.clear();
    this.#held.clear();
    const [waiter] = this.#waiters;
    if (!waiter || !isForQueue(waiter)) return;
    const { adapter } = waiter;
    let numStaying = arena.numUsed('adapter');
    for (const other of this.#onDevice) {
      if (isIdle(other) || isBehind(other, adapter)) numStaying -= other.numPages;
    }
    const order = [...this.#onDevice]
      .filter((other) => other.numRunning > 0 && !other.isPinned && isRegistered(other))
      .filter((other) => other.queuePlace > adapter.queuePlace)
      .sort((a, b) => a.numRunning - b.numRunning || a.lastUsedMs - b.lastUsedMs);
    for (const other of order) {
      if (numStaying + adapter.numPages + numPagesKept() <= arena.numPages) break;
      this.#draining.add(other);
      numStaying -= other.numPages;
    }
    if (numStaying + adapter.numPages + numPagesKept() <= arena.numPages) return;
    for (const other of this.#onDevice) {
      if (other.numRunning > 0 && other.queuePlace === adapter.queuePlace) this.#held.add(other);
    }
  }

  #leavingDevice(mayLeave: (adapter: Resident) => boolean): Reclaimable {
    const rankOf = (adapter: Resident) => deviceRank(adapter, this.#options);
    return leaving(this.#onDevice, mayLeave, rankOf, this.#evict);
  }

  /** @param below only what ranks lower */
  #leavingHost(below: number): Reclaimable {
    const rankOf = (adapter: Resident) => hostRank(adapter, this.#options);
    const mayLeave = (adapter: Resident) =>
      !adapter.isMoving && (isRegistered(adapter) || adapter.device !== null) && rankOf(adapter) < below;
    return leaving(this.#onHost, mayLeave, rankOf, (adapter) => {
      this.#leaveHost(adapter);
      this.onEviction('host');
    });
  }

  #evict = (adapter: Resident): void => {
    this.#leaveDevice(adapter);
    this.onEviction('device');
  };

  #leaveDevice(adapter: Resident): void {
    const { loader, arena } = this.#options;
    loader.releaseAdapter(adapter.device!.handle);
    arena.giveBack('adapter', adapter.device!.pages);
    adapter.device = null;
    adapter.since = this.#options.wallClock() / 1000;
    this.#onDevice.delete(adapter);
  }

  #leaveHost(adapter: Resident): void {
    this.#options.hostArena!.giveBack('adapter', adapter.host!);
    adapter.host = null;
    if (!adapter.device) adapter.since = this.#options.wallClock() / 1000;
    this.#onHost.delete(adapter);
  }

  #tell(from: Tier, to: Tier, adapter: Resident, seconds: number): void {
    this.onMove({ from, to, seconds, bytes: adapter.numPages * this.#options.arena.pageBytes });
  }

  #arenaFull(adapter: Resident): EngineError {
    const { arena, pageWaitMs } = this.#options;
    const bytes = (pages: number) => `${pages * arena.pageBytes} bytes`;
    const numPinned = this.numPagesBeside([]);
    return new EngineError(
      'arena_full',
      `the adapter needs ${bytes(adapter.numPages)} of the device arena, ${bytes(arena.numFree)} are free ` +
        `(${bytes(arena.numUsed('adapter'))} hold adapters, ${bytes(numPinned)} of them pinned, ` +
        `${bytes(arena.numUsed('kv'))} hold KV, ${bytes(arena.numPages)} in all); ` +
        'retry when running sequences have ended, unpin an adapter, or give the engine more --device-memory',
      { param: 'lora_path', retryAfterSeconds: Math.max(1, Math.ceil(pageWaitMs / 1000)) },
    );
  }
}

/** A sequence waits for it, whoever asked first. */
function isForQueue({ adapter, why }: PageWaiter): boolean {
  return why === 'queue' || adapter.queuePlace < Number.POSITIVE_INFINITY;
}

function byUrgency(a: PageWaiter, b: PageWaiter): number {
  if (isForQueue(a) !== isForQueue(b)) return isForQueue(a) ? -1 : 1;
  const [left, right] = [a.adapter.queuePlace, b.adapter.queuePlace];
  return left === right ? 0 : left - right;
}

/** Nobody runs on it, and it may be let go. */
function isResting({ isPinned, isMoving, numRunning }: Resident): boolean {
  return !isPinned && !isMoving && numRunning === 0;
}

function isIdle(adapter: Resident): boolean {
  return isResting(adapter) && adapter.numInFlight === 0;
}

/** Only sequences further back in the queue wait for it. */
function isBehind(other: Resident, adapter: Resident): boolean {
  return isResting(other) && isRegistered(other) && other.queuePlace > adapter.queuePlace;
}

/** Those of `all` that may leave, the lowest rank first. */
function leaving(
  all: Iterable<Resident>,
  mayLeave: (adapter: Resident) => boolean,
  rankOf: (adapter: Resident) => number,
  evict: (adapter: Resident) => void,
): Reclaimable {
  return {
    kind: 'adapter',
    get numReclaimablePages() {
      let count = 0;
      for (const adapter of all) if (mayLeave(adapter)) count += adapter.numPages;
      return count;
    },
    next() {
      let least: Resident | null = null;
      let rank = Number.POSITIVE_INFINITY;
      for (const adapter of all) {
        if (!mayLeave(adapter)) continue;
        const own = rankOf(adapter);
        if (least !== null && own >= rank) continue;
        least = adapter;
        rank = own;
      }
      if (least === null) return null;
      const chosen = least;
      return { rank, evict: () => evict(chosen) };
    },
  };
}

/** What keeping it on the device saves: the way up from the host arena where it is there too, else from its files. */
function deviceRank(adapter: Resident, { arena, rule }: ResidencyOptions): number {
  return rules[rule](kept(adapter, arena.pageBytes, adapter.host ? 'host' : 'disk', 1));
}

/** What keeping it in the host arena saves: the way from its files, hardly ever when the device has it. */
function hostRank(adapter: Resident, { arena, rule }: ResidencyOptions): number {
  return rules[rule](kept(adapter, arena.pageBytes, 'disk', adapter.device ? copyShare : 1));
}

function kept(adapter: Resident, pageBytes: number, from: 'host' | 'disk', share: number): Kept {
  const numBytes = adapter.numPages * pageBytes;
  const restoreSeconds = adapter.seconds[from] || numBytes / guessedBytesPerSecond[from];
  const { uses, lastUsedMs } = adapter;
  return { restoreSeconds: restoreSeconds * share, numBytes, uses, lastUsedMs };
}
