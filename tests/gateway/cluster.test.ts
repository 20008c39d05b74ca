// The gateway before a real API server: pods come and go, names and routes are resources, and the server goes away.

import { beforeAll, describe, expect, onTestFinished, test } from 'vitest';
import { installCrds } from '../crds/install-crds.ts';
import { type ControlPlane, sharedControlPlane, startControlPlane } from '../fixtures/control-plane.ts';
import {
  answer,
  answerForever,
  beginStream,
  chunkEvent,
  refuse,
  startFakeEngine,
} from '../fixtures/fake-engine.ts';
import { adapterRoute, baseModel, loraAdapter } from './resources.ts';
import { type Cluster, type Engine, metricOf, modelIds, startCluster } from './start-cluster.ts';
import { chatBody, errorOf, type TestGateway, until } from './start-gateway.ts';

const longer = { timeout: 120_000 };
/** Everybody may use everything: what tenants may is in cluster-tenants.test.ts. */
const open = { isInsecure: true };

let plane: ControlPlane;
beforeAll(async () => {
  plane = await sharedControlPlane();
  await installCrds(plane);
});

const ready = (gateway: TestGateway) =>
  until(
    () => fetch(`${gateway.url}/readyz`),
    ({ status }) => status === 200,
  );

const statusOf = async (gateway: TestGateway, model: string) =>
  (await gateway.chat(chatBody({ model }))).status;

const served = (gateway: TestGateway, model = 'base') =>
  until(
    () => statusOf(gateway, model),
    (status) => status === 200,
  );

async function openCluster(): Promise<{ cluster: Cluster; gateway: TestGateway }> {
  const cluster = await startCluster(plane);
  await cluster.create(baseModel('base'));
  const gateway = await cluster.gateway(open);
  await ready(gateway);
  return { cluster, gateway };
}

describe('pods', () => {
  test('without an engine it is ready, and says that no engine is', async () => {
    const { gateway } = await openCluster();
    expect(await errorOf(await gateway.chat(chatBody()))).toMatchObject({
      status: 503,
      code: 'no_engine_ready',
    });
    expect(await errorOf(await gateway.chat(chatBody({ model: 'x' })))).toMatchObject({
      code: 'model_not_found',
    });
    expect(await metricOf(gateway, 'motet_gateway_engines{base_model="base",state="ready"}')).toBe(0);
  });

  test('one that turns ready gets requests; one that is not ready any more gets none, and keeps those it has', async () => {
    const { cluster, gateway } = await openCluster();
    const engine = await cluster.engine({ isReady: false });
    expect(await statusOf(gateway, 'base')).toBe(503);
    engine.fake.isReady = true;
    await served(gateway);

    engine.fake.script = answerForever;
    const received = engine.fake.nextReceived();
    const stream = await gateway.chat(chatBody({ stream: true }));
    const { res } = await received;
    // What is asked meanwhile ends: it would fill the engine, and what comes then wait for a place.
    engine.fake.script = answer;
    engine.fake.isReady = false;
    await until(
      () => statusOf(gateway, 'base'),
      (status) => status === 503,
    );
    res.end('data: [DONE]\n\n');
    expect(await stream.text()).toBe(`${chunkEvent('fake')}data: [DONE]\n\n`);
  });

  test('one that answers gets requests, also while its pod is said to be not ready; none when its pod has ended', async () => {
    const { cluster, gateway } = await openCluster();
    const said = await cluster.engine();
    const readyOf = (engine: Engine) =>
      metricOf(gateway, `motet_gateway_engine_ready{engine="${engine.pod}"}`);
    await served(gateway);
    await said.setPodStatus({ isReady: false });
    // What is said of a pod comes in order: when this one is known, so is the other's new status.
    const later = await cluster.engine();
    await until(
      () => readyOf(later),
      (value) => value === 1,
    );
    expect(await readyOf(said)).toBe(1);

    await said.setPodStatus({ phase: 'Failed', isReady: false });
    await until(
      () => readyOf(said),
      (value) => value === null,
    );
    const before = said.fake.received.length;
    for (let i = 0; i < 4; i += 1) expect(await statusOf(gateway, 'base')).toBe(200);
    expect(said.fake.received).toHaveLength(before);
  });

  test('one that is being deleted gets no new requests, and its stream goes on', async () => {
    const { cluster, gateway } = await openCluster();
    const leaving = await cluster.engine({ finalizers: ['tests.motet.dev/hold'] });
    await served(gateway);
    leaving.fake.script = answerForever;
    const received = leaving.fake.nextReceived();
    const stream = await gateway.chat(chatBody({ stream: true }));
    const { res } = await received;
    const staying = await cluster.engine();
    await leaving.deletePod();
    await until(
      () => metricOf(gateway, `motet_gateway_engine_ready{engine="${leaving.pod}"}`),
      (value) => value === 0,
    );

    const before = leaving.fake.received.length;
    await served(gateway);
    for (let i = 0; i < 4; i += 1) expect(await statusOf(gateway, 'base')).toBe(200);
    expect(leaving.fake.received).toHaveLength(before);
    expect(staying.fake.received.length).toBeGreaterThanOrEqual(4);
    res.write(chunkEvent(' words'));
    res.end('data: [DONE]\n\n');
    expect(await stream.text()).toBe(`${chunkEvent('fake')}${chunkEvent(' words')}data: [DONE]\n\n`);
    const release = { metadata: { finalizers: null } };
    await cluster.core(`/pods/${leaving.pod}`, {
      method: 'PATCH',
      contentType: 'application/merge-patch+json',
      body: release,
    });
  });

  test(
    'one that vanishes in the middle of a stream ends it with an error event, long before the idle timeout',
    longer,
    async () => {
      const { cluster, gateway } = await openCluster();
      const engine = await cluster.engine();
      await served(gateway);
      engine.fake.script = answerForever;
      const received = engine.fake.nextReceived();
      const stream = await gateway.chat(chatBody({ stream: true }));
      await received;
      // Its connections stay open and silent, as those of a machine that lost its power.
      await engine.deletePod();
      expect(await stream.text()).toMatch(/"code":"engine_failed"\}\}\n\n$/);
    },
  );

  test('one that vanishes before its first byte is replaced by another', longer, async () => {
    const { cluster, gateway } = await openCluster();
    const lost = await cluster.engine();
    await served(gateway);
    lost.fake.script = () => {};
    const received = lost.fake.nextReceived();
    const response = gateway.chat(chatBody());
    await received;
    const other = await cluster.engine();
    await until(
      () => metricOf(gateway, `motet_gateway_engine_ready{engine="${other.pod}"}`),
      (value) => value === 1,
    );
    await lost.deletePod();
    expect((await response).status).toBe(200);
    expect(other.fake.received).toHaveLength(1);
  });

  test('one whose object is deleted and that still answers is heard to its end', longer, async () => {
    const { cluster, gateway } = await openCluster();
    const engine = await cluster.engine();
    await served(gateway);
    engine.fake.script = answerForever;
    const received = engine.fake.nextReceived();
    const stream = await gateway.chat(chatBody({ stream: true }));
    const { res } = await received;
    await engine.deletePod();
    await until(
      () => metricOf(gateway, `motet_gateway_engine_ready{engine="${engine.pod}"}`),
      (value) => value === null,
    );
    // More than the grace in all, and never silent for so long.
    for (let i = 0; i < 6; i += 1) {
      await new Promise((resolve) => setTimeout(resolve, 500));
      res.write(chunkEvent(' words'));
    }
    res.end('data: [DONE]\n\n');
    expect(await stream.text()).toMatch(/data: \[DONE\]\n\n$/);
  });

  test('an address that comes back is another engine', async () => {
    const { cluster, gateway } = await openCluster();
    await cluster.create(baseModel('other'));
    const first = await cluster.engine({ pod: 'first' });
    await served(gateway);
    await first.deletePod();
    first.fake.base = 'other';
    await cluster.engine({ pod: 'second', baseModel: 'other', fake: first.fake });
    await served(gateway, 'other');
    expect(await errorOf(await gateway.chat(chatBody()))).toMatchObject({ code: 'no_engine_ready' });
    expect(await metricOf(gateway, 'motet_gateway_engine_ready{engine="first"}')).toBeNull();
    expect(await metricOf(gateway, 'motet_gateway_engine_ready{engine="second"}')).toBe(1);
  });

  test('a pod of the same name that was made anew is another engine', async () => {
    const { cluster, gateway } = await openCluster();
    const first = await cluster.engine({ pod: 'same' });
    await served(gateway);
    await first.deletePod();
    const second = await cluster.engine({ pod: 'same' });
    await until(
      async () => {
        await statusOf(gateway, 'base');
        return second.fake.received.length;
      },
      (length) => length > 0,
    );
  });

  test('metrics call engines by their pods, and forget those that left', async () => {
    const { cluster, gateway } = await openCluster();
    const engine = await cluster.engine({ pod: 'to-be-lost' });
    await served(gateway);
    engine.fake.script = ({ res }) => void res.destroy();
    await statusOf(gateway, 'base');
    const errors = 'motet_gateway_engine_errors_total{engine="to-be-lost",reason="engine_failed"}';
    expect(await metricOf(gateway, errors)).toBe(1);
    expect(await metricOf(gateway, 'motet_gateway_engines{base_model="base",state="ready"}')).toBe(1);
    await engine.deletePod();
    await until(
      () => metricOf(gateway, 'motet_gateway_engines{base_model="base",state="ready"}'),
      (value) => value === 0,
    );
    expect(await (await fetch(`${gateway.url}/metrics`)).text()).not.toContain('to-be-lost');
  });
});

describe('names', () => {
  test('an adapter is not there yet, then served, then unknown when its resource goes, whatever engines hold', async () => {
    const { cluster, gateway } = await openCluster();
    const engine = await cluster.engine();
    await served(gateway);
    engine.fake.adapters.set('sql', 'device');
    expect(await errorOf(await gateway.chat(chatBody({ model: 'sql' })))).toMatchObject({ status: 404 });

    engine.fake.adapters.delete('sql');
    await cluster.create(loraAdapter('sql'));
    const waiting = await until(
      () => gateway.chat(chatBody({ model: 'sql' })),
      ({ status }) => status !== 404,
    );
    expect(waiting.headers.get('retry-after')).toMatch(/^\d+$/);
    const error = await errorOf(waiting);
    expect(error).toMatchObject({ status: 503, code: 'model_unavailable', param: 'model' });
    expect(error.message).toContain('not loaded');

    engine.fake.adapters.set('sql', 'device');
    expect(await statusOf(gateway, 'sql')).toBe(200);
    await cluster.remove('LoraAdapter', 'sql');
    await until(
      () => statusOf(gateway, 'sql'),
      (status) => status === 404,
    );
  });

  test('an adapter that its engine just unloaded is unavailable, and not unknown', async () => {
    const { cluster, gateway } = await openCluster();
    await cluster.create(loraAdapter('sql'));
    const engine = await cluster.engine({ adapters: ['sql'] });
    await served(gateway, 'sql');
    engine.fake.script = refuse(404, 'model_not_found');
    expect(await errorOf(await gateway.chat(chatBody({ model: 'sql' })))).toMatchObject({
      status: 503,
      code: 'model_unavailable',
    });
  });

  test('only engines of its own base model are asked for an adapter', async () => {
    const { cluster, gateway } = await openCluster();
    await cluster.create(baseModel('other'));
    await cluster.create(loraAdapter('sql', { baseModel: 'other' }));
    const wrong = await cluster.engine({ adapters: ['sql'] });
    const right = await cluster.engine({ baseModel: 'other', base: 'other', adapters: ['sql'] });
    await served(gateway, 'base');
    await served(gateway, 'sql');
    for (let i = 0; i < 4; i += 1) expect(await statusOf(gateway, 'sql')).toBe(200);
    expect(right.fake.received.length).toBeGreaterThanOrEqual(5);
    const bodies = wrong.fake.received.map(({ body }) => JSON.parse(body.toString()).model);
    expect(bodies).not.toContain('sql');
  });

  test('a route shares requests by weight, and says to engine and client who answers', async () => {
    const { cluster, gateway } = await openCluster();
    for (const name of ['v1', 'v2', 'v3']) await cluster.create(loraAdapter(name));
    const targets = [
      { adapter: 'v1', weight: 1 },
      { adapter: 'v2', weight: 3 },
      { adapter: 'v3', weight: 1_000 },
    ];
    await cluster.create(adapterRoute('sql', targets));
    // Nobody holds v3, so it has no share.
    const engine = await cluster.engine({ adapters: ['v1', 'v2'] });
    await served(gateway, 'sql');
    engine.fake.received.length = 0;

    const answeredBy: (string | null)[] = [];
    for (let i = 0; i < 60; i += 1) {
      const body = Buffer.from('{"model":"sql" , "messages":[]}');
      const response = await gateway.chat(body, { headers: { 'x-motet-model': 'v3' } });
      expect(await response.json()).toMatchObject({ model: 'sql' });
      answeredBy.push(response.headers.get('x-motet-model'));
      expect(engine.fake.received.at(-1)?.body).toEqual(body);
    }
    expect(engine.fake.received.map(({ headers }) => headers['x-motet-model'])).toEqual(answeredBy);
    const count = (name: string) => answeredBy.filter((found) => found === name).length;
    expect(count('v1') + count('v2')).toBe(60);
    expect(count('v1')).toBeGreaterThan(0);
    expect(count('v2')).toBeGreaterThan(count('v1'));

    const ofRequests = (target: string) =>
      `motet_gateway_requests_total{route="/v1/chat/completions",model="sql",target="${target}",tenant="",status="200"}`;
    expect(await metricOf(gateway, ofRequests('v2'))).toBeGreaterThanOrEqual(count('v2'));
    expect((await gateway.wholeLog()).find(({ target }) => target === 'v2')).toMatchObject({ model: 'sql' });
    const { data } = (await (await fetch(`${gateway.url}/v1/models`)).json()) as {
      data: { id: string; parent: string | null; max_model_len: number }[];
    };
    expect(data.map(({ id }) => id)).toEqual(['base', 'sql', 'v1', 'v2']);
    expect(data.find(({ id }) => id === 'sql')).toMatchObject({ parent: 'base', max_model_len: 2048 });
  });

  test('a client cannot choose who answers by the header of routes', async () => {
    const { cluster, gateway } = await openCluster();
    const engine = await cluster.engine({ adapters: ['hidden'] });
    await served(gateway);
    const response = await gateway.chat(chatBody(), { headers: { 'X-Motet-Model': 'hidden' } });
    expect(response.headers.get('x-motet-model')).toBe('base');
    expect(engine.fake.received.at(-1)?.headers).not.toHaveProperty('x-motet-model');
  });

  test('a route without a target that exists is unavailable', async () => {
    const { cluster, gateway } = await openCluster();
    await cluster.create(adapterRoute('sql', [{ adapter: 'nowhere' }]));
    const response = await until(
      () => gateway.chat(chatBody({ model: 'sql' })),
      ({ status }) => status !== 404,
    );
    expect(await errorOf(response)).toMatchObject({ status: 503, code: 'model_unavailable' });
  });
});

describe('the API server', () => {
  test(
    'is away: what is known is gone on with, dead engines leave, and what came meanwhile is found',
    longer,
    async () => {
      const own = await startControlPlane({ controllers: false });
      onTestFinished(() => own.stop());
      await installCrds(own);
      const cluster = await startCluster(own);
      await cluster.create(baseModel('base'));
      await cluster.create(loraAdapter('sql'));
      const [dying, staying] = [await cluster.engine(), await cluster.engine()];
      const gateway = await cluster.gateway(open);
      await ready(gateway);
      for (const { pod } of [dying, staying]) {
        await until(
          () => metricOf(gateway, `motet_gateway_engine_ready{engine="${pod}"}`),
          (value) => value === 1,
        );
      }
      const stale = 'motet_gateway_watch_stale_seconds{resource="pods"}';
      expect(await metricOf(gateway, stale)).toBe(0);

      await own.stopApiserver();
      await until(
        () => metricOf(gateway, stale),
        (seconds) => seconds! > 0,
      );
      expect(await statusOf(gateway, 'base')).toBe(200);
      await dying.fake.kill();
      for (let i = 0; i < 10; i += 1) expect(await statusOf(gateway, 'base')).toBe(200);
      await until(
        () => metricOf(gateway, 'motet_gateway_engines{base_model="base",state="away"}'),
        (value) => value === 1,
      );
      // An adapter that the operator loaded before is found by asking engines.
      staying.fake.adapters.set('sql', 'device');
      await served(gateway, 'sql');
      expect((await fetch(`${gateway.url}/readyz`)).status).toBe(200);

      await own.startApiserver();
      await cluster.engine({ pod: 'new' });
      await until(
        () => metricOf(gateway, 'motet_gateway_engine_ready{engine="new"}'),
        (value) => value === 1,
      );
      await until(
        () => metricOf(gateway, stale),
        (seconds) => seconds === 0,
      );
      await until(
        () => gateway.logLines.some(({ msg }) => msg === 'the API server is heard again'),
        (isThere) => isThere,
      );
      const away = gateway.logLines.filter(({ msg }) => String(msg).includes('cannot be heard'));
      expect(away).toHaveLength(1);
    },
  );

  test(
    'was never there: the gateway is alive, not ready, and lets nobody in until it is',
    longer,
    async () => {
      const own = await startControlPlane({ controllers: false });
      onTestFinished(() => own.stop());
      await installCrds(own);
      const cluster = await startCluster(own);
      await cluster.create(baseModel('base'));
      await cluster.engine();
      await own.stopApiserver();
      const gateway = await cluster.gateway(open);
      expect((await fetch(`${gateway.url}/livez`)).status).toBe(200);
      const notReady = await errorOf(await fetch(`${gateway.url}/readyz`));
      expect(notReady).toMatchObject({ status: 503, code: 'starting' });
      expect(notReady.message).toContain('pods');
      const refused = await gateway.chat(chatBody());
      expect(refused.headers.get('retry-after')).toMatch(/^\d+$/);
      expect(await errorOf(refused)).toMatchObject({ status: 503, code: 'starting' });
      await own.startApiserver();
      await ready(gateway);
      await served(gateway);
    },
  );
});

test('an engine that streams is not cut when the gateway restarts its look at it', async () => {
  const { cluster, gateway } = await openCluster();
  const fake = await startFakeEngine();
  const engine = await cluster.engine({ fake });
  await served(gateway);
  fake.script = ({ res }) => {
    beginStream(res);
    res.write(chunkEvent('fake'));
  };
  const received = fake.nextReceived();
  const stream = await gateway.chat(chatBody({ stream: true }));
  const { res } = await received;
  fake.isReady = false;
  await until(
    () => metricOf(gateway, `motet_gateway_engine_ready{engine="${engine.pod}"}`),
    (value) => value === 0,
  );
  fake.isReady = true;
  await until(
    () => metricOf(gateway, `motet_gateway_engine_ready{engine="${engine.pod}"}`),
    (value) => value === 1,
  );
  expect(await metricOf(gateway, `motet_gateway_engine_requests_in_flight{engine="${engine.pod}"}`)).toBe(1);
  expect(await modelIds(gateway, 'nobody')).toEqual(['base']);
  res.end('data: [DONE]\n\n');
  expect(await stream.text()).toMatch(/data: \[DONE\]\n\n$/);
});
