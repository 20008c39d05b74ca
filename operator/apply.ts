/**
 * Carries out what desired.ts wants, by server-side apply. An object is written when it was last applied from another wish
 * (a hash of the wish is kept in its annotation) or when a field that we set has another value: both together, since the
 * hash alone misses what users change and the comparison alone misses what we no longer set. Fields that we do not set are
 * anybody's. So a resync of an unchanged world writes nothing, and a drift is repaired.
 *
 * Only what is ours is written by force. An object of the same name that is not ours is refused and left alone.
 */
import { createHash } from 'node:crypto';
import type { KubernetesObject } from '@kubernetes/client-node';
import { ApiError } from '../crds/api.ts';
import { labels } from '../crds/names.ts';
import { type Cluster, fieldManager } from './cluster.ts';
import { managedBy } from './desired.ts';
import { parseQuantity } from './quantity.ts';

/** Hash of the desired object from which the live one was last applied. */
export const appliedAnnotation = 'motet.dev/applied';

export type ApplyDecision =
  | { action: 'none' }
  /** `uid` null: there is none yet. `reason` is for the log. */
  | { action: 'apply'; uid: string | null; reason: string }
  /** It is in the way; the message is for a person. */
  | { action: 'refuse'; message: string }
  /** It is going; its end is told by its watch. */
  | { action: 'wait'; message: string };

/** What came of it. `refused` is for a condition: trying the same again will not help at once. */
export type ApplyOutcome =
  | { result: 'unchanged' | 'applied' }
  | { result: 'waiting' | 'refused'; message: string };

/**
 * @param desired  with its hash (`withHash`)
 * @param settled  what was left of the drift when this wish was last applied: values that the API server writes its own way
 */
export function decideApply(
  desired: KubernetesObject,
  live: KubernetesObject | undefined,
  settled: string | undefined,
): ApplyDecision {
  if (live === undefined) return { action: 'apply', uid: null, reason: 'there is none' };
  const { kind } = desired;
  const { name, uid, deletionTimestamp } = live.metadata!;
  if (deletionTimestamp)
    return { action: 'wait', message: `waiting for the end of the former ${kind} ${name}` };

  const wanted = desired.metadata!.ownerReferences![0]!;
  const controller = live.metadata!.ownerReferences?.find((owner) => owner.controller);
  if (controller !== undefined && controller.uid !== wanted.uid) {
    const isFormer = controller.kind === wanted.kind && controller.name === wanted.name;
    return isFormer
      ? { action: 'wait', message: `waiting for the end of the former ${kind} ${name}` }
      : { action: 'refuse', message: `${kind} ${name} belongs to ${controller.kind} ${controller.name}` };
  }
  // One of ours that lost its owner (`kubectl delete --cascade=orphan`) is taken up again.
  const { [labels.managedBy]: manager, [labels.baseModel]: baseModel } = live.metadata!.labels ?? {};
  if (controller === undefined && (manager !== managedBy || baseModel !== wanted.name)) {
    const message = `there is a ${kind} ${name} that is not the operator's; delete it, or name the base model differently`;
    return { action: 'refuse', message };
  }

  const drift = driftOf(desired, live);
  if (drift.length === 0 || settledForm(desired, drift) === settled) return { action: 'none' };
  const paths = drift.slice(0, 5).map(({ path }) => path);
  return { action: 'apply', uid: uid!, reason: `${paths.join(', ')} of it changed` };
}

/** @throws as `Cluster.write`, but for what the API server refuses for good */
export async function applyObject(
  cluster: Cluster,
  wish: KubernetesObject,
  live: KubernetesObject | undefined,
): Promise<ApplyOutcome & { reason?: string }> {
  const desired = withHash(wish);
  const { name, namespace } = desired.metadata!;
  const key = `${desired.kind}/${name}`;
  const decision = decideApply(desired, live, cluster.settledDrift.get(key));
  if (decision.action === 'none') return { result: 'unchanged' };
  if (decision.action === 'wait') return { result: 'waiting', message: decision.message };
  if (decision.action === 'refuse') return { result: 'refused', message: decision.message };
  const { uid, reason } = decision;
  try {
    const answer = await cluster.write<KubernetesObject>({
      method: 'PATCH',
      path: `${collections[desired.kind as keyof typeof collections](namespace!)}/${name}`,
      // Without force an object that somebody else made meanwhile is a conflict, and so is one that took its place.
      query: { fieldManager, force: String(uid !== null) },
      contentType: 'application/apply-patch+yaml',
      body: uid === null ? desired : { ...desired, metadata: { ...desired.metadata, uid } },
    });
    const left = driftOf(desired, answer);
    if (left.length === 0) cluster.settledDrift.delete(key);
    else cluster.settledDrift.set(key, settledForm(desired, left));
    return { result: 'applied', reason };
  } catch (error) {
    if (!(error instanceof ApiError) || !isRefusal(error)) throw error;
    return { result: 'refused', message: error.message };
  }
}

function settledForm({ metadata }: KubernetesObject, drift: Drift[]): string {
  return JSON.stringify([metadata!.annotations![appliedAnnotation], drift]);
}

/** The wish with the hash of itself. */
export function withHash<T extends KubernetesObject>(wish: T): T {
  const hash = createHash('sha256').update(JSON.stringify(wish)).digest('hex').slice(0, 32);
  const { metadata } = wish;
  return {
    ...wish,
    metadata: { ...metadata, annotations: { ...metadata!.annotations, [appliedAnnotation]: hash } },
  };
}

interface Drift {
  path: string;
  /** What is there. Not for logs: an environment variable may be a secret. */
  live: unknown;
}

/** Where `live` has something else than `desired`. What `desired` does not have may be anything. */
export function driftOf(desired: KubernetesObject, live: KubernetesObject): Drift[] {
  const drift: Drift[] = [];
  // List answers leave out apiVersion and kind of their items.
  const { apiVersion: _, kind: __, ...wanted } = desired;
  compare(wanted, live, '', drift);
  return drift;
}

/**
 * Lists that server-side apply merges by a key (`x-kubernetes-list-map-keys`): others may add items. Every other list is
 * one value.
 */
const listKeys: Record<string, string[]> = {
  ownerReferences: ['uid'],
  containers: ['name'],
  env: ['name'],
  ports: ['containerPort', 'port', 'protocol'],
  volumes: ['name'],
  volumeMounts: ['mountPath'],
  imagePullSecrets: ['name'],
};

/** Fields whose values are quantities: the API server writes 1024Mi as 1Gi. */
const isQuantity = /\.(requests|limits)\.[^.]+(\.[^.]+)*$|\.sizeLimit$/;

function compare(desired: unknown, live: unknown, path: string, drift: Drift[]): void {
  if (desired === undefined || desired === live) return;
  // The API server leaves out empty text.
  if (desired === '' && live === undefined) return;
  if (Array.isArray(desired)) {
    compareLists(desired, live, path, drift);
  } else if (isObject(desired) && isObject(live)) {
    for (const [field, value] of Object.entries(desired))
      compare(value, live[field], `${path}.${field}`, drift);
  } else if (!isQuantity.test(path) || parseQuantity(`${desired}`) !== parseQuantity(`${live}`)) {
    drift.push({ path, live });
  }
}

function compareLists(desired: unknown[], live: unknown, path: string, drift: Drift[]): void {
  const items = Array.isArray(live) ? live : [];
  const keys = listKeys[path.slice(path.lastIndexOf('.') + 1)];
  if (keys === undefined && items.length !== desired.length) {
    drift.push({ path, live });
  } else if (keys === undefined) {
    for (const [index, item] of desired.entries()) compare(item, items[index], `${path}[${index}]`, drift);
  } else {
    for (const item of desired as Record<string, unknown>[]) {
      const found = items.find((one) => keys.every((key) => one[key] === item[key]));
      compare(
        item,
        found,
        `${path}[${keys
          .map((key) => item[key] ?? '')
          .join(' ')
          .trim()}]`,
        drift,
      );
    }
  }
}

function isObject(value: unknown): value is Record<string, unknown> {
  return value !== null && typeof value === 'object' && !Array.isArray(value);
}

const collections = {
  Deployment: (namespace: string) => `/apis/apps/v1/namespaces/${namespace}/deployments`,
  Service: (namespace: string) => `/api/v1/namespaces/${namespace}/services`,
  PodDisruptionBudget: (namespace: string) => `/apis/policy/v1/namespaces/${namespace}/poddisruptionbudgets`,
};

/** Invalid, forbidden (a quota, an admission webhook, a missing right), or in conflict with what somebody else owns. */
function isRefusal({ status }: ApiError): boolean {
  return [400, 403, 409, 422].includes(status);
}
