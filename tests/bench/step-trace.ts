/**
 * How long does the native side wait between two steps, and what does JavaScript allocate for a token? SmolLM2-135M in
 * an engine in this process; tokens become text and stream events that nobody reads. Steps planned ahead and steps
 * planned one by one take turns, so that a busy moment of the machine hits both alike.
 *
 *   node tests/bench/step-trace.ts [FILE]    writes the last rounds as a Chrome trace (chrome://tracing, ui.perfetto.dev)
 */
import { writeFile } from 'node:fs/promises';
import { type HeapProfiler, Session } from 'node:inspector/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { Engine } from '../../engine/engine.ts';
import { readBaseModel } from '../../engine/model/base-model.ts';
import { openTextModel } from '../../engine/model/text-model.ts';
import { completionFormat } from '../../engine/openai-reply.ts';
import { defaultSampling } from '../../engine/sampling.ts';
import { cpuInfo, type Runtime } from '../../native/index.ts';
import { open, prepare, smollm2Path } from '../fixtures/models.ts';
import { wireEngine } from '../fixtures/wire-engine.ts';

const numRounds = 5;
const outputTokens = { 1: 150, 8: 75, 32: 40 };
/** Steps that fill and empty the batch are not looked at. */
const numStepsSkipped = 8;
const traceSteps = 40;

interface Span {
  track: 'native' | 'javascript';
  name: string;
  beginMs: number;
  endMs: number;
}

/** As process.hrtime(), which is the native side's clock. */
const now = () => Number(process.hrtime.bigint()) / 1e6;

const text = await openTextModel(await readBaseModel(smollm2Path, 'keep'));
const prompt = text.encode('The sea was calm when', { addSpecialTokens: false });
const runtime = await open(await prepare(smollm2Path), { deviceMemoryBytes: 512 * 2 ** 20 });
/** Of the engine that runs; emptied before each run. */
let spans: Span[] = [];

/** The runtime, with a span for each step. */
const traced = new Proxy(runtime, {
  get(target, key) {
    if (key !== 'step') {
      const value = Reflect.get(target, key);
      return typeof value === 'function' ? value.bind(target) : value;
    }
    return async (batch: Parameters<Runtime['step']>[0]) => {
      const name = `step of ${batch.sequenceStarts.length - 1}`;
      const result = await target.step(batch);
      spans.push({ track: 'native', name, beginMs: result.beganMs, endMs: result.endedMs });
      return result;
    };
  },
});

function startEngine(maxStepsInFlight: 1 | 2): Engine {
  return wireEngine({
    runtime: traced,
    limits: { maxModelLen: 1024, maxBatchTokens: 256, maxSequences: 32, maxWaiting: 64 },
    eosTokenIds: new Set(),
    createDetokenizer: text.createDetokenizer,
    tiers: { readFile: () => Promise.reject(new Error('no adapters here')), pageWaitMs: 1 },
    now,
    maxStepsInFlight,
    onSpan: (name, beginMs, endMs) => spans.push({ track: 'javascript', name, beginMs, endMs }),
  }).engine;
}

function generate(engine: Engine, seed: number, maxTokens: number): Promise<void> {
  const { promise, resolve } = Promise.withResolvers<void>();
  const head = { id: completionFormat.newId(), created: 0, model: 'base' };
  const events = completionFormat.stream(head, text, false);
  engine.add([
    {
      promptTokens: prompt,
      adapters: [],
      params: { ...defaultSampling(), seed: BigInt(seed), ignoreEos: true, maxTokens },
      onOutput(output) {
        events.delta(0, output);
        if (output.finishReason) resolve();
      },
    },
  ]);
  return promise;
}

async function run(engine: Engine, batch: number, maxTokens: number): Promise<Span[]> {
  spans = [];
  await Promise.all(Array.from({ length: batch }, (_, i) => generate(engine, i, maxTokens)));
  return spans;
}

const quantile = (values: number[], part: number) =>
  values.toSorted((a, b) => a - b)[Math.min(values.length - 1, Math.floor(values.length * part))]!;

/** Between full decode steps: their lengths, and the gaps before them. */
function gapsOf(ran: Span[], batch: number): { stepMs: number; gapMs: number }[] {
  const steps = ran.filter(({ track }) => track === 'native').slice(numStepsSkipped, -numStepsSkipped);
  return steps.slice(1).flatMap(({ name, beginMs, endMs }, i) => {
    const isFull = name === `step of ${batch}`;
    return isFull ? [{ stepMs: endMs - beginMs, gapMs: beginMs - steps[i]!.endMs }] : [];
  });
}

function rowOf(gaps: { stepMs: number; gapMs: number }[]): Record<string, string> {
  const steps = gaps.map(({ stepMs }) => stepMs);
  const microseconds = gaps.map(({ gapMs }) => 1000 * gapMs);
  const shares = gaps.map(({ stepMs, gapMs }) => (100 * gapMs) / stepMs);
  const show = (values: number[], digits: number) =>
    `${quantile(values, 0.5).toFixed(digits)} (${quantile(values, 0.95).toFixed(digits)})`;
  return {
    'step, ms': show(steps, 2),
    'gap, µs': show(microseconds, 0),
    'gap, % of the step': show(shares, 2),
  };
}

/** Bytes by the function that allocated them, garbage included. */
async function allocationsOf(work: () => Promise<unknown>): Promise<Map<string, number>> {
  const session = new Session();
  session.connect();
  await session.post('HeapProfiler.startSampling', {
    samplingInterval: 4096,
    includeObjectsCollectedByMajorGC: true,
    includeObjectsCollectedByMinorGC: true,
  });
  await work();
  const { profile } = await session.post('HeapProfiler.stopSampling');
  session.disconnect();
  const bytes = new Map<string, number>();
  const visit = (node: HeapProfiler.SamplingHeapProfileNode, caller: string) => {
    const { url, functionName, lineNumber } = node.callFrame;
    const file = url.replace(/^.*\/(node_modules|engine|tests|native)\//, '$1/');
    const place = file === '' ? `in ${caller}` : `${file}:${lineNumber + 1}`;
    const name = `${functionName || '(anonymous)'} ${place}`;
    bytes.set(name, (bytes.get(name) ?? 0) + node.selfSize);
    for (const child of node.children) visit(child, name);
  };
  visit(profile.head, '');
  return bytes;
}

function traceOf(runs: { name: string; spans: Span[] }[]): string {
  const events = runs.flatMap(({ name, spans }, pid) => {
    const tid = (track: Span['track']) => (track === 'native' ? 1 : 2);
    const named = (what: string, args: object, track: Span['track'] = 'native') => ({
      ...{ name: what, ph: 'M', pid, tid: tid(track), args },
    });
    return [
      named('process_name', { name }),
      named('thread_name', { name: 'native' }),
      named('thread_name', { name: 'JavaScript' }, 'javascript'),
      ...spans.map(({ track, name, beginMs, endMs }) => ({
        ...{ name, ph: 'X', pid, tid: tid(track), ts: 1000 * beginMs, dur: 1000 * (endMs - beginMs) },
      })),
    ];
  });
  return JSON.stringify({ traceEvents: events });
}

const variants = { ahead: startEngine(2), 'one by one': startEngine(1) };
const rows: Record<string, Record<string, string>> = {};
const traces: { name: string; spans: Span[] }[] = [];
for (const [key, maxTokens] of Object.entries(outputTokens)) {
  const batch = Number(key);
  const gaps: Record<string, ReturnType<typeof gapsOf>> = {};
  for (const engine of Object.values(variants)) await run(engine, batch, maxTokens); // warm-up
  for (let round = 0; round < numRounds; round++) {
    for (const [variant, engine] of Object.entries(variants)) {
      const ran = await run(engine, batch, maxTokens);
      gaps[variant] = [...(gaps[variant] ?? []), ...gapsOf(ran, batch)];
      if (round < numRounds - 1) continue;
      const middle = ran[ran.length >> 1]!.beginMs;
      const shown = ran.filter(({ beginMs }) => beginMs >= middle).slice(0, 3 * traceSteps);
      traces.push({ name: `batch ${batch}, planned ${variant}`, spans: shown });
    }
  }
  for (const variant of Object.keys(variants)) {
    rows[`batch ${batch}, planned ${variant}`] = rowOf(gaps[variant]!);
  }
}
console.log(
  `SmolLM2-135M; ${cpuInfo().isa}, ${runtime.numThreads} threads; median (p95) over the full decode steps of ` +
    `${numRounds} rounds, variants in turn`,
);
console.table(rows);

const numTokens = 32 * outputTokens[32];
const allocations = await allocationsOf(() => run(variants.ahead, 32, outputTokens[32]));
const total = [...allocations.values()].reduce((sum, bytes) => sum + bytes, 0);
console.log(`JavaScript allocates ${Math.round(total / numTokens)} bytes a token at batch 32; by function:`);
for (const [name, bytes] of [...allocations].sort(([, a], [, b]) => b - a).slice(0, 20)) {
  console.log(`${(bytes / numTokens).toFixed(1).padStart(8)}  ${name}`);
}

const file = process.argv[2] ?? join(tmpdir(), 'motet-step-trace.json');
await writeFile(file, traceOf(traces));
console.log(`trace: ${file}`);
await Promise.all(Object.values(variants).map((engine) => engine.close()));
runtime.close();
