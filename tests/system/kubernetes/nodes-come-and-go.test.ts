/** A node is drained, and a node dies and comes back: nothing is lost, and every status is true afterwards. */
import type { V1Node } from '@kubernetes/client-node';
import { afterAll, beforeAll, expect, test } from 'vitest';
import type { BaseModel } from '../../../crds/types.ts';
import { clusterVerb, poll } from '../../fixtures/cluster.ts';
import { kubectl } from '../../fixtures/control-plane.ts';
import {
  type InstalledMotet,
  installMotet,
  readyEngines,
  serveExamples,
  underLoad,
  untilConverged,
} from '../../fixtures/installed-motet.ts';
import { exampleAdapters } from '../../fixtures/processes.ts';

const models = ['smollm2', ...exampleAdapters.map(({ name }) => name)];

let motet: InstalledMotet;
beforeAll(async () => {
  motet = await installMotet();
  await serveExamples(motet);
}, 300_000);
afterAll(async () => {
  await kubectl(motet.cluster, ['uncordon', 'node1']).catch(() => {});
  await motet.uninstall();
}, 300_000);

async function isNodeReady(name: string): Promise<boolean> {
  const node = await motet.get<V1Node>('node', name);
  return node.status!.conditions!.some(({ type, status }) => type === 'Ready' && status === 'True');
}

test('a drained node loses no request, and its engine and adapters are on the other node', async () => {
  const load = await underLoad(motet, models, async () => {
    await kubectl(motet.cluster, [
      'drain',
      'node1',
      '--ignore-daemonsets',
      '--delete-emptydir-data',
      '--timeout=180s',
    ]);
    await untilConverged(motet);
  });
  expect(load.failures).toEqual([]);
  expect(load.numDone).toBeGreaterThan(20);
  const engines = await readyEngines(motet);
  expect(engines.map(({ spec }) => spec!.nodeName)).toEqual(['node0', 'node0']);
  await kubectl(motet.cluster, ['uncordon', 'node1']);
}, 400_000);

test('a node that dies is served around and comes back with its engine', async () => {
  // One engine on each node again.
  const [first] = await readyEngines(motet);
  await kubectl(motet.cluster, ['cordon', 'node0']);
  await motet.kubectl(['delete', 'pod', first!.metadata!.name!]);
  await poll(
    () => readyEngines(motet),
    (engines) => new Set(engines.map(({ spec }) => spec!.nodeName)).size === 2,
    { timeoutMs: 120_000 },
  );
  await kubectl(motet.cluster, ['uncordon', 'node0']);
  await untilConverged(motet);

  await clusterVerb('kill-node', '1');
  try {
    await poll(
      () => isNodeReady('node1'),
      (isReady) => !isReady,
      { timeoutMs: 90_000, intervalMs: 1_000 },
    );
    const oneIsLeft = await poll(
      () => motet.get<BaseModel>('basemodel', 'smollm2'),
      ({ status }) =>
        status?.pods?.some(({ ready }) => ready === false) === true || status?.readyReplicas === 1,
      { timeoutMs: 60_000 },
    );
    expect(oneIsLeft.status!.readyReplicas).toBe(1);
    // A gateway on the dead node is out of its Service by now, so every request is answered.
    const load = await underLoad(motet, models, () => new Promise((resolve) => setTimeout(resolve, 10_000)));
    expect(load.failures).toEqual([]);
    expect(load.numDone).toBeGreaterThan(5);
  } finally {
    await clusterVerb('start-node', '1');
  }
  await poll(
    () => isNodeReady('node1'),
    (isReady) => isReady,
    { timeoutMs: 90_000 },
  );
  await untilConverged(motet, 240_000);
  expect(await readyEngines(motet)).toHaveLength(2);
}, 600_000);
