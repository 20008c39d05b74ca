/**
 * What does it bring that KV of conversations stays, and goes down the memory ladder, while their users think? SmolLM2-135M in an
 * engine in this process. Each user holds one conversation of several turns; every turn sends all that was said. The KV of all
 * conversations together is several times the device arena. Variants take turns, each with an engine of its own:
 *
 *   off     no prefix cache: every turn computes its whole history
 *   device  what fits the device arena stays there
 *   host    what leaves the device comes back from the host arena, which holds everything
 *   disk    the host arena is as small as the device arena; what leaves it comes back from files, which hold everything
 *
 *   node tests/bench/conversations.ts                                                            about 18 minutes
 *   node tests/bench/conversations.ts --users 16 --prompt 60 --follow-up 20 --output 12 --rounds 1    about a minute
 *   … --variants off,host                          ratios are to the first
 *   … --svg FILE       draws the latencies by turn
 *
 * Conversations are drawn from a seed and answers are greedy, so that all variants have the same ones: the bench fails when a
 * single token differs. Throughput is output tokens over the time from the first turn to the last answer, think times included.
 * A variant that keeps up waits for its users, so that its throughput is bounded by their thinking; shorter think times show more.
 * Users begin at times drawn like think times, which are exponentially distributed, as in Pensieve (Yu et al., 2025, §6.1).
 */
import { createHash } from 'node:crypto';
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { parseArgs } from 'node:util';
import { pino } from 'pino';
import { KvDisk } from '../../engine/ladder/kv-disk.ts';
import { defaultSampling } from '../../engine/sampling.ts';
import { cpuInfo } from '../../native/index.ts';
import { open, prepare, smollm2Path } from '../fixtures/models.ts';
import { seededRandom } from '../fixtures/seeded-random.ts';
import { type WiredEngine, wireEngine } from '../fixtures/wire-engine.ts';
import { percentile, ratios, shortNumber, showSpread, spread } from './peers/spread.ts';
import { renderSvg } from './plot.ts';

const { values: options } = parseArgs({
  options: {
    users: { type: 'string', default: '50' },
    turns: { type: 'string', default: '6' },
    think: { type: 'string', default: '1' },
    prompt: { type: 'string', default: '150' },
    'follow-up': { type: 'string', default: '40' },
    output: { type: 'string', default: '48' },
    'times-device': { type: 'string', default: '4' },
    rounds: { type: 'string', default: '3' },
    variants: { type: 'string', default: 'off,device,host,disk' },
    svg: { type: 'string' },
  },
});

type NumberOption = Exclude<keyof typeof options, 'svg' | 'variants'>;
/** @returns the option's value, which is at least `least` */
function numberOf(name: NumberOption, least: number): number {
  const value = Number(options[name]);
  if (!(value >= least))
    throw new RangeError(`--${name}: expected a number from ${least}, got ${options[name]}`);
  return value;
}
const numUsers = numberOf('users', 1);
const numTurns = numberOf('turns', 2);
const thinkSeconds = numberOf('think', 0);
const promptTokens = numberOf('prompt', 1);
const followUpTokens = numberOf('follow-up', 1);
const outputTokens = numberOf('output', 2);
const timesDevice = numberOf('times-device', 1);
const numRounds = numberOf('rounds', 1);

const known = ['off', 'device', 'host', 'disk'] as const;
type Variant = (typeof known)[number];
/** Ratios are to the first. */
const variants = options.variants.split(',').map((given) => {
  const variant = known.find((name) => name === given);
  if (variant === undefined)
    throw new RangeError(`--variants: expected some of ${known.join(',')}, got ${given}`);
  return variant;
});
const [first, ...others] = variants;

interface Turn {
  /** From 1. */
  number: number;
  ttftMs: number;
  latencyMs: number;
  promptTokens: number;
  cachedTokens: number;
}

interface Run {
  turns: Turn[];
  seconds: number;
  numPreempted: number;
  /** Of all tokens of all conversations. */
  digest: string;
}

const model = await prepare(smollm2Path);
const longest = promptTokens + (numTurns - 1) * followUpTokens + numTurns * outputTokens;
const probe = await open(model, { deviceMemoryBytes: 16 << 20 });
const { blockTokens, pageBytes } = probe;
probe.close();
const kvPages = numUsers * Math.ceil(longest / blockTokens);
const devicePages = Math.floor(kvPages / timesDevice);
if (devicePages < Math.ceil(longest / blockTokens)) {
  throw new RangeError('--times-device: expected room for one conversation on the device; take more users');
}

async function run(variant: Variant): Promise<Run> {
  const hostPages = { off: 0, device: 0, host: kvPages, disk: devicePages }[variant];
  const runtime = await open(model, {
    deviceMemoryBytes: devicePages * pageBytes,
    hostMemoryBytes: hostPages * pageBytes,
  });
  const folder = await mkdtemp(join(tmpdir(), 'motet-conversations-'));
  let wired: WiredEngine | null = null;
  const disk =
    variant === 'disk'
      ? await KvDisk.open({
          folder,
          // A file takes whole 4 KiB and a head.
          budgetBytes: kvPages * (pageBytes + 8192),
          blockBytes: pageBytes,
          modelKey: createHash('sha256').update(smollm2Path).digest('hex'),
          rule: 'cost',
          restoreSeconds: (depth) => wired!.costs.prefillSeconds(blockTokens, depth * blockTokens),
          log: pino({ level: 'silent' }),
          now: () => performance.now(),
          wallClock: () => Date.now(),
        })
      : null;
  wired = wireEngine({
    runtime,
    limits: { maxModelLen: longest, maxBatchTokens: 256, maxSequences: 64, maxWaiting: numUsers },
    eosTokenIds: new Set(),
    createDetokenizer: () => ({ push: () => '', flush: () => '' }),
    tiers: { readFile: () => Promise.reject(new Error('no adapters here')), pageWaitMs: 10_000 },
    isCaching: variant !== 'off',
    disk,
  });
  const { engine, tiers, metrics, fatal } = wired;

  /** @returns what it took, and the answer's tokens */
  async function ask(tokens: readonly number[]): Promise<Omit<Turn, 'number'> & { answer: number[] }> {
    const { promise, resolve, reject } = Promise.withResolvers<void>();
    const askedMs = performance.now();
    let firstMs: number | null = null;
    const [handle] = engine.add([
      {
        promptTokens: tokens,
        adapters: [],
        params: { ...defaultSampling(), temperature: 0, ignoreEos: true, maxTokens: outputTokens },
        onOutput({ finishReason, error }) {
          firstMs ??= performance.now();
          if (error) reject(error);
          else if (finishReason) resolve();
        },
      },
    ]);
    await promise;
    const { sequence } = handle!;
    return {
      ttftMs: firstMs! - askedMs,
      latencyMs: performance.now() - askedMs,
      promptTokens: sequence.numPromptTokens,
      cachedTokens: sequence.numCachedTokens,
      answer: [...sequence.outputTokens],
    };
  }

  const turns: Turn[] = [];
  async function converse(user: number): Promise<number[]> {
    const random = seededRandom(user + 1);
    const think = () => sleep(-1000 * thinkSeconds * Math.log(1 - random.unit()));
    const message = (length: number) => Array.from({ length }, () => 10 + random.below(8000));
    const said: number[] = [];
    for (let number = 1; number <= numTurns; number++) {
      await think();
      said.push(...message(number === 1 ? promptTokens : followUpTokens));
      const { answer, ...turn } = await ask(said);
      said.push(...answer);
      turns.push({ number, ...turn });
    }
    return said;
  }

  await ask(Array.from({ length: blockTokens }, (_, i) => 9 + i)); // pages and threads are there then
  const beginMs = performance.now();
  const all = await Promise.all(Array.from({ length: numUsers }, (_, user) => converse(user)));
  const seconds = (performance.now() - beginMs) / 1000;
  if (fatal.length > 0) throw fatal[0];
  const { values } = await metrics.preemptions.get();
  await Promise.all([engine.close(), tiers.close()]);
  await disk?.close();
  runtime.close();
  await rm(folder, { recursive: true });
  const digest = createHash('sha256').update(Int32Array.from(all.flat())).digest('hex');
  return { turns, seconds, numPreempted: values.reduce((sum, { value }) => sum + value, 0), digest };
}

const mib = (pages: number) => `${((pages * pageBytes) / 2 ** 20).toFixed(0)} MiB`;
console.log(
  `SmolLM2-135M, ${numUsers} users, ${numTurns} turns, think time ${thinkSeconds} s in the mean; ` +
    `${promptTokens} tokens in the first message, ${followUpTokens} in later ones, ${outputTokens} in each answer`,
);
console.log(
  `KV of all: ${mib(kvPages)}, ${(kvPages / devicePages).toFixed(1)} × the device arena of ${mib(devicePages)}; ` +
    `${cpuInfo().isa}; ${numRounds} rounds, variants in turn\n`,
);

const runs: Record<Variant, Run[]> = { off: [], device: [], host: [], disk: [] };
for (let round = 0; round < numRounds; round++) {
  for (const variant of variants) {
    const done = await run(variant);
    runs[variant].push(done);
    process.stderr.write(`round ${round + 1}, ${variant}: ${done.seconds.toFixed(1)} s\n`);
    const { digest } = runs[first!][0]!;
    if (done.digest !== digest) throw new Error(`${variant}: expected the answers of ${first}, got others`);
  }
}

const throughput = (variant: Variant) =>
  runs[variant].map(({ seconds }) => (numUsers * numTurns * outputTokens) / seconds);
const each = (variant: Variant, of: (turns: Turn[]) => number) => runs[variant].map(({ turns }) => of(turns));
const latencies: [string, (turns: Turn[]) => number][] = [
  [
    'TTFT ms p50, first turn',
    (turns) =>
      percentile(
        turns.filter((turn) => turn.number === 1).map((turn) => turn.ttftMs),
        50,
      ),
  ],
  [
    'TTFT ms p50, later turns',
    (turns) =>
      percentile(
        turns.filter((turn) => turn.number > 1).map((turn) => turn.ttftMs),
        50,
      ),
  ],
  [
    'TTFT ms p95',
    (turns) =>
      percentile(
        turns.map((turn) => turn.ttftMs),
        95,
      ),
  ],
  [
    'turn ms p50',
    (turns) =>
      percentile(
        turns.map((turn) => turn.latencyMs),
        50,
      ),
  ],
  [
    'turn ms p95',
    (turns) =>
      percentile(
        turns.map((turn) => turn.latencyMs),
        95,
      ),
  ],
];
const sum = (turns: Turn[], field: 'promptTokens' | 'cachedTokens') =>
  turns.reduce((total, turn) => total + turn[field], 0);
const cachedPercent = (turns: Turn[]) => (100 * sum(turns, 'cachedTokens')) / sum(turns, 'promptTokens');

const title = ['', ...variants, ...others.map((variant) => `${variant} / ${first}`)];
console.log(`| ${title.join(' | ')} |`);
console.log(`|${title.map(() => '---|').join('')}`);
const rows: [string, (variant: Variant) => number[]][] = [
  ['output tokens/s', throughput],
  ...latencies.map(([name, of]): (typeof rows)[number] => [name, (variant) => each(variant, of)]),
];
for (const [name, of] of rows) {
  const cells = [
    ...variants.map((variant) => showSpread(spread(of(variant)))),
    ...others.map((variant) => showSpread(ratios(of(variant), of(first!)))),
  ];
  console.log(`| ${name} | ${cells.join(' | ')} |`);
}
const cached = variants.map((variant) => `${shortNumber(spread(each(variant, cachedPercent)).median)} %`);
const noRatios = ' |'.repeat(others.length);
console.log(`| prompt tokens from the cache | ${cached.join(' | ')} |${noRatios}`);
const preempted = variants.map((variant) =>
  shortNumber(spread(runs[variant].map((one) => one.numPreempted)).median),
);
console.log(`| preemptions | ${preempted.join(' | ')} |${noRatios}`);
console.log(
  '\nMedians of the rounds (lowest–highest); ratios are made round by round. All answers are the same in all variants.',
);

if (options.svg !== undefined) {
  const byTurn = (of: (turn: Turn) => number) =>
    variants.map((variant) => ({
      name: `${variant}: ${shortNumber(spread(throughput(variant)).median)} output tokens/s`,
      points: Array.from({ length: numTurns }, (_, i) => {
        const medians = each(variant, (turns) =>
          percentile(turns.filter(({ number }) => number === i + 1).map(of), 50),
        );
        const { median, low, high } = spread(medians);
        return { x: i + 1, y: median / 1000, low: low / 1000, high: high / 1000 };
      }),
    }));
  const x = { label: 'turn of the conversation', scale: 'linear' } as const;
  const what = `${numUsers} users, KV ${(kvPages / devicePages).toFixed(1)} × the device arena`;
  const svg = renderSvg([
    {
      title: `Time to the first token, ${what}`,
      x,
      y: { label: 'median, seconds', scale: 'linear' },
      series: byTurn(({ ttftMs }) => ttftMs),
    },
    {
      title: `Turn latency, ${what}`,
      x,
      y: { label: 'median, seconds', scale: 'linear' },
      series: byTurn(({ latencyMs }) => latencyMs),
    },
  ]);
  await writeFile(options.svg, svg);
}
