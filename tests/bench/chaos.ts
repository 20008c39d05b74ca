/**
 * What becomes of requests while engines are killed, stopped, hung and slowed at random, and the Redis that limits are kept in is killed
 * and frozen? Four engines without arithmetic
 * (tests/fixtures/paced-engine-child.ts), of which two are in trouble at most, one gateway, clients in a closed loop.
 *
 *   node tests/bench/chaos.ts                    5 minutes
 *   node tests/bench/chaos.ts --seconds 30 --seed 7 --clients 32
 *   node tests/bench/chaos.ts --hedge-after-ms 500        streams that are slow to begin are asked of a second engine
 *
 * Fails when a request ends without all of its answer and without an error that says why, when an answer is wrong or there
 * twice, when the gateway counted other tokens or requests than the clients, when a limit that has room refuses, or when a place of a
 * request is not given back.
 */
import { parseArgs } from 'node:util';
import { runChaos } from '../fixtures/chaos.ts';
import { countsOf } from './count-option.ts';
import { percentile, shortNumber } from './peers/spread.ts';

const { values: options } = parseArgs({
  options: {
    seconds: { type: 'string', default: '300' },
    seed: { type: 'string', default: '1' },
    clients: { type: 'string', default: '24' },
    'hedge-after-ms': { type: 'string', default: '0' },
  },
});
const countOf = countsOf(options);

const report = await runChaos({
  seconds: countOf('seconds'),
  seed: countOf('seed'),
  numClients: countOf('clients'),
  // Longer than a look may take and an engine may be silent: some are taken for dead.
  maxStopMs: 12_000,
  hangMs: 9_000,
  gatewayArgs: [
    '--silent-after-ms',
    '5000',
    '--idle-timeout-ms',
    '20000',
    '--hedge-after-ms',
    options['hedge-after-ms'],
  ],
});
const { done, refused, wrong, latenciesMs, ...counts } = report;
const numRefused = Object.values(refused).reduce((a, b) => a + b, 0);
console.log(
  `engines killed ${done.killed} times, stopped ${done.stopped}, hung ${done.hung}, slowed ${done.slowed}; left alone ${counts.ejections} times`,
);
console.log(
  `Redis killed ${done.redisKilled} times, frozen ${done.redisFrozen}; ${counts.numAlone} requests without it, ${counts.numPlacesLeft} places not given back`,
);
console.log(
  `${counts.numSent} requests: ${counts.numAnswered} answered, ${numRefused} told why not, ${wrong.length} wrong; ${counts.numRetried} asked of another engine, ${counts.numHedged} of a second one`,
);
console.log(`why not: ${JSON.stringify(refused)}`);
console.log(
  `tokens: ${counts.receivedTokens} received, ${counts.countedTokens} counted; requests counted: ${counts.countedRequests}`,
);
console.log(
  `latency ms: p50 ${shortNumber(percentile(latenciesMs, 50))}, p99 ${shortNumber(percentile(latenciesMs, 99))}, most ${shortNumber(Math.max(...latenciesMs))}`,
);
for (const one of wrong.slice(0, 20)) console.log(`wrong: ${one}`);
const isRight =
  wrong.length === 0 &&
  counts.receivedTokens === counts.countedTokens &&
  counts.numSent === counts.countedRequests &&
  counts.numAnswered + numRefused === counts.numSent &&
  refused.rate_limit_exceeded === undefined &&
  counts.numPlacesLeft === 0;
console.log(isRight ? 'nothing was lost, and nothing came twice' : 'NOT RIGHT');
process.exitCode = isRight ? 0 : 1;
