/**
 * A GGUF file as a SourceModel: metadata keys to dimensions, ggml's tensor names to roles.
 * Keys and their defaults are those of llama.cpp. What would change the arithmetic and is not supported is refused by key.
 */
import { open } from 'node:fs/promises';
import { type GgufFile, type GgufValue, readGguf } from '../../native/index.ts';
import { InputError, ioError, shown } from '../input-error.ts';
import { metadataReader, tokenTypes } from './gguf-metadata.ts';
import { type RopeScaling, ropeTable } from './rope.ts';
import { type ModelConfig, maxNumLayers, type SourceModel, type SourceTensor } from './source-model.ts';

type Architecture = 'llama' | 'qwen2' | 'qwen3' | 'gemma3';
const architectures: readonly Architecture[] = ['llama', 'qwen2', 'qwen3', 'gemma3'];

const tensorNames: Record<string, string> = {
  embedding: 'token_embd.weight',
  final_norm: 'output_norm.weight',
  lm_head: 'output.weight',
  attention_norm: 'blk.{layer}.attn_norm.weight',
  post_attention_norm: 'blk.{layer}.post_attention_norm.weight',
  mlp_norm: 'blk.{layer}.ffn_norm.weight',
  post_mlp_norm: 'blk.{layer}.post_ffw_norm.weight',
  q_proj: 'blk.{layer}.attn_q.weight',
  k_proj: 'blk.{layer}.attn_k.weight',
  v_proj: 'blk.{layer}.attn_v.weight',
  o_proj: 'blk.{layer}.attn_output.weight',
  gate_proj: 'blk.{layer}.ffn_gate.weight',
  up_proj: 'blk.{layer}.ffn_up.weight',
  down_proj: 'blk.{layer}.ffn_down.weight',
  q_bias: 'blk.{layer}.attn_q.bias',
  k_bias: 'blk.{layer}.attn_k.bias',
  v_bias: 'blk.{layer}.attn_v.bias',
  o_bias: 'blk.{layer}.attn_output.bias',
  q_norm: 'blk.{layer}.attn_q_norm.weight',
  k_norm: 'blk.{layer}.attn_k_norm.weight',
};

/** Keys (after `<architecture>.`) that change the arithmetic in ways the native core does not have, unless they hold this. */
const unsupportedKeys: Record<string, number> = {
  expert_count: 0,
  logit_scale: 0,
  final_logit_softcapping: 0,
  attn_logit_softcapping: 0,
  'attention.clamp_kqv': 0,
  'attention.max_alibi_bias': 0,
};

export async function readGgufModel(path: string): Promise<SourceModel> {
  const file = await readGguf(path).catch((error) => {
    if (error.code === 'io_failed') throw ioError(`read model ${path}`, error);
    throw new InputError('model_invalid', `${path}: ${error.message}`, { cause: error });
  });
  const tensors = sourceTensors(path, file);
  try {
    const ropeFactors = await readRopeFactors(tensors.get('rope_freqs.weight'));
    return {
      config: ggufConfig(file.metadata, tensors, ropeFactors),
      tensors,
      names: tensorNames,
      isIgnored: (name) => name === 'rope_freqs.weight',
      sourcePaths: [path],
      ...ggufTokens(file.metadata),
      tokenizer: { kind: 'gguf', path, metadata: file.metadata },
      chatTemplate: metadataReader(file.metadata).text('tokenizer.chat_template', null),
    };
  } catch (error) {
    if (error instanceof InputError)
      throw new InputError(error.code, `${path}: ${error.message}`, { cause: error.cause });
    throw error;
  }
}

function sourceTensors(path: string, file: GgufFile): Map<string, SourceTensor> {
  return new Map(
    file.tensors.map(({ name, dims, type, offsetBytes }) => {
      // Trailing dimensions of 1 are padding of the format.
      const shape = [...dims];
      while (shape.length > 1 && shape.at(-1) === 1) shape.pop();
      return [name, { name, path, offsetBytes, type, shape: shape.reverse() }];
    }),
  );
}

export function ggufConfig(
  metadata: Record<string, GgufValue>,
  tensors: Map<string, SourceTensor>,
  ropeFactors: Float32Array | null,
): ModelConfig {
  const global = metadataReader(metadata);
  const architecture = global.text('general.architecture') as Architecture;
  if (!architectures.includes(architecture)) {
    refuse('general.architecture', `one of ${architectures.join(', ')}`, shown(architecture));
  }
  const key = (name: string) => `${architecture}.${name}`;
  const count = (name: string, fallback?: number) => global.count(key(name), fallback);
  const number = (name: string, fallback?: number) => global.number(key(name), fallback);

  for (const [name, harmless] of Object.entries(unsupportedKeys)) {
    const value = number(name, harmless);
    if (value !== harmless)
      refuse(key(name), `${harmless} or none; this architecture variant is not supported`, `${value}`);
  }
  const [numLayers, hiddenSize, numHeads] = [
    count('block_count'),
    count('embedding_length'),
    count('attention.head_count'),
  ];
  const headDim = count('attention.key_length', hiddenSize / numHeads);
  const expectHeadDim = (name: string) => {
    const value = count(name, headDim);
    if (value !== headDim) refuse(key(name), `${headDim}, the size of a head`, `${value}`);
  };
  expectHeadDim('attention.value_length');
  expectHeadDim('rope.dimension_count');
  if (!(numLayers > 0 && numLayers <= maxNumLayers))
    refuse(key('block_count'), `an integer from 1 to ${maxNumLayers}`, `${numLayers}`);
  if (!Number.isInteger(headDim) || headDim < 2)
    refuse(key('attention.head_count'), 'a divisor of embedding_length', `${numHeads}`);

  const isGemma = architecture === 'gemma3';
  const window = count('attention.sliding_window', 0);
  // Every nth layer sees everything (Gemma 3: n = 6); without a pattern the window is every layer's.
  const period = isGemma ? count('attention.sliding_window_pattern', 6) : 0;
  const isFull = (layer: number) => period > 0 && (layer + 1) % period === 0;
  const theta = number('rope.freq_base', 10_000);
  const globalTable = ropeTable(headDim, theta, ropeScaling(metadata, architecture, ropeFactors, headDim));
  // llama.cpp: Gemma 3's window layers use this base, and never a scaling.
  const localTable = ropeTable(headDim, number('rope.freq_base_swa', 10_000), { type: 'default' });

  const layers = Array.from({ length: numLayers }, (_, layer) => layer);
  return {
    architecture,
    dims: {
      numLayers,
      hiddenSize,
      intermediateSize: count('feed_forward_length'),
      numHeads,
      numKvHeads: count('attention.head_count_kv', numHeads),
      headDim,
      vocabSize: tensors.get(tensorNames.embedding!)?.shape[0] ?? 0,
      maxPositions: count('context_length'),
      normEps: number('attention.layer_norm_rms_epsilon'),
      // The 27B model (the one with 62 layers) scales by its width per head instead of the head's own size.
      attentionScale: 1 / Math.sqrt(isGemma && numLayers === 62 ? hiddenSize / numHeads : headDim),
      // llama.cpp multiplies by √hidden in f32; transformers rounds it to the embedding's type, here f32 as well.
      embeddingScale: isGemma ? Math.fround(Math.sqrt(hiddenSize)) : 1,
      activation: isGemma ? 'gelu_tanh' : 'silu',
      slidingWindows: Int32Array.from(layers, (layer) => (isFull(layer) ? 0 : window)),
      ropeTableIndex: Int32Array.from(layers, (layer) => (isGemma && !isFull(layer) ? 1 : 0)),
      ropeTables: isGemma ? [globalTable, localTable] : [globalTable],
    },
    tieWordEmbeddings: null,
    qkvBias: architecture === 'qwen2' ? 'required' : 'absent',
    oBias: architecture === 'llama' ? 'optional' : 'absent',
    hasQkNorm: architecture === 'qwen3' || isGemma,
    hasPostNorms: isGemma,
    normAddend: 0,
    hasInterleavedRope: architecture === 'llama',
  };
}

function ropeScaling(
  metadata: Record<string, GgufValue>,
  architecture: string,
  factors: Float32Array | null,
  headDim: number,
): RopeScaling {
  const { text, number, count } = metadataReader(metadata);
  const key = (name: string) => `${architecture}.rope.${name}`;
  if (factors !== null) {
    if (factors.length !== headDim / 2)
      refuse("tensor 'rope_freqs.weight' shape", `[${headDim / 2}]`, `[${factors.length}]`);
    if (!factors.every((f) => f > 0 && Number.isFinite(f)))
      refuse("tensor 'rope_freqs.weight'", 'numbers above 0', 'others');
    return { type: 'factors', factors };
  }
  // Old files have only `scale_linear`; 0 and 1 mean none.
  const linear = number(key('scale_linear'), 0);
  const type = text(key('scaling.type'), linear > 0 && linear !== 1 ? 'linear' : 'none');
  const factor = number(key('scaling.factor'), linear || 1);
  if (!(factor > 0)) refuse(key('scaling.factor'), 'a number above 0', `${factor}`);
  switch (type) {
    case 'none':
      return { type: 'default' };
    case 'linear':
      return { type: 'linear', factor };
    case 'yarn': {
      const mscale = (factor <= 1 ? 1 : 1 + 0.1 * Math.log(factor)) * number(key('scaling.attn_factor'), 1);
      return {
        type: 'yarn',
        factor,
        originalMaxPositions: count(
          key('scaling.original_context_length'),
          count(`${architecture}.context_length`),
        ),
        attentionFactor: mscale,
        betaFast: number(key('scaling.yarn_beta_fast'), 32),
        betaSlow: number(key('scaling.yarn_beta_slow'), 1),
        truncate: true,
      };
    }
    default:
      return refuse(key('scaling.type'), 'none, linear or yarn', shown(type));
  }
}

/** Llama 3's factors per frequency, a tensor of a few hundred bytes. */
async function readRopeFactors(tensor: SourceTensor | undefined): Promise<Float32Array | null> {
  if (tensor === undefined) return null;
  const [length] = tensor.shape;
  if (tensor.type !== 'f32' || tensor.shape.length !== 1 || length! > 65_536) {
    refuse(
      "tensor 'rope_freqs.weight'",
      'f32 factors, one per frequency',
      `${tensor.type} [${tensor.shape}]`,
    );
  }
  const file = await open(tensor.path);
  try {
    const factors = new Float32Array(length!);
    await file.read(factors, 0, factors.byteLength, tensor.offsetBytes);
    return factors;
  } finally {
    await file.close();
  }
}

/** Control tokens that end a turn, by the text that known models give them; llama.cpp stops at the same ones. */
const endTexts = new Set([
  '<|eot_id|>',
  '<|im_end|>',
  '<|end|>',
  '<end_of_turn>',
  '<|endoftext|>',
  '<|eom_id|>',
  '<|end_of_text|>',
  '</s>',
]);

function ggufTokens(metadata: Record<string, GgufValue>): { eosIds: number[]; bosId: number | null } {
  const { count, strings, numbers } = metadataReader(metadata);
  const id = (name: string) => {
    const value = count(`tokenizer.ggml.${name}_token_id`, -1);
    return value < 0 ? [] : [value];
  };
  const types = numbers('tokenizer.ggml.token_type', new Float64Array());
  const byText = strings('tokenizer.ggml.tokens', []).flatMap((text, index) =>
    types[index] === tokenTypes.control && endTexts.has(text) ? [index] : [],
  );
  return { eosIds: [...id('eos'), ...id('eot'), ...id('eom'), ...byText], bosId: id('bos')[0] ?? null };
}

function refuse(field: string, expected: string, got: string): never {
  throw new InputError('model_invalid', `${field}: expected ${expected}, got ${got}`);
}
