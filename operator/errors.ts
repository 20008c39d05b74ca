/**
 * The operator's errors: what may pass is thrown and tried again with backoff; what a person must change is a condition
 * (crds/names.ts) and no error. One table from code to what comes of it.
 */
import { ApiError } from '../crds/api.ts';

interface ErrorRow {
  /** `retry`: the key is looked at again with backoff. `drop`: not by this process. `exit`: the process ends. */
  outcome: 'retry' | 'drop' | 'exit';
}

/** What each code means is documented in operator/README.md. */
export const errorTable = {
  api_unreachable: { outcome: 'retry' },
  api_refused: { outcome: 'retry' },
  api_conflict: { outcome: 'retry' },
  not_leader: { outcome: 'drop' },
  lease_lost: { outcome: 'exit' },
  internal: { outcome: 'retry' },
} as const satisfies Record<string, ErrorRow>;

export type ErrorCode = keyof typeof errorTable;

export class OperatorError extends Error {
  override name = 'OperatorError';
  readonly code: ErrorCode;

  constructor(code: ErrorCode, message: string, options: { cause?: unknown } = {}) {
    super(message, options);
    this.code = code;
  }
}

/** Anything thrown in a reconcile, as an OperatorError. */
export function toOperatorError(thrown: unknown): OperatorError {
  if (thrown instanceof OperatorError) return thrown;
  if (thrown instanceof ApiError) {
    const code = thrown.status === 409 ? 'api_conflict' : 'api_refused';
    return new OperatorError(code, thrown.message, { cause: thrown });
  }
  const { message } = thrown as Error;
  // The words of crds/api.ts.
  const code = message.startsWith('no answer from the API server') ? 'api_unreachable' : 'internal';
  return new OperatorError(code, message, { cause: thrown });
}
