import type { V1Container, V1PodSpec } from '@kubernetes/client-node';
import { describe, expect, test } from 'vitest';
import type { BaseModel } from '../../crds/types.ts';
import { desiredObjects, serviceName } from '../../operator/desired.ts';
import { baseModel } from './builders.ts';

const settings = {
  engineImage: 'motet/engine:1',
  engineCommand: ['node', '/app/engine/main.ts'],
  engineServiceAccount: 'motet-engine',
  trustedServiceAccounts: 'default/motet-gateway',
};

const objects = (spec: Partial<BaseModel['spec']> = {}) => desiredObjects(baseModel(spec), settings);
const template = (spec?: Partial<BaseModel['spec']>) => objects(spec).deployment.spec!.template;
const podSpec = (spec?: Partial<BaseModel['spec']>): V1PodSpec => template(spec).spec!;
const engine = (spec?: Partial<BaseModel['spec']>): V1Container => podSpec(spec).containers[0]!;
const env = (spec?: Partial<BaseModel['spec']>) =>
  Object.fromEntries(engine(spec).env!.map(({ name, value }) => [name, value]));

test('a base model owns a Deployment, a Service and a PodDisruptionBudget of its engines', () => {
  const { deployment, service, podDisruptionBudget } = objects({
    replicas: 3,
    disruption: { maxUnavailable: 2 },
  });
  for (const { metadata } of [deployment, service, podDisruptionBudget]) {
    expect(metadata).toMatchObject({ name: 'tiny', namespace: 'default' });
    expect(metadata!.ownerReferences).toEqual([
      {
        apiVersion: 'motet.dev/v1alpha1',
        kind: 'BaseModel',
        name: 'tiny',
        uid: 'uid-of-tiny',
        controller: true,
        blockOwnerDeletion: true,
      },
    ]);
  }
  const selector = { 'motet.dev/base-model': 'tiny' };
  expect(deployment.spec).toMatchObject({ replicas: 3, selector: { matchLabels: selector } });
  expect(service.spec).toMatchObject({ type: 'ClusterIP', selector, ports: [{ name: 'http', port: 8000 }] });
  expect(podDisruptionBudget.spec).toMatchObject({ maxUnavailable: 2, selector: { matchLabels: selector } });
  expect(template().metadata!.labels).toMatchObject(selector);
});

test.each([
  ['tiny', 'tiny'],
  ['llama-3.2-1b', 'llama-3-2-1b'],
  ['7b', 'model-7b'],
])('the Service of %s is %s, since names of Services are narrower', (name, expected) => {
  expect(serviceName(name)).toBe(expected);
  expect(desiredObjects(baseModel({}, { name }), settings).service.metadata!.name).toBe(expected);
});

test('pods comply with pod security restricted', () => {
  expect(podSpec().securityContext).toMatchObject({
    runAsNonRoot: true,
    runAsUser: 65532,
    fsGroup: 65532,
    seccompProfile: { type: 'RuntimeDefault' },
  });
  expect(engine().securityContext).toEqual({
    allowPrivilegeEscalation: false,
    readOnlyRootFilesystem: true,
    capabilities: { drop: ['ALL'] },
  });
});

test('settings reach the engine as its variables', () => {
  const limits = { maxModelLen: 4096, maxBatchTokens: 512, maxSequences: 32, maxWaiting: 8, maxLoraRank: 64 };
  expect(
    env({
      limits,
      servedName: 'org/tiny',
      quantization: 'int4',
      kv: { dtype: 'int8', prefixCache: false, eviction: 'lru' },
      adapterQuantization: 'int8',
      pooling: 'mean',
      memory: { device: '1.5Gi', host: '2Gi', disk: '10G', weights: '3G' },
      drainSeconds: 7,
    }),
  ).toEqual({
    MOTET_MODEL: '/models/tiny.gguf',
    MOTET_SERVED_NAME: 'org/tiny',
    MOTET_HOST: '0.0.0.0',
    MOTET_PORT: '8000',
    MOTET_CACHE: '/motet/cache',
    MOTET_ADAPTER_ROOT: '/motet/adapters',
    MOTET_DEVICE: 'cpu',
    MOTET_DEVICE_MEMORY: String(1.5 * 2 ** 30),
    MOTET_HOST_MEMORY: String(2 * 2 ** 30),
    MOTET_KV_DISK: String(10e9),
    MOTET_WEIGHT_MEMORY: String(3e9),
    MOTET_QUANTIZATION: 'int4',
    MOTET_KV_CACHE_DTYPE: 'int8',
    MOTET_PREFIX_CACHE: 'off',
    MOTET_EVICTION: 'lru',
    MOTET_ADAPTER_QUANTIZATION: 'int8',
    MOTET_POOLING: 'mean',
    MOTET_MAX_MODEL_LEN: '4096',
    MOTET_MAX_BATCH_TOKENS: '512',
    MOTET_MAX_SEQUENCES: '32',
    MOTET_MAX_WAITING: '8',
    MOTET_MAX_LORA_RANK: '64',
    MOTET_DRAIN_SECONDS: '7',
    MOTET_TRUSTED_SERVICE_ACCOUNTS: 'default/motet-gateway',
  });
});

test('the image is that of the base model, or that of the installation', () => {
  expect(engine()).toMatchObject({
    image: 'motet/engine:1',
    command: ['node'],
    args: ['/app/engine/main.ts'],
  });
  expect(engine({ image: 'mine:2' }).image).toBe('mine:2');
});

const mountOf = (spec: Partial<BaseModel['spec']>, mountPath: string) => {
  const mount = engine(spec).volumeMounts!.find((one) => one.mountPath === mountPath);
  return { mount, volume: podSpec(spec).volumes!.find(({ name }) => name === mount?.name) };
};

test('a source in a claim is mounted read-only', () => {
  const spec = { source: { uri: 'pvc://weights/llama/model.gguf' } };
  expect(env(spec).MOTET_MODEL).toBe('/motet/source/llama/model.gguf');
  const { mount, volume } = mountOf(spec, '/motet/source');
  expect(mount!.readOnly).toBe(true);
  expect(volume!.persistentVolumeClaim).toEqual({ claimName: 'weights' });
});

test('no path leads out of the claim', () => {
  expect(env({ source: { uri: 'pvc://weights/../../etc/passwd' } }).MOTET_MODEL).toBe(
    '/motet/source/etc/passwd',
  );
});

test.each([
  [
    'hostpath:///srv/models/tiny.gguf',
    '/motet/source/tiny.gguf',
    { path: '/srv/models/tiny.gguf', type: 'File' },
  ],
  ['hostpath:///srv/models/tiny', '/motet/source/tiny', { path: '/srv/models/tiny', type: 'Directory' }],
])('of a node, just %s is mounted, read-only', (uri, path, hostPath) => {
  expect(env({ source: { uri } }).MOTET_MODEL).toBe(path);
  const { mount, volume } = mountOf({ source: { uri } }, path);
  expect(mount!.readOnly).toBe(true);
  expect(volume!.hostPath).toEqual(hostPath);
});

test.each(['hf://org/name@main', 's3://bucket/models/tiny', 'oci://ghcr.io/org/tiny:v1'])(
  "the source %s is the engine's to fetch",
  (uri) => {
    expect(env({ source: { uri } }).MOTET_MODEL).toBe(uri);
    expect(engine({ source: { uri } }).volumeMounts!.map(({ mountPath }) => mountPath)).toEqual([
      '/tmp',
      '/motet/cache',
    ]);
  },
);

test('addresses of sources become settings', () => {
  const sourceAccess = {
    s3: { endpoint: 'http://minio:9000', region: 'eu-1' },
    hf: { endpoint: 'https://hub.example' },
    oci: { plainHttp: ['registry:5000', 'other'] },
    bytesPerSecond: '100M',
  };
  expect(env({ sourceAccess })).toMatchObject({
    MOTET_S3_ENDPOINT: 'http://minio:9000',
    MOTET_S3_REGION: 'eu-1',
    MOTET_HF_ENDPOINT: 'https://hub.example',
    MOTET_OCI_PLAIN_HTTP: 'registry:5000,other',
    MOTET_SOURCE_BANDWIDTH: '100000000',
  });
  expect(Object.keys(env()).filter((name) => /S3|HF|OCI|AWS|DOCKER|SOURCE_/.test(name))).toEqual([]);
});

test('engines run as the ServiceAccount whose role reads the buckets, else as that of the installation', () => {
  const s3 = { serviceAccountName: 'reads-buckets' };
  expect(podSpec({ sourceAccess: { s3 } }).serviceAccountName).toBe('reads-buckets');
  expect(podSpec({ sourceAccess: { s3: {} } }).serviceAccountName).toBe('motet-engine');
  expect(podSpec().serviceAccountName).toBe('motet-engine');
});

test('keys of S3 become variables, and other credentials files', () => {
  const spec = {
    sourceAccess: {
      s3: { secretName: 'bucket' },
      hf: { secretName: 'hub' },
      oci: { secretName: 'registry' },
      caConfigMapName: 'our-ca',
    },
  };
  const key = (name: string) => ({ name, valueFrom: { secretKeyRef: { name: 'bucket', key: name } } });
  expect(engine(spec).env).toEqual(
    expect.arrayContaining([key('AWS_ACCESS_KEY_ID'), key('AWS_SECRET_ACCESS_KEY')]),
  );
  expect(
    engine(spec).env!.find(({ name }) => name === 'AWS_SESSION_TOKEN')?.valueFrom?.secretKeyRef?.optional,
  ).toBe(true);
  expect(env(spec)).toMatchObject({
    HF_TOKEN_PATH: '/motet/credentials/hf/token',
    DOCKER_CONFIG: '/motet/credentials/oci',
    MOTET_SOURCE_CA: '/motet/credentials/ca/ca.crt',
  });
  const mounted = (path: string) => {
    const { mount, volume } = mountOf(spec, path);
    expect(mount!.readOnly).toBe(true);
    return volume!;
  };
  expect(mounted('/motet/credentials/hf').secret).toEqual({
    secretName: 'hub',
    items: [{ key: 'HF_TOKEN', path: 'token' }],
  });
  expect(mounted('/motet/credentials/oci').secret).toEqual({
    secretName: 'registry',
    items: [{ key: '.dockerconfigjson', path: 'config.json' }],
  });
  expect(mounted('/motet/credentials/ca').configMap?.name).toBe('our-ca');
});

test('an https source is passed on with its digest, and nothing is mounted', () => {
  const digest = `sha256:${'a'.repeat(64)}`;
  const spec = { source: { uri: 'https://example.org/a.gguf', digest } };
  expect(env(spec)).toMatchObject({ MOTET_MODEL: 'https://example.org/a.gguf', MOTET_MODEL_DIGEST: digest });
  expect(podSpec(spec).volumes!.map(({ name }) => name)).toEqual(['tmp', 'cache']);
});

test.each([
  [{}, { emptyDir: {} }],
  [{ sizeLimit: '10Gi' }, { emptyDir: { sizeLimit: '10Gi' } }],
  [{ claimName: 'cache' }, { persistentVolumeClaim: { claimName: 'cache' } }],
  [{ hostPath: '/var/cache/motet' }, { hostPath: { path: '/var/cache/motet', type: 'Directory' } }],
])('a cache of %j is %j, writable', (cache, volume) => {
  const found = mountOf({ cache }, '/motet/cache');
  expect(found.volume).toMatchObject(volume);
  expect(found.mount!.readOnly).toBeUndefined();
});

test('claims of adapters are mounted read-only below the root of adapters', () => {
  const { mount, volume } = mountOf({ adapterClaims: ['team-a', 'team.b'] }, '/motet/adapters/team.b');
  expect(mount!.readOnly).toBe(true);
  expect(volume!.persistentVolumeClaim).toEqual({ claimName: 'team.b' });
  expect(volume!.name).toMatch(/^[a-z0-9-]{1,63}$/);
});

test('a claim that serves several purposes is one volume', () => {
  const spec = { source: { uri: 'pvc://all/a.gguf' }, cache: { claimName: 'all' }, adapterClaims: ['all'] };
  expect(podSpec(spec).volumes!.map(({ name }) => name)).toEqual(['tmp', 'claim-all']);
  expect(engine(spec).volumeMounts!.map(({ mountPath }) => mountPath)).toEqual([
    '/tmp',
    '/motet/cache',
    '/motet/source',
    '/motet/adapters/all',
  ]);
});

test('a GPU pod asks for its GPU, tolerates its taint and uses its runtime', () => {
  const spec = { accelerator: { type: 'nvidia' as const, count: 1, runtimeClassName: 'nvidia' } };
  const { runtimeClassName, tolerations } = podSpec(spec);
  expect(runtimeClassName).toBe('nvidia');
  expect(tolerations![0]).toEqual({ key: 'nvidia.com/gpu', operator: 'Exists', effect: 'NoSchedule' });
  expect(engine(spec).resources).toMatchObject({
    requests: { 'nvidia.com/gpu': '1' },
    limits: { 'nvidia.com/gpu': '1' },
  });
  expect(env(spec).MOTET_DEVICE).toBe('nvidia');
  const plain = podSpec({ accelerator: { type: 'nvidia', count: 1, runtimeClassName: '' } });
  expect(plain).not.toHaveProperty('runtimeClassName');
});

test('a CPU pod has nothing of a GPU', () => {
  const text = JSON.stringify(objects());
  expect(text).not.toContain('nvidia');
  const lost = { operator: 'Exists', effect: 'NoExecute', tolerationSeconds: 30 };
  expect(podSpec().tolerations).toEqual([
    { key: 'node.kubernetes.io/not-ready', ...lost },
    { key: 'node.kubernetes.io/unreachable', ...lost },
  ]);
  expect(podSpec()).not.toHaveProperty('runtimeClassName');
});

test('a pod requests a CPU, its arenas and half a GiB, unless told otherwise', () => {
  expect(engine().resources).toEqual({ requests: { cpu: '1', memory: String(1.5 * 2 ** 30) } });
  expect(engine({ memory: { device: '1Gi', host: '3Gi', disk: 0, weights: '2Gi' } }).resources).toEqual({
    requests: { cpu: '1', memory: String(6.5 * 2 ** 30) },
  });
  const resources = { requests: { cpu: '250m' }, limits: { memory: '1Gi' } };
  // A request above the only limit would be refused.
  expect(engine({ podTemplate: { resources } }).resources).toEqual({
    requests: { cpu: '250m' },
    limits: { memory: '1Gi' },
  });
});

describe('KV on disk', () => {
  const memory = { device: '1Gi', host: '1Gi', disk: '20Gi', weights: 0 };
  const storageOf = (cache: BaseModel['spec']['cache']) =>
    engine({ memory, ...(cache && { cache }) }).resources!.requests!['ephemeral-storage'];

  test('is requested of the node where the cache is an emptyDir, and of nobody where it is not', () => {
    expect(storageOf(undefined)).toBe(String(20 * 2 ** 30));
    expect(storageOf({ sizeLimit: '5Gi' })).toBe(String(20 * 2 ** 30));
    expect(storageOf({ claimName: 'cache' })).toBeUndefined();
    expect(storageOf({ hostPath: '/var/lib/motet' })).toBeUndefined();
    expect(engine().resources!.requests).not.toHaveProperty('ephemeral-storage');
  });

  test('has room beside what the cache is limited to', () => {
    const limitOf = (disk: string | number) =>
      mountOf({ memory: { ...memory, disk }, cache: { sizeLimit: '5Gi' } }, '/motet/cache').volume!.emptyDir;
    expect(limitOf('20Gi')).toEqual({ sizeLimit: String(25 * 2 ** 30) });
    expect(limitOf(0)).toEqual({ sizeLimit: '5Gi' });
  });
});

test('the CPU limit is the number of threads, rounded up', () => {
  expect(env({ podTemplate: { resources: { limits: { cpu: '2500m' } } } }).MOTET_THREADS).toBe('3');
  expect(env()).not.toHaveProperty('MOTET_THREADS');
});

test('the kubelet waits for the drain, and a bit longer', () => {
  expect(podSpec({ drainSeconds: 120 }).terminationGracePeriodSeconds).toBe(135);
});

test('a pod has the words of the engine when it ends, and no variables of Services', () => {
  expect(engine().terminationMessagePolicy).toBe('FallbackToLogsOnError');
  expect(podSpec().enableServiceLinks).toBe(false);
});

test('weights may take an hour to prepare, and readiness is seen within two seconds', () => {
  const { startupProbe, livenessProbe, readinessProbe } = engine();
  expect(startupProbe!.periodSeconds! * startupProbe!.failureThreshold!).toBe(3600);
  expect(startupProbe!.httpGet!.path).toBe('/livez');
  expect(livenessProbe!.httpGet!.path).toBe('/livez');
  expect(readinessProbe).toMatchObject({ httpGet: { path: '/readyz' }, periodSeconds: 1 });
});

test('pods prefer different nodes, unless the base model has an affinity of its own', () => {
  const [preferred] = podSpec().affinity!.podAntiAffinity!.preferredDuringSchedulingIgnoredDuringExecution!;
  expect(preferred!.podAffinityTerm.topologyKey).toBe('kubernetes.io/hostname');
  const affinity = { nodeAffinity: {} };
  expect(podSpec({ podTemplate: { affinity } }).affinity).toEqual(affinity);
});

test('a rollout is as the base model says', () => {
  expect(objects({ rollout: { maxSurge: 0, maxUnavailable: 1 } }).deployment.spec!.strategy).toEqual({
    type: 'RollingUpdate',
    rollingUpdate: { maxSurge: 0, maxUnavailable: 1 },
  });
});

test('labels of the operator cannot be taken, others are added', () => {
  const labels = { team: 'a', 'motet.dev/base-model': 'other', 'app.kubernetes.io/name': 'mine' };
  const found = template({ podTemplate: { labels, annotations: { note: 'x' } } }).metadata!;
  expect(found.labels).toMatchObject({
    team: 'a',
    'motet.dev/base-model': 'tiny',
    'app.kubernetes.io/name': 'motet',
  });
  expect(found.annotations).toEqual({ note: 'x' });
});

test('a variable of the base model is there once, in the place of ours', () => {
  const more = [
    { name: 'MOTET_MAX_WAITING', value: '1' },
    { name: 'TOKEN', valueFrom: { secretKeyRef: { name: 's' } } },
  ];
  const found = engine({ podTemplate: { env: more } }).env!;
  expect(found.filter(({ name }) => name === 'MOTET_MAX_WAITING')).toEqual([more[0]]);
  expect(found.at(-1)).toEqual(more[1]);
});

test('volumes, mounts, selectors, tolerations, secrets and priority are added', () => {
  const gpu = { type: 'nvidia' as const, count: 1, runtimeClassName: 'nvidia' };
  const podTemplate = {
    volumes: [{ name: 'ca', configMap: { name: 'ca' } }],
    volumeMounts: [{ name: 'ca', mountPath: '/ca' }],
    nodeSelector: { zone: 'a' },
    tolerations: [{ key: 'spot', operator: 'Exists' }],
    imagePullSecrets: [{ name: 'registry' }],
    priorityClassName: 'high',
  };
  const found = podSpec({ podTemplate, accelerator: gpu });
  expect(found.volumes!.at(-1)).toEqual(podTemplate.volumes[0]);
  expect(found.containers[0]!.volumeMounts!.at(-1)).toEqual(podTemplate.volumeMounts[0]);
  expect(found.tolerations!.map(({ key }) => key)).toEqual([
    'nvidia.com/gpu',
    'node.kubernetes.io/not-ready',
    'node.kubernetes.io/unreachable',
    'spot',
  ]);
  expect(found).toMatchObject({
    nodeSelector: { zone: 'a' },
    imagePullSecrets: [{ name: 'registry' }],
    priorityClassName: 'high',
  });
});
