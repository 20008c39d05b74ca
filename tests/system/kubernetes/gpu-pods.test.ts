/** A BaseModel with accelerator `nvidia`: its pod is what a GPU node wants, and a node without a driver is told of. */
import type { V1Pod } from '@kubernetes/client-node';
import { afterAll, beforeAll, expect, test } from 'vitest';
import type { BaseModel } from '../../../crds/types.ts';
import { poll } from '../../fixtures/cluster.ts';
import { kubectl } from '../../fixtures/control-plane.ts';
import { baseModel, type InstalledMotet, installMotet, untilReady } from '../../fixtures/installed-motet.ts';

const gpu = [{ op: 'add', path: '/status/capacity/nvidia.com~1gpu', value: '1' }];

let motet: InstalledMotet;
beforeAll(async () => {
  motet = await installMotet();
  // The nodes have no such runtime: the class stands for what a GPU operator would install.
  await kubectl(
    motet.cluster,
    ['apply', '-f', '-'],
    JSON.stringify({
      apiVersion: 'node.k8s.io/v1',
      kind: 'RuntimeClass',
      metadata: { name: 'nvidia' },
      handler: 'runc',
    }),
  );
}, 300_000);
afterAll(async () => {
  await kubectl(motet.cluster, ['delete', 'runtimeclass', 'nvidia']);
  await kubectl(motet.cluster, ['taint', 'node', 'node1', 'nvidia.com/gpu-']).catch(() => {});
  await motet.uninstall();
}, 300_000);

test('without a GPU in the cluster the pod waits, and the condition says for what', async () => {
  await motet.apply(
    baseModel({ replicas: 1, accelerator: { type: 'nvidia', count: 1, runtimeClassName: 'nvidia' } }),
  );
  const condition = await untilReady(motet, 'basemodel', 'smollm2', {
    status: 'False',
    reason: 'PodsPending',
  });
  expect(condition.message).toContain('nvidia.com/gpu');
}, 120_000);

test('on a node that offers a GPU it is scheduled, and says in its condition that the driver is missing', async () => {
  await kubectl(motet.cluster, ['taint', 'node', 'node1', 'nvidia.com/gpu=present:NoSchedule']);
  await kubectl(motet.cluster, [
    'patch',
    'node',
    'node1',
    '--subresource=status',
    '--type=json',
    '-p',
    JSON.stringify(gpu),
  ]);
  const condition = await untilReady(motet, 'basemodel', 'smollm2', {
    status: 'False',
    reason: 'EngineFailing',
  });
  expect(condition.message).toContain('driver');

  const [pod] = await poll(
    () => motet.list<V1Pod>('pods', 'motet.dev/base-model=smollm2'),
    (pods) => pods.length > 0,
  );
  const { spec } = pod!;
  expect(spec!.nodeName).toBe('node1');
  expect(spec!.runtimeClassName).toBe('nvidia');
  expect(spec!.containers[0]!.resources!.limits!['nvidia.com/gpu']).toBe('1');
  expect(spec!.tolerations).toContainEqual({
    key: 'nvidia.com/gpu',
    operator: 'Exists',
    effect: 'NoSchedule',
  });
  const { status } = await motet.get<BaseModel>('basemodel', 'smollm2');
  expect(status!.pods![0]!.message).toContain('driver');
  await motet.kubectl(['delete', 'basemodel', 'smollm2']);
}, 240_000);

test('a CPU base model asks for none of it', async () => {
  await motet.apply(baseModel({ name: 'on-cpu', replicas: 1 }));
  await untilReady(motet, 'basemodel', 'on-cpu');
  const [pod] = await motet.list<V1Pod>('pods', 'motet.dev/base-model=on-cpu');
  expect(pod!.spec!.runtimeClassName).toBeUndefined();
  expect(Object.keys(pod!.spec!.containers[0]!.resources!.limits ?? {})).not.toContain('nvidia.com/gpu');
  expect(pod!.spec!.tolerations!.map(({ key }) => key)).not.toContain('nvidia.com/gpu');
}, 240_000);
