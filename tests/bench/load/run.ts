/**
 * Sends the requests of a workload: closed loop, where a client waits for its answer, or open loop, where arrivals wait for
 * nobody. In the open loop a request's time begins when it was to arrive, not when it was sent, so a server that stalls
 * cannot hide its stall by keeping the client from sending (coordinated omission).
 */
import { setTimeout as sleep } from 'node:timers/promises';
import type { Answer } from './client.ts';
import type { Pacing } from './options.ts';
import { arrivalsMs, type PlannedRequest, type Workload } from './workload.ts';

/** One request of the run. Times are milliseconds after its start. */
export interface Sample {
  index: number;
  /** Place in the list of adapters; null: the base. */
  adapter: number | null;
  /** When it was to be sent: latencies count from here. */
  dueMs: number;
  sentMs: number;
  firstMs: number | null;
  lastMs: number | null;
  endMs: number;
  longestGapMs: number;
  promptTokens: number | null;
  outputTokens: number | null;
  wantedTokens: number;
  /** As of an Answer; `not_sent`: it was due and the run ended before there was room for it. */
  code: string;
  message: string;
}

export interface RunPlan {
  workload: Workload;
  pacing: Pacing;
  seed: number;
  numRequests: number;
  /** After it nothing is sent; null: no limit. */
  durationMs: number | null;
}

/** Time as the run sees it. */
export interface Clock {
  nowMs(): number;
  /** Resolves at that time, or when the signal is aborted. */
  until(atMs: number, signal: AbortSignal): Promise<void>;
}

export interface RunHooks {
  send(request: PlannedRequest, signal: AbortSignal): Promise<Answer>;
  /** When it is aborted nothing more is sent, and what is in flight is cancelled. */
  signal: AbortSignal;
  clock: Clock;
  onSample(sample: Sample, gapsMs: readonly number[]): void;
}

/** A client that was refused does not ask again at once: a server that refuses is not to be flooded. */
const pauseAfterFailureMs = 100;
/** How late after the end of the duration an arrival that was due within it may still be sent. */
const endGraceMs = 50;

export const wallClock: Clock = {
  nowMs: () => performance.now(),
  async until(atMs, signal) {
    const waitMs = atMs - performance.now();
    if (waitMs > 0) await sleep(waitMs, undefined, { signal }).catch(() => {});
  },
};

/** Resolves when every request that was sent has ended. */
export async function runLoad(plan: RunPlan, hooks: RunHooks): Promise<void> {
  const beginMs = hooks.clock.nowMs();
  await (plan.pacing.kind === 'closed'
    ? closedLoop(plan, plan.pacing.concurrency, hooks, beginMs)
    : openLoop(plan, plan.pacing, hooks, beginMs));
}

async function closedLoop(
  plan: RunPlan,
  concurrency: number,
  hooks: RunHooks,
  beginMs: number,
): Promise<void> {
  const { workload, numRequests, durationMs } = plan;
  const { clock, signal } = hooks;
  let next = 0;
  const isOver = () =>
    signal.aborted || next >= numRequests || clock.nowMs() - beginMs >= (durationMs ?? Infinity);
  const client = async (id: number) => {
    while (!isOver()) {
      const request = workload.request(next++, id);
      const answer = await hooks.send(request, signal);
      hooks.onSample(toSample(request, answer, answer.sentMs, beginMs), answer.gapsMs);
      if (answer.code !== 'ok' && !isOver()) await clock.until(clock.nowMs() + pauseAfterFailureMs, signal);
    }
  };
  await Promise.all(Array.from({ length: concurrency }, (_, id) => client(id)));
}

async function openLoop(
  plan: RunPlan,
  { ratePerSecond, burstiness, maxInFlight }: Extract<Pacing, { kind: 'open' }>,
  hooks: RunHooks,
  beginMs: number,
): Promise<void> {
  const { workload, seed, numRequests, durationMs } = plan;
  const { clock, signal } = hooks;
  const running = new Set<Promise<void>>();
  let wake = () => {};
  const onAbort = () => wake();
  signal.addEventListener('abort', onAbort);

  let index = 0;
  for (const atMs of arrivalsMs(seed, ratePerSecond, burstiness)) {
    if (index >= numRequests || atMs >= (durationMs ?? Infinity)) break;
    const request = workload.request(index++, 0);
    await clock.until(beginMs + atMs, signal);
    while (running.size >= maxInFlight && !signal.aborted) {
      await new Promise<void>((resolve) => {
        wake = resolve;
      });
    }
    if (signal.aborted) break;
    const nowMs = clock.nowMs() - beginMs;
    if (nowMs > (durationMs ?? Infinity) + endGraceMs) {
      hooks.onSample(notSent(request, atMs, nowMs), []);
      continue;
    }
    const sent = hooks.send(request, signal).then((answer) => {
      running.delete(sent);
      wake();
      hooks.onSample(toSample(request, answer, beginMs + atMs, beginMs), answer.gapsMs);
    });
    running.add(sent);
  }
  await Promise.all(running);
  signal.removeEventListener('abort', onAbort);
}

function toSample(request: PlannedRequest, answer: Answer, dueMs: number, beginMs: number): Sample {
  const sinceBegin = (ms: number | null) => (ms === null ? null : ms - beginMs);
  return {
    index: request.index,
    adapter: request.adapter,
    dueMs: dueMs - beginMs,
    sentMs: answer.sentMs - beginMs,
    firstMs: sinceBegin(answer.firstMs),
    lastMs: sinceBegin(answer.lastMs),
    endMs: answer.endMs - beginMs,
    longestGapMs: answer.gapsMs.reduce((longest, gap) => Math.max(longest, gap), 0),
    promptTokens: answer.promptTokens,
    outputTokens: answer.outputTokens,
    wantedTokens: request.outputTokens,
    code: answer.code,
    message: answer.message,
  };
}

function notSent(request: PlannedRequest, dueMs: number, nowMs: number): Sample {
  return {
    index: request.index,
    adapter: request.adapter,
    dueMs,
    sentMs: nowMs,
    firstMs: null,
    lastMs: null,
    endMs: nowMs,
    longestGapMs: 0,
    promptTokens: null,
    outputTokens: null,
    wantedTokens: request.outputTokens,
    code: 'not_sent',
    message: '--max-in-flight requests were in flight until the end of --duration',
  };
}
