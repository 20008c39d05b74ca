/**
 * KV blocks on disk, below the host arena: a file a block under `<folder>/<model>/<voice>/<hash>.<depth>`, found again after a
 * restart. Whoever reads a block gets the very bytes that were written for its hash with this model, or nothing.
 *
 * Whatever changes the folder (writes, removals, looks around, purges) is done by one worker, one thing after the other, so the books
 * are what is on disk; reads run beside it. At most one change and `maxReading` reads are under way, so a disk that stalls leaves
 * a thread of the pool to others. Nobody waits for the disk: a block that finds no place in the line is dropped, a read that is
 * late is nothing found, and after a failure the disk is left alone for a while.
 *
 * Engines may share the folder. A block that another one removed is not there; what another one wrote is seen at the next look
 * around, and until then the budget may be passed by that much. Blocks of all models share the budget: what is worth least leaves, and
 * of another model's block only its age is known. Nothing is synced: what a power cut leaves half written has a wrong checksum.
 */
import { hash as hashOf } from 'node:crypto';
import { dirname, join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import type { Logger } from 'pino';
import { EngineError } from '../errors.ts';
import type { KvKeeper } from '../purge.ts';
import { removeTemporary, sweepTemporaries, temporaryPath } from '../temporary-files.ts';
import { blockIn, headerBytes, headerOf, sha256 } from './block-file.ts';
import type { BlockHash } from './block-hash.ts';
import { type DiskFiles, diskFiles } from './disk-files.ts';
import { type Leaving, LeavingQueue } from './leaving-queue.ts';
import { type EvictionRule, rules, touch } from './policy.ts';
import { Rest } from './rest.ts';

export interface KvDiskOptions {
  folder: string;
  /** Of the folder, whatever models it has; in whole 4 KiB of each file. */
  budgetBytes: number;
  blockBytes: number;
  /** As modelKeyOf makes it. */
  modelKey: string;
  rule: EvictionRule;
  /** What making a block of that depth anew costs. */
  restoreSeconds: (depth: number) => number;
  log: Pick<Logger, 'info' | 'warn'>;
  /** Milliseconds, never going back. */
  now: () => number;
  /** Unix milliseconds: ages of files are kept over restarts. */
  wallClock: () => number;
  files?: DiskFiles;
  limits?: Partial<KvDiskLimits>;
}

export interface KvDiskLimits {
  /** Blocks that wait to be written; one is taken in any case. */
  maxLineBytes: number;
  /** Reads that wait for others. */
  maxWaitingReads: number;
  /** A read that takes longer is taken for a stalled disk. */
  readMs: number;
  /** A change that takes longer is taken for a stalled disk; a look or a purge has ten times as long. */
  changeMs: number;
  /** What a purge waits for the disk, what `close` does, and what `open` does. */
  purgeMs: number;
  closeMs: number;
  openMs: number;
  /** Between two looks at what others did in the folder; longer, when looking takes long. */
  lookMs: number;
}

const usualLimits: KvDiskLimits = {
  maxLineBytes: 64 * 2 ** 20,
  maxWaitingReads: 1024,
  readMs: 1000,
  changeMs: 5000,
  purgeMs: 10_000,
  closeMs: 2000,
  openMs: 5000,
  lookMs: 15_000,
};

/** One reads while the other's checksum is made. */
const maxReading = 2;
/** A temporary file that nobody wrote to for so long is nobody's: writing one takes milliseconds. */
const abandonedMs = 600_000;
/** A look at a big folder is work for the main thread too: the pause is so many times what the look took. */
const pausePerLook = 20;
/** What disks give to a file comes in such units. */
const unitBytes = 4096;
/** Until a read was measured: a slow disk's. */
const guessedSecondsPerByte = 1 / 200e6;
/** Of what came before, at each new measure. */
const fading = 0.9;
/** Of a file that was found: how often it was used is not written down. As block-pool.ts counts what was only made. */
const foundUses = 1 / 16;
/** A measure is believed less the older it is, so that a disk that was slow is tried again. */
const measureHalfLifeMs = 60_000;

/** A block that is offered. */
export interface OfferedBlock {
  readonly hash: BlockHash;
  readonly voice: string;
  /** Its index in a block table. */
  readonly depth: number;
  readonly uses: number;
  /** On the clock of `now`. */
  readonly lastUsedMs: number;
}

/** Blocks that were not written, by reason. */
export const dropReasons = ['line_full', 'resting', 'failed', 'worth_least'] as const;
/** What became of reads: `gone` was removed by another engine or by hand, `busy` found the line full or the disk stalled. */
export const readResults = ['hit', 'damaged', 'gone', 'late', 'busy', 'failed'] as const;
/** Why files were removed. */
export const removalReasons = ['budget', 'damaged', 'purged'] as const;
export type ReadResult = (typeof readResults)[number];

export interface KvDiskCounts {
  written: number;
  dropped: Record<(typeof dropReasons)[number], number>;
  reads: Record<ReadResult, number>;
  removed: Record<(typeof removalReasons)[number], number>;
}

/** A file of the folder. */
interface Entry extends Leaving {
  readonly hash: BlockHash;
  /** Of the model and the voice, below the folder. */
  readonly place: string;
  sizeBytes: number;
  uses: number;
  /** Unix milliseconds. */
  lastUsedMs: number;
  /** Not to be found any more, and the next to be removed. */
  unwanted: 'damaged' | 'purged' | null;
}

interface Write extends OfferedBlock {
  bytes: Buffer<ArrayBuffer>;
  isForgotten: boolean;
}

interface Read {
  entry: Entry;
  end: (result: ReadResult, bytes: Buffer<ArrayBuffer> | null) => void;
  isOver: boolean;
}

interface Purge {
  tag: string;
  end: (result: number | Error) => void;
}

export class KvDisk implements KvKeeper {
  readonly #options: KvDiskOptions;
  readonly #limits: KvDiskLimits;
  readonly #files: DiskFiles;
  readonly #modelFolder: string;
  readonly #fileBytes: number;
  /** Of this model, by hash. */
  readonly #byHash = new Map<BlockHash, Entry>();
  /** Of other models, by path below the folder. */
  readonly #others = new Map<string, Entry>();
  readonly #queue = new LeavingQueue<Entry>();
  #bytes = 0;
  /** What the disk has room for, which may be less than the budget. */
  #roomBytes: number;
  /** Used since their files' times were set. */
  readonly #touched = new Set<Entry>();
  /** First come, first written; the first one may be under way. */
  readonly #line = new Map<BlockHash, Write>();
  /** Who waits for room in it. */
  #onRoom: (() => void)[] = [];
  readonly #purges: Purge[] = [];
  #isLookDue = true;
  #isWoken = false;
  #working: Promise<void> | null = null;
  readonly #waitingReads: Read[] = [];
  readonly #reading = new Set<Read>();
  readonly #reads: Rest;
  readonly #writes: Rest;
  #timer: NodeJS.Timeout | null = null;
  #isClosed = false;
  #hasToldOfDamage = false;
  #readSeconds: number | null = null;
  #measuredMs = 0;
  readonly counts: KvDiskCounts = {
    written: 0,
    dropped: { line_full: 0, resting: 0, failed: 0, worth_least: 0 },
    reads: { hit: 0, damaged: 0, gone: 0, late: 0, busy: 0, failed: 0 },
    removed: { budget: 0, damaged: 0, purged: 0 },
  };
  /** Called with what each read that asked the disk took. */
  onRead: (seconds: number) => void = () => {};

  private constructor(options: KvDiskOptions) {
    this.#options = options;
    this.#limits = { ...usualLimits, ...options.limits };
    this.#files = options.files ?? diskFiles;
    this.#modelFolder = options.modelKey.slice(0, 32);
    this.#fileBytes = footprint(headerBytes + options.blockBytes);
    this.#roomBytes = options.budgetBytes;
    const rest = (what: string) =>
      new Rest({
        now: options.now,
        onChange: (isWorking, reason) => {
          const { folder, log } = options;
          if (isWorking) log.info({ folder }, `KV on disk: ${what} work again`);
          else log.warn({ folder, reason: reasonOf(reason) }, `KV on disk: ${what} fail and rest`);
        },
      });
    this.#reads = rest('reads');
    this.#writes = rest('writes');
  }

  /** Finds what earlier processes left, by names and sizes alone. A disk that is away does not keep it from opening. */
  static async open(options: KvDiskOptions): Promise<KvDisk> {
    const disk = new KvDisk(options);
    if (disk.#fileBytes > options.budgetBytes) {
      const needed = { budgetBytes: options.budgetBytes, blockBytes: disk.#fileBytes };
      options.log.warn(needed, 'KV on disk: the budget has no room for one block');
    }
    await Promise.race([disk.#wake(), delay(disk.#limits.openMs, null, { ref: false })]);
    disk.#lookAgainLater(0);
    return disk;
  }

  #lookAgainLater(tookMs: number): void {
    const waitMs = Math.max(this.#limits.lookMs, pausePerLook * tookMs);
    this.#timer = setTimeout(async () => {
      const beganMs = this.#options.now();
      this.#isLookDue = true;
      this.#hasToldOfDamage = false;
      await this.#wake();
      if (!this.#isClosed) this.#lookAgainLater(this.#options.now() - beganMs);
    }, waitMs).unref();
  }

  /** Of all files, of other models too. */
  get numBytes(): number {
    return this.#bytes;
  }

  /** Of this model. */
  get numBlocks(): number {
    return this.#byHash.size;
  }

  /** Which of the two are left alone after failures. */
  get resting(): { reads: boolean; writes: boolean } {
    return { reads: this.#reads.isFailing, writes: this.#writes.isFailing };
  }

  /** What reading one block takes, checksum included, as far as it was measured lately. */
  get secondsPerBlock(): number {
    const guessed = this.#options.blockBytes * guessedSecondsPerByte;
    if (this.#readSeconds === null) return guessed;
    const belief = 2 ** ((this.#measuredMs - this.#options.now()) / measureHalfLifeMs);
    return guessed + belief * (this.#readSeconds - guessed);
  }

  /** Whether it is there, or about to be written. */
  keeps(hash: BlockHash): boolean {
    return this.#line.has(hash) || this.#byHash.get(hash)?.unwanted === null;
  }

  /** Whether a read may find it now. */
  has(hash: BlockHash): boolean {
    if (this.#line.has(hash)) return true;
    const entry = this.#byHash.get(hash);
    return entry !== undefined && entry.unwanted === null && !this.#reads.isResting;
  }

  /**
   * Takes the bytes over, to be written soon.
   * @returns false when they are not taken: the line is full, the disk rests, or it is closed
   */
  write(block: OfferedBlock, bytes: Buffer<ArrayBuffer>): boolean {
    const { blockBytes } = this.#options;
    if (bytes.length !== blockBytes) {
      throw new RangeError(`bytes: expected ${blockBytes} of one block, got ${bytes.length}`);
    }
    const entry = this.#byHash.get(block.hash);
    if (this.#line.has(block.hash) || entry?.unwanted === null) {
      this.touch(block.hash);
      return true;
    }
    if (!this.#takes()) return false;
    const { hash, voice, depth, uses, lastUsedMs } = block;
    this.#line.set(hash, { hash, voice, depth, uses, lastUsedMs, bytes, isForgotten: false });
    void this.#wake();
    return true;
  }

  #takes(): boolean {
    const { dropped } = this.counts;
    if (this.#isClosed) return false;
    if (this.#writes.isResting) dropped.resting++;
    else if (this.#isLineFull) dropped.line_full++;
    else return true;
    return false;
  }

  get #isLineFull(): boolean {
    const { blockBytes } = this.#options;
    return this.#line.size > 0 && (this.#line.size + 1) * blockBytes > this.#limits.maxLineBytes;
  }

  /** Waits until the line takes one more. @returns false: not within that time, or the disk rests, or it is closed */
  async roomInLine(withinMs: number): Promise<boolean> {
    const endMs = this.#options.now() + withinMs;
    while (!this.#isClosed && !this.#writes.isResting) {
      if (!this.#isLineFull) return true;
      const leftMs = endMs - this.#options.now();
      if (leftMs <= 0) return false;
      const room = new Promise<void>((resolve) => this.#onRoom.push(resolve));
      await Promise.race([room, delay(leftMs, null, { ref: false })]);
    }
    return false;
  }

  /**
   * @param withinMs  what the caller waits: later than that it finds nothing
   * @returns the block's bytes, not to be changed; null: not there, damaged, late, or an error
   */
  async read(hash: BlockHash, withinMs = this.#limits.readMs): Promise<Buffer<ArrayBuffer> | null> {
    const { reads } = this.counts;
    const write = this.#line.get(hash);
    if (write) {
      reads.hit++;
      return write.bytes;
    }
    if (!this.has(hash) || this.#isClosed) return null;
    if (this.#waitingReads.length >= this.#limits.maxWaitingReads || this.#isStalled()) {
      reads.busy++;
      return null;
    }
    this.touch(hash);
    const entry = this.#byHash.get(hash)!;
    return new Promise((resolve) => {
      const timer = setTimeout(() => read.end('late', null), withinMs);
      const end = (result: ReadResult, bytes: Buffer<ArrayBuffer> | null) => {
        if (read.isOver) return;
        read.isOver = true;
        clearTimeout(timer);
        reads[result]++;
        resolve(bytes);
      };
      const read: Read = { entry, end, isOver: false };
      this.#waitingReads.push(read);
      this.#readOn();
    });
  }

  /** It was used, here or in a tier above. */
  touch(hash: BlockHash): void {
    const entry = this.#byHash.get(hash);
    if (!entry || entry.unwanted) return;
    touch(entry, this.#options.wallClock());
    this.#touched.add(entry);
    this.#rank(entry);
  }

  /** From now on it is not found; its file is removed soon. */
  forget(hash: BlockHash): void {
    this.#forgetWrite(this.#line.get(hash));
    const entry = this.#byHash.get(hash);
    if (entry) this.#discard(entry, 'purged');
    void this.#wake();
  }

  /**
   * Removes all blocks made with the adapter, alone or in a composition, whatever process and model they are of.
   * @throws EngineError purge_incomplete, when files of it may be left
   */
  async purge(digest: string): Promise<{ device: number; host: number; disk: number }> {
    for (const write of this.#line.values()) if (write.voice.includes(digest)) this.#forgetWrite(write);
    const tag = tagOf(digest);
    for (const entry of this.#entries()) if (isOfTag(entry.place, tag)) this.#discard(entry, 'purged');
    const done = Promise.withResolvers<number | Error>();
    this.#purges.push({ tag, end: done.resolve });
    void this.#wake();
    const { purgeMs } = this.#limits;
    const late = new Error(`no answer within ${purgeMs} ms`);
    const result = await Promise.race([done.promise, delay(purgeMs, late, { ref: false })]);
    if (typeof result === 'number') return { device: 0, host: 0, disk: result };
    throw new EngineError(
      'purge_incomplete',
      `KV of ${digest} may still be on disk: ${reasonOf(result)}; ask again`,
      { cause: result },
    );
  }

  /** Looks at once at what others did in the folder, and resolves when that and all that was to be written is done. */
  async settle(): Promise<void> {
    this.#isLookDue = true;
    await this.#wake();
  }

  /** Takes no more. Writes what is in line, as far as time allows. */
  async close(): Promise<void> {
    if (this.#timer) clearTimeout(this.#timer);
    this.#isClosed = true;
    for (const read of this.#waitingReads.splice(0)) read.end('busy', null);
    const { closeMs } = this.#limits;
    const isDone = this.#wake().then(() => this.#setTimes());
    await Promise.race([isDone.catch(() => {}), delay(closeMs, null, { ref: false })]);
    for (const write of this.#line.values()) this.#forgetWrite(write);
  }

  /** @throws Error when the books do not add up. For tests. */
  check(): void {
    let bytes = 0;
    let numEntries = 0;
    for (const entry of this.#entries()) {
      numEntries++;
      bytes += entry.sizeBytes;
      if (entry.queueIndex < 0) throw new Error('a block of the books is not queued');
    }
    if (bytes !== this.#bytes || numEntries !== this.#queue.size)
      throw new Error(
        `${bytes} bytes of ${numEntries} blocks: the books say ${this.#bytes}, ${this.#queue.size}`,
      );
  }

  *#entries(): Iterable<Entry> {
    yield* this.#byHash.values();
    yield* this.#others.values();
  }

  // Reads

  /** Every reader waits for an answer that is late already. */
  #isStalled(): boolean {
    return this.#reading.size === maxReading && [...this.#reading].every(({ isOver }) => isOver);
  }

  #readOn(): void {
    while (this.#reading.size < maxReading && this.#waitingReads.length > 0) {
      const read = this.#waitingReads.shift()!;
      if (read.isOver) continue;
      this.#reading.add(read);
      void this.#read(read).finally(() => {
        this.#reading.delete(read);
        this.#readOn();
      });
    }
  }

  async #read(read: Read): Promise<void> {
    const { modelKey, blockBytes, now } = this.#options;
    const { entry } = read;
    const { readMs } = this.#limits;
    const beganMs = now();
    const stall = setTimeout(() => this.#reads.failed(`no answer within ${readMs} ms`), readMs);
    try {
      const file = await this.#files.read(this.#pathOf(entry), headerBytes + blockBytes);
      const bytes = file && (await blockIn(file, modelKey, entry.hash));
      this.#measure((now() - beganMs) / 1000);
      this.#reads.worked();
      // Meanwhile it may have been forgotten.
      if (bytes) read.end(entry.unwanted ? 'gone' : 'hit', entry.unwanted ? null : bytes);
      else this.#damaged(read);
    } catch (error) {
      const isGone = (error as NodeJS.ErrnoException).code === 'ENOENT';
      if (isGone) this.#drop(entry);
      else {
        this.#reads.failed(error);
        // It may be this file alone that cannot be read: it is not tried again.
        if ((error as NodeJS.ErrnoException).code === 'EIO') this.#discard(entry, 'damaged');
      }
      read.end(isGone ? 'gone' : 'failed', null);
    } finally {
      clearTimeout(stall);
    }
  }

  #damaged(read: Read): void {
    this.#discard(read.entry, 'damaged');
    read.end('damaged', null);
    if (!this.#hasToldOfDamage) {
      this.#hasToldOfDamage = true;
      const { folder, log } = this.#options;
      log.warn({ folder }, 'KV on disk: a damaged file is removed; the metrics count more of them');
    }
    void this.#wake();
  }

  #measure(seconds: number): void {
    this.onRead(seconds);
    this.#readSeconds =
      this.#readSeconds === null ? seconds : fading * this.#readSeconds + (1 - fading) * seconds;
    this.#measuredMs = this.#options.now();
  }

  // Books

  #pathOf({ place, hash, depth }: Pick<Entry, 'place' | 'hash' | 'depth'>): string {
    return join(this.#options.folder, place, nameOf(hash, depth));
  }

  #add(entry: Entry): void {
    if (this.#isOurs(entry)) this.#byHash.set(entry.hash, entry);
    else this.#others.set(keyOf(entry), entry);
    this.#bytes += entry.sizeBytes;
    this.#queue.add(entry);
    this.#rank(entry);
  }

  /** Its file is gone. */
  #drop(entry: Entry): void {
    if (entry.queueIndex < 0) return;
    this.#queue.remove(entry);
    this.#touched.delete(entry);
    if (this.#isOurs(entry)) this.#byHash.delete(entry.hash);
    else this.#others.delete(keyOf(entry));
    this.#bytes -= entry.sizeBytes;
  }

  /** It is not found any more. Its file counts until it is removed. */
  #discard(entry: Entry, reason: 'damaged' | 'purged'): void {
    if (entry.queueIndex < 0 || entry.unwanted) return;
    entry.unwanted = reason;
    this.#touched.delete(entry);
    this.#rank(entry);
  }

  #isOurs({ place }: Entry): boolean {
    return place.startsWith(this.#modelFolder);
  }

  #rank(entry: Entry): void {
    this.#queue.remove(entry);
    entry.rank = entry.unwanted ? Number.NEGATIVE_INFINITY : this.#rankOf(entry);
    this.#queue.add(entry);
  }

  #rankOf({ depth, uses, lastUsedMs }: Pick<Entry, 'depth' | 'uses' | 'lastUsedMs'>): number {
    const { rule, restoreSeconds } = this.#options;
    return rules[rule]({
      restoreSeconds: restoreSeconds(depth),
      numBytes: this.#fileBytes,
      uses,
      lastUsedMs,
    });
  }

  #forgetWrite(write: Write | undefined): void {
    if (!write) return;
    write.isForgotten = true;
    this.#takeOut(write);
  }

  #takeOut(write: Write): void {
    // When it was forgotten another one may have come for its hash.
    if (this.#line.get(write.hash) === write) this.#line.delete(write.hash);
    for (const resolve of this.#onRoom.splice(0)) resolve();
  }

  // Changes

  #wake(): Promise<void> {
    this.#isWoken = true;
    this.#working ??= this.#work();
    return this.#working;
  }

  async #work(): Promise<void> {
    // Not at once: what else this turn brings goes along.
    await Promise.resolve();
    while (this.#isWoken) {
      this.#isWoken = false;
      await this.#doAll();
    }
    this.#working = null;
  }

  /** Does what is to be done, until there is nothing more or the disk rests. */
  async #doAll(): Promise<void> {
    while (true) {
      const purge = this.#purges.shift();
      if (purge) {
        const files = this.#inTime(10, () => this.#purgeFiles(purge.tag));
        purge.end(await files.catch((error: Error) => error));
        continue;
      }
      if (this.#writes.isResting) return this.#dropLine('resting');
      try {
        if (!(await this.#doNext())) return;
      } catch (error) {
        const { code } = error as NodeJS.ErrnoException;
        // What is full stays full until somebody makes room: then one block goes for one that comes.
        if (code === 'ENOSPC' || code === 'EDQUOT') this.#roomBytes = Math.min(this.#roomBytes, this.#bytes);
        this.#writes.failed(error);
        this.#dropLine('failed');
      }
    }
  }

  /** @returns false: there is nothing to do */
  async #doNext(): Promise<boolean> {
    const first = this.#queue.first();
    const [write] = this.#line.values();
    if (first && (first.unwanted || this.#bytes > this.#roomBytes))
      await this.#inTime(1, () => this.#remove(first));
    else if (this.#isLookDue) await this.#inTime(10, () => this.#look());
    else if (write) await this.#inTime(1, () => this.#write(write));
    else return false;
    return true;
  }

  /** While it takes too long, writes rest: the line must not fill up behind it. */
  async #inTime<T>(times: number, change: () => Promise<T>): Promise<T> {
    const changeMs = times * this.#limits.changeMs;
    const timer = setTimeout(() => {
      this.#writes.failed(`no answer within ${changeMs} ms`);
      this.#dropLine('failed');
    }, changeMs);
    try {
      return await change();
    } finally {
      clearTimeout(timer);
    }
  }

  #dropLine(reason: 'failed' | 'resting'): void {
    for (const write of this.#line.values()) {
      this.#forgetWrite(write);
      this.counts.dropped[reason]++;
    }
  }

  async #remove(entry: Entry): Promise<void> {
    await this.#files.remove(this.#pathOf(entry));
    this.#drop(entry);
    this.counts.removed[entry.unwanted ?? 'budget']++;
  }

  async #write(write: Write): Promise<void> {
    const { wallClock, now, modelKey } = this.#options;
    const { hash, depth } = write;
    if (this.#byHash.has(hash)) {
      // Another engine wrote it meanwhile.
      this.#forgetWrite(write);
      return;
    }
    const lastUsedMs = wallClock() - Math.max(0, now() - write.lastUsedMs);
    const kept = { depth, uses: write.uses, lastUsedMs };
    const place = join(this.#modelFolder, placeOf(write.voice));
    if (!(await this.#makeRoom(this.#rankOf(kept)))) {
      this.#forgetWrite(write);
      this.counts.dropped.worth_least++;
      return;
    }
    const header = headerOf(modelKey, hash, write.bytes.length, await sha256(write.bytes));
    const { folder } = this.#options;
    const temporary = temporaryPath(folder, hexOf(hash));
    try {
      await this.#withFolder(folder, () => this.#files.write(temporary, [header, write.bytes]));
      if (write.isForgotten) return;
      const path = this.#pathOf({ place, hash, depth });
      await this.#withFolder(join(folder, place), () => this.#files.rename(temporary, path));
      this.#takeOut(write);
      const entry: Entry = {
        ...kept,
        ...{ hash, place, sizeBytes: this.#fileBytes },
        ...{ unwanted: null, rank: 0, queueIndex: -1 },
      };
      this.#add(entry);
      this.counts.written++;
      this.#writes.worked();
      if (write.isForgotten) this.#discard(entry, 'purged');
      else this.#touched.add(entry);
    } finally {
      await removeTemporary(temporary);
    }
  }

  /** Lets what is worth less go. @returns false: one more block has no place */
  async #makeRoom(rank: number): Promise<boolean> {
    while (this.#bytes + this.#fileBytes > this.#roomBytes) {
      const first = this.#queue.first();
      if (!first || first.rank > rank) return false;
      await this.#remove(first);
    }
    return true;
  }

  /** Once more with a new folder, when there is none (any more). */
  async #withFolder(path: string, change: () => Promise<void>): Promise<void> {
    try {
      await change();
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw error;
      await this.#files.makeFolder(path);
      await change();
    }
  }

  async #setTimes(): Promise<void> {
    for (const entry of this.#touched) {
      this.#touched.delete(entry);
      // What another engine has removed has no time.
      await this.#files.setChanged(this.#pathOf(entry), entry.lastUsedMs).catch(() => {});
    }
  }

  /** Brings the books to what is in the folder. */
  async #look(): Promise<void> {
    const { folder, budgetBytes } = this.#options;
    await this.#setTimes();
    await this.#files.makeFolder(folder);
    await sweepTemporaries(folder, abandonedMs);
    const seen = new Set<Entry>();
    for (const place of await this.#places()) {
      const files = await this.#files.list(join(folder, place));
      for (const file of files) {
        const entry = file.isFolder ? null : this.#found(place, file);
        if (entry) seen.add(entry);
      }
      if (files.length > 0) continue;
      await this.#files.removeFolder(join(folder, place));
      await this.#files.removeFolder(join(folder, dirname(place)));
    }
    for (const entry of [...this.#entries()]) if (!seen.has(entry)) this.#drop(entry);
    this.#roomBytes = Math.min(budgetBytes, this.#bytes + (await this.#files.freeBytes(folder)));
    this.#isLookDue = false;
  }

  /** Folders of one voice and one model each, below the folder. */
  async #places(): Promise<string[]> {
    const { folder } = this.#options;
    const places: string[] = [];
    for (const model of await this.#files.list(folder)) {
      if (!model.isFolder || !/^[0-9a-f]{32}$/.test(model.name)) continue;
      const voices = (await this.#files.list(join(folder, model.name))).filter(({ isFolder }) => isFolder);
      for (const voice of voices) places.push(join(model.name, voice.name));
    }
    return places;
  }

  /** @returns what the books say of a file; null: it is not one of ours */
  #found(place: string, file: { name: string; sizeBytes: number; changedMs: number }): Entry | null {
    const named = /^([0-9a-f]{64})\.(\d{1,9})$/.exec(file.name);
    if (!named) return null;
    const { blockBytes } = this.#options;
    const hash = Buffer.from(named[1]!, 'hex').toString('latin1');
    const entry: Entry = {
      ...{ hash, place, depth: Number(named[2]), sizeBytes: footprint(file.sizeBytes) },
      ...{ uses: foundUses, lastUsedMs: file.changedMs, unwanted: null, rank: 0, queueIndex: -1 },
    };
    const isOurs = this.#isOurs(entry);
    const known = isOurs ? this.#byHash.get(hash) : this.#others.get(keyOf(entry));
    if (known && keyOf(known) !== keyOf(entry)) return null;
    if (!known) this.#add(entry);
    const kept = known ?? entry;
    this.#bytes += entry.sizeBytes - kept.sizeBytes;
    kept.sizeBytes = entry.sizeBytes;
    // Another engine has used it.
    if (kept.lastUsedMs < entry.lastUsedMs && !kept.unwanted) {
      kept.lastUsedMs = entry.lastUsedMs;
      this.#rank(kept);
    }
    if (isOurs && file.sizeBytes !== headerBytes + blockBytes) this.#discard(kept, 'damaged');
    return kept;
  }

  /** @returns the bytes of what was removed */
  async #purgeFiles(tag: string): Promise<number> {
    const { folder } = this.#options;
    let bytes = 0;
    await sweepTemporaries(folder, abandonedMs);
    for (const place of await this.#places()) {
      if (!isOfTag(place, tag)) continue;
      for (const file of await this.#files.list(join(folder, place))) {
        const entry = file.isFolder ? null : this.#found(place, file);
        if (!entry) continue;
        this.#discard(entry, 'purged');
        await this.#remove(entry);
        bytes += entry.sizeBytes;
      }
      await this.#files.removeFolder(join(folder, place));
    }
    return bytes;
  }
}

function footprint(sizeBytes: number): number {
  return Math.max(1, Math.ceil(sizeBytes / unitBytes)) * unitBytes;
}

const hexOf = (hash: BlockHash) => Buffer.from(hash, 'latin1').toString('hex');
const nameOf = (hash: BlockHash, depth: number) => `${hexOf(hash)}.${depth}`;
const keyOf = ({ place, hash, depth }: Pick<Entry, 'place' | 'hash' | 'depth'>) =>
  `${place}/${nameOf(hash, depth)}`;

/** What stands for an adapter in folders' names. Two with the same one are purged together, so it may be short. */
function tagOf(digest: string): string {
  return hashOf('sha256', `motet kv on disk ${digest}`).slice(0, 16);
}

/** As many tags as a folder's name has room for. */
const maxTags = 15;
const manyTags = 'many';

/** A voice's folder: the tags of its adapters, which a purge of any of them finds; of the base, `base`. */
function placeOf(voice: string): string {
  if (voice === '') return 'base';
  const tags = voice.split('+').map((part) => tagOf(part.split('@')[0]!));
  return tags.length > maxTags ? manyTags : tags.join('-');
}

function isOfTag(place: string, tag: string): boolean {
  const voice = place.slice(place.lastIndexOf('/') + 1);
  return voice === manyTags || voice.split('-').includes(tag);
}

function reasonOf(error: unknown): string {
  return (error as NodeJS.ErrnoException)?.code ?? (error instanceof Error ? error.message : String(error));
}
