// The chart in a real API server of its own, with controllers: what it installs is accepted as it is, even where pod
// security is restricted; an upgrade upgrades the definitions; an uninstall leaves what it should and nothing else.
import { execFile } from 'node:child_process';
import { cpSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { afterAll, beforeAll, expect, onTestFinished, test, vi } from 'vitest';
import { parseAllDocuments } from 'yaml';
import type { BaseModel } from '../../crds/types.ts';
import { desiredObjects } from '../../operator/desired.ts';
import {
  controlPlaneEnv,
  createNamespace,
  kubectl,
  type OwnControlPlane,
  startControlPlane,
} from '../fixtures/control-plane.ts';
import { chartFolder, everything, helm, type Manifest } from './chart.ts';
import { foreignDefinitions } from './foreign-definitions.ts';

let plane: OwnControlPlane;

beforeAll(async () => {
  plane = await startControlPlane();
  for (const path of await foreignDefinitions()) await kubectl(plane, ['create', '-f', path]);
  await kubectl(plane, ['wait', '--for=condition=Established', 'crds', '--all', '--timeout=60s']);
}, 120_000);
afterAll(() => plane?.stop());

const restricted = Object.fromEntries(
  ['enforce', 'warn'].map((mode) => [`pod-security.kubernetes.io/${mode}`, 'restricted']),
);
const options = { timeout: 120_000 };

test('every object passes a strict dry run, by default and with every optional part', options, async () => {
  const namespace = await createNamespace(plane, restricted);
  await isSettled(namespace);
  for (const files of [[], ['-f', everything]]) {
    const text = await helm(plane, ['template', 'motet', chartFolder, '-n', namespace, ...files]);
    const objects = parseAllDocuments(text).map((document) => document.toJS() as Manifest);
    // The API server knows no ServiceAccount from a dry run, so the pod of `helm test` has no account here.
    for (const { kind, spec } of objects) if (kind === 'Pod') delete spec.serviceAccountName;
    const report = await applyStrictly(namespace, asYaml(objects));
    expect(report.stderr).toBe('');
    expect(report.stdout.trim().split('\n')).toHaveLength(objects.length);
  }
});

test('installs where pod security is restricted, and pods are made', options, async () => {
  const namespace = await install({}, ['-f', everything]);
  // With autoscaling on, a Deployment begins with one pod.
  const pods = await vi.waitUntil(
    async () => {
      const names = await kubectl(plane, ['get', 'pods', '-n', namespace, '-o', 'name']);
      return names.trim().split('\n').length === 3 && names;
    },
    { timeout: 60_000, interval: 200 },
  );
  expect(pods).toMatch(/choir-gateway/);
  expect(pods).toMatch(/choir-operator/);
  const events = await kubectl(plane, [
    'get',
    'events',
    '-n',
    namespace,
    '-o',
    'jsonpath={.items[*].reason}',
  ]);
  expect(events).not.toContain('FailedCreate');
});

test('each example is accepted as it is', options, async () => {
  const namespace = await install();
  for (const name of ['base-model', 'adapters', 'tenant', 'route', 'sources']) {
    const path = join(import.meta.dirname, `../../examples/kubernetes/${name}.yaml`);
    const { stdout, stderr } = await applyStrictly(namespace, readFileSync(path, 'utf8'));
    expect(stderr).toBe('');
    expect(stdout).toMatch(/created \(server dry run\)/);
  }
});

test('engine pods of every kind are accepted where pod security is restricted', options, async () => {
  const namespace = await install();
  const nvidia = {
    apiVersion: 'node.k8s.io/v1',
    kind: 'RuntimeClass',
    metadata: { name: 'nvidia' },
    handler: 'runc',
  };
  await kubectl(plane, ['apply', '-f', '-'], JSON.stringify(nvidia));
  const settings = {
    engineImage: 'motet:0.1.0',
    engineCommand: ['node', '/app/engine/main.ts'],
    engineServiceAccount: 'motet-engine',
    trustedServiceAccounts: `${namespace}/motet-gateway`,
  };
  const specs = [
    { source: { uri: 'file:///models/small.gguf' } },
    {
      source: { uri: 'pvc://models/small.gguf' },
      cache: { claimName: 'cache' },
      adapterClaims: ['adapters'],
    },
    { source: { uri: 'file:///models/small.gguf' }, accelerator: { type: 'nvidia' } },
    { source: { uri: 'https://example.com/small.gguf', digest: `sha256:${'0'.repeat(64)}` } },
    {
      source: { uri: 'hf://org/name@main' },
      sourceAccess: {
        s3: { secretName: 'bucket' },
        hf: { secretName: 'hub' },
        oci: { secretName: 'registry', plainHttp: ['registry:5000'] },
        caConfigMapName: 'our-ca',
        bytesPerSecond: '100M',
      },
    },
  ];
  for (const [index, spec] of specs.entries()) {
    const wish = {
      apiVersion: 'motet.dev/v1alpha1',
      kind: 'BaseModel',
      metadata: { name: `small-${index}` },
      spec,
    };
    const create = ['create', '-n', namespace, '-o', 'json', '-f', '-'];
    const baseModel = JSON.parse(await kubectl(plane, create, JSON.stringify(wish))) as BaseModel;
    const { deployment, service, podDisruptionBudget } = desiredObjects(baseModel, settings);
    // The pod too: a Deployment is accepted whatever its pods are.
    const { metadata, spec: podSpec } = deployment.spec!.template;
    const pod = { apiVersion: 'v1', kind: 'Pod', metadata: { ...metadata, name: 'engine' }, spec: podSpec };
    const objects = [deployment, service, podDisruptionBudget, pod];
    const text = asYaml(objects);
    expect(await applyStrictly(namespace, text)).toMatchObject({ stderr: '' });
  }
});

test('the schema knows every field of the parts of Kubernetes objects that values may hold', async () => {
  type Openapi = { components: { schemas: Record<string, { properties: object }> } };
  const fields: Record<string, string[]> = {};
  for (const path of ['/openapi/v3/api/v1', '/openapi/v3/apis/networking.k8s.io/v1']) {
    const { components } = JSON.parse(await kubectl(plane, ['get', '--raw', path])) as Openapi;
    for (const [name, { properties = {} }] of Object.entries(components.schemas))
      fields[name.split('.').at(-1)!] = Object.keys(properties).sort();
  }
  const { definitions } = JSON.parse(readFileSync(join(chartFolder, 'values.schema.json'), 'utf8'));
  const properties = (part: { properties: object }) => Object.keys(part.properties).sort();
  const known: [string, { properties: object }][] = [
    ['ResourceRequirements', definitions.resources],
    ['EnvVar', definitions.envVar],
    ['EnvVarSource', definitions.envVar.properties.valueFrom],
    ['SecretKeySelector', definitions.envVar.properties.valueFrom.properties.secretKeyRef],
    ['Toleration', definitions.toleration],
    ['Affinity', definitions.affinity],
    ['NodeAffinity', definitions.affinity.properties.nodeAffinity],
    ['NodeSelectorTerm', definitions.nodeSelectorTerm],
    ['PodAffinity', definitions.podAffinity],
    ['PodAffinityTerm', definitions.podAffinityTerm],
    ['LabelSelector', definitions.labelSelector],
    ['NetworkPolicyPeer', definitions.networkPolicyPeer],
    ['IPBlock', definitions.networkPolicyPeer.properties.ipBlock],
  ];
  for (const [kind, part] of known) expect(properties(part), kind).toEqual(fields[kind]);
  // The chart adds these two.
  const spread = [...properties(definitions.topologySpreadConstraint), 'labelSelector', 'matchLabelKeys'];
  expect(spread.sort()).toEqual(fields.TopologySpreadConstraint);
});

test('an upgrade upgrades the definitions, and keeps what people made of them', options, async () => {
  const folder = mkdtempSync(join(tmpdir(), 'motet-chart-'));
  onTestFinished(() => rmSync(folder, { recursive: true }));
  cpSync(chartFolder, folder, { recursive: true });
  const path = join(folder, 'templates/crds/tenants.yaml');
  const text = readFileSync(path, 'utf8');
  writeFileSync(path, text.replace('name: Models', 'name: Selected'));
  const namespace = await install({}, [], folder);
  await kubectl(plane, ['apply', '-n', namespace, '-f', '-'], aTenant);
  const columns = 'jsonpath={.spec.versions[0].additionalPrinterColumns[*].name}';
  const definition = ['get', 'crd', 'tenants.motet.dev', '-o', columns];
  expect(await kubectl(plane, definition)).toContain('Selected');

  await helm(plane, ['upgrade', 'motet', chartFolder, '-n', namespace, '-f', '-']);

  expect(await kubectl(plane, definition)).toContain('Models');
  expect(await kubectl(plane, ['get', 'tenants', '-n', namespace, '-o', 'name'])).toContain('/acme');
});

test('an uninstall leaves nothing, although resources were in use', options, async () => {
  const namespace = await createNamespace(plane);
  await isSettled(namespace);
  const before = await everyObject(namespace);
  await helm(plane, ['install', 'motet', chartFolder, '-n', namespace, '-f', '-'], {
    weightCache: { hostPath: '/x' },
  });
  await kubectl(plane, ['apply', '-n', namespace, '-f', '-'], aTenant);
  await collectorKnowsBaseModels(namespace);
  await makeOwned(namespace, 'small');
  const during = await everyObject(namespace);
  expect(during).toContain('configmap/of-small');
  expect(during).toContain('lease.coordination.k8s.io/motet-operator');

  await helm(plane, ['uninstall', 'motet', '-n', namespace, ...noHooks]);

  await vi.waitFor(async () => expect(await everyObject(namespace)).toEqual(before), {
    timeout: 60_000,
    interval: 500,
  });
});

test(
  'with crds.keep an uninstall keeps resources, and the next release takes them over',
  options,
  async () => {
    const namespace = await install({ crds: { keep: true } });
    await kubectl(plane, ['apply', '-n', namespace, '-f', '-'], aTenant);
    await helm(plane, ['uninstall', 'motet', '-n', namespace]);
    expect(await kubectl(plane, ['get', 'tenants', '-n', namespace, '-o', 'name'])).toContain('/acme');

    await helm(plane, ['install', 'motet', chartFolder, '-n', namespace, '-f', '-']);
    await helm(plane, ['uninstall', 'motet', '-n', namespace, ...noHooks]);
    await definitionsAreGone();
  },
);

test('a second release without definitions asks for rights in its namespace only', options, async () => {
  await install();
  const namespace = await createNamespace(plane);
  await kubectl(plane, ['create', 'serviceaccount', 'team', '-n', namespace]);
  const user = `system:serviceaccount:${namespace}:team`;
  const all = ['--clusterrole=cluster-admin', `--serviceaccount=${namespace}:team`];
  await kubectl(plane, ['create', 'rolebinding', 'team', '-n', namespace, ...all]);
  const args = ['install', 'motet', chartFolder, '-n', namespace, '--kube-as-user', user, '-f', '-'];
  await helm(plane, args, { crds: { enabled: false } });
  await helm(plane, ['uninstall', 'motet', '-n', namespace, '--kube-as-user', user]);
});

/** The hook that removes engines is a pod, and nothing runs pods here; tests/system/kubernetes has it. */
const noHooks = ['--no-hooks'];

/** Installs a release `motet` in a namespace of its own, for the test that asks. */
async function install(values: object = {}, args: string[] = [], folder = chartFolder): Promise<string> {
  const namespace = await createNamespace(plane, restricted);
  onTestFinished(async () => {
    await helm(plane, ['uninstall', 'motet', '-n', namespace, '--ignore-not-found', ...noHooks]);
    await kubectl(plane, ['delete', ...ourDefinitions, '--ignore-not-found', '--wait=false']);
    await definitionsAreGone();
  }, 120_000);
  await helm(plane, ['install', 'motet', folder, '-n', namespace, ...args, '-f', '-'], values);
  return namespace;
}

const ourDefinitions = ['crd', '-l', 'app.kubernetes.io/name=motet'];

/**
 * They were deleted, and the next test installs them anew. A second does; but the API server may not be able to list what is left of a
 * kind that was made a moment ago ("storage is (re)initializing"), and then tries again after minutes: such a one is let go by hand.
 */
async function definitionsAreGone(): Promise<void> {
  const left = async () => (await kubectl(plane, ['get', ...ourDefinitions, '-o', 'name'])).trim();
  const isGone = () =>
    vi.waitFor(async () => expect(await left()).toBe(''), { timeout: 20_000, interval: 500 });
  await isGone().catch(async () => {
    const { items } = JSON.parse(await kubectl(plane, ['get', ...ourDefinitions, '-o', 'json']));
    const conditions = JSON.stringify(items.map(({ status }: { status: object }) => status));
    if (!conditions.includes('InstanceDeletionFailed'))
      throw new Error(`definitions are left: ${conditions}`);
    const letGo = ['--type=merge', '-p', '{"metadata":{"finalizers":null}}'];
    for (const name of (await left()).split('\n')) await kubectl(plane, ['patch', name, ...letGo]);
    await isGone();
  });
}

/** Every namespace is given these. */
async function isSettled(namespace: string): Promise<void> {
  for (const given of ['serviceaccount/default', 'configmap/kube-root-ca.crt'])
    await kubectl(plane, ['wait', '--for=create', given, '-n', namespace, '--timeout=30s']);
}

/** A BaseModel, and an object that it owns, as all have that the operator makes. The operator itself cannot run here. */
async function makeOwned(namespace: string, name: string): Promise<void> {
  const create = ['create', '-n', namespace, '-o', 'json', '-f', '-'];
  const wish = {
    apiVersion: 'motet.dev/v1alpha1',
    kind: 'BaseModel',
    metadata: { name },
    spec: { source: { uri: 'file:///models/small.gguf' } },
  };
  const { apiVersion, kind, metadata } = JSON.parse(
    await kubectl(plane, create, JSON.stringify(wish)),
  ) as BaseModel;
  const ownerReferences = [{ apiVersion, kind, name, uid: metadata.uid, controller: true }];
  const owned = { apiVersion: 'v1', kind: 'ConfigMap', metadata: { name: `of-${name}`, ownerReferences } };
  await kubectl(plane, create, JSON.stringify(owned));
}

/** The garbage collector looks for new kinds every half minute. What it does not know when it goes, it cannot collect. */
async function collectorKnowsBaseModels(namespace: string): Promise<void> {
  await makeOwned(namespace, 'probe');
  await kubectl(plane, ['delete', 'basemodel', 'probe', '-n', namespace]);
  await kubectl(plane, ['wait', '--for=delete', 'configmap/of-probe', '-n', namespace, '--timeout=100s']);
}

/** Dry run on the server that refuses unknown and repeated fields; warnings are on `stderr`. */
async function applyStrictly(namespace: string, text: string): Promise<{ stdout: string; stderr: string }> {
  const args = ['apply', '-n', namespace, '--dry-run=server', '--validate=strict', '-f', '-'];
  const running = promisify(execFile)(join(plane.clientsFolder, 'kubectl'), args, {
    env: controlPlaneEnv(plane),
  });
  running.child.stdin!.end(text);
  return running;
}

/** Names of all objects of a namespace and of those that are in none, but for Events and what tells of the cluster itself. */
async function everyObject(namespace: string): Promise<string[]> {
  const names = async (isNamespaced: boolean) => {
    const list = ['api-resources', '--verbs=list', '-o', 'name', `--namespaced=${isNamespaced}`];
    const kinds = (await kubectl(plane, list)).trim().split('\n');
    const wanted = kinds.filter((kind) => !/^(events|events\.events\.k8s\.io|componentstatuses)$/.test(kind));
    const get = ['get', wanted.join(','), '-n', namespace, '-o', 'name', '--ignore-not-found'];
    return (await kubectl(plane, get)).trim().split('\n');
  };
  const all = [...(await names(true)), ...(await names(false))];
  // The API server looks after these by itself, at times of its own.
  return all
    .filter((name) => !/^(namespace|apiservice|flowschema|prioritylevelconfiguration)/.test(name))
    .sort();
}

const aTenant = `
apiVersion: motet.dev/v1alpha1
kind: Tenant
metadata: { name: acme }
spec: { keys: [{ secretRef: { name: acme-key } }] }
`;

/** Documents that kubectl reads as they are meant: its YAML takes a bare `on` for true, and JSON is YAML too. */
function asYaml(objects: object[]): string {
  return objects.map((object) => `${JSON.stringify(object)}\n`).join('---\n');
}
