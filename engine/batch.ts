/**
 * Lays a plan's chunks out as the flat typed arrays of one native step. The arrays are kept and used again: a batch is
 * good until the next `lay`, and a step copies it.
 */
import type { StepBatch } from '../native/index.ts';
import { needsHistory } from './sampling.ts';
import type { Chunk } from './scheduler.ts';
import { blocksFor, type Sequence } from './sequence.ts';

/** Added to a logit to forbid a token; finite, so that a sampler never meets infinity minus infinity. */
const forbiddenLogit = -1e9;

export class BatchLayout {
  readonly #eosTokenIds: readonly number[];
  readonly #blockTokens: number;
  // Bounded by the limits.
  readonly #tokenIds: Column<Int32Array>;
  readonly #positions: Column<Int32Array>;
  readonly #sequenceStarts: Column<Int32Array>;
  readonly #blockStarts: Column<Int32Array>;
  readonly #adapterStarts: Column<Int32Array>;
  readonly #sampleRows: Column<Int32Array>;
  readonly #temperature: Column<Float32Array>;
  readonly #topK: Column<Int32Array>;
  readonly #topP: Column<Float32Array>;
  readonly #minP: Column<Float32Array>;
  readonly #repetitionPenalty: Column<Float32Array>;
  readonly #presencePenalty: Column<Float32Array>;
  readonly #frequencyPenalty: Column<Float32Array>;
  readonly #seeds: Column<BigUint64Array>;
  readonly #numTop: Column<Int32Array>;
  readonly #matchers: Column<Int32Array>;
  readonly #biasStarts: Column<Int32Array>;
  readonly #historyStarts: Column<Int32Array>;
  readonly #historyPromptCounts: Column<Int32Array>;
  readonly #hiddenRows: Column<Int32Array>;
  // Grown on demand, never shrunk.
  readonly #blockIds = new Column(new Int32Array(256));
  readonly #stagingPages = new Column(new Int32Array(16));
  readonly #adapterHandles = new Column(new Int32Array(64));
  readonly #adapterWeights = new Column(new Float32Array(64));
  readonly #biasIds = new Column(new Int32Array(64));
  readonly #biasValues = new Column(new Float32Array(64));
  readonly #historyIds = new Column(new Int32Array(1024));

  constructor(
    limits: { maxBatchTokens: number; maxSequences: number },
    eosTokenIds: Iterable<number>,
    blockTokens: number,
  ) {
    this.#blockTokens = blockTokens;
    const { maxBatchTokens, maxSequences } = limits;
    const ints = (length: number) => new Column(new Int32Array(length));
    const floats = (length: number) => new Column(new Float32Array(length));
    this.#eosTokenIds = [...eosTokenIds];
    this.#tokenIds = ints(maxBatchTokens);
    this.#positions = ints(maxBatchTokens);
    this.#sequenceStarts = ints(maxSequences + 1);
    this.#blockStarts = ints(maxSequences + 1);
    this.#adapterStarts = ints(maxSequences + 1);
    this.#sampleRows = ints(maxSequences);
    this.#hiddenRows = ints(maxBatchTokens);
    this.#temperature = floats(maxSequences);
    this.#topK = ints(maxSequences);
    this.#topP = floats(maxSequences);
    this.#minP = floats(maxSequences);
    this.#repetitionPenalty = floats(maxSequences);
    this.#presencePenalty = floats(maxSequences);
    this.#frequencyPenalty = floats(maxSequences);
    this.#seeds = new Column(new BigUint64Array(maxSequences));
    this.#numTop = ints(maxSequences);
    this.#matchers = ints(maxSequences);
    this.#biasStarts = ints(maxSequences + 1);
    this.#historyStarts = ints(maxSequences + 1);
    this.#historyPromptCounts = ints(maxSequences);
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
    let numStaging = 0;
    let numAdapters = 0;
    let numBiases = 0;
    let numHistory = 0;
    let numHidden = 0;

    for (let s = 0; s < chunks.length; s++) {
      const { sequence, numTokens: length } = chunks[s]!;
      const begin = sequence.numComputedTokens;
      for (let i = 0; i < length; i++) {
        this.#tokenIds.values[numTokens + i] = sequence.tokens[begin + i]!;
        this.#positions.values[numTokens + i] = begin + i;
      }
      numTokens += length;
      this.#sequenceStarts.values[s + 1] = numTokens;
      for (let i = numHiddenRows(chunks[s]!); i > 0; i--)
        this.#hiddenRows.values[numHidden++] = numTokens - i;

      // Those behind may be on their way yet.
      const numOfSequence = blocksFor(begin + length, this.#blockTokens);
      this.#blockIds.grow(numBlocks + numOfSequence);
      for (let i = 0; i < numOfSequence; i++) {
        this.#blockIds.values[numBlocks++] = sequence.blocks[i]!;
      }
      this.#blockStarts.values[s + 1] = numBlocks;
      if (sequence.long && sequence.long.numOnHost > 0) {
        const { staging } = sequence.long;
        this.#stagingPages.grow(numStaging + staging.length);
        this.#stagingPages.values.set(staging, numStaging);
        numStaging += staging.length;
      }

      this.#adapterHandles.grow(numAdapters + sequence.adapters.length);
      this.#adapterWeights.grow(numAdapters + sequence.adapters.length);
      for (let a = 0; a < sequence.adapters.length; a++) {
        const { handle, weight } = sequence.adapters[a]!;
        this.#adapterHandles.values[numAdapters] = handle;
        this.#adapterWeights.values[numAdapters++] = weight;
      }
      this.#adapterStarts.values[s + 1] = numAdapters;

      if (begin + length < sequence.numTokens) continue;
      const i = sampled.push(sequence) - 1;
      const { params } = sequence;
      this.#sampleRows.values[i] = numTokens - 1;
      this.#temperature.values[i] = params.temperature;
      this.#topK.values[i] = params.topK;
      this.#topP.values[i] = params.topP;
      this.#minP.values[i] = params.minP;
      this.#repetitionPenalty.values[i] = params.repetitionPenalty;
      this.#presencePenalty.values[i] = params.presencePenalty;
      this.#frequencyPenalty.values[i] = params.frequencyPenalty;
      this.#seeds.values[i] = params.seed;
      this.#numTop.values[i] = params.numLogprobs ?? 0;
      this.#matchers.values[i] = sequence.matcher;

      numBiases = this.#layBiases(sequence, numBiases);
      this.#biasStarts.values[i + 1] = numBiases;

      this.#historyPromptCounts.values[i] = 0;
      if (needsHistory(params)) {
        this.#historyIds.grow(numHistory + sequence.numTokens);
        this.#historyIds.values.set(sequence.tokens.subarray(0, sequence.numTokens), numHistory);
        numHistory += sequence.numTokens;
        this.#historyPromptCounts.values[i] = sequence.numPromptTokens;
      }
      this.#historyStarts.values[i + 1] = numHistory;
    }

    const numSequences = chunks.length;
    const numSamples = sampled.length;
    return {
      tokenIds: this.#tokenIds.first(numTokens),
      positions: this.#positions.first(numTokens),
      sequenceStarts: this.#sequenceStarts.first(numSequences + 1),
      blockStarts: this.#blockStarts.first(numSequences + 1),
      blockIds: this.#blockIds.first(numBlocks),
      stagingPages: this.#stagingPages.first(numStaging),
      adapterStarts: this.#adapterStarts.first(numSequences + 1),
      adapterHandles: this.#adapterHandles.first(numAdapters),
      adapterWeights: this.#adapterWeights.first(numAdapters),
      sampleRows: this.#sampleRows.first(numSamples),
      hiddenRows: this.#hiddenRows.first(numHidden),
      temperature: this.#temperature.first(numSamples),
      topK: this.#topK.first(numSamples),
      topP: this.#topP.first(numSamples),
      minP: this.#minP.first(numSamples),
      repetitionPenalty: this.#repetitionPenalty.first(numSamples),
      presencePenalty: this.#presencePenalty.first(numSamples),
      frequencyPenalty: this.#frequencyPenalty.first(numSamples),
      seeds: this.#seeds.first(numSamples),
      numTop: this.#numTop.first(numSamples),
      matchers: this.#matchers.first(numSamples),
      biasStarts: this.#biasStarts.first(numSamples + 1),
      biasIds: this.#biasIds.first(numBiases),
      biasValues: this.#biasValues.first(numBiases),
      historyStarts: this.#historyStarts.first(numSamples + 1),
      historyPromptCounts: this.#historyPromptCounts.first(numSamples),
      historyIds: this.#historyIds.first(numHistory),
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
    this.#biasIds.grow(end);
    this.#biasValues.grow(end);
    this.#biasIds.values.set(params.biasIds, at);
    this.#biasValues.values.set(params.biasValues, at);
    this.#biasIds.values.set(banned, end - banned.length);
    this.#biasValues.values.fill(forbiddenLogit, end - banned.length, end);
    return end;
  }
}

/** Rows at the end of a chunk whose final hidden states are wanted. */
export function numHiddenRows({ sequence, numTokens, endTokens }: Chunk): number {
  if (sequence.hiddenRows === 'all') return numTokens;
  return sequence.hiddenRows === 'last' && endTokens === sequence.numPromptTokens ? 1 : 0;
}

/** An array that is used again: `values` to be written, `first` to be handed out. */
class Column<T extends Int32Array | Float32Array | BigUint64Array> {
  values: T;
  #view: T;

  constructor(values: T) {
    this.values = values;
    this.#view = values;
  }

  /** Its first `length` values. The view is made anew only when the length is another. */
  first(length: number): T {
    if (this.#view.length !== length) this.#view = this.values.subarray(0, length) as T;
    return this.#view;
  }

  /** Has at least `length` values after this; those that are there stay. */
  grow(length: number): void {
    if (length <= this.values.length) return;
    const Values = this.values.constructor as new (buffer: ArrayBuffer) => T;
    const size = Math.max(length, this.values.length * 2) * this.values.BYTES_PER_ELEMENT;
    const grown = new Values(new ArrayBuffer(size));
    (grown as { set(from: T): void }).set(this.values);
    this.values = grown;
    this.#view = grown;
  }
}
