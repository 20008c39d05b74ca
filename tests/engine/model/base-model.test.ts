import { readFile, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { describe, expect, test } from 'vitest';
import {
  type BaseModel,
  type Quantization,
  readBaseModel,
  rotateHalfRows,
} from '../../../engine/model/base-model.ts';
import { goldensFolder } from '../../fixtures/golden.ts';
import {
  f32Tensor,
  type GgufScalar,
  type GgufTensorBytes,
  ggufBytes,
  safetensorsBytes,
  type TensorBytes,
  temporaryFolder,
  writeFolder,
} from '../../fixtures/source-files.ts';

const tiny = (name: string, quantization?: Quantization) =>
  readBaseModel(join(goldensFolder, 'tiny', name), quantization);
const roles = ({ tensors }: BaseModel, layer: number) =>
  tensors
    .filter((tensor) => tensor.layer === layer)
    .map((tensor) => tensor.role)
    .sort();
const find = ({ tensors }: BaseModel, role: string, layer = 0) =>
  tensors.find((tensor) => tensor.role === role && tensor.layer === layer)!;

const plainRoles = [
  'attention_norm',
  'down_proj',
  'gate_proj',
  'k_proj',
  'mlp_norm',
  'o_proj',
  'q_proj',
  'up_proj',
  'v_proj',
];

describe('a Hugging Face folder', () => {
  test('of Llama 3: shards, an untied head, scaled rope', async () => {
    const model = await tiny('llama3');
    expect(model).toMatchObject({ architecture: 'llama', eosIds: [1], bosId: 0 });
    expect(model.dims).toMatchObject({
      numLayers: 2,
      hiddenSize: 64,
      intermediateSize: 64,
      numHeads: 4,
      numKvHeads: 2,
      headDim: 16,
      vocabSize: 512,
      maxPositions: 1024,
      normEps: 1e-5,
      attentionScale: 0.25,
      embeddingScale: 1,
      activation: 'silu',
    });
    expect(roles(model, -1)).toEqual(['embedding', 'final_norm', 'lm_head']);
    expect(roles(model, 1)).toEqual(plainRoles);
    expect(model.sourcePaths).toHaveLength(2);
    expect(model.dims.ropeTables[0]!.inverseFrequencies[1]).toBeCloseTo(0.2443846, 6);
    expect(model.tensors.every(({ rows, addend }) => rows === null && addend === 0)).toBe(true);
  });

  test('of Mistral: one window for every layer', async () => {
    const model = await tiny('mistral');
    expect([...model.dims.slidingWindows]).toEqual([24, 24]);
    expect([...model.dims.ropeTableIndex]).toEqual([0, 0]);
  });

  test('of Qwen2: biases, a tied head, no window unless it is used', async () => {
    const model = await tiny('qwen2');
    expect(roles(model, 0)).toEqual([...plainRoles, 'q_bias', 'k_bias', 'v_bias'].sort());
    expect(roles(model, -1)).toEqual(['embedding', 'final_norm']);
    expect([...model.dims.slidingWindows]).toEqual([0, 0]);
    expect(find(model, 'k_bias')).toMatchObject({ format: 'vector', outFeatures: 1, inFeatures: 32 });
  });

  test('of Qwen3: norms of q and k, heads wider than the model', async () => {
    const model = await tiny('qwen3');
    expect(roles(model, 0)).toEqual([...plainRoles, 'q_norm', 'k_norm'].sort());
    expect(find(model, 'q_norm')).toMatchObject({ inFeatures: 32 });
    expect(find(model, 'q_proj')).toMatchObject({ outFeatures: 128, inFeatures: 64, sourceType: 'f16' });
  });

  test('of Gemma 3: norms on both sides, windows, two ropes, scales, weights of 1 + w', async () => {
    const model = await tiny('gemma3');
    expect(roles(model, 0)).toEqual(
      [...plainRoles, 'post_attention_norm', 'post_mlp_norm', 'q_norm', 'k_norm'].sort(),
    );
    expect(model.dims).toMatchObject({ activation: 'gelu_tanh', embeddingScale: 8 });
    expect(model.dims.attentionScale).toBeCloseTo(1 / Math.sqrt(24), 12);
    expect([...model.dims.slidingWindows]).toEqual([24, 0, 24]);
    expect([...model.dims.ropeTableIndex]).toEqual([1, 0, 1]);
    const bases = model.dims.ropeTables.map(({ inverseFrequencies }) => inverseFrequencies[1]! ** -16);
    expect(bases[0]).toBeCloseTo(1e6, 3);
    expect(bases[1]).toBeCloseTo(1e4, 5);
    expect(model.tensors.filter(({ addend }) => addend === 1).map(({ role }) => role)).toHaveLength(
      3 * 6 + 1,
    );
    expect(find(model, 'mlp_norm').name).toBe('model.layers.0.pre_feedforward_layernorm.weight');
  });
});

test.each([
  ['keep', 'bf16', 'bf16'],
  ['int8', 'int8', 'int8'],
  ['int4', 'int4', 'int8'],
] as const)(
  'quantisation %s makes layers %s and the embedding %s',
  async (quantization, layers, embedding) => {
    const model = await tiny('llama3', quantization);
    expect(find(model, 'q_proj').format).toBe(layers);
    expect(find(model, 'embedding', -1).format).toBe(embedding);
    expect(find(model, 'lm_head', -1).format).toBe(embedding);
    expect(find(model, 'attention_norm').format).toBe('vector');
  },
);

test('puts rows that rotate pairwise into the order that rotates halves', () => {
  // Hugging Face to GGUF is reshape [heads, 2, headDim / 2] and swap of the last two axes; this is the way back.
  const [numHeads, headDim] = [2, 6];
  const huggingFace = Array.from({ length: numHeads * headDim }, (_, n) => n);
  const gguf = huggingFace.map((_, n) => {
    const [head, i, half] = [Math.floor(n / headDim), Math.floor((n % headDim) / 2), n % 2];
    return huggingFace[head * headDim + half * (headDim / 2) + i]!;
  });
  expect([...rotateHalfRows(numHeads, headDim)].map((row) => gguf[row])).toEqual(huggingFace);
});

const hfConfig = {
  architectures: ['LlamaForCausalLM'],
  vocab_size: 64,
  hidden_size: 32,
  intermediate_size: 64,
  num_hidden_layers: 1,
  num_attention_heads: 2,
  num_key_value_heads: 1,
  max_position_embeddings: 128,
  rms_norm_eps: 1e-5,
  tie_word_embeddings: true,
  eos_token_id: 2,
};
const inLayer = (name: string) => `model.layers.0.${name}.weight`;
const hfTensors = (): Record<string, TensorBytes> => ({
  'model.embed_tokens.weight': f32Tensor([64, 32]),
  'model.norm.weight': f32Tensor([32]),
  [inLayer('input_layernorm')]: f32Tensor([32]),
  [inLayer('post_attention_layernorm')]: f32Tensor([32]),
  [inLayer('self_attn.q_proj')]: f32Tensor([32, 32]),
  [inLayer('self_attn.k_proj')]: f32Tensor([16, 32]),
  [inLayer('self_attn.v_proj')]: f32Tensor([16, 32]),
  [inLayer('self_attn.o_proj')]: f32Tensor([32, 32]),
  [inLayer('mlp.gate_proj')]: f32Tensor([64, 32]),
  [inLayer('mlp.up_proj')]: f32Tensor([64, 32]),
  [inLayer('mlp.down_proj')]: f32Tensor([32, 64]),
});

/** A one-layer Llama with parts of its config and tensors replaced; null takes a tensor out. */
async function hfFolder(
  changes: object = {},
  tensors: Record<string, TensorBytes | null> = {},
  files: object = {},
) {
  const kept = Object.entries({ ...hfTensors(), ...tensors }).filter(([, tensor]) => tensor !== null);
  return writeFolder({
    'config.json': { ...hfConfig, ...changes },
    'model.safetensors': safetensorsBytes(Object.fromEntries(kept) as Record<string, TensorBytes>),
    ...files,
  });
}

describe('config forms', () => {
  test('of transformers 5 and 4 mean the same rope', async () => {
    const old = await readBaseModel(
      await hfFolder({ rope_theta: 5000, rope_scaling: { type: 'linear', factor: 2 } }),
    );
    const parameters = { rope_type: 'linear', factor: 2, rope_theta: 5000 };
    const recent = await readBaseModel(await hfFolder({ rope_parameters: parameters }));
    expect(recent.dims.ropeTables).toEqual(old.dims.ropeTables);
    expect(old.dims.ropeTables[0]!.inverseFrequencies[0]).toBe(0.5);
  });

  test('generation_config.json decides which tokens end a sequence', async () => {
    const folder = await hfFolder({}, {}, { 'generation_config.json': { eos_token_id: [5, 7, 5] } });
    expect((await readBaseModel(folder)).eosIds).toEqual([5, 7]);
  });

  test('chat_template.jinja wins over the tokenizer config', async () => {
    const config = { 'tokenizer_config.json': { chat_template: 'old' } };
    expect((await readBaseModel(await hfFolder({}, {}, config))).chatTemplate).toBe('old');
    const both = { ...config, 'chat_template.jinja': 'new' };
    expect((await readBaseModel(await hfFolder({}, {}, both))).chatTemplate).toBe('new');
  });

  test('a list of templates gives its default', async () => {
    const templates = [
      { name: 'tool_use', template: 't' },
      { name: 'default', template: 'd' },
    ];
    const folder = await hfFolder({}, {}, { 'tokenizer_config.json': { chat_template: templates } });
    expect((await readBaseModel(folder)).chatTemplate).toBe('d');
  });

  test('a tied head that is stored all the same is left alone', async () => {
    const model = await readBaseModel(await hfFolder({}, { 'lm_head.weight': f32Tensor([64, 32]) }));
    expect(roles(model, -1)).toEqual(['embedding', 'final_norm']);
  });
});

const rejects = (path: Promise<string>, message: RegExp) =>
  expect(path.then((p) => readBaseModel(p))).rejects.toMatchObject({
    name: 'InputError',
    code: 'model_invalid',
    message: expect.stringMatching(message),
  });

describe('a Hugging Face folder is refused by name', () => {
  const q = inLayer('self_attn.q_proj');
  const u8 = { dtype: 'U8', shape: [32, 32], bytes: new Uint8Array(1024) };
  test.each<[string, object, Record<string, TensorBytes | null>, RegExp]>([
    [
      'another architecture',
      { architectures: ['MixtralForCausalLM'] },
      {},
      /architectures: expected one of LlamaForCausalLM.*got "MixtralForCausalLM"/,
    ],
    ['no layers', { num_hidden_layers: 0 }, {}, /num_hidden_layers: expected an integer above 0, got 0/],
    ['a billion layers', { num_hidden_layers: 1e9 }, {}, /num_hidden_layers: expected at most 10000/],
    [
      'heads that do not divide',
      { num_attention_heads: 3, head_dim: 16 },
      {},
      /numHeads × headDim: expected a multiple of 32, got 48/,
    ],
    [
      'key heads that do not divide',
      { num_key_value_heads: 3 },
      {},
      /numHeads: expected a multiple of numKvHeads, 3/,
    ],
    ['an odd head', { head_dim: 15 }, {}, /head_dim: expected an even number, got 15/],
    [
      'a width off the groups',
      { hidden_size: 40, head_dim: 16 },
      {},
      /hiddenSize: expected a multiple of 32, got 40/,
    ],
    ['an epsilon of 0', { rms_norm_eps: 0 }, {}, /rms_norm_eps: expected a number above 0/],
    [
      'another activation',
      { hidden_act: 'relu' },
      {},
      /hidden_act: expected silu or gelu_pytorch_tanh, got "relu"/,
    ],
    ['soft-capped logits', { final_logit_softcapping: 30 }, {}, /final_logit_softcapping: expected none/],
    ['a quantised checkpoint', { quantization_config: { quant_method: 'awq' } }, {}, /quantization_config/],
    ['a partial rope', { partial_rotary_factor: 0.25 }, {}, /partial_rotary_factor: expected 1, got 0.25/],
    ['an unknown rope', { rope_scaling: { rope_type: 'longrope' } }, {}, /rope_scaling.rope_type/],
    [
      'layer types of another length',
      { layer_types: ['full_attention', 'full_attention'] },
      {},
      /layer_types: expected 1 entries/,
    ],
    [
      'unknown layer types',
      { layer_types: ['chunked_attention'] },
      {},
      /layer_types: .*got "chunked_attention"/,
    ],
    [
      'an end token beyond the vocabulary',
      { eos_token_id: 64 },
      {},
      /eos ids: expected ids below 64, got 64/,
    ],
    [
      'a missing tensor',
      {},
      { [q]: null },
      /tensor 'model.layers.0.self_attn.q_proj.weight': expected one of shape \[32,32\] for q_proj, got none/,
    ],
    [
      'a missing head',
      { tie_word_embeddings: false },
      {},
      /tensor 'lm_head.weight': expected one of shape \[64,32\]/,
    ],
    ['a missing bias', { attention_bias: true }, {}, /tensor 'model.layers.0.self_attn.q_proj.bias'/],
    [
      'a tensor of another shape',
      {},
      { [q]: f32Tensor([32, 64]) },
      /q_proj.weight' shape: expected \[32,32\], got \[32,64\]/,
    ],
    [
      'a tensor of another rank',
      {},
      { [q]: f32Tensor([1024]) },
      /q_proj.weight' shape: expected \[32,32\], got \[1024\]/,
    ],
    ['a tensor of bytes', {}, { [q]: u8 }, /q_proj.weight' dtype: expected F32, F16 or BF16, got U8/],
    [
      'tensors that Llama has not',
      {},
      { 'model.layers.0.mlp.router.weight': f32Tensor([1]), 'x.bias': f32Tensor([1]) },
      /tensors: expected only those that llama has, got '.*' and 1 more/,
    ],
    [
      'a layer too many',
      {},
      { 'model.layers.1.input_layernorm.weight': f32Tensor([32]) },
      /tensors: expected only those that llama has, got 'model.layers.1/,
    ],
  ])('%s', async (_name, changes, tensors, message) => {
    await rejects(hfFolder(changes, tensors), message);
  });

  test('pickled weights', async () => {
    await rejects(
      writeFolder({ 'config.json': hfConfig, 'pytorch_model.bin': 'PK' }),
      /weights: expected \*.safetensors \(pickled checkpoints are not read\), got pytorch_model.bin/,
    );
  });

  test('no weights, no config, a config that is no JSON', async () => {
    await rejects(writeFolder({ 'config.json': hfConfig }), /weights: .*got none/);
    await rejects(writeFolder({}), /config.json: expected a file, got none/);
    await rejects(writeFolder({ 'config.json': '{' }), /config.json: expected JSON/);
  });

  test('an index that leads out of the folder', async () => {
    const index = { weight_map: { w: '../other/model.safetensors' } };
    await rejects(
      hfFolder({}, {}, { 'model.safetensors.index.json': index }),
      /weight_map: expected names of safetensors files beside it/,
    );
  });

  test('a tensor in two files', async () => {
    const again = safetensorsBytes({ 'model.norm.weight': f32Tensor([32]) });
    await rejects(
      hfFolder({}, {}, { 'other.safetensors': again }),
      /tensor 'model.norm.weight': expected it in one file/,
    );
  });
});

const ggufMetadata: Record<string, GgufScalar> = {
  'general.architecture': 'llama',
  'llama.block_count': { u32: 1 },
  'llama.context_length': { u32: 128 },
  'llama.embedding_length': { u32: 32 },
  'llama.feed_forward_length': { u32: 64 },
  'llama.attention.head_count': { u32: 2 },
  'llama.attention.head_count_kv': { u32: 1 },
  'llama.attention.layer_norm_rms_epsilon': { f32: 1e-5 },
  'llama.rope.freq_base': { f32: 10000 },
  'tokenizer.ggml.model': 'gpt2',
  'tokenizer.ggml.tokens': ['a', 'b', '<|im_end|>', '<|eot_id|>'],
  'tokenizer.ggml.token_type': { i32: [1, 1, 3, 1] },
  'tokenizer.ggml.merges': [],
  'tokenizer.ggml.eos_token_id': { u32: 1 },
  'tokenizer.chat_template': 'T',
};
const q8 = (outFeatures: number, inFeatures: number): GgufTensorBytes => ({
  dims: [inFeatures, outFeatures],
  type: 8,
  bytes: new Uint8Array((outFeatures * inFeatures * 34) / 32),
});
const f32 = (size: number): GgufTensorBytes => ({ dims: [size], type: 0, bytes: new Uint8Array(4 * size) });
const ggufTensors = (): Record<string, GgufTensorBytes> => ({
  'token_embd.weight': q8(64, 32),
  'output_norm.weight': f32(32),
  'blk.0.attn_norm.weight': f32(32),
  'blk.0.ffn_norm.weight': f32(32),
  'blk.0.attn_q.weight': q8(32, 32),
  'blk.0.attn_k.weight': q8(16, 32),
  'blk.0.attn_v.weight': q8(16, 32),
  'blk.0.attn_output.weight': q8(32, 32),
  'blk.0.ffn_gate.weight': q8(64, 32),
  'blk.0.ffn_up.weight': q8(64, 32),
  'blk.0.ffn_down.weight': q8(32, 64),
});

/** A one-layer GGUF Llama with parts replaced; null takes out. */
async function ggufFile(
  metadata: Record<string, GgufScalar | null> = {},
  tensors: Record<string, GgufTensorBytes | null> = {},
): Promise<string> {
  const kept = <T>(all: Record<string, T | null>) =>
    Object.fromEntries(Object.entries(all).filter(([, value]) => value !== null)) as Record<string, T>;
  const path = join(await temporaryFolder(), 'model.gguf');
  await writeFile(
    path,
    ggufBytes(kept({ ...ggufMetadata, ...metadata }), kept({ ...ggufTensors(), ...tensors })),
  );
  return path;
}

describe('a GGUF file', () => {
  test('of llama: q and k back in the order that rotates halves, quants kept, the head tied', async () => {
    const model = await readBaseModel(await ggufFile(), 'int4');
    expect(model.dims).toMatchObject({
      numLayers: 1,
      hiddenSize: 32,
      numHeads: 2,
      numKvHeads: 1,
      headDim: 16,
      vocabSize: 64,
    });
    expect(roles(model, -1)).toEqual(['embedding', 'final_norm']);
    expect(find(model, 'q_proj')).toMatchObject({
      format: 'int8',
      sourceType: 'q8_0',
      rows: rotateHalfRows(2, 16),
    });
    expect(find(model, 'k_proj').rows).toEqual(rotateHalfRows(1, 16));
    expect(find(model, 'v_proj').rows).toBeNull();
    expect(model.chatTemplate).toBe('T');
  });

  test('ends sequences at its end token and at control tokens known to end a turn', async () => {
    expect((await readBaseModel(await ggufFile())).eosIds).toEqual([1, 2]);
  });

  test('has a head of its own when it stores one', async () => {
    const model = await readBaseModel(await ggufFile({}, { 'output.weight': q8(64, 32) }));
    expect(roles(model, -1)).toEqual(['embedding', 'final_norm', 'lm_head']);
  });

  test('scales its rope by factors that it stores', async () => {
    const factors = Float32Array.of(1, 1, 1, 1, 2, 2, 4, 8);
    const tensor = { dims: [8], type: 0, bytes: new Uint8Array(factors.buffer) };
    const [plain, scaled] = await Promise.all(
      [ggufFile(), ggufFile({}, { 'rope_freqs.weight': tensor })].map(
        async (path) => (await readBaseModel(await path)).dims.ropeTables[0]!,
      ),
    );
    expect(scaled!.inverseFrequencies[7]).toBe(plain!.inverseFrequencies[7]! / 8);
  });

  test('of Gemma 3: each sixth layer sees everything, norms hold 1 + w already', async () => {
    const renamed = Object.entries(ggufMetadata).map(([key, value]) => [
      key.replace(/^llama\./, 'gemma3.'),
      value,
    ]);
    const metadata = {
      ...Object.fromEntries(Object.keys(ggufMetadata).map((key) => [key, null])),
      ...Object.fromEntries(renamed),
      'general.architecture': 'gemma3',
      'gemma3.block_count': { u32: 7 },
      'gemma3.attention.sliding_window': { u32: 16 },
      'gemma3.rope.freq_base': { f32: 1e6 },
    };
    const tensors: Record<string, GgufTensorBytes> = {};
    for (let layer = 0; layer < 7; layer++) {
      for (const [name, tensor] of Object.entries(ggufTensors()))
        tensors[name.replace('blk.0', `blk.${layer}`)] = tensor;
      for (const name of ['post_attention_norm', 'post_ffw_norm'])
        tensors[`blk.${layer}.${name}.weight`] = f32(32);
      for (const name of ['attn_q_norm', 'attn_k_norm']) tensors[`blk.${layer}.${name}.weight`] = f32(16);
    }
    const model = await readBaseModel(await ggufFile(metadata, tensors));
    expect([...model.dims.slidingWindows]).toEqual([16, 16, 16, 16, 16, 0, 16]);
    expect([...model.dims.ropeTableIndex]).toEqual([1, 1, 1, 1, 1, 0, 1]);
    expect(model.dims).toMatchObject({
      embeddingScale: Math.fround(Math.sqrt(32)),
      attentionScale: 0.25,
      activation: 'gelu_tanh',
    });
    expect(model.tensors.every(({ addend, rows }) => addend === 0 && rows === null)).toBe(true);
  });
});

describe('a GGUF file is refused by name', () => {
  test.each<[string, Record<string, GgufScalar | null>, Record<string, GgufTensorBytes | null>, RegExp]>([
    [
      'another architecture',
      { 'general.architecture': 'mamba' },
      {},
      /general.architecture: expected one of llama.*got "mamba"/,
    ],
    [
      'no architecture',
      { 'general.architecture': null },
      {},
      /general.architecture: expected a string, got nothing/,
    ],
    [
      'a count that is text',
      { 'llama.block_count': 'one' },
      {},
      /llama.block_count: expected a non-negative integer, got "one"/,
    ],
    [
      'no layers',
      { 'llama.block_count': { u32: 0 } },
      {},
      /llama.block_count: expected an integer from 1 to 10000, got 0/,
    ],
    ['four billion layers', { 'llama.block_count': { u32: 2 ** 32 - 1 } }, {}, /llama.block_count/],
    [
      'heads that do not divide',
      { 'llama.attention.head_count': { u32: 3 } },
      {},
      /llama.attention.head_count: expected a divisor of embedding_length, got 3/,
    ],
    ['no heads', { 'llama.attention.head_count': { u32: 0 } }, {}, /llama.attention.head_count/],
    [
      'values of another size than keys',
      { 'llama.attention.value_length': { u32: 8 } },
      {},
      /llama.attention.value_length: expected 16/,
    ],
    [
      'a partial rope',
      { 'llama.rope.dimension_count': { u32: 8 } },
      {},
      /llama.rope.dimension_count: expected 16/,
    ],
    ['experts', { 'llama.expert_count': { u32: 8 } }, {}, /llama.expert_count: expected 0 or none/],
    [
      'an unknown rope',
      { 'llama.rope.scaling.type': 'longrope' },
      {},
      /llama.rope.scaling.type: expected none, linear or yarn, got "longrope"/,
    ],
    [
      'no context length',
      { 'llama.context_length': null },
      {},
      /llama.context_length: expected a non-negative integer, got nothing/,
    ],
    ['no embedding', {}, { 'token_embd.weight': null }, /vocabSize: expected an integer from 1/],
    [
      'a missing tensor',
      {},
      { 'blk.0.ffn_up.weight': null },
      /tensor 'blk.0.ffn_up.weight': expected one of shape \[64,32\] for up_proj, got none/,
    ],
    [
      'a tensor of another shape',
      {},
      { 'blk.0.ffn_up.weight': q8(32, 32) },
      /tensor 'blk.0.ffn_up.weight' shape: expected \[64,32\], got \[32,32\]/,
    ],
    [
      'a quantised norm',
      {},
      { 'output_norm.weight': { dims: [32], type: 8, bytes: new Uint8Array(34) } },
      /tensor 'output_norm.weight' type: expected f32, f16 or bf16 for a vector, got q8_0/,
    ],
    [
      'a bias that llama has not',
      {},
      { 'blk.0.attn_q.bias': f32(32) },
      /tensors: expected only those that llama has, got 'blk.0.attn_q.bias'/,
    ],
    [
      'rope factors of another size',
      {},
      { 'rope_freqs.weight': f32(4) },
      /tensor 'rope_freqs.weight' shape: expected \[8\], got \[4\]/,
    ],
    [
      'rope factors of 0',
      {},
      { 'rope_freqs.weight': f32(8) },
      /tensor 'rope_freqs.weight': expected numbers above 0/,
    ],
    [
      'an end token beyond the vocabulary',
      { 'tokenizer.ggml.eos_token_id': { u32: 64 } },
      {},
      /eos ids: expected ids below 64, got 64/,
    ],
  ])('%s', async (_name, metadata, tensors, message) => {
    await rejects(ggufFile(metadata, tensors), message);
  });

  test('a file that is cut, and one that is no GGUF', async () => {
    const path = await ggufFile();
    const bytes = await readFile(path);
    await writeFile(path, bytes.subarray(0, bytes.length - 100));
    await rejects(Promise.resolve(path), /tensor '.*' extent: expected within/);
    await writeFile(path, 'not a model');
    await rejects(Promise.resolve(path), /magic: expected the bytes GGUF/);
  });
});

test('a path that is not there is an io failure that names it', async () => {
  await expect(readBaseModel('/nowhere/model.gguf')).rejects.toMatchObject({
    code: 'io_failed',
    message: /\/nowhere\/model.gguf/,
  });
});
