import { KubeConfig } from '@kubernetes/client-node';
import { pino } from 'pino';
import { beforeAll, expect, onTestFinished, test, vi } from 'vitest';
import { systemClock } from '../../operator/clock.ts';
import { decideLease, Leader } from '../../operator/leader.ts';
import { type ControlPlane, createNamespace, sharedControlPlane } from '../fixtures/control-plane.ts';
import { type Namespace, namespaceOf } from './start-operator.ts';

const lease = (holderIdentity: string) => ({ spec: { holderIdentity, leaseDurationSeconds: 15 } });

test.each([
  ['there is none', null, 0, 'create'],
  ['it is ours', lease('me'), 0, 'renew'],
  ['its holder left in order', lease(''), 0, 'take'],
  ['its holder was heard', lease('other'), 14_999, 'wait'],
  ['its holder was not heard for its duration', lease('other'), 15_000, 'take'],
] as const)('when %s: %4$s', (_, found, unchangedMs, decision) => {
  expect(decideLease({ lease: found, changedAtMs: 1000 }, 'me', 1000 + unchangedMs)).toBe(decision);
});

let plane: ControlPlane;

beforeAll(async () => {
  plane = await sharedControlPlane();
});

/** Leaders of one namespace, that end with the test. */
async function leadersOf(
  ...identities: string[]
): Promise<{ namespace: Namespace; leaders: Leader[]; ending: AbortController }> {
  const namespace = namespaceOf(plane, await createNamespace(plane));
  const kubeConfig = new KubeConfig();
  kubeConfig.loadFromFile(plane.kubeconfig);
  const ending = new AbortController();
  onTestFinished(() => ending.abort());
  const leaders = identities.map(
    (identity) =>
      new Leader({
        kubeConfig,
        namespace: namespace.name,
        leaseName: 'motet-operator',
        identity,
        leaseSeconds: 3,
        clock: systemClock,
        log: pino({ level: 'silent' }),
      }),
  );
  return { namespace, leaders, ending };
}

const holderOf = async (namespace: Namespace) =>
  (
    await namespace.get<{ spec: { holderIdentity: string; leaseTransitions: number } }>(
      'lease',
      'motet-operator',
    )
  ).spec;

test('of several that start together one leads', async () => {
  const { leaders, ending } = await leadersOf('a', 'b', 'c');
  const acquired = leaders.map((leader) => leader.acquire(ending.signal));
  await Promise.race(acquired);
  expect(leaders.filter(({ isLeader }) => isLeader)).toHaveLength(1);
  ending.abort();
  expect((await Promise.all(acquired)).filter(Boolean)).toHaveLength(1);
  const standby = leaders.find(({ isLeader }) => !isLeader)!;
  expect(() => standby.assertLeader()).toThrow('does not hold the lease');
});

test('one that leaves in order is followed at once', async () => {
  const {
    namespace,
    leaders: [a, b],
    ending,
  } = await leadersOf('a', 'b');
  await a!.acquire(ending.signal);
  const held = expect(a!.hold(ending.signal)).rejects.toMatchObject({ code: 'lease_lost' });
  const next = b!.acquire(ending.signal);
  await a!.release();
  expect(a!.isLeader).toBe(false);
  expect(await next).toBe(true);
  expect(await holderOf(namespace)).toMatchObject({ holderIdentity: 'b', leaseTransitions: 1 });
  await held;
});

test('one that holds keeps the lease beyond its duration, and one that falls silent loses it', async () => {
  const {
    namespace,
    leaders: [a, b],
    ending,
  } = await leadersOf('a', 'b');
  await a!.acquire(ending.signal);
  const silent = new AbortController();
  const held = a!.hold(silent.signal);
  const startedMs = performance.now();
  const next = b!.acquire(ending.signal);
  await vi.waitFor(() => expect(performance.now() - startedMs).toBeGreaterThan(4000), { timeout: 10_000 });
  expect(a!.isLeader).toBe(true);
  silent.abort();
  await held;
  // It has stopped by itself before the other one starts.
  await vi.waitFor(() => expect(a!.isLeader).toBe(false), { timeout: 10_000 });
  expect(b!.isLeader).toBe(false);
  expect(await next).toBe(true);
  expect((await holderOf(namespace)).holderIdentity).toBe('b');
});

test('one whose lease was taken by another ends', async () => {
  const {
    namespace,
    leaders: [a],
    ending,
  } = await leadersOf('a');
  await a!.acquire(ending.signal);
  const held = expect(a!.hold(ending.signal)).rejects.toMatchObject({ code: 'lease_lost' });
  const patch = { spec: { holderIdentity: 'thief' } };
  await namespace.kubectl(['patch', 'lease', 'motet-operator', '--type=merge', '-p', JSON.stringify(patch)]);
  await held;
  expect(() => a!.assertLeader()).toThrow('does not hold the lease');
});

test('survives that the lease is edited or deleted', async () => {
  const {
    namespace,
    leaders: [a],
    ending,
  } = await leadersOf('a');
  await a!.acquire(ending.signal);
  const held = a!.hold(ending.signal);
  await namespace.kubectl(['annotate', 'lease', 'motet-operator', 'note=x']);
  const renewTime = async () =>
    (await namespace.get<{ spec: { renewTime: string } }>('lease', 'motet-operator')).spec.renewTime;
  const before = await renewTime();
  await vi.waitFor(async () => expect(await renewTime()).not.toBe(before), { timeout: 10_000 });
  await namespace.kubectl(['delete', 'lease', 'motet-operator']);
  await vi.waitFor(async () => expect((await holderOf(namespace)).holderIdentity).toBe('a'), {
    timeout: 10_000,
  });
  expect(a!.isLeader).toBe(true);
  ending.abort();
  await held;
});
