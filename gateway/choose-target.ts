// Which target of a route answers a request: each with the probability weight / (sum of the weights of targets that an
// engine holds). A target that is not there leaves its share to the others. A request that belongs to somebody goes to the
// target that scores highest for them, −w / ln(h), h a hash in (0, 1) of both and w the weight: each target gets its share,
// nobody has to remember who is where, and a change of weights moves only those who must move.
// Rendezvous hashing (Thaler & Ravishankar, 1998), weighted as by Schindelhauer & Schomaker (2005).

import { hash } from 'node:crypto';
import type { Target } from './resolve-model.ts';

export type WeightedTarget = Target & {
  weight: number;
  /** Of a route: the name of the LoraAdapter or BaseModel, as the route's spec has it. */
  resource?: string;
  /** Of a route: engines that should hold it. Default, one that does is enough. */
  copies?: number | 'all';
  /** Of a route: its first target, which the others are judged against. */
  isStable?: boolean;
  /** Of a route: percent of its requests that are also asked of this target. */
  shadowPercent?: number;
};

/**
 * The target, or null when none that has a weight is served.
 *
 * @param draw  a number in [0, 1) for a request by itself, or text that is the same for all requests that belong together
 */
export function chooseTarget(
  targets: readonly WeightedTarget[],
  isServed: (target: Target) => boolean,
  draw: number | string,
): WeightedTarget | null {
  const served = targets.filter((target) => target.weight > 0 && isServed(target));
  return typeof draw === 'string' ? highestScore(served, draw) : byWeight(served, draw);
}

function byWeight(served: readonly WeightedTarget[], random: number): WeightedTarget | null {
  let left = random * served.reduce((sum, { weight }) => sum + weight, 0);
  for (const target of served) {
    left -= target.weight;
    if (left < 0) return target;
  }
  // Only rounding leads here, or an empty list.
  return served.at(-1) ?? null;
}

function highestScore(served: readonly WeightedTarget[], key: string): WeightedTarget | null {
  let best: { target: WeightedTarget; score: number } | null = null;
  for (const target of served) {
    // Both have lengths of their own, so that no two pairs are one text.
    const bits = hash('sha256', `${target.name.length}\n${target.name}\n${key}`, 'buffer').readUIntBE(0, 6);
    const score = -target.weight / Math.log((bits + 0.5) / 2 ** 48);
    if (best === null || score > best.score) best = { target, score };
  }
  return best?.target ?? null;
}
