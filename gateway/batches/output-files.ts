// The files that a job ends with: the output file of the lines that were answered well, the error file of all others. Both are
// made of the records (results.ts) and have the same ids whoever makes them.

import { createHash } from 'node:crypto';
import type { Files } from './files.ts';
import { isProblem, parseLine, splitLines } from './lines.ts';
import {
  type BatchRecord,
  type BatchUsage,
  type FinalRecord,
  type FinalStatus,
  noUsage,
  type OutputLine,
  type RequestCounts,
} from './objects.ts';
import { readResults } from './results.ts';
import type { Store } from './store.ts';

const chunkChars = 64 << 10;

/** A job that runs no further. */
export type EndedJob = {
  record: BatchRecord;
  /** Its folder in the store. */
  folder: string;
  /** By line: 1 when it is answered. */
  done: Uint8Array;
  counts: RequestCounts;
};

type Parts = { store: Store; files: Files; maxLineBytes: number };

/** @returns the files, and what a record of the end says of their lines */
export async function writeFiles(
  job: EndedJob,
  status: FinalStatus,
  parts: Parts,
): Promise<Pick<FinalRecord, 'request_counts' | 'output_file_id' | 'error_file_id' | 'usage'>> {
  const counts = { ...job.counts };
  const usage = noUsage();
  let output_file_id: string | null = null;
  let error_file_id: string | null = null;
  if (counts.completed > 0) {
    output_file_id = await write(job, 'output', resultsOf(job, true, counts.completed, usage, parts), parts);
  }
  const numExpired = status === 'expired' ? counts.total - counts.completed - counts.failed : 0;
  if (counts.failed + numExpired > 0) {
    error_file_id = await write(job, 'error', errorsOf(job, counts.failed, numExpired, parts), parts);
    counts.failed += numExpired;
  }
  return { request_counts: counts, output_file_id, error_file_id, usage };
}

/** Of a line, the same each time that it is asked. */
export function requestIdOf(batchId: string, index: number): string {
  return `batch_req_${digest(`${batchId} ${index}`)}`;
}

async function write(
  { record: { id, tenant, output_seconds } }: EndedJob,
  kind: 'output' | 'error',
  lines: AsyncIterable<string>,
  { files }: Parts,
): Promise<string> {
  const fileId = `file-${id.slice('batch_'.length, 'batch_'.length + 12)}${digest(`${id} ${kind}`).slice(0, 20)}`;
  await files.write(tenant, fileId, inChunks(lines), {
    filename: `${id}_${kind}.jsonl`,
    purpose: 'batch_output',
    keepSeconds: output_seconds,
  });
  return fileId;
}

/**
 * @param expected  how many there are: with fewer, the results were taken away by another owner that has ended the job
 * @param usage  is added to
 */
async function* resultsOf(
  { folder }: EndedJob,
  isOk: boolean,
  expected: number,
  usage: BatchUsage,
  { store }: Parts,
): AsyncGenerator<string> {
  let numLines = 0;
  for await (const result of readResults(store, folder)) {
    if (result.isOk !== isOk) continue;
    numLines += 1;
    addUsage(usage, JSON.parse(result.json) as OutputLine);
    yield result.json;
  }
  if (numLines !== expected) throw new Error(`expected ${expected} results, got ${numLines}`);
}

/** Lines that failed, then those that were not run in time. */
async function* errorsOf(
  job: EndedJob,
  numFailed: number,
  numExpired: number,
  parts: Parts,
): AsyncGenerator<string> {
  if (numFailed > 0) yield* resultsOf(job, false, numFailed, noUsage(), parts);
  if (numExpired === 0) return;
  const { tenant, input_file_id, endpoint, id, completion_window } = job.record;
  const message = `this request was not run within the completion window of ${completion_window}`;
  const error = { code: 'batch_expired', message };
  let index = 0;
  for await (const { bytes } of splitLines(
    await parts.files.content(tenant, input_file_id),
    parts.maxLineBytes,
  )) {
    if (job.done[index] === 0) {
      const line = parseLine(bytes!, endpoint);
      const custom_id = isProblem(line) ? '' : line.customId;
      yield JSON.stringify({ id: requestIdOf(id, index), custom_id, response: null, error });
    }
    index += 1;
  }
}

function addUsage(usage: BatchUsage, { response }: OutputLine): void {
  const of = (response?.body as { usage?: Record<string, unknown> } | undefined)?.usage;
  const count = (value: unknown) => (typeof value === 'number' && Number.isFinite(value) ? value : 0);
  const details = of?.prompt_tokens_details as { cached_tokens?: unknown } | undefined;
  usage.input_tokens += count(of?.prompt_tokens);
  usage.input_tokens_details.cached_tokens += count(details?.cached_tokens);
  usage.output_tokens += count(of?.completion_tokens);
  usage.total_tokens += count(of?.prompt_tokens) + count(of?.completion_tokens);
}

function digest(text: string): string {
  return createHash('sha256').update(text).digest('hex').slice(0, 32);
}

async function* inChunks(lines: AsyncIterable<string>): AsyncIterable<Buffer> {
  let text = '';
  for await (const line of lines) {
    text += `${line}\n`;
    if (text.length < chunkChars) continue;
    yield Buffer.from(text);
    text = '';
  }
  if (text !== '') yield Buffer.from(text);
}
