/**
 * Sends the requests of a workload: closed loop, where a client waits for its answer, or open loop, where arrivals wait for
 * nobody. A conversation is sent turn by turn, with its user's think time between them; its client waits for all of it. In the open loop a request's time begins when it was to arrive, not when it was sent, so a server that stalls
 * cannot hide its stall by keeping the client from sending (coordinated omission).
 */
import { setTimeout as sleep } from 'node:timers/promises';
import type { Answer } from './client.ts';
import type { Pacing } from './options.ts';
import { arrivalsMs, type PlannedRequest, type Workload } from './workload.ts';

/** One request of the run. Times are milliseconds after its start. */
export interface Sample {
  /** Of the request, or of the conversation that it is a turn of. */
  index: number;
  /** From 0. */
  turn: number;
  numTurns: number;
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
  cachedTokens: number | null;
  wantedTokens: number;
  /** As of an Answer; `not_sent`: it was due and the run ended before there was room for it. */
  code: string;
  message: string;
}

export interface RunPlan {
  workload: Workload;
  pacing: Pacing;
  seed: number;
  /** Single requests, or conversations. */
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
      const isAnswered = await converse(workload.request(next++, id), null, plan, hooks, beginMs);
      if (!isAnswered && !isOver()) await clock.until(clock.nowMs() + pauseAfterFailureMs, signal);
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
    const sent = converse(request, beginMs + atMs, plan, hooks, beginMs).then(() => {
      running.delete(sent);
      wake();
    });
    running.add(sent);
  }
  await Promise.all(running);
  signal.removeEventListener('abort', onAbort);
}

/**
 * Sends a request and, when it begins a conversation, its later turns: each when its user has thought about the answer. A turn
 * that fails ends the conversation, since there is nothing to go on from; the end of the run ends it before its next turn.
 *
 * @param firstDueMs null: it is due when it is sent, as later turns are
 * @returns whether everything that was sent was answered
 */
async function converse(
  first: PlannedRequest,
  firstDueMs: number | null,
  { workload, durationMs }: RunPlan,
  { send, signal, clock, onSample }: RunHooks,
  beginMs: number,
): Promise<boolean> {
  const endMs = beginMs + (durationMs ?? Infinity);
  let request = first;
  for (;;) {
    const answer = await send(request, signal);
    const dueMs = (request === first ? firstDueMs : null) ?? answer.sentMs;
    onSample(toSample(request, answer, dueMs, beginMs), answer.gapsMs);
    if (answer.code !== 'ok') return false;
    const next = workload.followUp(request, answer.text);
    if (next === null) return true;
    const nextMs = answer.endMs + next.thinkMs;
    await clock.until(Math.min(nextMs, endMs), signal);
    if (signal.aborted || nextMs >= endMs) return true;
    request = next.request;
  }
}

function toSample(request: PlannedRequest, answer: Answer, dueMs: number, beginMs: number): Sample {
  const sinceBegin = (ms: number | null) => (ms === null ? null : ms - beginMs);
  return {
    index: request.index,
    turn: request.turn,
    numTurns: request.numTurns,
    adapter: request.adapter,
    dueMs: dueMs - beginMs,
    sentMs: answer.sentMs - beginMs,
    firstMs: sinceBegin(answer.firstMs),
    lastMs: sinceBegin(answer.lastMs),
    endMs: answer.endMs - beginMs,
    longestGapMs: answer.gapsMs.reduce((longest, gap) => Math.max(longest, gap), 0),
    promptTokens: answer.promptTokens,
    outputTokens: answer.outputTokens,
    cachedTokens: answer.cachedTokens,
    wantedTokens: request.outputTokens,
    code: answer.code,
    message: answer.message,
  };
}

function notSent(request: PlannedRequest, dueMs: number, nowMs: number): Sample {
  return {
    index: request.index,
    turn: request.turn,
    numTurns: request.numTurns,
    adapter: request.adapter,
    dueMs,
    sentMs: nowMs,
    firstMs: null,
    lastMs: null,
    endMs: nowMs,
    longestGapMs: 0,
    promptTokens: null,
    outputTokens: null,
    cachedTokens: null,
    wantedTokens: request.outputTokens,
    code: 'not_sent',
    message: '--max-in-flight requests were in flight until the end of --duration',
  };
}
