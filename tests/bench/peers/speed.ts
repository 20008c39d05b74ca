/**
 * Decode and prefill without adapters and without HTTP, beside llama.cpp's bench programs and vLLM's server, which has no other
 * way in, with the roofs of the same rounds.
 */
import {
  type Bench,
  compare,
  contextTokens,
  kvBytes,
  largeAdapter,
  linearElements,
  llamaBuilds,
  medianNote,
  megabytes,
  openOptions,
  ourName,
  ours,
  roofName,
} from './bench.ts';
import { runClosedLoop } from './closed-loop.ts';
import { type LlamaCpp, llamaDecodeMs, llamaPrefillMs } from './llama-cpp.ts';
import { type MotetSteps, openMotet } from './motet-steps.ts';
import { type FileKind, modelGguf } from './peer-files.ts';
import { bySetting, type CaseRecord, numRounds, type SettingSeries } from './record.ts';
import { percent, showPercent, type Table } from './report.ts';
import { measureRoof, readGigabytesPerSecond } from './roofs.ts';
import type { Contestant, Figures } from './rounds.ts';
import { missingVllm, startVllm, vllmName } from './servers.ts';
import { type ShapeName, shapes } from './shapes.ts';
import { ratios, type Spread, shortNumber, spread } from './spread.ts';

const decodeSteps = 64;
const prefillTokens = 512;
/** Bytes of an array that comes from memory, larger than the caches of the machines that this runs on. */
const beyondCaches = 2 ** 29;
const weightsFact = 'weights of ';

export async function measureDecode(bench: Bench, shape: ShapeName): Promise<CaseRecord> {
  const room = { sequences: Math.max(...bench.batches), tokens: contextTokens + decodeSteps };
  const { opened, theirs, servers } = await openAll(bench, shape, room);
  const series: SettingSeries[] = [];
  try {
    for (const batch of bench.batches) {
      const work = { batch, contextTokens, steps: decodeSteps };
      const rate = (stepMs: number) => ({ tokensPerSecond: (batch * 1000) / stepMs });
      const weightBytes = opened[0]?.steps.runtime.weightBytes ?? 2 ** 28;
      const contestants: Contestant[] = [
        ...opened.map(({ name, steps }) => ({
          name,
          measure: async () => rate(await steps.decodeMs(work)),
          warmUp: async () => {
            await steps.decodeMs({ ...work, steps: 4 });
          },
        })),
        ...theirs.map(({ name, build, model }) => ({
          name,
          measure: async () => rate(await llamaDecodeMs(build, model, bench.threads, work)),
        })),
        // The pace of a stream after its first token, among as many others.
        ...servers.map(({ name, ask }) => ({
          name,
          measure: async () => rate((await ask(batch, contextTokens, decodeSteps)).tpotP50Ms!),
          warmUp: async () => {
            await ask(batch, contextTokens, 4);
          },
        })),
      ].map((contestant) => besideRoof(contestant, weightBytes, bench.threads));
      contestants.push(roof(weightBytes, bench.threads));
      series.push(...(await compare(bench, `${shape}, decode`, `${batch}`, contestants)));
    }
    return { case: 'decode', shape, series, facts: weightFacts(opened) };
  } finally {
    for (const { steps } of opened) steps.close();
    for (const { stop } of servers) await stop();
  }
}

export async function measurePrefill(bench: Bench, shape: ShapeName): Promise<CaseRecord> {
  const { opened, theirs, servers } = await openAll(bench, shape, { sequences: 1, tokens: prefillTokens });
  const rate = (ms: number) => ({ tokensPerSecond: (prefillTokens * 1000) / ms });
  try {
    const contestants: Contestant[] = [
      ...opened.map(({ name, steps }) => ({
        name,
        measure: async () => rate(await steps.prefillMs(prefillTokens)),
        warmUp: async () => {
          await steps.prefillMs(prefillTokens);
        },
      })),
      ...theirs.map(({ name, build, model }) => ({
        name,
        measure: async () => rate(await llamaPrefillMs(build, model, bench.threads, prefillTokens)),
      })),
      ...servers.map(({ name, ask }) => ({
        name,
        measure: async () => rate((await ask(1, prefillTokens, 1)).ttftP50Ms!),
        warmUp: async () => {
          await ask(1, prefillTokens, 1);
        },
      })),
      roof(opened[0]?.steps.runtime.weightBytes ?? 2 ** 28, bench.threads),
    ];
    const series = await compare(bench, `${shape}, prefill`, `${prefillTokens}`, contestants);
    return { case: 'prefill', shape, series, facts: weightFacts(opened) };
  } finally {
    for (const { steps } of opened) steps.close();
    for (const { stop } of servers) await stop();
  }
}

/** A server and what it does with `clients` requests at once. */
interface Served {
  name: string;
  ask: (clients: number, promptTokens: number, outputTokens: number) => Promise<Figures>;
  stop: () => Promise<void>;
}

async function serveVllm(bench: Bench, shape: ShapeName, maxClients: number): Promise<Served[]> {
  if (!bench.peers.has('vllm')) return [];
  const missing = missingVllm();
  if (missing !== null) {
    bench.skip('vllm', missing);
    return [];
  }
  bench.onProgress(`${shape}: start ${vllmName}`);
  const plan = { shape, adapters: largeAdapter, numAdapters: 0, maxClients, threads: bench.threads };
  const server = await startVllm({ ...plan, formats: bench.formats }, bench.cpus);
  let seed = Date.now() % 2 ** 31;
  const ask: Served['ask'] = (clients, promptTokens, outputTokens) =>
    runClosedLoop(server.url, (prompt, client) => server.completion(prompt, client, outputTokens), {
      ...{ clients, requestsPerClient: 1, promptTokens, outputTokens },
      ...{ vocabSize: shapes[shape].vocabSize, seed: seed++, timeoutMs: 600_000 },
    });
  return [{ name: vllmName, ask, stop: server.stop }];
}

interface Opened {
  name: string;
  steps: MotetSteps;
}

async function openAll(bench: Bench, shape: ShapeName, room: { sequences: number; tokens: number }) {
  const opened: Opened[] = [];
  const theirs: { name: string; build: LlamaCpp; model: string }[] = [];
  for (const kind of bench.peers.has('motet') ? ourKinds(shape, bench.kinds) : []) {
    bench.onProgress(`${shape}: prepare ${kind}`);
    const steps = await openMotet(
      await modelGguf(shape, kind),
      { ...room, adapterBytes: 0, numAdapters: 0 },
      openOptions(bench),
    );
    opened.push({ name: ourName(kind, bench.formats), steps });
  }
  const theirKinds: FileKind[] = shape === 'smollm2' ? [...bench.kinds, 'real'] : bench.kinds;
  for (const build of llamaBuilds(bench)) {
    for (const kind of theirKinds) {
      bench.onProgress(`${shape}: make ${kind}`);
      theirs.push({ name: `${build.name} ${kind}`, build, model: await modelGguf(shape, kind) });
    }
  }
  const servers = await serveVllm(bench, shape, room.sequences).catch((error: Error) => {
    bench.skip(vllmName, error.message);
    return [];
  });
  return { opened, theirs, servers };
}

/** Four bits everywhere is what the ratios are of; the real file of SmolLM2 and eight bits are shown beside it. */
function ourKinds(shape: ShapeName, kinds: readonly FileKind[]): FileKind[] {
  const eight: FileKind[] = kinds.includes('q8_0') ? ['q8_0'] : [];
  return shape === 'smollm2' ? ['q4_0_all', 'real', ...eight] : ['q4_0_all', ...eight];
}

const weightFacts = (opened: readonly Opened[]) =>
  Object.fromEntries(opened.map(({ name, steps }) => [weightsFact + name, steps.runtime.weightBytes]));

/**
 * Its samples with the read bandwidth just before and after them, of an array as large as the weights and of one that no cache
 * holds: memory may be twice as fast a minute later.
 */
function besideRoof(contestant: Contestant, bytes: number, threads: number): Contestant {
  const read = async () => [
    await readGigabytesPerSecond(bytes, threads),
    await readGigabytesPerSecond(beyondCaches, threads),
  ];
  const measure = async () => {
    const before = await read();
    const figures = await contestant.measure();
    const after = await read();
    const [gigabytesPerSecond, memoryGigabytesPerSecond] = before.map((value, i) => (value + after[i]!) / 2);
    return {
      ...figures,
      gigabytesPerSecond: gigabytesPerSecond!,
      memoryGigabytesPerSecond: memoryGigabytesPerSecond!,
    };
  };
  return { ...contestant, measure };
}

function roof(bytes: number, threads: number): Contestant {
  return { name: roofName, measure: async () => ({ ...(await measureRoof(bytes, threads)) }) };
}

// ---- tables ----

export function showDecode(record: CaseRecord): Table[] {
  const { shape } = record;
  const share = (setting: string, name: string, rate: number): Work => {
    const batch = Number(setting);
    const weights = record.facts[weightsFact + name];
    // A step reads every weight, and each sequence's keys and values so far.
    const kv = batch * (contextTokens + decodeSteps / 2) * kvBytes(shape);
    return {
      gigabytes: weights === undefined ? null : ((weights + kv) * rate) / batch / 1e9,
      gigaops: (2 * linearElements(shape, true) * rate) / 1e9,
    };
  };
  const note =
    `Output tokens per second of ${decodeSteps} steps after ${contextTokens} tokens, greedy; of vLLM by a stream's pace over HTTP. ${medianNote(numRounds(record))} ` +
    'Of read: the bytes of a step (weights and KV) over its time, as a share of the bandwidth at which an array of that size is read just ' +
    `before and after it; of memory: of one of ${beyondCaches / 2 ** 20} MiB, larger than the caches. ` +
    `Of int8: operations of the matrices over the time, as a share of the peak of vpdpbusd. Weights: ${megabytes(record, weightsFact)}.`;
  return [
    {
      title: `Decode, ${shapes[shape].title}`,
      note,
      columns: ['batch', ...columns],
      rows: speedRows(record, share),
    },
  ];
}

export function showPrefill(record: CaseRecord): Table[] {
  const { shape } = record;
  const share = (_setting: string, _name: string, rate: number): Work => ({
    gigabytes: null,
    gigaops: (2 * linearElements(shape, false) * rate) / 1e9,
  });
  const note = `Prompt tokens per second of one prompt, the last row sampled; of vLLM by the time to its first token. ${medianNote(numRounds(record))}`;
  return [
    {
      title: `Prefill, ${shapes[shape].title}`,
      note,
      columns: ['tokens', ...columns],
      rows: speedRows(record, share),
    },
  ];
}

const columns = ['who', 'tokens/s', 'motet ÷ it', 'of read', 'of memory', 'of int8', 'others'];

/** A second's work at some rate. */
interface Work {
  gigabytes: number | null;
  gigaops: number;
}

function speedRows(
  record: CaseRecord,
  work: (setting: string, name: string, rate: number) => Work,
): Table['rows'] {
  return bySetting(record).flatMap(([setting, series]) => {
    const roofs = series.find(({ name }) => name === roofName)?.figures ?? {};
    const ourRates = series.find(({ name }) => name.startsWith(`${ours} q4_0_all`))?.figures.tokensPerSecond;
    const rows = series
      .filter(({ name }) => name !== roofName)
      .map(({ name, figures, othersShare, failure }): (string | Spread)[] => {
        const rates = figures.tokensPerSecond;
        if (rates === undefined) return [setting, name, `failed: ${failure}`];
        const each = rates.map((rate) => work(setting, name, rate));
        const bytes = each.flatMap(({ gigabytes }) => (gigabytes === null ? [] : [gigabytes]));
        return [
          setting,
          name,
          spread(rates),
          ourRates && !name.startsWith(ours) ? ratios(ourRates, rates) : '',
          shareOf(bytes, figures.gigabytesPerSecond ?? roofs.gigabytesPerSecond),
          shareOf(bytes, figures.memoryGigabytesPerSecond),
          shareOf(
            each.map(({ gigaops }) => gigaops),
            roofs.vnniGops,
          ),
          percent(othersShare),
        ];
      });
    return [...rows, [setting, roofText(roofs)]];
  });
}

/** Empty where either is not there: a CPU without the instruction, a format whose bytes are not known, rounds of an older file. */
function shareOf(values: number[], roof: number[] | undefined): string {
  if (values.length === 0 || roof?.length !== values.length || !roof.every((value) => value > 0)) return '';
  return showPercent(ratios(values, roof));
}

function roofText({ gigabytesPerSecond, vnniGops, amxGops }: Record<string, number[]>): string {
  if (!gigabytesPerSecond || !vnniGops || !amxGops) return 'roof: not measured';
  const median = (values: number[]) => shortNumber(spread(values).median);
  const amx = Math.max(...amxGops) > 0 ? `, AMX ${median(amxGops)} GOP/s` : '';
  return `roof: read ${median(gigabytesPerSecond)} GB/s, vpdpbusd ${median(vnniGops)} GOP/s${amx}`;
}
