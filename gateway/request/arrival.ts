// A request from the moment that it came: what its way through the gateway adds to it, and what is said of it in the end.

import type { IncomingMessage, ServerResponse } from 'node:http';
import type { Response } from 'express';
import type { Logger } from 'pino';
import type { Caller } from '../auth.ts';
import type { GatewayError } from '../errors.ts';
import type { Outcome } from '../forward.ts';

export type Arrival = {
  readonly req: IncomingMessage;
  readonly res: ServerResponse;
  readonly facts: Facts;
  /** Whose key it showed; null where nobody needs one, and before the door. */
  caller: Caller | null;
  /** Its connection was closed before the client had all of its answer. */
  isHungUp: boolean;
  /** Called in turn when the answer has ended, be it that the client is gone. */
  readonly ends: (() => void)[];
};

/** What is known of a request in the end: one log line, and its metrics. */
export type Facts = Outcome & {
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
  requestBytes: number;
};

export function arrivalOf(res: Response): Arrival {
  return res.locals.arrival as Arrival;
}

/** The tenant of a request; null where nobody needs a key. */
export function tenantOf(res: Response): string | null {
  return arrivalOf(res).facts.tenant ?? null;
}

export function noteError(log: Logger, facts: Facts, failure: GatewayError): void {
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
