// Groups before a real API server: what each tenant's request is composed of, and how soon a right that is lost is gone.

import { beforeAll, expect, test } from 'vitest';
import { installCrds } from '../../crds/install-crds.ts';
import { type ControlPlane, sharedControlPlane } from '../../fixtures/control-plane.ts';
import { adapterGroup, baseModel, loraAdapter, tenant } from '../resources.ts';
import { bearer, type Cluster, type Engine, metricOf, modelIds, startCluster } from '../start-cluster.ts';
import { chatBody, errorOf, type TestGateway, until } from '../start-gateway.ts';

const keyOf = (name: string) => `key-of-${name}-and-more`;
const wards = ['cardiology', 'oncology', 'triage'];
const accessTo = (...values: string[]) => ({
  adapters: { matchExpressions: [{ key: 'ward', operator: 'In' as const, values }] },
  groups: { matchLabels: { for: 'wards' } },
});

let plane: ControlPlane;
beforeAll(async () => {
  plane = await sharedControlPlane();
  await installCrds(plane);
});

async function addTenant(cluster: Cluster, name: string, ...values: string[]): Promise<void> {
  await cluster.setSecret(name, { key: keyOf(name) });
  await cluster.create(tenant(name, { access: accessTo(...values) }));
}

const ask = (gateway: TestGateway, key: string) => gateway.chat(chatBody({ model: 'clinic' }), bearer(key));

/** Names and weights of who answered. */
const composed = async (gateway: TestGateway, name: string) => {
  const answer = await ask(gateway, keyOf(name));
  return answer.headers.get('x-motet-adapters') ?? `status ${answer.status}`;
};

async function startClinic(): Promise<{ cluster: Cluster; gateway: TestGateway; engine: Engine }> {
  const cluster = await startCluster(plane);
  await cluster.create(baseModel('base'));
  for (const ward of wards) await cluster.create(loraAdapter(ward, { labels: { ward } }));
  await cluster.create(adapterGroup('clinic', { maxMembers: 2 }, { labels: { for: 'wards' } }));
  await addTenant(cluster, 'nurse', 'triage');
  await addTenant(cluster, 'doctor', 'triage', 'oncology');
  await addTenant(cluster, 'chief', ...wards);
  await addTenant(cluster, 'guest', 'radiology');
  const engine = await cluster.engine({ adapters: wards });
  const gateway = await cluster.gateway();
  await until(
    () => modelIds(gateway, keyOf('doctor')),
    (ids) => ids.includes('clinic'),
  );
  return { cluster, gateway, engine };
}

test('each tenant is answered by the members that it may use, and the engine and the client are told', async () => {
  const { gateway, engine } = await startClinic();
  expect(await composed(gateway, 'doctor')).toBe('oncology=0.5,triage=0.5');
  expect(engine.fake.received.at(-1)!.headers).toMatchObject({
    'x-motet-adapters': 'oncology=0.5,triage=0.5',
  });
  expect(engine.fake.received.at(-1)!.headers).not.toHaveProperty('x-motet-model');
  expect(await composed(gateway, 'nurse')).toBe('triage=1');

  const numAsked = engine.fake.received.length;
  expect(await errorOf(await ask(gateway, keyOf('guest')))).toMatchObject({ code: 'model_not_found' });
  expect(await errorOf(await ask(gateway, keyOf('chief')))).toMatchObject({
    status: 400,
    code: 'group_too_large',
    message: 'model: expected a group of which you may use at most 2 adapters, got 3',
  });
  // What a client says of who is to answer is passed on to nobody.
  const forged = { ...bearer(keyOf('nurse')).headers, 'x-motet-adapters': 'cardiology=1' };
  const answer = await gateway.chat(chatBody({ model: 'triage' }), { headers: forged });
  expect(answer.status).toBe(200);
  expect(engine.fake.received).toHaveLength(numAsked + 1);
  expect(engine.fake.received.at(-1)!.headers).not.toHaveProperty('x-motet-adapters');

  expect(await modelIds(gateway, keyOf('doctor'))).toEqual(['clinic', 'oncology', 'triage']);
  expect(await modelIds(gateway, keyOf('guest'))).toEqual([]);
  expect(await modelIds(gateway, keyOf('chief'))).toEqual(wards);
  const labels = 'route="/v1/chat/completions",model="clinic",target="clinic",tenant="nurse",status="200"';
  expect(await metricOf(gateway, `motet_gateway_requests_total{${labels}}`)).toBe(1);
});

test('a right that is taken away, by label, by tenant or by group, is in no later answer', async () => {
  const { cluster, gateway } = await startClinic();
  const becomes = (name: string, wanted: string) =>
    until(
      () => composed(gateway, name),
      (got) => got === wanted,
    );
  await cluster.change('LoraAdapter', 'oncology', { metadata: { labels: { ward: 'closed' } } });
  const changedMs = performance.now();
  await becomes('doctor', 'triage=1');
  console.log(
    `a label was taken away: the adapter is in no answer after ${Math.round(performance.now() - changedMs)} ms`,
  );
  await cluster.change('LoraAdapter', 'oncology', { metadata: { labels: { ward: 'oncology' } } });
  await becomes('doctor', 'oncology=0.5,triage=0.5');
  await cluster.change('Tenant', 'doctor', { spec: { access: accessTo('cardiology') } });
  await becomes('doctor', 'cardiology=1');
  await cluster.change('AdapterGroup', 'clinic', { spec: { selector: { matchLabels: { ward: 'triage' } } } });
  await becomes('doctor', 'status 404');
  expect(await composed(gateway, 'nurse')).toBe('triage=1');
  await cluster.change('AdapterGroup', 'clinic', { metadata: { labels: { for: 'nobody' } } });
  await becomes('nurse', 'status 404');
});

test('an engine that holds some of the members is not asked', async () => {
  const { cluster, gateway, engine } = await startClinic();
  const second = await cluster.engine({ adapters: ['triage'] });
  // It gets what it may get.
  await until(
    async () => {
      await gateway.chat(chatBody({ model: 'triage' }), bearer(keyOf('nurse')));
      return second.fake.received.length;
    },
    (count) => count > 0,
  );
  for (let i = 0; i < 6; i += 1) expect(await composed(gateway, 'doctor')).toBe('oncology=0.5,triage=0.5');
  expect(second.fake.received.filter(({ headers }) => 'x-motet-adapters' in headers)).toEqual([]);
  expect(engine.fake.received.length).toBeGreaterThanOrEqual(6);
});
