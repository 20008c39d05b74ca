// Requests that name several adapters themselves: each right is checked, and the engine gets one header.

import { beforeAll, describe, expect, test } from 'vitest';
import { adaptersHeader } from '../../../engine/protocol.ts';
import { CompositionNames, compositionTarget } from '../../../gateway/groups/composition.ts';
import { installCrds } from '../../crds/install-crds.ts';
import { type ControlPlane, sharedControlPlane } from '../../fixtures/control-plane.ts';
import { baseModel, loraAdapter, tenant } from '../resources.ts';
import { bearer, metricOf, modelIds, startCluster } from '../start-cluster.ts';
import { chatBody, errorOf, until } from '../start-gateway.ts';

describe('the target of a composition', () => {
  const target = (name: string, baseModel = 'base', more = {}) => ({ name, baseModel, ...more });
  const compose = (members: Parameters<typeof compositionTarget>[0]) =>
    compositionTarget(members, undefined, new CompositionNames());

  test('is the same for any order of names', () => {
    const [a, b] = [
      { target: target('a'), weight: 1 },
      { target: target('b'), weight: 0.5 },
    ];
    expect(compose([b, a])).toEqual(compose([a, b]));
    expect(compose([b, a])).toMatchObject({
      name: 'a+b',
      baseModel: 'base',
      members: [
        { name: 'a', weight: 1 },
        { name: 'b', weight: 0.5 },
      ],
    });
  });

  test('asks for all that is there on demand, and is hopeless when one of them is', () => {
    const asks = (name: string) => ({ asks: [{ kind: 'LoraAdapter', name, idleMinutes: 1 }] });
    const members = [target('a', 'base', asks('a')), target('b', 'base', { ...asks('b'), isHopeless: true })];
    const made = compose(members.map((one) => ({ target: one, weight: 1 })));
    expect(made.asks?.map(({ name }) => name)).toEqual(['a', 'b']);
    expect(made.isHopeless).toBe(true);
  });

  test('has one base model', () => {
    const members = [target('a'), target('b', 'other')].map((one) => ({ target: one, weight: 1 }));
    expect(() => compose(members)).toThrow('adapters: expected adapters of one base model, but a and b');
  });
});

describe('a request with adapters', () => {
  let plane: ControlPlane;
  beforeAll(async () => {
    plane = await sharedControlPlane();
    await installCrds(plane);
  });

  const key = 'key-of-sales-and-more';
  async function start() {
    const cluster = await startCluster(plane);
    await cluster.create(baseModel('base'));
    for (const name of ['sql', 'tone', 'secret'])
      await cluster.create(loraAdapter(name, { labels: { team: name === 'secret' ? 'other' : 'sales' } }));
    await cluster.setSecret('sales', { key });
    const access = { adapters: { matchLabels: { team: 'sales' } } };
    await cluster.create(tenant('sales', { access }));
    const engine = await cluster.engine({ adapters: ['sql', 'tone', 'secret'] });
    const gateway = await cluster.gateway();
    await until(
      () => modelIds(gateway, key),
      (ids) => ids.length === 2,
    );
    const ask = (weights: Record<string, number>) => {
      const adapters = Object.entries(weights).map(([name, weight]) => ({ name, weight }));
      return gateway.chat(chatBody({ model: 'whatever', adapters } as never), bearer(key));
    };
    return { cluster, gateway, engine, ask };
  }

  test('is sent with one header in the order of names, and the client is told', async () => {
    const { gateway, engine, ask } = await start();
    const answer = await ask({ tone: -0.5, sql: 0.75 });
    expect([answer.status, answer.headers.get(adaptersHeader)]).toEqual([200, 'sql=0.75,tone=-0.5']);
    const { headers } = engine.fake.received.at(-1)!;
    expect(headers).toMatchObject({ [adaptersHeader]: 'sql=0.75,tone=-0.5' });
    expect(headers).not.toHaveProperty('x-motet-model');
    const labels =
      'route="/v1/chat/completions",model="sql+tone",target="sql+tone",tenant="sales",status="200"';
    expect(await metricOf(gateway, `motet_gateway_requests_total{${labels}}`)).toBe(1);
  });

  test('needs the right to each of them, looked up with every request', async () => {
    const { cluster, engine, ask } = await start();
    const numAsked = engine.fake.received.length;
    for (const name of ['secret', 'none']) {
      expect(await errorOf(await ask({ sql: 1, [name]: 1 }))).toMatchObject({
        status: 404,
        code: 'model_not_found',
        param: 'adapters',
        message: `The model \`${name}\` does not exist.`,
      });
    }
    expect(engine.fake.received).toHaveLength(numAsked);
    expect((await ask({ sql: 1, tone: 1 })).status).toBe(200);
    await cluster.change('LoraAdapter', 'tone', { metadata: { labels: { team: 'other' } } });
    await until(
      async () => (await ask({ sql: 1, tone: 1 })).status,
      (status) => status === 404,
    );
  });

  test('is refused by name when it is none of adapters', async () => {
    const { gateway, engine, ask } = await start();
    const numAsked = engine.fake.received.length;
    expect(await errorOf(await ask({ sql: 0 }))).toMatchObject({
      status: 400,
      param: 'adapters',
      message: 'adapters[0].weight: expected a number between -10 and 10, not 0, got 0',
    });
    const body = chatBody({ model: 'sql', adapters: 'tone' } as never);
    expect(await errorOf(await gateway.chat(body, bearer(key)))).toMatchObject({
      status: 400,
      param: 'adapters',
    });
    expect(engine.fake.received).toHaveLength(numAsked);
  });
});

test('compositions have a bounded number of names, since these are labels', () => {
  const names = new CompositionNames();
  const given = Array.from({ length: 300 }, (_, i) => names.nameOf(['y', `x${i}`]));
  expect(given[0]).toBe('x0+y');
  expect(given.at(-1)).toBe('composition');
  expect(new Set(given).size).toBe(257);
  expect([names.find(['x0', 'y']), names.find(['x299', 'y'])]).toEqual(['x0+y', null]);
});
