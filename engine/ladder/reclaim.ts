/** Makes room in an arena: of all that its holders could let go, what is worth least leaves first, whoever holds it. */
import type { Arena, PageOwner } from './arena.ts';

/** Who keeps things in pages that it could do without. */
export interface Reclaimable {
  readonly kind: PageOwner;
  /** Pages that come free when all that may leave has left. */
  readonly numReclaimablePages: number;
  /** What would leave next; null: nothing may. Asked anew after each eviction. */
  next(): Candidate | null;
}

export interface Candidate {
  /** As policy.ts ranks it. */
  rank: number;
  /** Gives its pages back to the arena before it returns. */
  evict(): void;
}

/**
 * @param below  only what ranks lower may leave
 * @returns whether `numPages` are free now. When all that may leave would not be enough, nothing has left; what ranks too high shows
 *          on the way only, so with `below` some may have left in vain.
 */
export function reclaim(
  arena: Arena,
  numPages: number,
  holders: readonly Reclaimable[],
  below = Number.POSITIVE_INFINITY,
): boolean {
  if (numPages <= arena.numFree) return true;
  let numAtMost = arena.numFree;
  for (const holder of holders) numAtMost += holder.numReclaimablePages;
  if (numPages > numAtMost) return false;
  while (arena.numFree < numPages) {
    const least = leastOf(holders)!;
    if (least.rank >= below) return false;
    least.evict();
  }
  return true;
}

function leastOf(holders: readonly Reclaimable[]): Candidate | null {
  let least: Candidate | null = null;
  for (const holder of holders) {
    const candidate = holder.next();
    if (candidate && (least === null || candidate.rank < least.rank)) least = candidate;
  }
  return least;
}
