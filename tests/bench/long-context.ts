/**
 * What does a context cost that the device arena has no room for? SmolLM2-135M in two engines in this process: one whose device
 * arena holds the whole context, and one with a part of it there and the rest in the host arena. They take turns.
 *
 *   node tests/bench/long-context.ts                  4,000 tokens in, 64 out, 4× the device arena, 3 rounds: about 2 minutes
 *   node tests/bench/long-context.ts 1500 32 4 2      1,500 tokens in, 32 out, 4×, 2 rounds
 *
 * Prefill is the prompt's tokens over the time to the first token, decode the others over the rest. Both engines must give the
 * same tokens. On the CPU both arenas are RAM, so what is measured is the way through the staging area, not a bus.
 */
import { defaultSampling } from '../../engine/sampling.ts';
import { cpuInfo } from '../../native/index.ts';
import { open, prepare, smollm2Path } from '../fixtures/models.ts';
import { wireEngine } from '../fixtures/wire-engine.ts';

const [numPrompt = 4000, numOutput = 64, factor = 4, numRounds = 3] = process.argv.slice(2).map(Number);
const maxBatchTokens = 256;
const blockTokens = 16;

const model = await prepare(smollm2Path);
const numBlocks = Math.ceil((numPrompt + numOutput) / blockTokens);
const probe = await open(model, { deviceMemoryBytes: 2 ** 26 });
const { pageBytes } = probe;
probe.close();
const numDevicePages = Math.floor(numBlocks / factor);

async function start(devicePages: number, hostPages: number) {
  const runtime = await open(model, {
    deviceMemoryBytes: devicePages * pageBytes,
    hostMemoryBytes: hostPages * pageBytes,
  });
  const wired = wireEngine({
    runtime,
    limits: { maxModelLen: numPrompt + numOutput, maxBatchTokens, maxSequences: 8, maxWaiting: 8 },
    eosTokenIds: new Set(),
    createDetokenizer: () => ({ push: () => '', flush: () => '' }),
    tiers: { readFile: () => Promise.reject(new Error('no adapters here')), pageWaitMs: 1000 },
    isCaching: false,
  });
  return { ...wired, runtime };
}
type Started = Awaited<ReturnType<typeof start>>;

interface Run {
  tokens: number[];
  prefill: number;
  decode: number;
}

const promptTokens = Int32Array.from(
  { length: numPrompt },
  (_, i) => (i * 7919 + (i >> 5) * 31 + 11) % 40_000,
);
function run({ engine }: Started): Promise<Run> {
  const beginMs = performance.now();
  let firstMs = 0;
  return new Promise((resolve, reject) => {
    const [handle] = engine.add([
      {
        promptTokens,
        adapters: [],
        params: { ...defaultSampling(), temperature: 0, ignoreEos: true, maxTokens: numOutput },
        onOutput({ finishReason, error }) {
          if (error) return reject(error);
          firstMs ||= performance.now();
          if (!finishReason) return;
          const prefill = numPrompt / ((firstMs - beginMs) / 1000);
          const decode = (numOutput - 1) / ((performance.now() - firstMs) / 1000);
          resolve({ tokens: [...handle!.sequence.outputTokens], prefill, decode });
        },
      },
    ]);
  });
}

const whole = await start(numBlocks + 1, 0);
const small = await start(numDevicePages, numBlocks);
const mib = (pages: number) => `${((pages * pageBytes) / 2 ** 20).toFixed(0)} MiB`;
console.log(
  `${numPrompt} tokens in, ${numOutput} out: ${mib(numBlocks)} of KV; device arenas ${mib(whole.runtime.numPages)} and ${mib(numDevicePages)}; ` +
    `batches of ${maxBatchTokens}; ${cpuInfo().isa}, ${whole.runtime.numThreads} threads\n`,
);
const runs: Record<'whole' | 'small', Run[]> = { whole: [], small: [] };
let streamedBytes = 0;
for (let round = 0; round < numRounds; round++) {
  runs.whole.push(await run(whole));
  runs.small.push(await run(small));
  const metric = await small.metrics.registry.getSingleMetric('motet_kv_streamed_bytes_total')!.get();
  streamedBytes = metric.values[0]!.value;
}
const expected = runs.whole[0]!.tokens.join();
const areEqual = [...runs.whole, ...runs.small].every(({ tokens }) => tokens.join() === expected);
console.log('                     on the device        with the host       ratio (least to most)');
for (const what of ['prefill', 'decode'] as const) {
  const [a, b] = [runs.whole, runs.small].map((all) => all.map((each) => each[what]));
  const ratios = b!.map((value, i) => value / a![i]!);
  const cell = (values: number[]) => `${median(values).toFixed(1)} tokens/s`.padStart(20);
  const spread = `${Math.min(...ratios).toFixed(2)} to ${Math.max(...ratios).toFixed(2)}`;
  console.log(`${what.padEnd(12)}${cell(a!)}${cell(b!)}      ${median(ratios).toFixed(2)} (${spread})`);
}
console.log(`\n${(streamedBytes / numRounds / 2 ** 30).toFixed(1)} GiB streamed a run`);
console.log(areEqual ? 'all runs gave the same tokens' : 'THE TOKENS DIFFER');
for (const { engine, tiers, runtime, fatal } of [whole, small]) {
  await Promise.all([engine.close(), tiers.close()]);
  runtime.close();
  if (fatal.length > 0) throw fatal[0];
}
if (!areEqual) process.exitCode = 1;

function median(values: number[]): number {
  return values.toSorted((a, b) => a - b)[values.length >> 1]!;
}
