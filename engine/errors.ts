/**
 * The engine's errors: one table from code to HTTP status and OpenAI type, one class, one place that makes a body.
 * Bodies carry the nested `error` object (OpenAI, new vLLM) and the same keys flat (old vLLM); readers of either work.
 */

interface ErrorRow {
  status: number;
  /** OpenAI's and vLLM's `type`. */
  type: string;
  /** Whether the same request may succeed later; the reply then carries Retry-After. */
  isRetryable: boolean;
}

const row = (status: number, type: string, isRetryable = false): ErrorRow => ({ status, type, isRetryable });

/** What each code means is documented in engine/README.md. */
export const errorTable = {
  invalid_json: row(400, 'invalid_request_error'),
  invalid_value: row(400, 'invalid_request_error'),
  unsupported_parameter: row(400, 'invalid_request_error'),
  context_length_exceeded: row(400, 'invalid_request_error'),
  unauthorized: row(401, 'authentication_error'),
  forbidden: row(403, 'permission_error'),
  model_not_found: row(404, 'NotFoundError'),
  path_not_found: row(404, 'NotFoundError'),
  method_not_allowed: row(405, 'invalid_request_error'),
  body_too_large: row(413, 'invalid_request_error'),
  unsupported_media_type: row(415, 'invalid_request_error'),
  adapter_name_missing: row(400, 'InvalidUserInput'),
  adapter_already_loaded: row(400, 'InvalidUserInput'),
  adapter_not_loaded: row(404, 'NotFoundError'),
  adapter_file_not_found: row(404, 'NotFoundError'),
  adapter_path_refused: row(400, 'BadRequestError'),
  adapter_invalid: row(400, 'BadRequestError'),
  adapter_rank_too_large: row(400, 'BadRequestError'),
  adapter_digest_mismatch: row(400, 'BadRequestError'),
  adapter_purged: row(410, 'NotFoundError'),
  purge_incomplete: row(503, 'server_error', true),
  source_unavailable: row(503, 'server_error', true),
  merge_not_ready: row(503, 'server_error', true),
  too_many_loads: row(503, 'server_error', true),
  arena_full: row(503, 'server_error', true),
  overloaded: row(429, 'rate_limit_error', true),
  draining: row(503, 'server_error', true),
  not_ready: row(503, 'server_error', true),
  grammar_failed: row(400, 'invalid_request_error'),
  step_failed: row(500, 'server_error'),
  internal: row(500, 'server_error'),
} as const satisfies Record<string, ErrorRow>;

export type ErrorCode = keyof typeof errorTable;

export class EngineError extends Error {
  readonly code: ErrorCode;
  /** The request field at fault, if one is. */
  readonly param: string | null;
  /** When a retry may help, in seconds. */
  readonly retryAfterSeconds: number;

  constructor(
    code: ErrorCode,
    message: string,
    options: { param?: string; retryAfterSeconds?: number; cause?: unknown } = {},
  ) {
    super(message, { cause: options.cause });
    this.name = 'EngineError';
    this.code = code;
    this.param = options.param ?? null;
    this.retryAfterSeconds = options.retryAfterSeconds ?? 1;
  }

  get status(): number {
    return errorTable[this.code].status;
  }
}

/** Our own bookkeeping is broken: nothing computed after this can be trusted, so the process ends. */
export class InvariantError extends Error {
  override name = 'InvariantError';
}

export interface ErrorBody {
  error: { message: string; type: string; param: string | null; code: string };
  object: 'error';
  message: string;
  type: string;
  param: string | null;
  code: string;
}

/** Anything thrown, as an EngineError. What is not one is ours: its message stays out of the reply. */
export function toEngineError(thrown: unknown): EngineError {
  if (thrown instanceof EngineError) return thrown;
  return new EngineError('internal', 'the engine failed on this request; its log has the cause', {
    cause: thrown,
  });
}

export function errorBody(error: EngineError): ErrorBody {
  const { type } = errorTable[error.code];
  const fields = { message: error.message, type, param: error.param, code: error.code };
  return { error: fields, object: 'error', ...fields };
}

/** The one shape of a refused field. */
export function invalidValue(field: string, expected: string, got: unknown): EngineError {
  return new EngineError('invalid_value', `${field}: ${expected}, got ${describe(got)}`, { param: field });
}

/** A value in a few words. Long text is not repeated: messages end in logs of others. */
function describe(value: unknown): string {
  if (value === undefined) return 'nothing';
  if (value === null) return 'null';
  if (Array.isArray(value)) return `a list of ${value.length}`;
  if (typeof value === 'object') return 'an object';
  if (typeof value === 'string')
    return value.length <= 20 ? JSON.stringify(value) : `a string of ${value.length} characters`;
  return String(value);
}
