/**
 * The cluster as the operator sees it, and the few ways in which it changes it. What is read is a live copy (crds/watch.ts)
 * and may lag; what engines said is kept beside it, in memory. Every write asks first whether this process still leads.
 *
 * Objects of the library's types come from the wire as they are: their times are text, whatever the types say.
 */
import type {
  KubeConfig,
  KubernetesObject,
  V1Deployment,
  V1Pod,
  V1PodDisruptionBudget,
  V1Service,
} from '@kubernetes/client-node';
import type { Logger } from 'pino';
import { ApiError, type ApiRequest, callApi, motetPath } from '../crds/api.ts';
import { type Condition, labels } from '../crds/names.ts';
import {
  type AdapterGroup,
  type AdapterGroupStatus,
  type AdapterRoute,
  type AdapterRouteStatus,
  apiVersion,
  type BaseModel,
  type BaseModelStatus,
  type LoraAdapter,
  type LoraAdapterStatus,
} from '../crds/types.ts';
import { ObjectWatch } from '../crds/watch.ts';
import type { Clock } from './clock.ts';
import type { Config } from './config.ts';
import type { Engines } from './engines.ts';
import { Events, type EventType } from './events.ts';
import type { Metrics } from './metrics.ts';
import { type Claimant, type NameHolders, nameHolders } from './names.ts';

/** Who owns the fields that the operator sets, in server-side apply. */
export const fieldManager = 'motet-operator';

export type ReconcileKind = 'base-model' | 'adapters' | 'route' | 'group';

export interface ReconcileResult {
  /** Look again after this time although nothing changed. Default, at the next change or resync. */
  requeueAfterMs?: number;
}

/** What a reconcile works with. `reconcile...(name, parts)` is one pass for one key. */
export interface Parts {
  cluster: Cluster;
  engines: Engines;
  config: Config;
  metrics: Metrics;
  log: Logger;
  clock: Clock;
  /** Another key is to be looked at, now. */
  enqueue: (kind: ReconcileKind, name: string) => void;
}

/** What an engine last said about itself. */
export interface EngineReport {
  /** Of its device arena. */
  totalBytes: number;
  /** Of the adapters in it. */
  adapterBytes: number;
  /** Adapters in it. */
  adapters: number;
}

/** What the adapters pass last found out about the engines of a base model. */
export interface EnginesReport {
  /** Name of a pod -> what its engine said; only engines that answered. */
  engines: ReadonlyMap<string, EngineReport>;
  /** Copies of all adapters. */
  copies: { ready: number; wanted: number };
}

interface Statuses {
  BaseModel: BaseModelStatus;
  LoraAdapter: LoraAdapterStatus;
  AdapterRoute: AdapterRouteStatus;
  AdapterGroup: AdapterGroupStatus;
}

type Change<T> = (now: T | undefined, before: T | undefined) => void;

export interface ClusterOptions {
  kubeConfig: KubeConfig;
  namespace: string;
  identity: string;
  clock: Clock;
  log: Logger;
  /** @throws OperatorError not_leader when this process must not write any more */
  assertLeader: () => void;
  onChange: {
    baseModel: Change<BaseModel>;
    loraAdapter: Change<LoraAdapter>;
    adapterRoute: Change<AdapterRoute>;
    adapterGroup: Change<AdapterGroup>;
    pod: Change<V1Pod>;
    /** Deployments, Services and PodDisruptionBudgets. */
    owned: Change<KubernetesObject>;
  };
  /** What the adapters pass reported about a base model changed. */
  onReport: (baseModelName: string) => void;
}

export class Cluster {
  readonly namespace: string;
  readonly baseModels: ObjectWatch<BaseModel>;
  readonly loraAdapters: ObjectWatch<LoraAdapter>;
  readonly adapterRoutes: ObjectWatch<AdapterRoute>;
  readonly adapterGroups: ObjectWatch<AdapterGroup>;
  /** Engine pods, trimmed to what `trimPod` keeps. */
  readonly pods: ObjectWatch<V1Pod>;
  /** These three hold everything of the namespace, so that nothing of somebody else is ever taken for ours. */
  readonly deployments: ObjectWatch<V1Deployment>;
  readonly services: ObjectWatch<V1Service>;
  readonly podDisruptionBudgets: ObjectWatch<V1PodDisruptionBudget>;

  /** Of apply.ts: what the API server writes its own way, by KIND/NAME. */
  readonly settledDrift = new Map<string, string>();

  readonly #options: ClusterOptions;
  readonly #events: Events;
  readonly #reports = new Map<string, EnginesReport>();
  /** uid -> the status that was last written, for as long as the live copy may be older. */
  readonly #written = new Map<string, { resourceVersion: string; status: object }>();
  #nameHolders: NameHolders | null = null;

  constructor(options: ClusterOptions) {
    const { namespace, onChange } = options;
    this.#options = options;
    this.namespace = namespace;
    this.#events = new Events(options);
    const claimant =
      <T>(then: Change<T>): Change<T> =>
      (now, before) => {
        this.#nameHolders = null;
        then(now, before);
      };
    this.baseModels = this.#watch(motetPath('BaseModel', namespace), claimant(onChange.baseModel));
    this.loraAdapters = this.#watch(motetPath('LoraAdapter', namespace), claimant(onChange.loraAdapter));
    this.adapterRoutes = this.#watch(motetPath('AdapterRoute', namespace), claimant(onChange.adapterRoute));
    this.adapterGroups = this.#watch(motetPath('AdapterGroup', namespace), claimant(onChange.adapterGroup));
    this.pods = this.#watch(`/api/v1/namespaces/${namespace}/pods`, onChange.pod, {
      labelSelector: labels.baseModel,
      trim: trimPod,
    });
    this.deployments = this.#watch(`/apis/apps/v1/namespaces/${namespace}/deployments`, onChange.owned);
    this.services = this.#watch(`/api/v1/namespaces/${namespace}/services`, onChange.owned);
    this.podDisruptionBudgets = this.#watch(
      `/apis/policy/v1/namespaces/${namespace}/poddisruptionbudgets`,
      onChange.owned,
    );
  }

  get watches(): Record<string, ObjectWatch<KubernetesObject>> {
    const { baseModels, loraAdapters, adapterRoutes, adapterGroups } = this;
    const { pods, deployments, services, podDisruptionBudgets } = this;
    const all = {
      baseModels,
      loraAdapters,
      adapterRoutes,
      adapterGroups,
      pods,
      deployments,
      services,
      podDisruptionBudgets,
    };
    return Object.fromEntries(
      Object.entries(all).map(([name, watch]) => [name.toLowerCase(), watch]),
    ) as never;
  }

  /** Resolves when every copy has its first list. */
  get synced(): Promise<void> {
    return Promise.all(Object.values(this.watches).map((watch) => watch.synced)).then(() => undefined);
  }

  /** Who has which served name. */
  get nameHolders(): NameHolders {
    this.#nameHolders ??= nameHolders(this.claimants());
    return this.#nameHolders;
  }

  /** Everything that claims served names. */
  claimants(): Claimant[] {
    return [
      ...this.baseModels.list(),
      ...this.loraAdapters.list(),
      ...this.adapterRoutes.list(),
      ...this.adapterGroups.list(),
    ];
  }

  /** Engine pods of a base model, those that are ending and those that ended among them. */
  podsOf(baseModelName: string): V1Pod[] {
    return this.pods.list().filter((pod) => pod.metadata!.labels![labels.baseModel] === baseModelName);
  }

  adaptersOf(baseModelName: string): LoraAdapter[] {
    return this.loraAdapters.list().filter((adapter) => adapter.spec.baseModel === baseModelName);
  }

  /** Undefined until the adapters pass has looked at the base model once in this process. */
  reportOf(baseModelName: string): EnginesReport | undefined {
    return this.#reports.get(baseModelName);
  }

  /** The adapters pass says what it found; null when the base model is gone. */
  report(baseModelName: string, report: EnginesReport | null): void {
    const before = this.#reports.get(baseModelName);
    if (report === null) this.#reports.delete(baseModelName);
    else this.#reports.set(baseModelName, report);
    if (sayReport(before) !== sayReport(report ?? undefined)) this.#options.onReport(baseModelName);
  }

  /**
   * Writes a status if it says something new. An object that is gone, or was replaced by another of its name, needs none.
   * @returns whether it was written
   * @throws as `write`
   */
  async writeStatus<K extends keyof Statuses>(
    kind: K,
    object: KubernetesObject & { status?: Statuses[K] },
    status: Statuses[K],
  ): Promise<boolean> {
    const { name, uid } = object.metadata!;
    if (saysTheSame(this.lastStatus(kind, object), status)) return false;
    try {
      const answer = await this.write<KubernetesObject & { status: object }>({
        method: 'PATCH',
        path: motetPath(kind, this.namespace, name!, 'status'),
        query: { fieldManager, force: 'true' },
        contentType: 'application/apply-patch+yaml',
        // The uid is a precondition: a status is about one object, not about the next one of its name.
        body: { apiVersion, kind, metadata: { name, uid }, status },
      });
      this.#written.set(uid!, { resourceVersion: answer.metadata!.resourceVersion!, status: answer.status });
      return true;
    } catch (error) {
      if (error instanceof ApiError && (error.status === 404 || error.status === 409)) return false;
      throw error;
    }
  }

  /** The newest status that is known: of the live copy, or what this process wrote after it. */
  lastStatus<K extends keyof Statuses>(
    _kind: K,
    object: KubernetesObject & { status?: Statuses[K] },
  ): Statuses[K] | undefined {
    const { uid, resourceVersion } = object.metadata!;
    const written = this.#written.get(uid!);
    if (written === undefined) return object.status;
    if (BigInt(written.resourceVersion) > BigInt(resourceVersion!)) return written.status as Statuses[K];
    this.#written.delete(uid!);
    return object.status;
  }

  /** @throws OperatorError not_leader: to be asked before anything that is no write through here, a call to an engine */
  assertLeader(): void {
    this.#options.assertLeader();
  }

  /**
   * Any other write.
   * @throws OperatorError not_leader; ApiError; an Error when no answer came
   */
  write<T>(request: ApiRequest & { method: 'POST' | 'PUT' | 'PATCH' | 'DELETE' }): Promise<T> {
    this.#options.assertLeader();
    return callApi<T>(this.#options.kubeConfig, request);
  }

  event(object: KubernetesObject, type: EventType, reason: string, message: string): void {
    this.#events.tell(object, type, reason, message);
  }

  async close(): Promise<void> {
    await Promise.all([this.#events.flushed(), ...Object.values(this.watches).map((watch) => watch.close())]);
  }

  #watch<T extends KubernetesObject>(
    path: string,
    onChange: Change<T>,
    more: { labelSelector?: string; trim?: (object: T) => T } = {},
  ): ObjectWatch<T> {
    const { kubeConfig, log } = this.#options;
    const onError = (error: Error) =>
      log.warn({ path, error: error.message }, 'a watch failed and is tried again');
    const forget = (now: T | undefined, before: T | undefined) => {
      if (before && now?.metadata?.uid !== before.metadata!.uid) this.#written.delete(before.metadata!.uid!);
      onChange(now, before);
    };
    return new ObjectWatch<T>({ kubeConfig, path, onChange: forget, onError, ...more });
  }
}

/** What reconciles read of a pod; a thousand pods are held in memory. */
export function trimPod({ metadata, spec, status }: V1Pod): V1Pod {
  const { name, namespace, uid, resourceVersion, creationTimestamp, deletionTimestamp } = metadata!;
  const { phase, podIP, conditions, containerStatuses, initContainerStatuses, reason, message } =
    status ?? {};
  return JSON.parse(
    JSON.stringify({
      metadata: {
        name,
        namespace,
        uid,
        resourceVersion,
        creationTimestamp,
        deletionTimestamp,
        labels: metadata!.labels,
        ownerReferences: metadata!.ownerReferences,
      },
      spec: { nodeName: spec?.nodeName },
      status: { phase, podIP, conditions, containerStatuses, initContainerStatuses, reason, message },
    }),
  );
}

/** Ready to take requests, and not ending. */
export function isReady({ metadata, status }: V1Pod): boolean {
  const isTrue = status?.conditions?.some(({ type, status }) => type === 'Ready' && status === 'True');
  return isTrue === true && metadata!.deletionTimestamp === undefined;
}

/** What gateways write into statuses, with a field manager of their own. */
const fieldsOfGateways: ReadonlySet<string> = new Set(['aborted', 'askedAt']);

/** Equal but for the times of conditions whose status is the same, and for what is not the operator's to say. */
export function saysTheSame(a: object | undefined, b: object): boolean {
  return a !== undefined && canonical(a) === canonical(b);
}

function canonical(status: object): string {
  return JSON.stringify(status, (key, value) => {
    if (fieldsOfGateways.has(key)) return undefined;
    if (key === 'conditions' && Array.isArray(value)) {
      const sorted = (value as Condition[]).toSorted((a, b) => (a.type < b.type ? -1 : 1));
      return sorted.map(({ lastTransitionTime: _, ...rest }) => rest);
    }
    if (value === null || typeof value !== 'object' || Array.isArray(value)) return value;
    return Object.fromEntries(Object.entries(value).toSorted(([a], [b]) => (a < b ? -1 : 1)));
  });
}

function sayReport(report: EnginesReport | undefined): string {
  return report === undefined ? '' : JSON.stringify([[...report.engines].toSorted(), report.copies]);
}
