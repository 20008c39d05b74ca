/**
 * The pages of one tier, device or host: equal pages, taken and given back by KV blocks and adapters alike. This file keeps the
 * books; the bytes are the native side's. Invariant: free + used by each owner = all, and no page has two owners.
 * One arena for both is S-LoRA's unified paging (Sheng et al., 2023, §5).
 *
 * A page that was given back holds what its last owner left until somebody writes over it. Who writes a page only in part
 * gets it cleared, so that what an owner left is in free pages only, and `clearFree` ends it.
 */
import { setImmediate as nextTurn } from 'node:timers/promises';
import type { Runtime } from '../../native/index.ts';
import { InvariantError } from '../errors.ts';

export const pageOwners = ['kv', 'adapter'] as const;
export type PageOwner = (typeof pageOwners)[number];

const isFree = 0;
const ownerNumber: Record<PageOwner, number> = { kv: 1, adapter: 2 };

/** How the bytes behind the books are cleared. */
export interface Clearing {
  /** Writes zeros over pages, before it returns. */
  clear: (pages: Int32Array) => void;
  /** Owners who do not write a page whole when they have taken it. */
  partlyWritten: readonly PageOwner[];
}

/** The books of a runtime's two arenas. A host page is written whole by whoever takes it. */
export function arenasOf(
  runtime: Pick<Runtime, 'numHostPages' | 'pageBytes' | 'clearPages'>,
  numPages: number,
): { arena: Arena; hostArena: Arena | null } {
  const { numHostPages, pageBytes } = runtime;
  const clearing = (tier: 'device' | 'host', partlyWritten: readonly PageOwner[]) => ({
    clear: (pages: Int32Array) => runtime.clearPages(tier, pages),
    partlyWritten,
  });
  return {
    arena: new Arena(numPages, pageBytes, clearing('device', ['kv'])),
    hostArena: numHostPages > 0 ? new Arena(numHostPages, pageBytes, clearing('host', [])) : null,
  };
}

/** Pages that are cleared in one turn: some milliseconds at most. */
const clearedPerTurn = 32;

export class Arena {
  readonly numPages: number;
  readonly pageBytes: number;
  /** [numPages] isFree, or the owner's number. */
  readonly #owner: Uint8Array;
  /** Stack of free pages: [0, #numFree). The page given back last is warm in cache and leaves first. */
  readonly #free: Int32Array;
  #numFree: number;
  readonly #numUsed: Record<PageOwner, number> = { kv: 0, adapter: 0 };
  readonly #clearing: Clearing | null;
  /** [numPages] 1: it may hold what an owner has left. */
  readonly #isDirty: Uint8Array;

  /** @param clearing null: nothing is cleared, for books without bytes */
  constructor(numPages: number, pageBytes: number, clearing: Clearing | null = null) {
    this.#clearing = clearing;
    this.#isDirty = new Uint8Array(numPages);
    this.numPages = numPages;
    this.pageBytes = pageBytes;
    this.#owner = new Uint8Array(numPages);
    this.#free = Int32Array.from({ length: numPages }, (_, index) => numPages - 1 - index);
    this.#numFree = numPages;
  }

  get numFree(): number {
    return this.#numFree;
  }

  numUsed(owner: PageOwner): number {
    return this.#numUsed[owner];
  }

  /**
   * Writes `count` pages to out[at..]; false, and nothing taken, when fewer are free.
   * @param isWrittenWhole  they will be, although the owner's are not always
   */
  take(owner: PageOwner, count: number, out: Int32Array, at = 0, isWrittenWhole = false): boolean {
    if (count > this.#numFree) return false;
    for (let i = 0; i < count; i++) {
      const page = this.#free[--this.#numFree]!;
      this.#owner[page] = ownerNumber[owner];
      out[at + i] = page;
    }
    this.#numUsed[owner] += count;
    if (!isWrittenWhole && this.#clearing?.partlyWritten.includes(owner))
      this.#clear(out.subarray(at, at + count));
    return true;
  }

  #clear(pages: Int32Array): void {
    const dirty = pages.filter((page) => this.#isDirty[page] === 1);
    if (dirty.length === 0) return;
    this.#clearing!.clear(dirty);
    for (const page of dirty) this.#isDirty[page] = 0;
  }

  /** Writes zeros over all free pages that were used, some each turn. */
  async clearFree(): Promise<void> {
    if (!this.#clearing) return;
    const slice: number[] = [];
    for (let page = 0; page < this.numPages; page++) {
      if (this.#owner[page] === isFree && this.#isDirty[page] === 1) slice.push(page);
      if (slice.length < clearedPerTurn && page < this.numPages - 1) continue;
      this.#clear(Int32Array.from(slice));
      slice.length = 0;
      // Nothing is taken between the look at a page and its clearing: both are in one turn.
      await nextTurn();
    }
  }

  /** @throws InvariantError when a page does not belong to `owner`: given back twice, or by the wrong one. */
  giveBack(owner: PageOwner, pages: Int32Array): void {
    for (const page of pages) {
      if (this.#owner[page] !== ownerNumber[owner]) {
        throw new InvariantError(`arena: page ${page} given back by ${owner}, which does not own it`);
      }
      this.#owner[page] = isFree;
      this.#isDirty[page] = 1;
      this.#free[this.#numFree++] = page;
    }
    this.#numUsed[owner] -= pages.length;
  }

  /** @throws InvariantError when the books do not add up. Costs a pass over all pages: for tests. */
  check(): void {
    const counts = [0, 0, 0];
    for (const owner of this.#owner) counts[owner]!++;
    const isEven =
      counts[isFree] === this.#numFree &&
      pageOwners.every((owner) => counts[ownerNumber[owner]] === this.#numUsed[owner]) &&
      new Set(this.#free.subarray(0, this.#numFree)).size === this.#numFree;
    if (!isEven)
      throw new InvariantError(`arena: books do not add up: ${counts.join(' + ')} of ${this.numPages}`);
  }
}
