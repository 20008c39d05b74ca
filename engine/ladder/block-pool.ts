/**
 * KV blocks on the device arena. A sequence takes pages of its own; a block that is full, and whose tokens are known, is
 * kept under its hash, shared by every sequence that begins alike, and stays when they have ended until its page is wanted.
 * Full blocks never change: a sequence writes behind them only. The last, partial block is never shared.
 *
 * Invariant: a kv page of the arena is either of one sequence alone, or of one kept block, which counts its holders; a
 * kept block without holders stands in the queue of those that may leave.
 * Hashed blocks are vLLM's automatic prefix caching (Kwon et al., 2023, §4.4).
 */
import { InvariantError } from '../errors.ts';
import type { KvKeeper } from '../purge.ts';
import type { Sequence } from '../sequence.ts';
import type { Arena } from './arena.ts';
import { type BlockHash, BlockHasher, voiceHash } from './block-hash.ts';
import type { MeasuredCosts } from './costs.ts';
import { LeavingQueue } from './leaving-queue.ts';
import { type EvictionRule, rules, touch } from './policy.ts';
import type { Candidate, Reclaimable } from './reclaim.ts';

export interface BlockPoolOptions {
  arena: Arena;
  blockTokens: number;
  /** false: blocks are no one's but their sequence's, and nothing is kept. */
  isCaching: boolean;
  rule: EvictionRule;
  costs: MeasuredCosts;
  /** Milliseconds, never going back. */
  now: () => number;
}

/** A full block that is kept under its hash. */
export interface KeptBlock {
  readonly hash: BlockHash;
  readonly voice: string;
  readonly page: number;
  /** Its index in a block table. */
  readonly depth: number;
  /** Sequences that have it in their table. */
  numHolders: number;
  /** Not to be found any more: its content is wrong or unwanted. It goes with its last holder. */
  isForgotten: boolean;
  uses: number;
  lastUsedMs: number;
  rank: number;
  queueIndex: number;
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

/** Voices whose counts are remembered; the least recently asked is forgotten. */
const maxVoices = 4096;

export class BlockPool implements Reclaimable, KvKeeper {
  readonly kind = 'kv';
  readonly #options: BlockPoolOptions;
  readonly #hasher: BlockHasher;
  readonly #byHash = new Map<BlockHash, KeptBlock>();
  /** [numPages] the kept block in that page. */
  readonly #byPage: (KeptBlock | null)[];
  readonly #unheld = new LeavingQueue<KeptBlock>();
  /** By voice, the least recently asked first. */
  readonly #counts = new Map<string, CacheCounts>();
  /** Used again by `release`. */
  readonly #pages: Int32Array;
  /** Blocks that left because their pages were wanted. */
  numEvicted = 0;

  constructor(options: BlockPoolOptions) {
    this.#options = options;
    this.#hasher = new BlockHasher(options.blockTokens);
    this.#byPage = new Array<KeptBlock | null>(options.arena.numPages).fill(null);
    this.#pages = new Int32Array(options.arena.numPages);
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
    const block = this.#unheld.first();
    return block && { rank: block.rank, evict: () => this.#evict(block) };
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

  /** Whether a block is there, and whether it has holders; null: it is not there. */
  find(hash: BlockHash): 'held' | 'unheld' | null {
    const block = this.#byHash.get(hash);
    if (!block) return null;
    return block.numHolders > 0 ? 'held' : 'unheld';
  }

  /**
   * Puts the block of index `at` into the table of a sequence, which holds it from now on.
   * @returns false when it is not there; the place in the table is −1 then
   */
  share(sequence: Sequence, at: number): boolean {
    const block = this.#byHash.get(sequence.blockHashes[at]!);
    sequence.blocks[at] = block?.page ?? -1;
    if (!block) return false;
    if (block.numHolders++ === 0) this.#unheld.remove(block);
    touch(block, this.#options.now());
    return true;
  }

  /** Takes pages of its own for a sequence, which must be free. */
  take(sequence: Sequence, count: number): void {
    const { arena } = this.#options;
    const table = sequence.roomForBlocks(count);
    if (!arena.take('kv', count, table, sequence.numBlocks)) {
      throw new InvariantError(`the plan takes ${count} pages, ${arena.numFree} are free`);
    }
    sequence.numBlocks += count;
  }

  /**
   * Keeps the full blocks among a sequence's first `numTokens` positions, which are computed or given to a step, and whose
   * tokens are known. A block that another one keeps already stays the sequence's own.
   * @param made  what is kept now and was not is added here
   */
  keep(sequence: Sequence, numTokens: number, made: MadeBlock[] | null): void {
    const { blockTokens, now } = this.#options;
    if ((sequence.numKeptBlocks + 1) * blockTokens > numTokens || !this.isCaching) return;
    this.hash(sequence, numTokens);
    const end = Math.floor(numTokens / blockTokens);
    for (let depth = sequence.numKeptBlocks; depth < end; depth++) {
      const hash = sequence.blockHashes[depth]!;
      const page = sequence.blocks[depth]!;
      if (this.#byHash.has(hash) || this.#byPage[page]) continue;
      const block: KeptBlock = {
        hash,
        voice: sequence.adapterKey,
        page,
        depth,
        numHolders: 1,
        isForgotten: false,
        uses: 1,
        lastUsedMs: now(),
        rank: 0,
        queueIndex: -1,
      };
      this.#byHash.set(hash, block);
      this.#byPage[page] = block;
      made?.push({ block, maker: sequence });
    }
    sequence.numKeptBlocks = end;
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
        this.#enqueue(block, nowMs);
        continue;
      }
      this.#byPage[page] = null;
      this.#pages[numFreed++] = page;
    }
    this.#options.arena.giveBack('kv', this.#pages.subarray(0, numFreed));
    sequence.numBlocks = 0;
    sequence.numKeptBlocks = 0;
  }

  /** Pages that would come free if this sequence alone let go of its blocks. */
  numPagesOfItsOwn(sequence: Sequence): number {
    let count = 0;
    for (let i = 0; i < sequence.numBlocks; i++) {
      const block = this.#byPage[sequence.blocks[i]!];
      if (!block || block.numHolders === 1) count++;
    }
    return count;
  }

  /** From now on nobody finds it. */
  forget(block: KeptBlock): void {
    if (block.isForgotten) return;
    block.isForgotten = true;
    this.#byHash.delete(block.hash);
    if (block.numHolders === 0) this.#free(block);
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
   * @returns the bytes of those that were kept
   */
  async purge(digest: string): Promise<{ device: number; host: number; disk: number }> {
    const blocks = [...this.#byHash.values()].filter(({ voice }) => voice.includes(digest));
    for (const block of blocks) this.forget(block);
    this.#counts.delete(digest);
    return { device: blocks.length * this.#options.arena.pageBytes, host: 0, disk: 0 };
  }

  /** Forgets all that nobody holds. */
  clear(): void {
    for (let block = this.#unheld.first(); block; block = this.#unheld.first()) this.forget(block);
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
    for (const { blocks, numBlocks } of sequences)
      for (const page of blocks.subarray(0, numBlocks)) numHolders.set(page, (numHolders.get(page) ?? 0) + 1);
    let numUnheld = 0;
    for (const [page, block] of this.#byPage.entries()) {
      const count = numHolders.get(page) ?? 0;
      if (block === null && count > 1)
        throw new InvariantError(`page ${page} has ${count} sequences, and no hash`);
      if (block === null) continue;
      if (block.page !== page || block.numHolders !== count)
        throw new InvariantError(
          `block in page ${page} counts ${block.numHolders} holders, and has ${count}`,
        );
      if (!block.isForgotten && this.#byHash.get(block.hash) !== block)
        throw new InvariantError(`block in page ${page} is kept, and cannot be found`);
      if ((count === 0) !== block.queueIndex >= 0)
        throw new InvariantError(
          `block in page ${page} has ${count} holders, and queue index ${block.queueIndex}`,
        );
      if (count === 0) numUnheld++;
    }
    if (numUnheld !== this.#unheld.size || arena.numUsed('kv') !== numHolders.size + numUnheld)
      throw new InvariantError(
        `${arena.numUsed('kv')} kv pages: ${numHolders.size} held, ${numUnheld} kept, ${this.#unheld.size} queued`,
      );
  }

  #enqueue(block: KeptBlock, nowMs: number): void {
    const { rule, costs, arena, blockTokens } = this.#options;
    // A use lasts until the block is let go, and never counts for less than one use now.
    touch(block, nowMs);
    block.uses = Math.max(1, block.uses - 1);
    const restoreSeconds = costs.prefillSecondsPerToken * blockTokens;
    block.rank = rules[rule]({
      restoreSeconds,
      numBytes: arena.pageBytes,
      uses: block.uses,
      lastUsedMs: block.lastUsedMs,
    });
    this.#unheld.add(block);
  }

  #evict(block: KeptBlock): void {
    this.numEvicted++;
    this.forget(block);
  }

  #free(block: KeptBlock): void {
    this.#unheld.remove(block);
    this.#byPage[block.page] = null;
    this.#pages[0] = block.page;
    this.#options.arena.giveBack('kv', this.#pages.subarray(0, 1));
  }
}
