/** The API server is away for 30 s: clients notice nothing, and what changed meanwhile is done when it is back. */
import { setTimeout as sleep } from 'node:timers/promises';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { clusterVerb } from '../../fixtures/cluster.ts';
import {
  type InstalledMotet,
  installMotet,
  loraAdapter,
  serveExamples,
  underLoad,
  untilConverged,
  untilReady,
} from '../../fixtures/installed-motet.ts';
import { exampleAdapters } from '../../fixtures/processes.ts';

let motet: InstalledMotet;
beforeAll(async () => {
  motet = await installMotet();
  await serveExamples(motet);
}, 300_000);
afterAll(() => motet?.uninstall(), 300_000);

test('no request fails while the API server is away for 30 s, and the operator goes on after it', async () => {
  const models = ['smollm2', ...exampleAdapters.map(({ name }) => name)];
  const load = await underLoad(motet, models, async () => {
    await clusterVerb('stop-apiserver');
    try {
      await sleep(30_000);
    } finally {
      await clusterVerb('start-apiserver');
    }
    await sleep(5_000);
  });
  expect(load.failures).toEqual([]);
  expect(load.numDone).toBeGreaterThan(50);

  await motet.apply(loraAdapter('sql', { name: 'sql-again', copies: 'all' }));
  await untilReady(motet, 'loraadapter', 'sql-again');
  await untilConverged(motet);
}, 300_000);
