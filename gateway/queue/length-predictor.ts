// How long an answer will be, by those that came before: for each adapter, and the length of the prompt, a histogram whose
// buckets double. Old answers fade. The guess is the median. A wrong guess costs a request nothing but its place among equals
// (fair-queue.ts): counters are put right when the length is known.

/** Adapters that are remembered, about 500 bytes each. When there are more, those go that answered least recently. */
const maxAdapters = 4_096;
const numForgotten = 512;
/** 1, 2–3, 4–7, … tokens. */
const numBuckets = 18;
/** Prompts below 64, 512, 4,096 tokens, and the rest. */
const numPromptSizes = 4;
/** Each answer takes so much of the weight of those before. */
const fade = 0.02;
/** Below this weight a prompt size is not asked by itself. */
const minWeight = 3;
/** Of an adapter that has answered nothing yet. */
const unknownTokens = 128;

export class LengthPredictor {
  readonly #histograms = new Map<string, Histogram>();
  #numNoted = 0;

  get numAdapters(): number {
    return this.#histograms.size;
  }

  /** Tokens of all answers to one request. @param maxTokens  of one answer; null: no bound is known */
  predict(adapter: string, promptTokens: number, maxTokens: number | null, numChoices = 1): number {
    const histogram = this.#histograms.get(adapter)?.weights;
    const most = maxTokens ?? Number.POSITIVE_INFINITY;
    if (histogram === undefined) return Math.min(unknownTokens, most) * numChoices;
    const begin = promptSizeOf(promptTokens) * numBuckets;
    const guess =
      sum(histogram, begin) >= minWeight ? medianOf(histogram, begin) : medianOf(overSizes(histogram), 0);
    return Math.min(guess, most) * numChoices;
  }

  /** An answer has ended by itself. */
  note(adapter: string, promptTokens: number, outputTokens: number): void {
    let histogram = this.#histograms.get(adapter);
    if (histogram === undefined) {
      if (this.#histograms.size === maxAdapters) this.#forgetSome();
      histogram = { weights: new Float32Array(numPromptSizes * numBuckets), notedAt: 0 };
      this.#histograms.set(adapter, histogram);
    }
    this.#numNoted += 1;
    histogram.notedAt = this.#numNoted;
    const { weights } = histogram;
    const begin = promptSizeOf(promptTokens) * numBuckets;
    for (let i = begin; i < begin + numBuckets; i++) weights[i]! *= 1 - fade;
    weights[begin + bucketOf(outputTokens)]! += 1;
  }

  /** Many at a time, so that no request pays for an order that is only wanted here. */
  #forgetSome(): void {
    const oldestFirst = [...this.#histograms].sort(([, one], [, other]) => one.notedAt - other.notedAt);
    for (const [adapter] of oldestFirst.slice(0, numForgotten)) this.#histograms.delete(adapter);
  }
}

/**
 * @property weights  [numPromptSizes × numBuckets]
 * @property notedAt  the number of the answer that was noted last
 */
type Histogram = { weights: Float32Array; notedAt: number };

function bucketOf(tokens: number): number {
  return Math.min(numBuckets - 1, Math.floor(Math.log2(Math.max(1, tokens))));
}

function promptSizeOf(tokens: number): number {
  return tokens < 64 ? 0 : tokens < 512 ? 1 : tokens < 4_096 ? 2 : 3;
}

function overSizes(histogram: Float32Array): Float32Array {
  const total = new Float32Array(numBuckets);
  for (let i = 0; i < histogram.length; i++) total[i % numBuckets]! += histogram[i]!;
  return total;
}

/** Of the buckets from `begin` on. */
function sum(weights: Float32Array, begin: number): number {
  let total = 0;
  for (let i = begin; i < begin + numBuckets; i++) total += weights[i]!;
  return total;
}

/** The middle of the bucket that holds it, of those from `begin` on. */
function medianOf(weights: Float32Array, begin: number): number {
  let left = sum(weights, begin) / 2;
  for (let bucket = 0; bucket < numBuckets; bucket++) {
    left -= weights[begin + bucket]!;
    if (left <= 0) return Math.round(1.5 * 2 ** bucket);
  }
  return unknownTokens;
}
