/**
 * Models and adapters with random weights, of the shapes in shapes.ts: a GGUF file for llama.cpp and for us, a Hugging Face
 * folder for vLLM and transformers, and a PEFT folder's GGUF form for llama-server.
 *
 * The tokenizer is a real byte-level BPE over every word of up to four small letters, in the order of length, so that every
 * id has a text and every peer can load it. Prompts are token ids anyway.
 */
import { mkdir, open, readFile, rename, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { rotateHalfRows } from '../../../engine/model/base-model.ts';
import { readSafetensors, type SafetensorsTensor } from '../../../engine/model/safetensors.ts';
import {
  type GgmlType,
  type GgufTensorSource,
  ggmlTypes,
  type MetadataValue,
  tensorBytes,
  writeGguf,
} from './gguf-file.ts';
import { type Linear, linears, matrixType, type Quantization, type Shape } from './shapes.ts';

const chunkBytes = 4 << 20;

/** Blocks' f16 scales are these bits and a random low byte, which makes weights of about 0.02; see `blockScales`. */
const blockScales: Partial<Record<GgmlType, { atBytes: number[]; highByte: number }>> = {
  q4_0: { atBytes: [0], highByte: 0x1c }, // 2^-8 and up, times -8 to 7
  q5_0: { atBytes: [0], highByte: 0x18 },
  q8_0: { atBytes: [0], highByte: 0x0c },
  q4_k: { atBytes: [0, 2], highByte: 0x08 }, // and times 6-bit scales
  q6_k: { atBytes: [208], highByte: 0x02 },
};

/** xorshift32: fast, and random enough for weights. */
export function randomWords(seed: number): (words: Uint32Array) => void {
  let state = (Math.imul(seed, 2654435761) ^ 0x9e3779b9) >>> 0 || 1;
  return (words) => {
    for (let i = 0; i < words.length; i++) {
      state ^= state << 13;
      state ^= state >>> 17;
      state ^= state << 5;
      words[i] = state >>> 0;
    }
  };
}

/** Random blocks of a quantised type whose scales are finite and small. */
export function* randomBlocks(type: GgmlType, numBytes: number, seed: number): Generator<Uint8Array> {
  const { bytes: blockBytes } = ggmlTypes[type];
  const scales = blockScales[type];
  if (scales === undefined) throw new RangeError(`type: expected a quantised one, got ${type}`);
  const fill = randomWords(seed);
  const perChunk = Math.floor(chunkBytes / blockBytes) * blockBytes;
  for (let done = 0; done < numBytes; done += perChunk) {
    const size = Math.min(perChunk, numBytes - done);
    const words = new Uint32Array(Math.ceil(size / 4));
    fill(words);
    const bytes = new Uint8Array(words.buffer, 0, size);
    for (let block = 0; block < size; block += blockBytes) {
      for (const at of scales.atBytes) bytes[block + at + 1] = scales.highByte;
    }
    yield bytes;
  }
}

/** Every value of an f32 vector. */
function* constant(value: number, length: number): Generator<Uint8Array> {
  yield new Uint8Array(new Float32Array(length).fill(value).buffer);
}

export async function writeRandomGguf(path: string, shape: Shape, quantization: Quantization): Promise<void> {
  let seed = 1;
  const matrix = (name: string, size: [number, number], linear: Linear | null, layer: number) => {
    const type = matrixType(shape, quantization, linear, layer);
    const own = seed++;
    return { name, type, shape: size, content: () => randomBlocks(type, tensorBytes(type, size), own) };
  };
  const vector = (name: string, value: number, length: number): GgufTensorSource => ({
    name,
    type: 'f32',
    shape: [length],
    content: () => constant(value, length),
  });
  const tensors: GgufTensorSource[] = [
    matrix('token_embd.weight', [shape.vocabSize, shape.hiddenSize], null, -1),
    vector('output_norm.weight', 1, shape.hiddenSize),
  ];
  for (let layer = 0; layer < shape.numLayers; layer++) {
    const block = `blk.${layer}`;
    tensors.push(vector(`${block}.attn_norm.weight`, 1, shape.hiddenSize));
    tensors.push(vector(`${block}.ffn_norm.weight`, 1, shape.hiddenSize));
    for (const [linear, { gguf, size }] of Object.entries(linears(shape)) as [
      Linear,
      { gguf: string; size: [number, number] },
    ][]) {
      tensors.push(matrix(`${block}.${gguf}.weight`, size, linear, layer));
      if (hasBias(shape, linear)) tensors.push(vector(`${block}.${gguf}.bias`, 0.01, size[0]));
    }
  }
  await writeGguf(path, modelMetadata(shape), tensors);
}

const hasBias = ({ architecture }: Shape, linear: Linear) =>
  architecture === 'qwen2' && (linear === 'q_proj' || linear === 'k_proj' || linear === 'v_proj');

function modelMetadata(shape: Shape): Record<string, MetadataValue> {
  const { tokens, merges } = vocabulary(shape.vocabSize);
  const key = (name: string) => `${shape.architecture}.${name}`;
  const [control, normal] = [3, 1];
  return {
    'general.architecture': { text: shape.architecture },
    'general.name': { text: `random ${shape.title}` },
    'general.quantization_version': { u32: 2 },
    [key('block_count')]: { u32: shape.numLayers },
    [key('context_length')]: { u32: shape.maxPositions },
    [key('embedding_length')]: { u32: shape.hiddenSize },
    [key('feed_forward_length')]: { u32: shape.intermediateSize },
    [key('attention.head_count')]: { u32: shape.numHeads },
    [key('attention.head_count_kv')]: { u32: shape.numKvHeads },
    [key('attention.layer_norm_rms_epsilon')]: { f32: shape.normEps },
    [key('rope.freq_base')]: { f32: shape.ropeTheta },
    [key('rope.dimension_count')]: { u32: shape.headDim },
    [key('vocab_size')]: { u32: shape.vocabSize },
    'tokenizer.ggml.model': { text: 'gpt2' },
    'tokenizer.ggml.pre': { text: 'gpt-2' },
    'tokenizer.ggml.tokens': { texts: tokens },
    'tokenizer.ggml.token_type': { i32s: tokens.map((_, id) => (id < numSpecialTokens ? control : normal)) },
    'tokenizer.ggml.merges': { texts: merges },
    'tokenizer.ggml.bos_token_id': { u32: bosId },
    'tokenizer.ggml.eos_token_id': { u32: eosId },
    'tokenizer.ggml.add_bos_token': { flag: false },
  };
}

const [bosId, eosId, numSpecialTokens] = [0, 1, 2];
/** Ids below this are special tokens and single bytes; prompts are made of the others. */
export const firstWordId = numSpecialTokens + 256;

/** Two special tokens, the 256 bytes as GPT-2 writes them, then words of small letters, each its shorter self and a letter. */
export function vocabulary(size: number): { tokens: string[]; merges: string[] } {
  if (size < firstWordId || size > 400_000)
    throw new RangeError(`size: expected ${firstWordId} to 400000, got ${size}`);
  const tokens = ['<|begin|>', '<|end|>', ...gpt2Bytes()];
  const merges: string[] = [];
  const letters = 'abcdefghijklmnopqrstuvwxyz';
  let words = [...letters];
  while (tokens.length < size) {
    const longer: string[] = [];
    for (const word of words) {
      for (const letter of letters) {
        if (tokens.length === size) break;
        tokens.push(word + letter);
        merges.push(`${word} ${letter}`);
        longer.push(word + letter);
      }
    }
    words = longer;
  }
  return { tokens, merges };
}

/** Each byte's character: itself where it is printable, else one from 256 on. */
function gpt2Bytes(): string[] {
  let next = 256;
  return Array.from({ length: 256 }, (_, byte) => {
    const isPrintable =
      (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || (byte >= 174 && byte <= 255);
    return String.fromCodePoint(isPrintable ? byte : next++);
  });
}

/** A Hugging Face folder in bf16. */
export async function writeRandomFolder(folder: string, shape: Shape): Promise<void> {
  await mkdir(folder, { recursive: true });
  const tensors: { name: string; shape: number[]; isOnes?: boolean }[] = [
    { name: 'model.embed_tokens.weight', shape: [shape.vocabSize, shape.hiddenSize] },
    { name: 'model.norm.weight', shape: [shape.hiddenSize], isOnes: true },
  ];
  for (let layer = 0; layer < shape.numLayers; layer++) {
    const block = `model.layers.${layer}`;
    for (const norm of ['input_layernorm', 'post_attention_layernorm'])
      tensors.push({ name: `${block}.${norm}.weight`, shape: [shape.hiddenSize], isOnes: true });
    for (const [linear, { parent, size }] of Object.entries(linears(shape)) as [
      Linear,
      { parent: string; size: [number, number] },
    ][]) {
      tensors.push({ name: `${block}.${parent}.${linear}.weight`, shape: size });
      if (hasBias(shape, linear))
        tensors.push({ name: `${block}.${parent}.${linear}.bias`, shape: [size[0]] });
    }
  }
  await writeJson(folder, 'config.json', folderConfig(shape));
  await writeJson(folder, 'generation_config.json', { bos_token_id: bosId, eos_token_id: eosId });
  await writeTokenizer(folder, shape);
  await writeBf16(join(folder, 'model.safetensors'), tensors);
}

function folderConfig(shape: Shape): object {
  return {
    model_type: shape.architecture,
    architectures: [shape.architecture === 'qwen2' ? 'Qwen2ForCausalLM' : 'LlamaForCausalLM'],
    hidden_size: shape.hiddenSize,
    num_hidden_layers: shape.numLayers,
    num_attention_heads: shape.numHeads,
    num_key_value_heads: shape.numKvHeads,
    head_dim: shape.headDim,
    intermediate_size: shape.intermediateSize,
    vocab_size: shape.vocabSize,
    max_position_embeddings: shape.maxPositions,
    rms_norm_eps: shape.normEps,
    rope_theta: shape.ropeTheta,
    tie_word_embeddings: true,
    hidden_act: 'silu',
    ...(shape.architecture === 'llama'
      ? { attention_bias: false, mlp_bias: false }
      : { use_sliding_window: false }),
    torch_dtype: 'bfloat16',
    bos_token_id: bosId,
    eos_token_id: eosId,
  };
}

async function writeTokenizer(folder: string, shape: Shape): Promise<void> {
  const { tokens, merges } = vocabulary(shape.vocabSize);
  const special = tokens.slice(0, numSpecialTokens);
  await writeJson(folder, 'tokenizer.json', {
    version: '1.0',
    added_tokens: special.map((content, id) => ({
      id,
      content,
      single_word: false,
      lstrip: false,
      rstrip: false,
      normalized: false,
      special: true,
    })),
    normalizer: null,
    pre_tokenizer: { type: 'ByteLevel', add_prefix_space: false, trim_offsets: true, use_regex: true },
    post_processor: null,
    decoder: { type: 'ByteLevel', add_prefix_space: false, trim_offsets: true, use_regex: true },
    model: {
      type: 'BPE',
      vocab: Object.fromEntries(tokens.map((token, id) => [token, id])),
      merges: merges.map((merge) => merge.split(' ')),
    },
  });
  await writeJson(folder, 'tokenizer_config.json', {
    tokenizer_class: 'PreTrainedTokenizerFast',
    bos_token: special[0],
    eos_token: special[1],
    model_max_length: shape.maxPositions,
    clean_up_tokenization_spaces: false,
  });
}

const writeJson = (folder: string, name: string, value: object) =>
  writeFile(join(folder, name), JSON.stringify(value));

async function writeBf16(
  path: string,
  tensors: { name: string; shape: number[]; isOnes?: boolean }[],
): Promise<void> {
  let offset = 0;
  const header: Record<string, object> = { __metadata__: { format: 'pt' } };
  const sizes = tensors.map(({ name, shape }) => {
    const size = 2 * shape.reduce((product, length) => product * length, 1);
    header[name] = { dtype: 'BF16', shape, data_offsets: [offset, offset + size] };
    offset += size;
    return size;
  });
  const file = await open(`${path}.part`, 'w');
  try {
    await file.write(safetensorsHeader(header));
    for (const [index, { isOnes }] of tensors.entries()) {
      const fill = randomWords(index + 1);
      for (let done = 0; done < sizes[index]!; done += chunkBytes) {
        const size = Math.min(chunkBytes, sizes[index]! - done);
        const words = new Uint32Array(size / 4 + 1);
        fill(words);
        const values = new Uint16Array(words.buffer, 0, size / 2);
        // bf16 of magnitude 2^-6 to 2^-5 with a random sign and mantissa; 1 for norms.
        for (let i = 0; i < values.length; i++)
          values[i] = isOnes ? 0x3f80 : (values[i]! & 0x807f) | (121 << 7);
        await file.write(values);
      }
    }
  } finally {
    await file.close();
  }
  await rename(`${path}.part`, path);
}

export function safetensorsHeader(header: Record<string, object>): Buffer {
  const json = Buffer.from(JSON.stringify(header));
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(json.length));
  return Buffer.concat([length, json]);
}

/**
 * A PEFT folder as a GGUF file of llama.cpp's kind: alpha, and per layer `blk.<layer>.<name>.weight.lora_a` and `.lora_b` in f16.
 * llama.cpp keeps q and k rows of the llama architecture in the order of pairs, so their B is put into that order.
 */
export async function writeAdapterGguf(folder: string, path: string, shape: Shape): Promise<void> {
  const config = JSON.parse(await readFile(join(folder, 'adapter_config.json'), 'utf8'));
  const { tensors } = await readSafetensors(join(folder, 'adapter_model.safetensors'));
  const weights = await readFile(join(folder, 'adapter_model.safetensors'));
  const all = linears(shape);
  const out = [...tensors.values()].map((tensor): GgufTensorSource => {
    const [, layer, linear, side] =
      /\.layers\.(\d+)\.\w+\.(\w+)\.lora_([AB])\.weight$/.exec(tensor.name) ??
      refuse(tensor, 'layers.<n>.<parent>.<linear>.lora_A or lora_B', tensor.name);
    if (!Object.hasOwn(all, linear!)) refuse(tensor, `one of ${Object.keys(all)}`, linear!);
    if (tensor.dtype !== 'BF16') refuse(tensor, 'BF16', tensor.dtype);
    const [rows, columns] = [tensor.shape[0]!, tensor.shape[1]!];
    const source = new Uint16Array(rows * columns);
    Buffer.from(source.buffer).set(
      weights.subarray(tensor.offsetBytes, tensor.offsetBytes + source.byteLength),
    );
    const values = Uint16Array.from(source, bf16ToF16);
    const numRotated = { q_proj: shape.numHeads, k_proj: shape.numKvHeads }[linear!];
    const inPairs = side === 'B' && shape.architecture === 'llama' && numRotated !== undefined;
    return {
      name: `blk.${layer}.${all[linear as Linear].gguf}.weight.lora_${side!.toLowerCase()}`,
      type: 'f16',
      shape: [rows, columns],
      content: () => [asBytes(inPairs ? pairRows(values, numRotated, shape.headDim, columns) : values)],
    };
  });
  await writeGguf(
    path,
    {
      'general.architecture': { text: shape.architecture },
      'general.type': { text: 'adapter' },
      'adapter.type': { text: 'lora' },
      'adapter.lora.alpha': { f32: config.lora_alpha },
    },
    out,
  );
}

const asBytes = (values: Uint16Array) => new Uint8Array(values.buffer, values.byteOffset, values.byteLength);

/** Rows of the rotate-half order in the order of pairs: the inverse of what reading such a file does. */
export function pairRows(
  values: Uint16Array,
  numHeads: number,
  headDim: number,
  columns: number,
): Uint16Array {
  const out = new Uint16Array(values.length);
  for (const [half, pair] of rotateHalfRows(numHeads, headDim).entries())
    out.set(values.subarray(half * columns, (half + 1) * columns), pair * columns);
  return out;
}

/** Exact for magnitudes from 2^-14 to 2^15, where f16 has more mantissa than bf16; smaller ones become zero. */
export function bf16ToF16(bits: number): number {
  const [sign, exponent, mantissa] = [bits & 0x8000, (bits >> 7) & 0xff, bits & 0x7f];
  const rebiased = exponent - 127 + 15;
  if (rebiased <= 0) return sign;
  if (rebiased >= 31) throw new RangeError(`value: expected below 65536, got bf16 bits ${bits.toString(16)}`);
  return sign | (rebiased << 10) | (mantissa << 3);
}

function refuse(tensor: SafetensorsTensor, expected: string, got: string): never {
  throw new RangeError(`tensor '${tensor.name}': expected ${expected}, got ${got}`);
}
