/**
 * How fast is a step, and what do adapters cost? SmolLM2-135M, driven on the native runtime without HTTP.
 * Variants of one row of the table are interleaved, so that a busy moment of the machine hits all of them alike.
 * Each figure is the median of `numRuns` with its lowest and highest.
 */
import { execFileSync } from 'node:child_process';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { AdapterList } from '../../engine/protocol.ts';
import { cpuInfo, type Runtime } from '../../native/index.ts';
import { cacheFolder, loadAdapter, open, prepare, smollm2Path } from '../fixtures/models.ts';
import { getJson, loadAdapterOver, memoryOf, postJson, startProcess } from '../fixtures/processes.ts';
import { pagesFor, stepBatch } from '../fixtures/steps.ts';
import { allLinear, writeRandomAdapter } from './random-adapter.ts';

const numRuns = 7;
const decodeSteps = 32;
const contextTokens = 128;
const prefillTokens = 512;
const numAdapters = 32;
const voices = {
  'rank 8 on q, v': { rank: 8, targets: ['q_proj', 'v_proj'] },
  'rank 16 on all linear': { rank: 16, targets: allLinear },
};

interface Spread {
  median: number;
  low: number;
  high: number;
}

function spread(values: number[]): Spread {
  const sorted = values.toSorted((a, b) => a - b);
  return { median: sorted[sorted.length >> 1]!, low: sorted[0]!, high: sorted.at(-1)! };
}

const show = ({ median, low, high }: Spread, digits = 0) =>
  `${median.toFixed(digits)} (${low.toFixed(digits)}–${high.toFixed(digits)})`;

/** Interleaves: every variant once per round. @returns per variant the figures of all rounds */
async function interleave<K extends string>(
  variants: Record<K, () => Promise<number>>,
): Promise<Record<K, Spread>> {
  const names = Object.keys(variants) as K[];
  const figures = Object.fromEntries(names.map((name) => [name, []])) as unknown as Record<K, number[]>;
  for (const name of names) await variants[name](); // warm-up
  for (let run = 0; run < numRuns; run++)
    for (const name of names) figures[name].push(await variants[name]());
  return Object.fromEntries(names.map((name) => [name, spread(figures[name])])) as Record<K, Spread>;
}

function randomTokens(length: number): Int32Array {
  return Int32Array.from({ length }, (_, i) => (i * 7919 + 13) % 40_000);
}

/** Output tokens per second of `batch` sequences that decode, after a context of contextTokens. */
async function decodeSpeed(runtime: Runtime, batch: number, handles: number[]): Promise<number> {
  const tokens = randomTokens(contextTokens + decodeSteps);
  const numBlocks = pagesFor(runtime, tokens.length).length;
  const parts = Array.from({ length: batch }, (_, i) => ({
    tokens,
    blocks: pagesFor(runtime, tokens.length, i * numBlocks),
    adapters: handles.length ? ([[handles[i % handles.length]!, 1]] as [number, number][]) : [],
  }));
  for (const part of parts)
    await runtime.step(stepBatch([{ ...part, start: 0, count: contextTokens, sample: 'none' }]));
  const begin = performance.now();
  for (let i = 0; i < decodeSteps; i++) {
    await runtime.step(stepBatch(parts.map((part) => ({ ...part, start: contextTokens + i, count: 1 }))));
  }
  return (batch * decodeSteps * 1000) / (performance.now() - begin);
}

async function prefillSpeed(runtime: Runtime, handles: number[]): Promise<number> {
  const tokens = randomTokens(prefillTokens);
  const adapters = handles.slice(0, 1).map((handle): [number, number] => [handle, 1]);
  const batch = stepBatch([
    { tokens, start: 0, count: prefillTokens, blocks: pagesFor(runtime, prefillTokens), adapters },
  ]);
  const begin = performance.now();
  await runtime.step(batch);
  return (prefillTokens * 1000) / (performance.now() - begin);
}

const model = await prepare(smollm2Path);
const runtime = await open(model, { deviceMemoryBytes: 2 * 2 ** 30 });
const { weightBytes } = runtime;
const scratch = await mkdtemp(join(tmpdir(), 'motet-bench-'));
try {
  const bandwidth = JSON.parse(
    execFileSync(join(import.meta.dirname, '../../native/build/read_bandwidth_bench'), { encoding: 'utf8' }),
  ).gigabytesPerSecond as number;
  const roof = (bandwidth * 1e9) / weightBytes;
  console.log(
    `SmolLM2-135M, ${(weightBytes / 1e6).toFixed(1)} MB packed; ${cpuInfo().isa}, ${runtime.numThreads} threads;`,
  );
  console.log(
    `measured read bandwidth ${bandwidth.toFixed(1)} GB/s, so at most ${roof.toFixed(0)} tokens/s at batch 1`,
  );
  console.log(
    `median (lowest–highest) of ${numRuns} interleaved runs; decode of ${decodeSteps} steps after ${contextTokens} tokens\n`,
  );

  // Adapters live in the second half of the arena.
  let page = runtime.numPages >> 1;
  const handles: Record<string, number[]> = { 'no adapter': [] };
  const loadMs: Record<string, Spread> = {};
  for (const [voice, { rank, targets }] of Object.entries(voices)) {
    handles[voice] = [];
    const times: number[] = [];
    for (let i = 0; i < numAdapters; i++) {
      const folder = join(scratch, `${rank}-${i}`);
      await writeRandomAdapter(folder, model.dims, rank, targets, i);
      const begin = performance.now();
      const { handle, nextPage } = await loadAdapter(runtime, model, folder, page);
      times.push(performance.now() - begin);
      page = nextPage;
      handles[voice].push(handle);
    }
    loadMs[voice] = spread(times);
  }

  const rows: Record<string, Record<string, string>> = {};
  const baseline: Record<string, number> = {};
  for (const batch of [1, 8, 32]) {
    const row = `decode, batch ${batch}, tokens/s`;
    const speeds = await interleave(
      Object.fromEntries(
        Object.entries(handles).map(([voice, list]) => [
          voice,
          () => decodeSpeed(runtime, batch, list.slice(0, batch)),
        ]),
      ),
    );
    baseline[row] = speeds['no adapter']!.median;
    rows[row] = withTax(speeds);
    if (batch === 1) rows[row]['of the roof'] = `${((100 * baseline[row]) / roof).toFixed(0)} %`;
  }
  const row = `prefill of ${prefillTokens}, tokens/s`;
  const speeds = await interleave(
    Object.fromEntries(
      Object.entries(handles).map(([voice, list]) => [voice, () => prefillSpeed(runtime, list)]),
    ),
  );
  rows[row] = withTax(speeds);
  console.table(rows);
  console.table(
    Object.fromEntries(
      Object.entries(loadMs).map(([voice, times]) => [
        voice,
        { 'load from page cache, verified, ms': show(times, 1) },
      ]),
    ),
  );
  await showMemory();
  compareWithLlamaCpp();
} finally {
  runtime.close();
  await rm(scratch, { recursive: true });
}

/** Every decoding or prefilling row has another adapter; the tax is the time it adds. */
function withTax(speeds: Record<string, Spread>): Record<string, string> {
  const row: Record<string, string> = {};
  for (const [voice, speed] of Object.entries(speeds)) {
    const tax =
      voice === 'no adapter'
        ? ''
        : `, tax ${(100 * (speeds['no adapter']!.median / speed.median - 1)).toFixed(0)} %`;
    row[voice] = show(speed) + tax;
  }
  return row;
}

/** What an engine process holds, with and without adapters. */
async function showMemory(): Promise<void> {
  const args = ['--model', smollm2Path, '--served-name', 'base', '--cache', cacheFolder, '--port', '0'];
  const engine = await startProcess('engine', args);
  const ask = () =>
    postJson(`${engine.url}/v1/completions`, { model: 'base', prompt: 'The sea', max_tokens: 8 });
  await ask();
  const before = memoryOf(engine.pid).rssBytes;
  for (let i = 0; i < numAdapters; i++) await loadAdapterOver(engine.url, `a${i}`, join(scratch, `8-${i}`));
  const { arena } = await getJson<AdapterList>(`${engine.url}/v1/adapters`);
  const after = memoryOf(engine.pid).rssBytes;
  await engine.stop();
  const megabytes = (bytes: number) => `${(bytes / 1e6).toFixed(0)} MB`;
  console.log(
    `engine process, resident: ${megabytes(before)}, of which ${megabytes(weightBytes)} are the shared weights; ` +
      `${megabytes(after)} with ${numAdapters} adapters of rank 8 on q, v (${megabytes(arena.adapterBytes)} of pages)`,
  );
}

/** The same file by llama.cpp, when MOTET_LLAMA_BENCH names its llama-bench program. */
function compareWithLlamaCpp(): void {
  const program = process.env.MOTET_LLAMA_BENCH;
  if (!program) {
    console.log('llama.cpp: skipped, MOTET_LLAMA_BENCH names no llama-bench');
    return;
  }
  const threads = String(runtime.numThreads);
  const args = [
    '-m',
    smollm2Path,
    '-t',
    threads,
    '-p',
    String(prefillTokens),
    '-n',
    String(decodeSteps),
    '-r',
    '5',
    '-o',
    'json',
  ];
  const results = JSON.parse(
    execFileSync(program, args, { encoding: 'utf8', stdio: ['ignore', 'pipe', 'ignore'] }),
  );
  for (const { n_prompt, n_gen, avg_ts, stddev_ts } of results) {
    const what = n_prompt ? `prefill of ${n_prompt}` : `decode of ${n_gen}, batch 1`;
    console.log(`llama.cpp, ${what}: ${avg_ts.toFixed(0)} ± ${stddev_ts.toFixed(0)} tokens/s`);
  }
}
