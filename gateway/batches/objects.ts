// OpenAI's File and Batch as they go over the wire, and what is kept of them. Times in objects are Unix seconds, as theirs.

import { randomBytes } from 'node:crypto';

/** A file's `meta.json`. */
export type FileRecord = {
  id: string;
  bytes: number;
  created_at: number;
  expires_at: number;
  filename: string;
  purpose: 'batch' | 'batch_output';
};

/** A batch's `batch.json`: what was asked for. */
export type BatchRecord = {
  id: string;
  /** Null where nobody needs a key. */
  tenant: string | null;
  endpoint: string;
  input_file_id: string;
  completion_window: string;
  created_at: number;
  expires_at: number;
  metadata: Record<string, string> | null;
  /** Seconds that output and error file are kept. */
  output_seconds: number;
};

/** Its `state.json`: how far its owner is. */
export type BatchState = {
  in_progress_at: number | null;
  finalizing_at: number | null;
  request_counts: RequestCounts;
};

export type RequestCounts = { total: number; completed: number; failed: number };

/** Its `cancel.json`: somebody wants it to end. */
export type CancelRecord = { cancelling_at: number };

export type FinalStatus = 'completed' | 'failed' | 'expired' | 'cancelled';

/** Its `final.json`: how it ended. It is written once. */
export type FinalRecord = {
  status: FinalStatus;
  at: number;
  in_progress_at: number | null;
  finalizing_at: number | null;
  request_counts: RequestCounts;
  errors: LineError[];
  output_file_id: string | null;
  error_file_id: string | null;
  usage: BatchUsage;
};

/** What is wrong with a line of the input file, or with the file when `line` is null. */
export type LineError = { code: string; line: number | null; message: string; param: string | null };

export type BatchUsage = {
  input_tokens: number;
  input_tokens_details: { cached_tokens: number };
  output_tokens: number;
  output_tokens_details: { reasoning_tokens: number };
  total_tokens: number;
};

/** One line of an output or error file. */
export type OutputLine = {
  id: string;
  custom_id: string;
  response: { status_code: number; request_id: string; body: unknown } | null;
  error: { code: string; message: string } | null;
};

export const noCounts: RequestCounts = { total: 0, completed: 0, failed: 0 };

export function noUsage(): BatchUsage {
  return {
    input_tokens: 0,
    input_tokens_details: { cached_tokens: 0 },
    output_tokens: 0,
    output_tokens_details: { reasoning_tokens: 0 },
    total_tokens: 0,
  };
}

export function fileObject({ id, bytes, created_at, expires_at, filename, purpose }: FileRecord) {
  return { id, object: 'file', bytes, created_at, expires_at, filename, purpose, status: 'processed' };
}

export type BatchParts = {
  record: BatchRecord;
  state: BatchState | null;
  cancel: CancelRecord | null;
  final: FinalRecord | null;
};

export function statusOf({ state, cancel, final }: BatchParts): string {
  if (final !== null) return final.status;
  if (cancel !== null) return 'cancelling';
  if (state === null || state.in_progress_at === null) return 'validating';
  return state.finalizing_at === null ? 'in_progress' : 'finalizing';
}

export function batchObject(parts: BatchParts) {
  const { record, state, cancel, final } = parts;
  const endedAt = (status: FinalStatus) => (final?.status === status ? final.at : null);
  const times = final ?? state;
  return {
    id: record.id,
    object: 'batch',
    endpoint: record.endpoint,
    errors: final?.status === 'failed' ? { object: 'list', data: final.errors } : null,
    input_file_id: record.input_file_id,
    completion_window: record.completion_window,
    status: statusOf(parts),
    output_file_id: final?.output_file_id ?? null,
    error_file_id: final?.error_file_id ?? null,
    created_at: record.created_at,
    in_progress_at: times?.in_progress_at ?? null,
    expires_at: record.expires_at,
    finalizing_at: times?.finalizing_at ?? null,
    completed_at: endedAt('completed'),
    failed_at: endedAt('failed'),
    expired_at: endedAt('expired'),
    cancelling_at: cancel?.cancelling_at ?? null,
    cancelled_at: endedAt('cancelled'),
    request_counts: times?.request_counts ?? noCounts,
    usage: final?.usage ?? noUsage(),
    metadata: record.metadata,
  };
}

/** Ids begin with when they were made, so that they sort by it; the rest cannot be guessed. */
export function newId(prefix: 'file-' | 'batch_', nowMs: number): string {
  return `${prefix}${nowMs.toString(16).padStart(12, '0')}${randomBytes(10).toString('hex')}`;
}

export function isId(prefix: 'file-' | 'batch_', text: string): boolean {
  return text.startsWith(prefix) && /^[0-9a-f]{32}$/.test(text.slice(prefix.length));
}

/** When it was made, in milliseconds. */
export function timeOfId(id: string): number {
  return Number.parseInt(id.slice(id.length - 32, id.length - 20), 16);
}

/** A tenant's folder. Whatever the name, it is one folder, and no two names have the same. */
export function tenantFolder(tenant: string | null): string {
  if (tenant === null) return 'everybody';
  return `t-${[...Buffer.from(tenant)].map(safeChar).join('')}`;
}

function safeChar(byte: number): string {
  const char = String.fromCharCode(byte);
  return /[\w-]/.test(char) ? char : `.${byte.toString(16).padStart(2, '0')}`;
}

export type Page<T> = { data: T[]; hasMore: boolean };

/**
 * A page of a list, by ids: newest first, unless `order` says otherwise.
 *
 * @param after  the last id of the page before; null: from the beginning. It need not exist any more.
 */
export function pageOf(
  ids: readonly string[],
  { after, limit, order = 'desc' }: { after: string | null; limit: number; order?: 'asc' | 'desc' },
): Page<string> {
  const sorted = ids.toSorted((a, b) => (a < b ? -1 : 1) * (order === 'asc' ? 1 : -1));
  const isPast = (id: string) => after === null || (order === 'asc' ? id > after : id < after);
  const rest = sorted.filter(isPast);
  return { data: rest.slice(0, limit), hasMore: rest.length > limit };
}

export const unixSeconds = (ms: number) => Math.floor(ms / 1000);
