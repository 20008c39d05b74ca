// Every metric of the gateway, with its unit and what it means. The `model` label is only ever a name that an engine
// serves, never what a client typed, so the number of series is bounded by what is deployed.

import { Counter, collectDefaultMetrics, Gauge, Histogram, Registry } from 'prom-client';
import type { Endpoint } from './endpoints.ts';

export type Metrics = ReturnType<typeof createMetrics>;

const requestLabels = ['route', 'model', 'status'] as const;
const secondsBuckets = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300];

export function createMetrics() {
  const registry = new Registry();
  const registers = [registry];
  collectDefaultMetrics({ register: registry });

  return {
    registry,
    requests: new Counter({
      name: 'motet_gateway_requests_total',
      help: 'Requests that ended. status: HTTP status, or for a stream that failed after it had begun, the status it would have had; 499 when the client hung up.',
      labelNames: requestLabels,
      registers,
    }),
    durationSeconds: new Histogram({
      name: 'motet_gateway_request_duration_seconds',
      help: "From a request's arrival to the last byte of its answer.",
      labelNames: ['route', 'model'],
      buckets: secondsBuckets,
      registers,
    }),
    firstByteSeconds: new Histogram({
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
    engineErrors: new Counter({
      name: 'motet_gateway_engine_errors_total',
      help: 'Requests that an engine failed, by reason: a code of the error table. One that another engine then answered is counted too.',
      labelNames: ['engine', 'reason'],
      registers,
    }),
  };
}

/** Adds the gauges that are read off the gateway's state whenever somebody looks. */
export function watchState(
  registry: Registry,
  endpoints: readonly Endpoint[],
  numQueued: () => number,
): void {
  const registers = [registry];
  const perEngine = (name: string, help: string, read: (endpoint: Endpoint) => number) =>
    new Gauge({
      name,
      help,
      labelNames: ['engine'],
      registers,
      collect() {
        for (const endpoint of endpoints) this.set({ engine: endpoint.url }, read(endpoint));
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
  new Gauge({
    name: 'motet_gateway_queued_requests',
    help: 'Requests that wait for an engine with room.',
    registers,
    collect() {
      this.set(numQueued());
    },
  });
}
