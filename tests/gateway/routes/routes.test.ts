// AdapterRoutes at work: gateways in front of fake engines, with a real API server between them.

import { beforeAll, expect, test } from 'vitest';
import { callApi, motetPath } from '../../../crds/api.ts';
import type { AdapterRoute } from '../../../crds/types.ts';
import { kubeConfigOf } from '../../crds/api-proxy.ts';
import { installCrds } from '../../crds/install-crds.ts';
import { type ControlPlane, sharedControlPlane } from '../../fixtures/control-plane.ts';
import { answer, type FakeEngine, refuse, type Script } from '../../fixtures/fake-engine.ts';
import { adapterRoute, baseModel, loraAdapter } from '../resources.ts';
import { type Cluster, metricOf, startCluster } from '../start-cluster.ts';
import { chatBody, type TestGateway, until } from '../start-gateway.ts';

let plane: ControlPlane;
beforeAll(async () => {
  plane = await sharedControlPlane();
  await installCrds(plane);
});

type More = Parameters<typeof adapterRoute>[3];
type Targets = Parameters<typeof adapterRoute>[1];

/** An engine with the adapters v1 and v2, and the route `sql` over them. */
async function routed(more: More, targets: Targets = [{ adapter: 'v1' }, { adapter: 'v2' }]) {
  const cluster = await startCluster(plane);
  await cluster.create(baseModel('base'));
  for (const name of ['v1', 'v2']) await cluster.create(loraAdapter(name));
  await cluster.create(adapterRoute('sql', targets, {}, more));
  const { fake } = await cluster.engine({ adapters: ['v1', 'v2'] });
  const gateway = await readyGateway(cluster);
  const route = () =>
    callApi<AdapterRoute>(kubeConfigOf(plane), { path: motetPath('AdapterRoute', cluster.namespace, 'sql') });
  return { cluster, fake, gateway, route };
}

async function readyGateway(cluster: Cluster): Promise<TestGateway> {
  const gateway = await cluster.gateway({ isInsecure: true });
  await until(
    () => gateway.chat(chatBody({ model: 'v1' })),
    ({ status }) => status === 200,
  );
  return gateway;
}

/** Who answered: the header of each answer. */
async function answerers(gateway: TestGateway, count: number, body: object = {}): Promise<string[]> {
  const answers: string[] = [];
  for (let i = 0; i < count; i += 1) {
    const response = await gateway.chat(chatBody({ model: 'sql', ...body }));
    await response.arrayBuffer();
    answers.push(response.headers.get('x-motet-model') ?? String(response.status));
  }
  return answers;
}

const askedAs = ({ received }: FakeEngine) => received.map(({ headers }) => headers['x-motet-model']);

test('a sticky user stays with one target, at every gateway', async () => {
  const { cluster, gateway } = await routed({ sticky: { by: 'User' } });
  const second = await readyGateway(cluster);
  const all: string[] = [];
  for (let i = 0; i < 12; i += 1) {
    const user = `user-${i}`;
    const [first, ...rest] = [
      ...(await answerers(gateway, 2, { user })),
      ...(await answerers(second, 1, { user })),
    ];
    expect(rest).toEqual([first, first]);
    all.push(first!);
  }
  expect(new Set(all)).toEqual(new Set(['v1', 'v2']));
});

test('a target on disk gets its share when it has come into memory, and keeps it', async () => {
  const { fake, gateway } = await routed({});
  await until(
    () => answerers(gateway, 1),
    ([name]) => name === 'v2',
  );
  fake.adapters.set('v2', 'disk');
  const looks = fake.numLooks;
  await until(
    () => fake.numLooks,
    (count) => count > looks + 1,
  );
  // It was in once: leaving memory under way is no reason to take it out.
  await until(
    () => answerers(gateway, 1),
    ([name]) => name === 'v2',
  );

  const cold = await routed({}, [
    { adapter: 'v1', weight: 1 },
    { adapter: 'v2', weight: 1_000_000 },
  ]);
  cold.fake.adapters.set('v2', 'disk');
  const fresh = await cold.cluster.gateway({ isInsecure: true });
  await until(
    () => fresh.chat(chatBody({ model: 'v1' })),
    ({ status }) => status === 200,
  );
  cold.fake.received.length = 0;
  expect(await answerers(fresh, 5)).toEqual(['v1', 'v1', 'v1', 'v1', 'v1']);
  // It is asked for a token of its own, so that it comes.
  const warmUp = await until(
    () => cold.fake.received.find(({ path }) => path === '/v1/completions'),
    (received) => received !== undefined,
  );
  expect(JSON.parse(warmUp!.body.toString())).toMatchObject({ model: 'v2', max_tokens: 1 });
  cold.fake.adapters.set('v2', 'host');
  await until(
    () => answerers(fresh, 1),
    ([name]) => name === 'v2',
  );
});

test('a target that fails loses its share at every gateway, and has it again with another spec', async () => {
  const abort = { maxErrorPercent: 20, windowSeconds: 60, minRequests: 5 };
  const { cluster, fake, gateway, route } = await routed({ abort });
  const second = await readyGateway(cluster);
  const failing: Script = (received) =>
    received.headers['x-motet-model'] === 'v2' ? refuse(500, 'broken')(received) : answer(received);
  fake.script = failing;
  const ask = async () => {
    await answerers(gateway, 1);
    return (await route()).status?.aborted;
  };
  await until(ask, (aborted) => aborted !== undefined);
  expect((await route()).status!.aborted).toMatchObject([
    { target: 'v2', generation: 1, message: expect.stringMatching(/of \d+ requests failed within 60 s/) },
  ]);
  expect(await metricOf(gateway, 'motet_gateway_route_aborts_total{route="sql",target="v2"}')).toBe(1);
  expect(await answerers(gateway, 8)).toEqual(Array(8).fill('v1'));
  // The other has read it; it did not judge by itself.
  await until(
    async () => new Set(await answerers(second, 8)),
    (names) => names.size === 1 && names.has('v1'),
  );
  expect(await metricOf(second, 'motet_gateway_route_aborts_total{route="sql",target="v2"}')).toBeNull();

  fake.script = answer;
  await cluster.change('AdapterRoute', 'sql', { spec: { abort: { maxErrorPercent: 30 } } });
  for (const one of [gateway, second])
    await until(
      () => answerers(one, 1),
      ([name]) => name === 'v2',
    );
});

test('the stable target is never aborted', async () => {
  const abort = { maxErrorPercent: 0, windowSeconds: 60, minRequests: 1 };
  const { fake, gateway, route } = await routed({ abort }, [{ adapter: 'v1' }]);
  fake.script = refuse(500, 'broken');
  await answerers(gateway, 5);
  expect((await route()).status?.aborted).toBeUndefined();
  fake.script = answer;
  expect(await answerers(gateway, 1)).toEqual(['v1']);
});

test('a target that listens gets copies, and the client waits for none of them', async () => {
  const { fake, gateway } = await routed({}, [
    { adapter: 'v1' },
    { adapter: 'v2', weight: 0, shadowPercent: 100 },
  ]);
  fake.received.length = 0;
  const held: (() => void)[] = [];
  fake.script = (received) => {
    if (received.headers['x-motet-model'] === 'v2') held.push(() => void answer(received));
    else return answer(received);
  };
  expect(await answerers(gateway, 3)).toEqual(['v1', 'v1', 'v1']);
  await until(
    () => held.length,
    (count) => count === 3,
  );
  expect(askedAs(fake).sort()).toEqual(['v1', 'v1', 'v1', 'v2', 'v2', 'v2']);
  const [asked, copy] = ['v1', 'v2'].map(
    (name) => fake.received.find(({ headers }) => headers['x-motet-model'] === name)!,
  );
  expect(copy!.body).toEqual(asked!.body);
  const priorities = [asked, copy].map((each) => each!.headers['x-motet-priority']);
  expect(priorities).toEqual(['0', '-10']);
  for (const end of held) end();
  const series = (result: string) =>
    `motet_gateway_shadow_requests_total{route="sql",target="v2",result="${result}"}`;
  await until(
    () => metricOf(gateway, series('ok')),
    (count) => count === 3,
  );
  // Nobody is billed: what is counted is what clients asked.
  expect(await metricOf(gateway, 'motet_gateway_requests_in_flight')).toBe(1);
  const text = await (await fetch(`${gateway.url}/metrics`)).text();
  expect(text).not.toMatch(/motet_gateway_requests_total{[^}]*target="v2"/);
});

test('a copy is left out when no engine has room to spare', async () => {
  const targets = [{ adapter: 'v1' }, { adapter: 'v2', weight: 0, shadowPercent: 100 }];
  const { cluster, fake } = await routed({}, targets);
  const small = await cluster.gateway({ isInsecure: true, maxInFlightPerEngine: 2 });
  await until(
    () => small.chat(chatBody({ model: 'v1' })),
    ({ status }) => status === 200,
  );
  let end = () => {};
  fake.script = (received) => {
    if (!received.body.includes('hold')) return answer(received);
    end = () => void answer(received);
  };
  const holding = small.chat(chatBody({ model: 'v1', user: 'hold' }));
  await fake.nextReceived();
  expect(await answerers(small, 1)).toEqual(['v1']);
  const series = 'motet_gateway_shadow_requests_total{route="sql",target="v2",result="skipped"}';
  await until(
    () => metricOf(small, series),
    (count) => count === 1,
  );
  end();
  expect((await holding).status).toBe(200);
});
