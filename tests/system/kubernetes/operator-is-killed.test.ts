/** The operator is killed at random, twenty times, while fifty adapters come and go: the world ends as the resources say. */
import type { V1Pod } from '@kubernetes/client-node';
import { afterAll, beforeAll, expect, test } from 'vitest';
import type { LoraAdapter } from '../../../crds/types.ts';
import {
  baseModel,
  type InstalledMotet,
  installMotet,
  loraAdapter,
  untilConverged,
  untilReady,
} from '../../fixtures/installed-motet.ts';
import { exampleAdapters } from '../../fixtures/processes.ts';
import { seededRandom } from '../../fixtures/seeded-random.ts';

const numKills = 20;
const numNames = 50;

let motet: InstalledMotet;
beforeAll(async () => {
  motet = await installMotet(['operator.replicas=2']);
  await motet.apply(baseModel());
  await untilReady(motet, 'basemodel', 'smollm2');
}, 300_000);
afterAll(() => motet?.uninstall(), 300_000);

test('20 kills while 50 adapters come and go leave engines and statuses as the resources say', async () => {
  const random = seededRandom(20);
  const wanted = new Map<string, object>();
  const names = Array.from({ length: numNames }, (_, i) => `voice-${i}`);
  const change = async () => {
    for (let i = 0; i < 8; i++) {
      const name = random.pick(names);
      if (wanted.has(name) && random.below(10) < 4) {
        wanted.delete(name);
        await motet.kubectl(['delete', 'loraadapter', name, '--wait=false']);
      } else {
        const copies = random.pick([1, 2, 'all']);
        wanted.set(name, loraAdapter(random.pick(exampleAdapters).name, { name, copies }));
        await motet.apply(wanted.get(name)!);
      }
    }
  };

  for (let kill = 0; kill < numKills; kill++) {
    await change();
    await new Promise((resolve) => setTimeout(resolve, random.below(3_000)));
    const operators = await motet.list<V1Pod>('pods', 'app.kubernetes.io/component=operator');
    for (const { metadata } of operators) {
      await motet.kubectl(['delete', 'pod', metadata!.name!, '--grace-period=0', '--force']);
    }
  }
  await motet.apply(
    ...names.filter((name) => !wanted.has(name)).map((name) => loraAdapter('dates', { name })),
  );
  await motet.kubectl(['delete', 'loraadapter', ...names.slice(0, 10)]);

  await untilConverged(motet, 240_000);
  const adapters = await motet.list<LoraAdapter>('loraadapters');
  expect(adapters).toHaveLength(numNames - 10);
}, 900_000);
