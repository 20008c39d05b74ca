/**
 * Makes one tensor of several adapters' tensors (pure): what is kept of each is chosen first, then what is left is summed or
 * averaged. It is done to A and to B of a module on their own, as PEFT does, so the merged adapter has the rank of its
 * members; it is not the merge of their products.
 *
 *   magnitude_prune  Σ w · (t, of which the largest values stay)
 *   ties             the mean of w · t over those whose sign is the elected one, of the largest values of each
 *                    (TIES-Merging, Yadav et al., 2023)
 *   dare_linear      Σ w · (t, of which random values stay, over the density)  (DARE, Yu et al., 2024)
 *   dare_ties        as ties, of random values
 */
import { createHash } from 'node:crypto';
import { electsSigns, type MergeRule } from '../protocol.ts';

export interface TaskTensor {
  values: Float32Array;
  weight: number;
  /** Random values are drawn by it: the same text, the same values. */
  seed: string;
}

/** @param tensors of one shape, at least one */
export function mergeTensors(tensors: readonly TaskTensor[], rule: MergeRule): Float32Array {
  const isRandom = rule.method.startsWith('dare');
  const kept = tensors.map((tensor) =>
    isRandom ? keepRandom(tensor, rule.density) : keepLargest(tensor.values, rule.density),
  );
  const weights = tensors.map(({ weight }) => weight);
  return electsSigns(rule.method)
    ? meanOfElected(kept, weights, rule.majoritySign)
    : weightedSum(kept, weights);
}

/** Of equal ones at the bound those that come first stay. */
function keepLargest(values: Float32Array, density: number): Float32Array {
  const numKept = Math.floor(density * values.length);
  if (density >= 1) return values;
  if (numKept === 0) return new Float32Array(values.length);
  const sorted = values.map(Math.abs).sort();
  const bound = sorted[values.length - numKept]!;
  let numAtBound = numKept - (values.length - upperIndex(sorted, bound));
  return values.map((value) => {
    const size = Math.abs(value);
    return size > bound || (size === bound && numAtBound-- > 0) ? value : 0;
  });
}

/** Index of the first that is above the bound. */
function upperIndex(sorted: Float32Array, bound: number): number {
  let [low, high] = [0, sorted.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle]! > bound) high = middle;
    else low = middle + 1;
  }
  return low;
}

function keepRandom({ values, seed }: TaskTensor, density: number): Float32Array {
  if (density >= 1) return values;
  const draw = uniform(seed);
  return values.map((value) => (draw() < density ? value / density : 0));
}

/** xoshiro128** (Blackman & Vigna, 2018). */
function uniform(seed: string): () => number {
  const digest = createHash('sha256').update(seed).digest();
  let [a, b, c, d] = [0, 4, 8, 12].map((at) => digest.readInt32LE(at)) as [number, number, number, number];
  const rotate = (x: number, by: number) => (x << by) | (x >>> (32 - by));
  return () => {
    const drawn = Math.imul(rotate(Math.imul(b, 5), 7), 9) >>> 0;
    const shifted = b << 9;
    c ^= a;
    d ^= b;
    b ^= c;
    a ^= d;
    c ^= shifted;
    d = rotate(d, 11);
    return drawn / 2 ** 32;
  };
}

function weightedSum(tensors: readonly Float32Array[], weights: readonly number[]): Float32Array {
  return tensors[0]!.map((_, i) =>
    tensors.reduce((sum, values, member) => sum + weights[member]! * values[i]!, 0),
  );
}

/** An element's sign is elected before weights count, and + where it is even. */
function meanOfElected(
  tensors: readonly Float32Array[],
  weights: readonly number[],
  majoritySign: MergeRule['majoritySign'],
): Float32Array {
  return tensors[0]!.map((_, i) => {
    let votes = 0;
    for (const values of tensors) votes += majoritySign === 'total' ? values[i]! : Math.sign(values[i]!);
    const elected = votes >= 0 ? 1 : -1;
    let [sum, count] = [0, 0];
    for (const [member, values] of tensors.entries()) {
      if (Math.sign(values[i]!) !== elected) continue;
      sum += weights[member]! * values[i]!;
      count += 1;
    }
    return count === 0 ? 0 : sum / count;
  });
}
