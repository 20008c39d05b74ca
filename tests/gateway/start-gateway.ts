// A gateway in this process, on a free port, in front of the given engines. It stops with the test.

import { pino } from 'pino';
import { onTestFinished } from 'vitest';
import type { Config } from '../../gateway/config.ts';
import { type Gateway, startGateway } from '../../gateway/main.ts';
import type { RouterSettings } from '../../gateway/routing/router.ts';
import type { FakeEngine } from '../fixtures/fake-engine.ts';

export type TestGateway = Gateway & {
  url: string;
  /** Lines of its log so far, parsed. */
  logLines: Record<string, unknown>[];
  /** The same with those of requests that have ended, which are written a little later: before somebody reads metrics. */
  wholeLog(): Promise<Record<string, unknown>[]>;
  /** Sends a chat completion; strings and bytes go as they are, anything else as JSON. */
  chat(body: unknown, init?: RequestInit): Promise<Response>;
};

export async function gatewayFor(
  engines: FakeEngine[],
  settings: Partial<Config> = {},
): Promise<TestGateway> {
  const logLines: Record<string, unknown>[] = [];
  const log = pino({ level: 'debug' }, { write: (line) => void logLines.push(JSON.parse(line)) });
  const gateway = await startGateway(
    { ...defaults, engineUrls: engines.map(({ url }) => url), ...settings },
    log,
  );
  const url = `http://127.0.0.1:${gateway.port}`;
  let drained: Promise<void> | undefined;
  const drain = () => {
    drained ??= gateway.drain();
    return drained;
  };
  onTestFinished(drain);

  const chat = (body: unknown, init: RequestInit = {}) =>
    fetch(`${url}/v1/chat/completions`, {
      method: 'POST',
      body:
        typeof body === 'string' || body instanceof Uint8Array
          ? (body as NonNullable<RequestInit['body']>)
          : JSON.stringify(body),
      ...init,
      headers: { 'content-type': 'application/json', ...(init.headers as Record<string, string>) },
    });
  const wholeLog = async () => {
    await (await fetch(`${url}/metrics`)).arrayBuffer();
    return logLines;
  };
  return { ...gateway, drain, url, logLines, wholeLog, chat };
}

/** A chat request's body. */
export function chatBody(fields: Record<string, unknown> = {}) {
  return { model: 'base', messages: [{ role: 'user', content: 'a secret question' }], ...fields };
}

/** The error object of an answer, with the answer's status. */
export async function errorOf(response: Response) {
  const { error } = (await response.json()) as {
    error: { message: string; type: string; param: string | null; code: string };
  };
  return { status: response.status, ...error };
}

/** Asks again and again until the check holds; for what becomes true in its own time. */
export async function until<T>(
  ask: () => T | Promise<T>,
  holds: (value: T) => boolean,
  timeoutMs = 10_000,
): Promise<T> {
  const endMs = performance.now() + timeoutMs;
  for (;;) {
    const value = await ask();
    if (holds(value)) return value;
    if (performance.now() > endMs) {
      throw new Error(`it did not become so within ${timeoutMs} ms; it was ${JSON.stringify(value)}`);
    }
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
}

/** Without slow start: a test's engines are all new. */
export const routing: RouterSettings = {
  rule: 'affinity',
  maxLoadFactor: 1.5,
  slowStartMs: 0,
  afterFailures: 5,
  ejectMs: 5_000,
  maxRetryShare: 0.2,
  hedgeAfterMs: 0,
  maxHedgeShare: 0.05,
};

const defaults: Config = {
  engineUrls: [],
  cluster: null,
  engineKey: null,
  engineTokenFile: null,
  host: '127.0.0.1',
  port: 0,
  apiKeys: null,
  tenantsFile: null,
  oidc: null,
  limits: new Map(),
  gatewayReplicas: 1,
  redis: null,
  secretIntervalMs: 15_000,
  usageIntervalMs: 60_000,
  isInsecure: false,
  maxBodyBytes: 1 << 20,
  maxInFlightPerEngine: 8,
  maxQueued: 8,
  maxQueuedPerTenant: 8,
  queueAgeingMs: 1_000,
  queueTimeoutMs: 10_000,
  modelWaitMs: 300,
  wakeWaitMs: 10_000,
  holdAfterMs: 10_000,
  connectTimeoutMs: 2_000,
  firstByteTimeoutMs: 10_000,
  idleTimeoutMs: 10_000,
  pollIntervalMs: 50,
  silentAfterMs: 15_000,
  routing,
  // Short, since the pool of `fetch` keeps connections open; tests of draining set their own.
  drainTimeoutMs: 20,
  hasConsole: true,
  batches: null,
  logLevel: 'debug',
};
