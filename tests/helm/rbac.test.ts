// Rights are what is needed and nothing else: operator and gateway run here with the chart's own rights, and what the API
// server saw them do is compared with what their Roles allow.
import { readFileSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { KubeConfig } from '@kubernetes/client-node';
import { pino } from 'pino';
import { beforeAll, expect, onTestFinished, test, vi } from 'vitest';
import { parseAllDocuments } from 'yaml';
import type { AdapterRoute } from '../../crds/types.ts';
import { parseConfig as parseGatewayConfig } from '../../gateway/config.ts';
import { startGateway } from '../../gateway/main.ts';
import { AskWriter } from '../../gateway/on-demand/ask-writer.ts';
import { AbortWriter } from '../../gateway/routes/abort-writer.ts';
import { parseConfig as parseOperatorConfig } from '../../operator/config.ts';
import { startOperator } from '../../operator/main.ts';
import {
  type ControlPlane,
  createNamespace,
  kubectl,
  sharedControlPlane,
} from '../fixtures/control-plane.ts';
import { chartFolder, find, helm, type Manifest, renderObjects } from './chart.ts';

let plane: ControlPlane;
let namespace: string;
const log = pino({ level: 'silent' });

beforeAll(async () => {
  plane = await sharedControlPlane();
  const kinds = ['basemodels', 'loraadapters', 'adapterroutes', 'adaptergroups', 'tenants'];
  const files = kinds.flatMap((kind) => ['-f', join(import.meta.dirname, `../../crds/${kind}.yaml`)]);
  await kubectl(plane, ['apply', '--server-side', ...files]);
  const names = kinds.map((kind) => `crd/${kind}.motet.dev`);
  await kubectl(plane, ['wait', '--for=condition=Established', '--timeout=60s', ...names]);
  namespace = await createNamespace(plane);
  const install = ['install', 'motet', chartFolder, '-n', namespace, '-f', '-'];
  await helm(plane, install, { crds: { enabled: false } });
});

test('operator and gateway use every verb of their Roles, and miss none', { timeout: 120_000 }, async () => {
  const files = ['base-model', 'adapters', 'tenant', 'route', 'group'].map((name) =>
    readFileSync(join(import.meta.dirname, `../../examples/kubernetes/${name}.yaml`), 'utf8'),
  );
  const objects = files.flatMap((text) => parseAllDocuments(text).map((one) => one.toJS() as Manifest));
  await run(['apply', '-f', '-'], files.join('---\n'));

  const operator = await startOperator(
    parseOperatorConfig(
      [
        ...['--kubeconfig', await kubeconfigOf('motet-operator'), '--namespace', namespace, '--port', '0'],
        ...['--host', '127.0.0.1', '--lease-name', 'motet-operator', '--engine-image', 'motet:test'],
        ...['--trusted-service-accounts', `${namespace}/motet-gateway`, '--lease-seconds', '3'],
      ],
      {},
    ),
    log,
  );
  onTestFinished(() => operator.stop());
  const gateway = await startGateway(
    parseGatewayConfig(
      [
        ...['--kubernetes', '--kubeconfig', await kubeconfigOf('motet-gateway'), '--namespace', namespace],
        ...['--port', '0'],
      ],
      {},
    ),
    log,
  );
  onTestFinished(() => gateway.drain());

  // What a gateway does when it finds a target of a route too bad.
  const gatewayConfig = new KubeConfig();
  gatewayConfig.loadFromFile(await kubeconfigOf('motet-gateway'));
  const { resourceVersion: _, ...metadata } = JSON.parse(
    await run(['get', 'adapterroute', 'sql-stable', '-o', 'json']),
  ).metadata;
  const fail = (error: Error) => expect.unreachable(error.message);
  const aborts = new AbortWriter(gatewayConfig, namespace, () => ({ metadata }) as AdapterRoute, fail);
  const { generation } = metadata;
  aborts.write('sql-stable', { target: 'sql-v2', generation, message: 'x', at: '2026-01-01T00:00:00Z' });
  onTestFinished(() => aborts.close());
  // And when somebody asks for what is there on demand.
  const asks = new AskWriter({
    ...{ kubeConfig: gatewayConfig, namespace, onError: fail },
    current: ({ kind, name }) => ours.find((one) => one.kind === kind && one.metadata.name === name) as never,
  });
  onTestFinished(() => asks.close());

  const ours = objects.filter(({ apiVersion }) => apiVersion.startsWith('motet.dev/'));
  expect(new Set(ours.map(({ kind }) => kind)).size).toBe(5);
  for (const kind of ['BaseModel', 'LoraAdapter'] as const) {
    const { name } = ours.find((one) => one.kind === kind)!.metadata;
    asks.ask({ kind, name, idleMinutes: 1 }, Date.now());
  }
  await vi.waitFor(
    async () => {
      for (const { kind, metadata } of ours) {
        const conditions = ['-o', 'jsonpath={.status.conditions[*].type}'];
        expect(await run(['get', kind, metadata.name, ...conditions]), metadata.name).toContain('Ready');
      }
      const rendered = await renderObjects();
      expect([...requestsOf('motet-operator').used].sort()).toEqual(rightsOf(rendered, 'motet-operator'));
      expect([...requestsOf('motet-gateway').used].sort()).toEqual(rightsOf(rendered, 'motet-gateway'));
    },
    { timeout: 60_000, interval: 500 },
  );
  expect(requestsOf('motet-operator').denied).toEqual([]);
  expect(requestsOf('motet-gateway').denied).toEqual([]);
});

test('applying an object that is not there asks for create beside patch', async () => {
  // The audit log says only `patch` of it, with 201; requestsOf() counts it as both, as the API server does.
  const kubeconfig = await kubeconfigOf('motet-operator');
  const service = {
    apiVersion: 'v1',
    kind: 'Service',
    metadata: { name: 'new' },
    spec: { ports: [{ port: 1 }] },
  };
  const apply = () =>
    run(['--kubeconfig', kubeconfig, 'apply', '--server-side', '-f', '-'], JSON.stringify(service));
  const index = find(await renderObjects(), 'Role', 'motet-operator').rules.findIndex(
    ({ resources }: Rule) => resources[0] === 'services',
  );
  const setVerbs = (verbs: string[]) => {
    const patch = [{ op: 'replace', path: `/rules/${index}/verbs`, value: verbs }];
    return run(['patch', 'role', 'motet-operator', '--type=json', '-p', JSON.stringify(patch)]);
  };
  await setVerbs(['list', 'watch', 'patch']);
  await vi.waitFor(() => expect(apply()).rejects.toThrow('cannot create resource "services"'), {
    timeout: 10_000,
  });
  await setVerbs(['list', 'watch', 'create', 'patch']);
  await vi.waitFor(apply, { timeout: 10_000 });
});

const motetKinds = [
  'basemodels.motet.dev',
  'loraadapters.motet.dev',
  'adapterroutes.motet.dev',
  'adaptergroups.motet.dev',
  'tenants.motet.dev',
];
const everyVerb = ['get', 'list', 'watch', 'create', 'update', 'patch', 'delete', 'deletecollection'];

/** Account -> what it may do to a resource; nothing of what is not named. */
const table: Record<string, Record<string, string[]>> = {
  'motet-operator': {
    ...{ 'basemodels.motet.dev': ['list', 'watch'], 'basemodels/status.motet.dev': ['patch'] },
    ...{ 'loraadapters.motet.dev': ['list', 'watch'], 'loraadapters/status.motet.dev': ['patch'] },
    ...{ 'adapterroutes.motet.dev': ['list', 'watch'], 'adapterroutes/status.motet.dev': ['patch'] },
    ...{ 'adaptergroups.motet.dev': ['list', 'watch'], 'adaptergroups/status.motet.dev': ['patch'] },
    pods: ['list', 'watch'],
    'deployments.apps': ['list', 'watch', 'create', 'patch'],
    services: ['list', 'watch', 'create', 'patch'],
    'poddisruptionbudgets.policy': ['list', 'watch', 'create', 'patch'],
    'events.events.k8s.io': ['create'],
  },
  'motet-gateway': {
    ...Object.fromEntries(motetKinds.map((kind) => [kind, ['list', 'watch']])),
    ...Object.fromEntries(
      motetKinds
        // The operator alone says what a group is.
        .filter((kind) => kind !== 'adaptergroups.motet.dev')
        .map((kind) => [kind.replace('.', '/status.'), ['patch']]),
    ),
    pods: ['list', 'watch'],
    secrets: ['get', 'list', 'watch'],
  },
  'motet-engine': {},
};
const askedAbout = [
  ...motetKinds,
  ...motetKinds.map((kind) => kind.replace('.', '/status.')),
  ...[
    'pods',
    'pods/exec',
    'pods/log',
    'pods/eviction',
    'secrets',
    'configmaps',
    'services',
    'serviceaccounts',
  ],
  ...[
    'serviceaccounts/token',
    'persistentvolumeclaims',
    'endpoints',
    'events',
    'events.events.k8s.io',
    'nodes',
  ],
  ...[
    'deployments.apps',
    'replicasets.apps',
    'statefulsets.apps',
    'jobs.batch',
    'poddisruptionbudgets.policy',
  ],
  ...['leases.coordination.k8s.io', 'networkpolicies.networking.k8s.io', 'namespaces'],
  ...['roles.rbac.authorization.k8s.io', 'rolebindings.rbac.authorization.k8s.io'],
  ...['clusterroles.rbac.authorization.k8s.io', 'customresourcedefinitions.apiextensions.k8s.io'],
];

test.each(Object.keys(table))('%s may do what the table says, and in no other namespace', async (account) => {
  const allowed = async (where: string) => {
    const questions = askedAbout.flatMap((resource) => everyVerb.map((verb) => ({ resource, verb })));
    const answers = await canI(account, where, questions);
    const rows = askedAbout.map((resource) => [
      resource,
      everyVerb.filter((verb) =>
        answers.some((answer) => answer.resource === resource && answer.verb === verb),
      ),
    ]);
    return Object.fromEntries(rows.filter(([, verbs]) => verbs!.length > 0));
  };
  const expected = Object.entries(table[account]!).map(([resource, verbs]) => [
    resource,
    everyVerb.filter((verb) => verbs.includes(verb)),
  ]);
  expect(await allowed(namespace)).toEqual(Object.fromEntries(expected));
  expect(await allowed('default')).toEqual({});
});

test('the operator may write its one lease and no other', async () => {
  const verbsOf = async (name: string) => {
    const questions = everyVerb.map((verb) => ({ resource: 'leases.coordination.k8s.io', verb, name }));
    return (await canI('motet-operator', namespace, questions)).map(({ verb }) => verb);
  };
  expect(await verbsOf('motet-operator')).toEqual(['get', 'update']);
  expect(await verbsOf('other')).toEqual([]);
});

interface Rule {
  apiGroups: string[];
  resources: string[];
  verbs: string[];
  resourceNames?: string[];
}

/** Rights as `verb resource.group`, sorted; a right to one object has its name behind. */
function rightsOf(objects: Manifest[], role: string): string[] {
  return (find(objects, 'Role', role).rules as Rule[])
    .flatMap(({ apiGroups, resources, verbs, resourceNames = [''] }) =>
      resources.flatMap((resource) =>
        verbs.flatMap((verb) =>
          resourceNames.map((name) =>
            `${verb} ${resource}.${apiGroups[0]} ${name}`.replace(/\. /, ' ').trim(),
          ),
        ),
      ),
    )
    .sort();
}

interface AuditEvent {
  verb: string;
  user: { username: string };
  objectRef?: { resource: string; subresource?: string; apiGroup?: string; name?: string };
  responseStatus?: { code: number };
  annotations?: Record<string, string>;
}

/** What an account asked of the API server, in the form of `rightsOf`. */
function requestsOf(account: string): { used: Set<string>; denied: string[] } {
  const used = new Set<string>();
  const denied: string[] = [];
  const user = `system:serviceaccount:${namespace}:${account}`;
  for (const line of readFileSync(plane.auditLog, 'utf8').split('\n').slice(0, -1)) {
    if (!line.includes(user)) continue;
    const { verb, objectRef, responseStatus, annotations = {}, user: by } = JSON.parse(line) as AuditEvent;
    if (by.username !== user || objectRef === undefined) continue;
    const { resource, subresource, apiGroup, name } = objectRef;
    const full = [subresource ? `${resource}/${subresource}` : resource, apiGroup].filter(Boolean).join('.');
    // Of leases it matters which.
    const what = resource === 'leases' ? `${full} ${name}` : full;
    if (annotations['authorization.k8s.io/decision'] === 'allow') {
      used.add(`${verb} ${what}`);
      if (verb === 'patch' && responseStatus?.code === 201) used.add(`create ${what}`);
    } else denied.push(`${verb} ${what}`);
  }
  return { used, denied };
}

type Question = { resource: string; verb: string; name?: string };

/** @returns the questions that the API server answers with yes */
async function canI(account: string, where: string, questions: Question[]): Promise<Question[]> {
  const reviews = questions.map(({ resource: full, verb, name }) => {
    const [path, ...group] = full.split('.');
    const [resource, subresource] = path!.split('/');
    const attributes = { namespace: where, verb, group: group.join('.'), resource, subresource, name };
    const groups = ['system:serviceaccounts', `system:serviceaccounts:${namespace}`, 'system:authenticated'];
    const spec = {
      user: `system:serviceaccount:${namespace}:${account}`,
      groups,
      resourceAttributes: attributes,
    };
    return { apiVersion: 'authorization.k8s.io/v1', kind: 'SubjectAccessReview', spec };
  });
  const list = JSON.stringify({ apiVersion: 'v1', kind: 'List', items: reviews });
  const answers = (await run(['create', '-f', '-', '-o', 'jsonpath={.status.allowed}{"\\n"}'], list))
    .trim()
    .split('\n');
  expect(answers).toHaveLength(questions.length);
  return questions.filter((_, index) => answers[index] === 'true');
}

/** A kubeconfig with a token of the account. */
async function kubeconfigOf(account: string): Promise<string> {
  const admin = new KubeConfig();
  admin.loadFromFile(plane.kubeconfig);
  const cluster = admin.getCurrentCluster()!;
  const kubeconfig = new KubeConfig();
  kubeconfig.loadFromClusterAndUser(cluster, {
    name: account,
    token: (await run(['create', 'token', account])).trim(),
  });
  const path = join(tmpdir(), `motet-${namespace}-${account}.kubeconfig`);
  writeFileSync(path, kubeconfig.exportConfig(), { mode: 0o600 });
  return path;
}

function run(args: string[], input = ''): Promise<string> {
  return kubectl(plane, ['-n', namespace, ...args], input);
}
