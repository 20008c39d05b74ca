// Reads the configuration, starts the gateway, drains it on SIGTERM or SIGINT. Wiring only.

import { once } from 'node:events';
import { createServer } from 'node:http';
import type { AddressInfo, Socket } from 'node:net';
import { setTimeout as sleep } from 'node:timers/promises';
import { type Logger, pino } from 'pino';
import { Agent } from 'undici';
import { Admission } from './admission.ts';
import { createApp } from './app.ts';
import { createAuthenticate } from './auth.ts';
import { type Config, ConfigError, helpText, parseConfig } from './config.ts';
import { Endpoints } from './endpoints.ts';
import { GatewayError } from './errors.ts';
import { createMetrics, watchState } from './metrics.ts';
import { startTracing } from './tracing.ts';

export type Gateway = {
  port: number;
  /** Takes no more requests, lets those in flight end within the configured bound, then stops. */
  drain(): Promise<void>;
};

export async function startGateway(config: Config, log: Logger): Promise<Gateway> {
  const draining = new AbortController();
  const cutOff = new AbortController();
  const metrics = createMetrics();
  const engineHeaders: Record<string, string> =
    config.engineKey === null ? {} : { authorization: `Bearer ${config.engineKey}` };
  const endpoints = new Endpoints(config.engineUrls, engineHeaders, config.pollIntervalMs, log);
  const admission = new Admission(endpoints, config);
  // The waits for the first byte and between bytes are kept in forward.ts, where the reason is known.
  const dispatcher = new Agent({
    connect: { timeout: config.connectTimeoutMs },
    headersTimeout: 0,
    bodyTimeout: 0,
  });
  watchState(metrics.registry, endpoints.all, () => admission.numQueued);

  const app = createApp({
    authenticate: createAuthenticate(config.apiKeys),
    forward: {
      admission,
      endpoints,
      dispatcher,
      engineHeaders,
      limits: config,
      onEngineError: (engine, reason) => metrics.engineErrors.inc({ engine, reason }),
    },
    maxBodyBytes: config.maxBodyBytes,
    metrics,
    log,
    draining: draining.signal,
    cutOff: cutOff.signal,
  });
  const server = createServer(app);
  // Connections on which nothing was asked yet, as clients open them ahead of need. Node does not count them as idle.
  const unused = new Set<Socket>();
  server.on('connection', (socket) => {
    unused.add(socket);
    socket.once('close', () => unused.delete(socket));
  });
  server.on('request', (req) => unused.delete(req.socket));
  await endpoints.refresh();
  server.listen(config.port, config.host);
  await once(server, 'listening');

  return {
    port: (server.address() as AddressInfo).port,
    async drain() {
      draining.abort();
      const closed = once(server, 'close');
      server.close();
      for (const socket of unused) socket.destroy();
      // A connection that is kept alive for a next request has none coming; it is closed after its answer.
      const sweep = setInterval(() => server.closeIdleConnections(), 50);
      const timeLeft = new AbortController();
      const inTime = await Promise.race([
        closed.then(() => true),
        sleep(config.drainTimeoutMs, false, { signal: timeLeft.signal }).catch(() => false),
      ]);
      timeLeft.abort();
      if (!inTime) {
        log.warn({ timeoutMs: config.drainTimeoutMs }, 'requests in flight are cut off');
        cutOff.abort(new GatewayError('shutting_down', 'the gateway is shutting down'));
        // Time for the error events to leave.
        await Promise.race([closed, sleep(500, undefined, { ref: false })]);
        server.closeAllConnections();
        await closed;
      }
      clearInterval(sweep);
      await endpoints.close();
      await dispatcher.destroy();
    },
  };
}

async function main(): Promise<void> {
  if (process.argv.includes('--help')) {
    console.log(helpText());
    return;
  }
  const config = parseConfig(process.argv.slice(2), process.env);
  const log = pino({ level: config.logLevel, base: { process: 'gateway' } });
  // Listened for from now on: the first process of a container would not even be ended by a signal that comes earlier.
  const stopSignal = Promise.race(['SIGTERM', 'SIGINT'].map((name) => once(process, name).then(() => name)));
  const stopTracing = await startTracing('motet-gateway');
  const gateway = await startGateway(config, log);
  log.info({ host: config.host, port: gateway.port, engines: config.engineUrls }, 'ready');

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
