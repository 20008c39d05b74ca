import { beforeAll, describe, expect, test } from 'vitest';
import { routeStatus, type Target } from '../../operator/reconcile-route.ts';
import { type ControlPlane, sharedControlPlane } from '../fixtures/control-plane.ts';
import { adapterRoute } from './builders.ts';
import { startWorld } from './simulated-world.ts';
import { applyCrds } from './start-operator.ts';

const now = new Date('2026-11-25T10:00:00Z');

function target(name: string, parts: Partial<Target> = {}): Target {
  return { name, weight: 1, exists: true, isReady: true, ...parts };
}

function statusFor(targets: Target[], nameConflict: string | null = null) {
  return routeStatus(adapterRoute(), undefined, targets, nameConflict, now);
}

describe('the status of a route', () => {
  test('shares requests by weight over the targets that are ready', () => {
    const status = statusFor([target('v1', { weight: 9 }), target('v2')]);
    expect(status.summary).toBe('v1 90%, v2 10%');
    expect(status.conditions).toMatchObject([{ status: 'True', reason: 'TargetsReady' }]);
  });

  test('gives the share of a target that no engine holds to the others', () => {
    const status = statusFor([target('v1', { weight: 9, isReady: false }), target('v2')]);
    expect(status.summary).toBe('v1 0%, v2 100%');
    expect(status.conditions).toMatchObject([
      { status: 'False', reason: 'TargetNotReady', message: expect.stringContaining('No engine holds v1') },
    ]);
  });

  test('says that a target is not there before that another is not ready', () => {
    const missing = target('v3', { exists: false, isReady: false });
    expect(statusFor([target('v1', { isReady: false }), missing]).conditions).toMatchObject([
      { status: 'False', reason: 'TargetNotFound', message: expect.stringContaining('no v3') },
    ]);
  });

  test('does not mind about a target of weight 0', () => {
    const status = statusFor([target('v1'), target('v2', { weight: 0, isReady: false, exists: false })]);
    expect(status.summary).toBe('v1 100%, v2 0%');
    expect(status.conditions).toMatchObject([{ status: 'True' }]);
  });

  test('is complete when nothing is there', () => {
    const status = statusFor([target('v1', { isReady: false })]);
    expect(status.targets).toEqual([{ name: 'v1', weight: 1, percent: 0, ready: false }]);
    expect(status.conditions).toMatchObject([{ message: expect.stringContaining('Requests get an error') }]);
  });

  test('says that its name is somebody else’s', () => {
    expect(statusFor([target('v1')], 'the name sql is taken').conditions).toMatchObject([
      { status: 'False', reason: 'NameConflict', message: expect.stringContaining('the name sql is taken') },
    ]);
  });
});

describe('against an API server', () => {
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
});
