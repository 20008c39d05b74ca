/**
 * KV blocks in the host arena. What a step has computed is written through to it beside the steps, so a block that leaves the device
 * is not lost, and leaving is giving the page back. When the arena is full a block gets in only when something in it, a block or an
 * adapter, is worth less. A block that sequences hold on the device is worth little there: it leaves the device last. One that the
 * disk has too is worth what reading it costs.
 */
import type { Logger } from 'pino';
import type { AdapterLoader } from '../adapters/residency.ts';
import type { Arena } from './arena.ts';
import type { MeasuredCosts } from './costs.ts';
import { type KeptBlock, type Place, placeOf } from './kept-block.ts';
import type { KvDisk } from './kv-disk.ts';
import { LeavingQueue } from './leaving-queue.ts';
import { copyShare, type EvictionRule, rules } from './policy.ts';
import { type Candidate, type Reclaimable, reclaim } from './reclaim.ts';

export type PageCopier = Pick<AdapterLoader, 'copyPages'>;

export interface HostBlocksOptions {
  arena: Arena;
  copier: PageCopier;
  blockTokens: number;
  rule: EvictionRule;
  costs: MeasuredCosts;
  /** null: there is no tier below. */
  disk: KvDisk | null;
  log: Logger;
  /** The block is in no arena any more. */
  onLost: (block: KeptBlock) => void;
  /** A copy of it is in the host arena now. */
  onWritten: (block: KeptBlock) => void;
}

/** Pages of one copy to the host: a copy to the device, which somebody waits for, waits for no more than these. */
export const maxPagesOfCopy = 32;

export class HostBlocks implements Reclaimable {
  readonly kind = 'kv';
  readonly #options: HostBlocksOptions;
  readonly #queue = new LeavingQueue<Place>();
  /** First come, first written. */
  #line: KeptBlock[] = [];
  #writing: Promise<void> | null = null;
  /** Who else has pages of the host arena that it could do without. */
  #others: readonly Reclaimable[] = [];
  #isClosed = false;
  /** Blocks that left because their pages were wanted, and those for which there was no page. */
  numEvicted = 0;
  numRefused = 0;
  /** Called when blocks have come. */
  onFilled: () => void = () => {};
  /** Called with the bytes of each copy, and the seconds it took. */
  onCopied: (numBytes: number, seconds: number) => void = () => {};

  constructor(options: HostBlocksOptions) {
    this.#options = options;
  }

  shareWith(others: readonly Reclaimable[]): void {
    this.#others = others;
  }

  get numReclaimablePages(): number {
    return this.#queue.size;
  }

  next(): Candidate | null {
    const place = this.#queue.first();
    return place && { rank: place.rank, evict: () => this.#evict(place.block) };
  }

  #evict(block: KeptBlock): void {
    this.numEvicted++;
    this.remove(block);
  }

  /** A block that is computed and on the device shall be here too. */
  write(block: KeptBlock): void {
    if (block.wasFound) this.#options.disk?.touch(block.hash);
    if (block.host || block.isWriting || block.isForgotten || !block.isComputed || this.#isClosed) return;
    block.isWriting = true;
    this.#line.push(block);
    this.#writeOn();
  }

  /**
   * Takes a page for a block that comes from below, if something that is worth less can leave for it.
   * @param fill  writes the page
   */
  admit(block: KeptBlock, fill: (page: number) => void): boolean {
    const { arena } = this.#options;
    const page = new Int32Array(1);
    const rank = this.#rankOf(block);
    if (this.#isClosed || !reclaim(arena, 1, [this, ...this.#others], rank)) return false;
    arena.take('kv', 1, page);
    fill(page[0]!);
    block.host = placeOf(block, page[0]!);
    block.host.rank = rank;
    this.#queue.add(block.host);
    this.onFilled();
    return true;
  }

  /** What would leave next, in order. */
  leavingFirst(count: number): Place[] {
    return this.#queue.firstOnes(count);
  }

  /** Its worth has changed. */
  rank(block: KeptBlock): void {
    const place = block.host;
    if (!place) return;
    const isQueued = place.queueIndex >= 0;
    if (isQueued) this.#queue.remove(place);
    place.rank = this.#rankOf(block);
    if (isQueued) this.#queue.add(place);
  }

  /** It is being read: it stays until `unpin`. */
  pin(block: KeptBlock): void {
    this.#queue.remove(block.host!);
  }

  unpin(block: KeptBlock): void {
    if (block.isForgotten) this.remove(block);
    else if (block.host) this.#queue.add(block.host);
  }

  /** Gives its page back. One that is being read has `unpin` for that. */
  remove(block: KeptBlock): void {
    const place = block.host!;
    if (place.queueIndex >= 0) this.#queue.remove(place);
    block.host = null;
    this.#options.arena.giveBack('kv', Int32Array.of(place.page));
    if (!block.device) this.#options.onLost(block);
  }

  /** The copy that is under way is over. What stands in line has not begun, and is looked at again when it does. */
  async copied(): Promise<void> {
    await this.#writing;
  }

  /** Nothing stands in line any more, which is soon only when nothing computes. */
  async settled(): Promise<void> {
    while (this.#writing) await this.#writing;
  }

  /** Writes no more; resolves when what was begun is over. */
  async close(): Promise<void> {
    this.#isClosed = true;
    for (const block of this.#line) block.isWriting = false;
    this.#line = [];
    await this.settled();
  }

  #rankOf(block: KeptBlock): number {
    const { arena, blockTokens, costs, rule, disk } = this.#options;
    const share = block.numHolders > 0 ? copyShare : 1;
    const prefillSeconds = costs.prefillSeconds(blockTokens, block.depth * blockTokens);
    // What came from there for somebody who waits for it must not go before that one has it.
    const isSpare = disk?.has(block.hash) && !block.isFromDisk;
    const restoreSeconds = isSpare ? Math.min(prefillSeconds, disk!.secondsPerBlock) : prefillSeconds;
    return rules[rule]({
      restoreSeconds: share * restoreSeconds,
      numBytes: arena.pageBytes,
      uses: block.uses,
      lastUsedMs: block.lastUsedMs,
    });
  }

  #writeOn(): void {
    if (this.#writing || this.#line.length === 0) return;
    // Not at once: what else this turn brings goes along.
    this.#writing = Promise.resolve()
      .then(() => this.#writeSome())
      .finally(() => {
        this.#writing = null;
        this.#writeOn();
      });
  }

  async #writeSome(): Promise<void> {
    const { arena, copier, costs, log } = this.#options;
    const places: Place[] = [];
    const from: number[] = [];
    const page = new Int32Array(1);
    let numTried = 0;
    for (const block of this.#line) {
      if (places.length === maxPagesOfCopy) break;
      numTried++;
      if (block.isForgotten || !block.device) {
        block.isWriting = false;
        continue;
      }
      if (!reclaim(arena, 1, [this, ...this.#others], this.#rankOf(block))) {
        block.isWriting = false;
        this.numRefused++;
        continue;
      }
      arena.take('kv', 1, page);
      places.push(placeOf(block, page[0]!));
      from.push(block.device.page);
    }
    this.#line.splice(0, numTried);
    if (places.length === 0) return;
    let isCopied = false;
    try {
      const to = Int32Array.from(places, (place) => place.page);
      const { seconds } = await copier.copyPages('toHost', Int32Array.from(from), to);
      isCopied = true;
      costs.observeCopy(seconds, places.length * arena.pageBytes);
      this.onCopied(places.length * arena.pageBytes, seconds);
    } catch (err) {
      log.error({ err }, 'KV blocks were not copied to the host arena');
    }
    for (const place of places) this.#finishWriting(place, isCopied);
    this.onFilled();
  }

  #finishWriting(place: Place, isCopied: boolean): void {
    const { block } = place;
    block.isWriting = false;
    // One that left the device meanwhile is forgotten: what was copied may be what somebody else wrote there.
    if (block.isForgotten || !isCopied) {
      this.#options.arena.giveBack('kv', Int32Array.of(place.page));
      return;
    }
    block.host = place;
    place.rank = this.#rankOf(block);
    this.#queue.add(place);
    this.#options.onWritten(block);
  }
}
