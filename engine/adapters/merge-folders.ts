/**
 * Merges PEFT folders into a new one, which is an adapter like any other: it is loaded, cached and shared by its own digest.
 * A module has the rank that it has in all members; where one of them lacks it, the others make it alone. Weights and scalings are in the
 * tensors, each half of them (as a square root) in A and in B, the sign in A; so the new scaling is 1.
 */
import { existsSync } from 'node:fs';
import { type FileHandle, mkdir, open, rename, rm, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { EngineError } from '../errors.ts';
import type { SafetensorsTensor } from '../model/safetensors.ts';
import type { MergeRule } from '../protocol.ts';
import { type AdapterPart, digestOfFolder, elementType, readAdapterParts } from './adapter-file.ts';
import { mergeTensors, type TaskTensor } from './merge.ts';

export interface MergeMember {
  folder: string;
  weight: number;
  /** What it must be, and what it is called when something is wrong with it; absent: whatever it is, and its folder. */
  digest?: string;
}

export interface MadeAdapter {
  digest: string;
  sizeBytes: number;
}

interface Member {
  name: string;
  weight: number;
  digest: string;
  file: FileHandle;
  parts: Map<string, AdapterPart>;
}

/** A module of the new adapter: what each of its members has of it. */
interface Merged {
  moduleName: string;
  rank: number;
  from: { member: Member; part: AdapterPart }[];
}

type Side = 'a' | 'b';

/**
 * @param out is made, whole or not at all; must not be there
 * @param maxBytes of the tensors
 * @throws EngineError adapter_invalid when they cannot be merged, adapter_digest_mismatch; Error when `out` is there, and what
 *         reading and writing throws
 */
export async function mergeFolders(
  given: readonly MergeMember[],
  rule: MergeRule,
  out: string,
  maxBytes = Number.POSITIVE_INFINITY,
): Promise<MadeAdapter> {
  if (existsSync(out)) throw new Error(`${out}: expected a folder that is not there yet`);
  const members: Member[] = [];
  try {
    for (const one of given) members.push(await openMember(one));
    const modules = modulesOf(members);
    const sizeBytes = modules.reduce((sum, module) => sum + sizeOf(module, 'a') + sizeOf(module, 'b'), 0);
    if (sizeBytes > maxBytes) {
      const message = `the merge: expected at most ${maxBytes} bytes, got adapters that make ${sizeBytes}`;
      throw new EngineError('adapter_invalid', message);
    }
    return { digest: await writeWhole(out, modules, rule), sizeBytes };
  } finally {
    await Promise.all(members.map(({ file }) => file.close()));
  }
}

async function writeWhole(out: string, modules: readonly Merged[], rule: MergeRule): Promise<string> {
  const made = `${out}.part-${process.pid}`;
  try {
    await mkdir(made);
    await writeWeights(join(made, 'adapter_model.safetensors'), modules, rule);
    await writeFile(join(made, 'adapter_config.json'), `${JSON.stringify(configOf(modules), null, 2)}\n`);
    const digest = await digestOfFolder(made);
    await rename(made, out);
    return digest;
  } catch (error) {
    await rm(made, { recursive: true, force: true });
    throw error;
  }
}

async function openMember({ folder, weight, digest: expected }: MergeMember): Promise<Member> {
  const parts = new Map((await readAdapterParts(folder)).map((part) => [part.moduleName, part]));
  const digest = await digestOfFolder(folder);
  if (expected !== undefined && digest !== expected) {
    const message = `an adapter to merge: expected digest ${expected}, got ${digest}`;
    throw new EngineError('adapter_digest_mismatch', message);
  }
  const file = await open(join(folder, 'adapter_model.safetensors'));
  return { name: expected ?? folder, weight, digest, file, parts };
}

function sizeOf({ from }: Merged, side: Side): number {
  return 4 * from[0]!.part[side].shape.reduce((a, b) => a * b, 1);
}

function modulesOf(members: readonly Member[]): Merged[] {
  const names = new Set(members.flatMap(({ parts }) => [...parts.keys()]));
  return [...names].sort().map((moduleName) => {
    const from = members.flatMap((member) => {
      const part = member.parts.get(moduleName);
      return part === undefined ? [] : [{ member, part }];
    });
    const [first, ...others] = from;
    for (const other of others) {
      for (const side of ['a', 'b'] as const) {
        const [expected, got] = [first!, other].map(({ part }) => part[side].shape);
        if (String(expected) === String(got)) continue;
        const message =
          `module '${moduleName}': expected lora_${side.toUpperCase()} of shape [${expected}] in ${other.member.name}, ` +
          `as in ${first!.member.name}, got [${got}]; adapters of different ranks or base models are not merged`;
        throw new EngineError('adapter_invalid', message);
      }
    }
    return { moduleName, rank: first!.part.rank, from };
  });
}

/** One module at a time is in memory. */
async function writeWeights(path: string, modules: readonly Merged[], rule: MergeRule): Promise<void> {
  const header: Record<string, { dtype: 'F32'; shape: number[]; data_offsets: [number, number] }> = {};
  let sizeBytes = 0;
  const tensors = modules.flatMap((module) => [
    { module, side: 'a' as const },
    { module, side: 'b' as const },
  ]);
  for (const { module, side } of tensors) {
    const { shape } = module.from[0]!.part[side];
    const end = sizeBytes + sizeOf(module, side);
    header[nameOf(module.moduleName, side)] = { dtype: 'F32', shape, data_offsets: [sizeBytes, end] };
    sizeBytes = end;
  }
  const text = Buffer.from(JSON.stringify(header));
  const padded = Buffer.alloc(Math.ceil(text.length / 8) * 8, ' ');
  text.copy(padded);
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(padded.length));
  const file = await open(path, 'wx');
  try {
    await file.writeFile(Buffer.concat([length, padded]));
    for (const { module, side } of tensors) {
      const merged = mergeTensors(await taskTensors(module, side), rule);
      await file.writeFile(Buffer.from(merged.buffer, merged.byteOffset, merged.byteLength));
    }
  } finally {
    await file.close();
  }
}

function taskTensors({ moduleName, from }: Merged, side: Side): Promise<TaskTensor[]> {
  return Promise.all(
    from.map(async ({ member, part }) => {
      const total = member.weight * part.scaling;
      return {
        values: await readValues(member.file, part[side]),
        weight: Math.sqrt(Math.abs(total)) * (side === 'a' ? Math.sign(total) : 1),
        seed: `${member.digest}\n${nameOf(moduleName, side)}`,
      };
    }),
  );
}

async function readValues(file: FileHandle, tensor: SafetensorsTensor): Promise<Float32Array> {
  const bytes = new Uint8Array(tensor.sizeBytes);
  const { bytesRead } = await file.read(bytes, 0, bytes.length, tensor.offsetBytes);
  if (bytesRead !== bytes.length)
    throw new EngineError(
      'adapter_invalid',
      `tensor '${tensor.name}': expected ${bytes.length} bytes, got ${bytesRead}`,
    );
  const type = elementType(tensor);
  if (type === 'f32') return new Float32Array(bytes.buffer);
  if (type === 'f16') return Float32Array.from(new Float16Array(bytes.buffer));
  // A bf16 is the upper half of an f32.
  return new Float32Array(Uint32Array.from(new Uint16Array(bytes.buffer), (half) => half << 16).buffer);
}

/** What most modules have as rank is the adapter's; the others are named. */
function configOf(modules: readonly Merged[]): object {
  const [{ rank }] = modules as [Merged];
  const others = modules.filter((module) => module.rank !== rank);
  const patterns = Object.fromEntries(
    others.map((module) => [module.moduleName.replaceAll('.', '\\.'), module.rank]),
  );
  return {
    peft_type: 'LORA',
    r: rank,
    lora_alpha: rank,
    target_modules: [...new Set(modules.map(({ moduleName }) => moduleName.split('.').at(-1)!))].sort(),
    ...(others.length > 0 && { rank_pattern: patterns, alpha_pattern: patterns }),
    bias: 'none',
  };
}

function nameOf(moduleName: string, side: Side): string {
  return `base_model.model.${moduleName}.lora_${side.toUpperCase()}.weight`;
}
