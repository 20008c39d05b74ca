import { describe, expect, test } from 'vitest';
import type { AdapterRoute, AdapterRouteStatus } from '../../crds/types.ts';
import { routeStatus, type Target } from '../../operator/route-status.ts';
import { adapterRoute } from './builders.ts';

const now = new Date('2026-11-25T10:00:00Z');
const minutesLater = (minutes: number) => new Date(now.getTime() + minutes * 60_000);

function target(name: string, parts: Partial<Target> = {}): Target {
  const isReady = parts.isReady ?? true;
  return { name, weight: 1, exists: true, isReady, numWarm: Number(isReady), numToWarm: 1, ...parts };
}

function statusFor(targets: Target[], nameConflict: string | null = null, before?: AdapterRouteStatus) {
  return routeStatus(adapterRoute(), before, targets, nameConflict, now).status;
}

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

describe('a target that is not in memory', () => {
  const cold = target('v2', { numWarm: 1, numToWarm: 2 });

  test('gets its share when enough copies are', () => {
    const status = statusFor([target('v1'), cold]);
    expect(status.summary).toBe('v1 100%, v2 0%');
    expect(status.conditions).toMatchObject([
      { status: 'False', reason: 'TargetWarming', message: expect.stringContaining('1 of 2 copies of v2') },
    ]);
    expect(statusFor([target('v1'), { ...cold, numWarm: 2 }]).summary).toBe('v1 50%, v2 50%');
  });

  test('keeps the share that it had', () => {
    const before = statusFor([target('v1'), target('v2')]);
    expect(statusFor([target('v1'), cold], null, before).summary).toBe('v1 50%, v2 50%');
  });

  test('is better than nobody', () => {
    expect(statusFor([cold]).summary).toBe('v2 100%');
  });
});

describe('a target that gateways aborted', () => {
  const aborted = (generation: number): AdapterRouteStatus => ({
    aborted: [{ target: 'v2', generation, message: '9 of 20 requests failed', at: '2026-11-25T09:00:00Z' }],
  });

  test('has no share, and the condition says why', () => {
    const status = statusFor([target('v1', { weight: 90 }), target('v2', { weight: 10 })], null, aborted(1));
    expect(status.summary).toBe('v1 100%, v2 aborted');
    expect(status.conditions).toMatchObject([
      {
        status: 'False',
        reason: 'TargetAborted',
        message: expect.stringContaining('9 of 20 requests failed'),
      },
    ]);
    // It is the gateways' to say.
    expect(status.aborted).toBeUndefined();
  });

  test('leaves all requests to the first, whatever the weights', () => {
    const status = statusFor([target('v1', { weight: 0 }), target('v2', { weight: 10 })], null, aborted(1));
    expect(status.summary).toBe('v1 100%, v2 aborted');
  });

  test('has its share again when the spec changed', () => {
    expect(statusFor([target('v1'), target('v2')], null, aborted(0)).summary).toBe('v1 50%, v2 50%');
  });
});

describe('steps', () => {
  const steps = [
    { percent: 5, minutes: 10 },
    { percent: 50, minutes: 30 },
    { percent: 100, minutes: 10 },
  ];
  const route: AdapterRoute = adapterRoute({ steps });
  const both = [target('v1'), target('v2')];
  const take = (before: AdapterRouteStatus | undefined, at: Date, targets = both, of = route) =>
    routeStatus(of, before, targets, null, at);

  test('are taken one after the other', () => {
    const first = take(undefined, now);
    expect(first.status).toMatchObject({ summary: 'v1 95%, v2 5%', step: { index: 0, generation: 1 } });
    expect(first.nextStepInMs).toBe(600_000);
    const still = take(first.status, minutesLater(9));
    expect(still).toMatchObject({ status: { step: { index: 0 } }, nextStepInMs: 60_000 });
    const second = take(first.status, minutesLater(10));
    expect(second).toMatchObject({ status: { summary: 'v1 50%, v2 50%' }, nextStepInMs: 1_800_000 });
    const last = take(second.status, minutesLater(40));
    expect(last).toMatchObject({
      status: { summary: 'v1 0%, v2 100%', step: { index: 2 } },
      nextStepInMs: null,
    });
    expect(take(last.status, minutesLater(500)).status.step).toEqual(last.status.step);
  });

  test('wait for a target that is not in memory', () => {
    const cold = [target('v1'), target('v2', { numWarm: 0 })];
    const first = take(undefined, now, cold);
    expect(first).toMatchObject({ status: { summary: 'v1 100%, v2 0%' }, nextStepInMs: null });
    const later = take(first.status, minutesLater(60), cold);
    expect(later.status.step).toMatchObject({ index: 0, since: '2026-11-25T11:00:00Z' });
    expect(take(later.status, minutesLater(69)).status.step!.index).toBe(0);
    expect(take(later.status, minutesLater(70)).status.step!.index).toBe(1);
  });

  test('end with a target that was aborted', () => {
    const entry = { target: 'v2', generation: 1, message: 'bad', at: '2026-11-25T10:01:00Z' };
    const before = { ...take(undefined, now).status, aborted: [entry] };
    expect(take(before, minutesLater(60))).toMatchObject({
      status: { summary: 'v1 100%, v2 aborted', step: { index: 0 } },
      nextStepInMs: null,
    });
  });

  test('begin anew with another spec', () => {
    const second = take(take(undefined, now).status, minutesLater(10));
    const changed = { ...route, metadata: { ...route.metadata, generation: 2 } };
    expect(take(second.status, minutesLater(11), both, changed).status.step).toMatchObject({
      index: 0,
      generation: 2,
    });
  });
});
