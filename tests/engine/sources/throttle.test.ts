import { expect, test } from 'vitest';
import { Throttle } from '../../../engine/sources/throttle.ts';

/** A clock that waits move on at once. */
function throttled(bytesPerSecond: number) {
  const clock = { ms: 1000, waits: [] as number[] };
  const wait = async (ms: number) => void clock.waits.push(ms);
  return { clock, throttle: new Throttle(bytesPerSecond, () => clock.ms, wait) };
}
const { signal } = new AbortController();

test('who takes bytes waits for those before as well', async () => {
  const { clock, throttle } = throttled(1000);
  await Promise.all([throttle.take(100, signal), throttle.take(300, signal)]);
  expect(clock.waits).toEqual([100, 400]);
});

test('a pause is not saved up', async () => {
  const { clock, throttle } = throttled(1000);
  await throttle.take(100, signal);
  clock.ms += 60_000;
  await throttle.take(100, signal);
  expect(clock.waits).toEqual([100, 100]);
});

test('a wait ends with its signal', async () => {
  const throttle = new Throttle(1);
  const stop = new AbortController();
  const taken = throttle.take(1000, stop.signal);
  stop.abort();
  await expect(taken).rejects.toThrow('aborted');
});
