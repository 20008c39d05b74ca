import { EventEmitter } from 'node:events';
import { expect, onTestFinished, test, vi } from 'vitest';
import { Admission } from '../../gateway/admission.ts';
import { type Endpoint, type Endpoints, listedEngine, newEndpoint } from '../../gateway/endpoints.ts';
import { GatewayError } from '../../gateway/errors.ts';
import type { Ask } from '../../gateway/queue/ask.ts';
import { Ending } from '../../gateway/request/ending.ts';
import type { Target } from '../../gateway/resolve-model.ts';
import { Router, routeAsk } from '../../gateway/routing/router.ts';
import { routing } from './start-gateway.ts';

const declared: Target = { name: 'sql', baseModel: 'base' };
const limits = {
  ...{ maxInFlightPerEngine: 1, maxQueued: 2, maxQueuedPerTenant: 2, queueAgeingMs: 1_000 },
  ...{ queueTimeoutMs: 10_000, modelWaitMs: 10_000, wakeWaitMs: 50 },
};
const route = routeAsk('sql', Buffer.from(''), { outputTokens: 1 });
const ask: Ask = {
  ...{
    tenant: 'a',
    weight: 1,
    priority: 0,
    adapter: 'sql',
    promptTokens: 10,
    outputTokens: 10,
    numChoices: 1,
  },
  ...{ arrivedMs: 0, deadlineMs: null },
};
const noOne = new Ending();

/** The set of engines without its looks: a test says what they hold. */
class Engines extends EventEmitter {
  all: Endpoint[] = [];
  add(models: string[]): Endpoint {
    const endpoint = newEndpoint({ ...listedEngine(`http://engine-${this.all.length}`), baseModel: 'base' });
    const cards = new Map(models.map((id) => [id, { id } as never]));
    this.all.push(Object.assign(endpoint, { isReady: true, lastSeenMs: Date.now(), cards }));
    this.emit('change');
    return endpoint;
  }
}

function admissionOver(engines: Engines, fields: Partial<typeof limits> = {}): Admission {
  return new Admission(engines as unknown as Endpoints, new Router(routing), { ...limits, ...fields });
}

test('a declared model that no engine holds is waited for, and enters the engine on which it appears', async () => {
  const engines = new Engines();
  engines.add(['base']);
  const admission = admissionOver(engines);
  const entering = admission.enter(ask, route, declared, new Set(), noOne);
  expect(admission.numQueued).toBe(1);
  const engine = engines.add(['base', 'sql']);
  expect((await entering).endpoint).toBe(engine);
  expect(admission.numQueued).toBe(0);
});

test('after an engine let go of it, it is waited for on the others', async () => {
  const engines = new Engines();
  const leaving = engines.add(['sql']);
  const admission = admissionOver(engines);
  const entering = admission.enter(ask, route, declared, new Set([leaving]), noOne);
  const engine = engines.add(['sql']);
  expect((await entering).endpoint).toBe(engine);
});

test('a declared model that does not come is unavailable after its wait, and leaves the queue', async () => {
  const engines = new Engines();
  engines.add(['base']);
  const admission = admissionOver(engines, { modelWaitMs: 20 });
  await expect(admission.enter(ask, route, declared, new Set(), noOne)).rejects.toMatchObject({
    code: 'model_unavailable',
  });
  expect(admission.numQueued).toBe(0);
});

test('those who wait for models are bounded like all who wait', async () => {
  const engines = new Engines();
  engines.add(['base']);
  const admission = admissionOver(engines);
  const hangUp = new Ending();
  const waiting = [0, 1].map(() => admission.enter(ask, route, declared, new Set(), hangUp));
  await expect(admission.enter(ask, route, declared, new Set(), noOne)).rejects.toMatchObject({
    code: 'queue_full',
  });
  hangUp.end(new GatewayError('client_closed_request', 'gone'));
  for (const one of waiting) await expect(one).rejects.toThrow('gone');
  expect(admission.numQueued).toBe(0);
});

test.each<[string, Target, string]>([
  ['that its operator gave up', { ...declared, isHopeless: true }, 'model_unavailable'],
  ['that nothing declares', { name: 'sql', baseModel: null }, 'model_not_found'],
])('a model %s is not waited for', async (_, target, code) => {
  const engines = new Engines();
  engines.add(['base']);
  await expect(admissionOver(engines).enter(ask, route, target, new Set(), noOne)).rejects.toMatchObject({
    code,
  });
});

/** What waits is let go when the test releases a slot. */
function busyEngine(fields: Partial<typeof limits> = {}) {
  const engines = new Engines();
  engines.add(['sql']);
  const shed: string[] = [];
  const admission = new Admission(
    engines as unknown as Endpoints,
    new Router(routing),
    { ...limits, ...fields },
    (tenant, reason) => shed.push(`${tenant} ${reason}`),
  );
  const enter = (asked: Partial<Ask> = {}, ending = noOne) =>
    admission.enter({ ...ask, ...asked }, route, declared, new Set(), ending);
  return { engines, admission, enter, shed };
}

test('a tenant that waits is not behind all that another has sent', async () => {
  const { admission, enter } = busyEngine({ maxQueued: 10, maxQueuedPerTenant: 10 });
  const first = await enter({ tenant: 'flood' });
  const order: string[] = [];
  const waiting = ['flood', 'flood', 'flood', 'b'].map(async (tenant) => {
    const slot = await enter({ tenant });
    order.push(tenant);
    slot.release({ promptTokens: 10, cachedTokens: 0, completionTokens: 10 });
  });
  expect(admission.queue.numByTenant.get('flood')).toBe(3);
  first.release({ promptTokens: 10, cachedTokens: 0, completionTokens: 10 });
  await Promise.all(waiting);
  expect(order).toEqual(['b', 'flood', 'flood', 'flood']);
  expect(admission.numQueued).toBe(0);
});

test('a full queue makes room for a tenant below its share, and tells the newest of the one that is most over it', async () => {
  const { enter, shed } = busyEngine({ maxQueued: 3, maxQueuedPerTenant: 3 });
  const first = await enter({ tenant: 'flood' });
  const waiting = [1, 2, 3].map(() => enter({ tenant: 'flood' }));
  const small = enter({ tenant: 'small' });
  await expect(waiting[2]).rejects.toMatchObject({ code: 'queue_full', retryAfterS: 1 });
  await expect(enter({ tenant: 'small', priority: -1 })).rejects.toMatchObject({ code: 'queue_full' });
  expect(shed).toEqual(['flood made_room', 'small queue_full']);
  first.release();
  (await small).release();
  for (const one of waiting.slice(0, 2)) (await one).release();
});

test('one tenant may not have the whole queue', async () => {
  const { enter, shed } = busyEngine({ maxQueued: 10, maxQueuedPerTenant: 1 });
  const first = await enter();
  const second = enter();
  await expect(enter()).rejects.toMatchObject({ code: 'queue_full' });
  expect(shed).toEqual(['a tenant_full']);
  first.release();
  (await second).release();
});

test('who would wait longer than it can is told so at once, and when to come back', async () => {
  vi.useFakeTimers({ toFake: ['performance', 'setTimeout', 'clearTimeout', 'Date'] });
  onTestFinished(() => void vi.useRealTimers());
  const { engines, enter, shed } = busyEngine({ maxQueued: 100, maxQueuedPerTenant: 100 });
  let slot = await enter();
  const waiting = Array.from({ length: 30 }, () => enter());
  // One every 100 ms.
  for (const next of waiting.slice(0, 10)) {
    vi.advanceTimersByTime(100);
    Object.assign(engines.all[0]!, { lastSeenMs: Date.now() });
    slot.release({ promptTokens: 10, cachedTokens: 0, completionTokens: 10 });
    slot = await next;
  }
  const deadlineMs = performance.now() + 500;
  await expect(enter({ deadlineMs })).rejects.toMatchObject({
    ...{ code: 'deadline_unmeetable', retryAfterS: 3 },
    message: expect.stringMatching(/expected to wait 2\d{3} ms for an engine, of at most 500/),
  });
  // A higher priority is there in time.
  const urgent = enter({ deadlineMs, priority: 1 });
  vi.advanceTimersByTime(100);
  slot.release();
  (await urgent).release();
  expect(shed).toEqual(['a deadline']);
  for (const next of waiting.slice(10)) (await next).release();
});

test('an engine is sent what it can run at once and a quarter more', async () => {
  const { engines, admission, enter } = busyEngine({ maxInFlightPerEngine: 100, maxQueued: 10 });
  Object.assign(engines.all[0]!, { adapterList: { base: { maxSequences: 4 }, data: [] } });
  const slots = await Promise.all([1, 2, 3, 4, 5].map(() => enter()));
  const sixth = enter();
  expect(admission.numQueued).toBe(1);
  slots[0]!.release();
  (await sixth).release();
});

test('one of a tenant that has fewer in an engine than another does not wait for a place', async () => {
  const { engines, admission, enter } = busyEngine({
    ...{ maxInFlightPerEngine: 100, maxQueued: 100, maxQueuedPerTenant: 100 },
  });
  Object.assign(engines.all[0]!, { adapterList: { base: { maxSequences: 4 }, data: [] } });
  const hangUp = new Ending();
  const slots = await Promise.all([1, 2, 3, 4, 5].map(() => enter({ tenant: 'flood' })));
  const waiting = [1, 2, 3].map(() => enter({ tenant: 'flood' }, hangUp));
  slots.push(await enter({ tenant: 'quiet' }));
  expect(admission.numQueued).toBe(3);
  const line = enter({ tenant: 'jobs', priority: -10 }, hangUp);
  expect(admission.numQueued).toBe(4);
  // One that came after the flood's that wait, and has what it may have there beyond the bound.
  for (const tenant of ['b', 'c', 'd']) slots.push(await enter({ tenant }));
  const last = enter({ tenant: 'e' });
  expect(admission.numQueued).toBe(5);
  slots[5]!.release();
  slots.push(await last);
  expect(admission.numQueued).toBe(4);
  hangUp.end(new GatewayError('client_closed_request', 'gone'));
  for (const one of [...waiting, line]) await expect(one).rejects.toThrow('gone');
  for (const slot of slots) slot.release();
  expect(engines.all[0]!.inFlight).toBe(0);
});
