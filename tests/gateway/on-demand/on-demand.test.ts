// What is there only while somebody asks: gateways with a real API server, and the test in the operator's place.

import { beforeAll, expect, test } from 'vitest';
import { callApi, motetPath } from '../../../crds/api.ts';
import type { BaseModel, LoraAdapter } from '../../../crds/types.ts';
import { kubeConfigOf } from '../../crds/api-proxy.ts';
import { installCrds } from '../../crds/install-crds.ts';
import { type ControlPlane, sharedControlPlane } from '../../fixtures/control-plane.ts';
import { refuse } from '../../fixtures/fake-engine.ts';
import { baseModel, loraAdapter, tenant } from '../resources.ts';
import { bearer, type Cluster, metricOf, modelIds, startCluster } from '../start-cluster.ts';
import { chatBody, errorOf, type TestGateway, until } from '../start-gateway.ts';

let plane: ControlPlane;
beforeAll(async () => {
  plane = await sharedControlPlane();
  await installCrds(plane);
});

const onDemand = <T extends { spec: object }>(resource: T, fields: object = { idleMinutes: 10 }): T => ({
  ...resource,
  spec: { ...resource.spec, onDemand: fields },
});

const get = <T>(cluster: Cluster, kind: 'BaseModel' | 'LoraAdapter', name: string) =>
  callApi<T>(kubeConfigOf(plane), { path: motetPath(kind, cluster.namespace, name) });

async function ready(gateway: TestGateway): Promise<TestGateway> {
  await until(
    () => fetch(`${gateway.url}/readyz`),
    ({ status }) => status === 200,
  );
  return gateway;
}

test('who asks for an adapter on demand waits for it, however many ask, and it is told once', async () => {
  const cluster = await startCluster(plane);
  await cluster.create(baseModel('base'));
  await cluster.create(onDemand(loraAdapter('sql')));
  const { fake } = await cluster.engine({ adapters: [] });
  const gateway = await ready(await cluster.gateway({ isInsecure: true }));
  await until(
    () => gateway.chat(chatBody()),
    ({ status }) => status === 200,
  );

  const answers = Array.from({ length: 6 }, () => gateway.chat(chatBody({ model: 'sql' })));
  const adapter = await until(
    () => get<LoraAdapter>(cluster, 'LoraAdapter', 'sql'),
    ({ status }) => status?.askedAt !== undefined,
  );
  await until(
    () => metricOf(gateway, 'motet_gateway_queued_requests'),
    (count) => count === 6,
  );
  fake.adapters.set('sql', 'device');
  expect((await Promise.all(answers)).map(({ status }) => status)).toEqual(Array(6).fill(200));
  const after = await get<LoraAdapter>(cluster, 'LoraAdapter', 'sql');
  expect(after.metadata.resourceVersion).toBe(adapter.metadata.resourceVersion);
  expect(Date.now() - Date.parse(after.status!.askedAt!)).toBeLessThan(60_000);
});

test('a base model that sleeps is listed, woken, and refused with a time when it does not come', async () => {
  const cluster = await startCluster(plane);
  await cluster.create(onDemand(baseModel('base'), { replicas: 1, idleMinutes: 10 }));
  await cluster.create(loraAdapter('sql'));
  const gateway = await ready(await cluster.gateway({ isInsecure: true, wakeWaitMs: 200 }));
  expect(await modelIds(gateway, 'none')).toEqual(['base', 'sql']);
  const response = await gateway.chat(chatBody({ model: 'sql' }));
  expect(response.headers.get('retry-after')).toBe('15');
  expect(await errorOf(response)).toMatchObject({ status: 503, code: 'model_unavailable', param: 'model' });
  await until(
    () => get<BaseModel>(cluster, 'BaseModel', 'base'),
    ({ status }) => status?.askedAt !== undefined,
  );
});

test('a stream that waits is begun with comments, and goes on when the engine is there', async () => {
  const cluster = await startCluster(plane);
  await cluster.create(onDemand(baseModel('base')));
  const gateway = await ready(await cluster.gateway({ isInsecure: true, holdAfterMs: 20 }));
  const response = await gateway.chat(chatBody({ stream: true }));
  expect(response.status).toBe(200);
  expect(response.headers.get('x-motet-model')).toBe('base');
  await cluster.engine();
  const text = await response.text();
  expect(text).toMatch(/^: waiting for an engine, 0 s\n\n/);
  expect(text).toContain('fake');
  expect(text).toMatch(/data: \[DONE\]\n\n$/);
});

test('a stream that was begun ends with an error event: of a wait that was too long, or of the engine', async () => {
  const cluster = await startCluster(plane);
  await cluster.create(onDemand(baseModel('base')));
  const hurried = await ready(await cluster.gateway({ isInsecure: true, holdAfterMs: 20, wakeWaitMs: 200 }));
  const late = await (await hurried.chat(chatBody({ stream: true }))).text();
  expect(late).toMatch(/^: waiting.*\n\ndata: {"error":{.*"code":"model_unavailable".*}}\n\n$/s);

  const gateway = await ready(await cluster.gateway({ isInsecure: true, holdAfterMs: 20 }));
  const response = await gateway.chat(chatBody({ stream: true }));
  const { fake } = await cluster.engine({ isReady: false });
  fake.script = refuse(400, 'bad_request');
  fake.isReady = true;
  await until(
    () => fake.numLooks,
    (count) => count > 0,
  );
  expect(await response.text()).toMatch(/data: {"error":{.*"code":"bad_request".*}}\n\n$/s);
});

test('who may not use a model on demand does not wake it', async () => {
  const cluster = await startCluster(plane);
  await cluster.create(onDemand(baseModel('base')));
  await cluster.create(onDemand(loraAdapter('sql', { labels: { team: 'a' } })));
  const key = 'key-0123456789abcdef';
  await cluster.setSecret('b', { key });
  await cluster.create(tenant('b', { access: { adapters: { matchLabels: { team: 'b' } } } }));
  const gateway = await ready(await cluster.gateway());
  await until(
    () => modelIds(gateway, key),
    (ids) => ids.length === 0,
  );
  const response = await gateway.chat(chatBody({ model: 'sql' }), bearer(key));
  expect(await errorOf(response)).toMatchObject({ status: 404, code: 'model_not_found' });
  expect((await get<LoraAdapter>(cluster, 'LoraAdapter', 'sql')).status?.askedAt).toBeUndefined();
});
