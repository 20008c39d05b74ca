import { beforeAll, describe, expect, onTestFinished, test } from 'vitest';
import { callApi, motetPath } from '../../crds/api.ts';
import { apiVersion, type BaseModel, type Kind, plurals } from '../../crds/types.ts';
import {
  type ControlPlane,
  createNamespace,
  kubectl,
  sharedControlPlane,
} from '../fixtures/control-plane.ts';
import { kubeConfigOf } from './api-proxy.ts';
import { installCrds } from './install-crds.ts';
import { definitions, fields } from './schemas.ts';

let plane: ControlPlane;
let namespace: string;
beforeAll(async () => {
  plane = await sharedControlPlane();
  await installCrds(plane);
  namespace = await createNamespace(plane);
});

const inNamespace = (...args: string[]) => kubectl(plane, ['-n', namespace, ...args]);

describe('every field', () => {
  test('has a description that ends as a sentence does', () => {
    const undescribed = fields
      .filter(({ path }) => !path.endsWith('[]'))
      .filter(({ schema }) => !/[.!?]$/.test(schema.description ?? ''));
    expect(undescribed.map(({ kind, path }) => `${kind}.${path}`)).toEqual([]);
  });

  test('of a spec is required, or says its default, the one that it has', () => {
    const silent = fields
      .filter(({ path }) => path.startsWith('spec.') && !path.endsWith('[]'))
      .filter(({ isRequired }) => !isRequired)
      .filter(({ schema: { default: value, description } }) =>
        value === undefined || typeof value === 'object'
          ? !/\bDefault\b/.test(description!)
          : !new RegExp(`\\bDefault ${value}\\.$`).test(description!),
      );
    expect(silent.map(({ kind, path }) => `${kind}.${path}`)).toEqual([]);
  });
});

test('the definitions are structural and their names are taken', async () => {
  for (const { metadata } of definitions) {
    const { status } = JSON.parse(await kubectl(plane, ['get', 'crd', metadata.name, '-o', 'json']));
    const conditions = Object.fromEntries(
      status.conditions.map((c: { type: string; status: string }) => [c.type, c.status]),
    );
    expect(conditions).toMatchObject({ NamesAccepted: 'True', Established: 'True' });
    expect(conditions.NonStructural ?? 'False').toBe('False');
  }
});

test('kubectl explain tells what a field is for, in which unit and what it is by default', async () => {
  expect(await kubectl(plane, ['explain', 'basemodel.spec.memory'])).toMatch(
    /device.*quantity\s+in bytes\. Default 1Gi\./s,
  );
  expect(await kubectl(plane, ['explain', 'lora.spec.source.uri'])).toContain('pvc://CLAIM/PATH');
  const tree = await kubectl(plane, ['explain', 'basemodel.spec', '--recursive']);
  expect(tree).toMatch(/quantization\t<string>\n\s+enum: keep, int8, int4/);
  expect(tree).toMatch(/source\t<Object> -required-\n\s+digest\t<string>\n\s+uri\t<string> -required-/);
});

test('short names and the category motet find them', async () => {
  await create('BaseModel', 'found', { source: { uri: 'pvc://m/x' } });
  await create('LoraAdapter', 'found', { baseModel: 'found', source: { uri: 'pvc://a/x' } });
  await create('AdapterRoute', 'found', { targets: [{ adapter: 'found' }] });
  await create('AdapterGroup', 'found', { baseModel: 'found', selector: {} });
  await create('Tenant', 'found', { keys: [{ secretRef: { name: 's' } }] });
  const all = await inNamespace('get', 'motet', '-o', 'name');
  expect(all.trim().split('\n').sort()).toEqual([
    'adaptergroup.motet.dev/found',
    'adapterroute.motet.dev/found',
    'basemodel.motet.dev/found',
    'loraadapter.motet.dev/found',
    'tenant.motet.dev/found',
  ]);
  for (const [short, kind] of [
    ['bm', 'basemodel'],
    ['lora', 'loraadapter'],
    ['ar', 'adapterroute'],
    ['ag', 'adaptergroup'],
  ]) {
    expect(await inNamespace('get', short!, '-o', 'name')).toContain(`${kind}.motet.dev/found`);
  }
});

describe('kubectl get shows what a person wants to know', () => {
  const ready = (status: string, reason: string, message: string) => ({
    conditions: [
      {
        type: 'Progressing',
        status: 'True',
        reason: 'RollingOut',
        message: 'no',
        lastTransitionTime: '2026-01-01T00:00:00Z',
      },
      { type: 'Ready', status, reason, message, lastTransitionTime: '2026-01-01T00:00:00Z' },
    ],
  });
  const rows: [Kind, spec: object, status: object, columns: object, wide: object][] = [
    [
      'BaseModel',
      { source: { uri: 'pvc://models/smollm2.gguf' }, replicas: 2 },
      { engines: '1/2', adapters: '9/10', ...ready('True', 'EnginesStarting', 'engine-b: pulling image') },
      { ENGINES: '1/2', ADAPTERS: '9/10', READY: 'True', REASON: 'EnginesStarting' },
      { ACCELERATOR: 'cpu', SOURCE: 'pvc://models/smollm2.gguf', MESSAGE: 'engine-b: pulling image' },
    ],
    [
      'LoraAdapter',
      { baseModel: 'smollm2', source: { uri: 'pvc://adapters/sql' }, copies: 2 },
      {
        copies: '2/2',
        tier: 'device',
        rank: 16,
        digest: 'sha256:1234',
        conditions: [
          ...ready('True', 'Resident', 'on 2 engines').conditions,
          { ...ready('False', 'NoRoom', 'pins are many').conditions[1], type: 'Pinned' },
        ],
      },
      { BASE: 'smollm2', RESIDENT: '2/2', TIER: 'device', RANK: '16', READY: 'True', REASON: 'Resident' },
      { PINNED: 'False', DIGEST: 'sha256:1234', SOURCE: 'pvc://adapters/sql', MESSAGE: 'on 2 engines' },
    ],
    [
      'AdapterRoute',
      { targets: [{ adapter: 'a', weight: 9 }, { adapter: 'b' }] },
      { summary: 'a 90%, b 10%', ...ready('False', 'TargetNotReady', 'b is not resident') },
      { TARGETS: 'a 90%, b 10%', READY: 'False', REASON: 'TargetNotReady' },
      { MESSAGE: 'b is not resident' },
    ],
    [
      'AdapterGroup',
      { baseModel: 'smollm2', selector: {}, maxMembers: 4 },
      { members: '2/3', ...ready('False', 'MemberNotReady', 'no engine holds c') },
      { BASE: 'smollm2', MEMBERS: '2/3', MOST: '4', READY: 'False', REASON: 'MemberNotReady' },
      { MESSAGE: 'no engine holds c' },
    ],
    [
      'Tenant',
      { keys: [{ secretRef: { name: 's' } }] },
      {
        ...{ keys: '0/1', models: 3, ...ready('False', 'SecretNotFound', 'there is no Secret s') },
        usage: {
          ...{ requestsPerMinute: 7, tokensPerMinute: 5_000_000_000, inFlight: 1, rejectedPerMinute: 2 },
          gateways: [],
        },
      },
      {
        ...{ KEYS: '0/1', MODELS: '3', 'REQUESTS/MIN': '7', 'TOKENS/MIN': '5000000000', 'REJECTED/MIN': '2' },
        READY: 'False',
        REASON: 'SecretNotFound',
      },
      { MESSAGE: 'there is no Secret s' },
    ],
  ];
  test.for(rows.map(([kind, ...row]) => ({ kind, row })))(
    'of $kind',
    async ({ kind, row: [spec, status, columns, wide] }) => {
      await create(kind, 'shown', spec, status);
      const get = ['get', plurals[kind], 'shown'];
      expect(table(await inNamespace(...get))).toEqual([
        { NAME: 'shown', ...columns, AGE: expect.any(String) },
      ]);
      expect(table(await inNamespace(...get, '-o', 'wide'))).toEqual([
        { NAME: 'shown', ...columns, AGE: expect.any(String), ...wide },
      ]);
    },
  );
});

test('adapters are found by their base model with a field selector', async () => {
  await create('LoraAdapter', 'of-one', { baseModel: 'one', source: { uri: 'pvc://a/x' } });
  await create('LoraAdapter', 'of-two', { baseModel: 'two', source: { uri: 'pvc://a/x' } });
  expect(await inNamespace('get', 'lora', '--field-selector', 'spec.baseModel=one', '-o', 'name')).toBe(
    'loraadapter.motet.dev/of-one\n',
  );
});

test('kubectl wait waits for the condition Ready', async () => {
  const condition = {
    type: 'Ready',
    status: 'True',
    reason: 'Resident',
    message: '',
    lastTransitionTime: '2026-01-01T00:00:00Z',
  };
  await create(
    'LoraAdapter',
    'awaited',
    { baseModel: 'b', source: { uri: 'pvc://a/x' } },
    { conditions: [condition] },
  );
  await inNamespace('wait', '--for=condition=Ready', 'lora/awaited', '--timeout=20s');
});

describe('the scale subresource of BaseModel', () => {
  const source = { uri: 'pvc://m/x' };

  test('kubectl scale sets spec.replicas and reads status.replicas', async () => {
    await create(
      'BaseModel',
      'scaled',
      { source, replicas: 2 },
      { replicas: 1, selector: 'motet.dev/base-model=scaled' },
    );
    await inNamespace('scale', 'basemodel/scaled', '--current-replicas=2', '--replicas=3');
    const path = motetPath('BaseModel', namespace, 'scaled');
    const { spec } = await callApi<BaseModel>(kubeConfigOf(plane), { path });
    expect(spec.replicas).toBe(3);
    const scale = await callApi<object>(kubeConfigOf(plane), { path: `${path}/scale` });
    expect(scale).toMatchObject({
      spec: { replicas: 3 },
      status: { replicas: 1, selector: 'motet.dev/base-model=scaled' },
    });
    await expect(inNamespace('scale', 'basemodel/scaled', '--replicas=1001')).rejects.toThrow(
      /spec.replicas/,
    );
  });

  test('a HorizontalPodAutoscaler brings it within its bounds', async () => {
    await create(
      'BaseModel',
      'auto',
      { source, replicas: 1 },
      { replicas: 1, selector: 'motet.dev/base-model=auto' },
    );
    const path = `/apis/autoscaling/v2/namespaces/${namespace}/horizontalpodautoscalers`;
    const kubeConfig = kubeConfigOf(plane);
    const resource = { name: 'cpu', target: { type: 'Utilization', averageUtilization: 80 } };
    await callApi(kubeConfig, {
      method: 'POST',
      path,
      body: {
        metadata: { name: 'auto' },
        spec: {
          scaleTargetRef: { apiVersion, kind: 'BaseModel', name: 'auto' },
          minReplicas: 3,
          maxReplicas: 5,
          metrics: [{ type: 'Resource', resource }],
        },
      },
    });
    onTestFinished(async () => {
      await callApi(kubeConfig, { method: 'DELETE', path: `${path}/auto` });
    });
    // Its controller looks every 15 s.
    const replicas = async () =>
      (await callApi<BaseModel>(kubeConfig, { path: motetPath('BaseModel', namespace, 'auto') })).spec
        .replicas;
    await expect.poll(replicas, { timeout: 60_000, interval: 500 }).toBe(3);
    type Autoscaler = { status: { conditions: { type: string; status: string }[]; currentReplicas: number } };
    const { status } = await callApi<Autoscaler>(kubeConfig, { path: `${path}/auto` });
    expect(status.conditions).toContainEqual(
      expect.objectContaining({ type: 'AbleToScale', status: 'True' }),
    );
  }, 90_000);
});

async function create(kind: Kind, name: string, spec: object, status?: object): Promise<void> {
  const kubeConfig = kubeConfigOf(plane);
  const body = { apiVersion, kind, metadata: { name }, spec };
  await callApi(kubeConfig, { method: 'POST', path: motetPath(kind, namespace), body });
  if (!status) return;
  await callApi(kubeConfig, {
    method: 'PATCH',
    path: motetPath(kind, namespace, name, 'status'),
    body: { status },
    contentType: 'application/merge-patch+json',
  });
}

/** What kubectl prints, as one object a row. Columns begin where their heads do. */
function table(text: string): Record<string, string>[] {
  const [head = '', ...rows] = text.trimEnd().split('\n');
  const columns = [...head.matchAll(/\S+\s*/g)];
  return rows.map((row) =>
    Object.fromEntries(
      columns.map(({ 0: name, index }, i) => [name.trim(), row.slice(index, columns[i + 1]?.index).trim()]),
    ),
  );
}
