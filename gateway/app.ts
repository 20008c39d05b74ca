// The route table, top to bottom: what is answered without a key, then the door, then what needs one.

import type { RequestListener } from 'node:http';
import express, { type Express } from 'express';
import { enginePaths } from '../engine/protocol.ts';
import { addBatchRoutes, type BatchRoutes, batchRouteOf } from './batches/routes.ts';
import { consoleDataPath, consolePaths, serveConsole } from './console/console.ts';
import { consoleData } from './console/console-data.ts';
import type { Traffic } from './console/traffic.ts';
import { GatewayError, sendError } from './errors.ts';
import type { Metrics } from './metrics.ts';
import { modelNotFound, parseAsked, parseContentType } from './openai.ts';
import { addHealth, addLoraxRoutes, loraxPaths, loraxPostPaths } from './protocols/lorax-routes.ts';
import { type AnswerParts, answerWithin } from './request/answer.ts';
import { type Arrival, arrivalOf, tenantOf } from './request/arrival.ts';
import { admitByKey, answerError, answerFailure, enter, onlyMethod } from './request/door.ts';
import type { Ledger } from './request/ledger.ts';
import { begin, type ObserveParts, observe } from './request/observe.ts';
import { readBody } from './request/read-body.ts';
import type { Turns } from './turns.ts';

export type AppParts = AnswerParts & {
  /** Null: there is nowhere to keep files. */
  batches: BatchRoutes | null;
  maxBodyBytes: number;
  /** Serves the console page and its data. */
  hasConsole: boolean;
  traffic: Traffic;
  metrics: Metrics;
  /** Where requests that have ended are noted. */
  ledger: Ledger;
  turns: Turns;
  /** Aborted when the gateway takes no more requests. */
  draining: AbortSignal;
};

const forwardedPaths = [
  enginePaths.chat,
  enginePaths.completions,
  enginePaths.embeddings,
  enginePaths.tokenize,
  enginePaths.detokenize,
] as const;

const knownRoutes = new Set<string>([
  ...forwardedPaths,
  ...loraxPaths,
  ...['/livez', '/readyz', '/metrics', '/v1/models', '/console', consoleDataPath],
]);
/** Asked every few seconds by machines; in the log they would bury what matters. */
const unimportantRoutes = new Set(['/livez', '/readyz', '/metrics', '/health', '/console', consoleDataPath]);

/**
 * What answers requests. Nearly all of them are POSTs to one of the forwarded paths, as it is written: they go the same way as behind
 * the table, without the search for a route.
 */
export function createListener(parts: AppParts): RequestListener {
  const seen = { ...parts, routeOf, unimportantRoutes };
  const app = createApp(parts, seen);
  const shortcuts = new Map<string | undefined, (typeof forwardedPaths)[number]>(
    forwardedPaths.map((path) => [path, path]),
  );
  return (req, res) => {
    const path = req.method === 'POST' ? shortcuts.get(req.url) : undefined;
    if (path === undefined) app(req, res);
    else void enterAndPassOn(path, begin(seen, req, res, path), parts);
  };
}

async function enterAndPassOn(
  path: (typeof forwardedPaths)[number],
  arrival: Arrival,
  parts: AppParts,
): Promise<void> {
  try {
    await enter(arrival, parts);
    await passOn(path, arrival, parts);
  } catch (error) {
    answerFailure(arrival, error, sendError, parts.log);
  }
}

function createApp(parts: AppParts, seen: ObserveParts): Express {
  const { directory } = parts;
  const { traffic } = seen;
  const app = express();
  app.disable('x-powered-by');
  app.disable('etag');
  app.use(observe(seen));

  const notReady = () =>
    parts.draining.aborted
      ? new GatewayError('shutting_down', 'the gateway is shutting down')
      : directory.notReady();

  app.get('/livez', (_req, res) => void res.json({ status: 'ok' }));
  app.get('/readyz', (_req, res) => {
    const failure = notReady();
    if (failure !== null) throw failure;
    res.json({ status: 'ok' });
  });
  app.get('/metrics', async (_req, res) => {
    res.type(parts.metrics.registry.contentType).send(await parts.metrics.registry.metrics());
  });
  addHealth(app, notReady);
  app.all(['/livez', '/readyz', '/metrics', '/health'], onlyMethod('GET'));

  if (parts.hasConsole) {
    app.use(serveConsole());
    app.all([...consolePaths], onlyMethod('GET'));
  }

  app.use(admitByKey(parts));

  app.get('/v1/models', (_req, res) => {
    res.json({ object: 'list', data: directory.cards(tenantOf(res)) });
  });
  app.get('/v1/models/:id', (req, res) => {
    const card = directory.cards(tenantOf(res)).find(({ id }) => id === req.params.id);
    if (card === undefined) throw modelNotFound(req.params.id);
    res.json(card);
  });
  app.all(['/v1/models', '/v1/models/:id'], onlyMethod('GET'));

  if (parts.hasConsole) {
    app.get(consoleDataPath, (_req, res) => {
      const caller = tenantOf(res);
      const recent = traffic.of(caller, Date.now());
      res.set('Cache-Control', 'no-store');
      res.json(consoleData(caller, directory.models(caller), parts.forward.endpoints.all, recent));
    });
    app.all(consoleDataPath, onlyMethod('GET'));
  }

  for (const path of forwardedPaths) {
    app.post(path, (_req, res) => passOn(path, arrivalOf(res), parts));
    app.all(path, onlyMethod('POST'));
  }
  addLoraxRoutes(app, {
    readBody: (res) => readBody(arrivalOf(res), parts.maxBodyBytes),
    cards: (res) => directory.cards(tenantOf(res)),
    send: (request, res) => answerWithin(arrivalOf(res), request, parts),
  });
  app.all(loraxPostPaths, onlyMethod('POST'));
  app.all('/info', onlyMethod('GET'));

  if (parts.batches !== null) addBatchRoutes(app, parts.batches, tenantOf, onlyMethod);
  app.use((req) => {
    throw new GatewayError('route_not_found', `there is no ${req.method} ${req.path}`);
  });
  app.use(answerError(parts.log));
  return app;
}

async function passOn(
  path: (typeof forwardedPaths)[number],
  arrival: Arrival,
  parts: AppParts,
): Promise<void> {
  const body = await readBody(arrival, parts.maxBodyBytes);
  parseContentType(arrival.req.headers['content-type']);
  await answerWithin(arrival, { path, asked: parseAsked(body), body }, parts);
}

/** The route as a metric label: only ever one of ours, so that nobody can make series by asking for paths. */
function routeOf(path: string): string {
  if (knownRoutes.has(path)) return path;
  if (path.startsWith('/console/')) return '/console';
  const batchRoute = batchRouteOf(path);
  if (batchRoute !== null) return batchRoute;
  return path.startsWith('/v1/models/') ? '/v1/models/:id' : 'other';
}
