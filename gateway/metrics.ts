// Every metric of the gateway, with its unit and what it means. The labels `model` and `target` are only ever names that a
// resource or an engine said, never what a client typed, so the number of series is bounded by what is deployed.
// README.md has them as a table, and a test holds the two together.

import { Counter, collectDefaultMetrics, Gauge, Histogram, Registry } from 'prom-client';
import type { TokenUsage } from '../engine/protocol.ts';
import { type Admission, shedReasons } from './admission.ts';
import type { Gate as BatchGate } from './batches/gate.ts';
import type { BatchRunner } from './batches/runner.ts';
import type { Directory } from './directory.ts';
import type { Endpoint, Endpoints } from './endpoints.ts';
import type { ErrorCode } from './errors.ts';
import { engineFailures } from './forward.ts';
import type { UsageWatch } from './quota/tenant-usage.ts';
import { hedgeResults } from './routing/hedge.ts';
import { pickReasons } from './routing/pick-endpoint.ts';
import { othersOf, type Router } from './routing/router.ts';

export type Metrics = ReturnType<typeof createMetrics>;

/** Codes of the error table that say so. */
export const authFailureReasons = [
  'missing_api_key',
  'invalid_api_key',
  'invalid_token',
  'ambiguous_token',
] as const satisfies readonly ErrorCode[];

const secondsBuckets = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300];

export function createMetrics() {
  const registry = new Registry();
  const registers = [registry];
  collectDefaultMetrics({ register: registry });
  const readers: (() => void)[] = [];
  /** Of what is counted later than it happens. */
  const late = {
    collect: () => {
      for (const settle of readers) settle();
    },
  };

  const authFailures = new Counter({
    name: 'motet_gateway_auth_failures_total',
    help: 'Requests without a key that is accepted, by reason: a code of the error table.',
    labelNames: ['reason'],
    registers,
  });
  for (const reason of authFailureReasons) authFailures.inc({ reason }, 0);

  const batchLines = new Counter({
    name: 'motet_gateway_batch_lines_total',
    help: 'Lines of batches, by result: completed; failed (a line of the error file); tried_again, since there was no room or an engine failed it.',
    labelNames: ['result'],
    registers,
  });
  for (const result of ['completed', 'failed', 'tried_again']) batchLines.inc({ result }, 0);
  const shed = new Counter({
    name: 'motet_gateway_shed_total',
    help: 'Requests that were not let wait for an engine, or not any longer. reason: queue_full; tenant_full; made_room, for one with a better claim; deadline, which it would have missed; timeout.',
    labelNames: ['tenant', 'reason'],
    registers,
  });
  for (const reason of shedReasons) shed.inc({ tenant: '', reason }, 0);

  return {
    registry,
    /** Called before anybody gets to see what is counted late: requests that ended, their tokens and times. */
    beforeRead: (settle: () => void) => void readers.push(settle),
    authFailures,
    batchLines,
    requests: new Counter({
      ...late,
      name: 'motet_gateway_requests_total',
      help: 'Requests that ended. model: the name asked for; target: the base model or adapter that answered to it; tenant: whose key it was; status: HTTP status, or for a stream that failed after it had begun, the status it would have had; 499 when the client hung up.',
      labelNames: ['route', 'model', 'target', 'tenant', 'status'],
      registers,
    }),
    tokens: new Counter({
      ...late,
      name: 'motet_gateway_tokens_total',
      help: "Tokens of answers that were sent, whole or in part. kind: prompt; cached, those of the prompt that a prefix cache had; completion. Of a stream that was broken off, and of engines that do not say, they are counted by events and by the prompt's length.",
      labelNames: ['tenant', 'model', 'kind'],
      registers,
    }),
    shed,
    lengthRatio: new Histogram({
      name: 'motet_gateway_expected_length_ratio',
      help: 'Of answers that ended: tokens that were expected when the request came, over those that they had.',
      buckets: [1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1, 4 / 3, 2, 4, 8, 16],
      registers,
    }),
    rateLimited: new Counter({
      name: 'motet_gateway_rate_limited_total',
      help: 'Requests that a limit refused. limit: whose it is and of what, as tenant-tokensPerMinute.',
      labelNames: ['tenant', 'limit'],
      registers,
    }),
    quotaAlone: new Counter({
      name: 'motet_gateway_quota_alone_total',
      help: 'Requests whose limits this gateway kept alone, with its share of them, since Redis did not answer.',
      registers,
    }),
    durationSeconds: new Histogram({
      ...late,
      name: 'motet_gateway_request_duration_seconds',
      help: "From a request's arrival to the last byte of its answer.",
      labelNames: ['route', 'model'],
      buckets: secondsBuckets,
      registers,
    }),
    firstByteSeconds: new Histogram({
      ...late,
      name: 'motet_gateway_time_to_first_byte_seconds',
      help: "From a request's arrival to the first byte of an engine's answer sent to the client.",
      labelNames: ['route', 'model'],
      buckets: secondsBuckets,
      registers,
    }),
    inFlight: new Gauge({
      name: 'motet_gateway_requests_in_flight',
      help: 'Requests that arrived and have not ended, those that wait for an engine among them.',
      registers,
    }),
    shadowRequests: new Counter({
      name: 'motet_gateway_shadow_requests_total',
      help: 'Copies of requests for targets that listen to an AdapterRoute. result: ok, error, or skipped when no engine had room to spare.',
      labelNames: ['route', 'target', 'result'],
      registers,
    }),
    routeAborts: new Counter({
      name: 'motet_gateway_route_aborts_total',
      help: 'Targets of AdapterRoutes that this gateway found too bad, so that they lost their share.',
      labelNames: ['route', 'target'],
      registers,
    }),
    engineErrors: new Counter({
      name: 'motet_gateway_engine_errors_total',
      help: 'Requests that an engine failed, by reason: a code of the error table. One that another engine then answered is counted too.',
      labelNames: ['engine', 'reason'],
      registers,
    }),
    picks: new Counter({
      name: 'motet_gateway_picks_total',
      help: 'Requests sent to an engine, by why to this one: prefix, it probably has KV of the prompt; adapter, it is nearer to having the adapter on its device; bounded, a better one was hot; load; turn; only, no other had room.',
      labelNames: ['reason'],
      registers,
    }),
    expectedTokens: new Counter({
      name: 'motet_gateway_expected_cached_tokens_total',
      help: 'Prompt tokens that a prefix cache was expected to have when an engine was picked. found: true, it had them; false, it had not. Of engines that say.',
      labelNames: ['found'],
      registers,
    }),
    ejections: new Counter({
      name: 'motet_gateway_engine_ejections_total',
      help: 'Times that an engine was left alone for a while because it failed.',
      labelNames: ['engine'],
      registers,
    }),
    retries: new Counter({
      name: 'motet_gateway_retries_total',
      help: 'Requests whose engine broke off before the first byte, with another engine there. allowed: true, it was asked; false, too many were asked again already.',
      labelNames: ['allowed'],
      registers,
    }),
    hedges: new Counter({
      name: 'motet_gateway_hedges_total',
      help: 'Streams whose engine sent nothing for --hedge-after-ms. won: a second engine was asked and began first; lost: it did not; too_many: none was asked, since too many streams had one; no_room: none had room to spare.',
      labelNames: ['result'],
      registers,
    }),
  };
}

/** Counts what routing does. */
export function watchRouting(metrics: Metrics, router: Router, endpoints: Endpoints): void {
  const { picks, expectedTokens, ejections, retries, hedges } = metrics;
  for (const reason of pickReasons) picks.inc({ reason }, 0);
  for (const result of hedgeResults) hedges.inc({ result }, 0);
  for (const is of ['true', 'false']) {
    expectedTokens.inc({ found: is }, 0);
    retries.inc({ allowed: is }, 0);
  }
  router.on('picked', ({ reason }) => picks.inc({ reason }));
  router.on('predicted', (predicted) => {
    expectedTokens.inc({ found: 'true' }, predicted.cachedTokens);
    expectedTokens.inc({ found: 'false' }, predicted.expectedTokens - predicted.cachedTokens);
  });
  router.on('ejected', ({ name: engine }) => ejections.inc({ engine }));
  router.on('retried', (isAllowed) => retries.inc({ allowed: String(isAllowed) }));
  router.on('hedged', (result) => hedges.inc({ result }));
  endpoints.on('removed', ({ name: engine }) => ejections.remove({ engine }));
}

export function countTokens(
  { tokens }: Metrics,
  labels: { tenant: string; model: string },
  { promptTokens, cachedTokens, completionTokens }: TokenUsage,
): void {
  tokens.inc({ ...labels, kind: 'prompt' }, promptTokens);
  tokens.inc({ ...labels, kind: 'cached' }, cachedTokens);
  tokens.inc({ ...labels, kind: 'completion' }, completionTokens);
}

/** Adds the gauges of batches. Where they are off there are none. */
export function watchBatches(
  { registry }: Metrics,
  { runner, gate }: { runner: BatchRunner; gate: BatchGate },
): void {
  const gauge = (name: string, help: string, read: () => number) =>
    new Gauge({
      ...{ name, help, registers: [registry] },
      collect() {
        this.set(read());
      },
    });
  gauge(
    'motet_gateway_batches_unfinished',
    'Batches in the store that have not ended, whoever runs them.',
    () => runner.numActive,
  );
  gauge('motet_gateway_batches_running', 'Batches that this gateway runs.', () => runner.numRunning);
  gauge(
    'motet_gateway_batch_oldest_seconds',
    'Age of the oldest batch that has not ended; 0: there is none.',
    () => runner.oldestSeconds(Date.now()),
  );
  gauge(
    'motet_gateway_batch_lines_in_flight',
    'Lines of batches that an engine was sent or that are about to be.',
    () => gate.numInFlight,
  );
}

/** Adds the gauges of limits. @param isStoreAway  Redis, which shares them, does not answer */
export function watchQuota({ registry }: Metrics, usage: UsageWatch, isStoreAway: () => boolean): void {
  new Gauge({
    name: 'motet_gateway_quota_used_ratio',
    help: "Part of a tenant's limit that this gateway let through in the last minute, and of concurrency what it holds; the sum over gateways is the tenant's, and 1 is all of it. Of tenants that came with a limit since the start; limits of single keys are not among them.",
    labelNames: ['tenant', 'limit'],
    registers: [registry],
    collect() {
      this.reset();
      for (const { tenant, limit, ratio } of usage.ratios) this.set({ tenant, limit }, ratio);
    },
  });
  new Gauge({
    name: 'motet_gateway_quota_store_away',
    help: '1 while Redis, in which gateways share limits, does not answer this one; 0 while it does, and without Redis.',
    registers: [registry],
    collect() {
      this.set(Number(isStoreAway()));
    },
  });
}

type State = { endpoints: Endpoints; directory: Directory; admission: Admission };

/** Adds the gauges that are read off the gateway's state whenever somebody looks. What has left has no series. */
export function watchState({ registry, engineErrors }: Metrics, state: State): void {
  const { endpoints, directory, admission } = state;
  const registers = [registry];
  const perEngine = (name: string, help: string, read: (endpoint: Endpoint) => number) =>
    new Gauge({
      name,
      help,
      labelNames: ['engine'],
      registers,
      collect() {
        this.reset();
        for (const endpoint of endpoints.all) this.set({ engine: endpoint.name }, read(endpoint));
      },
    });

  perEngine('motet_gateway_engine_ready', '1 when the engine is ready, 0 when it is away.', (endpoint) =>
    Number(endpoint.isReady),
  );
  perEngine(
    'motet_gateway_engine_requests_in_flight',
    'Requests that the engine was sent and has not ended.',
    (endpoint) => endpoint.inFlight,
  );
  perEngine(
    'motet_gateway_engine_others_in_flight',
    'Sequences in the engine that others than this gateway sent, by its word when it was last looked at.',
    (endpoint) => othersOf(endpoint).inFlight,
  );
  endpoints.on('removed', ({ name: engine }) => {
    for (const reason of engineFailures) engineErrors.remove({ engine, reason });
  });
  new Gauge({
    name: 'motet_gateway_engines',
    help: 'Engines, by BaseModel (empty outside of a cluster) and by whether they get requests: ready or away.',
    labelNames: ['base_model', 'state'],
    registers,
    collect() {
      this.reset();
      for (const base_model of directory.baseModelNames()) {
        for (const state of ['ready', 'away']) this.set({ base_model, state }, 0);
      }
      for (const { baseModel, isReady } of endpoints.all) {
        this.inc({ base_model: baseModel ?? '', state: isReady ? 'ready' : 'away' });
      }
    },
  });
  new Gauge({
    name: 'motet_gateway_queued_requests',
    help: 'Requests that wait for an engine with room.',
    registers,
    collect() {
      this.set(admission.numQueued);
    },
  });
  new Gauge({
    name: 'motet_gateway_queued_requests_by_tenant',
    help: 'The same by tenant; those of whom nothing waits are not there, but for the empty name, which stands for callers without a key.',
    labelNames: ['tenant'],
    registers,
    collect() {
      this.reset();
      this.set({ tenant: '' }, 0);
      for (const [tenant, count] of admission.queue.numByTenant) this.set({ tenant }, count);
    },
  });
  new Gauge({
    name: 'motet_gateway_queue_lag_tokens',
    help: 'How far apart tenants that wait are in what they were sent, over their weights; 0 when fewer than two wait.',
    registers,
    collect() {
      this.set(admission.queue.lag);
    },
  });
  new Gauge({
    name: 'motet_gateway_tenants',
    help: 'Tenants that have a key that is accepted.',
    registers,
    collect() {
      this.set(directory.numTenants());
    },
  });
  new Gauge({
    name: 'motet_gateway_watch_stale_seconds',
    help: 'Seconds since the API server was last heard about a resource, or the tenants file could be taken over; 0 while it is. What was known then holds.',
    labelNames: ['resource'],
    registers,
    collect() {
      for (const [resource, seconds] of Object.entries(directory.staleSeconds()))
        this.set({ resource }, seconds);
    },
  });
}
