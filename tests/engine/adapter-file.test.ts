import { cp, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { describe, expect, test } from 'vitest';
import { readAdapterFile } from '../../engine/adapters/adapter-file.ts';
import { readBaseModel } from '../../engine/model/base-model.ts';
import type { ModelDims } from '../../native/index.ts';
import { goldensFolder } from '../fixtures/golden.ts';
import {
  f32Tensor,
  safetensorsBytes,
  type TensorBytes,
  temporaryFolder,
  writeFolder,
} from '../fixtures/source-files.ts';

const dims = {
  numLayers: 2,
  hiddenSize: 32,
  intermediateSize: 64,
  numHeads: 2,
  numKvHeads: 1,
  headDim: 16,
  vocabSize: 100,
} as ModelDims;

const config = { peft_type: 'LORA', r: 4, lora_alpha: 8, target_modules: ['q_proj'], bias: 'none' };
type Tensors = Record<string, TensorBytes | null>;

const module = (name: string) => `base_model.model.model.layers.${name}`;
const qProj = (rank = 4, layer = 0): Tensors => ({
  [module(`${layer}.self_attn.q_proj.lora_A.weight`)]: f32Tensor([rank, 32], 1),
  [module(`${layer}.self_attn.q_proj.lora_B.weight`)]: f32Tensor([32, rank], 2),
});

/** An adapter of rank 4 on q_proj of layer 0, with parts of the config and tensors replaced; null takes one out. */
async function adapter(changes: object = {}, tensors: Tensors = {}): Promise<string> {
  const kept = Object.entries({ ...qProj(), ...tensors }).filter(([, tensor]) => tensor !== null);
  return writeFolder({
    'adapter_config.json': { ...config, ...changes },
    'adapter_model.safetensors': safetensorsBytes(Object.fromEntries(kept) as Record<string, TensorBytes>),
  });
}

const read = (folder: string, maxRank = 64) => readAdapterFile(folder, dims, { maxRank });

test('reads modules with their places, ranks and scalings', async () => {
  const file = await read(await adapter());
  expect(file).toMatchObject({ rank: 4, targets: ['q_proj'], kind: 'lora', sizeBytes: 2 * 4 * 32 * 4 });
  expect(file.digest).toMatch(/^sha256:[0-9a-f]{64}$/);
  expect(file.modules).toEqual([
    expect.objectContaining({
      layer: 0,
      target: 'q_proj',
      rank: 4,
      scaling: 2,
      type: 'f32',
      magnitudeOffsetBytes: -1,
      biasOffsetBytes: -1,
    }),
  ]);
  expect(file.modules[0]!.bOffsetBytes - file.modules[0]!.aOffsetBytes).toBe(4 * 32 * 4);
});

test.each([
  ['llama3', 'lora', 3, 14],
  ['mistral', 'lora', 7, 7],
  ['qwen2', 'rslora', 6, 6],
  ['qwen3', 'dora', 4, 8],
  ['gemma3', 'lora', 5, 14],
])('reads what PEFT wrote for %s', async (name, kind, rank, numModules) => {
  const folder = join(goldensFolder, 'tiny', name);
  const model = await readBaseModel(folder);
  const file = await readAdapterFile(join(folder, 'adapter'), model.dims, { maxRank: 8 });
  expect(file).toMatchObject({ kind, rank });
  expect(file.modules).toHaveLength(numModules);
});

test('takes rank and alpha from the first pattern that matches a module', async () => {
  const patterns = {
    rank_pattern: { 'layers.1.self_attn.q_proj': 2, q_proj: 6 },
    alpha_pattern: { '1\\..*q_proj': 3 },
  };
  const file = await read(await adapter(patterns, { ...qProj(6, 0), ...qProj(2, 1) }));
  expect(file.modules.map(({ layer, rank, scaling }) => [layer, rank, scaling])).toEqual([
    [0, 6, 8 / 6],
    [1, 2, 3 / 2],
  ]);
});

test('divides alpha by the root of the rank for rsLoRA', async () => {
  const file = await read(await adapter({ use_rslora: true }));
  expect(file.modules[0]!.scaling).toBe(4);
});

test('reads names with the adapter name in them', async () => {
  const [[a, tensorA], [b, tensorB]] = Object.entries(qProj()) as [
    [string, TensorBytes],
    [string, TensorBytes],
  ];
  const renamed = {
    [a]: null,
    [b]: null,
    [a.replace('.weight', '.default.weight')]: tensorA,
    [b.replace('.weight', '.default.weight')]: tensorB,
  };
  const file = await read(await adapter({}, renamed));
  expect(file.modules).toHaveLength(1);
});

describe('the digest', () => {
  const digest = async (folder: Promise<string>) => (await read(await folder)).digest;

  test('is the same for a copy elsewhere, with other paths, versions and training settings', async () => {
    const changes = {
      base_model_name_or_path: 'x',
      peft_version: '9',
      lora_dropout: 0.5,
      inference_mode: false,
      revision: 'r',
    };
    expect(await digest(adapter(changes))).toBe(await digest(adapter()));
  });

  test('does not depend on the order of tensors in the file', async () => {
    const [a, b] = Object.keys(qProj()) as [string, string];
    const swapped = safetensorsBytes({ [b]: qProj()[b]!, [a]: qProj()[a]! });
    const folder = await writeFolder({ 'adapter_config.json': config, 'adapter_model.safetensors': swapped });
    expect(await digest(Promise.resolve(folder))).toBe(await digest(adapter()));
  });

  test.each([
    ['alpha', { lora_alpha: 9 }, {}],
    ['rsLoRA', { use_rslora: true }, {}],
    ['a pattern', { alpha_pattern: { q_proj: 1 } }, {}],
    ['a weight', {}, { [module('0.self_attn.q_proj.lora_A.weight')]: f32Tensor([4, 32], 3) }],
    ['a module more', {}, qProj(4, 1)],
  ])('changes with %s', async (_name, changes, tensors) => {
    expect(await digest(adapter(changes, tensors as Tensors))).not.toBe(await digest(adapter()));
  });

  test('is pinned, since caches and clusters hold it', async () => {
    expect(await digest(adapter())).toBe(
      'sha256:d0a390334f3c06328a680c2f51e22a1772dc159ae74ee987078e3a200ec8becc',
    );
  });
});

describe('refuses by name', () => {
  const a = module('0.self_attn.q_proj.lora_A.weight');
  const b = module('0.self_attn.q_proj.lora_B.weight');
  const zeros = (dtype: string, shape: number[], bytes: number) => ({
    dtype,
    shape,
    bytes: new Uint8Array(bytes),
  });
  const hostile: [string, object, Tensors, RegExp][] = [
    ['another kind of adapter', { peft_type: 'LOHA' }, {}, /peft_type: expected LORA, got "LOHA"/],
    [
      'saved modules',
      { modules_to_save: ['lm_head'] },
      {},
      /modules_to_save: expected none.*got \["lm_head"\]/,
    ],
    ['fan-in-fan-out', { fan_in_fan_out: true }, {}, /fan_in_fan_out/],
    ['trained biases', { bias: 'all' }, {}, /bias: expected none.*got "all"/],
    ['target parameters', { target_parameters: ['x'] }, {}, /target_parameters/],
    ['trained tokens', { trainable_token_indices: [1] }, {}, /trainable_token_indices/],
    ['activated LoRA', { alora_invocation_tokens: [1, 2] }, {}, /alora_invocation_tokens/],
    ['quantisation-aware LoRA', { use_qalora: true }, {}, /use_qalora/],
    ['layer replication', { layer_replication: [[0, 1]] }, {}, /layer_replication/],
    [
      'a start that changes the base',
      { init_lora_weights: 'pissa_niter_4' },
      {},
      /init_lora_weights: .*got "pissa_niter_4"/,
    ],
    ['no rank', { r: undefined }, {}, /r: expected a number above 0, got nothing/],
    ['a rank of 0', { r: 0 }, {}, /r: expected a number above 0, got 0/],
    ['a fractional rank', { r: 4.5 }, {}, /r: expected a number above 0, got 4.5/],
    ['alpha as text', { lora_alpha: '16' }, {}, /lora_alpha: expected a number above 0, got "16"/],
    ['a flag as text', { use_dora: 'yes' }, {}, /use_dora: expected true or false, got "yes"/],
    ['patterns in a list', { rank_pattern: [1] }, {}, /rank_pattern: expected an object/],
    [
      'a pattern of rank 0',
      { rank_pattern: { q_proj: 0 } },
      {},
      /rank_pattern "q_proj": expected a number above 0, got 0/,
    ],
    [
      'a pattern that may take for ever',
      { alpha_pattern: { '(a+)+b': 1 } },
      {},
      /alpha_pattern "\(a\+\)\+b": expected a short pattern/,
    ],
    [
      'a pattern that is none',
      { alpha_pattern: { '(q_proj': 1 } },
      {},
      /alpha_pattern "\(q_proj": expected a regular expression/,
    ],
    ['targets that are numbers', { target_modules: [1] }, {}, /target_modules: expected a list of names/],
    [
      'a target without tensors',
      { target_modules: ['q_proj', 'v_proj'] },
      {},
      /target_modules "v_proj": expected tensors for it, got none/,
    ],
    [
      'tensors of no target',
      { target_modules: ['q_proj'] },
      {
        [module('0.mlp.up_proj.lora_A.weight')]: f32Tensor([4, 32]),
        [module('0.mlp.up_proj.lora_B.weight')]: f32Tensor([64, 4]),
      },
      /module 'model.layers.0.mlp.up_proj': expected one of target_modules/,
    ],
    [
      'a layer that the base lacks',
      { layers_to_transform: [2] },
      {},
      /layers_to_transform: expected layers from 0 to 1, got 2/,
    ],
    [
      'tensors outside the layers',
      { layers_to_transform: 1 },
      {},
      /module 'model.layers.0.self_attn.q_proj': expected one of layers_to_transform \[1\]/,
    ],
    [
      'a layer without tensors',
      { layers_to_transform: [0, 1] },
      {},
      /layers_to_transform 1: expected tensors for it/,
    ],
    [
      'a tensor of a layer that the base lacks',
      {},
      qProj(4, 7),
      /module 'model.layers.7.self_attn.q_proj': expected a layer below 2, got 7/,
    ],
    [
      'an embedding',
      {},
      { 'base_model.model.model.embed_tokens.lora_embedding_A': f32Tensor([4, 100]) },
      /embed_tokens.lora_embedding_A': .*embeddings are not supported/,
    ],
    [
      'a tensor of another module',
      {},
      { [module('0.mlp.router.lora_A.weight')]: f32Tensor([4, 32]) },
      /tensor '.*router.lora_A.weight': expected lora_A, lora_B/,
    ],
    [
      'a tensor without the prefix',
      {},
      { 'model.layers.0.self_attn.q_proj.lora_A.weight': f32Tensor([4, 32]) },
      /tensor 'model.layers.0/,
    ],
    [
      'A without B',
      {},
      { [b]: null },
      /module 'model.layers.0.self_attn.q_proj': expected lora_A and lora_B, got no lora_B/,
    ],
    ['B without A', {}, { [a]: null }, /got no lora_A/],
    ['no tensors', {}, { [a]: null, [b]: null }, /adapter_model.safetensors: expected at least one tensor/],
    [
      'the same part twice',
      {},
      { [a.replace('.weight', '.default.weight')]: f32Tensor([4, 32]) },
      /expected one tensor for each part of a module, got also/,
    ],
    [
      'an A of another rank',
      {},
      { [a]: f32Tensor([3, 32]) },
      /tensor '.*lora_A.weight' shape: expected \[4,32\].*got \[3,32\]/,
    ],
    ['an A for another base', {}, { [a]: f32Tensor([4, 48]) }, /lora_A.weight' shape: expected \[4,32\]/],
    ['a B for another base', {}, { [b]: f32Tensor([48, 4]) }, /lora_B.weight' shape: expected \[32,4\]/],
    [
      'an A that is flat',
      {},
      { [a]: f32Tensor([128]) },
      /lora_A.weight' shape: expected \[4,32\].*got \[128\]/,
    ],
    [
      'weights of integers',
      {},
      { [a]: zeros('I32', [4, 32], 512), [b]: zeros('I32', [32, 4], 512) },
      /lora_A.weight' dtype: expected F32, F16 or BF16, got I32/,
    ],
    [
      'A and B of two types',
      {},
      { [b]: zeros('BF16', [32, 4], 256) },
      /lora_B.weight' dtype: expected F32, as lora_A has, got BF16/,
    ],
    [
      'DoRA without magnitudes',
      { use_dora: true },
      {},
      /lora_magnitude_vector: expected one, as use_dora is true, got none/,
    ],
    [
      'magnitudes without DoRA',
      {},
      { [module('0.self_attn.q_proj.lora_magnitude_vector')]: f32Tensor([32]) },
      /lora_magnitude_vector: expected none, as use_dora is false/,
    ],
    [
      'a magnitude of another size',
      { use_dora: true },
      { [module('0.self_attn.q_proj.lora_magnitude_vector')]: f32Tensor([16]) },
      /lora_magnitude_vector' shape: expected \[32\]/,
    ],
    [
      'a bias that the config denies',
      {},
      { [module('0.self_attn.q_proj.lora_B.bias')]: f32Tensor([32]) },
      /lora_B.bias: expected none, as lora_bias is false/,
    ],
    [
      'no bias where the config has one',
      { lora_bias: true },
      {},
      /lora_B.bias: expected one, as lora_bias is true/,
    ],
  ];
  test.each(hostile)('%s', async (_name, changes, tensors, message) => {
    await expect(read(await adapter(changes, tensors))).rejects.toMatchObject({
      name: 'EngineError',
      code: 'adapter_invalid',
      param: 'lora_path',
      message: expect.stringMatching(message),
    });
  });

  test('a rank beyond the setting, with both numbers', async () => {
    await expect(read(await adapter(), 3)).rejects.toMatchObject({
      code: 'adapter_rank_too_large',
      message: expect.stringMatching(/maximum rank setting 3, got 4/),
    });
  });

  test('pickled weights', async () => {
    const folder = await writeFolder({ 'adapter_config.json': config, 'adapter_model.bin': 'PK' });
    await expect(read(folder)).rejects.toMatchObject({
      code: 'adapter_invalid',
      message: expect.stringMatching(
        /adapter_model.safetensors: expected a file \(pickled weights are not read\), got adapter_model.bin/,
      ),
    });
  });

  test('a broken safetensors file', async () => {
    const folder = await adapter();
    await writeFile(join(folder, 'adapter_model.safetensors'), 'short');
    await expect(read(folder)).rejects.toMatchObject({
      code: 'adapter_invalid',
      message: expect.stringMatching(/header length/),
    });
  });

  test('a config that is no JSON, and one that is too long', async () => {
    const folder = await adapter();
    await writeFile(join(folder, 'adapter_config.json'), '{');
    await expect(read(folder)).rejects.toMatchObject({
      message: expect.stringMatching(/adapter_config.json: expected JSON/),
    });
    await writeFile(join(folder, 'adapter_config.json'), ' '.repeat(2 ** 20 + 1));
    await expect(read(folder)).rejects.toMatchObject({
      message: expect.stringMatching(/at most 1048576 bytes/),
    });
  });

  test('a folder that is not there, or lacks a file', async () => {
    await expect(read('/nowhere')).rejects.toMatchObject({ code: 'adapter_file_not_found' });
    const folder = await writeFolder({ 'adapter_config.json': config });
    await expect(read(folder)).rejects.toMatchObject({ code: 'adapter_file_not_found' });
  });
});

test('a copied folder is the same adapter', async () => {
  const folder = await adapter();
  const copy = join(await temporaryFolder(), 'copy');
  await cp(folder, copy, { recursive: true });
  expect((await read(copy)).digest).toBe((await read(folder)).digest);
});
