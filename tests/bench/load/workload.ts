/**
 * What is asked, by whom and when, as pure functions of a seed. Request i is the same whatever ran before it, so a run can
 * be repeated and no prompt has to be kept. No two requests of a run draw the same random numbers.
 */
import { type SeededRandom, seededRandom } from '../../fixtures/seeded-random.ts';

/** How many tokens: always that many, any number of a range, or around a mean. */
export type Lengths =
  | { kind: 'fixed'; tokens: number }
  | { kind: 'uniform'; low: number; high: number }
  | { kind: 'normal'; mean: number; deviation: number };

/** Which adapter a request uses, of a list. zipf: the k-th, counted from 1, with probability ∝ 1 / k^exponent. */
export type Popularity =
  | { kind: 'uniform' }
  | { kind: 'zipf'; exponent: number }
  | { kind: 'each-client-its-own' };

export interface WorkloadShape {
  seed: number;
  endpoint: 'completions' | 'chat';
  promptTokens: Lengths;
  outputTokens: Lengths;
  sharedPrefixTokens: number;
  numPrefixes: number;
  vocabSize: number;
  numAdapters: number;
  popularity: Popularity;
  /** Part of the requests that use no adapter, 0 to 1. */
  baseShare: number;
}

export interface PlannedRequest {
  /** Place in the run, from 0. */
  index: number;
  /** Place in the list of adapters; null: the base. */
  adapter: number | null;
  /** Token ids; for chat, words. */
  prompt: number[] | string;
  outputTokens: number;
}

export interface Workload {
  /** @param client who sends it, from 0: says the adapter under each-client-its-own */
  request(index: number, client: number): PlannedRequest;
}

/** Independent sequences of random numbers under one seed. */
const streams = { measured: 1, warmup: 2, prefix: 3, arrivals: 4 };

/** Ids below are special tokens in most vocabularies. */
const firstTokenId = 10;

export function createWorkload(shape: WorkloadShape, stream: 'measured' | 'warmup' = 'measured'): Workload {
  const { seed, numAdapters, popularity, baseShare } = shape;
  const pickAdapter =
    popularity.kind === 'zipf'
      ? zipf(numAdapters, popularity.exponent)
      : (random: SeededRandom) => random.below(numAdapters);
  return {
    request(index, client) {
      const random = seededRandom(seedOf(seed, streams[stream], index));
      // Every number is drawn whether it is needed or not, so that one option does not change what another decides.
      const isBase = random.unit() < baseShare || numAdapters === 0;
      const picked = pickAdapter(random);
      const prefixIndex = random.below(shape.numPrefixes);
      const numPromptTokens = lengthOf(shape.promptTokens, random);
      const outputTokens = lengthOf(shape.outputTokens, random);
      const prefixRandom = seededRandom(seedOf(seed, streams.prefix, prefixIndex));
      const tokens = [
        ...tokensOf(shape, shape.sharedPrefixTokens, prefixRandom),
        ...tokensOf(shape, numPromptTokens, random),
      ];
      const own = popularity.kind === 'each-client-its-own' ? client % numAdapters : picked;
      return {
        index,
        adapter: isBase ? null : own,
        prompt: shape.endpoint === 'chat' ? tokens.map((id) => words[id]!).join(' ') : tokens,
        outputTokens,
      };
    },
  };
}

/**
 * When requests arrive, in milliseconds after the start: gaps are gamma distributed with mean 1 / rate. Shape 1 is a
 * Poisson process; the variance of a gap is its mean² / shape.
 */
export function* arrivalsMs(seed: number, ratePerSecond: number, burstiness: number): Generator<number> {
  const random = seededRandom(seedOf(seed, streams.arrivals, 0));
  for (let atMs = 0; ; ) {
    atMs += (gamma(burstiness, random) / burstiness) * (1000 / ratePerSecond);
    yield atMs;
  }
}

export function lengthOf(lengths: Lengths, random: SeededRandom): number {
  const uniform = random.unit();
  if (lengths.kind === 'fixed') return lengths.tokens;
  if (lengths.kind === 'uniform') {
    return lengths.low + Math.floor(uniform * (lengths.high - lengths.low + 1));
  }
  const { mean, deviation } = lengths;
  return Math.min(Math.max(1, Math.round(mean + deviation * normal(random))), mean + 4 * deviation);
}

/** Draws 0 … count − 1, the k-th with probability ∝ 1 / (k + 1)^exponent, by the inverse of the cumulated sum. */
function zipf(count: number, exponent: number): (random: SeededRandom) => number {
  const sums = new Float64Array(count);
  let sum = 0;
  for (let k = 0; k < count; k++) {
    sum += (k + 1) ** -exponent;
    sums[k] = sum;
  }
  return (random) => {
    const wanted = random.unit() * sum;
    let low = 0;
    let high = count - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (sums[middle]! > wanted) high = middle;
      else low = middle + 1;
    }
    return Math.max(0, low);
  };
}

function tokensOf({ endpoint, vocabSize }: WorkloadShape, count: number, random: SeededRandom): number[] {
  const [first, end] = endpoint === 'chat' ? [0, words.length] : [firstTokenId, vocabSize];
  return Array.from({ length: count }, () => first + random.below(end - first));
}

/** Standard normal, by Box and Muller. */
function normal(random: SeededRandom): number {
  return Math.sqrt(-2 * Math.log(1 - random.unit())) * Math.cos(2 * Math.PI * random.unit());
}

/** Gamma of that shape and scale 1, by Marsaglia and Tsang (2000); below shape 1 by their boost. */
function gamma(shape: number, random: SeededRandom): number {
  if (shape === 1) return -Math.log(1 - random.unit());
  if (shape < 1) return gamma(shape + 1, random) * (1 - random.unit()) ** (1 / shape);
  const d = shape - 1 / 3;
  const c = 1 / Math.sqrt(9 * d);
  for (;;) {
    const x = normal(random);
    const v = (1 + c * x) ** 3;
    if (v <= 0) continue;
    if (Math.log(1 - random.unit()) < 0.5 * x * x + d * (1 - v + Math.log(v))) return d * v;
  }
}

/** A seed for one index of one stream; different indices of a stream never get the same one. */
function seedOf(seed: number, stream: number, index: number): number {
  return mix(mix(mix(seed) ^ stream) ^ index);
}

/** A bijection of 32-bit integers in which every bit moves about half of the others: murmur3's finaliser. */
function mix(value: number): number {
  let h = value | 0;
  h = Math.imul(h ^ (h >>> 16), 0x85ebca6b);
  h = Math.imul(h ^ (h >>> 13), 0xc2b2ae35);
  return (h ^ (h >>> 16)) >>> 0;
}

/** Short and common, so that most vocabularies have each as one token. */
const words = (
  'the of and to in is you that it he was for on are as with his they at be this have from or one had by word but not ' +
  'what all were we when your can said there use an each which she do how their if will up other about out many then'
).split(' ');
