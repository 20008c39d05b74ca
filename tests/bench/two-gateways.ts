/**
 * Does a gateway stay away from what another one keeps busy? Four engines and two gateways. The first one's clients ask, with
 * long prompts, an adapter that two of the engines have, and keep these busy; the second one's ask the base, which all four have, shortly.
 *
 *   node tests/bench/two-gateways.ts               3 rounds of 2 x 8 s
 *   node tests/bench/two-gateways.ts --rounds 5 --seconds 20
 *
 * In turns: engines that say what they have to do and what of it others sent, and engines that do not, as older ones; each gateway then
 * sees its own requests alone. Engines are those of tests/bench/routing.ts: the real server and scheduler, time in place of arithmetic.
 */
import { setTimeout as sleep } from 'node:timers/promises';
import { parseArgs } from 'node:util';
import { Agent } from 'undici';
import { type AdapterList, enginePaths } from '../../engine/protocol.ts';
import { startPacedEngine } from '../fixtures/paced-engine.ts';
import { getJson, startGatewayOver } from '../fixtures/processes.ts';
import { seededRandom } from '../fixtures/seeded-random.ts';
import { askTurn, textOf } from '../fixtures/streamed-turn.ts';
import { countsOf } from './count-option.ts';
import { percentile, ratios, showSpread, spread } from './peers/spread.ts';

const { values: options } = parseArgs({
  options: {
    rounds: { type: 'string', default: '3' },
    seconds: { type: 'string', default: '8' },
    seed: { type: 'string', default: '1' },
  },
});
const countOf = countsOf(options);
const numRounds = countOf('rounds');
const seconds = countOf('seconds');
const seed = countOf('seed');

const numEngines = 4;
const numBusy = 2;
const pace = { numPages: 1_200, stepMs: 8, tokenMs: 0.15, loadMs: 50 };
const long = { numClients: 8, messageTokens: 1_500, outputTokens: 16 };
const short = { numClients: 8, messageTokens: 60, outputTokens: 16, thinkMs: 60 };

interface Run {
  longTtfts: number[];
  shortTtfts: number[];
  /** Of the short requests' prompt tokens, those in the busy engines. */
  shareAtBusy: number;
}

async function run(tellsLoad: boolean, roundSeed: number): Promise<Run> {
  const engines = await Promise.all(
    Array.from({ length: numEngines }, (_, index) =>
      startPacedEngine({ port: 0, ...pace, numAdapters: index < numBusy ? 1 : 0, tellsLoad }),
    ),
  );
  const urls = engines.map(({ url }) => url);
  const [ofLong, ofShort] = await Promise.all([
    startGatewayOver(urls, ['--slow-start-ms', '0']),
    startGatewayOver(urls, ['--slow-start-ms', '0']),
  ]);
  const agent = new Agent({ connections: long.numClients + short.numClients });
  const result: Run = { longTtfts: [], shortTtfts: [], shareAtBusy: 0 };
  const endMs = performance.now() + 1_000 * seconds;
  const askLong = async (client: number) => {
    const random = seededRandom(1_000 * roundSeed + client);
    while (performance.now() < endMs) {
      const messages = [{ role: 'user', content: textOf(random, long.messageTokens) }];
      const { ttftMs } = await askTurn(agent, ofLong.url, 'adapter-0', messages, long.outputTokens);
      result.longTtfts.push(ttftMs);
    }
  };
  const askShort = async (client: number) => {
    const random = seededRandom(1_000 * roundSeed + 500 + client);
    while (performance.now() < endMs) {
      await sleep(-short.thinkMs * Math.log(1 - random.unit()));
      const messages = [{ role: 'user', content: textOf(random, short.messageTokens) }];
      result.shortTtfts.push(
        (await askTurn(agent, ofShort.url, 'base', messages, short.outputTokens)).ttftMs,
      );
    }
  };
  await Promise.all([
    ...Array.from({ length: long.numClients }, (_, client) => askLong(client)),
    ...Array.from({ length: short.numClients }, (_, client) => askShort(client)),
  ]);
  const lists = await Promise.all(
    engines.map(({ url }) => getJson<AdapterList>(`${url}${enginePaths.adapters}`)),
  );
  const shortTokens = lists.map(({ base }) => base!.prefixCache.promptTokens);
  const sum = (numbers: number[]) => numbers.reduce((total, one) => total + one, 0);
  result.shareAtBusy = sum(shortTokens.slice(0, numBusy)) / sum(shortTokens);
  await agent.close();
  await Promise.all([ofLong.stop(), ofShort.stop()]);
  await Promise.all(engines.map((engine) => engine.kill()));
  return result;
}

console.log(
  `${numEngines} engines, a step ${pace.stepMs} ms + ${pace.tokenMs} ms a token. Gateway 1: ${long.numClients} clients, ${long.messageTokens} prompt tokens, ` +
    `${long.outputTokens} an answer. Gateway 2: ${short.numClients} clients, ${short.messageTokens} prompt tokens, ${short.outputTokens} an answer; ${numRounds} rounds of ${seconds} s each\n`,
);
const told: Run[] = [];
const untold: Run[] = [];
for (let round = 0; round < numRounds; round++) {
  // Each goes first in turn.
  const pair = round % 2 === 0 ? [untold, told] : [told, untold];
  for (const runs of pair) runs.push(await run(runs === told, seed + round));
  process.stderr.write(`round ${round + 1}\n`);
}
const rows: [string, (run: Run) => number][] = [
  ['short, at the busy engines, %', ({ shareAtBusy }) => 100 * shareAtBusy],
  ['short, TTFT ms p50', ({ shortTtfts }) => percentile(shortTtfts, 50)],
  ['short, TTFT ms p95', ({ shortTtfts }) => percentile(shortTtfts, 95)],
  ['short, requests/s', ({ shortTtfts }) => shortTtfts.length / seconds],
  ['long, TTFT ms p50', ({ longTtfts }) => percentile(longTtfts, 50)],
  ['long, requests/s', ({ longTtfts }) => longTtfts.length / seconds],
];
console.log('| | engines do not say | engines say | say / do not |\n|---|---|---|---|');
for (const [name, of] of rows) {
  const [a, b] = [untold.map(of), told.map(of)];
  console.log(
    `| ${name} | ${showSpread(spread(a))} | ${showSpread(spread(b))} | ${showSpread(ratios(b, a))} |`,
  );
}
