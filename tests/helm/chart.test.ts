// What the chart says: its texts are those of their sources, its values are checked, and it renders what it did.
import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { parse } from 'yaml';
import { settings as gatewaySettings } from '../../gateway/config.ts';
import { settings as operatorSettings } from '../../operator/config.ts';
import { chartFiles } from '../../scripts/chart.ts';
import { sharedControlPlane } from '../fixtures/control-plane.ts';
import { chartFolder, everything, find, helm, type Manifest, renderObjects, renderText } from './chart.ts';

const root = join(import.meta.dirname, '../..');
const read = (path: string) => readFileSync(join(root, path), 'utf8');
const schema = JSON.parse(read('helm/motet/values.schema.json'));

test('has the definitions, the version and the table of values that their sources say', () => {
  for (const [path, text] of chartFiles()) {
    expect(read(path), `${path} is old: run npm run chart`).toBe(text);
  }
});

test('installs the definitions of crds/ as they are, with labels of the release', async () => {
  const rendered = await renderObjects();
  for (const name of readdirSync(join(root, 'crds')).filter((name) => name.endsWith('.yaml'))) {
    const { metadata, ...source } = parse(read(`crds/${name}`)) as Manifest;
    const { metadata: labelled, ...copy } = find(rendered, 'CustomResourceDefinition', metadata.name);
    expect(copy).toEqual(source);
    expect(labelled.labels['app.kubernetes.io/instance']).toBe('motet');
  }
});

test('passes helm lint in strict mode, with and without its optional parts', async () => {
  const plane = await sharedControlPlane();
  for (const files of [[], ['-f', everything]]) {
    expect(await helm(plane, ['lint', '--strict', chartFolder, ...files])).toContain('0 chart(s) failed');
  }
});

test('renders what it did, by default and with every optional part', async () => {
  await expect(ownObjects(await renderText())).toMatchFileSnapshot('snapshots/default.yaml');
  await expect(ownObjects(await renderText({}, everything))).toMatchFileSnapshot('snapshots/everything.yaml');
});

/** Without the definitions, whose source is in the tree, and monitoring, which has tests of its own. */
function ownObjects(text: string): string {
  const isOther = /^# Source: motet\/templates\/(crds|monitoring)\//m;
  return text
    .split(/^---\n/m)
    .filter((document) => !isOther.test(document))
    .join('---\n');
}

test('refuses a key that it does not know, wherever it stands, and names it', async () => {
  // A value at every object that the schema describes, with one key too many.
  const withUnknown = (part: Schema): unknown => {
    const { type, properties, items } = resolve(part);
    if (type === 'array') return [withUnknown(items!)];
    if (properties === undefined) return undefined;
    const known = Object.entries(properties).flatMap(([name, property]) => {
      const value = name === 'global' ? undefined : withUnknown(property);
      return value === undefined || JSON.stringify(value) === '[null]' ? [] : [[name, value]];
    });
    return { ...Object.fromEntries(known), replikas: 1 };
  };
  const values = withUnknown(schema) as object;
  const message = await renderText(values).catch((error: Error) => error.message);

  const paths = objectPaths(values);
  expect(paths).toContain('/gateway/autoscaling');
  expect(paths).toContain('/gateway/extraEnv/0/valueFrom/secretKeyRef');
  for (const path of paths) {
    expect(message).toContain(`at '${path}': additional properties 'replikas' not allowed`);
  }
});

type Schema = { $ref?: string; type?: string; properties?: Record<string, Schema>; items?: Schema };

function resolve(part: Schema): Schema {
  return part.$ref === undefined ? part : schema.definitions[part.$ref.slice('#/definitions/'.length)];
}

/** JSON pointers of the objects within a value. */
function objectPaths(value: unknown, path = ''): string[] {
  if (typeof value !== 'object' || value === null) return [];
  const inner = Object.entries(value).flatMap(([key, part]) => objectPaths(part, `${path}/${key}`));
  return Array.isArray(value) ? inner : [path, ...inner];
}

test.each([
  [{ gateway: { replicas: '2' } }, '/gateway/replicas', 'got string, want integer'],
  [{ gateway: { service: { type: 'ExternalName' } } }, '/gateway/service/type', "'LoadBalancer'"],
  [{ gateway: { settings: { maxQueued: 0 } } }, '/gateway/settings/maxQueued', 'minimum'],
  [{ gateway: { disruption: { maxUnavailable: '120%' } } }, '/gateway/disruption/maxUnavailable', 'pattern'],
  [{ image: { digest: 'sha256:12' } }, '/image/digest', 'pattern'],
  [{ crds: { keep: 'yes' } }, '/crds/keep', 'got string, want boolean'],
  [{ engine: { trustedServiceAccounts: ['gateway'] } }, '/engine/trustedServiceAccounts/0', 'pattern'],
  [{ weightCache: { hostPath: 'var/cache' } }, '/weightCache/hostPath', 'pattern'],
  [
    { operator: { resources: { limits: { memory: 'lots' } } } },
    '/operator/resources/limits/memory',
    'pattern',
  ],
  [{ networkPolicy: { gatewayFrom: [{}] } }, '/networkPolicy/gatewayFrom/0', 'minProperties'],
])('refuses %j and says where', async (values, path, reason) => {
  const message = await renderText(values).catch((error: Error) => error.message);
  expect(message).toContain(`at '${path}': `);
  expect(message).toContain(reason);
});

test.each([
  [{ ingress: { enabled: true } }, 'ingress.hosts: expected at least one name'],
  [{ httpRoute: { enabled: true } }, 'httpRoute.parentRefs: expected at least one Gateway'],
  [{ certificate: { enabled: true } }, 'certificate.issuerRef.name: expected the name of an issuer'],
  [
    { certificate: { enabled: true, issuerRef: { name: 'letsencrypt' } } },
    'ingress.hosts: expected at least one name, for the certificate',
  ],
])('refuses the half of an option, %j', async (values, message) => {
  await expect(renderText(values)).rejects.toThrow(message);
});

test('shows and documents every value that its schema allows', () => {
  const shown = (part: Schema, value: unknown, path: string) => {
    const { properties } = resolve(part);
    if (properties === undefined || typeof value !== 'object' || Object.keys(value!).length === 0) return;
    // `global` is Helm's; resources may have parts that have no default.
    const known = Object.keys(properties).filter((name) => name !== 'global' && name !== 'claims');
    expect(Object.keys(value!).sort(), path).toEqual(known.sort());
    for (const name of known)
      shown(properties[name]!, (value as Record<string, unknown>)[name], `${path}.${name}`);
  };
  shown(schema, parse(read('helm/motet/values.yaml')), '');
});

test('lets people set every setting of the processes that the chart does not set itself', () => {
  const camelCase = (name: string) => name.replace(/-(.)/g, (_, letter: string) => letter.toUpperCase());
  const settable = (settings: object, ofTheChart: string[]) =>
    Object.keys(settings)
      .filter((name) => !ofTheChart.includes(name))
      .map(camelCase)
      .sort();
  expect(Object.keys(schema.definitions.operatorSettings.properties).sort()).toEqual(
    settable(operatorSettings, [
      ...['namespace', 'kubeconfig', 'host', 'port', 'lease-name', 'token-file'],
      ...['engine-image', 'engine-command', 'engine-service-account', 'trusted-service-accounts'],
    ]),
  );
  expect(Object.keys(schema.definitions.gatewaySettings.properties).sort()).toEqual(
    settable(gatewaySettings, [
      ...['kubernetes', 'namespace', 'kubeconfig', 'host', 'port', 'drain-timeout-ms', 'engine-token-file'],
      'batch-store',
      // For a gateway without a cluster.
      ...['engine', 'engine-key-file', 'api-keys-file', 'tenants-file', 'limits-file', 'insecure'],
      // Of values of their own.
      ...['gateway-replicas', 'redis-url', 'redis-password-file', 'redis-ca-file'],
    ]),
  );
});

test('has nothing outside of its namespace but definitions and the volume of the cache', async () => {
  const outside = (objects: Manifest[]) =>
    objects.filter(({ metadata }) => metadata.namespace !== 'motet').map(({ kind }) => kind);
  expect(outside(await renderObjects({ crds: { enabled: false } }))).toEqual([]);
  expect(new Set(outside(await renderObjects({}, everything)))).toEqual(
    new Set(['CustomResourceDefinition', 'PersistentVolume']),
  );
});

test('keeps names short enough however long the release is called', async () => {
  const plane = await sharedControlPlane();
  const text = await helm(plane, [
    'template',
    'r'.repeat(53),
    chartFolder,
    '-f',
    everything,
    '--set',
    'fullnameOverride=',
  ]);
  const names = [...text.matchAll(/^ {2}name: (\S+)$/gm)].map(([, name]) => name!);
  expect(names.length).toBeGreaterThan(20);
  expect(names.filter((name) => name.length > 63)).toEqual([]);
});
