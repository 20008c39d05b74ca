/**
 * What becomes of throughput and of the time to the first token when far more adapters are asked for than the device holds?
 * SmolLM2-135M in an engine in this process, adapters of rank 8, 16, 32 and 64 on q_proj and v_proj, clients in a closed loop.
 *
 *   node tests/bench/adapter-ladder.ts                    2,000 adapters, device for 50, host for 500: about 13 minutes
 *   node tests/bench/adapter-ladder.ts 400 10 100 5       of 400, device for 10, host for 100, 5 seconds a row
 *   … FILE.svg                                            draws throughput and TTFT over the number asked for
 *
 * Each row is one popularity over the first adapters of the list: uniform over more and more of them, then Zipf(1) over all. The
 * tier is the one in which a request found its adapter. Adapters of a rank share weights on disk, each has a scaling of its own,
 * so they differ in digest; files are in the page cache of the system, as they would be soon after a start.
 */
import { link, mkdir, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { readAdapterFile } from '../../engine/adapters/adapter-file.ts';
import { alone } from '../../engine/adapters/composition.ts';
import type { Tier } from '../../engine/protocol.ts';
import { defaultSampling } from '../../engine/sampling.ts';
import { cpuInfo } from '../../native/index.ts';
import { open, prepare, smollm2Path } from '../fixtures/models.ts';
import { seededRandom } from '../fixtures/seeded-random.ts';
import { wireEngine } from '../fixtures/wire-engine.ts';
import { type Panel, renderSvg } from './plot.ts';
import { writeRandomAdapter } from './random-adapter.ts';

const args = process.argv.slice(2);
const svgPath = args.at(-1)?.endsWith('.svg') ? args.pop()! : null;
const [numAdapters = 2000, numOnDevice = 50, numOnHost = 500, secondsPerRow = 75] = args.map(Number);
const ranks = [8, 16, 32, 64];
const numClients = 16;
const promptTokens = 32;
const outputTokens = 16;
const kvTokens = numClients * (promptTokens + outputTokens + 16);

const folder = await mkdtemp(join(tmpdir(), 'motet-ladder-'));
const model = await prepare(smollm2Path);
for (const rank of ranks)
  await writeRandomAdapter(join(folder, `r${rank}`), model.dims, rank, ['q_proj', 'v_proj'], rank);

/** The content of a rank with a scaling of its own. */
async function writeAdapter(index: number): Promise<string> {
  const rank = ranks[index % ranks.length]!;
  const [original, path] = [join(folder, `r${rank}`), join(folder, `${index}`)];
  const config = JSON.parse(await readFile(join(original, 'adapter_config.json'), 'utf8'));
  await mkdir(path);
  await link(join(original, 'adapter_model.safetensors'), join(path, 'adapter_model.safetensors'));
  await writeFile(
    join(path, 'adapter_config.json'),
    JSON.stringify({ ...config, lora_alpha: rank * (1 + index / 10_000) }),
  );
  return path;
}

const probe = await open(model, { deviceMemoryBytes: 64 << 20 });
const pagesOf = async (rank: number) =>
  probe.adapterPages((await readAdapterFile(join(folder, `r${rank}`), model.dims, { maxRank: 64 })).modules);
const meanPages = (await Promise.all(ranks.map(pagesOf))).reduce((a, b) => a + b) / ranks.length;
const kvPages = Math.ceil(kvTokens / probe.blockTokens);
const { pageBytes } = probe;
probe.close();
const runtime = await open(model, {
  deviceMemoryBytes: Math.ceil(meanPages * numOnDevice + kvPages) * pageBytes,
  hostMemoryBytes: Math.ceil(meanPages * numOnHost) * pageBytes,
});
const { engine, tiers, fatal } = wireEngine({
  runtime,
  limits: { maxModelLen: 256, maxBatchTokens: 256, maxSequences: 64, maxWaiting: 256 },
  eosTokenIds: new Set(),
  createDetokenizer: () => ({ push: () => '', flush: () => '' }),
  tiers: {
    readFile: (path) => readAdapterFile(path, model.dims, { maxRank: 64 }),
    pageWaitMs: 10_000,
    queueWaitMs: 60_000,
  },
});
const beginMs = performance.now();
for (let i = 0; i < numAdapters; i++) await tiers.load(`${i}`, await writeAdapter(i), false);
const registerSeconds = (performance.now() - beginMs) / 1000;
const mib = (pages: number) => `${((pages * pageBytes) / 2 ** 20).toFixed(0)} MiB`;
console.log(
  `${numAdapters} adapters of rank ${ranks.join(', ')} on q_proj and v_proj, ${mib(meanPages)} each on average`,
);
console.log(
  `device ${mib(runtime.numPages)} (${mib(kvPages)} of it for KV), host ${mib(runtime.numHostPages)}; ${cpuInfo().isa}, ${runtime.numThreads} threads`,
);
console.log(
  `registered in ${registerSeconds.toFixed(1)} s; ${numClients} clients, ${promptTokens} tokens in, ${outputTokens} out, ${secondsPerRow} s a row\n`,
);

interface Row {
  numTokens: number;
  numErrors: number;
  ttftMs: Record<Tier, number[]>;
}

async function measure(pick: () => number): Promise<Row> {
  const row: Row = { numTokens: 0, numErrors: 0, ttftMs: { device: [], host: [], disk: [] } };
  const endMs = performance.now() + 1000 * secondsPerRow;
  const client = async (seed: number) => {
    for (let turn = 0; performance.now() < endMs; turn++) {
      const adapter = tiers.get(`${pick()}`)!;
      const tier = tiers.residency.tierOf(adapter);
      const askedMs = performance.now();
      let isFirst = true;
      await new Promise<void>((resolve) => {
        engine.add([
          {
            promptTokens: Array.from(
              { length: promptTokens },
              (_, i) => ((turn + 1) * (i + seed) + 7) % 4000,
            ),
            adapters: alone(adapter),
            params: { ...defaultSampling(), temperature: 0, ignoreEos: true, maxTokens: outputTokens },
            onOutput({ finishReason, error }) {
              if (error) row.numErrors++;
              else row.numTokens++;
              if (isFirst && !error) row.ttftMs[tier].push(performance.now() - askedMs);
              isFirst = false;
              if (finishReason) resolve();
            },
          },
        ]);
      });
    }
  };
  await Promise.all(Array.from({ length: numClients }, (_, seed) => client(seed)));
  return row;
}

const random = seededRandom(1);
const uniform = (count: number) => () => random.below(count);
function zipf(count: number): () => number {
  const sums: number[] = [];
  for (let i = 0; i < count; i++) sums.push((sums[i - 1] ?? 0) + 1 / (i + 1));
  return () => {
    const at = random.unit() * sums[count - 1]!;
    const found = sums.findIndex((sum) => sum > at);
    return found < 0 ? count - 1 : found;
  };
}
const sizes = [0.2, 0.5, 1, 2, 5, 10, 20, 40].map((share) => Math.round(numOnDevice * share));
const shown = [...new Set(sizes.filter((size) => size >= 1 && size <= numAdapters))];
const rows: { name: string; size: number | null; pick: () => number }[] = [
  ...shown.map((size) => ({ name: `uniform over ${size}`, size, pick: uniform(size) })),
  { name: `Zipf(1) over ${numAdapters}`, size: null, pick: zipf(numAdapters) },
];
const at = (values: number[], q: number) =>
  values.toSorted((a, b) => a - b)[Math.floor(q * (values.length - 1))];
const cell = (values: number[]) =>
  values.length === 0
    ? '–'
    : `${at(values, 0.5)!.toFixed(0)} / ${at(values, 0.95)!.toFixed(0)} (${values.length})`;

console.log('| asked for | tokens/s | errors | TTFT ms p50 / p95 (requests): device | host | disk |');
console.log('|---|---|---|---|---|---|');
const measured: { size: number; row: Row }[] = [];
for (const { name, size, pick } of rows) {
  const row = await measure(pick);
  if (size !== null) measured.push({ size, row });
  const { numTokens, numErrors, ttftMs } = row;
  const cells = [
    name,
    (numTokens / secondsPerRow).toFixed(0),
    numErrors,
    cell(ttftMs.device),
    cell(ttftMs.host),
    cell(ttftMs.disk),
  ];
  console.log(`| ${cells.join(' | ')} |`);
}
if (svgPath !== null) await writeFile(svgPath, renderSvg(panels()));
if (fatal.length > 0) throw fatal[0];
await Promise.all([engine.close(), tiers.close()]);
runtime.close();
await rm(folder, { recursive: true });

/** Of the uniform rows: is there a slope or a cliff where a tier is full? */
function panels(): Panel[] {
  const x = { label: 'adapters asked for, uniformly', scale: 'log' } as const;
  const marks = [
    { x: numOnDevice, label: 'device is full' },
    { x: numOnHost, label: 'host is full' },
  ].filter(({ x }) => x <= shown.at(-1)!);
  const ttft = (name: string, q: number, of: (row: Row) => number[]) => ({
    name,
    points: measured.flatMap(({ size, row }) => {
      const values = of(row);
      return values.length > 0 ? [{ x: size, y: at(values, q)! }] : [];
    }),
  });
  const all = ({ ttftMs }: Row) => Object.values(ttftMs).flat();
  const perSecond = measured.map(({ size, row }) => ({ x: size, y: row.numTokens / secondsPerRow }));
  return [
    {
      title: `Throughput, ${numClients} clients, room for ${numOnDevice} adapters on the device`,
      x,
      y: { label: 'tokens/s', scale: 'linear' },
      series: [{ name: 'output tokens', points: perSecond }],
      marks,
    },
    {
      title: 'Time to the first token',
      x,
      y: { label: 'ms', scale: 'log' },
      series: [
        ttft('all requests, median', 0.5, all),
        ttft('all requests, 95th percentile', 0.95, all),
        ttft('adapter on the device, median', 0.5, ({ ttftMs }) => ttftMs.device),
        ttft('adapter in the host arena, median', 0.5, ({ ttftMs }) => ttftMs.host),
        ttft('adapter in its file, median', 0.5, ({ ttftMs }) => ttftMs.disk),
      ].filter(({ points }) => points.length > 0),
      marks,
    },
  ];
}
