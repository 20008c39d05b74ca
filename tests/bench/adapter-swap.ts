/**
 * What does it take to bring an adapter back from the host arena, next to a copy of as many bytes, and what do others who
 * decode feel of it? SmolLM2-135M in an engine in this process, adapters of rank 16 on all linear layers.
 *
 *   node tests/bench/adapter-swap.ts
 *
 * Time: from the moment that the pages are there until the adapter can be run; the copy of as many bytes between buffers is done
 * in between, over memory that no cache holds. Decode: rounds with swaps and rounds without take turns.
 */
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { readAdapterFile } from '../../engine/adapters/adapter-file.ts';
import type { Adapter } from '../../engine/adapters/adapter-tiers.ts';
import { alone } from '../../engine/adapters/composition.ts';
import { defaultSampling } from '../../engine/sampling.ts';
import { cpuInfo } from '../../native/index.ts';
import { open, prepare, smollm2Path } from '../fixtures/models.ts';
import { wireEngine } from '../fixtures/wire-engine.ts';
import { allLinear, writeRandomAdapter } from './random-adapter.ts';

const numSwaps = 100;
const numRounds = 6;
const numVoices = 8;
const outputTokens = 120;

const folder = await mkdtemp(join(tmpdir(), 'motet-swap-'));
const model = await prepare(smollm2Path);
const runtime = await open(model, { deviceMemoryBytes: 256 << 20, hostMemoryBytes: 512 << 20 });
const { engine, tiers } = wireEngine({
  runtime,
  limits: { maxModelLen: 1024, maxBatchTokens: 256, maxSequences: 64, maxWaiting: 64 },
  eosTokenIds: new Set(),
  createDetokenizer: () => ({ push: () => '', flush: () => '' }),
  tiers: { readFile: (path) => readAdapterFile(path, model.dims, { maxRank: 64 }), pageWaitMs: 10_000 },
});

const adapters: Adapter[] = [];
for (let i = 0; i < 24; i++) {
  const path = join(folder, `${i}`);
  await writeRandomAdapter(path, model.dims, 16, allLinear, i);
  adapters.push(await tiers.load(`${i}`, path, false));
}
while (adapters.some(({ host }) => host === null)) await new Promise((resolve) => setTimeout(resolve, 10));
const numBytes = adapters[0]!.numPages * runtime.pageBytes;

/** One sequence. @returns its time to the first token, in milliseconds */
function run(
  adapter: Adapter | null,
  seed: number,
  maxTokens: number,
): { first: Promise<number>; end: Promise<void> } {
  const first = Promise.withResolvers<number>();
  const end = Promise.withResolvers<void>();
  const beginMs = performance.now();
  engine.add([
    {
      promptTokens: Array.from({ length: 16 }, (_, i) => (i * seed + 11) % 4000),
      adapters: alone(adapter),
      params: { ...defaultSampling(), temperature: 0, ignoreEos: true, maxTokens },
      onOutput({ finishReason, error }) {
        if (error) end.reject(error);
        first.resolve(performance.now() - beginMs);
        if (finishReason) end.resolve();
      },
    },
  ]);
  return { first: first.promise, end: end.promise };
}

/** Two buffers that are larger than any cache, copied piece by piece. */
const from = Buffer.alloc(512 << 20, 1);
const to = Buffer.alloc(512 << 20, 2);
let at = 0;
function copySeconds(): number {
  if (at + numBytes > from.length) at = 0;
  const beginMs = performance.now();
  from.copy(to, at, at, at + numBytes);
  at += numBytes;
  return (performance.now() - beginMs) / 1000;
}

const quartiles = (values: number[]) => {
  const sorted = values.toSorted((a, b) => a - b);
  return [0.25, 0.5, 0.75].map((q) => sorted[Math.floor(q * (sorted.length - 1))]!);
};
const show = (values: number[], unit: string) =>
  `${quartiles(values)
    .map((value) => value.toFixed(2))
    .join(' / ')} ${unit} (quartiles of ${values.length})`;

console.log(
  `SmolLM2-135M, rank 16 on all linear layers: ${adapters[0]!.numPages} pages, ${(numBytes / 2 ** 20).toFixed(1)} MiB`,
);
console.log(`${cpuInfo().isa}, ${runtime.numThreads} threads`);

const swapMs: number[] = [];
const copyMs: number[] = [];
const ttftMs: number[] = [];
for (let i = 0; i < numSwaps; i++) {
  const adapter = adapters[i % adapters.length]!;
  tiers.residency.evictWaiting();
  const { first, end } = run(adapter, i, 2);
  ttftMs.push(await first);
  await end;
  swapMs.push(1000 * adapter.seconds.host);
  copyMs.push(1000 * copySeconds());
}
console.log(`swap, copied and attached: ${show(swapMs, 'ms')}`);
console.log(`a copy of as many bytes:   ${show(copyMs, 'ms')}`);
// Pair by pair, since both of a pair see the same moment of the machine.
const shares = swapMs.map((ms, i) => (100 * copyMs[i]!) / ms);
console.log(`bandwidth of a swap:       ${show(shares, "% of the copy's")}`);
console.log(`to the first token of a request with a swap: ${show(ttftMs, 'ms')}`);

/** @returns tokens per second of the voices */
async function decodeRate(withSwaps: boolean): Promise<number> {
  const beginMs = performance.now();
  let isOver = false;
  const voices = Array.from({ length: numVoices }, (_, i) => run(null, 100 + i, outputTokens).end);
  const swaps = (async () => {
    for (let i = 0; withSwaps && !isOver && i < numSwaps / numRounds; i++) {
      const adapter = adapters[i % adapters.length]!;
      if (adapter.device) tiers.residency.evictWaiting();
      await tiers.residency.whileMoving(adapter, () =>
        tiers.residency.raise(adapter, 'name', { leave: (wait) => wait() }),
      );
    }
  })();
  await Promise.all(voices);
  isOver = true;
  const rate = (numVoices * outputTokens) / ((performance.now() - beginMs) / 1000);
  await swaps;
  return rate;
}
const plain: number[] = [];
const swapped: number[] = [];
await decodeRate(false);
for (let round = 0; round < numRounds; round++) {
  plain.push(await decodeRate(false));
  swapped.push(await decodeRate(true));
}
const slower = swapped.map((rate, i) => 100 * (1 - rate / plain[i]!));
console.log(`decode of ${numVoices} sequences: ${show(plain, 'tokens/s')}`);
console.log(`with ${Math.ceil(numSwaps / numRounds)} swaps beside it: ${show(swapped, 'tokens/s')}`);
console.log(`slower by: ${show(slower, '%')}`);

await Promise.all([engine.close(), tiers.close()]);
runtime.close();
await rm(folder, { recursive: true });
