/**
 * The cases: what is measured, on which peers, and the tables made of it. Each function runs one case on one shape and returns
 * its tables with the raw series. README.md beside this file says the same in words.
 */
import { basename } from 'node:path';
import { type Load, runClosedLoop } from './closed-loop.ts';
import { findLlamaCpp, type LlamaCpp, llamaDecodeMs, llamaPrefillMs } from './llama-cpp.ts';
import { type MotetSteps, openMotet } from './motet-steps.ts';
import { type AdapterPlan, adapterFolders, type FileKind, modelGguf } from './peer-files.ts';
import { bars, percent, showPercent, type Table } from './report.ts';
import { measureRoof, readGigabytesPerSecond } from './roofs.ts';
import { type Contestant, type RoundOptions, runRounds, type Series } from './rounds.ts';
import {
  missingVllm,
  type PeerServer,
  residentBytes,
  type ServerPlan,
  startLlamaServer,
  startMotet,
  startVllm,
  vllmName,
} from './servers.ts';
import { adapterElements, type Linear, linears, type ShapeName, shapes } from './shapes.ts';
import { ratios, type Spread, shortNumber, spread } from './spread.ts';

export interface Bench {
  rounds: Omit<RoundOptions, 'onProgress'>;
  threads: number;
  cpus: number[];
  /** Which peers may run: names as on the command line. */
  peers: ReadonlySet<PeerName>;
  /** Files for llama.cpp's bench programs. */
  kinds: FileKind[];
  clients: number[];
  onProgress: (text: string) => void;
  /** A peer that is left out, and why; told once. */
  skip: (peer: string, reason: string) => void;
}

export const peerNames = ['motet', 'llama.cpp', 'vllm', 'transformers'] as const;
export type PeerName = (typeof peerNames)[number];

export interface CaseResult {
  case: string;
  shape: ShapeName;
  tables: Table[];
  plots: string[];
  series: (Series & { setting: string })[];
}

export const caseNames = ['decode', 'prefill', 'clients', 'tax', 'growth'] as const;
export type CaseName = (typeof caseNames)[number];

export const cases: Record<CaseName, (bench: Bench, shape: ShapeName) => Promise<CaseResult>> = {
  decode: decodeCase,
  prefill: prefillCase,
  clients: clientsCase,
  tax: taxCase,
  growth: growthCase,
};

const ours = 'motet';
const roofName = 'roof';
const allLinears: readonly Linear[] = [
  'q_proj',
  'k_proj',
  'v_proj',
  'o_proj',
  'gate_proj',
  'up_proj',
  'down_proj',
];
const smallAdapter: AdapterPlan = { rank: 8, targets: ['q_proj', 'v_proj'] };
const largeAdapter: AdapterPlan = { rank: 16, targets: allLinears };

// ---- decode and prefill: the same file kinds for us and for llama.cpp ----

const decodeBatches = [1, 8, 32];
const contextTokens = 128;
const decodeSteps = 64;
const prefillTokens = 512;

/** Four bits everywhere is what we are compared with; the real file of SmolLM2 is shown beside it. */
const ourKinds = (shape: ShapeName, kinds: readonly FileKind[]): FileKind[] =>
  (['q4_0_all', 'real', 'q8_0'] as const).filter((kind) =>
    kind === 'q8_0' ? kinds.includes(kind) : kind === 'q4_0_all' || shape === 'smollm2',
  );

const theirKinds = (shape: ShapeName, kinds: readonly FileKind[]): FileKind[] =>
  shape === 'smollm2' ? [...kinds, 'real'] : [...kinds];

function llamaBuilds(bench: Bench): LlamaCpp[] {
  if (!bench.peers.has('llama.cpp')) return [];
  const found = findLlamaCpp(bench.cpus);
  if (Array.isArray(found)) return found;
  bench.skip('llama.cpp', found.missing);
  return [];
}

async function openAll(bench: Bench, shape: ShapeName, room: { sequences: number; tokens: number }) {
  const kinds = bench.peers.has('motet') ? ourKinds(shape, bench.kinds) : [];
  const opened = new Map<string, MotetSteps>();
  for (const kind of kinds) {
    bench.onProgress(`${shape}: prepare ${kind}`);
    const steps = await openMotet(await modelGguf(shape, kind), { ...room, adapterBytes: 0 }, bench.threads);
    opened.set(`${ours} ${kind}`, steps);
  }
  const theirs: { name: string; build: LlamaCpp; model: string }[] = [];
  for (const build of llamaBuilds(bench)) {
    for (const kind of theirKinds(shape, bench.kinds)) {
      bench.onProgress(`${shape}: make ${kind}`);
      theirs.push({ name: `${build.name} ${kind}`, build, model: await modelGguf(shape, kind) });
    }
  }
  return { opened, theirs };
}

const closeAll = (opened: Map<string, MotetSteps>) => {
  for (const steps of opened.values()) steps.close();
};

async function decodeCase(bench: Bench, shape: ShapeName): Promise<CaseResult> {
  const { opened, theirs } = await openAll(bench, shape, {
    sequences: Math.max(...decodeBatches),
    tokens: contextTokens + decodeSteps,
  });
  const bytes = weightBytes(opened);
  const rows: Table['rows'] = [];
  const all: CaseResult['series'] = [];
  try {
    for (const batch of decodeBatches) {
      const work = { batch, contextTokens, steps: decodeSteps };
      const contestants: Contestant[] = [
        ...[...opened].map(([name, steps]) => ({
          name,
          measure: async () => ({ tokensPerSecond: (batch * 1000) / (await steps.decodeMs(work)) }),
          warmUp: async () => {
            await steps.decodeMs({ ...work, steps: 4 });
          },
        })),
        ...theirs.map(({ name, build, model }) => ({
          name,
          measure: async () => ({
            tokensPerSecond: (batch * 1000) / (await llamaDecodeMs(build, model, bench.threads, work)),
          }),
        })),
        roofContestant(bytes.get(`${ours} q4_0_all`) ?? 2 ** 28, bench.threads),
      ];
      const series = await run(bench, `${shape}, decode, batch ${batch}`, contestants);
      all.push(...series.map((one) => ({ ...one, setting: `batch ${batch}` })));
      // A step reads every weight, and each sequence's keys and values so far.
      const kvBytes = batch * (contextTokens + decodeSteps / 2) * kvBytesOf(shape);
      rows.push(
        ...speedRows(`${batch}`, series, (name, roof, rate) => ({
          read: bytes.has(name)
            ? (((bytes.get(name)! + kvBytes) / 1e9) * rate) / batch / roof.gigabytesPerSecond!
            : null,
          compute: (2 * linearElements(shape, true) * rate) / 1e9 / roof.vnniGops!,
        })),
      );
    }
  } finally {
    closeAll(opened);
  }
  const note =
    `Output tokens per second of ${decodeSteps} steps after ${contextTokens} tokens, greedy, ${bench.threads} threads. ` +
    `${theMedian(bench)} Read: bytes that a step must read (weights and KV) by the time they take at the read bandwidth ` +
    'measured in the same round. int8: operations of the linear layers by the measured peak of vpdpbusd. ' +
    bytesNote(bytes);
  return {
    case: 'decode',
    shape,
    tables: [{ title: `Decode, ${shapes[shape].title}`, note, columns: ['batch', ...speedColumns], rows }],
    plots: [],
    series: all,
  };
}

async function prefillCase(bench: Bench, shape: ShapeName): Promise<CaseResult> {
  const { opened, theirs } = await openAll(bench, shape, { sequences: 1, tokens: prefillTokens });
  try {
    const contestants: Contestant[] = [
      ...[...opened].map(([name, steps]) => ({
        name,
        measure: async () => ({
          tokensPerSecond: (prefillTokens * 1000) / (await steps.prefillMs(prefillTokens)),
        }),
        warmUp: async () => {
          await steps.prefillMs(prefillTokens);
        },
      })),
      ...theirs.map(({ name, build, model }) => ({
        name,
        measure: async () => ({
          tokensPerSecond:
            (prefillTokens * 1000) / (await llamaPrefillMs(build, model, bench.threads, prefillTokens)),
        }),
      })),
      roofContestant(2 ** 28, bench.threads),
    ];
    const series = await run(bench, `${shape}, prefill`, contestants);
    const rows = speedRows(`${prefillTokens}`, series, (_, roof, rate) => ({
      read: null,
      compute: (2 * linearElements(shape, false) * rate) / 1e9 / roof.vnniGops!,
    }));
    const note = `Prompt tokens per second, one prompt, the last row sampled, ${bench.threads} threads. ${theMedian(bench)}`;
    return {
      case: 'prefill',
      shape,
      tables: [
        { title: `Prefill, ${shapes[shape].title}`, note, columns: ['tokens', ...speedColumns], rows },
      ],
      plots: [],
      series: series.map((one) => ({ ...one, setting: `${prefillTokens} tokens` })),
    };
  } finally {
    closeAll(opened);
  }
}

const speedColumns = ['who', 'tokens/s', 'motet ÷ it', 'of read', 'of int8', 'others'];

interface Shares {
  read: number | null;
  compute: number;
}

/** One row a contestant; ratios are ours in four bits by theirs, round by round. */
function speedRows(
  label: string,
  series: Series[],
  share: (name: string, roof: Record<string, number>, rate: number) => Shares,
): Table['rows'] {
  const roof = series.find(({ name }) => name === roofName)!;
  const mine = series.find(({ name }) => name === `${ours} q4_0_all`)?.figures.tokensPerSecond;
  const rows = series
    .filter(({ name }) => name !== roofName)
    .map(({ name, figures, othersShare, failure }): (string | Spread)[] => {
      const rates = figures.tokensPerSecond;
      if (rates === undefined) return [label, name, `failed: ${failure}`];
      const shares = rates.map((rate, round) => {
        const atRound = Object.fromEntries(
          Object.entries(roof.figures).map(([key, values]) => [key, values[round] ?? values.at(-1)!]),
        );
        return share(name, atRound, rate);
      });
      const read = shares.flatMap((one) => (one.read === null ? [] : [one.read]));
      const compute = shares.map((one) => one.compute).filter(Number.isFinite);
      return [
        label,
        name,
        spread(rates),
        mine && !name.startsWith(ours) ? ratios(mine, rates) : '',
        read.length > 0 ? showPercent(spread(read)) : '',
        compute.length > 0 ? showPercent(spread(compute)) : '',
        percent(othersShare),
      ];
    });
  const { gigabytesPerSecond, vnniGops, amxGops } = roof.figures;
  if (gigabytesPerSecond === undefined) return [...rows, [label, `roof: failed: ${roof.failure}`]];
  const amx = Math.max(...amxGops!) > 0 ? `, AMX ${shortNumber(spread(amxGops!).median)}` : '';
  const peaks = `vpdpbusd ${shortNumber(spread(vnniGops!).median)}${amx} GOP/s`;
  return [...rows, [label, `roof: read ${shortNumber(spread(gigabytesPerSecond).median)} GB/s, ${peaks}`]];
}

function roofContestant(bytes: number, threads: number): Contestant {
  return { name: roofName, measure: async () => ({ ...(await measureRoof(bytes, threads)) }) };
}

/** Of the layers' matrices; and of the head. */
function linearElements(name: ShapeName, withHead: boolean): number {
  const shape = shapes[name];
  const perLayer = Object.values(linears(shape)).reduce((sum, { size }) => sum + size[0] * size[1], 0);
  return shape.numLayers * perLayer + (withHead ? shape.vocabSize * shape.hiddenSize : 0);
}

const kvBytesOf = (name: ShapeName) => {
  const { numLayers, numKvHeads, headDim } = shapes[name];
  return numLayers * numKvHeads * headDim * 2 * 2;
};

const weightBytes = (opened: Map<string, MotetSteps>) =>
  new Map([...opened].map(([name, { runtime }]) => [name, runtime.weightBytes]));

const bytesNote = (bytes: Map<string, number>) =>
  `Weights: ${[...bytes].map(([name, size]) => `${name} ${(size / 1e6).toFixed(0)} MB`).join(', ')}.`;

const theMedian = ({ rounds }: Bench) =>
  `Median (lowest–highest) of ${rounds.rounds} rounds, all contestants in turn; "others" is the largest share of the machine ` +
  'that other processes took during a sample.';

function run(bench: Bench, title: string, contestants: Contestant[]): Promise<Series[]> {
  return runRounds(contestants, {
    ...bench.rounds,
    onProgress: (text) => bench.onProgress(`${title}: ${text}`),
  });
}

// ---- clients: each with its own adapter, over HTTP ----

const requestsPerClient = 2;
const outputTokens = 64;

async function clientsCase(bench: Bench, shape: ShapeName): Promise<CaseResult> {
  const plan: Omit<ServerPlan, 'kind'> = {
    shape,
    adapters: largeAdapter,
    numAdapters: 32,
    maxClients: Math.max(...bench.clients),
    threads: bench.threads,
  };
  const servers = new Map<string, PeerServer>();
  const start = async (name: string, begin: () => Promise<PeerServer>) => {
    bench.onProgress(`${shape}: start ${name}`);
    await begin().then(
      (server) => servers.set(name, server),
      (error: Error) => bench.skip(name, error.message),
    );
  };
  const rows: Table['rows'] = [];
  const all: CaseResult['series'] = [];
  try {
    if (bench.peers.has('motet'))
      await start(`${ours} q4_0_all`, () => startMotet({ ...plan, kind: 'q4_0_all' }));
    const [build] = llamaBuilds(bench);
    if (build) await start('llama-server q4_0', () => startLlamaServer(build, { ...plan, kind: 'q4_0' }));
    if (bench.peers.has('vllm')) {
      const missing = missingVllm();
      if (missing !== null) bench.skip('vllm', missing);
      else await start(vllmName, () => startVllm({ ...plan }, bench.cpus));
    }
    let seed = 0;
    for (const clients of bench.clients) {
      const load: Omit<Load, 'seed'> = {
        ...{ clients, requestsPerClient, promptTokens: contextTokens, outputTokens },
        ...{ vocabSize: shapes[shape].vocabSize, timeoutMs: 600_000 },
      };
      const contestants = [...servers].map(([name, server]) => {
        const measure = (one: Load) =>
          runClosedLoop(
            server.url,
            (prompt, client) => server.completion(prompt, client, one.outputTokens),
            one,
          );
        return {
          name,
          measure: () => measure({ ...load, seed: seed++ }),
          warmUp: async () => {
            await measure({ ...load, requestsPerClient: 1, outputTokens: 4, seed: seed++ });
          },
        };
      });
      const series = await run(bench, `${shape}, ${clients} clients`, contestants);
      all.push(...series.map((one) => ({ ...one, setting: `${clients} clients` })));
      rows.push(...clientRows(`${clients}`, series));
    }
    const memory = [...servers].map(
      ([name, { pid }]) => `${name} ${(residentBytes(pid) / 1e6).toFixed(0)} MB`,
    );
    const note =
      `${contextTokens} random prompt tokens, ${outputTokens} output tokens, ${requestsPerClient} requests a client one after ` +
      `another, streamed, greedy; each client on its own adapter of rank ${largeAdapter.rank} on all linear layers. Output tokens ` +
      `over the wall time, prefill included. ${theMedian(bench)} Resident after the load, with ${plan.numAdapters} adapters: ` +
      `${memory.join(', ')}.`;
    const columns = [
      'clients',
      'who',
      'tokens/s',
      'motet ÷ it',
      'TTFT p50 s',
      'TTFT p95 s',
      'TPOT p50 ms',
      'others',
    ];
    return {
      case: 'clients',
      shape,
      tables: [{ title: `Clients with an adapter each, ${shapes[shape].title}`, note, columns, rows }],
      plots: [],
      series: all,
    };
  } finally {
    for (const server of servers.values()) await server.stop();
  }
}

function clientRows(label: string, series: Series[]): Table['rows'] {
  const mine = series.find(({ name }) => name.startsWith(ours))?.figures.tokensPerSecond;
  const inSeconds = (values: number[]) => spread(values.map((ms) => ms / 1000));
  return series.map(({ name, figures, othersShare, failure }): (string | Spread)[] => {
    if (figures.tokensPerSecond === undefined) return [label, name, `failed: ${failure}`];
    return [
      label,
      name,
      spread(figures.tokensPerSecond),
      mine && !name.startsWith(ours) ? ratios(mine, figures.tokensPerSecond) : '',
      inSeconds(figures.ttftP50Ms!),
      inSeconds(figures.ttftP95Ms!),
      spread(figures.tpotP50Ms!),
      percent(othersShare),
    ];
  });
}

// ---- tax: what adapters add to our own step, against reading their bytes ----

const taxBatches = [8, 32];

async function taxCase(bench: Bench, shape: ShapeName): Promise<CaseResult> {
  const voices = { 'rank 8 on q, v': smallAdapter, 'rank 16 on all linear': largeAdapter };
  const most = Math.max(...taxBatches);
  const bytesOf = (plan: AdapterPlan) => 2 * adapterElements(shapes[shape], plan.rank, plan.targets);
  const adapterBytes = most * (bytesOf(smallAdapter) + bytesOf(largeAdapter));
  const steps = await openMotet(
    await modelGguf(shape, 'q4_0_all'),
    { sequences: most, tokens: contextTokens + decodeSteps, adapterBytes },
    bench.threads,
  );
  const rows: Table['rows'] = [];
  const all: CaseResult['series'] = [];
  const loads: string[] = [];
  try {
    const handles = new Map<string, number[]>();
    for (const [voice, plan] of Object.entries(voices)) {
      const loaded: number[] = [];
      const times: number[] = [];
      for (const folder of await adapterFolders(shape, plan, most)) {
        bench.onProgress(`${shape}: load ${voice}, ${basename(folder)}`);
        const begin = performance.now();
        loaded.push(await steps.loadAdapter(folder));
        times.push(performance.now() - begin);
      }
      handles.set(voice, loaded);
      loads.push(`${voice} ${shortNumber(spread(times).median)} ms`);
    }
    for (const batch of taxBatches) {
      const work = { batch, contextTokens, steps: decodeSteps };
      const contestant = (name: string, ofRow?: number[]): Contestant => {
        const measure = async () => ({
          stepMs: await steps.decodeMs(ofRow ? { ...work, handle: (row) => ofRow[row]! } : work),
        });
        return {
          name,
          measure,
          warmUp: async () => {
            await measure();
          },
        };
      };
      const readers = Object.entries(voices).map(
        ([voice, plan]): Contestant => ({
          name: `read ${voice}`,
          measure: async () => ({
            gigabytesPerSecond: await readGigabytesPerSecond(batch * bytesOf(plan), bench.threads),
          }),
        }),
      );
      const series = await run(bench, `${shape}, tax, batch ${batch}`, [
        contestant('no adapter'),
        ...[...handles].map(([voice, list]) => contestant(voice, list)),
        ...readers,
      ]);
      all.push(...series.map((one) => ({ ...one, setting: `batch ${batch}` })));
      const figures = (name: string, figure: string) =>
        series.find((one) => one.name === name)!.figures[figure]!;
      const base = figures('no adapter', 'stepMs');
      rows.push([`${batch}`, 'no adapter', spread(base)]);
      for (const [voice, plan] of Object.entries(voices)) {
        const times = figures(voice, 'stepMs');
        const added = times.map((ms, i) => ms - base[i]!);
        const reading = figures(`read ${voice}`, 'gigabytesPerSecond').map(
          (rate) => (batch * bytesOf(plan)) / 1e6 / rate,
        );
        rows.push([
          ...[`${batch}`, voice, spread(times), showPercent(spread(added.map((ms, i) => ms / base[i]!)))],
          ...[spread(added), spread(reading), ratios(added, reading)],
        ]);
      }
    }
  } finally {
    steps.close();
  }
  const note =
    `Each row decodes with an adapter of its own, after ${contextTokens} tokens. ${theMedian(bench)} Reading: the time that the ` +
    `adapters' bytes (bf16) take at the read bandwidth measured in the same round. Loading an adapter from the page cache, ` +
    `verified: ${loads.join(', ')}.`;
  const columns = ['batch', 'adapters', 'step ms', 'tax', 'added ms', 'reading ms', 'added ÷ reading'];
  return {
    case: 'tax',
    shape,
    tables: [{ title: `LoRA tax, ${shapes[shape].title}`, note, columns, rows }],
    plots: [],
    series: all,
  };
}

// ---- growth: no cliff as contexts, batches, ranks and adapters grow ----

const growthContexts = [128, 512, 1024, 2048, 4096, 8192];
const growthBatches = [1, 2, 4, 8, 16, 32, 64];
const growthRanks = [4, 8, 16, 32, 64, 128];
const growthAdapters = [1, 5, 50, 500, 2000];
const growthSteps = 16;
const rankBatch = 8;
const adaptersBatch = 32;

async function growthCase(bench: Bench, shape: ShapeName): Promise<CaseResult> {
  const longest = Math.min(Math.max(...growthContexts), shapes[shape].maxPositions - growthSteps);
  const model = await modelGguf(shape, 'q4_0_all');
  const tables: Table[] = [];
  const plots: string[] = [];
  const all: CaseResult['series'] = [];
  const add = (setting: string, unit: string, series: Series[], perRow: (label: string) => number) => {
    all.push(...series.map((one) => ({ ...one, setting })));
    const rows = series.map(({ name, figures, failure }): (string | Spread)[] =>
      figures.stepMs === undefined
        ? [name, `failed: ${failure}`]
        : [name, spread(figures.stepMs), spread(figures.stepMs.map((ms) => (1000 * perRow(name)) / ms))],
    );
    const title = `Cost by ${setting}, ${shapes[shape].title}`;
    tables.push({ title, note: theMedian(bench), columns: [unit, 'step ms', 'tokens/s'], rows });
    const points = series
      .filter(({ figures }) => figures.stepMs)
      .map(({ name, figures }) => ({ label: name, value: spread(figures.stepMs!).median }));
    if (points.length > 0) plots.push(bars(`ms of a step by ${setting}`, 'ms', points));
  };
  const sweep = (
    steps: MotetSteps,
    setting: string,
    points: [label: string, work: Parameters<MotetSteps['decodeMs']>[0]][],
  ) =>
    run(
      bench,
      `${shape}, ${setting}`,
      points.map(([name, work]) => ({
        name,
        measure: async () => ({ stepMs: await steps.decodeMs(work) }),
        warmUp: async () => {
          await steps.decodeMs({ ...work, steps: 4 });
        },
      })),
    );

  const long = await openMotet(
    model,
    { sequences: 1, tokens: longest + growthSteps, adapterBytes: 0 },
    bench.threads,
  );
  try {
    const setting = 'context, batch 1';
    const contexts = growthContexts.map((tokens) => Math.min(tokens, longest));
    const points = contexts.map((tokens): [string, Parameters<MotetSteps['decodeMs']>[0]] => [
      `${tokens}`,
      { batch: 1, contextTokens: tokens, steps: growthSteps },
    ]);
    add(setting, 'context', await sweep(long, setting, points), () => 1);
  } finally {
    long.close();
  }

  const most = Math.max(...growthBatches);
  const bytesOf = (plan: AdapterPlan) => 2 * adapterElements(shapes[shape], plan.rank, plan.targets);
  const plans = growthRanks.map((rank): AdapterPlan => ({ rank, targets: allLinears }));
  const adapterBytes = Math.max(
    rankBatch * plans.reduce((sum, plan) => sum + bytesOf(plan), 0),
    Math.max(...growthAdapters) * bytesOf(smallAdapter),
  );
  const wide = await openMotet(
    model,
    { sequences: most, tokens: contextTokens + growthSteps, adapterBytes },
    bench.threads,
  );
  try {
    const base = { contextTokens, steps: growthSteps };
    const batches = growthBatches.map((batch): [string, Parameters<MotetSteps['decodeMs']>[0]] => [
      `${batch}`,
      { ...base, batch },
    ]);
    add(`batch, context ${contextTokens}`, 'batch', await sweep(wide, 'batch', batches), Number);

    // The same folder again and again: every load has pages of its own.
    const loadCopies = async (plan: AdapterPlan, count: number) => {
      const [folder] = await adapterFolders(shape, plan, 1);
      const handles: number[] = [];
      for (let i = 0; i < count; i++) {
        if (i % 50 === 0) bench.onProgress(`${shape}: load adapter ${i} of ${count}, rank ${plan.rank}`);
        handles.push(await wide.loadAdapter(folder!));
      }
      return handles;
    };
    const ranks: [string, Parameters<MotetSteps['decodeMs']>[0]][] = [];
    for (const plan of plans) {
      const handles = await loadCopies(plan, rankBatch);
      ranks.push([`${plan.rank}`, { ...base, batch: rankBatch, handle: (row) => handles[row]! }]);
    }
    const rankSetting = `rank on all linear layers, batch ${rankBatch}`;
    add(rankSetting, 'rank', await sweep(wide, rankSetting, ranks), () => rankBatch);
    wide.unloadAll();

    const handles = await loadCopies(smallAdapter, Math.max(...growthAdapters));
    const counts = growthAdapters.map((count): [string, Parameters<MotetSteps['decodeMs']>[0]] => {
      const pick = zipfPicks(count, adaptersBatch * growthSteps);
      // A row keeps its adapter for eight steps, as short answers do.
      const handle = (row: number, step: number) => handles[pick[row + adaptersBatch * (step >> 3)]!]!;
      return [`${count}`, { ...base, batch: adaptersBatch, handle }];
    });
    const countSetting = `resident adapters (rank 8 on q, v; drawn by Zipf), batch ${adaptersBatch}`;
    add(countSetting, 'adapters', await sweep(wide, countSetting, counts), () => adaptersBatch);
  } finally {
    wide.close();
  }
  return { case: 'growth', shape, tables, plots, series: all };
}

/** `length` draws of 0 to count − 1 where the k-th is drawn with weight 1 / k; the same every time. */
export function zipfPicks(count: number, length: number): number[] {
  const weights = Array.from({ length: count }, (_, i) => 1 / (i + 1));
  const total = weights.reduce((sum, weight) => sum + weight, 0);
  let state = 1;
  return Array.from({ length }, () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    let left = (state / 2 ** 32) * total;
    const at = weights.findIndex((weight) => {
      left -= weight;
      return left < 0;
    });
    return at < 0 ? count - 1 : at;
  });
}
