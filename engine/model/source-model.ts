/**
 * What a checkpoint is read into, whatever its format: gguf-model.ts and hf-model.ts fill a SourceModel, base-model.ts checks
 * it and plans the packed tensors, tokenizer.ts opens its tokenizer. Plain data, still as the source stores it.
 */
import type { GgufValue, ModelDims, SourceType } from '../../native/index.ts';

/** What both kinds of source are read into. */
export interface SourceModel {
  config: ModelConfig;
  tensors: Map<string, SourceTensor>;
  /** The source's names for roles; layer tensors have `{layer}` in them. */
  names: Record<string, string>;
  /** Names that carry no weights of their own. */
  isIgnored: (name: string) => boolean;
  sourcePaths: string[];
  eosIds: number[];
  bosId: number | null;
  tokenizer: TokenizerSource;
  chatTemplate: string | null;
}

export interface ModelConfig {
  architecture: string;
  dims: ModelDims;
  /** Whether the head is the embedding; null: it is when the source has no head. */
  tieWordEmbeddings: boolean | null;
  qkvBias: 'required' | 'optional' | 'absent';
  oBias: 'required' | 'optional' | 'absent';
  hasQkNorm: boolean;
  hasPostNorms: boolean;
  /** Added to every norm weight: 1 where the source stores w for 1 + w. */
  normAddend: number;
  /** q and k rows are stored pairwise (GGUF's llama), to be put back into the rotate-half order. */
  hasInterleavedRope: boolean;
}

/** A factor of 100 beyond the deepest models there are; it keeps a hostile count from being looped over. */
export const maxNumLayers = 10_000;

export interface SourceTensor {
  name: string;
  path: string;
  offsetBytes: number;
  type: SourceType;
  /** Outermost first, as Hugging Face writes it: [outFeatures, inFeatures], or [n]. */
  shape: number[];
}

/** A folder with tokenizer.json, or a GGUF file's metadata. */
export type TokenizerSource =
  | { kind: 'folder'; path: string }
  | { kind: 'gguf'; path: string; metadata: Record<string, GgufValue> };
