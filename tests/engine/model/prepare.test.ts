import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { open, readdir, readFile, stat, truncate, unlink, utimes, writeFile } from 'node:fs/promises';
import { hostname } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { describe, expect, test } from 'vitest';
import { type BaseModel, type Quantization, readBaseModel } from '../../../engine/model/base-model.ts';
import { type PreparedModel, type PrepareOptions, prepareModel } from '../../../engine/model/prepare.ts';
import { packedBytes } from '../../../native/index.ts';
import { seededRandom } from '../../fixtures/seeded-random.ts';
import {
  f32Tensor,
  safetensorsBytes,
  type TensorBytes,
  temporaryFolder,
  writeFolder,
} from '../../fixtures/source-files.ts';

const inLayer = (name: string) => `model.layers.0.${name}.weight`;

/** A one-layer Llama of f32 weights; its size is that of the embedding, 128 bytes a token. */
function modelFolder(vocabSize = 64, tensors: Record<string, TensorBytes> = {}): Promise<string> {
  return writeFolder({
    'config.json': {
      architectures: ['LlamaForCausalLM'],
      vocab_size: vocabSize,
      hidden_size: 32,
      intermediate_size: 64,
      num_hidden_layers: 1,
      num_attention_heads: 2,
      num_key_value_heads: 1,
      max_position_embeddings: 128,
      tie_word_embeddings: true,
      eos_token_id: 2,
    },
    'model.safetensors': safetensorsBytes({
      'model.embed_tokens.weight': f32Tensor([vocabSize, 32], 1),
      'model.norm.weight': f32Tensor([32], 2),
      [inLayer('input_layernorm')]: f32Tensor([32], 3),
      [inLayer('post_attention_layernorm')]: f32Tensor([32], 4),
      [inLayer('self_attn.q_proj')]: f32Tensor([32, 32], 5),
      [inLayer('self_attn.k_proj')]: f32Tensor([16, 32], 6),
      [inLayer('self_attn.v_proj')]: f32Tensor([16, 32], 7),
      [inLayer('self_attn.o_proj')]: f32Tensor([32, 32], 8),
      [inLayer('mlp.gate_proj')]: f32Tensor([64, 32], 9),
      [inLayer('mlp.up_proj')]: f32Tensor([64, 32], 10),
      [inLayer('mlp.down_proj')]: f32Tensor([32, 64], 11),
      ...tensors,
    }),
  });
}

interface Setting {
  folder: string;
  model: BaseModel;
  cacheFolder: string;
  prepare(options?: Partial<PrepareOptions>): Promise<PreparedModel>;
}

async function setting(quantization: Quantization = 'keep', folder?: string): Promise<Setting> {
  const path = folder ?? (await modelFolder());
  const model = await readBaseModel(path, quantization);
  const cacheFolder = await temporaryFolder();
  return {
    folder: path,
    model,
    cacheFolder,
    prepare: (options) => prepareModel(model, { cacheFolder, ...options }),
  };
}

const packedFiles = (cacheFolder: string) => readdir(join(cacheFolder, 'packed'));

test('packs every tensor at an aligned place of its own', async () => {
  const { model, prepare } = await setting('int4');
  const { tensors, packedPath, isReused } = await prepare();
  expect(isReused).toBe(false);
  expect(tensors.map(({ role, layer, format }) => [role, layer, format])).toEqual(
    model.tensors.map(({ role, layer, format }) => [role, layer, format]),
  );
  const { size } = await stat(packedPath);
  let end = 0;
  for (const { offsetBytes, sizeBytes, format, outFeatures, inFeatures } of tensors) {
    expect(offsetBytes % 64).toBe(0);
    expect(offsetBytes).toBeGreaterThanOrEqual(end);
    expect(sizeBytes).toBe(packedBytes(format, outFeatures, inFeatures));
    end = offsetBytes + sizeBytes;
  }
  expect(end).toBeLessThanOrEqual(size);
});

test('writes the weights that the source holds', async () => {
  const { model, prepare } = await setting();
  const { packedPath, tensors } = await prepare();
  const packed = await readFile(packedPath);
  const source = await readFile(model.sourcePaths[0]!);
  for (const [i, { offsetBytes, sizeBytes, outFeatures, inFeatures, format }] of tensors.entries()) {
    const { sourceOffsetBytes } = model.tensors[i]!;
    const value = (n: number, k: number) => source.readFloatLE(sourceOffsetBytes + 4 * (n * inFeatures + k));
    if (format === 'vector') {
      for (let k = 0; k < inFeatures; k++) expect(packed.readFloatLE(offsetBytes + 4 * k)).toBe(value(0, k));
      continue;
    }
    // f32 tiles of 16 output features: element [k][n % 16] of tile n / 16.
    const at = (n: number, k: number) =>
      offsetBytes + 4 * (Math.floor(n / 16) * 16 * inFeatures + k * 16 + (n % 16));
    for (let n = 0; n < outFeatures; n++)
      expect(packed.readFloatLE(at(n, n % inFeatures))).toBe(value(n, n % inFeatures));
    expect(sizeBytes).toBe(4 * outFeatures * inFeatures);
  }
});

test('tells how far it is, up to the end', async () => {
  const { model, prepare } = await setting();
  const seen: [number, string][] = [];
  await prepare({ onProgress: (fraction, name) => seen.push([fraction, name]) });
  expect(seen.map(([, name]) => name).sort()).toEqual(model.tensors.map(({ name }) => name).sort());
  expect(seen.map(([fraction]) => fraction)).toEqual(
    seen.map(([fraction]) => fraction).sort((a, b) => a - b),
  );
  expect(seen.at(-1)![0]).toBe(1);
});

test('finds its file again, with the same dimensions and places', async () => {
  const { prepare, cacheFolder } = await setting('int8');
  const first = await prepare();
  const { mtimeNs } = await stat(first.packedPath, { bigint: true });
  const second = await prepare();
  expect(second).toEqual({ ...first, isReused: true });
  expect((await stat(first.packedPath, { bigint: true })).mtimeNs).toBe(mtimeNs);
  expect(await packedFiles(cacheFolder)).toHaveLength(1);
});

test('makes another file for another quantisation, and for a source that changed', async () => {
  const { folder, cacheFolder, prepare, model } = await setting();
  const paths = [(await prepare()).packedPath];
  const remake = async (quantization: Quantization) =>
    prepareModel(await readBaseModel(folder, quantization), { cacheFolder });
  paths.push((await remake('int8')).packedPath);
  await utimes(model.sourcePaths[0]!, new Date(), new Date(Date.now() + 1000));
  paths.push((await remake('keep')).packedPath);
  expect(new Set(paths).size).toBe(3);
});

describe('a damaged file is made again', () => {
  const flip = async (path: string, position: number) => {
    const file = await open(path, 'r+');
    const byte = Buffer.alloc(1);
    await file.read(byte, 0, 1, position);
    byte[0]! ^= 1;
    await file.write(byte, 0, 1, position);
    await file.close();
  };
  const damages: [string, (path: string, prepared: PreparedModel) => Promise<void>][] = [
    ['emptied', (path) => truncate(path, 0)],
    ['cut in the preamble', (path) => truncate(path, 10)],
    ['cut in the header', (path) => truncate(path, 500)],
    ['cut in the data', async (path) => truncate(path, (await stat(path)).size - 4096)],
    ['grown', async (path) => truncate(path, (await stat(path)).size + 1)],
    ['with another magic', (path) => flip(path, 0)],
    ['of another format version', (path) => flip(path, 8)],
    ['with another header length', (path) => flip(path, 14)],
    ['with a flipped bit in the header', (path) => flip(path, 100)],
    ['with a flipped bit in the first tensor', (path, { tensors }) => flip(path, tensors[0]!.offsetBytes)],
    ['with a flipped bit at the very end', async (path) => flip(path, (await stat(path)).size - 1)],
  ];
  test.each(damages)('%s', async (_name, damage) => {
    const { prepare } = await setting();
    const first = await prepare();
    const whole = await readFile(first.packedPath);
    await damage(first.packedPath, first);
    expect(await prepare()).toEqual({ ...first, isReused: false });
    expect((await readFile(first.packedPath)).equals(whole)).toBe(true);
  });

  test('but not read through when that is not asked for', async () => {
    const { prepare } = await setting();
    const { packedPath } = await prepare();
    await flip(packedPath, (await stat(packedPath)).size - 1);
    expect((await prepare({ verifyData: false })).isReused).toBe(true);
  });
});

describe('temporary files', () => {
  const name = (host: string, pid: number) => `.0123456789abcdef.${host}.${pid}.00112233aabb.tmp`;
  const here = encodeURIComponent(hostname());

  test('of dead processes, and of one that had our id, are removed', async () => {
    const { cacheFolder, prepare } = await setting();
    await prepare();
    const child = spawn(process.execPath, ['-e', '0']);
    await once(child, 'exit');
    for (const pid of [child.pid!, process.pid])
      await writeFile(join(cacheFolder, 'packed', name(here, pid)), '');
    await prepare();
    expect(await packedFiles(cacheFolder)).toHaveLength(1);
  });

  test('of living processes and other hosts stay, until they are a day old', async () => {
    const { cacheFolder, prepare } = await setting();
    await prepare();
    const kept = [name(here, process.ppid), name('elsewhere.example', 1)];
    for (const file of kept) await writeFile(join(cacheFolder, 'packed', file), '');
    await prepare();
    expect(await packedFiles(cacheFolder)).toEqual(expect.arrayContaining(kept));

    const yesterday = new Date(Date.now() - 25 * 3600 * 1000);
    for (const file of kept) await utimes(join(cacheFolder, 'packed', file), yesterday, yesterday);
    await prepare();
    expect(await packedFiles(cacheFolder)).toHaveLength(1);
  });

  test('are gone after a failure', async () => {
    const { model, cacheFolder, prepare } = await setting();
    await unlink(model.sourcePaths[0]!);
    await expect(prepare()).rejects.toMatchObject({ code: 'io_failed' });
    expect(await packedFiles(cacheFolder)).toEqual([]);
  });
});

describe('fails with what was wrong', () => {
  test('weights that are not finite, by tensor', async () => {
    const values = new Float32Array(32 * 32).fill(0.5);
    values[70] = Number.NaN;
    const folder = await modelFolder(64, {
      [inLayer('self_attn.q_proj')]: { dtype: 'F32', shape: [32, 32], bytes: new Uint8Array(values.buffer) },
    });
    const { prepare, cacheFolder } = await setting('int8', folder);
    await expect(prepare()).rejects.toMatchObject({
      code: 'model_invalid',
      message: expect.stringMatching(/tensor 'model.layers.0.self_attn.q_proj.weight': .*row 2.*finite/),
    });
    expect(await packedFiles(cacheFolder)).toEqual([]);
  });

  test('a source that went away, by path', async () => {
    const { model, prepare } = await setting();
    await unlink(model.sourcePaths[0]!);
    await expect(prepare()).rejects.toMatchObject({
      code: 'io_failed',
      message: expect.stringContaining(model.sourcePaths[0]!),
    });
  });

  test('a source that was cut after its header was read', async () => {
    const { model, prepare } = await setting();
    await truncate(model.sourcePaths[0]!, 2000);
    await expect(prepare()).rejects.toMatchObject({
      name: 'InputError',
      message: expect.stringContaining(model.sourcePaths[0]!),
    });
  });

  test('a cache folder that is a file', async () => {
    const { model } = await setting();
    const file = join(await temporaryFolder(), 'file');
    await writeFile(file, '');
    await expect(prepareModel(model, { cacheFolder: file })).rejects.toMatchObject({
      code: 'io_failed',
      message: expect.stringContaining(file),
    });
  });
});

describe('several processes', () => {
  const child = (folder: string, cacheFolder: string): ChildProcess =>
    spawn(
      process.execPath,
      [join(import.meta.dirname, '../../fixtures/prepare-child.ts'), folder, cacheFolder, 'int4'],
      {
        stdio: ['ignore', 'pipe', 'inherit'],
      },
    );
  /** Its first line is out: the model is read and preparing begins. */
  const begun = (process: ChildProcess) => once(process.stdout!, 'data');

  test('killed at any moment leave nothing that a later start would take for whole', {
    timeout: 300_000,
  }, async () => {
    const folder = await modelFolder(200_000);
    const { prepare, cacheFolder } = await setting('int4', folder);
    const expected = await prepareModel(await readBaseModel(folder, 'int4'), {
      cacheFolder: await temporaryFolder(),
    });
    const random = seededRandom(11);

    // How long one takes, to spread the kills over it.
    const timed = child(folder, await temporaryFolder());
    await begun(timed);
    const begin = performance.now();
    await once(timed, 'exit');
    let durationMs = performance.now() - begin;

    let numKilled = 0;
    for (let round = 0; numKilled < 15 && round < 100; round++) {
      const process = child(folder, cacheFolder);
      await begun(process);
      await sleep((random.below(1000) / 1000) * durationMs);
      process.kill('SIGKILL');
      const [, signal] =
        process.exitCode === null && process.signalCode === null
          ? await once(process, 'exit')
          : [0, process.signalCode];
      if (signal === 'SIGKILL') numKilled++;
      // The timed one had a slow moment of the machine.
      else durationMs *= 0.9;
      const files = (await packedFiles(cacheFolder)).filter((file) => file.endsWith('.motet'));
      // What stands under its name is whole. It is taken away so that the next round works again.
      for (const file of files) {
        const bytes = await readFile(join(cacheFolder, 'packed', file));
        expect(bytes.equals(await readFile(expected.packedPath)), `round ${round}`).toBe(true);
        await unlink(join(cacheFolder, 'packed', file));
      }
    }
    expect(numKilled).toBe(15);
    expect(await prepare()).toMatchObject({ isReused: false, dataSha256: expected.dataSha256 });
    expect(await packedFiles(cacheFolder)).toHaveLength(1);
  });

  test('that prepare at once end with one file, the same for all', { timeout: 60_000 }, async () => {
    const folder = await modelFolder(50_000);
    const { cacheFolder, prepare } = await setting('int4', folder);
    const processes = [child(folder, cacheFolder), child(folder, cacheFolder), child(folder, cacheFolder)];
    const exits = await Promise.all(processes.map((process) => once(process, 'exit')));
    expect(exits.map(([code]) => code)).toEqual([0, 0, 0]);
    expect(await packedFiles(cacheFolder)).toHaveLength(1);
    expect((await prepare()).isReused).toBe(true);
  });

  test('do not replace a file that another may have mapped by now', async () => {
    const { prepare, cacheFolder } = await setting();
    const results = await Promise.all([prepare(), prepare(), prepare()]);
    const inodes = await Promise.all(results.map(async ({ packedPath }) => (await stat(packedPath)).ino));
    expect(new Set(inodes).size).toBe(1);
    expect(await packedFiles(cacheFolder)).toHaveLength(1);
  });
});
