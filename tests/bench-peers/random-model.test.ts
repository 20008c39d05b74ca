import { mkdtemp, open, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { readAdapterFile } from '../../engine/adapters/adapter-file.ts';
import { readBaseModel } from '../../engine/model/base-model.ts';
import { prepareModel } from '../../engine/model/prepare.ts';
import { readSafetensors } from '../../engine/model/safetensors.ts';
import { openTextModel } from '../../engine/model/text-model.ts';
import { readGguf } from '../../native/index.ts';
import { ggmlTypes, tensorBytes, writeGguf } from '../bench/peers/gguf-file.ts';
import {
  bf16ToF16,
  firstWordId,
  pairRows,
  vocabulary,
  writeAdapterGguf,
  writeRandomFolder,
  writeRandomGguf,
} from '../bench/peers/random-model.ts';
import {
  adapterElements,
  linears,
  matrixType,
  quantizations,
  type Shape,
  shapes,
} from '../bench/peers/shapes.ts';
import { writeRandomAdapter } from '../bench/random-adapter.ts';
import { open as openRuntime } from '../fixtures/models.ts';
import { sequenceLogits } from '../fixtures/steps.ts';

const tiny: Shape = {
  title: 'tiny',
  architecture: 'llama',
  numLayers: 8,
  hiddenSize: 256,
  intermediateSize: 512,
  numHeads: 4,
  numKvHeads: 2,
  headDim: 64,
  vocabSize: 1024,
  maxPositions: 128,
  normEps: 1e-5,
  ropeTheta: 10_000,
};

let folder: string;
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'motet-random-model-'));
});
afterAll(() => rm(folder, { recursive: true }));

test.each(quantizations)(
  'our reader takes a random model of %s, and its logits are finite',
  async (quantization) => {
    const path = join(folder, `${quantization}.gguf`);
    await writeRandomGguf(path, tiny, quantization);
    const model = await prepareModel(await readBaseModel(path), { cacheFolder: folder });
    const runtime = await openRuntime(model, { deviceMemoryBytes: 32 << 20 });
    try {
      const logits = await sequenceLogits(runtime, [300, 301, 302, 303]);
      expect(logits.every(Number.isFinite)).toBe(true);
      expect(new Set(logits).size).toBeGreaterThan(1000);
    } finally {
      runtime.close();
    }
  },
);

test('q4_0_all is four bits everywhere; q4_0 keeps the embedding at six', async () => {
  await writeRandomGguf(join(folder, 'all.gguf'), tiny, 'q4_0_all');
  await writeRandomGguf(join(folder, 'mixed.gguf'), tiny, 'q4_0');
  const formats = async (name: string) => {
    const { tensors } = await readBaseModel(join(folder, name));
    return new Set(tensors.filter(({ format }) => format !== 'vector').map(({ format }) => format));
  };
  expect(await formats('all.gguf')).toEqual(new Set(['int4']));
  expect(await formats('mixed.gguf')).toEqual(new Set(['int4', 'int8_group16']));
});

test('q4_k_m gives more bits to the first and last eighth and every third layer between', () => {
  const types = Array.from({ length: 8 }, (_, layer) => matrixType(tiny, 'q4_k_m', 'v_proj', layer));
  expect(types).toEqual(['q6_k', 'q4_k', 'q4_k', 'q6_k', 'q4_k', 'q4_k', 'q6_k', 'q6_k']);
  expect(matrixType(tiny, 'q4_k_m', 'q_proj', 0)).toBe('q4_k');
});

test('rows that K-quants do not fit take other types', () => {
  expect(matrixType(shapes.qwen05b, 'q4_k_m', 'q_proj', 0)).toBe('q5_0');
  expect(matrixType(shapes.qwen05b, 'q4_k_m', 'down_proj', 0)).toBe('q6_k');
  expect(matrixType(shapes.qwen05b, 'q4_0', null, -1)).toBe('q8_0');
});

test('the Hugging Face folder has the same tensors as the GGUF file', async () => {
  const shape: Shape = { ...tiny, architecture: 'qwen2' };
  await writeRandomGguf(join(folder, 'qwen.gguf'), shape, 'q8_0');
  await writeRandomFolder(join(folder, 'qwen'), shape);
  const plan = async (name: string) =>
    (await readBaseModel(join(folder, name), 'int8')).tensors.map(
      ({ role, layer, outFeatures, inFeatures }) => `${layer} ${role} ${outFeatures} ${inFeatures}`,
    );
  expect(await plan('qwen')).toEqual(await plan('qwen.gguf'));
});

test('both forms have the same tokenizer', async () => {
  await writeRandomGguf(join(folder, 'text.gguf'), tiny, 'q8_0');
  await writeRandomFolder(join(folder, 'text'), tiny);
  const ids = async (name: string) => {
    const text = await openTextModel(await readBaseModel(join(folder, name)));
    return Array.from(text.encode('abc ab, zz', { addSpecialTokens: false }));
  };
  expect(await ids('text')).toEqual(await ids('text.gguf'));
});

test('a vocabulary has distinct tokens, and each merge makes one', () => {
  const { tokens, merges } = vocabulary(20_000);
  expect(new Set(tokens).size).toBe(20_000);
  expect(merges[0]).toBe('a a');
  const known = new Set(tokens);
  expect(merges.every((merge) => known.has(merge.replace(' ', '')))).toBe(true);
  expect(tokens[firstWordId]).toBe('aa');
});

test('an adapter becomes pairs of f16 tensors that the base has, with its alpha', async () => {
  const source = join(folder, 'adapter');
  const targets = ['q_proj', 'down_proj'];
  await writeRandomAdapter(source, tiny, 4, targets, 7);
  const path = join(folder, 'adapter.gguf');
  await writeAdapterGguf(source, path, tiny);
  const { metadata, tensors } = await readGguf(path);
  expect(metadata).toMatchObject({
    'general.architecture': 'llama',
    'general.type': 'adapter',
    'adapter.type': 'lora',
    'adapter.lora.alpha': 4,
  });
  expect(tensors).toHaveLength(tiny.numLayers * 4);
  const shapeOf = (name: string) => tensors.find((tensor) => tensor.name === name);
  expect(shapeOf('blk.0.attn_q.weight.lora_a')).toMatchObject({ dims: [256, 4], type: 'f16' });
  expect(shapeOf('blk.7.ffn_down.weight.lora_b')).toMatchObject({ dims: [4, 256], type: 'f16' });
});

test('the values of an adapter survive, and only q rows of llama change places', async () => {
  const source = join(folder, 'values');
  await writeRandomAdapter(source, tiny, 4, ['q_proj', 'o_proj'], 3);
  const path = join(folder, 'values.gguf');
  await writeAdapterGguf(source, path, tiny);
  const peft = await readSafetensors(join(source, 'adapter_model.safetensors'));
  const gguf = await readGguf(path);
  const words = async (file: string, offsetBytes: number, count: number) => {
    const handle = await open(file);
    const values = new Uint16Array(count);
    await handle.read(values, 0, values.byteLength, offsetBytes);
    await handle.close();
    return values;
  };
  const both = async (peftName: string, ggufName: string) => {
    const from = peft.tensors.get(`base_model.model.model.layers.1.self_attn.${peftName}.weight`)!;
    const to = gguf.tensors.find(({ name }) => name === `blk.1.${ggufName}`)!;
    const count = from.sizeBytes / 2;
    const expected = (await words(peft.path, from.offsetBytes, count)).map(bf16ToF16);
    return { expected, got: await words(path, to.offsetBytes, count) };
  };
  const plain = await both('o_proj.lora_B', 'attn_output.weight.lora_b');
  expect(plain.got).toEqual(plain.expected);
  const turned = await both('q_proj.lora_B', 'attn_q.weight.lora_b');
  expect(turned.got).not.toEqual(turned.expected);
  expect(turned.got).toEqual(pairRows(turned.expected, tiny.numHeads, tiny.headDim, 4));
  // Row 1 of a head is rotated with row 33: in pairs they are neighbours.
  expect(turned.got.subarray(2 * 4, 4 * 4)).toEqual(
    Uint16Array.from([...turned.expected.subarray(4, 8), ...turned.expected.subarray(33 * 4, 34 * 4)]),
  );
});

test('adapterElements counts what a written adapter has', async () => {
  await writeRandomAdapter(join(folder, 'all'), tiny, 16, Object.keys(linears(tiny)), 1);
  await writeRandomGguf(join(folder, 'counted.gguf'), tiny, 'q8_0');
  const model = await readBaseModel(join(folder, 'counted.gguf'));
  const { sizeBytes } = await readAdapterFile(join(folder, 'all'), model.dims, { maxRank: 16 });
  expect(sizeBytes).toBe(
    2 *
      adapterElements(tiny, 16, [
        'q_proj',
        'k_proj',
        'v_proj',
        'o_proj',
        'gate_proj',
        'up_proj',
        'down_proj',
      ]),
  );
});

test.each([
  ['zero', 0x0000, 0x0000],
  ['one', 0x3f80, 0x3c00],
  ['minus a half', 0xbf00, 0xb800],
  ['1.9921875', 0x3fff, 0x3ff8],
  ['2^-14', 0x3880, 0x0400],
  ['what f16 has no normal number for', 0x3780, 0x0000],
])('bf16 to f16: %s', (_, bf16, f16) => {
  expect(bf16ToF16(bf16)).toBe(f16);
});

test('bf16 to f16 refuses what is too large', () => {
  expect(() => bf16ToF16(0x4780)).toThrow(/below 65536/);
});

test('a tensor with another number of bytes than its shape says is refused, and no file appears', async () => {
  const path = join(folder, 'short.gguf');
  const short = { name: 't', type: 'f32' as const, shape: [4], content: () => [new Uint8Array(12)] };
  await expect(writeGguf(path, {}, [short])).rejects.toThrow("tensor 't': expected 16 bytes, got 12");
  await expect(open(path)).rejects.toThrow(/ENOENT/);
});

test('sizes agree with the native reader, and rows that do not fit a block are refused', () => {
  expect(tensorBytes('q4_0', [3, 64])).toBe(3 * 2 * ggmlTypes.q4_0.bytes);
  expect(() => tensorBytes('q6_k', [1, 96])).toThrow('q6_k: expected rows of a multiple of 256, got 96');
});
