/** Resources and operator go in every order that people think of: nothing hangs, nothing of ours stays. */
import { setTimeout as sleep } from 'node:timers/promises';
import { afterEach, expect, test } from 'vitest';
import { poll } from '../../fixtures/cluster.ts';
import { kubectl } from '../../fixtures/control-plane.ts';
import {
  baseModel,
  chartFolder,
  chartValues,
  type InstalledMotet,
  installMotet,
  loraAdapter,
  namespace,
  serveExamples,
  untilReady,
} from '../../fixtures/installed-motet.ts';

let motet: InstalledMotet;
afterEach(() => motet?.uninstall(), 300_000);

/** What engines are made of, by kind and name. */
async function engineObjects(): Promise<string[]> {
  const kinds = 'deployments,replicasets,pods,services,poddisruptionbudgets';
  const names = await motet.kubectl(['get', kinds, '-l', 'motet.dev/base-model', '-o', 'name']);
  return names.split('\n').filter((name) => name !== '');
}

const untilNothingIsLeft = () => poll(engineObjects, (names) => names.length === 0, { timeoutMs: 120_000 });

test('a BaseModel that is deleted while its pods are being created leaves nothing', async () => {
  motet = await installMotet();
  for (const waitMs of [0, 200, 700, 1_500, 4_000]) {
    await motet.apply(baseModel(), loraAdapter('dates'));
    await sleep(waitMs);
    await motet.kubectl(['delete', 'basemodel', 'smollm2', '--timeout=60s']);
    expect(await untilNothingIsLeft()).toEqual([]);
    const orphan = await untilReady(motet, 'loraadapter', 'dates', {
      status: 'False',
      reason: 'BaseModelNotFound',
    });
    expect(orphan.message).toContain('smollm2');
    await motet.kubectl(['delete', 'loraadapter', 'dates', '--timeout=60s']);
  }
}, 400_000);

test('resources that are deleted after the operator was uninstalled go at once, and their engines with them', async () => {
  motet = await installMotet(['crds.keep=true']);
  await serveExamples(motet);
  await motet.helm(['uninstall', 'motet', '-n', namespace, '--wait', '--timeout', '120s']);
  expect(await engineObjects()).not.toEqual([]);

  for (const kind of ['basemodels', 'loraadapters', 'adapterroutes', 'adaptergroups', 'tenants']) {
    await motet.kubectl(['delete', kind, '--all', '--timeout=60s']);
  }
  expect(await untilNothingIsLeft()).toEqual([]);
  const definitions = ['basemodels', 'loraadapters', 'adapterroutes', 'adaptergroups', 'tenants'].map(
    (name) => `${name}.motet.dev`,
  );
  await kubectl(motet.cluster, ['delete', 'crd', ...definitions, '--timeout=60s']);
}, 400_000);

test('resources outlive an operator that is uninstalled and are served by the next one', async () => {
  motet = await installMotet(['crds.keep=true']);
  await motet.apply(baseModel({ replicas: 1 }), loraAdapter('dates'));
  await untilReady(motet, 'loraadapter', 'dates');
  await motet.helm(['uninstall', 'motet', '-n', namespace, '--wait', '--timeout', '120s']);
  await motet.apply(loraAdapter('triage'));

  await motet.helm([
    'install',
    'motet',
    chartFolder,
    '-n',
    namespace,
    ...chartValues(),
    '--wait',
    '--timeout',
    '120s',
  ]);
  await untilReady(motet, 'loraadapter', 'triage');
  await untilReady(motet, 'loraadapter', 'dates');
}, 400_000);
