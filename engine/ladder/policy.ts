/**
 * What is kept in a tier, and what leaves first. The worth of a thing is what its bytes save:
 *
 *   value = seconds to bring it back × likelihood of use / bytes
 *
 * Likelihood is its use count, which halves every halfLifeMs. Since all counts halve alike, two things change places only
 * when one of them is used, so each has a rank that stands still in between: log2 of the value, without the part that is
 * the same for all. Cost over size is GreedyDual-Size's (Cao & Irani, 1997), the fading count LRFU's (Lee et al., 2001).
 */

/** How long an unused thing takes to be worth half. About the pause between two turns of a conversation. */
export const halfLifeMs = 300_000;

/** What a copy is worth in a tier below one that has it too, and keeps it: losing it costs nothing now. A part of its value. */
export const copyShare = 0.1;

/** A thing that is kept, and its use. */
export interface Kept {
  /** By the next way that is open: a copy from the tier below, or making it anew. Above 0. */
  restoreSeconds: number;
  numBytes: number;
  /** The count as it was at lastUsedMs: 1 for the first use. */
  uses: number;
  lastUsedMs: number;
}

/** Counts one more use. */
export function touch(kept: Pick<Kept, 'uses' | 'lastUsedMs'>, nowMs: number): void {
  kept.uses = 1 + kept.uses * 2 ** ((kept.lastUsedMs - nowMs) / halfLifeMs);
  kept.lastUsedMs = nowMs;
}

/** Of two things the one with the lower rank leaves first. */
export const rules = {
  /** By value. */
  cost: ({ restoreSeconds, numBytes, uses, lastUsedMs }: Kept): number =>
    Math.log2((restoreSeconds * uses) / numBytes) + lastUsedMs / halfLifeMs,
  /** What was not used for the longest time, whatever it costs. */
  lru: ({ lastUsedMs }: Kept): number => lastUsedMs,
};

export type EvictionRule = keyof typeof rules;
export const evictionRules = Object.keys(rules) as EvictionRule[];
