// One job from where it stands to its end: reads the lines, leaves out those that were answered, runs the others in the order
// of order.ts, records each answer (results.ts), and makes the output and error file of the records. It may be killed
// anywhere: whoever owns the job next begins here again and comes to the same end.

import { createHash } from 'node:crypto';
import { setTimeout as sleep } from 'node:timers/promises';
import { asGatewayError, errorBody, GatewayError } from '../errors.ts';
import type { Files } from './files.ts';
import type { Gate } from './gate.ts';
import { folderOf, type Jobs } from './jobs.ts';
import type { Lease } from './lease.ts';
import { isProblem, maxLines, parseLine, splitLines } from './lines.ts';
import {
  type BatchRecord,
  type BatchState,
  type BatchUsage,
  type FinalStatus,
  type LineError,
  noCounts,
  noUsage,
  type OutputLine,
  type RequestCounts,
  unixSeconds,
} from './objects.ts';
import { type Lane, nextLane, type PlannedLine, planLanes, prefixKey } from './order.ts';
import { ResultLog, readResults } from './results.ts';
import type { Store } from './store.ts';

export type LineRequest = {
  tenant: string | null;
  path: string;
  model: string;
  body: Buffer;
  requestId: string;
  signal: AbortSignal;
};

/** Asks an engine on behalf of the tenant, whose rights are looked at now. Throws a GatewayError. */
export type AnswerLine = (request: LineRequest) => Promise<{ status: number; body: Buffer }>;

export type JobParts = {
  store: Store;
  files: Files;
  jobs: Jobs;
  gate: Gate;
  answer: AnswerLine;
  /** Of one line of the input file. */
  maxLineBytes: number;
  /** Of a job's answers; when they are more, what is left of it fails. */
  maxResultBytes: number;
  /** Between two writes of answers, and between two looks whether the job was cancelled. */
  recordGapMs: number;
  lookMs: number;
  nowMs: () => number;
  onLine(result: 'completed' | 'failed' | 'tried_again'): void;
};

/** Of errors in the input file as many are told. */
const maxErrors = 100;
/** What an engine failed may be the fault of the line. */
const maxFailures = 3;
const firstPauseMs = 250;
const maxPauseMs = 30_000;
const outputChunkChars = 64 << 10;

/** Why a job's lines are not run any further. */
type Ending = 'expired' | 'cancelled' | 'left';

/**
 * @param stop  no more lines are sent; those in flight may end
 * @param cutOff  those in flight are given up
 * @returns how it ended; null: it was left for the next owner
 */
export async function runJob(
  record: BatchRecord,
  lease: Lease,
  parts: JobParts,
  { stop, cutOff }: { stop: AbortSignal; cutOff: AbortSignal },
): Promise<FinalStatus | null> {
  const job = new Job(record, lease, parts, stop, cutOff);
  return job.run();
}

class Job {
  readonly #record: BatchRecord;
  readonly #lease: Lease;
  readonly #parts: JobParts;
  readonly #folder: string;
  /** Why no more lines are sent. */
  #ending: Ending | null = null;
  /** Aborted then: nobody waits for a place any more. */
  readonly #noMore = new AbortController();
  /** Aborted when lines in flight are not waited for. */
  readonly #giveUp = new AbortController();
  /** Aborted in the end, to let go of signals that live longer. */
  readonly #over = new AbortController();
  #state: BatchState = { in_progress_at: null, finalizing_at: null, request_counts: noCounts };
  #done = new Uint8Array(0);
  #resultBytes = 0;
  #wake = Promise.withResolvers<void>();

  constructor(record: BatchRecord, lease: Lease, parts: JobParts, stop: AbortSignal, cutOff: AbortSignal) {
    this.#record = record;
    this.#lease = lease;
    this.#parts = parts;
    this.#folder = folderOf(record.tenant, record.id);
    const onAbort = (signal: AbortSignal, act: () => void) => {
      if (signal.aborted) act();
      else signal.addEventListener('abort', act, { signal: this.#over.signal });
    };
    onAbort(lease.lost, () => this.#end('left', true));
    onAbort(stop, () => this.#end('left', false));
    onAbort(cutOff, () => this.#end('left', true));
  }

  async run(): Promise<FinalStatus | null> {
    const { jobs, nowMs } = this.#parts;
    await this.#look();
    const looks = setInterval(() => void this.#look(), this.#parts.lookMs);
    try {
      const { lines, errors } = await this.#readLines();
      if (this.#ending === 'left') return null;
      if (errors.length > 0) return await this.#finish('failed', errors);
      await this.#readDone(lines.length);
      this.#state.in_progress_at = unixSeconds(nowMs());
      const before = (await jobs.find(this.#record.tenant, this.#record.id))?.state;
      this.#state.in_progress_at = before?.in_progress_at ?? this.#state.in_progress_at;
      await jobs.writeState(this.#record, this.#state);

      await this.#runLines(await planLanes(lines.filter(({ index }) => this.#done[index] === 0)));
      const ending = this.#ending as Ending | null;
      if (ending === 'left') return null;
      // From here on it is not cancelled and does not expire any more.
      clearInterval(looks);
      this.#state.finalizing_at = unixSeconds(nowMs());
      await jobs.writeState(this.#record, this.#state);
      return await this.#finish(ending ?? 'completed', []);
    } finally {
      clearInterval(looks);
      this.#over.abort();
    }
  }

  #end(ending: Ending, isAtOnce: boolean): void {
    // Somebody else's job is nobody's to end.
    if (this.#ending === null || ending === 'left') this.#ending = ending;
    const reason = new GatewayError('shutting_down', 'the batch is not run any further');
    this.#noMore.abort(reason);
    if (isAtOnce) this.#giveUp.abort(reason);
    this.#wake.resolve();
  }

  /** Whether it is to end, and for others how far it is. */
  async #look(): Promise<void> {
    const { jobs, nowMs } = this.#parts;
    try {
      if (unixSeconds(nowMs()) >= this.#record.expires_at) return this.#end('expired', true);
      if (await jobs.isCancelled(this.#record)) return this.#end('cancelled', true);
      const { in_progress_at, finalizing_at } = this.#state;
      if (this.#ending === null && in_progress_at !== null && finalizing_at === null) {
        await jobs.writeState(this.#record, this.#state);
      }
    } catch {
      // The store is away. The lease notices when that lasts.
    }
  }

  /** All lines of the input file, or what is wrong with some. */
  async #readLines(): Promise<{ lines: PlannedLine[]; errors: LineError[] }> {
    const { files, maxLineBytes } = this.#parts;
    const { tenant, input_file_id, endpoint } = this.#record;
    const lines: PlannedLine[] = [];
    const errors: LineError[] = [];
    const customIds = new Set<string>();
    const add = (code: string, line: number | null, message: string, param: string | null = null) =>
      errors.push({ code, line, message, param });
    const content = await files.content(tenant, input_file_id).catch((error: unknown) => {
      if (!(error instanceof GatewayError) || error.code !== 'file_not_found') throw error;
      add('file_not_found', null, 'the input file is gone', 'input_file_id');
      return null;
    });
    if (content === null) return { lines, errors };
    for await (const { number, offset, length, bytes } of splitLines(content, maxLineBytes)) {
      if (this.#ending === 'left' || errors.length >= maxErrors) break;
      if (lines.length === maxLines) {
        add('too_many_lines', number, `expected at most ${maxLines} lines, got more`);
        break;
      }
      if (bytes === null) {
        add('line_too_large', number, `expected at most ${maxLineBytes} bytes, got ${length}`);
        continue;
      }
      const line = parseLine(bytes, endpoint);
      if (isProblem(line)) add(line.code, number, line.message, line.param);
      else if (customIds.has(line.customId)) {
        add('duplicate_custom_id', number, 'custom_id: expected another one in each line', 'custom_id');
      } else {
        customIds.add(line.customId);
        const { model, body } = line;
        const index = lines.length;
        lines.push({ index, offset, length, model, prefix: prefixKey(body), numFailed: 0 });
      }
    }
    if (lines.length === 0 && errors.length === 0 && this.#ending !== 'left') {
      add('empty_file', null, 'expected at least one line, got none');
    }
    return { lines, errors };
  }

  async #readDone(total: number): Promise<void> {
    const counts: RequestCounts = { total, completed: 0, failed: 0 };
    this.#done = new Uint8Array(total);
    for await (const { index, isOk, json } of readResults(this.#parts.store, this.#folder)) {
      this.#done[index] = 1;
      this.#resultBytes += json.length;
      counts[isOk ? 'completed' : 'failed'] += 1;
    }
    this.#state.request_counts = counts;
  }

  async #runLines(lanes: Lane[]): Promise<void> {
    const { gate, store, recordGapMs, nowMs } = this.#parts;
    const results = new ResultLog(store, this.#folder, this.#lease.number, recordGapMs);
    let failure: unknown = null;
    let numOpen = 0;
    const begin = (lane: Lane, release: () => void) => {
      const line = lane.lines.pop()!;
      lane.numInFlight += 1;
      numOpen += 1;
      void this.#runLine(line, lane, results, release)
        .catch((error: unknown) => {
          // The store, or a fault of ours: the lines that are not recorded are the next owner's.
          failure ??= error;
          this.#end('left', true);
        })
        .finally(() => {
          numOpen -= 1;
          this.#wake.resolve();
        });
    };
    while (this.#ending === null) {
      this.#wake = Promise.withResolvers<void>();
      if (lanes.every(({ lines }) => lines.length === 0)) {
        if (numOpen === 0) break;
        // One in flight may have to be tried again.
        await this.#wake.promise;
        continue;
      }
      await results.room();
      const release = await gate.take(this.#noMore.signal).catch(() => null);
      if (release === null) break;
      const { maxInFlight, numEngines } = gate.room;
      const lane = nextLane(lanes, maxInFlight, numEngines, nowMs());
      if (lane !== null) begin(lane, release);
      else {
        release();
        const untilMs = Math.min(
          ...lanes.filter(({ lines }) => lines.length > 0).map(({ pausedUntilMs }) => pausedUntilMs),
        );
        const over = new AbortController();
        const pause = sleep(Math.max(1, untilMs - nowMs()), undefined, { signal: over.signal });
        await Promise.race([this.#wake.promise, pause.catch(() => undefined)]);
        over.abort();
      }
    }
    while (numOpen > 0) {
      await this.#wake.promise;
      this.#wake = Promise.withResolvers<void>();
    }
    await results.close();
    if (failure !== null) throw failure;
  }

  async #runLine(line: PlannedLine, lane: Lane, results: ResultLog, release: () => void): Promise<void> {
    const { onLine } = this.#parts;
    const answer = await this.#answer(line).finally(() => {
      // Before it is recorded: the engine has room now.
      release();
      lane.numInFlight -= 1;
    });
    if (answer === 'given up') return;
    if (answer === 'later') {
      onLine('tried_again');
      pause(lane, this.#parts.nowMs());
      lane.lines.push(line);
      return;
    }
    lane.pauseMs = 0;
    const { isOk, output } = answer;
    await results.add(line.index, isOk, output);
    this.#done[line.index] = 1;
    this.#state.request_counts[isOk ? 'completed' : 'failed'] += 1;
    onLine(isOk ? 'completed' : 'failed');
  }

  /** @returns the line's answer; `later` when it is to be asked again */
  async #answer(line: PlannedLine): Promise<{ isOk: boolean; output: OutputLine } | 'later' | 'given up'> {
    const { files, answer, maxResultBytes } = this.#parts;
    const { tenant, input_file_id, endpoint, id } = this.#record;
    const { signal } = this.#giveUp;
    const content = await files.content(tenant, input_file_id, { offset: line.offset, length: line.length });
    const parsed = parseLine(Buffer.concat(await Array.fromAsync(content)), endpoint);
    if (isProblem(parsed)) throw new Error(`${id}: line ${line.index} of the input file has changed`);
    const { customId, model, body } = parsed;
    const requestId = `batch_req_${digest(`${id} ${line.index}`)}`;
    const result = (status: number, reply: unknown) => {
      const response = { status_code: status, request_id: requestId, body: reply };
      const output: OutputLine = { id: requestId, custom_id: customId, response, error: null };
      this.#resultBytes += JSON.stringify(output).length;
      return { isOk: status >= 200 && status < 300, output };
    };
    if (this.#resultBytes > maxResultBytes) {
      const error = {
        code: 'batch_output_too_large',
        message: `the answers are more than ${maxResultBytes} bytes`,
      };
      return { isOk: false, output: { id: requestId, custom_id: customId, response: null, error } };
    }
    try {
      const reply = await answer({
        ...{ tenant, path: endpoint, model, requestId, signal },
        body: Buffer.from(JSON.stringify(body)),
      });
      if (this.#mayPass(line, reply.status)) return 'later';
      return result(reply.status, parseReply(reply.body));
    } catch (error) {
      if (signal.aborted) return 'given up';
      const failure = asGatewayError(error, 0);
      if (this.#mayPass(line, failure.row.status)) return 'later';
      return result(failure.row.status, errorBody(failure));
    }
  }

  /** Whether the same line may be answered another time. */
  #mayPass(line: PlannedLine, status: number): boolean {
    // There was no room, or nobody to ask: it is waited for as long as the job may take.
    if (status === 429 || status === 503) return true;
    if (status < 500) return false;
    line.numFailed += 1;
    return line.numFailed < maxFailures;
  }

  async #finish(status: FinalStatus, errors: LineError[]): Promise<FinalStatus | null> {
    const { jobs, nowMs } = this.#parts;
    const { tenant, id } = this.#record;
    const counts = { ...this.#state.request_counts };
    const usage = noUsage();
    let output_file_id: string | null = null;
    let error_file_id: string | null = null;
    if (counts.completed > 0) {
      output_file_id = await this.#write('output', this.#jsonOf(true, counts.completed, usage));
    }
    const numExpired = status === 'expired' ? counts.total - counts.completed - counts.failed : 0;
    if (counts.failed + numExpired > 0) {
      error_file_id = await this.#write('error', this.#errors(counts.failed, numExpired));
      counts.failed += numExpired;
    }
    // Files are put under the same ids by whoever ends the job, so another owner's are not in the way of these.
    if (this.#lease.lost.aborted) return null;
    const { in_progress_at, finalizing_at } = this.#state;
    await jobs.end(this.#record, {
      ...{ status, at: unixSeconds(nowMs()), in_progress_at, finalizing_at, request_counts: counts },
      ...{ errors, output_file_id, error_file_id, usage },
    });
    return (await jobs.find(tenant, id))?.final?.status ?? status;
  }

  async #write(kind: 'output' | 'error', lines: AsyncIterable<string>): Promise<string> {
    const { id, tenant, output_seconds } = this.#record;
    const fileId = `file-${id.slice('batch_'.length, 'batch_'.length + 12)}${digest(`${id} ${kind}`).slice(0, 20)}`;
    await this.#parts.files.write(tenant, fileId, inChunks(lines), {
      filename: `${id}_${kind}.jsonl`,
      purpose: 'batch_output',
      keepSeconds: output_seconds,
    });
    return fileId;
  }

  /**
   * The lines of an output or error file.
   *
   * @param expected  how many there are: with fewer, the results were taken away by another owner that has ended the job
   * @param usage  is added to
   */
  async *#jsonOf(isOk: boolean, expected: number, usage: BatchUsage): AsyncGenerator<string> {
    let numLines = 0;
    for await (const result of readResults(this.#parts.store, this.#folder)) {
      if (result.isOk !== isOk) continue;
      numLines += 1;
      addUsage(usage, JSON.parse(result.json) as OutputLine);
      yield result.json;
    }
    if (numLines !== expected) throw new Error(`expected ${expected} results, got ${numLines}`);
  }

  async *#errors(numFailed: number, numExpired: number): AsyncGenerator<string> {
    if (numFailed > 0) yield* this.#jsonOf(false, numFailed, noUsage());
    if (numExpired === 0) return;
    const { files, maxLineBytes } = this.#parts;
    const { tenant, input_file_id, endpoint, id, completion_window } = this.#record;
    let index = 0;
    for await (const { bytes } of splitLines(await files.content(tenant, input_file_id), maxLineBytes)) {
      if (this.#done[index] === 0) {
        const line = parseLine(bytes!, endpoint);
        const custom_id = isProblem(line) ? '' : line.customId;
        const message = `this request was not run within the completion window of ${completion_window}`;
        const error = { code: 'batch_expired', message };
        yield JSON.stringify({
          id: `batch_req_${digest(`${id} ${index}`)}`,
          custom_id,
          response: null,
          error,
        });
      }
      index += 1;
    }
  }
}

/** The lane waits, longer each time in a row. What was in flight when it began to says nothing new. */
function pause(lane: Lane, nowMs: number): void {
  if (nowMs < lane.pausedUntilMs) return;
  lane.pauseMs = Math.min(maxPauseMs, lane.pauseMs === 0 ? firstPauseMs : 2 * lane.pauseMs);
  lane.pausedUntilMs = nowMs + lane.pauseMs;
}

function parseReply(body: Buffer): unknown {
  try {
    return JSON.parse(body.toString());
  } catch (cause) {
    throw new GatewayError('engine_failed', 'expected the engine to answer in JSON, got something else', {
      cause,
    });
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
    if (text.length < outputChunkChars) continue;
    yield Buffer.from(text);
    text = '';
  }
  if (text !== '') yield Buffer.from(text);
}
