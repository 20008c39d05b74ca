// A namespace of a real API server with a gateway in it, under the rights that gateway/README.md says and no others. There
// is no kubelet: engines are fake engines, and what a kubelet would write about their pods the test writes.

import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { KubeConfig, type V1Pod } from '@kubernetes/client-node';
import { onTestFinished } from 'vitest';
import { parse, stringify } from 'yaml';
import { type ApiError, type ApiRequest, callApi, motetPath } from '../../crds/api.ts';
import { type Kind, plurals, type Tenant } from '../../crds/types.ts';
import type { Config } from '../../gateway/config.ts';
import { type ControlPlane, createNamespace } from '../fixtures/control-plane.ts';
import { type FakeEngine, startFakeEngine } from '../fixtures/fake-engine.ts';
import { enginePod } from './resources.ts';
import { gatewayFor, type TestGateway } from './start-gateway.ts';

/** What the gateway's ServiceAccount may do. */
const rulesOf = (mayWatchSecrets: boolean) => [
  { apiGroups: [''], resources: ['pods'], verbs: ['list', 'watch'] },
  { apiGroups: [''], resources: ['secrets'], verbs: mayWatchSecrets ? ['get', 'list', 'watch'] : ['get'] },
  { apiGroups: ['motet.dev'], resources: Object.values(plurals), verbs: ['list', 'watch'] },
  { apiGroups: ['motet.dev'], resources: ['loraadapters'], verbs: ['create'] },
  {
    apiGroups: ['motet.dev'],
    resources: Object.values(plurals).map((kind) => `${kind}/status`),
    verbs: ['patch'],
  },
];

export type Engine = {
  pod: string;
  fake: FakeEngine;
  /** What the kubelet and the node controller say of the pod. What the engine itself says is in `fake`. */
  setPodStatus(status: { phase?: 'Running' | 'Failed'; isReady?: boolean }): Promise<void>;
  /** Deletes the pod; it stays, terminating, when it was made with a finalizer. */
  deletePod(): Promise<void>;
};

type EngineOptions = {
  pod?: string;
  baseModel?: string;
  /** Names that the engine serves: its base, and adapters on it. */
  base?: string;
  adapters?: string[];
  /** An engine that is there already, at whose address the pod is. */
  fake?: FakeEngine;
  /** Default true. */
  isReady?: boolean;
  finalizers?: string[];
};

export type Cluster = {
  namespace: string;
  /** A request as administrator, to a path below the namespace, e.g. `/pods/x`. */
  core<T>(path: string, request?: Omit<ApiRequest, 'path'>): Promise<T>;
  /** Makes a resource of ours. */
  create(resource: { kind: Kind; metadata: { name?: string } }): Promise<void>;
  /** Merges into a resource of ours. */
  change(kind: Kind, name: string, patch: object): Promise<void>;
  remove(kind: Kind, name: string): Promise<void>;
  tenant(name: string): Promise<Tenant>;
  setSecret(name: string, entries: Record<string, string>): Promise<void>;
  /** Changes a Secret and nothing that it holds. */
  touchSecret(name: string): Promise<void>;
  engine(options?: EngineOptions): Promise<Engine>;
  gateway(settings?: Partial<Config>): Promise<TestGateway>;
};

export async function startCluster(plane: ControlPlane, { mayWatchSecrets = true } = {}): Promise<Cluster> {
  const namespace = await createNamespace(plane);
  const admin = new KubeConfig();
  admin.loadFromFile(plane.kubeconfig);
  const core = <T>(path: string, request: Omit<ApiRequest, 'path'> = {}) =>
    callApi<T>(admin, { ...request, path: `/api/v1/namespaces/${namespace}${path}` });
  const merge = (body: object) => ({
    method: 'PATCH' as const,
    contentType: 'application/merge-patch+json',
    body,
  });
  // No pod without it, and without controllers nobody else makes it.
  const serviceAccount = { metadata: { name: 'default' } };
  await core('/serviceaccounts', { method: 'POST', body: serviceAccount }).catch((error: ApiError) => {
    if (error.status !== 409) throw error;
  });
  const kubeconfig = await gatewayKubeconfig(admin, plane.kubeconfig, namespace, rulesOf(mayWatchSecrets));
  let numEngines = 0;
  let touches = 0;

  return {
    namespace,
    core,
    async create({ kind, ...resource }) {
      const { name, labels } = resource.metadata as { name: string; labels?: object };
      const body = { ...resource, kind, metadata: { name, ...(labels && { labels }) } };
      await callApi(admin, { method: 'POST', path: motetPath(kind, namespace), body });
    },
    async change(kind, name, patch) {
      await callApi(admin, { ...merge(patch), path: motetPath(kind, namespace, name) });
    },
    async remove(kind, name) {
      await callApi(admin, { method: 'DELETE', path: motetPath(kind, namespace, name) });
    },
    tenant: (name) => callApi<Tenant>(admin, { path: motetPath('Tenant', namespace, name) }),
    async setSecret(name, stringData) {
      const secret = { apiVersion: 'v1', kind: 'Secret', metadata: { name }, stringData };
      await core('/secrets', { method: 'POST', body: secret }).catch((error: ApiError) => {
        if (error.status !== 409) throw error;
        return core(`/secrets/${name}`, merge({ stringData }));
      });
    },
    async touchSecret(name) {
      touches += 1;
      await core(`/secrets/${name}`, merge({ metadata: { annotations: { touched: String(touches) } } }));
    },
    async engine({ baseModel = 'base', base = 'base', adapters = [], isReady = true, ...options } = {}) {
      numEngines += 1;
      const pod = options.pod ?? `engine-${numEngines}`;
      const fake = options.fake ?? (await startFakeEngine({ base, adapters }));
      const body = enginePod(pod, baseModel);
      body.spec.containers[0]!.ports = [{ name: 'http', containerPort: fake.port }];
      const metadata = { ...body.metadata, ...(options.finalizers && { finalizers: options.finalizers }) };
      await core<V1Pod>('/pods', { method: 'POST', body: { ...body, metadata } });
      const engine: Engine = {
        pod,
        fake,
        async setPodStatus({ phase = 'Running', isReady = true }) {
          const conditions = [{ type: 'Ready', status: isReady ? 'True' : 'False' }];
          const status = { phase, podIP: '127.0.0.1', podIPs: [{ ip: '127.0.0.1' }], conditions };
          await core(`/pods/${pod}/status`, merge({ status }));
        },
        async deletePod() {
          await core(`/pods/${pod}`, { method: 'DELETE', query: { gracePeriodSeconds: '0' } });
        },
      };
      fake.isReady = isReady;
      await engine.setPodStatus({ isReady });
      return engine;
    },
    gateway: (settings = {}) => gatewayFor([], { cluster: { namespace, kubeconfig }, ...settings }),
  };
}

/** A kubeconfig that acts as the ServiceAccount of a gateway. */
async function gatewayKubeconfig(
  admin: KubeConfig,
  file: string,
  namespace: string,
  rules: object[],
): Promise<string> {
  const name = 'gateway';
  const path = `/apis/rbac.authorization.k8s.io/v1/namespaces/${namespace}`;
  await callApi(admin, { method: 'POST', path: `${path}/roles`, body: { metadata: { name }, rules } });
  const roleRef = { apiGroup: 'rbac.authorization.k8s.io', kind: 'Role', name };
  const subjects = [{ kind: 'ServiceAccount', name, namespace }];
  const binding = { metadata: { name }, roleRef, subjects };
  await callApi(admin, { method: 'POST', path: `${path}/rolebindings`, body: binding });

  const config = parse(readFileSync(file, 'utf8')) as { users: { user: Record<string, unknown> }[] };
  config.users[0]!.user.as = `system:serviceaccount:${namespace}:${name}`;
  const folder = mkdtempSync(join(tmpdir(), 'motet-gateway-'));
  onTestFinished(() => rmSync(folder, { recursive: true }));
  writeFileSync(join(folder, 'kubeconfig'), stringify(config));
  return join(folder, 'kubeconfig');
}

/** The value of a series at /metrics; null when there is none. */
export async function metricOf(gateway: TestGateway, series: string): Promise<number | null> {
  const text = await (await fetch(`${gateway.url}/metrics`)).text();
  const line = text.split('\n').find((candidate) => candidate.startsWith(`${series} `));
  return line === undefined ? null : Number(line.slice(series.length + 1));
}

export const bearer = (key: string) => ({ headers: { authorization: `Bearer ${key}` } });

export async function modelIds(gateway: TestGateway, key: string): Promise<string[]> {
  const response = await fetch(`${gateway.url}/v1/models`, bearer(key));
  if (response.status !== 200) return [`status ${response.status}`];
  return ((await response.json()) as { data: { id: string }[] }).data.map(({ id }) => id);
}
