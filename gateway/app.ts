// The route table, top to bottom: what is answered without a key, then the door, then what needs one.

import { randomUUID } from 'node:crypto';
import express, { type Express, type NextFunction, type Request, type Response } from 'express';
import type { Logger } from 'pino';
import { enginePaths, modelHeader, type TokenUsage } from '../engine/protocol.ts';
import type { Caller } from './auth.ts';
import { addBatchRoutes, type BatchRoutes, batchRouteOf } from './batches/routes.ts';
import { chooseTarget, type WeightedTarget } from './choose-target.ts';
import { consoleDataPath, consolePaths, serveConsole } from './console/console.ts';
import { consoleData } from './console/console-data.ts';
import { Traffic } from './console/traffic.ts';
import type { Directory } from './directory.ts';
import { asGatewayError, type ErrorCode, errorBody, errorTable, GatewayError, sendError } from './errors.ts';
import { type Forward, forward, type Outcome, type Translation } from './forward.ts';
import { countTokens, type Metrics } from './metrics.ts';
import { type HoldLimits, holdStream } from './on-demand/hold.ts';
import { type Asked, modelNotFound, parseAsked, parseContentType } from './openai.ts';
import {
  addHealth,
  addLoraxRoutes,
  isLoraxPath,
  loraxPaths,
  sendLoraxError,
} from './protocols/lorax-routes.ts';
import { askOf, lowered, parseWaitMs } from './queue/ask.ts';
import type { Scope } from './quota/limits.ts';
import { noTokens, type Quota } from './quota/quota.ts';
import { estimatePromptTokens } from './quota/usage.ts';
import { mayAppear, notServed, resolveModel, type Target } from './resolve-model.ts';
import { type Asker, stickyKey } from './routes/route.ts';
import { type Copied, judgedOf, type Routes } from './routes/routes.ts';
import { errorEvent } from './sse.ts';
import { endRequestSpan, startRequestSpan } from './tracing.ts';

export type AppParts = {
  directory: Directory;
  forward: Forward;
  /** Null: there is nowhere to keep files. */
  batches: BatchRoutes | null;
  quota: Quota;
  /** Which targets of AdapterRoutes get requests, and what becomes of that. */
  routes: Routes;
  maxBodyBytes: number;
  /** When a stream whose request waits is begun. */
  hold: HoldLimits;
  /** Serves the console page and its data. */
  hasConsole: boolean;
  metrics: Metrics;
  log: Logger;
  /** Aborted when the gateway takes no more requests. */
  draining: AbortSignal;
  /** Aborted when the time that requests in flight had to end is over. */
  cutOff: AbortSignal;
};

/** What is known of a request in the end: one log line, and its metrics. */
type Facts = Outcome & {
  requestId: string;
  route: string;
  /** Address that it came from: the client's, or that of a proxy before us. */
  client?: string;
  /** Whose key it was. */
  tenant?: string;
  /** As the client named it. */
  model?: string;
  /** Who answers to that name: another one for a route. */
  target?: string;
  errorCode?: ErrorCode;
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

/** Of the client's headers an engine needs these. It never sees keys or cookies, nor a client's word on who answers. */
const headersPassedOn = ['accept', 'content-type', 'traceparent', 'tracestate'] as const;

export function createApp(parts: AppParts): Express {
  const { directory } = parts;
  const traffic = new Traffic();
  const app = express();
  app.disable('x-powered-by');
  app.disable('etag');
  app.use(observe(parts, traffic));

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
    res.json({ object: 'list', data: directory.cards(callerOf(res)) });
  });
  app.get('/v1/models/:id', (req, res) => {
    const card = directory.cards(callerOf(res)).find(({ id }) => id === req.params.id);
    if (card === undefined) throw modelNotFound(req.params.id);
    res.json(card);
  });
  app.all(['/v1/models', '/v1/models/:id'], onlyMethod('GET'));

  if (parts.hasConsole) {
    app.get(consoleDataPath, (_req, res) => {
      const caller = callerOf(res);
      const recent = traffic.of(caller, Date.now());
      res.set('Cache-Control', 'no-store');
      res.json(consoleData(caller, directory.models(caller), parts.forward.endpoints.all, recent));
    });
    app.all(consoleDataPath, onlyMethod('GET'));
  }

  // The body's type is checked by parseContentType, with a better message than silence.
  const readBody = express.raw({ limit: parts.maxBodyBytes, inflate: false, type: () => true });
  for (const path of forwardedPaths) {
    app.post(path, readBody, passOn(path, parts));
    app.all(path, onlyMethod('POST'));
  }
  addLoraxRoutes(app, {
    readBody,
    cards: (res) => directory.cards(callerOf(res)),
    send: ({ asked, body, translation }, req, res) =>
      admit(enginePaths.completions, asked, body, req, res, parts, translation),
  });
  app.all(['/', '/generate', '/generate_stream'], onlyMethod('POST'));
  app.all('/info', onlyMethod('GET'));

  if (parts.batches !== null) addBatchRoutes(app, parts.batches, callerOf, onlyMethod);
  app.use((req) => {
    throw new GatewayError('route_not_found', `there is no ${req.method} ${req.path}`);
  });
  app.use(answerError(parts));
  return app;
}

/** Gives the request its id, and when it ends writes one log line and counts it. */
function observe({ metrics, log }: AppParts, traffic: Traffic) {
  return function observeRequest(req: Request, res: Response, next: NextFunction): void {
    const startMs = performance.now();
    const asked = req.get('x-request-id');
    const requestId = asked !== undefined && /^[\w.:-]{1,128}$/.test(asked) ? asked : randomUUID();
    const facts: Facts = { requestId, route: routeOf(req.path), attempts: 0, responseBytes: 0 };
    if (req.socket.remoteAddress !== undefined) facts.client = req.socket.remoteAddress;
    res.locals.facts = facts;
    res.set('X-Request-Id', requestId);
    metrics.inFlight.inc();
    traffic.begin(facts);

    res.once('close', () => {
      metrics.inFlight.dec();
      if (!res.writableFinished) facts.errorCode ??= 'client_closed_request';
      const status = facts.errorCode === undefined ? res.statusCode : errorTable[facts.errorCode].status;
      const durationMs = performance.now() - startMs;
      const ttfbMs = facts.firstByteMs === undefined ? undefined : facts.firstByteMs - startMs;

      const labels = { route: facts.route, model: facts.model ?? '' };
      const { tenant = '', target = '' } = facts;
      metrics.requests.inc({ ...labels, target, tenant, status });
      const usage = facts.usage?.();
      if (usage !== undefined) countTokens(metrics, { tenant, model: labels.model }, usage);
      metrics.durationSeconds.observe(labels, durationMs / 1000);
      if (ttfbMs !== undefined) metrics.firstByteSeconds.observe(labels, ttfbMs / 1000);
      const completionTokens = usage?.completionTokens ?? 0;
      traffic.end(facts, { status, completionTokens, ...(ttfbMs !== undefined && { ttfbMs }) }, Date.now());

      const { firstByteMs: _, askedMs: __, ...rest } = facts;
      const requestBytes = Buffer.isBuffer(req.body) ? req.body.length : 0;
      const line = { ...rest, usage, status, requestBytes, durationMs: Math.round(durationMs) };
      const level = unimportantRoutes.has(facts.route) ? 'debug' : 'info';
      log[level](ttfbMs === undefined ? line : { ...line, ttfbMs: Math.round(ttfbMs) }, 'request');
    });
    next();
  };
}

function admitByKey({ directory, metrics }: AppParts) {
  return async function admitRequestByKey(req: Request, res: Response, next: NextFunction): Promise<void> {
    try {
      const caller = await directory.authenticate(soleAuthorization(req));
      res.locals.caller = caller;
      if (caller !== null) factsOf(res).tenant = caller.tenant;
    } catch (error) {
      const { code } = error as GatewayError;
      if (code === 'missing_api_key' || code === 'invalid_api_key' || code === 'invalid_token')
        metrics.authFailures.inc({ reason: code });
      throw error;
    }
    next();
  };
}

/** Of several Node would take the first, and what is in front of us perhaps the last. */
function soleAuthorization(req: Request): string | undefined {
  const given = req.get('authorization');
  if (given === undefined) return undefined;
  const names = req.rawHeaders.filter((name, i) => i % 2 === 0 && name.toLowerCase() === 'authorization');
  if (names.length === 1) return given;
  throw new GatewayError('invalid_api_key', `Authorization: expected one such header, got ${names.length}`);
}

function passOn(path: (typeof forwardedPaths)[number], parts: AppParts) {
  return async function passRequestOn(req: Request, res: Response): Promise<void> {
    parseContentType(req.get('content-type'));
    const body: Buffer = Buffer.isBuffer(req.body) ? req.body : Buffer.alloc(0);
    await admit(path, parseAsked(body), body, req, res, parts);
  };
}

/** Answers a request within its caller's limits. */
async function admit(
  path: (typeof forwardedPaths)[number],
  asked: Asked,
  body: Buffer,
  req: Request,
  res: Response,
  parts: AppParts,
  translation?: Translation,
): Promise<void> {
  const facts = factsOf(res);
  const scopes = scopesOf(res, parts.directory);
  const entry = await parts.quota.enter(facts.tenant ?? null, scopes, estimatePromptTokens(body.length));
  for (const [name, value] of entry.headers) res.setHeader(name, value);
  if (entry.refusal !== null) throw entry.refusal;
  try {
    await answer(path, asked, body, req, res, parts, translation);
  } finally {
    entry.settle(costOf(facts));
  }
}

/** Whose limits hold: the tenant's, and those of the key that was shown. */
function scopesOf(res: Response, directory: Directory): readonly Scope[] {
  const caller = res.locals.caller as Caller | null;
  if (caller === null) return [];
  const { tenant, keyId, limits } = caller;
  const ofTenant = directory.scopesOf(tenant);
  return limits === undefined ? ofTenant : [...ofTenant, { of: 'key', id: keyId, limits }];
}

/** What a request that has ended costs its caller; null when it cannot be told, since the caller did not wait for it. */
function costOf({ usage, attempts, errorCode }: Facts): TokenUsage | null {
  if (usage !== undefined) return usage();
  return attempts > 0 && errorCode === 'client_closed_request' ? null : noTokens;
}

async function answer(
  path: (typeof forwardedPaths)[number],
  { model, user, isStream, maxTokens, numChoices }: Asked,
  body: Buffer,
  req: Request,
  res: Response,
  parts: AppParts,
  translation?: Translation,
): Promise<void> {
  const facts = factsOf(res);
  const asker: Asker = { tenant: facts.tenant ?? null, user, header: (name) => req.get(name) };
  const target = await findTarget(model, facts, parts, asker);

  const headers: Record<string, string> = { 'x-request-id': facts.requestId };
  for (const name of headersPassedOn) {
    const value = req.get(name);
    if (value !== undefined) headers[name] = value;
  }
  if (target.name !== model) headers[modelHeader] = target.name;
  const span = startRequestSpan(path, model, headers);
  res.once('close', () => endRequestSpan(span, res.statusCode, facts));

  followRoute(model, target, { path, headers, body }, res, parts);
  const signal = endSignal(res, parts.cutOff);
  const session = sessionOf(req, facts);
  const standing = parts.directory.standingOf(facts.tenant ?? null);
  const ask = askOf(
    {
      tenant: facts.tenant ?? null,
      standing: { ...standing, priority: lowered(standing.priority, req.get('x-motet-priority')) },
      adapter: target.name,
      bodyBytes: body.length,
      maxTokens: isGeneration(path) ? maxTokens : 0,
      numChoices,
      waitMs: parseWaitMs(req.get('x-llm-d-slo-ttft-ms')),
    },
    parts.forward.lengths,
    performance.now(),
  );
  const translated = translation && { translation };
  const asked = { path, target, headers, body, session, ask, signal, ...translated };
  const isWaiting = () => facts.engine === undefined;
  const endHold = isStream
    ? holdStream(res, { [modelHeader]: target.name }, isWaiting, parts.hold)
    : () => undefined;
  res.once('close', endHold);
  try {
    const failure = await forward(parts.forward, asked, res, facts);
    if (failure !== null) noteError(parts.log, facts, failure);
  } catch (error) {
    if (!res.headersSent) throw error;
    // The client was told to wait, in an answer that has begun.
    const failure = asGatewayError(error, parts.maxBodyBytes);
    noteError(parts.log, facts, failure);
    res.end(translation?.error(failure) ?? errorEvent(errorBody(failure)));
  } finally {
    endHold();
  }
}

/** The client's word that requests belong together. Another tenant's is another. */
function sessionOf(req: Request, { tenant = '' }: Facts): string | null {
  const session = req.get('x-motet-session');
  return session === undefined ? null : `${tenant}\n${session}`;
}

/**
 * Who answers to this name. What no engine is known to hold may have been loaded a moment ago: look once more before
 * saying so. `facts` get names that a resource or an engine said, never what a client typed, so they may become labels of
 * metrics.
 */
export async function findTarget(
  model: string,
  facts: Pick<Facts, 'tenant' | 'model' | 'target'>,
  { directory, forward, routes }: Pick<AppParts, 'directory' | 'forward' | 'routes'>,
  asker: Asker,
): Promise<WeightedTarget> {
  const caller = facts.tenant ?? null;
  if (directory.targetsOf(model, caller) === null) await directory.autoLoad(model, caller);
  const targets = directory.targetsOf(model, caller);
  if (targets === null) throw modelNotFound(model);
  const [first] = targets;
  if (first === undefined || first.baseModel !== null) facts.model = model;
  if (first === undefined) {
    throw new GatewayError('model_unavailable', 'none of the targets of this route exists', {
      param: 'model',
    });
  }

  const { endpoints } = forward;
  const resolve = (target: Target) => resolveModel(target, endpoints.all, Date.now());
  const rules = directory.rulesOf(model);
  const draw = (rules && stickyKey(rules, asker)) ?? Math.random();
  const shares = () => (rules === null ? targets : routes.sharesOf(rules, targets, Date.now()));
  const choose = () => chooseTarget(shares(), (target) => resolve(target).kind === 'served', draw);
  let target: WeightedTarget | null = choose();
  if (target === null) {
    await endpoints.refresh(baseModelsOf(targets));
    target = choose();
  }
  const { kind } = resolve(target ?? first);
  if (kind !== 'unknown' && kind !== 'no_engine') facts.model = model;
  // Nobody holds it; if it may appear, admission waits for it.
  target ??= chooseTarget(shares(), mayAppear, draw);
  if (target === null) throw notServed(model, first, kind === 'served' ? 'unknown' : kind);
  facts.target = target.name;
  if (target.asks !== undefined) directory.ask(target.asks);
  return target;
}

/** For an AdapterRoute: asks those who listen as well, and judges the target by what becomes of the request. */
function followRoute(
  model: string,
  target: WeightedTarget,
  copied: Copied,
  res: Response,
  { directory, routes }: AppParts,
): void {
  const rules = directory.rulesOf(model);
  const facts = factsOf(res);
  const targets = directory.targetsOf(model, facts.tenant ?? null);
  if (rules === null || targets === null) return;
  res.once('close', () => {
    const isStream = String(res.getHeader('content-type') ?? '').startsWith('text/event-stream');
    const judged = judgedOf(facts, res.statusCode, isStream);
    if (judged !== null) routes.note(rules, target, judged, Date.now());
    // Now the copies are in nobody's way.
    if (isGeneration(copied.path)) routes.shadow(rules, targets, target, copied, Math.random);
  });
}

function isGeneration(path: string): boolean {
  return path === enginePaths.chat || path === enginePaths.completions;
}

/** Null when there are no BaseModels to tell engines apart. */
function baseModelsOf(targets: readonly Target[]): Set<string | null> | null {
  const names = new Set(targets.map(({ baseModel }) => baseModel));
  return names.has(null) ? null : names;
}

/** Requests that end with the gateway, by the signal that says so. It has one listener: more are searched one by one. */
const openUntil = new WeakMap<AbortSignal, Set<AbortController>>();

function openRequests(cutOff: AbortSignal): Set<AbortController> {
  let open = openUntil.get(cutOff);
  if (open === undefined) {
    const all = new Set<AbortController>();
    cutOff.addEventListener('abort', () => {
      for (const end of all) end.abort(cutOff.reason);
    });
    openUntil.set(cutOff, all);
    open = all;
  }
  return open;
}

/** Aborted when the client goes away before it has the whole answer, or when the time to drain is over. */
function endSignal(res: Response, cutOff: AbortSignal): AbortSignal {
  const end = new AbortController();
  const open = openRequests(cutOff);
  const close = () => {
    open.delete(end);
    if (!res.writableFinished) end.abort(new GatewayError('client_closed_request', 'the client hung up'));
  };
  open.add(end);
  if (cutOff.aborted) end.abort(cutOff.reason);
  if (res.destroyed) close();
  else res.once('close', close);
  return end.signal;
}

function onlyMethod(method: string) {
  return function refuseOtherMethods(req: Request, res: Response): void {
    res.set('Allow', method);
    throw new GatewayError('method_not_allowed', `${req.path}: expected ${method}, got ${req.method}`);
  };
}

function answerError({ maxBodyBytes, log }: AppParts) {
  // Express knows an error handler by its four parameters.
  return function answerRequestError(error: unknown, req: Request, res: Response, _next: NextFunction): void {
    const failure = asGatewayError(error, maxBodyBytes);
    noteError(log, factsOf(res), failure);
    // What is left of a body that was refused is not read: the connection cannot carry another request.
    if (failure.code === 'body_too_large') res.set('Connection', 'close');
    if (isLoraxPath(req.path)) sendLoraxError(res, failure);
    else sendError(res, failure);
  };
}

function noteError(log: Logger, facts: Facts, failure: GatewayError): void {
  facts.errorCode = failure.code;
  if (failure.row.status >= 500) {
    log.warn(
      { requestId: facts.requestId, code: failure.code, cause: shownCause(failure.cause) },
      failure.message,
    );
  }
}

/** Of a cause the log gets these alone: an error of an HTTP parser also carries the bytes that it could not parse. */
function shownCause(cause: unknown): object | undefined {
  if (!(cause instanceof Error)) return undefined;
  return { code: (cause as { code?: unknown }).code, stack: cause.stack };
}

/** The route as a metric label: only ever one of ours, so that nobody can make series by asking for paths. */
function routeOf(path: string): string {
  if (knownRoutes.has(path)) return path;
  if (path.startsWith('/console/')) return '/console';
  const batchRoute = batchRouteOf(path);
  if (batchRoute !== null) return batchRoute;
  return path.startsWith('/v1/models/') ? '/v1/models/:id' : 'other';
}

function factsOf(res: Response): Facts {
  return res.locals.facts as Facts;
}

function callerOf(res: Response): string | null {
  return factsOf(res).tenant ?? null;
}
