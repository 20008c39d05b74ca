// The loops against a simulated server on a simulated clock: seconds of load take milliseconds, and every time is exact.

import { describe, expect, test } from 'vitest';
import type { Answer } from '../bench/load/client.ts';
import { summarise } from '../bench/load/report.ts';
import { type Clock, type RunPlan, runLoad, type Sample } from '../bench/load/run.ts';
import {
  type ConversationShape,
  createWorkload,
  type Message,
  type PlannedRequest,
} from '../bench/load/workload.ts';

/** Time that stands still until everybody waits, and then goes on to the first who is due. */
function simulatedClock() {
  let nowMs = 5000;
  const waiters: { atMs: number; resolve: () => void }[] = [];
  const clock: Clock = {
    nowMs: () => nowMs,
    until: (atMs, signal) =>
      new Promise((resolve) => {
        waiters.push({ atMs, resolve });
        signal.addEventListener('abort', () => resolve());
      }),
  };
  async function finish(run: Promise<void>): Promise<void> {
    let hasEnded = false;
    const ended = run.finally(() => {
      hasEnded = true;
    });
    for (;;) {
      await new Promise(setImmediate);
      if (hasEnded) return ended;
      waiters.sort((a, b) => a.atMs - b.atMs);
      const next = waiters.shift();
      if (next === undefined) throw new Error('the run waits for nothing');
      nowMs = Math.max(nowMs, next.atMs);
      next.resolve();
    }
  }
  return { clock, finish };
}

interface Load {
  plan: Partial<RunPlan>;
  /** Milliseconds that an answer to a request takes that is sent at that time of the run. */
  serviceMs?: (sentMs: number) => number;
  codes?: (index: number, turn: number) => string;
  /** When Ctrl-C comes. */
  interruptMs?: number;
  popularity?: 'uniform' | 'each-client-its-own';
  conversations?: ConversationShape;
}

async function simulate({
  plan,
  serviceMs = () => 100,
  codes = () => 'ok',
  interruptMs,
  popularity = 'uniform',
  conversations,
}: Load) {
  const { clock, finish } = simulatedClock();
  const beginMs = clock.nowMs();
  const interrupt = new AbortController();
  const samples: Sample[] = [];
  const prompts: PlannedRequest['prompt'][] = [];
  let numInFlight = 0;
  let mostInFlight = 0;
  const workload = createWorkload({
    seed: 1,
    endpoint: conversations === undefined ? 'completions' : 'chat',
    conversations: conversations ?? null,
    promptTokens: { kind: 'fixed', tokens: 3 },
    outputTokens: { kind: 'fixed', tokens: 2 },
    sharedPrefixTokens: 0,
    numPrefixes: 1,
    vocabSize: 100,
    numAdapters: 3,
    popularity: { kind: popularity },
    baseShare: 0,
  });
  if (interruptMs !== undefined) {
    void clock.until(beginMs + interruptMs, new AbortController().signal).then(() => interrupt.abort());
  }
  const run = runLoad(
    {
      workload,
      pacing: { kind: 'closed', concurrency: 1 },
      seed: 1,
      numRequests: 1000,
      durationMs: null,
      ...plan,
    },
    {
      clock,
      signal: interrupt.signal,
      onSample: (sample) => void samples.push(sample),
      async send(request, signal) {
        prompts.push(request.prompt);
        numInFlight++;
        mostInFlight = Math.max(mostInFlight, numInFlight);
        const sentMs = clock.nowMs();
        const endMs = sentMs + serviceMs(sentMs - beginMs);
        await clock.until(endMs, signal);
        numInFlight--;
        const answer: Answer = {
          code: signal.aborted ? 'cancelled' : codes(request.index, request.turn),
          message: '',
          sentMs,
          firstMs: endMs,
          lastMs: endMs,
          endMs,
          gapsMs: [3, 8, 2],
          promptTokens: 3,
          outputTokens: 2,
          cachedTokens: null,
          text: `answer ${request.turn + 1}`,
        };
        return answer;
      },
    },
  );
  await finish(run);
  return { samples, prompts, mostInFlight, sentMs: samples.map((sample) => sample.sentMs) };
}

const even = { kind: 'open', burstiness: 1000, maxInFlight: 1000 } as const;

test('closed loop: each client sends its next request when the last one has ended', async () => {
  const { samples, sentMs, mostInFlight } = await simulate({
    plan: { pacing: { kind: 'closed', concurrency: 2 }, numRequests: 6 },
  });
  expect(sentMs).toEqual([0, 0, 100, 100, 200, 200]);
  expect(mostInFlight).toBe(2);
  expect(samples.map(({ index }) => index)).toEqual([0, 1, 2, 3, 4, 5]);
  expect(samples[5]).toMatchObject({ dueMs: 200, firstMs: 300, endMs: 300, longestGapMs: 8 });
});

test('closed loop: more clients than requests send each request once', async () => {
  const { samples } = await simulate({
    plan: { pacing: { kind: 'closed', concurrency: 9 }, numRequests: 4 },
  });
  expect(samples.map(({ index }) => index)).toEqual([0, 1, 2, 3]);
});

test('closed loop: nothing is sent after the duration, and what is in flight may end', async () => {
  const { sentMs, samples } = await simulate({ plan: { durationMs: 250 } });
  expect(sentMs).toEqual([0, 100, 200]);
  expect(samples.at(-1)!.endMs).toBe(300);
});

test('closed loop: a client whose request failed waits a moment before the next', async () => {
  const { sentMs } = await simulate({
    plan: { numRequests: 3 },
    serviceMs: () => 1,
    codes: (index) => (index === 0 ? 'http_429' : 'ok'),
  });
  expect(sentMs).toEqual([0, 101, 102]);
});

test('closed loop: each client keeps its own adapter', async () => {
  const { samples } = await simulate({
    plan: { pacing: { kind: 'closed', concurrency: 3 }, numRequests: 12 },
    popularity: 'each-client-its-own',
    serviceMs: (sentMs) => 50 + (sentMs % 7),
  });
  const counts = [0, 1, 2].map((wanted) => samples.filter(({ adapter }) => adapter === wanted).length);
  expect(counts).toEqual([4, 4, 4]);
});

test('open loop: arrivals wait for nobody', async () => {
  const { samples, mostInFlight } = await simulate({
    plan: { pacing: { ...even, ratePerSecond: 10 }, numRequests: 50 },
    serviceMs: () => 1000,
  });
  expect(samples).toHaveLength(50);
  for (const { sentMs, dueMs } of samples) expect(sentMs).toBe(dueMs);
  expect(samples.at(-1)!.dueMs / 50).toBeCloseTo(100, -1);
  expect(mostInFlight).toBeGreaterThanOrEqual(9);
});

test('open loop: beyond --max-in-flight arrivals wait, and their time counts from when they were due', async () => {
  const { samples, mostInFlight } = await simulate({
    plan: { pacing: { ...even, ratePerSecond: 10, maxInFlight: 1 }, numRequests: 20 },
    serviceMs: () => 200,
  });
  expect(mostInFlight).toBe(1);
  // They come every 100 ms and take 200 ms, so the last has waited for about 19 × 100 ms.
  const last = samples.at(-1)!;
  expect(last.endMs - last.dueMs).toBeGreaterThan(1900);
  expect(last.endMs - last.sentMs).toBe(200);
});

// A server that answers in 10 ms and stands still from second 2 to second 4: one of ten seconds' requests in five is
// served late. A client that waits for its answer sends one request in that time, and reports one bad latency.
test('a stall shows in the open loop in full, and hides from a closed loop', async () => {
  const stall = (sentMs: number) => (sentMs >= 2000 && sentMs < 4000 ? 4000 - sentMs + 10 : 10);
  const open = await simulate({
    plan: { pacing: { ...even, ratePerSecond: 20, maxInFlight: 1 }, durationMs: 10_000 },
    serviceMs: stall,
  });
  const closed = await simulate({ plan: { durationMs: 10_000 }, serviceMs: stall });
  const p90 = ({ samples }: { samples: Sample[] }) => summarise(samples, [], ['a', 'b', 'c'], {}).e2eMs!.p90;
  expect(closed.samples.filter(({ endMs, dueMs }) => endMs - dueMs > 10)).toHaveLength(1);
  expect(p90(closed)).toBe(10);
  expect(p90(open)).toBeGreaterThan(500);
});

test('open loop: what was due within the duration and found no room until its end counts as failed', async () => {
  const { samples } = await simulate({
    plan: { pacing: { ...even, ratePerSecond: 10, maxInFlight: 1 }, durationMs: 2000 },
    serviceMs: () => 1500,
  });
  const notSent = samples.filter(({ code }) => code === 'not_sent');
  expect(samples.length - notSent.length).toBe(2);
  // About 20 came; an arrival at the very end may fall on either side.
  expect(Math.abs(samples.length - 20)).toBeLessThanOrEqual(1);
  expect(summarise(samples, [], ['a', 'b', 'c'], { e2e: 1e6 })).toMatchObject({
    numFailed: notSent.length,
    goodput: { share: 2 / samples.length },
  });
});

test.each([
  ['closed', { kind: 'closed', concurrency: 2 } as const],
  ['open', { ...even, ratePerSecond: 20 }],
  ['open, without room', { ...even, ratePerSecond: 20, maxInFlight: 1 }],
])('Ctrl-C ends a %s loop at once; what was in flight is cancelled', async (_name, pacing) => {
  const { samples, sentMs } = await simulate({
    plan: { pacing },
    serviceMs: () => 100,
    interruptMs: 1050,
  });
  const done = samples.filter(({ code }) => code === 'ok');
  const cancelled = samples.filter(({ code }) => code === 'cancelled');
  expect(done.length + cancelled.length).toBe(samples.length);
  expect(done.length).toBeGreaterThan(5);
  expect(cancelled.length).toBeGreaterThan(0);
  expect(Math.max(...sentMs)).toBeLessThanOrEqual(1050);
});

describe('conversations', () => {
  const talk = (numTurns: number, thinkSeconds = 0.5): ConversationShape => ({
    numTurns,
    thinkTime: { kind: 'fixed', meanSeconds: thinkSeconds },
    followUpTokens: { kind: 'fixed', tokens: 2 },
  });
  const turnsOf = (samples: Sample[]) => samples.map(({ index, turn }) => [index, turn]);

  test('closed loop: a user thinks before each next turn, sends back what was answered, then begins another', async () => {
    const { samples, sentMs, prompts } = await simulate({
      plan: { numRequests: 2 },
      conversations: talk(3),
    });
    expect(turnsOf(samples)).toEqual([
      [0, 0],
      [0, 1],
      [0, 2],
      [1, 0],
      [1, 1],
      [1, 2],
    ]);
    expect(sentMs).toEqual([0, 600, 1200, 1300, 1900, 2500]);
    const third = prompts[2] as Message[];
    expect(third.filter(({ role }) => role === 'assistant').map(({ content }) => content)).toEqual([
      'answer 1',
      'answer 2',
    ]);
  });

  test('closed loop: while one user thinks, others are served', async () => {
    const { samples, mostInFlight } = await simulate({
      plan: { pacing: { kind: 'closed', concurrency: 3 }, numRequests: 3 },
      conversations: talk(2, 10),
    });
    expect(mostInFlight).toBe(3);
    expect(samples.map(({ dueMs, sentMs }) => dueMs - sentMs)).toEqual([0, 0, 0, 0, 0, 0]);
  });

  test('a turn that fails ends its conversation, and the user goes on with the next after a moment', async () => {
    const { samples, sentMs } = await simulate({
      plan: { numRequests: 2 },
      conversations: talk(3),
      codes: (index, turn) => (index === 0 && turn === 1 ? 'http_503' : 'ok'),
    });
    expect(turnsOf(samples)).toEqual([
      [0, 0],
      [0, 1],
      [1, 0],
      [1, 1],
      [1, 2],
    ]);
    expect(sentMs.slice(0, 3)).toEqual([0, 600, 800]);
    expect(summarise(samples, [], ['a', 'b', 'c'], {}).conversations).toMatchObject({
      numComplete: 1,
      numFailed: 1,
      numTurnsNotSent: 1,
    });
  });

  test('no turn is sent after the duration, and nobody waits for a user who thinks beyond it', async () => {
    const { samples, sentMs } = await simulate({
      plan: { durationMs: 1000 },
      conversations: talk(9, 0.7),
    });
    expect(sentMs).toEqual([0, 800]);
    expect(summarise(samples, [], ['a', 'b', 'c'], {}).conversations).toMatchObject({
      numComplete: 0,
      numCut: 1,
    });
  });

  test('open loop: conversations arrive; only their first turn counts from when it was due', async () => {
    const { samples } = await simulate({
      plan: { pacing: { ...even, ratePerSecond: 10, maxInFlight: 2 }, numRequests: 6 },
      conversations: talk(2),
      serviceMs: () => 100,
    });
    expect(samples).toHaveLength(12);
    const waited = samples.filter(({ sentMs, dueMs }) => sentMs > dueMs);
    expect(waited.every(({ turn }) => turn === 0)).toBe(true);
    // Two at a time take 700 ms each and come every 100 ms.
    expect(waited.length).toBeGreaterThanOrEqual(3);
  });

  test('Ctrl-C does not wait for users who think', async () => {
    const { samples } = await simulate({
      plan: { pacing: { kind: 'closed', concurrency: 2 }, numRequests: 2 },
      conversations: talk(5, 1000),
      interruptMs: 3000,
    });
    expect(turnsOf(samples)).toEqual([
      [0, 0],
      [1, 0],
    ]);
    expect(summarise(samples, [], ['a', 'b', 'c'], {}).conversations).toMatchObject({
      numCut: 2,
      numFailed: 0,
    });
  });
});
