/**
 * The native core as TypeScript sees it: loads the addon and gives each export its type and its contract.
 * Everything that takes time returns a promise and runs off the JavaScript thread. One call is one step:
 * flat typed arrays in, flat typed arrays out, no callback per token.
 *
 * A refused argument throws a TypeError or RangeError that names it; a failed file throws an Error with `code`
 * (`gguf_invalid`, `weights_invalid`, `adapter_invalid`, `grammar_invalid`, `io_failed`) and a message that names the field.
 */
import { createRequire } from 'node:module';
import { fileURLToPath } from 'node:url';

/** Tensor types of source files. The names are GGUF's, in lower case; safetensors' F32, F16, BF16 map to the first three. */
export type SourceType =
  | 'f32'
  | 'f16'
  | 'bf16'
  | 'q8_0'
  | 'q4_0'
  | 'q4_1'
  | 'q5_0'
  | 'q5_1'
  | 'q4_k'
  | 'q5_k'
  | 'q6_k';

/** Formats of packed matrices, as in src/weights.h; the index in this list is the number in packed files. */
export const weightFormats = [
  'f32',
  'f16',
  'bf16',
  'int4',
  'int4_min',
  'int4_min_f32',
  'int8',
  'int8_min',
  'int8_min_f32',
  'int8_group16',
] as const;
export type WeightFormat = (typeof weightFormats)[number];

export interface GgufTensor {
  name: string;
  /** As GGUF stores it, innermost dimension first. */
  dims: number[];
  type: SourceType;
  /** Absolute in the file. */
  offsetBytes: number;
  sizeBytes: number;
}
export type GgufValue = string | number | bigint | boolean | string[] | Float64Array | boolean[];
export interface GgufFile {
  version: number;
  /** Strings arrays are string[]; number arrays Float64Array; 64-bit integers bigint when over 2^53. */
  metadata: Record<string, GgufValue>;
  tensors: GgufTensor[];
}

export interface PackJob {
  sourcePath: string;
  sourceOffsetBytes: number;
  sourceType: SourceType;
  /** [outFeatures, inFeatures]; a vector is [1, n]. */
  outFeatures: number;
  inFeatures: number;
  /** Row permutation: output row n is source row rows[n] (GGUF's llama order of q and k rows to Hugging Face's); null: as they are. */
  rows: Int32Array | null;
  /** Added to every element after reading, in f32: 1 for Gemma norms from Hugging Face, else 0. */
  addend: number;
  /** 'vector': plain f32 [n]; else a packed matrix. */
  target: WeightFormat | 'vector';
  /** An existing file, big enough. */
  outputPath: string;
  outputOffsetBytes: number;
}

export interface ModelDims {
  numLayers: number;
  hiddenSize: number;
  intermediateSize: number;
  numHeads: number;
  numKvHeads: number;
  headDim: number;
  vocabSize: number;
  maxPositions: number;
  normEps: number;
  /** Multiplies q·k. */
  attentionScale: number;
  /** Multiplies token embeddings; 1, or √hiddenSize (as bf16 rounds it, Gemma). */
  embeddingScale: number;
  activation: 'silu' | 'gelu_tanh';
  /** Per layer: keys this many positions back or more are not seen; 0: all are. */
  slidingWindows: Int32Array;
  /** Per layer: which row of ropeTables. */
  ropeTableIndex: Int32Array;
  /** Per table: inverse frequencies [headDim / 2] f64 and what multiplies cos and sin; rope scaling is already in them. */
  ropeTables: { inverseFrequencies: Float64Array; attentionFactor: number }[];
}

/**
 * One tensor of a packed file. Roles: `embedding`, `final_norm`, `lm_head` (absent when tied), and per layer
 * `attention_norm`, `post_attention_norm`?, `mlp_norm`, `post_mlp_norm`?, `q_proj`, `k_proj`, `v_proj`, `o_proj`,
 * `gate_proj`, `up_proj`, `down_proj`, `q_bias`?, `k_bias`?, `v_bias`?, `o_bias`?, `q_norm`?, `k_norm`?  (? may be absent)
 */
export interface PackedTensor {
  role: string;
  /** −1 for tensors outside the layers. */
  layer: number;
  format: WeightFormat | 'vector';
  outFeatures: number;
  inFeatures: number;
  offsetBytes: number;
  sizeBytes: number;
}

export interface RuntimeOptions {
  /** The packed file; mapped read-only and shared, unless weights are streamed. */
  packedPath: string;
  dims: ModelDims;
  tensors: PackedTensor[];
  /** 'int8': activations are quantised per 32. 'f32': everything in f32, for reference. */
  activations: 'int8' | 'f32';
  /** 'auto': f16, and f32 beside f32 activations, where nothing else is accepted. 'int8' holds twice the positions. */
  kvType: 'auto' | 'f16' | 'int8';
  /** 'keep': adapters stay as their files have them. 'int8': they are rounded to int8 when loaded, half the bytes of 16 bits. */
  adapterQuantization: 'keep' | 'int8';
  deviceMemoryBytes: number;
  /** Of the host arena behind the device arena, in pages of the same size; 0: none. */
  hostMemoryBytes: number;
  /**
   * Most bytes of weights in memory. 0, or no less than the packed file has: all are mapped. Otherwise as many layers as fit are read once
   * and stay, and the others are read from the file for each step. Less than the least that this needs is refused.
   */
  weightMemoryBytes: number;
  /** 0: one per core that this process may use. */
  numThreads: number;
}

export const targetModules = [
  'q_proj',
  'k_proj',
  'v_proj',
  'o_proj',
  'gate_proj',
  'up_proj',
  'down_proj',
  'lm_head',
] as const;
export type TargetModule = (typeof targetModules)[number];

export interface AdapterModule {
  /** −1 for lm_head. */
  layer: number;
  target: TargetModule;
  rank: number;
  scaling: number;
  type: 'f32' | 'f16' | 'bf16';
  /** Absolute offsets in the safetensors file. A is [rank, inFeatures], B [outFeatures, rank]; both of `type`. */
  aOffsetBytes: number;
  bOffsetBytes: number;
  /** DoRA's magnitude vector [outFeatures] of magnitudeType; −1: none. */
  magnitudeOffsetBytes: number;
  magnitudeType: 'f32' | 'f16' | 'bf16';
  /** lora_B's bias [outFeatures] of `biasType`; −1: none. */
  biasOffsetBytes: number;
  biasType: 'f32' | 'f16' | 'bf16';
}

export interface StepBatch {
  /**
   * [numTokens] A reference, −1 − i, stands for the token that sample i of the step before draws, so that a step can be
   * given before that one has ended. When that one fails it is token 0. The same in historyIds.
   */
  tokenIds: Int32Array;
  positions: Int32Array;
  /** [numSequences + 1]: rows of sequence s are sequenceStarts[s] .. sequenceStarts[s + 1] − 1, consecutive positions. */
  sequenceStarts: Int32Array;
  /**
   * [numSequences + 1] into blockIds: pages of sequence s, enough for its last position. A block that is full, and before those
   * that this step writes, may be a page of the host arena: its id is numPages + page. It is read there, layer by layer, while
   * the step runs: until the step is over, that page stays as it is (nothing is copied or written to it, nor is it cleared; it may
   * be copied to the device). What lies where changes no bit of the result.
   */
  blockStarts: Int32Array;
  blockIds: Int32Array;
  /**
   * Device pages through which the step brings what it reads from the host arena: at least minStagingPages when a block is
   * there, else none are needed. The step's alone while it runs; two steps may have the same ones, since steps run one after
   * another. What they held is lost. With more pages attention waits less often for the copies.
   */
  stagingPages: Int32Array;
  /** [numSequences + 1] into adapterHandles and adapterWeights: none, one, or several with weights. */
  adapterStarts: Int32Array;
  adapterHandles: Int32Array;
  adapterWeights: Float32Array;
  /** [numSamples] row indices whose logits are wanted, ascending. */
  sampleRows: Int32Array;
  /** Row indices whose final hidden states are wanted, ascending. */
  hiddenRows: Int32Array;
  /** [numSamples] each; see SampleParams in src/kernels/kernels.h. */
  temperature: Float32Array;
  topK: Int32Array;
  topP: Float32Array;
  minP: Float32Array;
  repetitionPenalty: Float32Array;
  presencePenalty: Float32Array;
  frequencyPenalty: Float32Array;
  seeds: BigUint64Array;
  numTop: Int32Array;
  /** [numSamples + 1] into biasIds and biasValues. */
  biasStarts: Int32Array;
  biasIds: Int32Array;
  biasValues: Float32Array;
  /** [numSamples + 1] into historyIds; the first historyPromptCounts[i] of a sample's run are its prompt. Empty runs when no penalty is on. */
  historyStarts: Int32Array;
  historyPromptCounts: Int32Array;
  historyIds: Int32Array;
  /** [numSamples] handles of openMatcher, each once; −1: none. The sample follows the matcher's grammar, and the matcher the sample. */
  matchers: Int32Array;
  /** Return the raw logits too (tests, scoring). */
  wantLogits: boolean;
}

/**
 * Parts of a step: a projection is counted with its quantising, adapters and biases, `gate_up` with the activation too; `norm`
 * with the residual sums; `plan` is what a step prepares before its first operation; `weights` is waiting for layers that
 * stream. See src/step_clock.h.
 */
export type StepPart =
  | 'plan'
  | 'embed'
  | 'weights'
  | 'norm'
  | 'qkv'
  | 'rope'
  | 'kv_write'
  | 'attention'
  | 'out'
  | 'gate_up'
  | 'down'
  | 'head'
  | 'sample';

/** Arrays but `hidden` and `logits` are the runtime's: the second step after this one writes them again. */
export interface StepResult {
  /** [numSamples] */
  tokens: Int32Array;
  logprobs: Float32Array;
  /** [numSamples × max(numTop)], likeliest first; −1 fills up. */
  topIds: Int32Array;
  topLogprobs: Float32Array;
  /** [hiddenRows × hiddenSize] after the final norm, as the head reads them; null: none were asked for. */
  hidden: Float32Array | null;
  /** [numSamples × vocabSize] raw logits when asked for, else null. */
  logits: Float32Array | null;
  /** Matchers that cannot go on, by sample: what these drew, and draw from now on, follows no grammar. */
  matcherErrors: { sample: number; message: string }[];
  /** Bytes of KV that were read from the host arena. */
  stagedBytes: number;
  /** When the step began and ended, in milliseconds on the clock of process.hrtime(). */
  beganMs: number;
  endedMs: number;
}

/** Layers that are read from the packed file for each step. See src/weight_stream.h. */
export interface WeightStream {
  numStreamedLayers: number;
  /** Of resident weights and of the ring through which the others come. */
  memoryBytes: number;
  /** Read for each step. */
  stepBytes: number;
  /** Of all reads since the runtime was opened, those of the residents included. */
  readBytes: number;
  readSeconds: number;
  /** Reads go past the page cache. */
  isDirect: boolean;
}

export interface Runtime {
  /** Page (= KV block of 16 positions, all layers) size and count of the device arena. */
  readonly pageBytes: number;
  readonly numPages: number;
  /** Pages of the host arena. */
  readonly numHostPages: number;
  /** Least stagingPages of a step with blocks in the host arena: 32 blocks' keys and values of one layer. */
  readonly minStagingPages: number;
  readonly blockTokens: number;
  readonly numThreads: number;
  /** Bytes of the packed file. */
  readonly weightBytes: number;
  /**
   * Copies the batch and runs it after the steps given before. One may run and one wait behind it; a third is refused.
   * @throws io_failed when a layer that streams could not be read: the next step tries again
   */
  step(batch: StepBatch): Promise<StepResult>;
  /** Pages that an adapter with these modules takes; fewer where adapters are rounded to int8. */
  adapterPages(modules: AdapterModule[]): number;
  /** Bytes in those pages that are the adapter's. The rest, mostly of the last page, holds nothing. */
  adapterBytes(modules: AdapterModule[]): number;
  /**
   * Reads, checks (finite numbers, sizes) and lays an adapter out in the given pages; steps go on meanwhile.
   * @returns a handle for StepBatch.adapterHandles. The pages belong to it until `releaseAdapter`.
   */
  loadAdapter(path: string, modules: AdapterModule[], pages: Int32Array): Promise<number>;
  /**
   * A handle for an adapter whose bytes are in these pages when a step uses it: copied, page for page, from those that
   * `loadAdapter` wrote. `modules` are the same ones. Reads no file, and none of the pages.
   */
  attachAdapter(modules: AdapterModule[], pages: Int32Array): number;
  /** Forgets a handle. Refused while a step that uses it runs or waits; afterwards its pages may be reused. */
  releaseAdapter(handle: number): void;
  /**
   * Copies page from[i] of one arena to page to[i] of the other, on a thread of its own: steps go on, and copies are done in
   * the order in which they were asked for. At most 256 may be under way. Until it resolves nobody else may read or write the
   * pages that are copied to. Those that are copied from may be read; who writes to them makes what arrives worthless, not more.
   * @returns how long the copying took, without the wait before it
   */
  copyPages(direction: 'toHost' | 'toDevice', from: Int32Array, to: Int32Array): Promise<{ seconds: number }>;
  /** Writes zeros over pages that no step and no copy uses, before it returns: some tens of microseconds a page. */
  clearPages(tier: 'device' | 'host', pages: Int32Array): void;
  /** A copy of host pages, [pages × pageBytes], made before it returns: give it a few at a time. */
  readHostPages(pages: Int32Array): Buffer;
  /** Writes bytes [pages × pageBytes] to host pages that no step and no copy uses, before it returns. */
  writeHostPages(pages: Int32Array, bytes: Uint8Array): void;
  /** A matcher at the beginning of a grammar, for one sequence; a copy, some tens of microseconds. */
  openMatcher(grammar: Grammar): number;
  /** Forgets a matcher. A step that runs or waits keeps it as long as it needs it. */
  closeMatcher(handle: number): void;
  /** Milliseconds that steps spent in each part of the forward pass since the runtime was opened. */
  stepParts(): Record<StepPart, number>;
  /** null: all weights are mapped. */
  weightStream(): WeightStream | null;
  /** Unmaps and frees everything; later calls fail with code `closed`. Refused while a step or a copy runs: waits for no one. */
  close(): void;
}

declare const vocabulary: unique symbol;
declare const grammar: unique symbol;
/** The tokens of a model, as grammars need them. Freed when it is collected, as grammars are. */
export type Vocabulary = { [vocabulary]: true };
/** A compiled grammar. */
export type Grammar = { [grammar]: true };

/** JSON schema, a regular expression of the whole output, or a grammar in llguidance's form of Lark. */
export type GrammarKind = 'json_schema' | 'regex' | 'lark';

interface Addon {
  openVocabulary(bytes: Uint8Array, ends: Int32Array, eosTokenIds: Int32Array): Promise<Vocabulary>;
  compileGrammar(vocabulary: Vocabulary, kind: GrammarKind, text: string): Promise<Grammar>;
  cpuInfo(): { isa: string; isas: string[]; numCpus: number };
  readGguf(path: string): Promise<GgufFile>;
  readIn(path: string): Promise<void>;
  packedBytes(format: WeightFormat | 'vector', outFeatures: number, inFeatures: number): number;
  sourceBytes(type: SourceType, numElements: number): number;
  packTensor(job: PackJob): Promise<void>;
  openRuntime(options: RuntimeOptions): Promise<Runtime>;
}

/** The compiled file: who has the same one computes the same bits. */
export const addonPath = fileURLToPath(new URL('build/motet.node', import.meta.url));
const addon = createRequire(import.meta.url)(addonPath) as Addon;

/** The instruction set in use, those this machine has, and how many CPUs this process may use (affinity and cgroup quota). */
export const cpuInfo = addon.cpuInfo;
/** Parses and checks a GGUF file's header (v2, v3); every count and offset is checked against the file's size first. */
export const readGguf = addon.readGguf;
/**
 * Brings a file into the page cache as openRuntime maps it, on huge pages where there are any: who reads it first in another way
 * leaves it on small ones. @throws io_failed
 */
export const readIn = addon.readIn;
/** Bytes of a packed tensor; [1, n] for vectors. */
export const packedBytes = addon.packedBytes;
/** Bytes of a source tensor of that type; throws when numElements is no multiple of the type's block. */
export const sourceBytes = addon.sourceBytes;
/** Reads one tensor, converts or quantises it, and writes it packed at its place in the output file. */
export const packTensor = addon.packTensor;
/**
 * @param bytes  of all tokens, one after the other. A special token begins with 0xff; one without bytes is never allowed
 * @param ends   [vocabSize] where each ends
 */
export const openVocabulary = addon.openVocabulary;
/** Bounded work. @throws grammar_invalid when the text is wrong, not supported, or more than the bounds allow */
export const compileGrammar = addon.compileGrammar;
/** Maps a packed file, makes the arenas and the threads. */
export const openRuntime = addon.openRuntime;
