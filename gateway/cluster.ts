// The directory of a gateway in a cluster: engines are the pods of the namespace, names are its BaseModels, LoraAdapters,
// AdapterRoutes and AdapterGroups, callers are its Tenants. All of it is a copy that watches keep fresh. While the API server is away
// the copy is what it was; engines are still looked at, so those that die leave.

import { KubeConfig, type KubernetesObject, type V1Pod, type V1Secret } from '@kubernetes/client-node';
import { ApiError, callApi, motetPath } from '../crds/api.ts';
import { type LabelSelector, selects } from '../crds/label-selector.ts';
import { type Condition, conditionTypes, labels } from '../crds/names.ts';
import {
  type AdapterGroup,
  type AdapterRoute,
  type BaseModel,
  type LoraAdapter,
  plurals,
  type Tenant,
} from '../crds/types.ts';
import { ObjectWatch } from '../crds/watch.ts';
import type { ModelCard } from '../engine/protocol.ts';
import { type Authenticate, type Caller, callersByDigest, createAuthenticate } from './auth.ts';
import type { WeightedTarget } from './choose-target.ts';
import { ConfigError } from './config.ts';
import { basesFirst, cardsOf, type Directory } from './directory.ts';
import { followPod, trimPod } from './discovery.ts';
import type { Endpoints } from './endpoints.ts';
import { GatewayError } from './errors.ts';
import type { OidcSettings } from './identity/oidc.ts';
import { type TokenRules, Tokens } from './identity/tokens.ts';
import { buildModels, isHopeless, type Model, mayUse, seenBy, targetsFor } from './models.ts';
import { AskWriter, type OnDemand } from './on-demand/ask-writer.ts';
import { AutoLoader, planAutoLoad } from './on-demand/auto-load.ts';
import { defaultStanding, type Standing } from './queue/ask.ts';
import type { Scope } from './quota/limits.ts';
import type { TenantUsage } from './quota/tenant-usage.ts';
import { patchUsage, UsageWriter } from './quota/usage-status.ts';
import { type Aborted, AbortWriter } from './routes/abort-writer.ts';
import type { RouteRules } from './routes/route.ts';
import { SecretKeys } from './secret-keys.ts';
import { applyTenantStatus, changeOf, TenantStatusWriter } from './tenant-status.ts';
import { judgeTenants, statusOf, tokenRulesOf, type Verdict } from './tenants.ts';

export type ClusterOptions = {
  kubeConfig: KubeConfig;
  namespace: string;
  /** Everybody may enter and use every model; Tenants are not looked at. */
  isOpen: boolean;
  /** The gateway's own issuer of tokens, beside those of Tenants. */
  oidc: OidcSettings | null;
  /** A changed Secret is seen within this time by a gateway that may not watch Secrets, or cannot now. */
  secretIntervalMs: number;
  /** Of this gateway; no other has it. */
  gatewayName: string;
  /** What tenants use is told once in this time. */
  usageIntervalMs: number;
};

type RouteStatus = NonNullable<AdapterRoute['status']>;

type Log = { info(fields: object, message: string): void; warn(fields: object, message: string): void };

/** What was read is looked at again after this while a watch tells of changes. */
const watchedSecretIntervalMs = 300_000;
const secretTimeoutMs = 5_000;

export class Cluster implements Directory {
  readonly authenticate: Directory['authenticate'];
  readonly #endpoints: Endpoints;
  readonly #log: Log;
  readonly #pods: ObjectWatch<V1Pod>;
  readonly #baseModels: ObjectWatch<BaseModel>;
  readonly #loraAdapters: ObjectWatch<LoraAdapter>;
  readonly #adapterRoutes: ObjectWatch<AdapterRoute>;
  readonly #adapterGroups: ObjectWatch<AdapterGroup>;
  /** Null when everybody may enter. */
  readonly #tenancy: Tenancy | null;
  readonly #watches: Map<string, ObjectWatch<never>>;
  readonly #synced = new Set<string>();
  readonly #aborts: AbortWriter;
  readonly #asks: AskWriter;
  readonly #autoLoads: AutoLoader;
  readonly #recovery: NodeJS.Timeout;
  /** Made anew when it is asked for after a change. */
  #models: Map<string, Model> | null = null;
  /** Stays so: what was known once is gone on with. */
  #isReady = false;
  #isAway = false;

  constructor(options: ClusterOptions, endpoints: Endpoints, log: Log) {
    this.#endpoints = endpoints;
    this.#log = log;
    const { kubeConfig, namespace, isOpen } = options;
    const common = (resource: string) => ({
      kubeConfig,
      onError: (error: Error) => this.#noteAway(resource, error),
    });
    const ours = <T extends KubernetesObject>(
      kind: 'BaseModel' | 'LoraAdapter' | 'AdapterRoute' | 'AdapterGroup',
    ) =>
      new ObjectWatch<T>({
        ...common(plurals[kind]),
        path: motetPath(kind, namespace),
        trim: withoutDetails,
        onChange: (now, before) => this.#onModelChange(now, before),
      });
    this.#pods = new ObjectWatch<V1Pod>({
      ...common('pods'),
      path: `/api/v1/namespaces/${namespace}/pods`,
      labelSelector: labels.baseModel,
      trim: trimPod,
      onChange: (now, before) => followPod(endpoints, now, before),
    });
    this.#baseModels = ours<BaseModel>('BaseModel');
    this.#loraAdapters = ours<LoraAdapter>('LoraAdapter');
    this.#adapterRoutes = ours<AdapterRoute>('AdapterRoute');
    this.#adapterGroups = ours<AdapterGroup>('AdapterGroup');
    this.#tenancy = isOpen
      ? null
      : new Tenancy({
          ...options,
          ...common('tenants'),
          log,
          countModels: (tenant) => this.#countModels(tenant),
        });
    this.#watches = new Map<string, ObjectWatch<never>>(
      Object.entries({
        pods: this.#pods,
        basemodels: this.#baseModels,
        loraadapters: this.#loraAdapters,
        adapterroutes: this.#adapterRoutes,
        adaptergroups: this.#adapterGroups,
        ...(this.#tenancy && { tenants: this.#tenancy.watch }),
      }) as unknown as [string, ObjectWatch<never>][],
    );
    for (const [resource, { synced }] of this.#watches) void synced.then(() => this.#synced.add(resource));
    this.#aborts = new AbortWriter(
      kubeConfig,
      namespace,
      (route) => this.#adapterRoutes.get(route),
      (error) => this.#log.warn({ cause: error.message }, 'an aborted target could not be written down yet'),
    );
    this.#asks = new AskWriter({
      ...{ kubeConfig, namespace },
      current: ({ kind, name }) => (kind === 'BaseModel' ? this.#baseModels : this.#loraAdapters).get(name),
      onError: (error) =>
        this.#log.warn({ cause: error.message }, 'that a model is asked for could not be told'),
    });
    this.#autoLoads = new AutoLoader({
      ...{ kubeConfig, namespace },
      isKnown: (name) => this.#modelsByName.has(name),
      onError: (error) => this.#noteUndeclared(error),
    });
    this.#recovery = setInterval(() => this.#noteRecovery(), 1_000);

    this.authenticate = (authorization) => {
      const failure = this.notReady();
      if (failure !== null) throw failure;
      return this.#tenancy === null ? null : this.#tenancy.authenticate(authorization);
    };
  }

  rulesOf(name: string): RouteRules | null {
    return this.#modelsByName.get(name)?.rules ?? null;
  }

  targetsOf(name: string, caller: string | null): readonly WeightedTarget[] | null {
    const model = this.#modelsByName.get(name);
    return model !== undefined && this.#mayUse(caller, model)
      ? targetsFor(model, this.#adaptersOf(caller))
      : null;
  }

  async autoLoad(name: string, caller: string | null): Promise<void> {
    if (this.#modelsByName.has(name)) return;
    const adapters = this.#adaptersOf(caller);
    const mayUse = (labels: Readonly<Record<string, string>>) =>
      adapters === null || selects(adapters, labels);
    const plan = planAutoLoad(name, this.#baseModels.list(), this.#loraAdapters.list(), mayUse);
    if (plan.kind === 'full') {
      const message = `of such adapters there are ${plan.most} already, as many as there may be`;
      throw new GatewayError('model_unavailable', message, { param: 'model', retryAfterS: 60 });
    }
    if (plan.kind === 'load') await this.#autoLoads.load(name, plan.adapter);
  }

  ask(asks: readonly OnDemand[]): void {
    for (const one of asks) this.#asks.ask(one, Date.now());
  }

  writeAbort(route: string, aborted: Aborted): void {
    this.#aborts.write(route, aborted);
  }

  cards(caller: string | null): ModelCard[] {
    return this.models(caller)
      .flatMap((model) => cardsOf(model, this.#endpoints.all))
      .sort(basesFirst);
  }

  models(caller: string | null): Model[] {
    return [...this.#modelsByName.values()]
      .filter((model) => this.#mayUse(caller, model))
      .map((model) => seenBy(model, this.#adaptersOf(caller)));
  }

  scopesOf(caller: string | null): Scope[] {
    const limits = caller === null ? undefined : this.#tenancy?.watch.get(caller)?.spec.limits;
    return limits === undefined ? [] : [{ of: 'tenant', id: caller!, limits }];
  }

  standingOf(caller: string | null): Standing {
    const spec = caller === null ? undefined : this.#tenancy?.watch.get(caller)?.spec;
    const { weight, priority } = defaultStanding;
    return { weight: spec?.weight ?? weight, priority: spec?.priority ?? priority };
  }

  noteUsage(usage: ReadonlyMap<string, TenantUsage>): void {
    this.#tenancy?.usageWriter.note(usage);
  }

  notReady(): GatewayError | null {
    if (this.#isReady) return null;
    const missing = [...this.#watches.keys()].filter((resource) => !this.#synced.has(resource));
    if (this.#tenancy !== null && !this.#tenancy.isComplete) missing.push('secrets');
    this.#isReady = missing.length === 0;
    if (this.#isReady) return null;
    return new GatewayError('starting', `the API server has not told about ${missing.join(', ')} yet`);
  }

  numTenants(): number {
    return new Set([...(this.#tenancy?.callers.values() ?? [])].map(({ tenant }) => tenant)).size;
  }

  baseModelNames(): string[] {
    return this.#baseModels.list().map(({ metadata }) => metadata.name!);
  }

  staleSeconds(): Record<string, number> {
    const nowMs = Date.now();
    const watches = new Map<string, { staleSinceMs: number | null }>(this.#watches);
    if (this.#tenancy?.secretWatch != null) watches.set('secrets', this.#tenancy.secretWatch);
    return Object.fromEntries(
      [...watches].map(([resource, { staleSinceMs }]) => [
        resource,
        staleSinceMs === null ? 0 : (nowMs - staleSinceMs) / 1000,
      ]),
    );
  }

  async close(): Promise<void> {
    clearInterval(this.#recovery);
    const watches = [...this.#watches.values()].map((watch) => watch.close());
    await Promise.all([...watches, this.#tenancy?.close(), this.#aborts.close(), this.#asks.close()]);
  }

  get #modelsByName(): Map<string, Model> {
    this.#models ??= buildModels({
      baseModels: this.#baseModels.list(),
      loraAdapters: this.#loraAdapters.list(),
      adapterRoutes: this.#adapterRoutes.list(),
      adapterGroups: this.#adapterGroups.list(),
    });
    return this.#models;
  }

  #mayUse(caller: string | null, model: Model): boolean {
    if (caller === null) return this.#tenancy === null;
    const tenant = this.#tenancy?.watch.get(caller);
    return tenant !== undefined && mayUse(tenant.spec.access, model);
  }

  /** What selects the adapters that the caller may use; null: it may use all. */
  #adaptersOf(caller: string | null): LabelSelector | undefined | null {
    if (this.#tenancy === null) return null;
    return caller === null ? undefined : this.#tenancy.watch.get(caller)?.spec.access.adapters;
  }

  #countModels({ spec }: Tenant): number {
    return [...this.#modelsByName.values()].filter((model) => mayUse(spec.access, model)).length;
  }

  #onModelChange(now: KubernetesObject | undefined, before: KubernetesObject | undefined): void {
    // Labels give rights; anything else that matters here is in the spec, and a little of the status.
    const isSame =
      now?.metadata?.uid === before?.metadata?.uid &&
      now?.metadata?.generation === before?.metadata?.generation &&
      JSON.stringify(now?.metadata?.labels) === JSON.stringify(before?.metadata?.labels) &&
      signalOf(now) === signalOf(before);
    if (isSame) return;
    this.#models = null;
    this.#tenancy?.modelsChanged();
  }

  #noteUndeclared(error: Error): void {
    this.#log.warn({ cause: error.message }, 'an adapter that was asked for could not be declared');
  }

  /** One line, however many watches fail however often. */
  #noteAway(resource: string, error: Error): void {
    if (this.#watches.get(resource)?.staleSinceMs === null) {
      this.#log.warn({ resource, cause: error.stack }, 'a change could not be taken over');
      return;
    }
    if (this.#isAway) return;
    this.#isAway = true;
    const cause = (error.cause as Error | undefined)?.message ?? error.message;
    this.#log.warn({ resource, cause }, 'the API server cannot be heard; going on with what is known');
  }

  #noteRecovery(): void {
    if (!this.#isAway || Object.values(this.staleSeconds()).some((seconds) => seconds > 0)) return;
    this.#isAway = false;
    this.#log.info({}, 'the API server is heard again');
  }
}

type TenancyOptions = {
  kubeConfig: KubeConfig;
  namespace: string;
  oidc: OidcSettings | null;
  secretIntervalMs: number;
  gatewayName: string;
  usageIntervalMs: number;
  /** A watch failed. */
  onError: (error: Error) => void;
  log: Log;
  /** Served names that the tenant may use. */
  countModels: (tenant: Tenant) => number;
};

/** What the API server refuses again and again is logged this often. */
const refusalLogMs = 60_000;

/** The Tenants, what came of their keys, and their statuses. */
class Tenancy {
  readonly watch: ObjectWatch<Tenant>;
  readonly usageWriter: UsageWriter;
  readonly authenticate: Authenticate;
  readonly #oidc: OidcSettings | null;
  readonly #secrets: SecretKeys;
  /** Tells which Secrets change, not what is in them. */
  readonly #secretWatch: ObjectWatch<KubernetesObject>;
  #isSecretWatchSynced = false;
  readonly #writer: TenantStatusWriter;
  readonly #log: Log;
  readonly #loggedMs = new Map<string, number>();
  #found: { verdicts: Verdict[]; callers: Map<string, Caller>; tokenRules: TokenRules } | null = null;

  constructor(options: TenancyOptions) {
    const { kubeConfig, namespace, oidc, secretIntervalMs, onError, log, countModels } = options;
    this.#log = log;
    this.#oidc = oidc;
    const tokens = new Tokens({ rules: () => this.#known.tokenRules, log });
    this.authenticate = createAuthenticate(() => this.#known.callers, tokens);
    this.#secrets = new SecretKeys({
      read: (name, signal) =>
        callApi<V1Secret>(kubeConfig, {
          path: `/api/v1/namespaces/${namespace}/secrets/${name}`,
          signal,
          timeoutMs: secretTimeoutMs,
        }),
      onChange: () => this.#keysChanged(),
      onError: (secret, error) => this.#noteRefusal(`secret ${secret}`, error),
      intervalMs: () => (this.#hearsOfSecrets ? watchedSecretIntervalMs : secretIntervalMs),
    });
    this.#secretWatch = new ObjectWatch<KubernetesObject>({
      kubeConfig,
      path: `/api/v1/namespaces/${namespace}/secrets`,
      metadataOnly: true,
      trim: ({ metadata: { name, uid, resourceVersion } = {} }) =>
        ({ metadata: { name, uid, resourceVersion } }) as KubernetesObject,
      onChange: (now, before) => this.#secrets.readAgain([(now ?? before)!.metadata!.name!]),
      onError: (error) => {
        this.#secrets.shorten();
        this.#noteRefusal('watch of secrets', error);
      },
    });
    void this.#secretWatch.synced.then(() => {
      this.#isSecretWatchSynced = true;
    });
    this.#writer = new TenantStatusWriter({
      write: (tenant, status, signal) => applyTenantStatus(kubeConfig, namespace, tenant, status, signal),
      wanted: () =>
        this.#known.verdicts
          .filter(({ isUnread }) => !isUnread)
          .map((verdict) => {
            // With the status that it has now: one that changed alone is judged by nobody.
            const tenant = this.watch.get(verdict.tenant.metadata.name!) ?? verdict.tenant;
            return { tenant, status: statusOf({ ...verdict, tenant }, countModels(tenant), new Date()) };
          }),
      onError: (error) => this.#noteRefusal('status of tenants', error),
    });
    this.watch = new ObjectWatch<Tenant>({
      kubeConfig,
      path: motetPath('Tenant', namespace),
      onError,
      onChange: (now, before) => this.#onTenantChange(now, before),
    });
    this.usageWriter = new UsageWriter({
      gateway: options.gatewayName,
      intervalMs: options.usageIntervalMs,
      tenants: this.watch,
      write: (tenant, usage, signal) => patchUsage(kubeConfig, namespace, tenant, usage, signal),
      onError: (error) => this.#noteRefusal('usage of tenants', error),
    });
  }

  get callers(): ReadonlyMap<string, Caller> {
    return this.#known.callers;
  }

  /** Every Secret that a Tenant names was read once. */
  get isComplete(): boolean {
    return this.#secrets.isComplete;
  }

  /** Null: the gateway may not watch Secrets, or has not begun to. */
  get secretWatch(): { staleSinceMs: number | null } | null {
    return this.#isSecretWatchSynced ? this.#secretWatch : null;
  }

  get #hearsOfSecrets(): boolean {
    return this.secretWatch?.staleSinceMs === null;
  }

  modelsChanged(): void {
    this.#writer.changed();
  }

  async close(): Promise<void> {
    await Promise.all([
      this.#secretWatch.close(),
      this.#secrets.close(),
      this.#writer.close(),
      this.usageWriter.close(),
    ]);
  }

  /** Made anew when it is asked for after a change. */
  get #known() {
    if (this.#found === null) {
      const stateOf = (secret: string, entry: string) => this.#secrets.stateOf(secret, entry);
      const tokenRules = tokenRulesOf(this.watch.list(), this.#oidc);
      const verdicts = judgeTenants(this.watch.list(), stateOf, tokenRules);
      const callers = callersByDigest(verdicts.flatMap(({ holders }) => holders));
      this.#found = { verdicts, callers, tokenRules };
    }
    return this.#found;
  }

  #keysChanged(): void {
    this.#found = null;
    this.#writer.changed();
  }

  #onTenantChange(now: Tenant | undefined, before: Tenant | undefined): void {
    const change = changeOf(now, before);
    if (change === 'status') this.#writer.changed();
    if (change !== 'spec') return;
    const wanted = new Map<string, Set<string>>();
    for (const { spec } of this.watch.list()) {
      for (const { secretRef } of spec.keys) {
        const entries = wanted.get(secretRef.name) ?? new Set();
        wanted.set(secretRef.name, entries.add(secretRef.key));
      }
    }
    this.#secrets.name(wanted);
    this.#secrets.readAgain(now?.spec.keys.map(({ secretRef }) => secretRef.name) ?? []);
    this.#keysChanged();
  }

  /** That the API server is away is said by the watches. */
  #noteRefusal(what: string, error: Error): void {
    if (!(error instanceof ApiError) || Date.now() - (this.#loggedMs.get(what) ?? 0) < refusalLogMs) return;
    this.#loggedMs.set(what, Date.now());
    this.#log.warn({ what, cause: error.message }, 'the API server refuses');
  }
}

/** Of a status only what models.ts asks for: the rest changes often and would be kept a thousand times. */
function withoutDetails<T extends KubernetesObject>(object: T): T {
  type Kept = { conditions?: Condition[]; askedAt?: string } & Pick<RouteStatus, 'aborted' | 'step'>;
  const kept = object as { status?: Kept };
  const { conditions: all = [], aborted, step, askedAt } = kept.status ?? {};
  const conditions = all.filter(({ type }) => type === conditionTypes.ready);
  kept.status = {
    conditions,
    ...(aborted && { aborted }),
    ...(step && { step }),
    ...(askedAt && { askedAt }),
  };
  return object;
}

/** That of a status which changes what a name stands for. */
function signalOf(object: KubernetesObject | undefined): string {
  const { aborted, step } = (object as AdapterRoute | undefined)?.status ?? {};
  return JSON.stringify([aborted, step, object !== undefined && isHopeless(object as LoraAdapter)]);
}

/** @param path  of a kubeconfig; null: the pod's ServiceAccount */
export function loadKubeConfig(path: string | null): KubeConfig {
  const kubeConfig = new KubeConfig();
  if (path !== null) kubeConfig.loadFromFile(path);
  else if (process.env.KUBERNETES_SERVICE_HOST === undefined) {
    throw new ConfigError('--kubernetes: this is not a pod of a cluster; say --kubeconfig FILE');
  } else kubeConfig.loadFromCluster();
  return kubeConfig;
}
