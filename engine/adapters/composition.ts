/**
 * Who a sequence speaks with: the base and a weighted sum of adapters' deltas, y = W·x + Σ weight · delta(x), which the step
 * computes row by row. No adapter is the base alone; one of weight 1 is that adapter.
 */
import type { Adapter } from './adapter-tiers.ts';

export interface Member {
  readonly adapter: Adapter;
  readonly weight: number;
}

/** By digest, each once, none of weight 0: the same sum is the same list, and the step adds in the same order. */
export type Composition = readonly Member[];

/** One adapter as it is, or the base. */
export function alone(adapter: Adapter | null): Composition {
  return adapter ? [{ adapter, weight: 1 }] : [];
}

/** Names may be of one adapter: their weights are added. */
export function compose(members: Iterable<Member>): Composition {
  const weights = new Map<Adapter, number>();
  for (const { adapter, weight } of members) weights.set(adapter, (weights.get(adapter) ?? 0) + weight);
  return [...weights]
    .map(([adapter, weight]) => ({ adapter, weight: Math.fround(weight) }))
    .filter(({ weight }) => weight !== 0)
    .sort((a, b) => (a.adapter.digest < b.adapter.digest ? -1 : 1));
}

/**
 * Names it as the prefix cache does: '' for the base, a digest for an adapter, `digest@weight+digest@weight` for a sum. A merge has the
 * digests of those that it was made of behind its own: what is removed with one of them is found by any.
 */
export function voiceOf(composition: Composition): string {
  const [first] = composition;
  if (composition.length === 1 && first!.weight === 1) {
    const { digest, merge } = first!.adapter;
    return merge ? [digest, ...merge.members.map((member) => member.digest)].join('+') : digest;
  }
  return composition.map(({ adapter, weight }) => `${adapter.digest}@${weight}`).join('+');
}

export function numPagesOf(composition: Composition): number {
  return composition.reduce((sum, { adapter }) => sum + adapter.numPages, 0);
}

export function has(composition: Composition, adapter: Adapter): boolean {
  return composition.some((member) => member.adapter === adapter);
}
