// One job from where it stands to its end: reads the lines, leaves out those that were answered, runs the others in the order
// of order.ts, records each answer (results.ts), and makes the output and error file of the records. It may be killed
// anywhere: whoever owns the job next begins here again and comes to the same end.

import { setTimeout as sleep } from 'node:timers/promises';
import type { MergeRule, WeightedName } from '../../engine/protocol.ts';
import { asGatewayError, errorBody, GatewayError } from '../errors.ts';
import type { Files } from './files.ts';
import type { Gate } from './gate.ts';
import { folderOf, type Jobs } from './jobs.ts';
import type { Lease } from './lease.ts';
import { readInput, readLine } from './lines.ts';
import {
  type BatchRecord,
  type BatchState,
  type FinalStatus,
  type LineError,
  noCounts,
  type OutputLine,
  type RequestCounts,
  unixSeconds,
} from './objects.ts';
import { type Lane, nextLane, type PlannedLine, pause, planLanes } from './order.ts';
import { requestIdOf, writeFiles } from './output-files.ts';
import { ResultLog, readResults } from './results.ts';
import type { Store } from './store.ts';

export type LineRequest = {
  tenant: string | null;
  path: string;
  model: string;
  adapters?: readonly WeightedName[];
  merge?: MergeRule;
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

/** What an engine failed may be the fault of the line. */
const maxFailures = 3;

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
      const { files, maxLineBytes } = this.#parts;
      const isLeft = () => this.#ending === 'left';
      const { lines, errors } = await readInput(files, this.#record, maxLineBytes, isLeft);
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
    const { tenant, endpoint, id } = this.#record;
    const { signal } = this.#giveUp;
    const { customId, body, ...who } = await readLine(files, this.#record, line);
    const requestId = requestIdOf(id, line.index);
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
        ...{ tenant, path: endpoint, ...who, requestId, signal },
        body: Buffer.from(JSON.stringify(body)),
      });
      if (this.#mayPass(line, reply.status)) return 'later';
      return result(reply.status, parseReply(reply.body));
    } catch (error) {
      if (signal.aborted) return 'given up';
      const failure = asGatewayError(error);
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
    const written = await writeFiles(
      { record: this.#record, folder: this.#folder, done: this.#done, counts: this.#state.request_counts },
      status,
      this.#parts,
    );
    // Files are put under the same ids by whoever ends the job, so another owner's are not in the way of these.
    if (this.#lease.lost.aborted) return null;
    const { in_progress_at, finalizing_at } = this.#state;
    await jobs.end(this.#record, {
      ...{ status, at: unixSeconds(nowMs()), in_progress_at, finalizing_at, errors },
      ...written,
    });
    return (await jobs.find(tenant, id))?.final?.status ?? status;
  }
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
