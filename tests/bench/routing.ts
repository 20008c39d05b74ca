/**
 * What does it bring that a request goes where its KV and its adapter are? Four engines, 200 adapters asked for by Zipf's law, 50 users who
 * hold conversations; through the gateway with --routing affinity, least-load and round-robin, which take turns in each round.
 *
 *   node tests/bench/routing.ts                          3 rounds, about five minutes
 *   node tests/bench/routing.ts --rounds 1 --seed 7
 *
 * Engines are processes with the real server, scheduler, block pool and adapter tiers; their arithmetic is replaced by the time that it
 * would take (tests/fixtures/paced-engine-child.ts): a step 8 ms and 0.15 ms for each of its tokens, an adapter 50 ms. What they
 * hold is bounded: all conversations and adapters fit into four device arenas, a third of them into one. Every turn sends all
 * that was said. Users begin, and think, for times that are exponentially distributed. Ratios are to round-robin, round by round.
 */
import { setTimeout as sleep } from 'node:timers/promises';
import { parseArgs } from 'node:util';
import { Agent } from 'undici';
import { type PacedEngine, startPacedEngine } from '../fixtures/paced-engine.ts';
import { startGatewayOver } from '../fixtures/processes.ts';
import { seededRandom } from '../fixtures/seeded-random.ts';
import { askTurn, type Turn, textOf } from '../fixtures/streamed-turn.ts';
import { countsOf } from './count-option.ts';
import { percentile, ratios, showSpread, spread } from './peers/spread.ts';

const { values: options } = parseArgs({
  options: { rounds: { type: 'string', default: '3' }, seed: { type: 'string', default: '1' } },
});
const countOf = countsOf(options);
const numRounds = countOf('rounds');
const seed = countOf('seed');

const rules = ['round-robin', 'least-load', 'affinity'] as const;
type Rule = (typeof rules)[number];
const numEngines = 4;
const numAdapters = 200;
const numUsers = 50;
const conversationsPerUser = 2;
const numTurns = 5;
const thinkMs = 400;
const systemTokens = 200;
const messageTokens = 100;
const outputTokens = 32;
const pace = { numPages: 1_200, numAdapters, stepMs: 8, tokenMs: 0.15, loadMs: 50 };

interface Run {
  turns: Turn[];
  seconds: number;
  numLoads: number;
}

const agent = new Agent({ connections: numUsers });

/** Zipf with exponent 1: draws an index below `count`. */
function zipf(count: number, random: ReturnType<typeof seededRandom>): () => number {
  const sums: number[] = [];
  for (let i = 0; i < count; i++) sums.push((sums[i - 1] ?? 0) + 1 / (i + 1));
  return () => {
    const at = random.unit() * sums[count - 1]!;
    return Math.max(
      0,
      sums.findIndex((sum) => sum > at),
    );
  };
}

async function run(rule: Rule, roundSeed: number): Promise<Run> {
  const engines: PacedEngine[] = await Promise.all(
    Array.from({ length: numEngines }, () => startPacedEngine({ port: 0, ...pace })),
  );
  const gateway = await startGatewayOver(
    engines.map(({ url }) => url),
    ['--routing', rule, '--slow-start-ms', '0'],
  );
  const turns: Turn[] = [];
  const converse = async (user: number) => {
    const random = seededRandom(1_000 * roundSeed + user);
    const draw = zipf(numAdapters, random);
    const think = () => sleep(-thinkMs * Math.log(1 - random.unit()));
    for (let i = 0; i < conversationsPerUser; i++) {
      const adapter = draw();
      // Who uses an adapter has its system prompt.
      const messages: object[] = [{ role: 'system', content: textOf(seededRandom(adapter), systemTokens) }];
      for (let turn = 0; turn < numTurns; turn++) {
        await think();
        messages.push({ role: 'user', content: textOf(random, messageTokens) });
        const { text, ...told } = await askTurn(
          agent,
          gateway.url,
          `adapter-${adapter}`,
          messages,
          outputTokens,
        );
        messages.push({ role: 'assistant', content: text });
        turns.push(told);
      }
    }
  };
  const beganMs = performance.now();
  await Promise.all(Array.from({ length: numUsers }, (_, user) => converse(user)));
  const seconds = (performance.now() - beganMs) / 1000;
  const loads = await Promise.all(engines.map((engine) => engine.numLoads()));
  await gateway.stop();
  await Promise.all(engines.map((engine) => engine.kill()));
  return { turns, seconds, numLoads: loads.reduce((a, b) => a + b) };
}

console.log(
  `${numEngines} engines, ${numAdapters} adapters by Zipf(1), ${numUsers} users, ${conversationsPerUser} conversations each of ${numTurns} turns; ` +
    `${systemTokens} tokens of an adapter's system prompt, ${messageTokens} a message, ${outputTokens} an answer; think time ${thinkMs} ms in the mean`,
);
console.log(
  `a step ${pace.stepMs} ms + ${pace.tokenMs} ms a token, a load ${pace.loadMs} ms; ${pace.numPages} pages of 16 tokens an engine, 4 an adapter; ${numRounds} rounds\n`,
);
const runs: Record<Rule, Run[]> = { affinity: [], 'least-load': [], 'round-robin': [] };
for (let round = 0; round < numRounds; round++) {
  for (const rule of rules) {
    const done = await run(rule, seed + round);
    runs[rule].push(done);
    process.stderr.write(`round ${round + 1}, ${rule}: ${done.seconds.toFixed(1)} s\n`);
  }
}

const sum = (turns: Turn[], field: keyof Turn) => turns.reduce((total, turn) => total + turn[field], 0);
const rows: [string, (run: Run) => number][] = [
  ['output tokens/s', ({ turns, seconds }) => (turns.length * outputTokens) / seconds],
  [
    'TTFT ms p50',
    ({ turns }) =>
      percentile(
        turns.map(({ ttftMs }) => ttftMs),
        50,
      ),
  ],
  [
    'TTFT ms p95',
    ({ turns }) =>
      percentile(
        turns.map(({ ttftMs }) => ttftMs),
        95,
      ),
  ],
  [
    'prompt tokens from the cache, %',
    ({ turns }) => (100 * sum(turns, 'cachedTokens')) / sum(turns, 'promptTokens'),
  ],
  ['adapter loads', ({ numLoads }) => numLoads],
  ['seconds', ({ seconds }) => seconds],
];
const others = rules.filter((rule) => rule !== 'round-robin');
const title = ['', ...rules, ...others.map((rule) => `${rule} / round-robin`), 'affinity / least-load'];
console.log(`| ${title.join(' | ')} |\n|${title.map(() => '---|').join('')}`);
for (const [name, of] of rows) {
  const values = (rule: Rule) => runs[rule].map(of);
  const cells = [
    ...rules.map((rule) => showSpread(spread(values(rule)))),
    ...others.map((rule) => showSpread(ratios(values(rule), values('round-robin')))),
    showSpread(ratios(values('affinity'), values('least-load'))),
  ];
  console.log(`| ${name} | ${cells.join(' | ')} |`);
}
await agent.close();
