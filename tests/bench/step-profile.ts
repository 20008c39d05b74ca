/**
 * Where does the time of a step go, and how far from the roof is each part? Decode at batch 1, 8 and 32, and a prompt.
 *
 *   node tests/bench/step-profile.ts [SHAPE]     smollm2 (default), qwen05b, llama1b
 *
 * For each part: milliseconds of a step, share of it, and for a projection the weights it reads and the products it makes
 * against what the machine can do, measured in the same rounds. Median of the rounds.
 */
import { cpuInfo, type PackedTensor, type StepPart } from '../../native/index.ts';
import { openMotet } from './peers/motet-steps.ts';
import { modelGguf } from './peers/peer-files.ts';
import { markdown, percent } from './peers/report.ts';
import { measureRoof, type Roof } from './peers/roofs.ts';
import { type ShapeName, shapes } from './peers/shapes.ts';
import { spread } from './peers/spread.ts';

const numRounds = 7;
const contextTokens = 128;
const promptTokens = 512;
const decodeSteps = 16;
const batches = [1, 8, 32];

const rolesOf: Partial<Record<StepPart, string[]>> = {
  qkv: ['q_proj', 'k_proj', 'v_proj'],
  out: ['o_proj'],
  gate_up: ['gate_proj', 'up_proj'],
  down: ['down_proj'],
  // The head is the embedding where the file has none of its own.
  head: ['lm_head', 'embedding'],
};
/** What the last layer has to do for all rows; the rest of it for those that sample. */
const rolesOfAllRows = ['k_proj', 'v_proj'];

interface Work {
  title: string;
  /** Rows of the layers' projections, and of the head. */
  rows: number;
  samples: number;
  /** Steps of one run. */
  numSteps: number;
  /** Milliseconds of one step. */
  run(): Promise<number>;
}

interface Profile {
  stepMs: number;
  /** Milliseconds of one step. */
  parts: Record<StepPart, number>;
}

const name = (process.argv[2] ?? 'smollm2') as ShapeName;
if (!(name in shapes)) {
  console.error(`step-profile: expected one of ${Object.keys(shapes).join(', ')}, got ${name}`);
  process.exit(2);
}
const path = await modelGguf(name, name === 'smollm2' ? 'real' : 'q4_0_all');
const room = { sequences: Math.max(...batches), tokens: promptTokens, adapterBytes: 0, numAdapters: 0 };
const motet = await openMotet(path, room, {});
try {
  const { runtime, model } = motet;
  const works: Work[] = [
    ...batches.map((batch) => ({
      title: `Decode, batch ${batch}`,
      rows: batch,
      samples: batch,
      numSteps: decodeSteps,
      run: () => motet.decodeMs({ batch, contextTokens, steps: decodeSteps }),
    })),
    {
      title: `A prompt of ${promptTokens}`,
      rows: promptTokens,
      samples: 1,
      numSteps: 1,
      run: () => motet.prefillMs(promptTokens),
    },
  ];
  const found = works.map((): Profile[] => []);
  const roofs: Roof[] = [];
  // Also fills the contexts, so that nothing but the steps is counted afterwards.
  for (const { run } of works) await run();
  for (let round = 0; round < numRounds; round++) {
    process.stderr.write(`round ${round + 1} of ${numRounds}\n`);
    roofs.push(await measureRoof(runtime.weightBytes, runtime.numThreads));
    for (const [i, work] of works.entries()) found[i]!.push(await profile(work));
  }
  const roof = medianRoof(roofs);
  console.log(
    `${shapes[name].title}, ${(runtime.weightBytes / 1e6).toFixed(0)} MB of weights, ${cpuInfo().isa}, ${runtime.numThreads} threads; ` +
      `read ${roof.gigabytesPerSecond.toFixed(1)} GB/s, vpdpbusd ${roof.vnniGops.toFixed(0)} GOP/s` +
      `${roof.amxGops > 0 ? `, AMX ${roof.amxGops.toFixed(0)} GOP/s` : ''}; medians of ${numRounds} rounds\n`,
  );
  for (const [i, work] of works.entries()) console.log(tableOf(work, found[i]!, model.tensors, roof));
} finally {
  motet.close();
}

async function profile({ numSteps, run }: Work): Promise<Profile> {
  const before = motet.runtime.stepParts();
  const stepMs = await run();
  const parts = motet.runtime.stepParts();
  for (const part of Object.keys(parts) as StepPart[]) parts[part] = (parts[part] - before[part]) / numSteps;
  return { stepMs, parts };
}

function medianRoof(roofs: readonly Roof[]): Roof {
  const median = (key: keyof Roof) => spread(roofs.map((roof) => roof[key])).median;
  return {
    gigabytesPerSecond: median('gigabytesPerSecond'),
    vnniGops: median('vnniGops'),
    amxGops: median('amxGops'),
  };
}

/** A row for each part, the longest first, and one for what lies between the parts and the steps. */
function tableOf(
  { title, rows, samples }: Work,
  profiles: readonly Profile[],
  tensors: readonly PackedTensor[],
  roof: Roof,
): string {
  const step = spread(profiles.map(({ stepMs }) => stepMs));
  const parts = (Object.keys(profiles[0]!.parts) as StepPart[])
    .map((part) => ({ part, ms: spread(profiles.map(({ parts }) => parts[part])).median }))
    .sort((a, b) => b.ms - a.ms);
  const rest = step.median - parts.reduce((sum, { ms }) => sum + ms, 0);
  const lastLayer = Math.max(...tensors.map(({ layer }) => layer));
  const line = (what: string, ms: number, reading = '', products = '') => [
    what,
    ms.toFixed(3),
    percent(ms / step.median),
    reading,
    products,
  ];
  return markdown({
    title,
    note: `A step takes ${step.median.toFixed(2)} ms (${step.low.toFixed(2)}–${step.high.toFixed(2)}).`,
    columns: ['part', 'ms', 'share', 'weights read, of the roof', 'int8 products, of vpdpbusd'],
    rows: [
      ...parts.map(({ part, ms }) => {
        const weights = tensors.filter(({ role }) => (rolesOf[part] ?? []).includes(role));
        if (weights.length === 0) return line(part, ms);
        const bytes = weights.reduce((sum, { sizeBytes }) => sum + sizeBytes, 0);
        const products = weights.reduce((sum, { role, layer, outFeatures, inFeatures }) => {
          const sampledOnly = part === 'head' || (layer === lastLayer && !rolesOfAllRows.includes(role));
          return sum + outFeatures * inFeatures * (sampledOnly ? samples : rows);
        }, 0);
        const gigabytes = bytes / ms / 1e6;
        const gops = (2 * products) / ms / 1e6;
        return line(
          part,
          ms,
          `${gigabytes.toFixed(1)} GB/s, ${percent(gigabytes / roof.gigabytesPerSecond)}`,
          `${gops.toFixed(0)} GOP/s${roof.vnniGops > 0 ? `, ${percent(gops / roof.vnniGops)}` : ''}`,
        );
      }),
      line('between', Math.max(0, rest)),
    ],
  });
}
