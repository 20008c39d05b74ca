/**
 * The models that are compared: the shapes of three public ones. Speed depends on shapes and formats, not on values, so two
 * of them get random weights (random-model.ts); SmolLM2-135M-Instruct is the real file that scripts/setup.sh fetches.
 */
import type { GgmlType } from './gguf-file.ts';

export interface Shape {
  /** In tables. */
  title: string;
  architecture: 'llama' | 'qwen2';
  numLayers: number;
  hiddenSize: number;
  intermediateSize: number;
  numHeads: number;
  numKvHeads: number;
  headDim: number;
  vocabSize: number;
  maxPositions: number;
  normEps: number;
  ropeTheta: number;
}

export const shapes = {
  smollm2: {
    title: 'SmolLM2-135M',
    architecture: 'llama',
    numLayers: 30,
    hiddenSize: 576,
    intermediateSize: 1536,
    numHeads: 9,
    numKvHeads: 3,
    headDim: 64,
    vocabSize: 49_152,
    maxPositions: 8192,
    normEps: 1e-5,
    ropeTheta: 100_000,
  },
  qwen05b: {
    title: 'Qwen2.5-0.5B',
    architecture: 'qwen2',
    numLayers: 24,
    hiddenSize: 896,
    intermediateSize: 4864,
    numHeads: 14,
    numKvHeads: 2,
    headDim: 64,
    vocabSize: 151_936,
    maxPositions: 32_768,
    normEps: 1e-6,
    ropeTheta: 1_000_000,
  },
  llama1b: {
    title: 'Llama-3.2-1B',
    architecture: 'llama',
    numLayers: 16,
    hiddenSize: 2048,
    intermediateSize: 8192,
    numHeads: 32,
    numKvHeads: 8,
    headDim: 64,
    vocabSize: 128_256,
    maxPositions: 131_072,
    normEps: 1e-5,
    ropeTheta: 500_000,
  },
} satisfies Record<string, Shape>;
export type ShapeName = keyof typeof shapes;

export type Linear = 'q_proj' | 'k_proj' | 'v_proj' | 'o_proj' | 'gate_proj' | 'up_proj' | 'down_proj';

/** Per linear layer: its name in GGUF (after `blk.<layer>.`), its parent in Hugging Face's names, [outFeatures, inFeatures]. */
export function linears(
  shape: Shape,
): Record<Linear, { gguf: string; parent: string; size: [number, number] }> {
  const { hiddenSize: hidden, intermediateSize: inter, numHeads, numKvHeads, headDim } = shape;
  const [q, kv] = [numHeads * headDim, numKvHeads * headDim];
  return {
    q_proj: { gguf: 'attn_q', parent: 'self_attn', size: [q, hidden] },
    k_proj: { gguf: 'attn_k', parent: 'self_attn', size: [kv, hidden] },
    v_proj: { gguf: 'attn_v', parent: 'self_attn', size: [kv, hidden] },
    o_proj: { gguf: 'attn_output', parent: 'self_attn', size: [hidden, q] },
    gate_proj: { gguf: 'ffn_gate', parent: 'mlp', size: [inter, hidden] },
    up_proj: { gguf: 'ffn_up', parent: 'mlp', size: [inter, hidden] },
    down_proj: { gguf: 'ffn_down', parent: 'mlp', size: [hidden, inter] },
  };
}

/** Elements of one adapter of that rank on these layers. */
export function adapterElements(shape: Shape, rank: number, targets: readonly Linear[]): number {
  const all = linears(shape);
  const perLayer = targets.reduce((sum, name) => sum + rank * (all[name].size[0] + all[name].size[1]), 0);
  return shape.numLayers * perLayer;
}

export const quantizations = ['q4_0', 'q4_0_all', 'q4_k_m', 'q8_0'] as const;
/**
 * q4_0, q4_k_m, q8_0: as llama.cpp's llama-quantize mixes the types of a tied model. q4_0_all: the embedding, which is the
 * head too, is q4_0 as well: four bits everywhere.
 */
export type Quantization = (typeof quantizations)[number];

/** K-quants need rows of a multiple of 256; where they are not, llama-quantize takes these. */
const fallbacks: Partial<Record<GgmlType, GgmlType>> = { q4_k: 'q5_0', q6_k: 'q8_0' };

/** The type of one matrix. @param linear null: the embedding */
export function matrixType(
  shape: Shape,
  quantization: Quantization,
  linear: Linear | null,
  layer: number,
): GgmlType {
  const wanted = wantedType(shape, quantization, linear, layer);
  const inFeatures = linear === null ? shape.hiddenSize : linears(shape)[linear].size[1];
  return inFeatures % 256 === 0 ? wanted : (fallbacks[wanted] ?? wanted);
}

function wantedType(
  { numLayers }: Shape,
  quantization: Quantization,
  linear: Linear | null,
  layer: number,
): GgmlType {
  switch (quantization) {
    case 'q8_0':
      return 'q8_0';
    case 'q4_0_all':
      return 'q4_0';
    case 'q4_0':
      return linear === null ? 'q6_k' : 'q4_0';
    case 'q4_k_m': {
      // llama-quantize: use_more_bits.
      const eighth = Math.floor(numLayers / 8);
      const isPrecise = layer < eighth || layer >= 7 * eighth || (layer - eighth) % 3 === 2;
      if (linear === null) return 'q6_k';
      return (linear === 'v_proj' || linear === 'down_proj') && isPrecise ? 'q6_k' : 'q4_k';
    }
  }
}
