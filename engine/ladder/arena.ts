/**
 * The device arena's pages: equal pages, taken and given back by KV blocks and adapters alike. This file keeps the
 * books; the bytes are the native side's. Invariant: free + used by each owner = all, and no page has two owners.
 * One arena for both is S-LoRA's unified paging (Sheng et al., 2023, §5).
 */
import { InvariantError } from '../errors.ts';

export const pageOwners = ['kv', 'adapter'] as const;
export type PageOwner = (typeof pageOwners)[number];

const isFree = 0;
const ownerNumber: Record<PageOwner, number> = { kv: 1, adapter: 2 };

export class Arena {
  readonly numPages: number;
  readonly pageBytes: number;
  /** [numPages] isFree, or the owner's number. */
  readonly #owner: Uint8Array;
  /** Stack of free pages: [0, #numFree). The page given back last is warm in cache and leaves first. */
  readonly #free: Int32Array;
  #numFree: number;
  readonly #numUsed: Record<PageOwner, number> = { kv: 0, adapter: 0 };

  constructor(numPages: number, pageBytes: number) {
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

  /** Writes `count` pages to out[at..]; false, and nothing taken, when fewer are free. */
  take(owner: PageOwner, count: number, out: Int32Array, at = 0): boolean {
    if (count > this.#numFree) return false;
    for (let i = 0; i < count; i++) {
      const page = this.#free[--this.#numFree]!;
      this.#owner[page] = ownerNumber[owner];
      out[at + i] = page;
    }
    this.#numUsed[owner] += count;
    return true;
  }

  /** @throws InvariantError when a page does not belong to `owner`: given back twice, or by the wrong one. */
  giveBack(owner: PageOwner, pages: Int32Array): void {
    for (const page of pages) {
      if (this.#owner[page] !== ownerNumber[owner]) {
        throw new InvariantError(`arena: page ${page} given back by ${owner}, which does not own it`);
      }
      this.#owner[page] = isFree;
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
