import { spawnSync } from 'node:child_process';
import { mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { expect, onTestFinished, test } from 'vitest';
import { readAdapterFile } from '../../engine/adapters/adapter-file.ts';
import { readSafetensors } from '../../engine/model/safetensors.ts';
import type { ModelDims } from '../../native/index.ts';
import { f32Tensor, safetensorsBytes, writeFolder } from '../fixtures/source-files.ts';

const script = join(import.meta.dirname, '../../scripts/merge.ts');
const dims = {
  ...{
    numLayers: 2,
    hiddenSize: 32,
    intermediateSize: 64,
    numHeads: 2,
    numKvHeads: 1,
    headDim: 16,
    vocabSize: 100,
  },
} as ModelDims;
const qProj = 'base_model.model.model.layers.0.self_attn.q_proj';
const vProj = 'base_model.model.model.layers.1.self_attn.v_proj';

/** Of rank 4 and scaling 2, on q_proj of layer 0 and perhaps v_proj of layer 1. */
function adapter(seed: number, { rank = 4, hasV = false, more = {} } = {}): Promise<string> {
  return writeFolder({
    'adapter_config.json': {
      ...{ peft_type: 'LORA', r: rank, lora_alpha: 2 * rank, bias: 'none', ...more },
      target_modules: hasV ? ['q_proj', 'v_proj'] : ['q_proj'],
    },
    'adapter_model.safetensors': safetensorsBytes({
      [`${qProj}.lora_A.weight`]: f32Tensor([rank, 32], seed),
      [`${qProj}.lora_B.weight`]: f32Tensor([32, rank], seed + 1),
      ...(hasV && {
        [`${vProj}.lora_A.weight`]: f32Tensor([rank, 32], seed + 2),
        [`${vProj}.lora_B.weight`]: f32Tensor([16, rank], seed + 3),
      }),
    }),
  });
}

function newFolder(): string {
  const folder = mkdtempSync(join(tmpdir(), 'motet-merge-'));
  onTestFinished(() => rmSync(folder, { recursive: true }));
  return join(folder, 'merged');
}

const run = (...args: string[]) => spawnSync(process.execPath, [script, ...args], { encoding: 'utf8' });

async function valuesOf(folder: string, name: string): Promise<Float32Array> {
  const path = join(folder, 'adapter_model.safetensors');
  const { offsetBytes, sizeBytes } = (await readSafetensors(path)).tensors.get(name)!;
  return new Float32Array(
    new Uint8Array(readFileSync(path)).slice(offsetBytes, offsetBytes + sizeBytes).buffer,
  );
}

test('makes an adapter that engines read, the same each time, and prints its digest', async () => {
  const members = [`${await adapter(1)}=0.7`, `${await adapter(11, { hasV: true })}=-0.3`];
  const [first, second] = [newFolder(), newFolder()];
  const words = ['--method', 'dare_ties', '--density', '0.5', ...members];
  const made = run(...words, '--out', first);
  expect(made.stderr).toBe('');
  const file = await readAdapterFile(first, dims, { maxRank: 64 });
  expect(made.stdout).toBe(`${file.digest}\n`);
  expect(file).toMatchObject({ kind: 'lora', rank: 4, targets: ['q_proj', 'v_proj'] });
  expect(file.modules.map(({ scaling }) => scaling)).toEqual([1, 1]);
  expect(readdirSync(join(first, '..'))).toEqual(['merged']);
  expect(run(...words, '--out', second).stdout).toBe(made.stdout);
  const other = run(...words.with(3, '0.6'), '--out', newFolder());
  expect(other.stdout).toMatch(/^sha256:/);
  expect(other.stdout).not.toBe(made.stdout);
});

test('weight and scaling are in A and B as their roots, the sign in A', async () => {
  const [a, b] = [await adapter(1), await adapter(11, { hasV: true })];
  const out = newFolder();
  expect(run('--method', 'dare_linear', '--density', '1', '--out', out, `${a}=0.5`, `${b}=-2`).status).toBe(
    0,
  );
  // Weight times the scaling of 2: 1 and -4.
  for (const [side, [ofA, ofB]] of [
    ['A', [1, -2]],
    ['B', [1, 2]],
  ] as const) {
    const name = `${qProj}.lora_${side}.weight`;
    const [left, right, merged] = await Promise.all([a, b, out].map((folder) => valuesOf(folder, name)));
    expect(merged).toEqual(left!.map((value, i) => ofA * value + ofB * right![i]!));
  }
  const alone = `${vProj}.lora_A.weight`;
  expect(await valuesOf(out, alone)).toEqual((await valuesOf(b, alone)).map((value) => -2 * value));
});

test.for([
  [
    ['--out', 'x', 'a=1', 'b=1'],
    '--method: expected one of ties, dare_ties, dare_linear, magnitude_prune, got none',
  ],
  [['--method', 'ties', 'a=1', 'b=1'], '--out: expected the folder to make'],
  [['--method', 'ties', '--out', 'x', 'a=1'], 'expected 2 to 8 adapters'],
  [['--method', 'ties', '--out', 'x', 'a=1', 'b=0'], 'b=0: expected FOLDER=WEIGHT'],
  [
    ['--method', 'ties', '--out', 'x', '--density', '0', 'a=1', 'b=1'],
    '--density: expected a number above 0',
  ],
  [
    ['--method', 'ties', '--out', 'x', '--majority-sign', 'most', 'a=1', 'b=1'],
    '--majority-sign: expected one of',
  ],
  [
    ['--method', 'ties', '--out', 'x', '/none=1', 'b=1'],
    '/none/adapter_config.json: expected a readable file',
  ],
] as const)('refuses %j', ([args, message]) => {
  const { status, stderr, stdout } = run(...args);
  expect({ status, stdout }).toEqual({ status: 2, stdout: '' });
  expect(stderr).toContain(`merge: ${message}`);
});

test('refuses adapters of different ranks, and what is more than LoRA, by name; nothing is left behind', async () => {
  const out = newFolder();
  const a = await adapter(1);
  const merged = (other: string) => run('--method', 'ties', '--out', out, `${a}=1`, `${other}=1`).stderr;
  expect(merged(await adapter(2, { rank: 8 }))).toContain(
    "module 'model.layers.0.self_attn.q_proj': expected lora_A of shape [4,32]",
  );
  expect(merged(await adapter(2, { more: { use_dora: true } }))).toContain(
    'use_dora: expected false, got true',
  );
  expect(merged(await adapter(2, { more: { lora_bias: true } }))).toContain(
    'lora_bias: expected false, got true',
  );
  expect(run('--method', 'ties', '--out', out, `${a}=1`, `${a}=1`).status).toBe(0);
  expect(merged(a)).toContain('expected a folder that is not there yet');
});
