import { beforeAll, expect, test } from 'vitest';
import { callApi, motetPath } from '../../../crds/api.ts';
import type { BaseModel, LoraAdapter } from '../../../crds/types.ts';
import { planAutoLoad } from '../../../gateway/on-demand/auto-load.ts';
import { kubeConfigOf } from '../../crds/api-proxy.ts';
import { installCrds } from '../../crds/install-crds.ts';
import { type ControlPlane, sharedControlPlane } from '../../fixtures/control-plane.ts';
import { baseModel, loraAdapter, tenant } from '../resources.ts';
import { bearer, modelIds, startCluster } from '../start-cluster.ts';
import { chatBody, errorOf, until } from '../start-gateway.ts';

type Rule = NonNullable<BaseModel['spec']['autoLoad']>[number];

function base(rule: Partial<Rule> = {}): BaseModel {
  const made = baseModel('base');
  const autoLoad = [
    {
      names: 'acme/*',
      uri: 'hf://acme-org/{name}@main',
      labels: { team: 'acme' },
      most: 2,
      idleMinutes: 30,
      ...rule,
    },
  ];
  return { ...made, spec: { ...made.spec, autoLoad } };
}

const plan = (name: string, rule: Partial<Rule> = {}, others: LoraAdapter[] = [], mayUse = true) =>
  planAutoLoad(name, [base(rule)], others, () => mayUse);

test('a name that a pattern lets in becomes an adapter on demand, of the rule’s labels', () => {
  expect(plan('acme/sql-v2')).toEqual({
    kind: 'load',
    adapter: {
      apiVersion: 'motet.dev/v1alpha1',
      kind: 'LoraAdapter',
      metadata: {
        name: expect.stringMatching(/^auto-[0-9a-f]{20}$/),
        labels: { team: 'acme', 'motet.dev/auto-load': 'base' },
        ownerReferences: [
          { apiVersion: 'motet.dev/v1alpha1', kind: 'BaseModel', name: 'base', uid: 'uid-of-base' },
        ],
      },
      spec: {
        baseModel: 'base',
        source: { uri: 'hf://acme-org/sql-v2@main' },
        servedNames: ['acme/sql-v2'],
        onDemand: { idleMinutes: 30 },
      },
    },
  });
});

test.each([
  ['another name', 'other/sql'],
  ['nothing for the star', 'acme/'],
  ['a path in the star', 'acme/a/b'],
  ['a way up', 'acme/..'],
  ['a way up inside', 'acme/a..b'],
  ['a fragment', 'acme/a#b'],
  ['a query', 'acme/a?b'],
  ['another revision', 'acme/a@b'],
  ['a name in the name', 'acme/{name}'],
  ['a new line', 'acme/a\n'],
  ['one that is too long', `acme/${'a'.repeat(97)}`],
])('%s is not let in', (_, name) => {
  expect(plan(name)).toEqual({ kind: 'none' });
});

test('the star may stand anywhere, once', () => {
  const uriOf = (names: string, name: string) =>
    plan(name, { names }) as { adapter: { spec: { source: { uri: string } } } };
  expect(uriOf('*-beta', 'sql-beta').adapter.spec.source.uri).toBe('hf://acme-org/sql@main');
  expect(uriOf('a-*-z', 'a-b-z').adapter.spec.source.uri).toBe('hf://acme-org/b@main');
  // The ends of the pattern do not overlap.
  expect(plan('a-z', { names: 'a-*-z' })).toEqual({ kind: 'none' });
});

test('who may not use it is let in by nothing', () => {
  expect(plan('acme/sql', {}, [], false)).toEqual({ kind: 'none' });
});

test('no more than the rule’s bound are let in; what people declare does not count', () => {
  const made = (name: string, labels = { 'motet.dev/auto-load': 'base' }) =>
    loraAdapter(name, { servedNames: [`acme/${name}`], labels });
  expect(plan('acme/c', {}, [made('a')]).kind).toBe('load');
  expect(plan('acme/c', {}, [made('a'), made('b')])).toEqual({ kind: 'full', most: 2 });
  expect(plan('acme/c', {}, [made('a'), made('b', {} as never)]).kind).toBe('load');
});

let plane: ControlPlane;
beforeAll(async () => {
  plane = await sharedControlPlane();
  await installCrds(plane);
});

test('a name is declared once, rights first, and served when it is loaded', async () => {
  const cluster = await startCluster(plane);
  const { metadata, ...rest } = base();
  await cluster.create({ ...rest, metadata: { name: metadata.name! } });
  const key = { acme: 'key-of-acme-0123456789', globex: 'key-of-globex-0123456789' };
  for (const name of ['acme', 'globex'] as const) {
    await cluster.setSecret(name, { key: key[name] });
    await cluster.create(tenant(name, { access: { adapters: { matchLabels: { team: name } } } }));
  }
  const { fake } = await cluster.engine({ adapters: [] });
  const gateway = await cluster.gateway({ wakeWaitMs: 20_000 });
  const second = await cluster.gateway({ wakeWaitMs: 20_000 });
  for (const one of [gateway, second])
    await until(
      () => modelIds(one, key.acme),
      (ids) => ids.length === 0,
    );
  const declared = async () =>
    (
      await callApi<{ items: LoraAdapter[] }>(kubeConfigOf(plane), {
        path: motetPath('LoraAdapter', cluster.namespace),
      })
    ).items;

  const ask = (model: string, tenant: 'acme' | 'globex', one = gateway) =>
    one.chat(chatBody({ model }), bearer(key[tenant]));
  expect(await errorOf(await ask('acme/sql', 'globex'))).toMatchObject({
    status: 404,
    code: 'model_not_found',
  });
  expect(await errorOf(await ask('acme/../x', 'acme'))).toMatchObject({ status: 404 });
  expect(await declared()).toEqual([]);

  const herd = [gateway, gateway, gateway, second, second].map((one) => ask('acme/sql', 'acme', one));
  const [adapter] = await until(declared, (items) => items[0]?.status?.askedAt !== undefined);
  expect(adapter!.spec).toMatchObject({
    source: { uri: 'hf://acme-org/sql@main' },
    servedNames: ['acme/sql'],
  });
  fake.adapters.set('acme/sql', 'device');
  expect((await Promise.all(herd)).map(({ status }) => status)).toEqual([200, 200, 200, 200, 200]);
  expect(await declared()).toHaveLength(1);

  fake.adapters.set('acme/two', 'device');
  expect((await ask('acme/two', 'acme')).status).toBe(200);
  const full = await ask('acme/three', 'acme');
  expect(full.headers.get('retry-after')).toBe('60');
  expect(await errorOf(full)).toMatchObject({ status: 503, code: 'model_unavailable' });
});
