// Every way in which the gateway refuses or fails, as rows of one table, and the one place that turns an error
// into a response. The body has OpenAI's shape: {"error":{"message","type","param","code"}}.
// An engine's own error answer never comes through here: it is passed on as it is.

import type { ServerResponse } from 'node:http';

type ErrorRow = {
  status: number;
  /** OpenAI's word for the kind of error; clients of theirs choose an exception by status, people read this. */
  type: string;
  /** Seconds for Retry-After. Only errors that the same request may outlive have it. */
  retryAfterS?: number;
};

const invalid = 'invalid_request_error';

export const errorTable = {
  // The caller's.
  invalid_content_type: { status: 415, type: invalid },
  unsupported_content_encoding: { status: 415, type: invalid },
  invalid_utf8: { status: 400, type: invalid },
  invalid_json: { status: 400, type: invalid },
  invalid_type: { status: 400, type: invalid },
  missing_required_parameter: { status: 400, type: invalid },
  body_too_large: { status: 413, type: invalid },
  incomplete_body: { status: 400, type: invalid },
  missing_api_key: { status: 401, type: 'authentication_error' },
  invalid_api_key: { status: 401, type: 'authentication_error' },
  invalid_token: { status: 401, type: 'authentication_error' },
  ambiguous_token: { status: 403, type: 'permission_error' },
  model_not_found: { status: 404, type: invalid },
  group_too_large: { status: 400, type: invalid },
  route_not_found: { status: 404, type: invalid },
  method_not_allowed: { status: 405, type: invalid },
  // Of files and batches.
  invalid_multipart: { status: 400, type: invalid },
  invalid_value: { status: 400, type: invalid },
  file_too_large: { status: 413, type: invalid },
  tenant_storage_full: { status: 413, type: invalid },
  file_not_found: { status: 404, type: invalid },
  file_in_use: { status: 409, type: invalid },
  batch_not_found: { status: 404, type: invalid },
  batch_not_cancellable: { status: 409, type: invalid },
  too_many_batches: { status: 429, type: 'rate_limit_error', retryAfterS: 60 },
  too_many_uploads: { status: 429, type: 'rate_limit_error', retryAfterS: 1 },
  // The world's: they pass.
  rate_limit_exceeded: { status: 429, type: 'rate_limit_error', retryAfterS: 1 },
  queue_full: { status: 429, type: 'rate_limit_error', retryAfterS: 1 },
  deadline_unmeetable: { status: 503, type: 'server_error', retryAfterS: 1 },
  queue_timeout: { status: 503, type: 'server_error', retryAfterS: 1 },
  model_unavailable: { status: 503, type: 'server_error', retryAfterS: 2 },
  no_engine_ready: { status: 503, type: 'server_error', retryAfterS: 2 },
  engine_unreachable: { status: 503, type: 'server_error', retryAfterS: 2 },
  engine_failed: { status: 502, type: 'server_error' },
  engine_timeout: { status: 504, type: 'server_error' },
  issuer_unavailable: { status: 503, type: 'server_error', retryAfterS: 10 },
  starting: { status: 503, type: 'server_error', retryAfterS: 1 },
  shutting_down: { status: 503, type: 'server_error', retryAfterS: 1 },
  // Nobody reads this one: the client is gone. The status is for logs and metrics.
  client_closed_request: { status: 499, type: invalid },
  // Ours.
  internal_error: { status: 500, type: 'server_error' },
} satisfies Record<string, ErrorRow>;

export type ErrorCode = keyof typeof errorTable;

export class GatewayError extends Error {
  readonly code: ErrorCode;
  /** The request field that is wrong, if one is. */
  readonly param: string | null;
  /** Where it is known better than the table has it. */
  readonly retryAfterS: number | undefined;

  constructor(
    code: ErrorCode,
    message: string,
    options: { param?: string; cause?: unknown; retryAfterS?: number } = {},
  ) {
    super(message, { cause: options.cause });
    this.code = code;
    this.param = options.param ?? null;
    this.retryAfterS = options.retryAfterS ?? (errorTable[code] as ErrorRow).retryAfterS;
  }

  get row(): ErrorRow {
    return errorTable[this.code];
  }
}

/** Any thrown thing as one of ours. What we did not foresee tells the client nothing about our insides. */
export function asGatewayError(error: unknown): GatewayError {
  if (error instanceof GatewayError) return error;
  // The router's, for a path like /v1/models/%zz.
  if (error instanceof URIError) {
    return new GatewayError('route_not_found', 'path: expected percent-encoded UTF-8, got something else');
  }
  return new GatewayError(
    'internal_error',
    'the gateway failed; its log has the cause under this request id',
    {
      cause: error,
    },
  );
}

export function errorBody({ message, row, param, code }: GatewayError) {
  return { error: { message, type: row.type, param, code } };
}

/** Answers with the error. Does nothing when an answer has begun or nobody is there to read it. */
export function sendError(res: ServerResponse, error: GatewayError): void {
  const { row } = error;
  sendJson(res, row.status, errorBody(error), {
    ...(error.retryAfterS !== undefined && { 'Retry-After': String(error.retryAfterS) }),
    ...(row.status === 401 && { 'WWW-Authenticate': 'Bearer' }),
  });
}

/** The same with a body of another protocol. */
export function sendJson(
  res: ServerResponse,
  status: number,
  body: object,
  headers: Record<string, string> = {},
): void {
  if (res.headersSent || res.destroyed) return;
  for (const [name, value] of Object.entries(headers)) res.setHeader(name, value);
  res.statusCode = status;
  res.setHeader('Content-Type', 'application/json; charset=utf-8');
  res.end(JSON.stringify(body));
}
