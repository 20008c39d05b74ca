import { pino } from 'pino';
import { expect, onTestFinished, test } from 'vitest';
import { Engines, lifeOf } from '../../operator/engines.ts';
import { createMetrics } from '../../operator/metrics.ts';
import { SimulatedSources } from '../fixtures/simulated-engines.ts';
import { pod } from './builders.ts';
import { FakeClock } from './fake-clock.ts';
import { startSomewhere } from './simulated-world.ts';

/** A pod with an engine, and what looks at it. */
async function startLook() {
  const engine = await startSomewhere({ sources: new SimulatedSources() });
  const clock = new FakeClock();
  const metrics = createMetrics();
  const engines = new Engines({
    tokenFile: null,
    metrics,
    clock,
    log: pino({ level: 'silent' }),
    onEnd: () => undefined,
  });
  onTestFinished(async () => {
    await engines.close();
    await engine.stop();
  });
  const ready = pod();
  ready.status!.podIP = engine.address;
  const lookWhole = (...pods: (typeof ready)[]) => engines.look(pods, engines.memoryOf('tiny'));
  const look = async (...pods: (typeof ready)[]) => (await lookWhole(...pods)).engines;
  return { engine, clock, ready, look, lookWhole };
}

test('an engine says what it holds under which name', async () => {
  const { engine, ready, look } = await startLook();
  engine.put('sql', '/sql');
  const [seen] = await look(ready);
  expect(seen).toMatchObject({ pod: ready.metadata!.name, isFresh: true });
  expect([...seen!.names.keys()]).toEqual(['sql']);
});

test('a pod that is not ready, is ending or has no address is not asked', async () => {
  const { engine, ready, look } = await startLook();
  const unready = structuredClone(ready);
  unready.status!.conditions = [{ type: 'Ready', status: 'False' }];
  const ending = structuredClone(ready);
  ending.metadata!.deletionTimestamp = '2026-11-25T10:00:00Z' as never;
  const nowhere = structuredClone(ready);
  delete nowhere.status!.podIP;
  expect(await look(unready, ending, nowhere)).toEqual([]);
  expect(engine.calls).toEqual([]);
});

test('an engine that fails to answer counts as it was last seen, for a while', async () => {
  const { engine, clock, ready, look } = await startLook();
  engine.put('sql', '/sql');
  await look(ready);
  engine.token = 'a token that the operator does not have';
  await clock.advance(25_000);
  const [seen] = await look(ready);
  expect(seen).toMatchObject({ isFresh: false });
  expect([...seen!.names.keys()]).toEqual(['sql']);
  await clock.advance(10_000);
  expect(await look(ready)).toEqual([]);
});

test('an engine that was never seen does not count until it answers, and why is told', async () => {
  const { engine, ready, lookWhole } = await startLook();
  engine.token = 'a token that the operator does not have';
  expect(await lookWhole(ready)).toEqual({
    engines: [],
    silence: 'expected Authorization: Bearer with a known key',
  });
});

test('an engine that refuses connections is gone at once', async () => {
  const { engine, ready, look } = await startLook();
  await look(ready);
  await engine.stop();
  expect(await look(ready)).toEqual([]);
});

test('a container that was started again is another life', async () => {
  const { engine, ready, look } = await startLook();
  await look(ready);
  const restarted = structuredClone(ready);
  restarted.status!.containerStatuses![0]!.restartCount = 1;
  expect(lifeOf(restarted)).not.toBe(lifeOf(ready));
  engine.token = 'a token that the operator does not have';
  expect(await look(restarted)).toEqual([]);
});

test('one engine that fails does not hide the others', async () => {
  const { ready, look } = await startLook();
  const away = structuredClone(ready);
  Object.assign(away.metadata!, { name: 'away', uid: 'away' });
  away.status!.podIP = '127.1.2.3';
  expect((await look(away, ready)).map(({ pod }) => pod)).toEqual([ready.metadata!.name]);
});
