import { describe, expect, test } from 'vitest';
import { OutcomeWindow, whyAbort } from '../../../gateway/routes/outcome-window.ts';
import { judgedOf } from '../../../gateway/routes/routes.ts';

const limits = { windowSeconds: 60, minRequests: 20 };
const ok = { isError: false, ttftMs: null };
const failed = { isError: true, ttftMs: null };

function windowWith(outcomes: (typeof ok | { isError: boolean; ttftMs: number })[], atMs = 0) {
  const window = new OutcomeWindow(60);
  for (const outcome of outcomes) window.note(outcome, atMs);
  return window;
}
const times = <T>(count: number, value: T) => Array.from({ length: count }, () => value);

describe('a target is aborted', () => {
  test('when more of its requests fail than may', () => {
    const rule = { ...limits, maxErrorPercent: 10 };
    expect(whyAbort(windowWith([...times(18, ok), ...times(2, failed)]), rule, 0)).toBeNull();
    expect(whyAbort(windowWith([...times(17, ok), ...times(3, failed)]), rule, 0)).toBe(
      '3 of 20 requests failed within 60 s, 15.0 %; at most 10 % may',
    );
  });

  test('not before there are enough requests', () => {
    const rule = { ...limits, maxErrorPercent: 10 };
    expect(whyAbort(windowWith(times(19, failed)), rule, 0)).toBeNull();
    expect(whyAbort(windowWith(times(20, failed)), rule, 0)).not.toBeNull();
  });

  test('when the first tokens come late, and one of twenty may', () => {
    const rule = { ...limits, maxTtftMs: 500 };
    const streams = (slow: number) => [
      ...times(40 - slow, { isError: false, ttftMs: 100 }),
      ...times(slow, { isError: false, ttftMs: 2000 }),
    ];
    expect(whyAbort(windowWith(streams(2)), rule, 0)).toBeNull();
    expect(whyAbort(windowWith(streams(3)), rule, 0)).toMatch(
      /95 of 100 streams came after 2\d\d\d ms within 60 s \(40 streams\); at most 500 ms/,
    );
  });

  test('not for whole answers, whose first byte is their last', () => {
    expect(whyAbort(windowWith(times(100, ok)), { ...limits, maxTtftMs: 1 }, 0)).toBeNull();
  });
});

test('what is older than the window counts no more', () => {
  const window = windowWith(times(20, failed), 1_000);
  expect(window.sum(54_000)).toMatchObject({ requests: 20, errors: 20 });
  expect(window.sum(61_000)).toMatchObject({ requests: 0, errors: 0, p95TtftMs: null });
  window.note(ok, 200_000);
  expect(window.sum(200_000)).toMatchObject({ requests: 1, errors: 0 });
});

test('a percentile is at most 5 % too high and never too low', () => {
  for (const ttftMs of [1, 3, 77, 500, 1234, 599_000]) {
    const { p95TtftMs } = windowWith([{ isError: false, ttftMs }]).sum(0);
    expect(p95TtftMs! / ttftMs).toBeGreaterThanOrEqual(1 - 1e-6);
    expect(p95TtftMs! / ttftMs).toBeLessThanOrEqual(1.05 + 1e-6);
  }
});

test.each([
  ['an answer', {}, 200, { isError: false, ttftMs: null }],
  ["the client's fault", {}, 400, { isError: false, ttftMs: null }],
  ["an engine's own failure", {}, 500, { isError: true, ttftMs: null }],
  ['one that broke off', { errorCode: 'engine_failed' as const }, 200, { isError: true, ttftMs: null }],
  ['a client that hung up', { errorCode: 'client_closed_request' as const }, 200, null],
  ['a full queue', { engine: undefined, errorCode: 'queue_full' as const }, 429, null],
])('%s is judged for what it is', (_, parts, status, expected) => {
  const { engine = 'engine', ...rest } = { engine: 'engine', ...parts };
  const isAsked = !('engine' in parts);
  const facts = { ...(isAsked && { engine, askedMs: 10, firstByteMs: 40 }), ...rest };
  expect(judgedOf(facts as never, status, false)).toEqual(expected);
});

test('the time to the first token is that from the engine that was asked', () => {
  expect(judgedOf({ engine: 'e', askedMs: 10, firstByteMs: 40 }, 200, true)).toEqual({
    isError: false,
    ttftMs: 30,
  });
});
