// Gives a request its id, and when it ends sees to it that it is counted and gets its log line (ledger.ts).

import { randomUUID } from 'node:crypto';
import type { IncomingMessage, ServerResponse } from 'node:http';
import type { NextFunction, Request, Response } from 'express';
import type { Traffic } from '../console/traffic.ts';
import { errorTable } from '../errors.ts';
import type { Metrics } from '../metrics.ts';
import type { Turns } from '../turns.ts';
import type { Arrival, Facts } from './arrival.ts';
import type { Ledger } from './ledger.ts';

export type ObserveParts = {
  metrics: Metrics;
  traffic: Traffic;
  ledger: Ledger;
  /** For those whose clients hang up. */
  turns: Turns;
  /** The route of a path as a metric label. */
  routeOf(path: string): string;
  /** Asked every few seconds by machines; in the log they would bury what matters. */
  unimportantRoutes: ReadonlySet<string>;
};

export function observe(parts: ObserveParts) {
  return function observeRequest(req: Request, res: Response, next: NextFunction): void {
    res.locals.arrival = begin(parts, req, res, parts.routeOf(req.path));
    next();
  };
}

export function begin(
  parts: ObserveParts,
  req: IncomingMessage,
  res: ServerResponse,
  route: string,
): Arrival {
  const startMs = performance.now();
  const asked = req.headers['x-request-id'];
  const requestId = typeof asked === 'string' && /^[\w.:-]{1,128}$/.test(asked) ? asked : randomUUID();
  const facts: Facts = { requestId, route, attempts: 0, requestBytes: 0, responseBytes: 0 };
  if (req.socket.remoteAddress !== undefined) facts.client = req.socket.remoteAddress;
  const arrival: Arrival = { req, res, facts, caller: null, isHungUp: false, ends: [] };
  res.setHeader('X-Request-Id', requestId);
  parts.metrics.inFlight.inc();
  const endTraffic = parts.traffic.begin(facts);
  const end = () => {
    noteEnd(parts, arrival, startMs, endTraffic);
    for (const each of arrival.ends) each();
  };
  res.on('close', () => {
    arrival.isHungUp = !res.writableFinished;
    if (arrival.isHungUp) parts.turns.take(end);
    else end();
  });
  return arrival;
}

function noteEnd(
  { metrics, ledger, unimportantRoutes }: ObserveParts,
  { res, facts, isHungUp }: Arrival,
  startMs: number,
  endTraffic: ReturnType<Traffic['begin']>,
): void {
  metrics.inFlight.dec();
  if (isHungUp) facts.errorCode ??= 'client_closed_request';
  const status = facts.errorCode === undefined ? res.statusCode : errorTable[facts.errorCode].status;
  const durationMs = performance.now() - startMs;
  const ttfbMs = facts.firstByteMs === undefined ? undefined : facts.firstByteMs - startMs;
  const usage = facts.usage?.();
  const completionTokens = usage?.completionTokens ?? 0;
  endTraffic({ status, completionTokens, ...(ttfbMs !== undefined && { ttfbMs }) }, Date.now());
  const isUnimportant = unimportantRoutes.has(facts.route);
  ledger.note({ facts, usage, status, durationMs, ttfbMs, isUnimportant });
}
