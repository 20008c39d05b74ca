/** What adapters add to our own decode step when every row has another one, against the time that reading their bytes takes. */
import { basename } from 'node:path';
import {
  adapterBytes,
  type Bench,
  compare,
  contextTokens,
  largeAdapter,
  medianNote,
  openOptions,
  roofName,
  smallAdapter,
} from './bench.ts';
import { openMotet } from './motet-steps.ts';
import { type AdapterPlan, adapterFolders, modelGguf } from './peer-files.ts';
import { bySetting, type CaseRecord, figuresOf, numRounds, type SettingSeries } from './record.ts';
import { showPercent, type Table } from './report.ts';
import { readGigabytesPerSecond } from './roofs.ts';
import type { Contestant } from './rounds.ts';
import { type ShapeName, shapes } from './shapes.ts';
import { ratios, type Spread, shortNumber, spread } from './spread.ts';

const voices = { 'rank 8 on q, v': smallAdapter, 'rank 16 on all linear': largeAdapter };
const silent = 'no adapter';
const half = 'rank 16 on all linear, every second row';
const decodeSteps = 64;
const loadFact = 'load ms of ';
const bytesFact = 'bytes of an adapter element';

export async function measureTax(bench: Bench, shape: ShapeName): Promise<CaseRecord> {
  const most = Math.max(...bench.batches);
  const room = {
    sequences: most,
    tokens: contextTokens + decodeSteps,
    adapterBytes: most * Object.values(voices).reduce((sum, plan) => sum + adapterBytes(shape, plan), 0),
    numAdapters: most * Object.keys(voices).length,
  };
  const steps = await openMotet(await modelGguf(shape, 'q4_0_all'), room, openOptions(bench));
  const series: SettingSeries[] = [];
  const facts: CaseRecord['facts'] = { [bytesFact]: bench.formats.adapterQuantization === 'int8' ? 1 : 2 };
  try {
    const handles: Record<string, number[]> = {};
    for (const [voice, plan] of Object.entries(voices)) {
      const times: number[] = [];
      handles[voice] = [];
      for (const folder of await adapterFolders(shape, plan, most)) {
        bench.onProgress(`${shape}: load ${voice}, ${basename(folder)}`);
        const begin = performance.now();
        handles[voice].push(await steps.loadAdapter(folder));
        times.push(performance.now() - begin);
      }
      facts[loadFact + voice] = spread(times).median;
    }
    for (const batch of bench.batches) {
      const work = { batch, contextTokens, steps: decodeSteps };
      const contestant = (name: string, handle?: (row: number) => number | null): Contestant => {
        const measure = async () => ({ stepMs: await steps.decodeMs(handle ? { ...work, handle } : work) });
        return {
          name,
          measure,
          warmUp: async () => {
            await measure();
          },
        };
      };
      const large = handles['rank 16 on all linear']!;
      const contestants = [
        contestant(silent),
        ...Object.entries(handles).map(([voice, ofRow]) => contestant(voice, (row) => ofRow[row]!)),
        ...(batch > 1 ? [contestant(half, (row) => (row % 2 === 0 ? large[row]! : null))] : []),
        // As far from the caches as a step finds them: it reads all weights between two looks at an adapter.
        {
          name: roofName,
          measure: async () => {
            const bytes = steps.runtime.weightBytes + batch * adapterBytes(shape, largeAdapter);
            return { gigabytesPerSecond: await readGigabytesPerSecond(bytes, bench.threads) };
          },
        },
      ];
      series.push(...(await compare(bench, `${shape}, tax`, `${batch}`, contestants)));
    }
    return { case: 'tax', shape, series, facts };
  } finally {
    steps.close();
  }
}

export function showTax(record: CaseRecord): Table[] {
  const elementBytes = record.facts[bytesFact] ?? 2;
  const bytesOf = (plan: AdapterPlan) => (adapterBytes(record.shape, plan) / 2) * elementBytes;
  const rows = bySetting(record).flatMap(([setting, series]): Table['rows'] => {
    const base = figuresOf(series, silent, 'stepMs');
    if (base === undefined) return [[setting, 'failed']];
    const rates = figuresOf(series, roofName, 'gigabytesPerSecond');
    const row = (voice: string, bytes: number): (string | Spread)[] => {
      const times = figuresOf(series, voice, 'stepMs');
      if (times === undefined || rates === undefined) return [setting, voice, 'not measured'];
      const added = times.map((ms, round) => ms - base[round]!);
      const reading = rates.map((rate) => bytes / 1e6 / rate);
      const tax = showPercent(ratios(added, base));
      return [setting, voice, spread(times), tax, spread(added), spread(reading), ratios(added, reading)];
    };
    const batch = Number(setting);
    const rows = Object.entries(voices).map(([voice, plan]) => row(voice, batch * bytesOf(plan)));
    const halfRow = batch > 1 ? [row(half, (batch / 2) * bytesOf(largeAdapter))] : [];
    return [[setting, silent, spread(base)], ...rows, ...halfRow];
  });
  const loads = Object.entries(record.facts)
    .filter(([name]) => name.startsWith(loadFact))
    .map(([name, ms]) => `${name.slice(loadFact.length)} ${shortNumber(ms)} ms`);
  const note =
    `Each row decodes with an adapter of its own, after ${contextTokens} tokens. ${medianNote(numRounds(record))} Reading: the ` +
    `time that the bytes of those adapters (${8 * elementBytes} bits an element) take at the read bandwidth of an array as large as ` +
    'weights and adapters, measured in the same round. Loading an adapter from the page cache, verified: ' +
    `${loads.join(', ')}.`;
  const columns = ['batch', 'adapters', 'step ms', 'tax', 'added ms', 'reading ms', 'added ÷ reading'];
  return [{ title: `LoRA tax, ${shapes[record.shape].title}`, note, columns, rows }];
}
