// Reads the configuration, watches, waits for the lease, reconciles, and leaves in order on SIGTERM. Wiring only.

import { once } from 'node:events';
import { KubeConfig } from '@kubernetes/client-node';
import { type Logger, pino } from 'pino';
import { type Key, keysOfClaimant, keysOfEverything, keysOfOwned, keysOfPod } from './changes.ts';
import { type Clock, pause, systemClock } from './clock.ts';
import { Cluster, type Parts, type ReconcileKind, type ReconcileResult } from './cluster.ts';
import { type Config, ConfigError, helpText, parseConfig } from './config.ts';
import { Engines } from './engines.ts';
import { errorTable, toOperatorError } from './errors.ts';
import { Leader } from './leader.ts';
import { countApiCalls, createMetrics, type Metrics, watchState } from './metrics.ts';
import type { Claimant } from './names.ts';
import { reconcileAdapters } from './reconcile-adapters.ts';
import { reconcileBaseModel } from './reconcile-base-model.ts';
import { reconcileGroup } from './reconcile-group.ts';
import { reconcileRoute } from './reconcile-route.ts';
import { serve } from './server.ts';
import { WorkQueue } from './work-queue.ts';

export interface Operator {
  /** Of probes and metrics. */
  port: number;
  readonly isLeader: boolean;
  /** Rejects when this process cannot go on: it lost the lease. Resolves after `stop`. */
  ended: Promise<void>;
  /** Lets what runs end, leaves the lease to the next, and closes everything; once, however often it is asked. */
  stop(): Promise<void>;
}

/** One pass for one key of each kind. */
const reconciles: Record<ReconcileKind, (name: string, parts: Parts) => Promise<ReconcileResult>> = {
  'base-model': reconcileBaseModel,
  adapters: reconcileAdapters,
  route: reconcileRoute,
  group: reconcileGroup,
};

/** Longest wait for reconciles at the end; after it they cannot write any more. */
const drainMs = 20_000;

export async function startOperator(config: Config, log: Logger): Promise<Operator> {
  const clock = systemClock;
  const metrics = createMetrics();
  const stopCounting = countApiCalls(metrics);
  const kubeConfig = new KubeConfig();
  if (config.kubeconfig === null) kubeConfig.loadFromCluster();
  else kubeConfig.loadFromFile(config.kubeconfig);
  const leader = new Leader({ ...config, kubeConfig, clock, log });

  /** Set while this process leads; a standby watches, but looks at nothing. */
  let queues: Map<ReconcileKind, WorkQueue> | null = null;
  const enqueue = (kind: ReconcileKind, name: string) => queues?.get(kind)?.add(name);
  const enqueueAll = (keys: readonly Key[]) => {
    for (const { kind, name } of keys) enqueue(kind, name);
  };
  const onClaimant = (now: Claimant | undefined, before: Claimant | undefined) => {
    if (queues !== null) enqueueAll(keysOfClaimant(now, before, cluster.claimants()));
  };
  const cluster = new Cluster({
    ...config,
    kubeConfig,
    clock,
    log,
    assertLeader: () => leader.assertLeader(),
    onChange: {
      baseModel: onClaimant,
      loraAdapter: onClaimant,
      adapterRoute: onClaimant,
      adapterGroup: onClaimant,
      pod: (now, before) => enqueueAll(keysOfPod(now, before)),
      owned: (now, before) => enqueueAll(keysOfOwned(now, before)),
    },
    onReport: (name) => enqueue('base-model', name),
  });
  const engines = new Engines({
    tokenFile: config.tokenFile,
    metrics,
    clock,
    log,
    onEnd: (baseModel) => enqueue('adapters', baseModel),
  });
  const parts: Parts = { cluster, engines, config, metrics, log, clock, enqueue };

  let isSynced = false;
  const server = await serve(config, metrics.registry, () => isSynced);
  watchState(metrics.registry, {
    isLeader: () => leader.isLeader,
    queueDepths: () => Object.fromEntries([...(queues ?? [])].map(([kind, { depth }]) => [kind, depth])),
    staleSinceMs: () =>
      Object.fromEntries(Object.entries(cluster.watches).map(([name, watch]) => [name, watch.staleSinceMs])),
  });

  const stopping = new AbortController();
  const leaving = new AbortController();
  const lead = async () => {
    await Promise.race([cluster.synced, once(stopping.signal, 'abort')]);
    isSynced = true;
    if (stopping.signal.aborted || !(await leader.acquire(stopping.signal))) return;
    log.info({ identity: config.identity }, 'leads');
    queues = createQueues(parts, leader);
    const resync = async () => {
      while (!stopping.signal.aborted) {
        enqueueAll(keysOfEverything(cluster.claimants()));
        await pause(clock, config.resyncSeconds * 1000, stopping.signal);
      }
    };
    await Promise.all([resync(), leader.hold(leaving.signal)]);
  };
  const ended = lead();
  // Whoever holds the operator looks at it when it likes.
  ended.catch(() => undefined);

  let stopped: Promise<void> | null = null;
  const stop = async () => {
    stopping.abort();
    await drain(queues, clock, log);
    await engines.close();
    leaving.abort();
    await ended.catch(() => undefined);
    await leader.release();
    await cluster.close();
    await server.close();
    stopCounting();
  };

  return {
    port: server.port,
    get isLeader() {
      return leader.isLeader;
    },
    ended,
    stop() {
      stopped ??= stop();
      return stopped;
    },
  };
}

function createQueues(parts: Parts, leader: Leader): Map<ReconcileKind, WorkQueue> {
  const { config, clock, metrics, log } = parts;
  return new Map(
    (Object.keys(reconciles) as ReconcileKind[]).map((kind) => [
      kind,
      new WorkQueue({
        async run(name) {
          leader.assertLeader();
          return reconciles[kind](name, parts);
        },
        concurrency: config.concurrency,
        clock,
        random: Math.random,
        isRetried: (error) => errorTable[toOperatorError(error).code].outcome === 'retry',
        onEnd: (name, outcome) => tellEnd({ kind, name, ...outcome }, metrics, log),
      }),
    ]),
  );
}

function tellEnd(
  end: { kind: string; name: string; seconds: number; error: Error | null; retryInMs: number | null },
  metrics: Metrics,
  log: Logger,
): void {
  const { kind, name, seconds, error, retryInMs } = end;
  metrics.reconciles.inc({ kind, result: error === null ? 'ok' : 'error' });
  metrics.reconcileSeconds.observe({ kind }, seconds);
  if (error === null) return;
  const { code, message, cause } = toOperatorError(error);
  // What was not foreseen keeps its stack.
  const details = code === 'internal' ? { err: cause } : {};
  log.warn({ kind, name, code, error: message, retryInMs, ...details }, 'a reconcile failed');
}

async function drain(queues: Map<string, WorkQueue> | null, clock: Clock, log: Logger): Promise<void> {
  const drained = new AbortController();
  const all = Promise.all([...(queues ?? new Map()).values()].map((queue) => queue.drain()));
  const inTime = all.then(() => drained.abort());
  await Promise.race([inTime, pause(clock, drainMs, drained.signal)]);
  if (!drained.signal.aborted) log.warn({ drainMs }, 'reconciles are left behind');
}

async function main(): Promise<void> {
  if (process.argv.includes('--help')) {
    console.log(helpText());
    return;
  }
  const config = parseConfig(process.argv.slice(2), process.env);
  const log = pino({ level: config.logLevel, base: { process: 'operator' } });
  const stopSignal = Promise.race(['SIGTERM', 'SIGINT'].map((name) => once(process, name).then(() => name)));
  const operator = await startOperator(config, log);
  log.info({ port: operator.port, namespace: config.namespace, identity: config.identity }, 'watches');

  const signal = await Promise.race([stopSignal, operator.ended]);
  log.info({ signal }, 'draining');
  await operator.stop();
  log.info({}, 'stopped');
}

if (import.meta.main) {
  main().catch((error: unknown) => {
    // One line for what a person can change, or what Kubernetes will: it starts the process again.
    const isExpected =
      error instanceof ConfigError || errorTable[toOperatorError(error).code].outcome === 'exit';
    console.error('operator:', isExpected ? (error as Error).message : error);
    process.exitCode = 1;
    // Whatever is half started must not keep the process alive, and one that lost the lease must not act.
    process.exit();
  });
}
