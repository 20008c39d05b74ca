/**
 * Reads a base model, a GGUF file or a Hugging Face folder, into dimensions and a plan: which source tensor becomes which
 * packed one. Headers only; no weights are read here (prepare.ts does that).
 *
 * The two sources first become the same plain data, a ModelConfig and a map of SourceTensors (gguf-model.ts, hf-model.ts);
 * everything that is checked about shapes is checked once, here. A tensor that the plan does not use is refused by name,
 * because leaving it out would change what the model says.
 */
import { stat } from 'node:fs/promises';
import type { ModelDims, PackedTensor, PackJob, SourceType, WeightFormat } from '../../native/index.ts';
import { InputError, ioError } from '../input-error.ts';
import { readGgufModel } from './gguf-model.ts';
import { readHfModel } from './hf-model.ts';
import {
  type ModelConfig,
  maxNumLayers,
  type SourceModel,
  type SourceTensor,
  type TokenizerSource,
} from './source-model.ts';

/**
 * What becomes of matrices that are stored as floats. 'keep': the same float type. 'int8': int8 all. 'int4': int4 in the
 * layers, int8 for the embedding and the head, whose errors go straight into the logits. Matrices that are quantised
 * already keep their values; norms and biases are always f32.
 */
export type Quantization = 'keep' | 'int8' | 'int4';

export interface BaseModel {
  /** `llama`, `qwen2`, `qwen3`, `gemma3`, `mistral`. */
  architecture: string;
  dims: ModelDims;
  quantization: Quantization;
  tensors: ModelTensor[];
  /** Every file that weights come from. */
  sourcePaths: string[];
  /** Tokens that end a sequence. */
  eosIds: number[];
  bosId: number | null;
  tokenizer: TokenizerSource;
  /** Jinja; null: the model has none. */
  chatTemplate: string | null;
}

/** One packed tensor, without its place, and where it comes from. */
export type ModelTensor = Omit<PackedTensor, 'offsetBytes' | 'sizeBytes'> &
  Pick<PackJob, 'sourcePath' | 'sourceOffsetBytes' | 'sourceType' | 'rows' | 'addend'> & {
    /** Its name in the source. */
    name: string;
  };

/**
 * @param path a `.gguf` file, or a folder with config.json and *.safetensors
 * @throws InputError model_invalid naming the field or tensor; io_failed
 */
export async function readBaseModel(path: string, quantization: Quantization = 'keep'): Promise<BaseModel> {
  const info = await stat(path).catch((error) => {
    throw ioError(`read model ${path}`, error);
  });
  const source = info.isDirectory() ? await readHfModel(path) : await readGgufModel(path);
  try {
    const { config } = source;
    checkDims(config.dims);
    return {
      architecture: config.architecture,
      dims: config.dims,
      quantization,
      tensors: planTensors(source, quantization),
      sourcePaths: source.sourcePaths,
      eosIds: checkIds('eos ids', source.eosIds, config.dims.vocabSize),
      bosId: source.bosId === null ? null : checkIds('bos id', [source.bosId], config.dims.vocabSize)[0]!,
      tokenizer: source.tokenizer,
      chatTemplate: source.chatTemplate,
    };
  } catch (error) {
    if (error instanceof InputError)
      throw new InputError(error.code, `${path}: ${error.message}`, { cause: error.cause });
    throw error;
  }
}

/** Bounds a factor of 100 beyond the largest models there are; they keep hostile counts from being looped over. */
const maxCount = {
  numLayers: maxNumLayers,
  numHeads: 65_536,
  numKvHeads: 65_536,
  headDim: 65_536,
  vocabSize: 2 ** 24,
};
const maxSize = 2 ** 24;

/** Groups of quantised activations and weights are 32 input features. */
const inFeaturesMultiple = 32;

function checkDims(dims: ModelDims): void {
  const fields = [
    'numLayers',
    'hiddenSize',
    'intermediateSize',
    'numHeads',
    'numKvHeads',
    'headDim',
    'vocabSize',
    'maxPositions',
  ] as const;
  for (const field of fields) {
    const bound = (maxCount as Partial<Record<string, number>>)[field] ?? maxSize;
    if (!Number.isInteger(dims[field]) || dims[field] < 1 || dims[field] > bound) {
      refuse(field, `an integer from 1 to ${bound}`, `${dims[field]}`);
    }
  }
  const { numHeads, numKvHeads, headDim, hiddenSize, intermediateSize } = dims;
  if (numHeads % numKvHeads !== 0)
    refuse('numHeads', `a multiple of numKvHeads, ${numKvHeads}`, `${numHeads}`);
  if (headDim % 2 !== 0) refuse('headDim', 'an even number', `${headDim}`);
  for (const [field, size] of Object.entries({
    hiddenSize,
    intermediateSize,
    'numHeads × headDim': numHeads * headDim,
  })) {
    if (size % inFeaturesMultiple !== 0) refuse(field, `a multiple of ${inFeaturesMultiple}`, `${size}`);
  }
  for (const field of ['normEps', 'attentionScale', 'embeddingScale'] as const) {
    if (!(dims[field] > 0 && Number.isFinite(dims[field])))
      refuse(field, 'a number above 0', `${dims[field]}`);
  }
}

function checkIds(field: string, ids: number[], vocabSize: number): number[] {
  for (const id of ids) {
    if (!Number.isInteger(id) || id < 0 || id >= vocabSize) refuse(field, `ids below ${vocabSize}`, `${id}`);
  }
  return [...new Set(ids)];
}

/** One tensor of the architecture: its role, its shape, and whether the source must have it. */
interface Slot {
  role: string;
  shape: number[];
  isOptional?: boolean;
}

function slotsOutsideLayers({ dims, tieWordEmbeddings }: ModelConfig): Slot[] {
  const table = [dims.vocabSize, dims.hiddenSize];
  const head = { role: 'lm_head', shape: table, isOptional: tieWordEmbeddings === null };
  return [
    { role: 'embedding', shape: table },
    { role: 'final_norm', shape: [dims.hiddenSize] },
    ...(tieWordEmbeddings === true ? [] : [head]),
  ];
}

function slotsOfLayer(config: ModelConfig): Slot[] {
  const { hiddenSize, intermediateSize, numHeads, numKvHeads, headDim } = config.dims;
  const [q, kv] = [numHeads * headDim, numKvHeads * headDim];
  const norm = (role: string, size = hiddenSize): Slot => ({ role, shape: [size] });
  const bias = (role: string, size: number, presence: ModelConfig['oBias']): Slot[] =>
    presence === 'absent' ? [] : [{ role, shape: [size], isOptional: presence === 'optional' }];
  return [
    norm('attention_norm'),
    norm('mlp_norm'),
    ...(config.hasPostNorms ? [norm('post_attention_norm'), norm('post_mlp_norm')] : []),
    ...(config.hasQkNorm ? [norm('q_norm', headDim), norm('k_norm', headDim)] : []),
    { role: 'q_proj', shape: [q, hiddenSize] },
    { role: 'k_proj', shape: [kv, hiddenSize] },
    { role: 'v_proj', shape: [kv, hiddenSize] },
    { role: 'o_proj', shape: [hiddenSize, q] },
    { role: 'gate_proj', shape: [intermediateSize, hiddenSize] },
    { role: 'up_proj', shape: [intermediateSize, hiddenSize] },
    { role: 'down_proj', shape: [hiddenSize, intermediateSize] },
    ...bias('q_bias', q, config.qkvBias),
    ...bias('k_bias', kv, config.qkvBias),
    ...bias('v_bias', kv, config.qkvBias),
    ...bias('o_bias', hiddenSize, config.oBias),
  ];
}

/** Every slot filled from the source, and every tensor of the source used or known to be of no weight. */
function planTensors(source: SourceModel, quantization: Quantization): ModelTensor[] {
  const { config, tensors, names, isIgnored } = source;
  const used = new Set<string>();
  const fill = (layer: number, slots: Slot[]): ModelTensor[] =>
    slots.flatMap((slot) => {
      const name = names[slot.role]!.replace('{layer}', `${layer}`);
      const tensor = tensors.get(name);
      if (tensor === undefined) {
        if (slot.isOptional) return [];
        refuse(`tensor '${name}'`, `one of shape [${slot.shape}] for ${slot.role}`, 'none of that name');
      }
      used.add(name);
      return [planTensor(config, slot, layer, tensor, quantization)];
    });

  const planned = fill(-1, slotsOutsideLayers(config));
  for (let layer = 0; layer < config.dims.numLayers; layer++)
    planned.push(...fill(layer, slotsOfLayer(config)));

  const unknown = [...tensors.keys()].filter((name) => !used.has(name) && !isIgnored(name));
  if (unknown.length > 0) {
    const more = unknown.length > 1 ? ` and ${unknown.length - 1} more` : '';
    refuse('tensors', `only those that ${config.architecture} has`, `'${unknown[0]}'${more}`);
  }
  return planned;
}

function planTensor(
  config: ModelConfig,
  slot: Slot,
  layer: number,
  tensor: SourceTensor,
  quantization: Quantization,
): ModelTensor {
  if (tensor.shape.length !== slot.shape.length || tensor.shape.some((size, i) => size !== slot.shape[i])) {
    refuse(`tensor '${tensor.name}' shape`, `[${slot.shape}]`, `[${tensor.shape}]`);
  }
  const isVector = slot.shape.length === 1;
  if (isVector && !isFloat(tensor.type)) {
    refuse(`tensor '${tensor.name}' type`, 'f32, f16 or bf16 for a vector', tensor.type);
  }
  const [outFeatures, inFeatures] = isVector ? [1, slot.shape[0]!] : [slot.shape[0]!, slot.shape[1]!];
  const { numHeads, numKvHeads, headDim } = config.dims;
  const numRotatedHeads = { q_proj: numHeads, k_proj: numKvHeads }[slot.role];
  return {
    role: slot.role,
    layer,
    format: isVector ? 'vector' : packedFormat(tensor.type, slot.role, quantization),
    outFeatures,
    inFeatures,
    name: tensor.name,
    sourcePath: tensor.path,
    sourceOffsetBytes: tensor.offsetBytes,
    sourceType: tensor.type,
    rows: config.hasInterleavedRope && numRotatedHeads ? rotateHalfRows(numRotatedHeads, headDim) : null,
    addend: slot.role.endsWith('_norm') ? config.normAddend : 0,
  };
}

const isFloat = (type: SourceType): type is 'f32' | 'f16' | 'bf16' =>
  type === 'f32' || type === 'f16' || type === 'bf16';

/** The packed format that holds each quantised type without loss; see lossless_format in native/src/pack.cc. */
const losslessFormats: Record<Exclude<SourceType, 'f32' | 'f16' | 'bf16'>, WeightFormat> = {
  q8_0: 'int8',
  q4_0: 'int4',
  q4_1: 'int4_min',
  q5_0: 'int8',
  q5_1: 'int8_min',
  q4_k: 'int4_min_f32',
  q5_k: 'int8_min_f32',
  q6_k: 'int8_group16',
};

function packedFormat(type: SourceType, role: string, quantization: Quantization): WeightFormat {
  if (!isFloat(type)) return losslessFormats[type];
  if (quantization === 'keep') return type;
  return quantization === 'int4' && role !== 'embedding' && role !== 'lm_head' ? 'int4' : 'int8';
}

/** Output row (h, half, i) of the rotate-half order is row (h, i, half) of the pairwise one. */
export function rotateHalfRows(numHeads: number, headDim: number): Int32Array {
  const rows = new Int32Array(numHeads * headDim);
  for (let n = 0; n < rows.length; n++) {
    const [head, within] = [Math.floor(n / headDim), n % headDim];
    const [half, i] = [Math.floor(within / (headDim / 2)), within % (headDim / 2)];
    rows[n] = head * headDim + 2 * i + half;
  }
  return rows;
}

function refuse(field: string, expected: string, got: string): never {
  throw new InputError('model_invalid', `${field}: expected ${expected}, got ${got}`);
}
