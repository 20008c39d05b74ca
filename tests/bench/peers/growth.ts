/** How our own step's cost grows with contexts, batches, ranks and resident adapters: there should be no cliff. */

import type { Panel } from '../plot.ts';
import {
  adapterBytes,
  allLinears,
  type Bench,
  compare,
  contextTokens,
  medianNote,
  openOptions,
  smallAdapter,
} from './bench.ts';
import { type DecodeWork, type MotetSteps, openMotet } from './motet-steps.ts';
import { type AdapterPlan, adapterFolders, modelGguf } from './peer-files.ts';
import { bySetting, type CaseRecord, numRounds, type SettingSeries } from './record.ts';
import { bars, type Table } from './report.ts';
import { type ShapeName, shapes } from './shapes.ts';
import { type Spread, spread } from './spread.ts';

const batches = [1, 2, 4, 8, 16, 32, 64];
const ranks = [4, 8, 16, 32, 64, 128];
const counts = [1, 5, 50, 500, 2000];
const steps = 16;
/** The last one ends with the smallest model's last position. */
const contexts = [128, 512, 1024, 2048, 4096, 8192 - steps];
const rankBatch = 8;
const countBatch = 32;

/** What grows, and how many rows a point's step has. */
const sweeps: Record<string, (label: number) => number> = {
  'context, batch 1': () => 1,
  [`batch, context ${contextTokens}`]: (label) => label,
  [`rank on all linear layers, batch ${rankBatch}`]: () => rankBatch,
  [`resident adapters of rank 8 on q, v, drawn by Zipf, batch ${countBatch}`]: () => countBatch,
};
const [byContext, byBatch, byRank, byCount] = Object.keys(sweeps) as [string, string, string, string];

type Point = [label: number, work: DecodeWork];

export async function measureGrowth(bench: Bench, shape: ShapeName): Promise<CaseRecord> {
  const model = await modelGguf(shape, 'q4_0_all');
  const series: SettingSeries[] = [];
  const sweep = async (motet: MotetSteps, setting: string, points: Point[]) => {
    const contestants = points.map(([label, work]) => ({
      name: `${label}`,
      measure: async () => ({ stepMs: await motet.decodeMs(work) }),
      warmUp: async () => {
        await motet.decodeMs({ ...work, steps: 4 });
      },
    }));
    series.push(...(await compare(bench, `${shape}, growth`, setting, contestants)));
  };

  const longest = Math.max(...contexts);
  const long = await openMotet(
    model,
    { sequences: 1, tokens: longest + steps, adapterBytes: 0, numAdapters: 0 },
    openOptions(bench),
  );
  try {
    await sweep(
      long,
      byContext,
      contexts.map((tokens) => [tokens, { batch: 1, contextTokens: tokens, steps }]),
    );
  } finally {
    long.close();
  }

  const plans = ranks.map((rank): AdapterPlan => ({ rank, targets: allLinears }));
  const room = {
    sequences: Math.max(...batches),
    tokens: contextTokens + steps,
    adapterBytes: Math.max(
      rankBatch * plans.reduce((sum, plan) => sum + adapterBytes(shape, plan), 0),
      Math.max(...counts) * adapterBytes(shape, smallAdapter),
    ),
    numAdapters: Math.max(...counts),
  };
  const wide = await openMotet(model, room, openOptions(bench));
  // The same folder again and again: every load has pages of its own.
  const loadCopies = async (plan: AdapterPlan, count: number): Promise<number[]> => {
    const [folder] = await adapterFolders(shape, plan, 1);
    const handles: number[] = [];
    for (let i = 0; i < count; i++) {
      if (i % 100 === 0) bench.onProgress(`${shape}: load adapter ${i} of ${count}, rank ${plan.rank}`);
      handles.push(await wide.loadAdapter(folder!));
    }
    return handles;
  };
  try {
    await sweep(
      wide,
      byBatch,
      batches.map((batch) => [batch, { batch, contextTokens, steps }]),
    );

    const ofRank: Point[] = [];
    for (const plan of plans) {
      const handles = await loadCopies(plan, rankBatch);
      ofRank.push([plan.rank, { batch: rankBatch, contextTokens, steps, handle: (row) => handles[row]! }]);
    }
    await sweep(wide, byRank, ofRank);
    wide.unloadAll();

    const handles = await loadCopies(smallAdapter, Math.max(...counts));
    const ofCount = counts.map((count): Point => {
      const picks = zipfPicks(count, countBatch * steps);
      // A row keeps its adapter for eight steps, as short answers do.
      const handle = (row: number, step: number) => handles[picks[row + countBatch * (step >> 3)]!]!;
      return [count, { batch: countBatch, contextTokens, steps, handle }];
    });
    await sweep(wide, byCount, ofCount);
  } finally {
    wide.close();
  }
  return { case: 'growth', shape, series, facts: {} };
}

/** `length` draws of 0 to count − 1 where the k-th has weight 1 / k; the same every time. */
export function zipfPicks(count: number, length: number): number[] {
  const sums: number[] = [];
  for (let k = 1; k <= count; k++) sums.push((sums.at(-1) ?? 0) + 1 / k);
  let state = 1;
  return Array.from({ length }, () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    const at = (state / 2 ** 32) * sums.at(-1)!;
    return sums.findIndex((sum) => at < sum);
  });
}

export function showGrowth(record: CaseRecord): Table[] {
  return bySetting(record).map(([setting, series]) => {
    const numRows = sweeps[setting]!;
    const rows = series.map(({ name, figures, failure }): (string | Spread)[] => {
      const times = figures.stepMs;
      if (times === undefined) return [name, `failed: ${failure}`];
      return [name, spread(times), spread(times.map((ms) => (1000 * numRows(Number(name))) / ms))];
    });
    return {
      title: `Cost by ${setting}, ${shapes[record.shape].title}`,
      note: medianNote(numRounds(record)),
      columns: [setting.split(/[ ,]/)[0]!, 'step ms', 'tokens/s'],
      rows,
    };
  });
}

export function plotGrowth(record: CaseRecord): string[] {
  return bySetting(record).flatMap(([setting, series]) => {
    const points = series.flatMap(({ name, figures }) =>
      figures.stepMs ? [{ label: name, value: spread(figures.stepMs).median }] : [],
    );
    return points.length > 0 ? [bars(`step by ${setting}, ${shapes[record.shape].title}`, 'ms', points)] : [];
  });
}

/** For a picture: a line without a step in it is what we want to see. */
export function growthPanels(record: CaseRecord): Panel[] {
  return bySetting(record).flatMap(([setting, series]) => {
    const points = series.flatMap(({ name, figures }) => {
      if (figures.stepMs === undefined) return [];
      const { median, low, high } = spread(figures.stepMs);
      return [{ x: Number(name), y: median, low, high }];
    });
    if (points.length === 0) return [];
    const grows = /^(context|batch|rank|resident adapters)/.exec(setting)![0];
    const rounds = numRounds(record);
    return [
      {
        title: `Decode step by ${setting}`,
        x: { label: grows === 'context' ? 'context, tokens' : grows, scale: 'log' as const },
        // Where cost may grow with the work, proportion is a straight line; adapters that only stay should add nothing.
        y: {
          label: 'ms a step',
          scale: grows === 'resident adapters' ? ('linear' as const) : ('log' as const),
        },
        series: [
          {
            name: `${shapes[record.shape].title}, median of ${rounds} round${rounds === 1 ? '' : 's'}`,
            points,
          },
        ],
      },
    ];
  });
}
