import { beforeAll, expect, onTestFinished, test, vi } from 'vitest';
import { type ControlPlane, sharedControlPlane } from '../fixtures/control-plane.ts';
import { type Fleet, startFleet, untilAllReady } from './fleet.ts';
import { applyCrds, namespaceOf } from './start-operator.ts';

let plane: ControlPlane;

beforeAll(async () => {
  plane = await sharedControlPlane();
  await applyCrds(plane);
});

/** Of base models: at rest only a resync looks at them. */
async function numPasses({ operator }: Fleet): Promise<number> {
  const passes = await operator.metric('motet_operator_reconcile_total');
  return passes['kind="base-model",result="ok"']!;
}

/** Writes of the operator in the audit log, those of its lease left out. */
function numWrites({ world }: Fleet): number {
  return namespaceOf(plane, world.namespace)
    .writes()
    .filter(({ userAgent, objectRef }) => userAgent === 'motet' && objectRef.resource !== 'leases').length;
}

test('a thousand adapters over ten base models become ready, and at rest nothing is written', {
  timeout: 600_000,
}, async () => {
  const fleet = await startFleet(plane, {
    numBaseModels: 10,
    numAdapters: 1000,
    loadMs: 5,
    args: ['--resync-seconds', '5'],
  });
  onTestFinished(() => fleet.stop());
  await untilAllReady(fleet, 300);

  const adapters = await fleet.adapters();
  expect(adapters).toHaveLength(1000);
  const wanted = adapters.flatMap(({ metadata, status }) =>
    status!.placements!.map(({ pod, digest }) => `${metadata.name} ${pod} ${digest}`),
  );
  const held = fleet.engines.flatMap(({ name, names }) =>
    Object.entries(names).map(([adapter, digest]) => `${adapter} ${name} ${digest}`),
  );
  // The engines hold what the statuses say, each adapter as often as it asks for.
  expect(held.sort()).toEqual(wanted.sort());
  expect(wanted).toHaveLength(1500);
  const perEngine = fleet.engines.map(({ names }) => Object.keys(names).length);
  expect(Math.max(...perEngine)).toBeLessThan(2 * Math.min(...perEngine));

  // What led here is written and told.
  let numBefore = -1;
  await vi.waitFor(
    () => {
      const count = numWrites(fleet);
      const isStill = count === numBefore;
      numBefore = count;
      expect(isStill).toBe(true);
    },
    { timeout: 60_000, interval: 3_000 },
  );
  expect(numBefore).toBeGreaterThan(1000);
  const before = await numPasses(fleet);
  // Two resyncs at least: every base model is looked at each time, and its adapters.
  await vi.waitFor(async () => expect(await numPasses(fleet)).toBeGreaterThanOrEqual(before + 20), {
    timeout: 60_000,
    interval: 500,
  });
  expect(numWrites(fleet)).toBe(numBefore);
});
