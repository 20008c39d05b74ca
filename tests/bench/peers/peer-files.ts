/** Where setup.sh puts the peers, and where the models and adapters that they share are made: all in the cache. */
import { existsSync, readFileSync } from 'node:fs';
import { mkdir } from 'node:fs/promises';
import { join } from 'node:path';
import { cacheFolder, smollm2Path } from '../../fixtures/models.ts';
import { writeRandomAdapter } from '../random-adapter.ts';
import { writeAdapterGguf, writeRandomFolder, writeRandomGguf } from './random-model.ts';
import { type Linear, type Quantization, type ShapeName, shapes } from './shapes.ts';

export const peersFolder = join(cacheFolder, 'peers');

/** Of versions.env. */
export const versions = Object.fromEntries(
  readFileSync(join(import.meta.dirname, 'versions.env'), 'utf8')
    .split('\n')
    .filter((line) => /^\w+=/.test(line))
    .map((line) => line.split('=') as [string, string]),
) as Record<
  'llama_version' | 'vllm_version' | 'torch_version' | 'transformers_version' | 'peft_version',
  string
>;

export const llamaFolder = join(peersFolder, `llama.cpp-${versions.llama_version}`);
export const pythonFolder = join(peersFolder, `python-torch-${versions.torch_version}`);

/** Raise it when random-model.ts writes other bytes. */
const modelsVersion = 1;
const modelsFolder = join(peersFolder, `models-${modelsVersion}`);

/** The real file, q4_1, beside random ones of the same shape. */
export type FileKind = Quantization | 'real';

export async function modelGguf(name: ShapeName, kind: FileKind): Promise<string> {
  if (kind === 'real') {
    if (name !== 'smollm2') throw new RangeError(`shape: expected smollm2 for a real file, got ${name}`);
    return smollm2Path;
  }
  const path = join(modelsFolder, `${name}-${kind}.gguf`);
  if (!existsSync(path)) {
    await mkdir(modelsFolder, { recursive: true });
    await writeRandomGguf(path, shapes[name], kind);
  }
  return path;
}

export async function modelFolder(name: ShapeName): Promise<string> {
  const folder = join(modelsFolder, `${name}-bf16`);
  if (!existsSync(join(folder, 'model.safetensors'))) await writeRandomFolder(folder, shapes[name]);
  return folder;
}

export interface AdapterPlan {
  rank: number;
  targets: readonly Linear[];
}

/** PEFT folders with random weights. */
export async function adapterFolders(name: ShapeName, plan: AdapterPlan, count: number): Promise<string[]> {
  const shape = shapes[name];
  const label = plan.targets.length === 7 ? 'all' : plan.targets.join('-');
  const folders = Array.from({ length: count }, (_, i) =>
    join(modelsFolder, `${name}-lora-${plan.rank}-${label}`, `a${String(i).padStart(4, '0')}`),
  );
  for (const [index, folder] of folders.entries()) {
    // The config is written last.
    if (!existsSync(join(folder, 'adapter_config.json')))
      await writeRandomAdapter(folder, shape, plan.rank, [...plan.targets], index);
  }
  return folders;
}

/** The same adapters as GGUF files. */
export async function adapterGgufs(name: ShapeName, plan: AdapterPlan, count: number): Promise<string[]> {
  const paths: string[] = [];
  for (const folder of await adapterFolders(name, plan, count)) {
    const path = `${folder}.gguf`;
    if (!existsSync(path)) await writeAdapterGguf(folder, path, shapes[name]);
    paths.push(path);
  }
  return paths;
}
