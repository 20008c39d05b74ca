import { expect, test } from 'vitest';
import { afterAnswer, type Health, healthy } from '../../../gateway/routing/health.ts';

const rule = { afterFailures: 3, ejectMs: 1_000 };
/** Answers one after another: `f` failed, `.` did not. */
const after = (answers: string, atMs: number, health: Health = healthy) =>
  [...answers].reduce((before, answer) => afterAnswer(before, answer === 'f', atMs, rule), health);
const until = ({ ejectedUntilMs }: Health) => ejectedUntilMs;

test.each([
  ['three failures in a row', 'fff', 1_100],
  ['three, and two are not', 'ff', 0],
  ['three in a row, and an answer between them ends the row', 'ff.ff', 0],
  ['half of the last twenty', `${'f.'.repeat(9)}.f`, 1_100],
  ['half of the last twenty, and nine are not', `${'f.'.repeat(8)}...f`, 0],
  ['half of twenty, and half of nine is not', 'f.f.f.f.f', 0],
])('is left alone after %s', (_, answers, ejectedUntilMs) => {
  expect(until(after(answers, 100))).toBe(ejectedUntilMs);
});

test('is left alone twice as long each time, and after it is on trial', () => {
  let health = after('fff', 0);
  let ms = 1_000;
  for (const durationMs of [2_000, 4_000, 8_000]) {
    health = after('f', ms, health);
    expect(until(health)).toBe(ms + durationMs);
    ms += durationMs;
  }
  for (let i = 0; i < 10; i++) health = after('f', until(health), health);
  const before = until(health);
  expect(until(after('f', before, health)) - before).toBe(64_000);
});

test('one success after it ends the trial', () => {
  expect(until(after('.ff', 1_000, after('fff', 0)))).toBe(1_000);
});

test('answers to what it was sent before do not count while it is left alone', () => {
  const ejected = after('fff', 0);
  expect(after('fff.', 500, ejected)).toBe(ejected);
});

test('a minute of being well is forgiveness', () => {
  const well = after('.', 62_000, after('fff', 0));
  expect(until(after('fff', 63_000, well))).toBe(64_000);
});
