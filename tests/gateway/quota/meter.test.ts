import { expect, test } from 'vitest';
import {
  type Meters,
  newMeters,
  settle,
  sweep,
  type Take,
  take,
  windowUs,
} from '../../../gateway/quota/meter.ts';

const second = 1_000_000;
const start = 1_700_000_000 * second;
/** One of `perMinute`. */
const one = (perMinute: number, key = 'k'): Take => ({ kind: 'rate', key, costUs: windowUs / perMinute });
const lease = (id: string, limit = 2): Take => ({ kind: 'lease', key: 'l', limit, id, ttlUs: 15 * second });

/** How many single takes in a row succeed at one time. */
function numTaken(meters: Meters, nowUs: number, each: Take): number {
  let count = 0;
  while (take(meters, nowUs, [each]).isTaken) count += 1;
  return count;
}

test('a full meter gives a minute at once and then as the time passes', () => {
  const meters = newMeters();
  expect(numTaken(meters, start, one(60))).toBe(60);
  expect(numTaken(meters, start + 2.5 * second, one(60))).toBe(2);
  expect(numTaken(meters, start + 3 * second, one(60))).toBe(1);
});

test('a meter that is not used does not fill beyond a minute', () => {
  const meters = newMeters();
  take(meters, start, [one(60)]);
  expect(numTaken(meters, start + 3600 * second, one(60))).toBe(60);
});

test('in the long run no more is taken than the rate and one minute of it', () => {
  const meters = newMeters();
  let count = 0;
  for (let ms = 0; ms <= 600_000; ms += 5)
    count += Number(take(meters, start + ms * 1000, [one(120)]).isTaken);
  expect(count).toBe(120 * 11);
});

test('what is refused by one meter is taken from none', () => {
  const meters = newMeters();
  numTaken(meters, start, one(2, 'small'));
  const both = [one(60, 'large'), lease('a'), one(2, 'small')];
  expect(take(meters, start, both)).toEqual({ isTaken: false, readings: [0, 0, windowUs] });
  expect(meters.fullAtUs.has('large')).toBe(false);
  expect(meters.leases.size).toBe(0);
});

test('an estimate is settled: the rest comes back, and what was too little is owed', () => {
  const meters = newMeters();
  take(meters, start, [{ kind: 'rate', key: 'k', costUs: 40 * second }]);
  settle(meters, start, [{ kind: 'rate', key: 'k', addUs: -30 * second }]);
  expect(meters.fullAtUs.get('k')).toBe(start + 10 * second);
  settle(meters, start, [{ kind: 'rate', key: 'k', addUs: 100 * second }]);
  expect(take(meters, start + 49 * second, [one(60)]).isTaken).toBe(false);
  expect(take(meters, start + 51 * second, [one(60)]).isTaken).toBe(true);
});

test('what comes back late does not make a meter more than full', () => {
  const meters = newMeters();
  take(meters, start, [{ kind: 'rate', key: 'k', costUs: 40 * second }]);
  settle(meters, start + 39 * second, [{ kind: 'rate', key: 'k', addUs: -30 * second }]);
  expect(numTaken(meters, start + 39 * second, one(60))).toBe(60);
});

test('leases are counted, given back, and end by themselves', () => {
  const meters = newMeters();
  expect(take(meters, start, [lease('a')]).readings).toEqual([1]);
  expect(take(meters, start + second, [lease('b')]).readings).toEqual([2]);
  expect(take(meters, start + second, [lease('c')])).toEqual({ isTaken: false, readings: [2] });
  settle(meters, start + second, [{ kind: 'lease', key: 'l', id: 'a' }]);
  expect(take(meters, start + second, [lease('c')]).isTaken).toBe(true);
  expect(take(meters, start + 15.5 * second, [lease('d')]).isTaken).toBe(false);
  expect(take(meters, start + 16 * second, [lease('d')])).toEqual({ isTaken: true, readings: [1] });
});

test('what says nothing any more is forgotten', () => {
  const meters = newMeters();
  take(meters, start, [one(60), lease('a')]);
  sweep(meters, start + 20 * second);
  expect(meters).toEqual(newMeters());
});
