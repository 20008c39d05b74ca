/** Engines are killed, stopped and slowed under load, and Redis is killed and frozen: what a client gets is right, or an error that says why; all is counted once. */
import { expect, test } from 'vitest';
import { runChaos } from '../fixtures/chaos.ts';

const seconds = Number(process.env.MOTET_CHAOS_SECONDS ?? 6);

test('no request is lost without a word, none is answered twice, and tokens are counted once', async () => {
  const seed = Number(process.env.MOTET_CHAOS_SEED ?? 1);
  const report = await runChaos({
    ...{ seconds, seed, numClients: 12, maxStopMs: 1_500, hangMs: 0 },
    gatewayArgs: ['--silent-after-ms', '5000'],
  });
  const { done, refused, wrong, numSent, numAnswered, receivedTokens, countedTokens, countedRequests } =
    report;
  const numRefused = Object.values(refused).reduce((a, b) => a + b, 0);
  expect(wrong, `seed ${seed}`).toEqual([]);
  expect(numAnswered + numRefused).toBe(numSent);
  expect(countedRequests).toBe(numSent);
  expect(countedTokens).toBe(receivedTokens);
  expect(refused).not.toHaveProperty('rate_limit_exceeded');
  expect(report.numPlacesLeft).toBe(0);
  expect(done.redisKilled + done.redisFrozen).toBeGreaterThan(0);
  expect(done.killed + done.stopped + done.slowed).toBeGreaterThan(0);
  // Two of the four engines are well at any time.
  expect(numAnswered).toBeGreaterThan(numSent / 4);
}, 180_000);
