// Who comes in: what a request shows is asked of the directory. And how a request is turned away, here or anywhere behind.

import type { IncomingMessage, ServerResponse } from 'node:http';
import type { NextFunction, Request, Response } from 'express';
import type { Logger } from 'pino';
import type { Directory } from '../directory.ts';
import { asGatewayError, GatewayError, sendError } from '../errors.ts';
import { authFailureReasons, type Metrics } from '../metrics.ts';
import { isLoraxPath, sendLoraxError } from '../protocols/lorax-routes.ts';
import { type Arrival, arrivalOf, noteError } from './arrival.ts';

export type DoorParts = { directory: Directory; metrics: Metrics };

export function admitByKey(parts: DoorParts) {
  return async function admitRequestByKey(_req: Request, res: Response, next: NextFunction): Promise<void> {
    await enter(arrivalOf(res), parts);
    next();
  };
}

/** @throws GatewayError of 401, or 403 for a token of two tenants */
export async function enter(arrival: Arrival, { directory, metrics }: DoorParts): Promise<void> {
  try {
    const caller = await directory.authenticate(soleAuthorization(arrival.req));
    arrival.caller = caller;
    if (caller !== null) arrival.facts.tenant = caller.tenant;
  } catch (error) {
    const { code } = error as GatewayError;
    if ((authFailureReasons as readonly string[]).includes(code)) metrics.authFailures.inc({ reason: code });
    throw error;
  }
}

const authorizationHeader = 'authorization';

/** Of several Node would take the first, and what is in front of us perhaps the last. */
function soleAuthorization({ headers, rawHeaders }: IncomingMessage): string | undefined {
  const given = headers.authorization;
  if (given === undefined) return undefined;
  let count = 0;
  for (let i = 0; i < rawHeaders.length; i += 2) {
    const name = rawHeaders[i]!;
    if (name.length === authorizationHeader.length && name.toLowerCase() === authorizationHeader) count += 1;
  }
  if (count === 1) return given;
  throw new GatewayError('invalid_api_key', `Authorization: expected one such header, got ${count}`);
}

export function onlyMethod(method: string) {
  return function refuseOtherMethods(req: Request, res: Response): void {
    res.set('Allow', method);
    throw new GatewayError('method_not_allowed', `${req.path}: expected ${method}, got ${req.method}`);
  };
}

export function answerError(log: Logger) {
  // Express knows an error handler by its four parameters.
  return function answerRequestError(error: unknown, req: Request, res: Response, _next: NextFunction): void {
    answerFailure(arrivalOf(res), error, isLoraxPath(req.path) ? sendLoraxError : sendError, log);
  };
}

/** Answers with what went wrong, if it can still be said. */
export function answerFailure(
  { res, facts }: Arrival,
  error: unknown,
  send: (res: ServerResponse, failure: GatewayError) => void,
  log: Logger,
): void {
  const failure = asGatewayError(error);
  noteError(log, facts, failure);
  // What is left of a body that was refused is not read: the connection cannot carry another request.
  if (failure.code === 'body_too_large' && !res.headersSent) res.setHeader('Connection', 'close');
  send(res, failure);
}
