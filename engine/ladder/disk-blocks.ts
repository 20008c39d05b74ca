/**
 * KV blocks between the host arena and the disk. What would leave the host arena next is written to the disk ahead of need, so a
 * block that leaves it is not lost, and leaving is giving the page back; when the engine ends, the rest follows as far as time allows.
 * What only the disk has comes back to the host arena for a sequence that waits, where that is cheaper than computing it.
 */
import { setImmediate as nextTurn } from 'node:timers/promises';
import type { Runtime } from '../../native/index.ts';
import type { Arena } from './arena.ts';
import type { BlockHash } from './block-hash.ts';
import type { MeasuredCosts } from './costs.ts';
import { type HostBlocks, maxPagesOfCopy } from './host-blocks.ts';
import type { Place } from './kept-block.ts';
import type { KvDisk } from './kv-disk.ts';

export type HostPages = Pick<Runtime, 'readHostPages' | 'writeHostPages'>;

export interface DiskBlocksOptions {
  disk: KvDisk;
  host: HostBlocks;
  hostArena: Arena;
  pages: HostPages;
  blockTokens: number;
  costs: MeasuredCosts;
  now: () => number;
}

/**
 * Pages that are free or can be without a loss: an eighth of the arena, but enough for what one copy to the host brings, where that
 * is not the most of it; and not so many that finding them takes long.
 */
const numPagesAhead = (numPages: number) =>
  Math.min(128, Math.max(Math.ceil(numPages / 8), Math.min(Math.ceil(numPages / 2), maxPagesOfCopy)));
/** Pages that are read in one turn: some hundred microseconds. */
const maxPagesPerTurn = 2;
/** When the line of the disk is full for so long, the next block that comes to the host tries again. */
const patienceMs = 1000;
/** What the end of the engine waits for blocks to be handed to the disk. */
const flushMs = 5000;

export class DiskBlocks {
  readonly #options: DiskBlocksOptions;
  #isWriting = false;
  #isClosed = false;

  constructor(options: DiskBlocksOptions) {
    this.#options = options;
  }

  get disk(): KvDisk {
    return this.#options.disk;
  }

  /** The host arena has filled up further. */
  writeAhead(): void {
    if (this.#isWriting || this.#isClosed) return;
    this.#isWriting = true;
    void this.#writeOn().finally(() => {
      this.#isWriting = false;
    });
  }

  async #writeOn(): Promise<void> {
    const { disk, hostArena, host } = this.#options;
    const numAhead = numPagesAhead(hostArena.numPages);
    while (await disk.roomInLine(patienceMs)) {
      await nextTurn();
      const numWanted = numAhead - hostArena.numFree;
      if (numWanted <= 0 || this.#isClosed) return;
      if (!this.#write(host.leavingFirst(numWanted).filter((place) => this.#isOwed(place)))) return;
    }
  }

  /** Its bytes are nowhere else. */
  #isOwed({ block }: Place): boolean {
    return block.numHolders === 0 && !this.#options.disk.keeps(block.hash);
  }

  /** The first few of them. @returns whether some were taken */
  #write(places: readonly Place[]): boolean {
    const { disk, pages, host } = this.#options;
    let numTaken = 0;
    for (const { block, page } of places.slice(0, maxPagesPerTurn)) {
      const bytes = pages.readHostPages(Int32Array.of(page)) as Buffer<ArrayBuffer>;
      if (!disk.write(block, bytes)) break;
      numTaken++;
      // It can come back from there now.
      host.rank(block);
    }
    return numTaken > 0;
  }

  isWorthReading(depth: number): boolean {
    const { disk, costs, hostArena, blockTokens } = this.#options;
    const seconds = disk.secondsPerBlock + costs.copySeconds(hostArena.pageBytes);
    return seconds < costs.prefillSeconds(blockTokens, depth * blockTokens);
  }

  /** @returns the bytes of a block that the disk has; null: not in time, or not any more */
  read(hash: BlockHash, withinMs: number): Promise<Buffer | null> {
    return this.#options.disk.read(hash, withinMs);
  }

  /** Hands what the host arena alone has to the disk, what is worth most first, and closes it. */
  async close(): Promise<void> {
    this.#isClosed = true;
    const { disk, host, now } = this.#options;
    const endMs = now() + flushMs;
    const owed = host
      .leavingFirst(Number.POSITIVE_INFINITY)
      .filter((place) => this.#isOwed(place))
      .reverse();
    for (let i = 0; i < owed.length && (await disk.roomInLine(endMs - now())); i += maxPagesPerTurn) {
      // Pages are not given to others while this goes on: nothing runs any more.
      if (!this.#write(owed.slice(i))) break;
    }
    await disk.close();
  }
}
