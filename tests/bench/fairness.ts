/**
 * What is left to others when one tenant floods, and do weights give what they say? Real gateway and real engine (SmolLM2-135M).
 *
 *   node tests/bench/fairness.ts                   1 round of 4 s + 4 x 12 s
 *   node tests/bench/fairness.ts --rounds 3 --seconds 30
 *
 * Capacity is measured first. Then nine tenants ask, each in an open loop, for 0.6 of a tenth of it: alone; beside three others that behave
 * too and have one request each at any time, so that seats are as busy as a flood makes them; and beside a tenth tenant that asks for three
 * times all of it. At last three tenants of weights 1, 2 and 4 that always have requests waiting ask the engine itself, by the
 * headers that a gateway sets: a gateway outside a cluster has no weights.
 */
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { parseArgs } from 'node:util';
import { Agent, request } from 'undici';
import { formatStanding } from '../../engine/protocol.ts';
import { startGatewayOver, startSmollm2 } from '../fixtures/processes.ts';
import { seededRandom } from '../fixtures/seeded-random.ts';
import { percentile, ratios, shortNumber, showSpread, spread } from './peers/spread.ts';

const { values: options } = parseArgs({
  options: {
    rounds: { type: 'string', default: '1' },
    seconds: { type: 'string', default: '12' },
    seed: { type: 'string', default: '1' },
  },
});
const [numRounds, seconds, seed] = (['rounds', 'seconds', 'seed'] as const).map((name) => {
  const value = Number(options[name]);
  if (!Number.isInteger(value) || value < 1)
    throw new RangeError(`--${name}: expected an integer from 1, got ${options[name]}`);
  return value;
}) as [number, number, number];

const numSeats = 8;
const maxTokens = 16;
const maxOpenOfFlood = 200;
const calm = Array.from({ length: 3 }, (_, i) => `calm-${i}`);
const behaving = Array.from({ length: 9 }, (_, i) => `tenant-${i}`);
const keyOf = (tenant: string) => `key-of-${tenant}-0123456789`;

interface Answered {
  ttftMs: number;
  endedMs: number;
}

const agent = new Agent({ connections: 512 });

/** One streamed request; null: refused, or it was cut off. */
async function ask(
  url: string,
  headers: Record<string, string>,
  signal: AbortSignal,
): Promise<Answered | null> {
  const beganMs = performance.now();
  try {
    const { statusCode, body } = await request(`${url}/v1/completions`, {
      method: 'POST',
      headers: { 'content-type': 'application/json', ...headers },
      body: JSON.stringify({
        ...{ model: 'base', prompt: `Number ${Math.random()} is`, max_tokens: maxTokens },
        ...{ ignore_eos: true, stream: true },
      }),
      dispatcher: agent,
      signal,
    });
    let ttftMs: number | null = null;
    for await (const chunk of body)
      if (/"text":"[^"]/.test(String(chunk))) ttftMs ??= performance.now() - beganMs;
    if (statusCode === 200)
      return { ttftMs: ttftMs ?? performance.now() - beganMs, endedMs: performance.now() };
  } catch (error) {
    if (!signal.aborted) throw error;
  }
  return null;
}

const asTenant = (tenant: string) => ({ authorization: `Bearer ${keyOf(tenant)}` });

/** So many clients that each ask again when they have an answer. @returns answers a second, in the second half of the time */
async function saturate(
  url: string,
  headers: Record<string, string>,
  numClients: number,
  ms: number,
): Promise<number> {
  const end = AbortSignal.timeout(ms);
  const halfMs = performance.now() + ms / 2;
  let count = 0;
  const client = async () => {
    while (!end.aborted) {
      const answered = await ask(url, headers, end);
      if (answered && answered.endedMs >= halfMs) count++;
    }
  };
  await Promise.all(Array.from({ length: numClients }, client));
  return count / (ms / 2_000);
}

/** Asks at random moments, whatever becomes of it. */
async function openLoop(url: string, tenant: string, perSecond: number, ms: number, random: () => number) {
  const end = AbortSignal.timeout(ms + 20_000);
  const stopMs = performance.now() + ms;
  const open = new Set<Promise<void>>();
  const answers: Answered[] = [];
  let numAsked = 0;
  for (let nextMs = performance.now(); ; ) {
    nextMs += (-Math.log(1 - random()) * 1_000) / perSecond;
    if (nextMs >= stopMs) break;
    await sleep(Math.max(0, nextMs - performance.now()));
    if (open.size >= maxOpenOfFlood) continue;
    numAsked++;
    const one = ask(url, asTenant(tenant), end).then((answered) => {
      if (answered) answers.push(answered);
      open.delete(one);
    });
    open.add(one);
  }
  const numInTime = answers.length;
  await Promise.all(open);
  return { numAsked, numInTime, answers };
}

const folder = mkdtempSync(join(tmpdir(), 'motet-fairness-'));
const keysFile = join(folder, 'keys.json');
writeFileSync(
  keysFile,
  ['flood', ...calm, ...behaving].map((tenant) => `${tenant} ${keyOf(tenant)}`).join('\n'),
);
const engine = await startSmollm2(['--max-sequences', String(numSeats)]);
const gateway = await startGatewayOver([engine.url], ['--api-keys-file', keysFile]);

/** Of a counter of the engine, all its series together. */
async function counted(name: string): Promise<number> {
  const text = await (await request(`${engine.url}/metrics`)).body.text();
  let sum = 0;
  for (const line of text.split('\n'))
    if (line.startsWith(`${name}{`)) sum += Number(line.slice(line.lastIndexOf(' ')));
  return sum;
}

/** What a counter of the engine rises by in a second, while requests come. */
async function rateOf(name: string): Promise<number> {
  const before = await counted(name);
  await sleep(1_000 * seconds);
  return ((await counted(name)) - before) / seconds;
}

interface Row {
  /** Of what the nine asked, what was answered; and of the one that has least. */
  kept: number;
  leastKept: number;
  p50: number;
  p99: number;
  longestMs: number;
  /** Of all tenants. */
  tokensPerSecond: number;
  yieldsPerSecond: number;
}

/** @param beside  who asks at the same time: a flood of so many requests a second, tenants with one request each at any time */
async function runNine(
  perSecond: number,
  beside: { flood?: number; calm?: readonly string[] },
  roundSeed: number,
): Promise<Row> {
  const loop = (tenant: string, rate: number, index: number) => {
    const random = seededRandom(100 * roundSeed + index);
    return openLoop(gateway.url, tenant, rate, 1_000 * seconds, () => random.below(2 ** 30) / 2 ** 30);
  };
  const others = [
    ...(beside.flood ? [loop('flood', beside.flood, 99)] : []),
    ...(beside.calm ?? []).map((tenant) => saturate(gateway.url, asTenant(tenant), 1, 1_000 * seconds)),
  ];
  const rates = Promise.all([rateOf('vllm:generation_tokens_total'), rateOf('motet_yields_total')]);
  const nine = await Promise.all(behaving.map((tenant, index) => loop(tenant, perSecond, index)));
  await Promise.all(others);
  const [tokensPerSecond, yieldsPerSecond] = await rates;
  const ttfts = nine.flatMap(({ answers }) => answers.map(({ ttftMs }) => ttftMs));
  const numAsked = nine.reduce((sum, one) => sum + one.numAsked, 0);
  return {
    kept: ttfts.length / numAsked,
    leastKept: Math.min(...nine.map((one) => (one.numAsked === 0 ? 1 : one.answers.length / one.numAsked))),
    p50: percentile(ttfts, 50),
    p99: percentile(ttfts, 99),
    longestMs: Math.max(...ttfts),
    tokensPerSecond,
    yieldsPerSecond,
  };
}

const alone: Row[] = [];
const calmed: Row[] = [];
const flooded: Row[] = [];
const twos: number[] = [];
const fours: number[] = [];
try {
  for (let round = 0; round < numRounds; round++) {
    const capacity = await saturate(gateway.url, asTenant('flood'), 2 * numSeats, 4_000);
    const perSecond = (0.6 * capacity) / 10;
    console.log(
      `round ${round + 1}: capacity ${shortNumber(capacity)} requests/s, each of the nine asks ${shortNumber(perSecond)}`,
    );
    alone.push(await runNine(perSecond, {}, seed + round));
    calmed.push(await runNine(perSecond, { calm }, seed + round));
    flooded.push(await runNine(perSecond, { flood: 3 * capacity }, seed + round));
    const [one, two, four] = await Promise.all(
      [1, 2, 4].map((weight) =>
        saturate(
          engine.url,
          formatStanding({ tenant: `of ${weight}`, weight, priority: 0 }),
          2 * numSeats,
          1_000 * seconds,
        ),
      ),
    );
    twos.push(two! / one!);
    fours.push(four! / one!);
  }
} finally {
  await gateway.stop();
  await engine.stop();
  await agent.close();
  rmSync(folder, { recursive: true });
}

const rows: [string, (row: Row) => number][] = [
  ['answered, of what the nine asked', ({ kept }) => kept],
  ['the same of the one with least', ({ leastKept }) => leastKept],
  ['TTFT ms p50', ({ p50 }) => p50],
  ['TTFT ms p99', ({ p99 }) => p99],
  ['TTFT ms, the longest', ({ longestMs }) => longestMs],
  ['tokens/s of all tenants', ({ tokensPerSecond }) => tokensPerSecond],
  ['yields/s', ({ yieldsPerSecond }) => yieldsPerSecond],
];
console.log(`\n${numRounds} rounds of ${seconds} s, ${numSeats} seats, ${maxTokens} tokens an answer\n`);
console.log(
  '| nine tenants | alone | beside three that behave | beside the flood | flood / alone | flood / three |',
);
console.log('|---|---|---|---|---|---|');
for (const [name, of] of rows) {
  const [before, among, after] = [alone.map(of), calmed.map(of), flooded.map(of)];
  const spreads = [before, among, after].map(spread);
  const cells = [...spreads, ratios(after, before), ratios(after, among)].map(showSpread);
  console.log(`| ${name} | ${cells.join(' | ')} |`);
}
console.log(`\nWeights 1:2:4 got 1 : ${showSpread(spread(twos))} : ${showSpread(spread(fours))}`);
