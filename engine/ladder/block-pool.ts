/**
 * KV blocks. A sequence takes pages of its own on the device; a block that is full, and whose tokens are known, is kept under its
 * hash, shared by every sequence that begins alike, and stays when they have ended until its page is wanted. Full blocks never
 * change: a sequence writes behind them only. The last, partial block is never shared.
 *
 * With a host arena every block that is computed is copied there beside the steps (host-blocks.ts). One that has left the device
 * comes back from it, to a page of its own, when a sequence wants it and computing it would take longer. What only the disk has
 * (disk-blocks.ts) comes to the host arena first, while the sequence waits.
 *
 * Invariant: a kv page of the device is either of one sequence alone, or of one kept block, which counts its holders; a
 * kept block without holders stands in the queue of those that may leave. A kept block is in one arena at least.
 * Hashed blocks are vLLM's automatic prefix caching (Kwon et al., 2023, §4.4); conversations that come back are Pensieve's (Yu
 * et al., 2025).
 */
import { setTimeout as delay } from 'node:timers/promises';
import type { Logger } from 'pino';
import { InvariantError } from '../errors.ts';
import type { KvKeeper } from '../purge.ts';
import type { BlockWay, FoundBlock } from '../scheduler.ts';
import type { ReadyRange, Sequence } from '../sequence.ts';
import type { Arena } from './arena.ts';
import { type BlockHash, BlockHasher, voiceHash } from './block-hash.ts';
import type { MeasuredCosts } from './costs.ts';
import { DiskBlocks, type HostPages } from './disk-blocks.ts';
import { HostBlocks, type PageCopier } from './host-blocks.ts';
import { type Arrival, type KeptBlock, type Place, placeOf } from './kept-block.ts';
import type { KvDisk } from './kv-disk.ts';
import { LeavingQueue } from './leaving-queue.ts';
import { type EvictionRule, rules, touch } from './policy.ts';
import type { Candidate, Reclaimable } from './reclaim.ts';

export interface BlockPoolOptions {
  arena: Arena;
  /** null: there is no host tier. */
  hostArena: Arena | null;
  copier: PageCopier & HostPages;
  /** null: there is no disk tier; there is none without a host tier. */
  disk: KvDisk | null;
  blockTokens: number;
  /** false: blocks are no one's but their sequence's, and nothing is kept. */
  isCaching: boolean;
  rule: EvictionRule;
  costs: MeasuredCosts;
  log: Logger;
  /** Milliseconds, never going back. */
  now: () => number;
  /** A copy was refused: our own books are broken. */
  onFailed: (error: unknown) => void;
}

/** A block that is kept since a step was planned which computes it as a part of `maker`. */
export interface MadeBlock {
  block: KeptBlock;
  maker: Sequence;
}

/** Prompt tokens asked for, and those of them that were found. */
export interface CacheCounts {
  queries: number;
  hits: number;
}

/** Of a prompt, by the tier in which they were found. */
export interface CachedTokens {
  device: number;
  host: number;
  disk: number;
}

/** Copies to the device that are under way at most; with more, what the host has is computed anew. */
const maxFetches = 64;
/**
 * Uses of a block that was made and never found: that somebody computed it says little about whether it is wanted again. Prompts
 * that are never alike must not push out what is used, adapters or KV.
 */
const usesOfMade = 1 / 16;
/** Of a sequence for the disk, however long computing would take. */
const longestWaitMs = 30_000;
/** Voices whose counts are remembered; the least recently asked is forgotten. */
const maxVoices = 4096;

export class BlockPool implements Reclaimable, KvKeeper {
  readonly kind = 'kv';
  readonly #options: BlockPoolOptions;
  readonly #hasher: BlockHasher;
  readonly #byHash = new Map<BlockHash, KeptBlock>();
  /** [numPages] the kept block in that page of the device. */
  readonly #byPage: (KeptBlock | null)[];
  readonly #unheld = new LeavingQueue<Place>();
  /** null: nothing is kept below the device. */
  readonly host: HostBlocks | null;
  /** Blocks that the next copy to the device brings, and who hears of it. */
  #fetched: KeptBlock[] = [];
  #arrival: Arrival = { waits: [] };
  readonly #fetches = new Set<Promise<void>>();
  /** null: nothing is kept below the host arena. */
  readonly #below: DiskBlocks | null;
  /** Blocks that the disk is asked for. */
  readonly #reads = new Map<BlockHash, Promise<void>>();
  /** Counts what may have made a block that is being read unwanted. */
  #numPurges = 0;
  /** By voice, the least recently asked first. */
  readonly #counts = new Map<string, CacheCounts>();
  /** Used again by `release`. */
  readonly #pages: Int32Array;
  /** Blocks that left the device because their pages were wanted. */
  numEvicted = 0;
  /** Called with the bytes of each copy to the device, the seconds it took, and those from when it was asked for. */
  onFetched: (numBytes: number, seconds: number, waitSeconds: number) => void = () => {};
  /** Called when blocks have come to the device: those who waited for them may go on. */
  onArrived: () => void = () => {};

  constructor(options: BlockPoolOptions) {
    this.#options = options;
    this.#hasher = new BlockHasher(options.blockTokens);
    this.#byPage = new Array<KeptBlock | null>(options.arena.numPages).fill(null);
    this.#pages = new Int32Array(options.arena.numPages);
    const { hostArena, copier, blockTokens, rule, costs, log, now } = options;
    const disk = options.isCaching ? options.disk : null;
    this.host =
      hostArena && options.isCaching
        ? new HostBlocks({
            arena: hostArena,
            copier,
            blockTokens,
            rule,
            costs,
            disk,
            log,
            onLost: (block) => this.#lose(block),
            onWritten: (block) => this.#rank(block),
          })
        : null;
    const { host } = this;
    this.#below =
      host && disk
        ? new DiskBlocks({ disk, host, hostArena: hostArena!, pages: copier, blockTokens, costs, now })
        : null;
    if (host && this.#below) host.onFilled = () => this.#below!.writeAhead();
  }

  get isCaching(): boolean {
    return this.#options.isCaching;
  }

  get numReclaimablePages(): number {
    return this.#unheld.size;
  }

  /** Pages that sequences hold. */
  get numHeldPages(): number {
    return this.#options.arena.numUsed('kv') - this.#unheld.size;
  }

  next(): Candidate | null {
    const place = this.#unheld.first();
    return place && { rank: place.rank, evict: () => this.#evict(place.block) };
  }

  /** Makes the hashes of the full blocks among a sequence's first `numTokens` tokens, which are known. */
  hash(sequence: Sequence, numTokens: number): void {
    const { blockTokens } = this.#options;
    const { blockHashes } = sequence;
    while ((blockHashes.length + 1) * blockTokens <= numTokens) {
      const before = blockHashes.at(-1) ?? voiceHash(sequence.adapterKey);
      blockHashes.push(this.#hasher.next(before, sequence.tokens, blockHashes.length * blockTokens));
    }
  }

  /** How a block may come into a table; null: it must be computed. */
  find(hash: BlockHash): FoundBlock | null {
    const block = this.#byHash.get(hash);
    if (!block) return null;
    if (block.arrival) return 'arriving';
    if (block.device) return block.numHolders > 0 ? 'held' : 'unheld';
    return this.#isWorthFetching(block) ? 'host' : null;
  }

  /** null: there is no disk tier. */
  get disk(): KvDisk | null {
    return this.#below?.disk ?? null;
  }

  /**
   * Begins to bring what only the disk has of a waiting sequence's prompt to the host arena, where reading is cheaper than computing.
   * @returns when it may go on: they are there, or waiting took as long as computing them would; null: there is nothing to read
   */
  readAhead(sequence: Sequence): Promise<void> | null {
    const below = this.#below;
    if (!below) return null;
    const { blockTokens, costs } = this.#options;
    const most = Math.floor((sequence.numTokens - 1) / blockTokens);
    const wanted: number[] = [];
    let computeMs = 0;
    for (let depth = 0; depth < Math.min(most, sequence.blockHashes.length); depth++) {
      const hash = sequence.blockHashes[depth]!;
      if (this.#byHash.has(hash) || !below.disk.has(hash) || !below.isWorthReading(depth)) continue;
      wanted.push(depth);
      computeMs += 1000 * costs.prefillSeconds(blockTokens, depth * blockTokens);
    }
    if (wanted.length === 0) return null;
    const waitMs = Math.min(computeMs, longestWaitMs);
    const reads = wanted.map((depth) => this.#read(sequence, depth, waitMs));
    return Promise.race([Promise.all(reads), delay(waitMs, null, { ref: false })]).then(() => {});
  }

  /** Once, however many sequences wait for it. */
  #read(sequence: Sequence, depth: number, withinMs: number): Promise<void> {
    const hash = sequence.blockHashes[depth]!;
    const underWay = this.#reads.get(hash);
    if (underWay) return underWay;
    const numPurges = this.#numPurges;
    const read = this.#below!.read(hash, withinMs).then((bytes) => {
      this.#reads.delete(hash);
      // Meanwhile somebody may have computed it.
      if (!bytes || this.#numPurges !== numPurges || this.#byHash.has(hash)) return;
      const block = this.#newBlock(hash, sequence.adapterKey, depth);
      block.isComputed = true;
      block.isFromDisk = true;
      block.uses = 1;
      const { copier } = this.#options;
      const isIn = this.host!.admit(block, (page) => copier.writeHostPages(Int32Array.of(page), bytes));
      if (isIn) this.#byHash.set(hash, block);
    });
    this.#reads.set(hash, read);
    return read;
  }

  /** Pure: what is measured in, what is cheaper out. */
  #isWorthFetching({ depth }: KeptBlock): boolean {
    const { arena, blockTokens, costs } = this.#options;
    const isRoomInLine = this.#fetches.size < maxFetches;
    return (
      isRoomInLine &&
      costs.copySeconds(arena.pageBytes) < costs.prefillSeconds(blockTokens, depth * blockTokens)
    );
  }

  /**
   * Puts the block of index `at` into the table of a sequence, which holds it from now on.
   * @returns false when it is not on the device, nor on its way there; the place in the table is −1 then
   */
  share(sequence: Sequence, at: number): boolean {
    const block = this.#byHash.get(sequence.blockHashes[at]!);
    sequence.blocks[at] = block?.device?.page ?? -1;
    if (!block?.device) return false;
    if (block.numHolders++ === 0) {
      this.#unheld.remove(block.device);
      this.host?.rank(block);
    }
    this.#use(block);
    return true;
  }

  #use(block: KeptBlock): void {
    if (!block.wasFound) {
      block.wasFound = true;
      block.uses = 0;
    }
    touch(block, this.#options.now());
  }

  /**
   * Puts a block that the host arena has into the table of a sequence, in a page of the device that must be free, and which
   * `startFetching` fills. Another sequence may have done so a moment ago.
   */
  #fetch(sequence: Sequence, at: number): void {
    if (this.share(sequence, at)) return;
    const block = this.#byHash.get(sequence.blockHashes[at]!);
    if (!block?.host)
      throw new InvariantError(`the plan fetches block ${at} of sequence ${sequence.id}, which is gone`);
    if (!this.#options.arena.take('kv', 1, sequence.blocks, at, true)) throw noPages(1, 0);
    const page = sequence.blocks[at]!;
    block.device = placeOf(block, page);
    block.numHolders = 1;
    block.arrival = this.#arrival;
    this.#use(block);
    this.#byPage[page] = block;
    this.host!.pin(block);
    this.#fetched.push(block);
  }

  /** Where a block was that is fetched now: once it was the disk, for who waited for it. */
  #tierOf(hash: BlockHash): 'host' | 'disk' {
    const block = this.#byHash.get(hash);
    if (!block?.isFromDisk) return 'host';
    block.isFromDisk = false;
    return 'disk';
  }

  /** One copy for all that was fetched since the last one. */
  startFetching(): void {
    if (this.#fetched.length === 0) return;
    const blocks = this.#fetched;
    const arrival = this.#arrival;
    this.#fetched = [];
    this.#arrival = { waits: [] };
    const { copier, costs, arena, now, onFailed } = this.#options;
    const beginMs = now();
    const from = Int32Array.from(blocks, (block) => block.host!.page);
    const to = Int32Array.from(blocks, (block) => block.device!.page);
    const copy = (async () => {
      const { seconds } = await copier.copyPages('toDevice', from, to);
      const numBytes = blocks.length * arena.pageBytes;
      costs.observeCopy(seconds, numBytes);
      this.onFetched(numBytes, seconds, (now() - beginMs) / 1000);
      for (const block of blocks) {
        block.arrival = null;
        this.host!.unpin(block);
        if (block.isForgotten && block.numHolders === 0) this.#leaveDevice(block);
      }
      for (const { sequence, range } of arrival.waits) {
        range.numArriving--;
        sequence.numCopiesInFlight--;
        sequence.skipReady();
      }
    })();
    const over = copy.catch(onFailed).finally(() => {
      this.#fetches.delete(over);
      this.onArrived();
    });
    this.#fetches.add(over);
  }

  /** Whether something is on its way to the device. */
  get isFetching(): boolean {
    return this.#fetches.size > 0;
  }

  /** Takes pages of its own for a sequence, which must be free. */
  take(sequence: Sequence, count: number): void {
    const { arena } = this.#options;
    const table = sequence.roomForBlocks(count);
    if (!arena.take('kv', count, table, sequence.numBlocks)) throw noPages(count, arena.numFree);
    sequence.numBlocks += count;
  }

  /**
   * Gives a sequence that begins to run the blocks of its table in their ways, beside those that it shares already, and says what
   * it need not compute. Pages must be free for all that are not shared.
   * @returns tokens of its prompt that it need not compute, by the tier in which they were
   */
  begin(sequence: Sequence, ways: readonly BlockWay[]): CachedTokens {
    const { arena, blockTokens } = this.#options;
    sequence.roomForBlocks(ways.length);
    sequence.numBlocks = ways.length;
    const numPromptBlocks = Math.floor(sequence.numPromptTokens / blockTokens);
    const cached: CachedTokens = { device: 0, host: 0, disk: 0 };
    let range: ReadyRange | null = null;
    for (let at = 0; at < ways.length; at++) {
      if (ways[at] === 'compute') {
        if (!arena.take('kv', 1, sequence.blocks, at)) throw noPages(1, 0);
        range = null;
        continue;
      }
      const tier = ways[at] === 'fetch' ? this.#tierOf(sequence.blockHashes[at]!) : 'device';
      if (ways[at] === 'fetch') this.#fetch(sequence, at);
      if (at < numPromptBlocks) cached[tier] += blockTokens;
      if (range === null) {
        range = { begin: at * blockTokens, end: 0, numArriving: 0 };
        sequence.ready.push(range);
      }
      range.end = (at + 1) * blockTokens;
      const arrival = this.#byPage[sequence.blocks[at]!]?.arrival;
      if (arrival) waitFor(arrival, sequence, range);
    }
    sequence.skipReady();
    return cached;
  }

  /** Puts the blocks into the table that were shared before anybody had made them; they are made now, for the same step. */
  shareMade(sequence: Sequence): void {
    for (let at = 0; at < sequence.numBlocks; at++) {
      if (sequence.blocks[at] === -1 && !this.share(sequence, at))
        throw new InvariantError(`the plan shares block ${at} of sequence ${sequence.id}, which nobody made`);
    }
  }

  /**
   * Keeps the full blocks among a sequence's first `numTokens` positions, which are computed or given to a step, and whose
   * tokens are known. A block that another one keeps already stays the sequence's own.
   * @param made  what is kept now and was not is added here
   */
  keep(sequence: Sequence, numTokens: number, made: MadeBlock[] | null): void {
    const { blockTokens } = this.#options;
    if ((sequence.numKeptBlocks + 1) * blockTokens > numTokens || !this.isCaching || sequence.long) return;
    if (sequence.hiddenRows === 'all') return;
    this.hash(sequence, numTokens);
    const end = Math.floor(numTokens / blockTokens);
    for (let depth = sequence.numKeptBlocks; depth < end; depth++) {
      const hash = sequence.blockHashes[depth]!;
      const page = sequence.blocks[depth]!;
      const known = this.#byHash.get(hash);
      if (known?.device || this.#byPage[page]) continue;
      const block = known ?? this.#newBlock(hash, sequence.adapterKey, depth);
      block.device = placeOf(block, page);
      block.numHolders = 1;
      this.host?.rank(block);
      this.#byHash.set(hash, block);
      this.#byPage[page] = block;
      made?.push({ block, maker: sequence });
    }
    sequence.numKeptBlocks = end;
  }

  #newBlock(hash: BlockHash, voice: string, depth: number): KeptBlock {
    return {
      hash,
      voice,
      depth,
      device: null,
      host: null,
      numHolders: 0,
      isFromDisk: false,
      isComputed: false,
      isWriting: false,
      arrival: null,
      isForgotten: false,
      wasFound: false,
      uses: usesOfMade,
      lastUsedMs: this.#options.now(),
    };
  }

  /** A step is over that computed these positions of a sequence. */
  computed(sequence: Sequence, beginTokens: number, endTokens: number): void {
    if (!this.host || sequence.long) return;
    const { blockTokens } = this.#options;
    const end = Math.min(Math.floor(endTokens / blockTokens), sequence.numBlocks);
    for (let depth = Math.floor(beginTokens / blockTokens); depth < end; depth++) {
      const block = this.#byPage[sequence.blocks[depth]!];
      if (!block) continue;
      block.isComputed = true;
      this.host.write(block);
    }
  }

  /** Takes a sequence's blocks back: what is kept stays, the rest is free. */
  release(sequence: Sequence): void {
    // One time for all: of one sequence the end leaves first.
    const nowMs = this.#options.now();
    let numFreed = 0;
    for (let i = 0; i < sequence.numBlocks; i++) {
      const page = sequence.blocks[i]!;
      const block = this.#byPage[page];
      if (block && --block.numHolders > 0) continue;
      if (block && !block.isForgotten) {
        this.#letGo(block, nowMs);
        continue;
      }
      if (block) block.device = null;
      this.#byPage[page] = null;
      this.#pages[numFreed++] = page;
    }
    this.#options.arena.giveBack('kv', this.#pages.subarray(0, numFreed));
    sequence.numBlocks = 0;
    sequence.numKeptBlocks = 0;
  }

  /** Pages that would come free if this sequence alone let go of its blocks. */
  numPagesOfItsOwn(sequence: Sequence): number {
    if (sequence.long) return sequence.long.shape.numDevicePages;
    let count = 0;
    for (let i = 0; i < sequence.numBlocks; i++) {
      const block = this.#byPage[sequence.blocks[i]!];
      if (!block || block.numHolders === 1) count++;
    }
    return count;
  }

  /** From now on nobody finds it; what sequences hold of it goes with the last of them. */
  forget(block: KeptBlock): void {
    this.#lose(block);
    // A copy that is under way reads one page and writes the other: both go when it is over.
    if (block.arrival) return;
    if (block.host) this.host!.remove(block);
    if (block.device && block.numHolders === 0) this.#leaveDevice(block);
  }

  /** Whether a block that was forgotten is in a sequence's table. */
  holdsForgotten(sequence: Sequence): boolean {
    for (let i = 0; i < sequence.numBlocks; i++) {
      if (this.#byPage[sequence.blocks[i]!]?.isForgotten) return true;
    }
    return false;
  }

  /**
   * Forgets every block that was made with an adapter, alone or in a composition. What sequences still hold goes with them.
   * @returns the bytes of those that were kept, when no copy of them is under way any more
   * @throws EngineError purge_incomplete, when the disk may still have some
   */
  async purge(digest: string): Promise<{ device: number; host: number; disk: number }> {
    const blocks = [...this.#byHash.values()].filter(({ voice }) => voice.includes(digest));
    const { pageBytes } = this.#options.arena;
    const bytesOf = (tier: 'device' | 'host') => blocks.filter((block) => block[tier]).length * pageBytes;
    const bytes = { device: bytesOf('device'), host: bytesOf('host'), disk: 0 };
    for (const block of blocks) this.forget(block);
    this.#counts.delete(digest);
    this.#numPurges++;
    // In this turn: from now on nobody finds it there.
    const onDisk = this.disk?.purge(digest);
    const [removed] = await Promise.allSettled([onDisk, this.host?.copied(), ...this.#fetches]);
    if (removed.status === 'rejected') throw removed.reason;
    return { ...bytes, disk: removed.value?.disk ?? 0 };
  }

  /** Forgets everything, when nobody holds anything any more; resolves when no copy is under way. */
  async close(): Promise<void> {
    this.#numPurges++;
    await this.host?.close();
    await this.settled();
    await this.#below?.close();
    for (const block of [...this.#byHash.values()]) this.forget(block);
  }

  /** No copy is under way, and none in line. */
  async settled(): Promise<void> {
    await this.host?.settled();
    await Promise.all(this.#fetches);
  }

  /** One prompt began to run. */
  count(voice: string, numTokens: number, numCachedTokens: number): void {
    const counts = this.#counts.get(voice) ?? { queries: 0, hits: 0 };
    this.#counts.delete(voice);
    this.#counts.set(voice, counts);
    counts.queries += numTokens;
    counts.hits += numCachedTokens;
    if (this.#counts.size > maxVoices) this.#counts.delete(this.#counts.keys().next().value!);
  }

  countsOf(voice: string): Readonly<CacheCounts> {
    return this.#counts.get(voice) ?? { queries: 0, hits: 0 };
  }

  /** @throws InvariantError when the books do not add up. Costs a pass over all pages and sequences: for tests. */
  check(sequences: Iterable<Sequence>): void {
    const { arena } = this.#options;
    const numHolders = new Map<number, number>();
    let numLong = 0;
    for (const { blocks, numBlocks, long } of sequences)
      if (long) numLong += long.staging.length > 0 ? long.shape.numDevicePages : 0;
      else
        for (const page of blocks.subarray(0, numBlocks))
          numHolders.set(page, (numHolders.get(page) ?? 0) + 1);
    let numUnheld = 0;
    for (const [page, block] of this.#byPage.entries()) {
      const count = numHolders.get(page) ?? 0;
      if (block === null && count > 1)
        throw new InvariantError(`page ${page} has ${count} sequences, and no hash`);
      if (block === null) continue;
      if (block.device?.page !== page || block.numHolders !== count)
        throw new InvariantError(
          `block in page ${page} counts ${block.numHolders} holders, and has ${count}`,
        );
      if (!block.isForgotten && this.#byHash.get(block.hash) !== block)
        throw new InvariantError(`block in page ${page} is kept, and cannot be found`);
      if ((count === 0) !== block.device.queueIndex >= 0)
        throw new InvariantError(
          `block in page ${page} has ${count} holders, and queue index ${block.device.queueIndex}`,
        );
      if (count === 0) numUnheld++;
    }
    if (numUnheld !== this.#unheld.size || arena.numUsed('kv') !== numHolders.size + numUnheld + numLong)
      throw new InvariantError(
        `${arena.numUsed('kv')} kv pages: ${numHolders.size} held, ${numLong} of long sequences, ${numUnheld} kept, ${this.#unheld.size} queued`,
      );
    for (const block of this.#byHash.values()) {
      if (!block.device && !block.host)
        throw new InvariantError(`block of depth ${block.depth} is kept, and is nowhere`);
    }
  }

  /** Nobody holds it any more; it stays while there is room. */
  #letGo(block: KeptBlock, nowMs: number): void {
    if (block.wasFound) {
      // A use lasts until the block is let go, and never counts for less than one use now.
      touch(block, nowMs);
      block.uses = Math.max(1, block.uses - 1);
    } else {
      block.lastUsedMs = nowMs;
    }
    block.device!.rank = this.#rankOf(block);
    this.#unheld.add(block.device!);
    this.host?.rank(block);
    this.host?.write(block);
  }

  /** What its way back costs has changed. */
  #rank(block: KeptBlock): void {
    if (!block.device || block.device.queueIndex < 0) return;
    this.#unheld.remove(block.device);
    block.device.rank = this.#rankOf(block);
    this.#unheld.add(block.device);
  }

  /** On the device: the way back is a copy where the host has it. */
  #rankOf({ depth, host, uses, lastUsedMs }: KeptBlock): number {
    const { rule, costs, arena, blockTokens } = this.#options;
    const prefillSeconds = costs.prefillSeconds(blockTokens, depth * blockTokens);
    const restoreSeconds = host
      ? Math.min(prefillSeconds, costs.copySeconds(arena.pageBytes))
      : prefillSeconds;
    return rules[rule]({ restoreSeconds, numBytes: arena.pageBytes, uses, lastUsedMs });
  }

  #evict(block: KeptBlock): void {
    this.numEvicted++;
    this.#leaveDevice(block);
    if (!block.host) this.#lose(block);
  }

  #leaveDevice(block: KeptBlock): void {
    const place = block.device!;
    if (place.queueIndex >= 0) this.#unheld.remove(place);
    block.device = null;
    this.#byPage[place.page] = null;
    this.#pages[0] = place.page;
    this.#options.arena.giveBack('kv', this.#pages.subarray(0, 1));
  }

  #lose(block: KeptBlock): void {
    if (block.isForgotten) return;
    block.isForgotten = true;
    this.#byHash.delete(block.hash);
  }
}

/** One wait for each copy, however many blocks of the range it brings. */
function waitFor(arrival: Arrival, sequence: Sequence, range: ReadyRange): void {
  const last = arrival.waits.at(-1);
  if (last?.range === range) return;
  arrival.waits.push({ sequence, range });
  range.numArriving++;
  sequence.numCopiesInFlight++;
}

function noPages(count: number, numFree: number): InvariantError {
  return new InvariantError(`the plan takes ${count} pages, ${numFree} are free`);
}
