/** Two operators, one lease: one acts, the other waits, and takes over when the first is killed. */
import type { V1Lease, V1Pod } from '@kubernetes/client-node';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { poll } from '../../fixtures/cluster.ts';
import {
  type InstalledMotet,
  installMotet,
  loraAdapter,
  serveExamples,
  untilConverged,
  untilReady,
} from '../../fixtures/installed-motet.ts';

let motet: InstalledMotet;
beforeAll(async () => {
  motet = await installMotet(['operator.replicas=2']);
  await serveExamples(motet);
}, 300_000);
afterAll(() => motet?.uninstall(), 300_000);

async function leader(): Promise<string> {
  const [lease] = await motet.list<V1Lease>('leases');
  return lease?.spec?.holderIdentity ?? '';
}

test('the second operator takes over when the leader is killed', async () => {
  const first = await leader();
  const operators = await motet.list<V1Pod>('pods', 'app.kubernetes.io/component=operator');
  const victim = operators.find(({ metadata }) => first.includes(metadata!.name!))!;
  expect(victim, `the lease is held by ${first}`).toBeDefined();
  await motet.kubectl(['delete', 'pod', victim.metadata!.name!, '--grace-period=0', '--force']);
  await motet.apply(loraAdapter('triage', { name: 'made-while-nobody-led' }));

  const second = await poll(leader, (holder) => holder !== '' && holder !== first, { timeoutMs: 60_000 });
  expect(second).not.toBe(first);
  await untilReady(motet, 'loraadapter', 'made-while-nobody-led');
  await untilConverged(motet);
}, 300_000);

test('a leader that is asked to stop hands its lease over at once', async () => {
  const first = await leader();
  const operators = await motet.list<V1Pod>('pods', 'app.kubernetes.io/component=operator');
  const holder = operators.find(({ metadata }) => first.includes(metadata!.name!))!;
  await motet.kubectl(['delete', 'pod', holder.metadata!.name!, '--wait=false']);
  const second = await poll(leader, (name) => name !== '' && name !== first, { timeoutMs: 20_000 });
  expect(second).not.toBe(first);
}, 120_000);
