import type { V1Deployment } from '@kubernetes/client-node';
import { afterAll, beforeAll, expect, test, vi } from 'vitest';
import type { BaseModel } from '../../crds/types.ts';
import { createNamespace, type OwnControlPlane, startControlPlane } from '../fixtures/control-plane.ts';
import {
  applyCrds,
  baseModelOf,
  type Namespace,
  namespaceOf,
  startTestOperator,
  untilReason,
} from './start-operator.ts';

let plane: OwnControlPlane;

beforeAll(async () => {
  plane = await startControlPlane({ numFakeNodes: 3 });
  await applyCrds(plane);
});

afterAll(() => plane?.stop());

/** A namespace with an operator and what its pods need. */
async function withOperator(args: string[] = [], labels: Record<string, string> = {}): Promise<Namespace> {
  const namespace = namespaceOf(plane, await createNamespace(plane, labels));
  await namespace.kubectl(['create', 'serviceaccount', 'motet-engine']);
  await startTestOperator(plane, namespace.name, args);
  return namespace;
}

const apply = (namespace: Namespace, object: object) =>
  namespace.kubectl(['apply', '--server-side', '-f', '-'], object);
const deploymentOf = (namespace: Namespace, name = 'tiny') => namespace.get<V1Deployment>('deployment', name);
const until = <T>(check: () => Promise<T>) => vi.waitFor(check, { timeout: 30_000, interval: 200 });
const exists = async (namespace: Namespace, kind: string, name: string) =>
  (await namespace.kubectl(['get', kind, name, '--ignore-not-found', '-o', 'name'])) !== '';

/** Requests of the operator that write; the lease is left out. */
const writesOf = (namespace: Namespace) =>
  namespace
    .writes()
    .filter(({ userAgent, objectRef }) => userAgent === 'motet' && objectRef.resource !== 'leases')
    .map(({ verb, objectRef }) =>
      [verb, objectRef.resource, objectRef.subresource].filter(Boolean).join(' '),
    );

/** The world has come to rest: nothing was written for a while. */
async function settled(namespace: Namespace): Promise<number> {
  let before = -1;
  return vi.waitFor(
    () => {
      const now = writesOf(namespace).length;
      const isSame = now === before;
      before = now;
      expect(isSame).toBe(true);
      return now;
    },
    { timeout: 30_000, interval: 2000 },
  );
}

test('a base model gets its engines, in a namespace with pod security restricted, and is ready', async () => {
  const namespace = await withOperator([], { 'pod-security.kubernetes.io/enforce': 'restricted' });
  await apply(namespace, baseModelOf('tiny', { replicas: 2 }));
  const { status } = await untilReason(namespace, 'tiny', 'EnginesReady');
  expect(status).toMatchObject({ replicas: 2, readyReplicas: 2, engines: '2/2' });
  expect(status!.pods!.every(({ ready, node }) => ready && node)).toBe(true);
  await untilReason(namespace, 'tiny', 'RolledOut', 'Progressing');
  for (const kind of ['service', 'poddisruptionbudget'])
    expect(await exists(namespace, kind, 'tiny')).toBe(true);
  const scale = await namespace.kubectl([
    'get',
    '--raw',
    `/apis/motet.dev/v1alpha1/namespaces/${namespace.name}/basemodels/tiny/scale`,
  ]);
  expect(JSON.parse(scale).status).toEqual({ replicas: 2, selector: 'motet.dev/base-model=tiny' });
});

test('is told of in events, one for each turn of its conditions', async () => {
  const namespace = await withOperator();
  await apply(namespace, baseModelOf('tiny'));
  await untilReason(namespace, 'tiny', 'EnginesReady');
  await until(async () => {
    const events = await namespace.kubectl([
      ...['get', 'events', '--field-selector', 'involvedObject.kind=BaseModel,involvedObject.name=tiny'],
      ...['-o', 'jsonpath={range .items[*]}{.type} {.reason}{"\\n"}{end}'],
    ]);
    expect(events.split('\n')).toEqual(expect.arrayContaining(['Normal EnginesReady', 'Normal RolledOut']));
  });
});

/** Reconciles of base models that ended well. */
async function numReconciles({ port }: { port: number }): Promise<number> {
  const text = await (await fetch(`http://127.0.0.1:${port}/metrics`)).text();
  return Number(/motet_operator_reconcile_total\{kind="base-model",result="ok"\} (\d+)/.exec(text)?.[1] ?? 0);
}

test('a resync of an unchanged world writes nothing, nor does an operator that is started again', async () => {
  const namespace = namespaceOf(plane, await createNamespace(plane));
  await namespace.kubectl(['create', 'serviceaccount', 'motet-engine']);
  const start = () => startTestOperator(plane, namespace.name, ['--resync-seconds', '1']);
  const first = await start();
  const spec = {
    // What the API server writes its own way.
    memory: { device: '1500000k' },
    podTemplate: {
      resources: { limits: { cpu: '0.5', memory: '3072Mi' } },
      env: [{ name: 'EMPTY', value: '' }],
    },
    cache: { sizeLimit: '2048Mi' },
  };
  await apply(namespace, baseModelOf('tiny', spec));
  await untilReason(namespace, 'tiny', 'EnginesReady');
  const before = await settled(namespace);
  const three = async (operator: { port: number }) => {
    const from = await numReconciles(operator);
    await until(async () => expect(await numReconciles(operator)).toBeGreaterThanOrEqual(from + 3));
  };
  await three(first);
  await first.stop();
  await three(await start());
  expect(writesOf(namespace).slice(before)).toEqual([]);
});

test('scales as a scale says, to zero and back', async () => {
  const namespace = await withOperator();
  await apply(namespace, baseModelOf('tiny'));
  await untilReason(namespace, 'tiny', 'EnginesReady');
  await namespace.kubectl(['scale', 'basemodel/tiny', '--replicas=0']);
  expect((await untilReason(namespace, 'tiny', 'ScaledToZero')).status!.engines).toBe('0/0');
  await namespace.kubectl(['scale', 'basemodel/tiny', '--replicas=3']);
  expect((await untilReason(namespace, 'tiny', 'EnginesReady')).status!.engines).toBe('3/3');
});

test('sets back what others change in its fields, and leaves what they add', async () => {
  const namespace = await withOperator();
  await apply(namespace, baseModelOf('tiny'));
  await untilReason(namespace, 'tiny', 'EnginesReady');
  await namespace.kubectl([
    'label',
    'deployment/tiny',
    'team=a',
    'app.kubernetes.io/managed-by=me',
    '--overwrite',
  ]);
  await namespace.kubectl(['annotate', 'deployment/tiny', 'note=mine']);
  await namespace.kubectl(['scale', 'deployment/tiny', '--replicas=5']);
  await namespace.kubectl(['set', 'env', 'deployment/tiny', 'MOTET_MAX_WAITING=1', 'EXTRA=1']);
  await until(async () => {
    const { metadata, spec } = await deploymentOf(namespace);
    expect(spec!.replicas).toBe(1);
    expect(metadata!.labels).toMatchObject({ team: 'a', 'app.kubernetes.io/managed-by': 'motet-operator' });
    expect(metadata!.annotations).toMatchObject({ note: 'mine' });
    const env = Object.fromEntries(
      spec!.template.spec!.containers[0]!.env!.map(({ name, value }) => [name, value]),
    );
    expect(env).toMatchObject({ MOTET_MAX_WAITING: '256', EXTRA: '1' });
  });
});

test('makes again what is deleted by hand', async () => {
  const namespace = await withOperator();
  await apply(namespace, baseModelOf('tiny'));
  await untilReason(namespace, 'tiny', 'EnginesReady');
  const before = (await deploymentOf(namespace)).metadata!.uid;
  await namespace.kubectl([
    'delete',
    'deployment/tiny',
    'service/tiny',
    'poddisruptionbudget/tiny',
    '--cascade=foreground',
  ]);
  await until(async () => {
    expect((await deploymentOf(namespace)).metadata!.uid).not.toBe(before);
    for (const kind of ['service', 'poddisruptionbudget'])
      expect(await exists(namespace, kind, 'tiny')).toBe(true);
  });
  await untilReason(namespace, 'tiny', 'EnginesReady');
});

test('takes back what a change of the spec takes away', async () => {
  const namespace = await withOperator();
  const podTemplate = { env: [{ name: 'EXTRA', value: '1' }], nodeSelector: { 'kubernetes.io/os': 'linux' } };
  await apply(namespace, baseModelOf('tiny', { podTemplate }));
  await until(async () =>
    expect((await deploymentOf(namespace)).spec!.template.spec!.nodeSelector).toBeDefined(),
  );
  await apply(namespace, baseModelOf('tiny'));
  await until(async () => {
    const { spec } = (await deploymentOf(namespace)).spec!.template;
    expect(spec!.nodeSelector).toBeUndefined();
    expect(spec!.containers[0]!.env!.some(({ name }) => name === 'EXTRA')).toBe(false);
  });
});

test('leaves nothing when it is deleted, also while its pods are being made', async () => {
  const namespace = await withOperator();
  await apply(namespace, baseModelOf('tiny', { replicas: 3 }));
  await until(async () => expect(await exists(namespace, 'deployment', 'tiny')).toBe(true));
  await namespace.kubectl(['delete', 'basemodel/tiny']);
  await until(async () => {
    const left = await namespace.kubectl([
      'get',
      'deployments,replicasets,pods,services,poddisruptionbudgets',
      '-o',
      'name',
    ]);
    expect(left).toBe('');
  });
});

test('a base model that is made again waits for the end of the former, and is ready', async () => {
  const namespace = await withOperator();
  await apply(namespace, baseModelOf('tiny'));
  const { metadata } = await untilReason(namespace, 'tiny', 'EnginesReady');
  await namespace.kubectl(['delete', 'basemodel/tiny']);
  await apply(namespace, baseModelOf('tiny'));
  await until(async () => {
    const { ownerReferences } = (await deploymentOf(namespace)).metadata!;
    expect(ownerReferences![0]!.uid).not.toBe(metadata.uid);
  });
  await untilReason(namespace, 'tiny', 'EnginesReady');
});

test('does not touch a Deployment of its name that is not its own', async () => {
  const namespace = await withOperator();
  await namespace.kubectl(['create', 'deployment', 'tiny', '--image=mine']);
  await apply(namespace, baseModelOf('tiny'));
  const { status } = await untilReason(namespace, 'tiny', 'ApplyRefused');
  expect(status!.conditions![0]!.message).toContain("there is a Deployment tiny that is not the operator's");
  expect((await deploymentOf(namespace)).spec!.template.spec!.containers[0]!.image).toBe('mine');
  await namespace.kubectl(['delete', 'deployment/tiny']);
  await untilReason(namespace, 'tiny', 'EnginesReady');
});

test('says what the API server refuses, in its words', async () => {
  const namespace = await withOperator();
  const podTemplate = { volumeMounts: [{ name: 'nowhere', mountPath: '/data' }] };
  await apply(namespace, baseModelOf('tiny', { podTemplate }));
  const { status } = await untilReason(namespace, 'tiny', 'ApplyRefused');
  expect(status!.conditions![0]!.message).toContain('volumeMounts[2].name: Not found: "nowhere"');
  await apply(namespace, baseModelOf('tiny'));
  await untilReason(namespace, 'tiny', 'EnginesReady');
});

test('says why pods cannot be made or scheduled', async () => {
  const namespace = await withOperator();
  await apply(namespace, baseModelOf('tiny', { podTemplate: { nodeSelector: { zone: 'nowhere' } } }));
  const unschedulable = await untilReason(namespace, 'tiny', 'PodsPending');
  expect(unschedulable.status!.conditions![0]!.message).toMatch(
    /nodes are available: .*node affinity\/selector/,
  );

  await namespace.kubectl(['create', 'quota', 'small', '--hard=pods=0']);
  await apply(namespace, baseModelOf('other'));
  const refused = await untilReason(namespace, 'other', 'PodsPending');
  expect(refused.status!.conditions![0]!.message).toContain('exceeded quota: small');
});

test('an engine that ends again and again says why, in its own words', async () => {
  const namespace = await withOperator();
  // No node takes it, so that this test speaks for its kubelet.
  await apply(namespace, baseModelOf('tiny', { podTemplate: { nodeSelector: { zone: 'nowhere' } } }));
  const [pod] = (await untilReason(namespace, 'tiny', 'PodsPending')).status!.pods!;
  const words = 'motet engine: /models/tiny.gguf: expected a GGUF file, got 4 bytes';
  const conditions = [
    { type: 'PodScheduled', status: 'True' },
    { type: 'Ready', status: 'False' },
  ];
  const engine = {
    ...{ name: 'engine', image: 'x', imageID: '', ready: false, restartCount: 3 },
    state: { waiting: { reason: 'CrashLoopBackOff', message: 'back-off 40s' } },
    lastState: { terminated: { exitCode: 78, reason: 'Error', message: `{"level":30}\n${words}\n` } },
  };
  const patch = JSON.stringify({ status: { conditions, containerStatuses: [engine] } });
  await namespace.kubectl(['patch', 'pod', pod!.name, '--subresource=status', '--type=merge', '-p', patch]);
  const { status } = await untilReason(namespace, 'tiny', 'EngineFailing');
  const said = '/models/tiny.gguf: expected a GGUF file, got 4 bytes (exit code 78)';
  expect(status!.conditions![0]!.message).toBe(`0 of 1 engines take requests. ${pod!.name}: ${said}`);
  expect(status!.pods).toMatchObject([{ name: pod!.name, ready: false, message: said }]);
});

test('of two that claim a name the older has it, and the younger gets it when it is free', async () => {
  const namespace = await withOperator();
  await apply(namespace, baseModelOf('old', { servedName: 'chat' }));
  await untilReason(namespace, 'old', 'EnginesReady');
  // Ages are told apart by the second.
  await vi.waitFor(async () => {
    const { metadata } = await namespace.get<BaseModel>('basemodel', 'old');
    expect(Date.now() - new Date(metadata.creationTimestamp!).getTime()).toBeGreaterThan(1100);
  });
  await apply(namespace, baseModelOf('young', { servedName: 'chat' }));
  const { status } = await untilReason(namespace, 'young', 'NameConflict');
  expect(status!.conditions![0]!.message).toContain('the name chat is that of BaseModel old, which is older');
  expect(await exists(namespace, 'deployment', 'young')).toBe(false);
  await namespace.kubectl(['delete', 'basemodel/old']);
  await untilReason(namespace, 'young', 'EnginesReady');
});

test('the Service of a name with dots has none', async () => {
  const namespace = await withOperator();
  await apply(namespace, baseModelOf('llama-3.2-1b'));
  await untilReason(namespace, 'llama-3.2-1b', 'EnginesReady');
  expect(await exists(namespace, 'service', 'llama-3-2-1b')).toBe(true);
});

test('an operator that is started again takes up where the former left', async () => {
  const namespace = namespaceOf(plane, await createNamespace(plane));
  await namespace.kubectl(['create', 'serviceaccount', 'motet-engine']);
  const first = await startTestOperator(plane, namespace.name);
  await apply(namespace, baseModelOf('tiny'));
  await untilReason(namespace, 'tiny', 'EnginesReady');
  await settled(namespace);
  await first.stop();
  const before = writesOf(namespace).length;

  await namespace.kubectl(['scale', 'basemodel/tiny', '--replicas=2']);
  await startTestOperator(plane, namespace.name);
  await untilReason(namespace, 'tiny', 'EnginesReady');
  await settled(namespace);
  const written = new Set(writesOf(namespace).slice(before));
  // The Service and the budget are as they should be, and are left alone.
  expect([...written].sort()).toEqual(['create events', 'patch basemodels status', 'patch deployments']);
});
