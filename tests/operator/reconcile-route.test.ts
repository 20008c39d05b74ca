import { beforeAll, expect, test } from 'vitest';
import { motetPath } from '../../crds/api.ts';
import { apiVersion } from '../../crds/types.ts';
import { type ControlPlane, sharedControlPlane } from '../fixtures/control-plane.ts';
import { startWorld } from './simulated-world.ts';
import { applyCrds } from './start-operator.ts';

let plane: ControlPlane;

beforeAll(async () => {
  plane = await sharedControlPlane();
  await applyCrds(plane);
});

test('a route follows its adapters: not found, not ready, ready, gone', async () => {
  const world = await startWorld(plane);
  await world.addBaseModel('base');
  await world.apply('AdapterRoute', 'sql', {
    targets: [
      { adapter: 'sql-v1', weight: 3 },
      { adapter: 'sql-v2', weight: 1 },
    ],
  });
  await world.untilReason('AdapterRoute', 'sql', 'TargetNotFound');
  await world.addAdapter('sql-v1', 'base');
  await world.addAdapter('sql-v2', 'base');
  await world.untilReason('AdapterRoute', 'sql', 'TargetNotReady');
  await world.addEngine('one', 'base');
  const ready = await world.untilReason('AdapterRoute', 'sql', 'TargetsReady');
  expect(ready.status!.summary).toBe('sql-v1 75%, sql-v2 25%');
  await world.remove('LoraAdapter', 'sql-v2');
  const left = await world.untilReason('AdapterRoute', 'sql', 'TargetNotFound');
  expect(left.status!.summary).toBe('sql-v1 100%, sql-v2 0%');
});

test('what a gateway aborted is seen at once, told, and over when the spec changes', async () => {
  const world = await startWorld(plane);
  await world.addBaseModel('base');
  await world.addAdapter('sql-v1', 'base');
  await world.addAdapter('sql-v2', 'base');
  await world.addEngine('one', 'base');
  const spec = { targets: [{ adapter: 'sql-v1' }, { adapter: 'sql-v2' }], abort: { maxErrorPercent: 5 } };
  await world.apply('AdapterRoute', 'sql', spec);
  const { metadata } = await world.untilReason('AdapterRoute', 'sql', 'TargetsReady');
  const entry = {
    target: 'sql-v2',
    generation: metadata.generation,
    message: 'all failed',
    at: '2026-11-25T10:00:00Z',
  };
  await world.api({
    method: 'PATCH',
    path: motetPath('AdapterRoute', world.namespace, 'sql', 'status'),
    query: { fieldManager: 'motet-gateway', force: 'true' },
    contentType: 'application/apply-patch+yaml',
    body: { apiVersion, kind: 'AdapterRoute', metadata: { name: 'sql' }, status: { aborted: [entry] } },
  });
  const aborted = await world.untilReason('AdapterRoute', 'sql', 'TargetAborted');
  expect(aborted.status).toMatchObject({ summary: 'sql-v1 100%, sql-v2 aborted', aborted: [entry] });
  await expect
    .poll(async () => (await world.events('sql')).map(({ reason }) => reason), { timeout: 10_000 })
    .toContain('TargetAborted');
  await world.apply('AdapterRoute', 'sql', { ...spec, abort: { maxErrorPercent: 6 } });
  const again = await world.untilReason('AdapterRoute', 'sql', 'TargetsReady');
  expect(again.status!.summary).toBe('sql-v1 50%, sql-v2 50%');
});
