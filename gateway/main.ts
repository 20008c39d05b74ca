// Reads the configuration, starts the gateway, drains it on SIGTERM or SIGINT. Wiring only.

import { randomUUID } from 'node:crypto';
import { once } from 'node:events';
import { hostname } from 'node:os';
import { type Logger, pino } from 'pino';
import { Admission } from './admission.ts';
import { createListener } from './app.ts';
import { startBatches } from './batches/start.ts';
import { Cluster, loadKubeConfig } from './cluster.ts';
import { type Config, ConfigError, helpText, parseConfig } from './config.ts';
import { Traffic } from './console/traffic.ts';
import { type Directory, listedDirectory } from './directory.ts';
import { Endpoints, listedEngine } from './endpoints.ts';
import { keyHeaders, tokenFileHeaders, withSender } from './engine-headers.ts';
import { EnginePools } from './engine-pools.ts';
import { GatewayError } from './errors.ts';
import type { Forward } from './forward.ts';
import { CompositionNames } from './groups/composition.ts';
import { fileDirectory } from './identity/file-directory.ts';
import { FollowedTenants } from './identity/follow-tenants.ts';
import { Tokens } from './identity/tokens.ts';
import { LogLines } from './log-lines.ts';
import { createMetrics, watchQuota, watchRouting, watchState } from './metrics.ts';
import { commentEveryMs } from './on-demand/hold.ts';
import { LengthPredictor } from './queue/length-predictor.ts';
import { LocalMeters } from './quota/meter-store.ts';
import { Quota } from './quota/quota.ts';
import { RedisMeters } from './quota/redis-meters.ts';
import { UsageWatch } from './quota/tenant-usage.ts';
import { Ledger } from './request/ledger.ts';
import { Routes } from './routes/routes.ts';
import { Router } from './routing/router.ts';
import { serve } from './serve.ts';
import { startTracing } from './tracing.ts';
import { Turns } from './turns.ts';

export type Gateway = {
  port: number;
  /** Takes no more connections, lets requests in flight end within the configured bound, then stops. */
  drain(): Promise<void>;
};

export async function startGateway(config: Config, log: Logger): Promise<Gateway> {
  const draining = new AbortController();
  const cutOff = new AbortController();
  const metrics = createMetrics();
  const gatewayId = randomUUID();
  const engineHeaders = withSender(
    gatewayId,
    config.engineTokenFile === null ? keyHeaders(config.engineKey) : tokenFileHeaders(config.engineTokenFile),
  );
  const endpoints = new Endpoints(engineHeaders, config.pollIntervalMs, config.silentAfterMs, log);
  for (const url of config.engineUrls) endpoints.offer(listedEngine(url));
  const directory = await openDirectory(config, endpoints, gatewayId, log);
  const shared = config.redis && { ...config.redis, numGateways: config.gatewayReplicas };
  const meters = shared
    ? new RedisMeters(shared, gatewayId, log, () => metrics.quotaAlone.inc())
    : new LocalMeters(config.gatewayReplicas);
  const quota = new Quota(meters, gatewayId, (tenant, limit) => metrics.rateLimited.inc({ tenant, limit }));
  const traffic = new Traffic();
  const usage = new UsageWatch({
    metrics,
    inFlight: () => traffic.inFlightByTenant(),
    used: () => quota.used,
    limitsOf: (tenant) => directory.scopesOf(tenant).find((scope) => scope.of === 'tenant')?.limits,
    intervalMs: config.usageIntervalMs,
    onUsage: (used) => directory.noteUsage(used),
  });
  const router = new Router(config.routing);
  const admission = new Admission(endpoints, router, config, (tenant, reason) =>
    metrics.shed.inc({ tenant, reason }),
  );
  // The waits for the first byte and between bytes are kept in forward.ts, where the reason is known.
  const dispatcher = new EnginePools({
    connect: { timeout: config.connectTimeoutMs },
    headersTimeout: 0,
    bodyTimeout: 0,
  });
  watchRouting(metrics, router, endpoints);
  watchState(metrics, { endpoints, directory, admission });
  watchQuota(metrics, usage, () => meters instanceof RedisMeters && !meters.isShared);

  const routes = new Routes({
    admission,
    endpoints,
    dispatcher,
    engineHeaders,
    timeoutMs: config.firstByteTimeoutMs,
    draining: draining.signal,
    writeAbort: (route, aborted) => directory.writeAbort(route, aborted),
    onShadow: (route, target, result) => metrics.shadowRequests.inc({ route, target, result }),
    onAbort: (route, target) => metrics.routeAborts.inc({ route, target }),
    log,
  });
  const turns = new Turns();
  const forward: Forward = {
    admission,
    endpoints,
    router,
    lengths: new LengthPredictor(),
    dispatcher,
    turns,
    engineHeaders,
    limits: config,
    onEngineError: (engine, reason) => metrics.engineErrors.inc({ engine, reason }),
    onLength: (expected, actual) => metrics.lengthRatio.observe(expected / actual),
  };
  const compositionNames = new CompositionNames();
  const batches =
    config.batches &&
    (await startBatches(config.batches, {
      directory,
      forward,
      routes,
      compositionNames,
      metrics,
      log,
      maxLineBytes: config.maxBodyBytes,
    }));
  const ledger = new Ledger(metrics, log);
  const listener = createListener({
    directory,
    forward,
    routes,
    compositionNames,
    batches: batches?.routes ?? null,
    quota,
    maxBodyBytes: config.maxBodyBytes,
    hold: { holdAfterMs: config.holdAfterMs, everyMs: commentEveryMs },
    hasConsole: config.hasConsole,
    traffic,
    metrics,
    ledger,
    turns,
    log,
    draining: draining.signal,
    cutOff: cutOff.signal,
  });
  if (meters instanceof RedisMeters) await meters.ready;
  await endpoints.refresh();
  const serving = await serve(listener, config.port, config.host);

  return {
    port: serving.port,
    async drain() {
      draining.abort();
      const batchesClosed = batches?.close(config.drainTimeoutMs);
      await serving.drain(config.drainTimeoutMs, () => {
        log.warn({ timeoutMs: config.drainTimeoutMs }, 'requests in flight are cut off');
        cutOff.abort(new GatewayError('shutting_down', 'the gateway is shutting down'));
      });
      turns.flush();
      ledger.write();
      await batchesClosed;
      await usage.close();
      await directory.close();
      await endpoints.close();
      await dispatcher.destroy();
      await quota.close();
    },
  };
}

async function openDirectory(
  config: Config,
  endpoints: Endpoints,
  gatewayId: string,
  log: Logger,
): Promise<Directory> {
  const { cluster, tenantsFile, oidc, apiKeys, limits } = config;
  if (cluster !== null) {
    const options = {
      kubeConfig: loadKubeConfig(cluster.kubeconfig),
      namespace: cluster.namespace,
      isOpen: config.isInsecure,
      oidc,
      secretIntervalMs: config.secretIntervalMs,
      // A pod has its name to itself.
      gatewayName: cluster.kubeconfig === null ? hostname() : `${hostname()}-${gatewayId.slice(0, 8)}`,
      usageIntervalMs: config.usageIntervalMs,
    };
    return new Cluster(options, endpoints, log);
  }
  if (tenantsFile !== null)
    return fileDirectory(endpoints, await FollowedTenants.open(tenantsFile, oidc, log), log);
  const tokenRules = { own: oidc, byTenant: null };
  return listedDirectory(endpoints, apiKeys, limits, new Tokens({ rules: () => tokenRules, log }));
}

async function main(): Promise<void> {
  if (process.argv.includes('--help')) {
    console.log(helpText());
    return;
  }
  const config = parseConfig(process.argv.slice(2), process.env);
  const lines = new LogLines(1);
  const log = pino({ level: config.logLevel, base: { process: 'gateway' } }, lines);
  try {
    await serveUntilStopped(config, log);
  } finally {
    await lines.end();
  }
}

async function serveUntilStopped(config: Config, log: Logger): Promise<void> {
  // Listened for from now on: the first process of a container would not even be ended by a signal that comes earlier.
  const stopSignal = Promise.race(['SIGTERM', 'SIGINT'].map((name) => once(process, name).then(() => name)));
  const stopTracing = await startTracing('motet-gateway');
  const gateway = await startGateway(config, log);
  const { host, engineUrls: engines, cluster } = config;
  log.info(
    { host, port: gateway.port, ...(cluster ? { namespace: cluster.namespace } : { engines }) },
    'ready',
  );

  const signal = await stopSignal;
  log.info({ signal }, 'draining');
  await gateway.drain();
  await stopTracing();
  log.info({}, 'stopped');
}

if (import.meta.main) {
  main().catch((error: unknown) => {
    console.error(error instanceof ConfigError ? `gateway: ${error.message}` : error);
    process.exitCode = 1;
    // Whatever is half started must not keep the process alive.
    process.exit();
  });
}
