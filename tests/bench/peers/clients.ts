/** Clients at once, each on its own adapter, over HTTP: our engine, llama-server and vLLM, all started and loaded in turn. */
import {
  type Bench,
  compare,
  contextTokens,
  largeAdapter,
  llamaBuilds,
  medianNote,
  megabytes,
  ourName,
  ours,
} from './bench.ts';
import { type Load, runClosedLoop } from './closed-loop.ts';
import { missingPeft, peftName, startPeft } from './peft-batches.ts';
import { bySetting, type CaseRecord, numRounds, type SettingSeries } from './record.ts';
import { percent, type Table } from './report.ts';
import type { Contestant, Figures } from './rounds.ts';
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
import { type ShapeName, shapes } from './shapes.ts';
import { ratios, type Spread, spread } from './spread.ts';

const requestsPerClient = 2;
const outputTokens = 64;
const numAdapters = 32;
const residentFact = 'resident of ';

export async function measureClients(bench: Bench, shape: ShapeName): Promise<CaseRecord> {
  const loaded = await startAll(bench, shape);
  const series: SettingSeries[] = [];
  // Another seed in each run too, so that rounds which are added later have prompts of their own.
  let seed = Date.now() % 2 ** 31;
  try {
    for (const clients of bench.clients) {
      const load: Omit<Load, 'seed'> = {
        ...{ clients, requestsPerClient, promptTokens: contextTokens, outputTokens },
        ...{ vocabSize: shapes[shape].vocabSize, timeoutMs: 600_000 },
      };
      const contestants = [...loaded].map(([name, { run }]): Contestant => {
        return {
          name,
          measure: () => run({ ...load, seed: seed++ }),
          warmUp: async () => {
            await run({ ...load, requestsPerClient: 1, outputTokens: 4, seed: seed++ });
          },
        };
      });
      series.push(...(await compare(bench, `${shape}, clients`, `${clients}`, contestants)));
    }
    const facts = [...loaded].map(([name, { pid }]) => [residentFact + name, residentBytes(pid)]);
    return { case: 'clients', shape, series, facts: Object.fromEntries(facts) };
  } finally {
    for (const { stop } of loaded.values()) await stop();
  }
}

/** What takes a load: a server with clients before it, or PEFT. */
interface Loaded {
  pid: number;
  run: (load: Load) => Promise<Figures>;
  stop: () => Promise<void>;
}

async function startAll(bench: Bench, shape: ShapeName): Promise<Map<string, Loaded>> {
  const plan: Omit<ServerPlan, 'kind'> = {
    ...{ shape, adapters: largeAdapter, numAdapters, threads: bench.threads, formats: bench.formats },
    maxClients: Math.max(...bench.clients),
  };
  const loaded = new Map<string, Loaded>();
  const start = async (name: string, begin: () => Promise<Loaded>) => {
    bench.onProgress(`${shape}: start ${name}`);
    await begin().then(
      (one) => loaded.set(name, one),
      (error: Error) => bench.skip(name, error.message),
    );
  };
  const serve = async (server: Promise<PeerServer>): Promise<Loaded> => {
    const { url, pid, completion, stop } = await server;
    const run = (load: Load) =>
      runClosedLoop(url, (prompt, client) => completion(prompt, client, load.outputTokens), load);
    return { pid, run, stop };
  };
  if (bench.peers.has('motet'))
    await start(ourName('q4_0_all', bench.formats), () => serve(startMotet({ ...plan, kind: 'q4_0_all' })));
  const [build] = llamaBuilds(bench);
  if (build)
    await start('llama-server q4_0', () => serve(startLlamaServer(build, { ...plan, kind: 'q4_0' })));
  if (bench.peers.has('vllm')) {
    const missing = missingVllm();
    if (missing === null) await start(vllmName, () => serve(startVllm(plan, bench.cpus)));
    else bench.skip('vllm', missing);
  }
  if (bench.peers.has('transformers')) {
    const missing = missingPeft();
    if (missing === null) await start(peftName, () => startPeft(plan));
    else bench.skip('transformers', missing);
  }
  return loaded;
}

export function showClients(record: CaseRecord): Table[] {
  const rows = bySetting(record).flatMap(([setting, series]) => {
    const mine = series.find(({ name }) => name.startsWith(ours))?.figures.tokensPerSecond;
    const inSeconds = (values: number[]) => spread(values.map((ms) => ms / 1000));
    return series.map(({ name, figures, othersShare, failure }): (string | Spread)[] => {
      const { tokensPerSecond, ttftP50Ms, ttftP95Ms, tpotP50Ms } = figures;
      if (!tokensPerSecond || !ttftP50Ms || !ttftP95Ms || !tpotP50Ms)
        return [setting, name, `failed: ${failure}`];
      const ratio = mine && !name.startsWith(ours) ? ratios(mine, tokensPerSecond) : '';
      const times = [inSeconds(ttftP50Ms), inSeconds(ttftP95Ms), spread(tpotP50Ms)];
      return [setting, name, spread(tokensPerSecond), ratio, ...times, percent(othersShare)];
    });
  });
  const note =
    `${contextTokens} random prompt tokens, ${outputTokens} output tokens, ${requestsPerClient} requests a client one after ` +
    `another, streamed, greedy; each client on its own adapter of rank ${largeAdapter.rank} on all linear layers. Output tokens ` +
    `over the wall time, prefill included. ${medianNote(numRounds(record))} Resident after the load, with ${numAdapters} ` +
    `adapters: ${megabytes(record, residentFact)}.`;
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
  return [{ title: `Clients with an adapter each, ${shapes[record.shape].title}`, note, columns, rows }];
}
