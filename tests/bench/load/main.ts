/** `motet bench`: reads options, finds or starts a server, warms it up, loads it, reports. Wiring only. */
import { access, constants, writeFile } from 'node:fs/promises';
import { availableParallelism, cpus } from 'node:os';
import { dirname } from 'node:path';
import { Agent } from 'undici';
import packageJson from '../../../package.json' with { type: 'json' };
import { seededRandom } from '../../fixtures/seeded-random.ts';
import { sendStreamed, type Wire } from './client.ts';
import { describeLoad, type Machine } from './describe.ts';
import { findModels } from './models.ts';
import { type LoadOptions, OptionError, parseOptions } from './options.ts';
import type { OwnServer, ServerFacts } from './own-server.ts';
import { startProgress } from './progress.ts';
import { e2eMs, Reservoir, renderPage, type Summary, summarise, tpotMs, ttftMs } from './report.ts';
import { type RunHooks, runLoad, type Sample, wallClock } from './run.ts';
import { createWorkload, type Workload } from './workload.ts';

/** Gaps that are kept; a longer run keeps a random sample of that many. */
const maxGaps = 1 << 20;
const defaultColumns = 100;

/** @returns the exit code */
export async function bench(args: readonly string[]): Promise<number> {
  let options: LoadOptions;
  try {
    const parsed = parseOptions(args, process.env);
    if ('help' in parsed) {
      process.stdout.write(parsed.help);
      return 0;
    }
    options = parsed;
    await assertWritable(options.jsonPath);
  } catch (error) {
    return refused(error);
  }

  const interrupt = new AbortController();
  let interruptedMs: number | null = null;
  const onSignal = () => {
    // A terminal and npm may each send the same Ctrl-C, so only a later one means "at once".
    if (interruptedMs !== null && performance.now() - interruptedMs > 1000) process.exit(130);
    if (interruptedMs === null) say('stopping; what was measured is reported');
    interruptedMs ??= performance.now();
    interrupt.abort();
  };
  for (const name of ['SIGINT', 'SIGTERM'] as const) process.on(name, onSignal);
  let own: OwnServer | null = null;
  const dispatcher = new Agent({ pipelining: 1 });
  try {
    const { server } = options;
    if ('own' in server) {
      // The engine's parts are loaded only when one is started: a client machine needs no native core.
      const { startOwnServer } = await import('./own-server.ts');
      own = await startOwnServer(server.own, interrupt.signal, say);
    }
    const target = 'own' in server ? { url: own!.url, apiKey: process.env.MOTET_API_KEY || null } : server;
    const isDone = await load(options, target, own?.facts ?? null, dispatcher, interrupt.signal);
    return interrupt.signal.aborted ? 130 : isDone ? 0 : 1;
  } catch (error) {
    if (interrupt.signal.aborted) {
      say('nothing was measured');
      return 130;
    }
    return refused(error);
  } finally {
    await dispatcher.destroy();
    await own?.stop();
    for (const name of ['SIGINT', 'SIGTERM'] as const) process.off(name, onSignal);
  }
}

/** Before the run, which would be for nothing otherwise. */
async function assertWritable(jsonPath: string | null): Promise<void> {
  if (jsonPath === null) return;
  await access(dirname(jsonPath), constants.W_OK).catch(({ code }: NodeJS.ErrnoException) => {
    throw new OptionError(
      `--json: expected a file in a folder that can be written, got ${code} of ${jsonPath}`,
    );
  });
}

function refused(error: unknown): number {
  process.stderr.write(`motet bench: ${(error as Error).message}\n`);
  return error instanceof OptionError ? 2 : 1;
}

function say(text: string): void {
  process.stderr.write(`${text}\n`);
}

/** @returns whether a request was answered */
async function load(
  options: LoadOptions,
  { url, apiKey }: { url: string; apiKey: string | null },
  facts: ServerFacts | null,
  dispatcher: Agent,
  signal: AbortSignal,
): Promise<boolean> {
  const { endpoint, adapterField, temperature, ignoresEos, timeoutMs, pacing, seed } = options;
  const models = await findModels(dispatcher, url, apiKey, options);
  const wire: Wire = { url, apiKey, endpoint, adapterField, temperature, ignoresEos, timeoutMs, ...models };
  const shape = { ...options, numAdapters: wire.adapters.length };
  const send = sendStreamed.bind(null, dispatcher, wire);

  // First turns warm up what later ones use.
  const warmup = createWorkload(
    { ...shape, conversations: shape.conversations && { ...shape.conversations, numTurns: 1 } },
    'warmup',
  );
  if (options.numWarmup > 0) await warmUp(options, warmup, send, signal);

  const samples: Sample[] = [];
  const gaps = new Reservoir(maxGaps, seededRandom(seed).unit);
  const progress = startProgress(options);
  const startedAt = new Date().toISOString();
  const cpuBefore = process.cpuUsage();
  const beginMs = performance.now();
  await runLoad(
    {
      workload: createWorkload(shape),
      pacing,
      seed,
      numRequests: options.numRequests,
      durationMs: options.durationSeconds === null ? null : options.durationSeconds * 1000,
    },
    {
      send,
      signal,
      clock: wallClock,
      onSample(sample, gapsMs) {
        samples.push(sample);
        if (sample.code === 'ok') for (const gap of gapsMs) gaps.add(gap);
        progress.add(sample);
      },
    },
  );
  const { user, system } = process.cpuUsage(cpuBefore);
  const clientCores = (user + system) / 1000 / (performance.now() - beginMs);
  progress.end();

  const summary = summarise(samples, gaps.values, wire.adapters, options.slo);
  const machine = await thisMachine();
  const head = describeLoad(options, wire, facts, machine, clientCores);
  const ttfts = samples.filter(({ code }) => code === 'ok').map(ttftMs);
  const { stdout } = process;
  stdout.write(
    renderPage(summary, { ttftMs: ttfts, itlMs: gaps.values }, head, {
      columns: stdout.columns ?? defaultColumns,
      isPlain: !stdout.isTTY,
    }),
  );
  if (options.jsonPath !== null) {
    const report = { startedAt, options, wire, facts, machine, clientCores, summary, gaps, samples };
    await writeFile(options.jsonPath, `${JSON.stringify(toJson(report), null, 2)}\n`);
  }
  return summary.numDone > 0;
}

/** Sends requests that are not reported. @throws Error when none is answered: what follows would fail alike */
async function warmUp(
  { numWarmup, pacing, seed }: LoadOptions,
  workload: Workload,
  send: RunHooks['send'],
  signal: AbortSignal,
): Promise<void> {
  const concurrency = pacing.kind === 'closed' ? pacing.concurrency : Math.min(8, pacing.maxInFlight);
  const failures: Sample[] = [];
  await runLoad(
    {
      workload,
      pacing: { kind: 'closed', concurrency },
      seed,
      numRequests: numWarmup,
      durationMs: null,
    },
    {
      send,
      signal,
      clock: wallClock,
      onSample(sample) {
        if (sample.code !== 'ok') failures.push(sample);
      },
    },
  );
  signal.throwIfAborted();
  if (failures.length < numWarmup) return;
  const { code, message } = failures[0]!;
  throw new Error(`no request of the warm-up was answered; the first one: ${code}: ${message}`);
}

async function thisMachine(): Promise<Machine> {
  const native = await import('../../../native/index.ts').catch(() => null);
  return {
    cpu: cpus()[0]?.model ?? 'unknown',
    numCpus: availableParallelism(),
    isa: native?.cpuInfo().isa ?? null,
  };
}

interface Report {
  startedAt: string;
  options: LoadOptions;
  wire: Wire;
  facts: ServerFacts | null;
  machine: Machine;
  clientCores: number;
  summary: Summary;
  gaps: Reservoir;
  samples: readonly Sample[];
}

/** The whole report without the key. Times are in milliseconds unless their names say otherwise. */
function toJson({ startedAt, options, wire, facts, machine, clientCores, summary, gaps, samples }: Report) {
  const { server: _server, hasJsonSamples, jsonPath: _jsonPath, ...load } = options;
  return {
    motet: packageJson.version,
    node: process.version,
    startedAt,
    client: { ...machine, cores: clientCores },
    server: { url: wire.url, baseModel: wire.baseModel, adapters: wire.adapters, startedHere: facts },
    load,
    summary: { ...summary, itlMs: summary.itlMs && { ...summary.itlMs, count: gaps.numSeen } },
    ...(hasJsonSamples
      ? {
          samples: samples.map((sample) => ({
            ...sample,
            turn: sample.turn + 1,
            adapter: sample.adapter === null ? null : wire.adapters[sample.adapter],
            ttftMs: sample.firstMs === null ? null : ttftMs(sample),
            tpotMs: sample.firstMs === null ? null : tpotMs(sample),
            e2eMs: e2eMs(sample),
          })),
        }
      : {}),
  };
}
