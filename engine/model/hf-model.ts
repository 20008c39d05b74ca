/**
 * A Hugging Face folder as a SourceModel: config.json to dimensions, transformers' tensor names to roles.
 * Reads the forms of transformers 4 (rope_theta, rope_scaling) and 5 (rope_parameters). Weights come from safetensors
 * only, one file or shards; a pickled checkpoint is refused by name, since loading one runs whatever is in it.
 */
import { readdir } from 'node:fs/promises';
import { join } from 'node:path';
import type { SourceType } from '../../native/index.ts';
import { InputError, ioError, shown } from '../input-error.ts';
import { type Json, readJson, readText } from './hf-folder.ts';
import { parseRopeScaling, type RopeScaling, ropeTable } from './rope.ts';
import { readSafetensors } from './safetensors.ts';
import { type ModelConfig, maxNumLayers, type SourceModel, type SourceTensor } from './source-model.ts';

const architectures = {
  LlamaForCausalLM: 'llama',
  MistralForCausalLM: 'mistral',
  Qwen2ForCausalLM: 'qwen2',
  Qwen3ForCausalLM: 'qwen3',
  Gemma3ForCausalLM: 'gemma3',
} as const;
type Architecture = (typeof architectures)[keyof typeof architectures];

const layer = (name: string) => `model.layers.{layer}.${name}`;
const commonNames: Record<string, string> = {
  embedding: 'model.embed_tokens.weight',
  final_norm: 'model.norm.weight',
  lm_head: 'lm_head.weight',
  attention_norm: layer('input_layernorm.weight'),
  mlp_norm: layer('post_attention_layernorm.weight'),
  q_proj: layer('self_attn.q_proj.weight'),
  k_proj: layer('self_attn.k_proj.weight'),
  v_proj: layer('self_attn.v_proj.weight'),
  o_proj: layer('self_attn.o_proj.weight'),
  gate_proj: layer('mlp.gate_proj.weight'),
  up_proj: layer('mlp.up_proj.weight'),
  down_proj: layer('mlp.down_proj.weight'),
  q_bias: layer('self_attn.q_proj.bias'),
  k_bias: layer('self_attn.k_proj.bias'),
  v_bias: layer('self_attn.v_proj.bias'),
  o_bias: layer('self_attn.o_proj.bias'),
  q_norm: layer('self_attn.q_norm.weight'),
  k_norm: layer('self_attn.k_norm.weight'),
};
/** Gemma has a norm on both sides of each block; `post_attention_layernorm` is another one there. */
const gemmaNames: Record<string, string> = {
  ...commonNames,
  post_attention_norm: layer('post_attention_layernorm.weight'),
  mlp_norm: layer('pre_feedforward_layernorm.weight'),
  post_mlp_norm: layer('post_feedforward_layernorm.weight'),
};

const sourceTypes: Partial<Record<string, SourceType>> = { F32: 'f32', F16: 'f16', BF16: 'bf16' };

export async function readHfModel(folder: string): Promise<SourceModel> {
  const config = await readJson(folder, 'config.json');
  if (config === null) refuse(`${folder}: config.json`, 'a file', 'none');
  const generation = (await readJson(folder, 'generation_config.json')) ?? {};
  const tokenizerConfig = (await readJson(folder, 'tokenizer_config.json')) ?? {};
  try {
    const model = hfConfig(config);
    const { tensors, paths } = await readTensors(folder);
    const isTied = model.tieWordEmbeddings === true;
    return {
      config: model,
      tensors,
      names: model.architecture === 'gemma3' ? gemmaNames : commonNames,
      // Old checkpoints store buffers that are computed anyway; a tied head may be stored a second time.
      isIgnored: (name) => name.endsWith('.rotary_emb.inv_freq') || (isTied && name === 'lm_head.weight'),
      sourcePaths: paths,
      eosIds: tokenIds(generation.eos_token_id ?? config.eos_token_id, 'eos_token_id'),
      bosId: tokenIds(generation.bos_token_id ?? config.bos_token_id, 'bos_token_id')[0] ?? null,
      tokenizer: { kind: 'folder', path: folder },
      chatTemplate: await readChatTemplate(folder, tokenizerConfig),
    };
  } catch (error) {
    if (error instanceof InputError && !error.message.startsWith(folder)) {
      throw new InputError(error.code, `${folder}: ${error.message}`, { cause: error.cause });
    }
    throw error;
  }
}

/** What config.json says; `field` names in messages are its own. */
export function hfConfig(config: Json): ModelConfig {
  const architecture = parseArchitecture(config);
  const isGemma = architecture === 'gemma3';
  const count = (name: string, fallback?: number): number => {
    const value = config[name] ?? fallback;
    if (!Number.isSafeInteger(value) || (value as number) < 1)
      refuse(name, 'an integer above 0', shown(config[name]));
    return value as number;
  };
  const number = (name: string, fallback?: number): number => {
    const value = config[name] ?? fallback;
    if (typeof value !== 'number' || !(value > 0) || !Number.isFinite(value))
      refuse(name, 'a number above 0', shown(config[name]));
    return value;
  };

  for (const name of ['attn_logit_softcapping', 'final_logit_softcapping', 'quantization_config'] as const) {
    if (config[name] != null) refuse(name, 'none; it is not supported', shown(config[name]));
  }
  if (config.use_bidirectional_attention === true) refuse('use_bidirectional_attention', 'false', 'true');
  if (config.mlp_bias === true) refuse('mlp_bias', 'false; biases of the MLP are not supported', 'true');
  if ((config.partial_rotary_factor ?? 1) !== 1)
    refuse('partial_rotary_factor', '1', shown(config.partial_rotary_factor));
  if ((config.pretraining_tp ?? 1) !== 1) refuse('pretraining_tp', '1', shown(config.pretraining_tp));

  const [numLayers, hiddenSize, numHeads] = [
    count('num_hidden_layers'),
    count('hidden_size'),
    count('num_attention_heads'),
  ];
  if (numLayers > maxNumLayers) refuse('num_hidden_layers', `at most ${maxNumLayers}`, `${numLayers}`);
  const headDim = count('head_dim', hiddenSize % numHeads === 0 ? hiddenSize / numHeads : undefined);
  if (headDim % 2 !== 0) refuse('head_dim', 'an even number', `${headDim}`);
  const maxPositions = count('max_position_embeddings');
  const slidingWindows = parseSlidingWindows(config, architecture, numLayers);
  const rope = parseRope(config, architecture, maxPositions);
  const scaleBase = isGemma ? number('query_pre_attn_scalar', 256) : headDim;
  const hasBias = config.attention_bias === true;
  return {
    architecture,
    dims: {
      numLayers,
      hiddenSize,
      intermediateSize: count('intermediate_size'),
      numHeads,
      numKvHeads: count('num_key_value_heads', numHeads),
      headDim,
      vocabSize: count('vocab_size'),
      maxPositions,
      normEps: number('rms_norm_eps', 1e-6),
      attentionScale: 1 / Math.sqrt(scaleBase),
      // transformers rounds √hidden to the embedding's type; everything here is computed in f32, where it stays as it is.
      embeddingScale: isGemma ? Math.fround(Math.sqrt(hiddenSize)) : 1,
      activation: parseActivation(config, isGemma),
      slidingWindows,
      ropeTableIndex: slidingWindows.map((window) => (isGemma && window > 0 ? 1 : 0)),
      ropeTables: rope.map(({ theta, scaling }) => ropeTable(headDim, theta, scaling)),
    },
    tieWordEmbeddings:
      config.tie_word_embeddings === undefined ? isGemma : config.tie_word_embeddings === true,
    qkvBias: architecture === 'qwen2' || hasBias ? 'required' : 'absent',
    oBias: hasBias && architecture !== 'qwen2' ? 'required' : 'absent',
    hasQkNorm: architecture === 'qwen3' || isGemma,
    hasPostNorms: isGemma,
    normAddend: isGemma ? 1 : 0,
    hasInterleavedRope: false,
  };
}

function parseArchitecture(config: Json): Architecture {
  const given = Array.isArray(config.architectures) ? config.architectures[0] : config.architectures;
  if (typeof given !== 'string' || !Object.hasOwn(architectures, given)) {
    refuse('architectures', `one of ${Object.keys(architectures).join(', ')}`, shown(given));
  }
  return architectures[given as keyof typeof architectures];
}

function parseActivation(config: Json, isGemma: boolean): 'silu' | 'gelu_tanh' {
  const field = config.hidden_activation !== undefined ? 'hidden_activation' : 'hidden_act';
  const value = config[field] ?? (isGemma ? 'gelu_pytorch_tanh' : 'silu');
  if (value === 'silu' || value === 'swish') return 'silu';
  if (value === 'gelu_pytorch_tanh') return 'gelu_tanh';
  return refuse(field, 'silu or gelu_pytorch_tanh', shown(value));
}

/** Per layer, 0 for full attention. */
function parseSlidingWindows(config: Json, architecture: Architecture, numLayers: number): Int32Array {
  // transformers' default for a Mistral config that does not say.
  const unsaid = architecture === 'mistral' && config.sliding_window === undefined ? 4096 : 0;
  const window = config.sliding_window ?? unsaid;
  if (!Number.isSafeInteger(window) || (window as number) < 0)
    refuse('sliding_window', 'a non-negative integer or null', shown(window));
  const types = parseLayerTypes(config, numLayers) ?? defaultLayerTypes(config, architecture, numLayers);
  if (
    types.includes('sliding_attention') &&
    window === 0 &&
    (config.layer_types || architecture === 'gemma3')
  ) {
    refuse('sliding_window', 'the size of the window, as some layers have one', shown(config.sliding_window));
  }
  return Int32Array.from(types, (type) => (type === 'sliding_attention' ? (window as number) : 0));
}

type LayerType = 'full_attention' | 'sliding_attention';

function parseLayerTypes(config: Json, numLayers: number): LayerType[] | null {
  const types = config.layer_types;
  if (types == null) return null;
  if (!Array.isArray(types) || types.length !== numLayers)
    refuse('layer_types', `${numLayers} entries`, shown(types));
  const unknown = types.find((type) => type !== 'full_attention' && type !== 'sliding_attention');
  if (unknown !== undefined) refuse('layer_types', 'full_attention or sliding_attention', shown(unknown));
  return types as LayerType[];
}

function defaultLayerTypes(config: Json, architecture: Architecture, numLayers: number): LayerType[] {
  const layers = Array.from({ length: numLayers }, (_, index) => index);
  const types = (isSliding: (index: number) => boolean): LayerType[] =>
    layers.map((index) => (isSliding(index) ? 'sliding_attention' : 'full_attention'));
  switch (architecture) {
    case 'gemma3': {
      const period = config.sliding_window_pattern ?? 6;
      if (!Number.isSafeInteger(period) || (period as number) < 1)
        refuse('sliding_window_pattern', 'an integer above 0', shown(period));
      return types((index) => (index + 1) % (period as number) !== 0);
    }
    case 'mistral':
      return types(() => true);
    case 'qwen2':
    case 'qwen3': {
      const first =
        config.use_sliding_window === true ? ((config.max_window_layers as number) ?? 28) : numLayers;
      return types((index) => index >= first);
    }
    default:
      return types(() => false);
  }
}

interface Rope {
  theta: number;
  scaling: RopeScaling;
}

/** One rope, or for Gemma two: of full layers, then of window layers. */
function parseRope(config: Json, architecture: Architecture, maxPositions: number): Rope[] {
  const one = (entry: Json | null, field: string, defaultTheta: number): Rope => {
    const theta = entry?.rope_theta ?? defaultTheta;
    if (typeof theta !== 'number' || !(theta > 1) || !Number.isFinite(theta))
      refuse('rope_theta', 'a number above 1', shown(theta));
    return { theta, scaling: parseRopeScaling(entry, field, maxPositions) };
  };
  const record = (value: unknown, field: string): Json | null => {
    if (value == null) return null;
    if (typeof value !== 'object' || Array.isArray(value)) refuse(field, 'an object', shown(value));
    return value as Json;
  };
  const parameters = record(config.rope_parameters, 'rope_parameters');
  const scaling = record(config.rope_scaling, 'rope_scaling');
  const isGemma = architecture === 'gemma3';
  const theta = (config.rope_theta as number | undefined) ?? (isGemma ? 1_000_000 : 10_000);
  if (!isGemma) {
    return parameters === null
      ? [one(scaling, 'rope_scaling', theta)]
      : [one(parameters, 'rope_parameters', theta)];
  }
  const localTheta = (config.rope_local_base_freq as number | undefined) ?? 10_000;
  const full = record(parameters?.full_attention, 'rope_parameters.full_attention') ?? scaling;
  const sliding = record(parameters?.sliding_attention, 'rope_parameters.sliding_attention');
  return [
    one(full, parameters === null ? 'rope_scaling' : 'rope_parameters.full_attention', theta),
    one(sliding, 'rope_parameters.sliding_attention', localTheta),
  ];
}

/** All tensors of the folder's safetensors files: those that the index names, or every one there is. */
async function readTensors(folder: string): Promise<{ tensors: Map<string, SourceTensor>; paths: string[] }> {
  const entries = await readdir(folder).catch((error) => {
    throw ioError(`read folder ${folder}`, error);
  });
  const index = await readJson(folder, 'model.safetensors.index.json');
  const found = entries
    .filter((name) => name.endsWith('.safetensors') && !name.startsWith('adapter_'))
    .sort();
  const files = index === null ? found : shardNames(index);
  if (files.length === 0) {
    const pickled = entries.find((name) => /\.(bin|pt|pth|ckpt|pkl)$/.test(name));
    refuse('weights', '*.safetensors (pickled checkpoints are not read)', pickled ?? 'none');
  }

  const tensors = new Map<string, SourceTensor>();
  const paths = files.map((name) => join(folder, name));
  for (const path of paths) {
    for (const tensor of (await readSafetensors(path)).tensors.values()) {
      const type = sourceTypes[tensor.dtype];
      if (tensors.has(tensor.name))
        refuse(
          `tensor '${tensor.name}'`,
          'it in one file',
          `it in ${tensors.get(tensor.name)!.path} and ${path}`,
        );
      if (type === undefined) refuse(`tensor '${tensor.name}' dtype`, 'F32, F16 or BF16', tensor.dtype);
      tensors.set(tensor.name, {
        name: tensor.name,
        path,
        offsetBytes: tensor.offsetBytes,
        type,
        shape: tensor.shape,
      });
    }
  }
  return { tensors, paths };
}

/** File names of an index, each once; nothing that leaves the folder. */
function shardNames(index: Json): string[] {
  const map = index.weight_map;
  if (typeof map !== 'object' || map === null)
    refuse('model.safetensors.index.json weight_map', 'an object', shown(map));
  const names = [...new Set(Object.values(map))];
  for (const name of names) {
    if (typeof name !== 'string' || !/^[\w.-]+\.safetensors$/.test(name)) {
      refuse('model.safetensors.index.json weight_map', 'names of safetensors files beside it', shown(name));
    }
  }
  return names.sort();
}

function tokenIds(value: unknown, field: string): number[] {
  const ids = value == null ? [] : Array.isArray(value) ? value : [value];
  if (!ids.every((id) => Number.isSafeInteger(id)))
    refuse(field, 'a token id or a list of them', shown(value));
  return ids;
}

/** chat_template.jinja beside the config wins over the one inside tokenizer_config.json, as in transformers. */
async function readChatTemplate(folder: string, tokenizerConfig: Json): Promise<string | null> {
  const own = await readText(folder, 'chat_template.jinja');
  if (own !== null) return own;
  const value = tokenizerConfig.chat_template;
  if (value == null || typeof value === 'string') return value ?? null;
  const named = Array.isArray(value) ? value.find((entry) => entry?.name === 'default') : undefined;
  if (typeof named?.template !== 'string')
    refuse('tokenizer_config.json chat_template', 'a string, or a list with a default', shown(value));
  return named.template;
}

function refuse(field: string, expected: string, got: string): never {
  throw new InputError('model_invalid', `${field}: expected ${expected}, got ${got}`);
}
