// Every metric of the operator, with its unit and what it means. Labels are names of resources, kinds and reasons, so the
// number of series is bounded by what is deployed; the series of a base model go with it (`forgetBaseModel`).

import { Counter, collectDefaultMetrics, Gauge, Histogram, Registry } from 'prom-client';
import { type ApiCall, apiChannel } from '../crds/api.ts';
import { loraAdapterReasons } from '../crds/names.ts';

export type Metrics = ReturnType<typeof createMetrics>;

export function createMetrics() {
  const registry = new Registry();
  const registers = [registry];
  collectDefaultMetrics({ register: registry });

  const baseModelEngines = new Gauge({
    name: 'motet_operator_base_model_engines',
    help: 'Engine pods of a base model. state: ready (take requests), wanted (replicas of its spec).',
    labelNames: ['base_model', 'state'],
    registers,
  });
  const adapterCopies = new Gauge({
    name: 'motet_operator_adapter_copies',
    help: 'Copies of the adapters of a base model on its engines. state: ready (resident in the wanted version), wanted.',
    labelNames: ['base_model', 'state'],
    registers,
  });
  const adapters = new Gauge({
    name: 'motet_operator_adapters',
    help: 'LoraAdapters of a base model by the reason of their condition Ready.',
    labelNames: ['base_model', 'reason'],
    registers,
  });

  return {
    registry,
    reconciles: new Counter({
      name: 'motet_operator_reconcile_total',
      help: 'Reconciles that ended. kind: base-model, adapters, route. result: ok, or error (tried again later).',
      labelNames: ['kind', 'result'],
      registers,
    }),
    reconcileSeconds: new Histogram({
      name: 'motet_operator_reconcile_seconds',
      help: 'Duration of a reconcile.',
      labelNames: ['kind'],
      buckets: [0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60],
      registers,
    }),
    apiRequests: new Counter({
      name: 'motet_operator_api_requests_total',
      help: 'Requests to the API server. verb and resource as in a Role; code: HTTP status, or none when no answer came.',
      labelNames: ['verb', 'resource', 'code'],
      registers,
    }),
    baseModelEngines,
    adapterCopies,
    adapters,
    engineCalls: new Counter({
      name: 'motet_operator_engine_calls_total',
      help: 'Requests to engines. call: list, load, unload. result: ok, refused (the engine said no), or unreachable.',
      labelNames: ['call', 'result'],
      registers,
    }),
    /** Drops the series of a base model that is gone. */
    forgetBaseModel(base_model: string): void {
      for (const state of ['ready', 'wanted']) {
        baseModelEngines.remove({ base_model, state });
        adapterCopies.remove({ base_model, state });
      }
      for (const reason of Object.values(loraAdapterReasons)) adapters.remove({ base_model, reason });
    },
  };
}

/** What the gauges read whenever somebody looks. */
export interface ObservedState {
  isLeader: () => boolean;
  /** Kind of reconcile -> keys that wait. */
  queueDepths: () => Record<string, number>;
  /** Resource -> since when (Unix, milliseconds) its watch has heard nothing; null while it hears. */
  staleSinceMs: () => Record<string, number | null>;
}

export function watchState(registry: Registry, state: ObservedState): void {
  const registers = [registry];
  new Gauge({
    name: 'motet_operator_is_leader',
    help: '1 in the operator that acts, 0 in one that stands by.',
    registers,
    collect() {
      this.set(Number(state.isLeader()));
    },
  });
  new Gauge({
    name: 'motet_operator_queue_depth',
    help: 'Keys that wait for a reconcile, those that wait for a later time left out.',
    labelNames: ['kind'],
    registers,
    collect() {
      for (const [kind, depth] of Object.entries(state.queueDepths())) this.set({ kind }, depth);
    },
  });
  new Gauge({
    name: 'motet_operator_watch_stale_seconds',
    help: 'How long the API server has not been heard about a resource; 0 while it is.',
    labelNames: ['resource'],
    registers,
    collect() {
      for (const [resource, sinceMs] of Object.entries(state.staleSinceMs())) {
        this.set({ resource }, sinceMs === null ? 0 : (Date.now() - sinceMs) / 1000);
      }
    },
  });
}

/** Counts every request to the API server, watches among them. @returns what ends it */
export function countApiCalls({ apiRequests }: Pick<Metrics, 'apiRequests'>): () => void {
  const count = (message: unknown) => {
    const { verb, resource, status } = message as ApiCall;
    apiRequests.inc({ verb, resource, code: status === 0 ? 'none' : String(status) });
  };
  apiChannel.subscribe(count);
  return () => apiChannel.unsubscribe(count);
}
