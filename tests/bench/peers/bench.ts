/** What every case needs: the choices of the command line, and ways to tell what goes on. */
import type { OpenOptions } from '../../fixtures/models.ts';
import { findLlamaCpp, type LlamaCpp } from './llama-cpp.ts';
import type { AdapterPlan, FileKind } from './peer-files.ts';
import type { CaseRecord, SettingSeries } from './record.ts';
import { type Contestant, type RoundOptions, runRounds } from './rounds.ts';
import { adapterElements, type Linear, linears, type ShapeName, shapes } from './shapes.ts';

export const peerNames = ['motet', 'llama.cpp', 'vllm', 'transformers'] as const;
export type PeerName = (typeof peerNames)[number];

export interface Bench {
  rounds: Omit<RoundOptions, 'onProgress'>;
  threads: number;
  cpus: number[];
  /** How we keep adapters and KV. */
  formats: Required<Pick<OpenOptions, 'adapterQuantization' | 'kvType'>>;
  peers: ReadonlySet<PeerName>;
  /** Files for llama.cpp's bench programs. */
  kinds: FileKind[];
  /** Of decode and tax. */
  batches: number[];
  clients: number[];
  onProgress: (text: string) => void;
  /** A peer that is left out, and why; told once. */
  skip: (peer: string, reason: string) => void;
}

/** In names of contestants: ours, and what the machine can do at most. */
export const ours = 'motet';
export const roofName = 'roof';

export const contextTokens = 128;

export const allLinears: readonly Linear[] = [
  ...(['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj'] as const),
];
export const smallAdapter: AdapterPlan = { rank: 8, targets: ['q_proj', 'v_proj'] };
export const largeAdapter: AdapterPlan = { rank: 16, targets: allLinears };

/** In bf16, as the files have them. */
export const adapterBytes = (shape: ShapeName, plan: AdapterPlan) =>
  2 * adapterElements(shapes[shape], plan.rank, plan.targets);

export const openOptions = ({ threads, formats }: Bench): OpenOptions => ({
  numThreads: threads,
  ...formats,
});

/** Our contestant's name on a file of that kind; what is not the default is part of it. */
export function ourName(kind: FileKind, { adapterQuantization, kvType }: Bench['formats']): string {
  const adapters = adapterQuantization === 'keep' ? '' : `, ${adapterQuantization} adapters`;
  return `${ours} ${kind}${adapters}${kvType === 'auto' ? '' : `, ${kvType} KV`}`;
}

/** Of one position's keys and values in f16. */
export function kvBytes(name: ShapeName): number {
  const { numLayers, numKvHeads, headDim } = shapes[name];
  return numLayers * numKvHeads * headDim * 2 * 2;
}

/** Of the layers' matrices, and of the head where each row is sampled. */
export function linearElements(name: ShapeName, withHead: boolean): number {
  const shape = shapes[name];
  const perLayer = Object.values(linears(shape)).reduce((sum, { size }) => sum + size[0] * size[1], 0);
  return shape.numLayers * perLayer + (withHead ? shape.vocabSize * shape.hiddenSize : 0);
}

export function llamaBuilds(bench: Bench): LlamaCpp[] {
  if (!bench.peers.has('llama.cpp')) return [];
  const found = findLlamaCpp(bench.cpus);
  if (Array.isArray(found)) return found;
  bench.skip('llama.cpp', found.missing);
  return [];
}

/** The rounds of one setting. */
export async function compare(
  bench: Bench,
  title: string,
  setting: string,
  contestants: Contestant[],
): Promise<SettingSeries[]> {
  const onProgress = (text: string) => bench.onProgress(`${title}, ${setting}: ${text}`);
  const series = await runRounds(contestants, { ...bench.rounds, onProgress });
  return series.map((one) => ({ setting, ...one }));
}

/** Says of what a table's figures are medians. */
export const medianNote = (rounds: number) =>
  `Median (lowest–highest) of ${rounds} rounds, all contestants in turn; "others" is the largest share of the machine that ` +
  'other processes took during a sample that counts.';

/** A record's facts whose names begin with `prefix`, as `name 12 MB`. */
export function megabytes({ facts }: CaseRecord, prefix: string): string {
  const named = Object.entries(facts).filter(([name]) => name.startsWith(prefix));
  return named
    .map(([name, bytes]) => `${name.slice(prefix.length)} ${(bytes / 1e6).toFixed(0)} MB`)
    .join(', ');
}
