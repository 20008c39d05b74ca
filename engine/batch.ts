/**
 * Lays a plan's chunks out as the flat typed arrays of one native step. The arrays are kept and used again: a batch is
 * good until the next `lay`, and a step copies it.
 */
import type { StepBatch } from '../native/index.ts';
import { needsHistory } from './sampling.ts';
import type { Chunk } from './scheduler.ts';
import type { Sequence } from './sequence.ts';

/** Added to a logit to forbid a token; finite, so that a sampler never meets infinity minus infinity. */
const forbiddenLogit = -1e9;

export class BatchLayout {
  readonly #eosTokenIds: readonly number[];
  // Bounded by the limits.
  readonly #tokenIds: Int32Array;
  readonly #positions: Int32Array;
  readonly #sequenceStarts: Int32Array;
  readonly #blockStarts: Int32Array;
  readonly #adapterStarts: Int32Array;
  readonly #sampleRows: Int32Array;
  readonly #temperature: Float32Array;
  readonly #topK: Int32Array;
  readonly #topP: Float32Array;
  readonly #minP: Float32Array;
  readonly #repetitionPenalty: Float32Array;
  readonly #presencePenalty: Float32Array;
  readonly #frequencyPenalty: Float32Array;
  readonly #seeds: BigUint64Array;
  readonly #numTop: Int32Array;
  readonly #biasStarts: Int32Array;
  readonly #historyStarts: Int32Array;
  readonly #historyPromptCounts: Int32Array;
  // Grown on demand, never shrunk.
  #blockIds = new Int32Array(256);
  #adapterHandles = new Int32Array(64);
  #adapterWeights = new Float32Array(64);
  #biasIds = new Int32Array(64);
  #biasValues = new Float32Array(64);
  #historyIds = new Int32Array(1024);

  constructor(limits: { maxBatchTokens: number; maxSequences: number }, eosTokenIds: Iterable<number>) {
    const { maxBatchTokens, maxSequences } = limits;
    this.#eosTokenIds = [...eosTokenIds];
    this.#tokenIds = new Int32Array(maxBatchTokens);
    this.#positions = new Int32Array(maxBatchTokens);
    this.#sequenceStarts = new Int32Array(maxSequences + 1);
    this.#blockStarts = new Int32Array(maxSequences + 1);
    this.#adapterStarts = new Int32Array(maxSequences + 1);
    this.#sampleRows = new Int32Array(maxSequences);
    this.#temperature = new Float32Array(maxSequences);
    this.#topK = new Int32Array(maxSequences);
    this.#topP = new Float32Array(maxSequences);
    this.#minP = new Float32Array(maxSequences);
    this.#repetitionPenalty = new Float32Array(maxSequences);
    this.#presencePenalty = new Float32Array(maxSequences);
    this.#frequencyPenalty = new Float32Array(maxSequences);
    this.#seeds = new BigUint64Array(maxSequences);
    this.#numTop = new Int32Array(maxSequences);
    this.#biasStarts = new Int32Array(maxSequences + 1);
    this.#historyStarts = new Int32Array(maxSequences + 1);
    this.#historyPromptCounts = new Int32Array(maxSequences);
  }

  /**
   * @param chunks   each with its blocks already in the sequence's table
   * @param sampled  cleared, then filled: the sequence of each sample, in order. A chunk that ends its sequence's
   *                 tokens draws the next one; a chunk in the middle of a prompt draws none.
   */
  lay(chunks: readonly Chunk[], sampled: Sequence[]): StepBatch {
    sampled.length = 0;
    let numTokens = 0;
    let numBlocks = 0;
    let numAdapters = 0;
    let numBiases = 0;
    let numHistory = 0;

    for (let s = 0; s < chunks.length; s++) {
      const { sequence, numTokens: length } = chunks[s]!;
      const begin = sequence.numComputedTokens;
      this.#tokenIds.set(sequence.tokens.subarray(begin, begin + length), numTokens);
      for (let i = 0; i < length; i++) this.#positions[numTokens + i] = begin + i;
      numTokens += length;
      this.#sequenceStarts[s + 1] = numTokens;

      this.#blockIds = room(this.#blockIds, numBlocks + sequence.numBlocks);
      this.#blockIds.set(sequence.blocks.subarray(0, sequence.numBlocks), numBlocks);
      numBlocks += sequence.numBlocks;
      this.#blockStarts[s + 1] = numBlocks;

      this.#adapterHandles = room(this.#adapterHandles, numAdapters + sequence.adapters.length);
      this.#adapterWeights = room(this.#adapterWeights, numAdapters + sequence.adapters.length);
      for (const { handle, weight } of sequence.adapters) {
        this.#adapterHandles[numAdapters] = handle;
        this.#adapterWeights[numAdapters++] = weight;
      }
      this.#adapterStarts[s + 1] = numAdapters;

      if (begin + length < sequence.numTokens) continue;
      const i = sampled.push(sequence) - 1;
      const { params } = sequence;
      this.#sampleRows[i] = numTokens - 1;
      this.#temperature[i] = params.temperature;
      this.#topK[i] = params.topK;
      this.#topP[i] = params.topP;
      this.#minP[i] = params.minP;
      this.#repetitionPenalty[i] = params.repetitionPenalty;
      this.#presencePenalty[i] = params.presencePenalty;
      this.#frequencyPenalty[i] = params.frequencyPenalty;
      this.#seeds[i] = params.seed;
      this.#numTop[i] = params.numLogprobs ?? 0;

      numBiases = this.#layBiases(sequence, numBiases);
      this.#biasStarts[i + 1] = numBiases;

      this.#historyPromptCounts[i] = 0;
      if (needsHistory(params)) {
        this.#historyIds = room(this.#historyIds, numHistory + sequence.numTokens);
        this.#historyIds.set(sequence.tokens.subarray(0, sequence.numTokens), numHistory);
        numHistory += sequence.numTokens;
        this.#historyPromptCounts[i] = sequence.numPromptTokens;
      }
      this.#historyStarts[i + 1] = numHistory;
    }

    const numSequences = chunks.length;
    const numSamples = sampled.length;
    return {
      tokenIds: this.#tokenIds.subarray(0, numTokens),
      positions: this.#positions.subarray(0, numTokens),
      sequenceStarts: this.#sequenceStarts.subarray(0, numSequences + 1),
      blockStarts: this.#blockStarts.subarray(0, numSequences + 1),
      blockIds: this.#blockIds.subarray(0, numBlocks),
      adapterStarts: this.#adapterStarts.subarray(0, numSequences + 1),
      adapterHandles: this.#adapterHandles.subarray(0, numAdapters),
      adapterWeights: this.#adapterWeights.subarray(0, numAdapters),
      sampleRows: this.#sampleRows.subarray(0, numSamples),
      temperature: this.#temperature.subarray(0, numSamples),
      topK: this.#topK.subarray(0, numSamples),
      topP: this.#topP.subarray(0, numSamples),
      minP: this.#minP.subarray(0, numSamples),
      repetitionPenalty: this.#repetitionPenalty.subarray(0, numSamples),
      presencePenalty: this.#presencePenalty.subarray(0, numSamples),
      frequencyPenalty: this.#frequencyPenalty.subarray(0, numSamples),
      seeds: this.#seeds.subarray(0, numSamples),
      numTop: this.#numTop.subarray(0, numSamples),
      biasStarts: this.#biasStarts.subarray(0, numSamples + 1),
      biasIds: this.#biasIds.subarray(0, numBiases),
      biasValues: this.#biasValues.subarray(0, numBiases),
      historyStarts: this.#historyStarts.subarray(0, numSamples + 1),
      historyPromptCounts: this.#historyPromptCounts.subarray(0, numSamples),
      historyIds: this.#historyIds.subarray(0, numHistory),
      wantLogits: false,
    };
  }

  /** The client's biases and, before minTokens, a ban on every token that would end the sequence. */
  #layBiases({ params, numTokens, numPromptTokens }: Sequence, at: number): number {
    if (params.biasIds.length === 0 && params.minTokens === 0) return at;
    const banned =
      numTokens - numPromptTokens < params.minTokens
        ? [...params.stopTokenIds, ...(params.ignoreEos ? [] : this.#eosTokenIds)]
        : [];
    const end = at + params.biasIds.length + banned.length;
    this.#biasIds = room(this.#biasIds, end);
    this.#biasValues = room(this.#biasValues, end);
    this.#biasIds.set(params.biasIds, at);
    this.#biasValues.set(params.biasValues, at);
    this.#biasIds.set(banned, end - banned.length);
    this.#biasValues.fill(forbiddenLogit, end - banned.length, end);
    return end;
  }
}

/** The array itself when it is long enough, else a longer one with the same beginning. */
function room<T extends Int32Array | Float32Array>(array: T, length: number): T {
  if (length <= array.length) return array;
  const grown = new (array.constructor as new (length: number) => T)(Math.max(length, array.length * 2));
  grown.set(array);
  return grown;
}
