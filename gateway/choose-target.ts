// Which target of a route answers a request: each with the probability weight / (sum of the weights of targets that an
// engine holds). A target that is not there leaves its share to the others.

import type { Target } from './resolve-model.ts';

export type WeightedTarget = Target & { weight: number };

/**
 * The target, or null when none that has a weight is served.
 *
 * @param random  in [0, 1)
 */
export function chooseTarget(
  targets: readonly WeightedTarget[],
  isServed: (target: Target) => boolean,
  random: number,
): WeightedTarget | null {
  const served = targets.filter((target) => target.weight > 0 && isServed(target));
  let left = random * served.reduce((sum, { weight }) => sum + weight, 0);
  for (const target of served) {
    left -= target.weight;
    if (left < 0) return target;
  }
  // Only rounding leads here, or an empty list.
  return served.at(-1) ?? null;
}
