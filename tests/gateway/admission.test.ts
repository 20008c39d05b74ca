import { EventEmitter } from 'node:events';
import { expect, test } from 'vitest';
import { Admission } from '../../gateway/admission.ts';
import { type Endpoint, type Endpoints, listedEngine, newEndpoint } from '../../gateway/endpoints.ts';
import type { Target } from '../../gateway/resolve-model.ts';
import { prefixOf } from '../../gateway/routing/prefix.ts';
import { type RouteAsk, Router } from '../../gateway/routing/router.ts';
import { routing } from './start-gateway.ts';

const declared: Target = { name: 'sql', baseModel: 'base' };
const limits = {
  maxInFlightPerEngine: 1,
  maxQueued: 2,
  queueTimeoutMs: 10_000,
  wakeWaitMs: 50,
  modelWaitMs: 10_000,
};
const route: RouteAsk = { name: 'sql', prefix: prefixOf('sql', Buffer.from('')), outputTokens: 1 };
const noOne = new AbortController().signal;

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
  const entering = admission.enter(route, declared, new Set(), noOne);
  expect(admission.numQueued).toBe(1);
  const engine = engines.add(['base', 'sql']);
  expect((await entering).endpoint).toBe(engine);
  expect(admission.numQueued).toBe(0);
});

test('after an engine let go of it, it is waited for on the others', async () => {
  const engines = new Engines();
  const leaving = engines.add(['sql']);
  const admission = admissionOver(engines);
  const entering = admission.enter(route, declared, new Set([leaving]), noOne);
  const engine = engines.add(['sql']);
  expect((await entering).endpoint).toBe(engine);
});

test('a declared model that does not come is unavailable after its wait, and leaves the queue', async () => {
  const engines = new Engines();
  engines.add(['base']);
  const admission = admissionOver(engines, { modelWaitMs: 20 });
  await expect(admission.enter(route, declared, new Set(), noOne)).rejects.toMatchObject({
    code: 'model_unavailable',
  });
  expect(admission.numQueued).toBe(0);
});

test('those who wait for models are bounded like all who wait', async () => {
  const engines = new Engines();
  engines.add(['base']);
  const admission = admissionOver(engines);
  const hangUp = new AbortController();
  const waiting = [0, 1].map(() => admission.enter(route, declared, new Set(), hangUp.signal));
  await expect(admission.enter(route, declared, new Set(), noOne)).rejects.toMatchObject({
    code: 'queue_full',
  });
  hangUp.abort(new Error('gone'));
  for (const one of waiting) await expect(one).rejects.toThrow('gone');
  expect(admission.numQueued).toBe(0);
});

test.each<[string, Target, string]>([
  ['that its operator gave up', { ...declared, isHopeless: true }, 'model_unavailable'],
  ['that nothing declares', { name: 'sql', baseModel: null }, 'model_not_found'],
])('a model %s is not waited for', async (_, target, code) => {
  const engines = new Engines();
  engines.add(['base']);
  await expect(admissionOver(engines).enter(route, target, new Set(), noOne)).rejects.toMatchObject({ code });
});
