import { expect, test } from 'vitest';
import { Heat } from '../../operator/heat.ts';

const minuteMs = 60_000;

function count(requests: number, since = 1) {
  return [{ digest: 'd', since, requests }];
}

/** Looks once a minute at an engine that is asked for the adapter so often. @returns the count at the end */
function run(heat: Heat, perMinute: number, fromMinute: number, minutes: number, start = 0): number {
  let requests = start;
  for (let minute = fromMinute; minute < fromMinute + minutes; minute++) {
    requests += perMinute;
    heat.observe('one/0', count(requests), minute * minuteMs);
  }
  return requests;
}

test('nothing asked for is cold, and so is what was counted before the first look', () => {
  const heat = new Heat();
  expect(heat.of('d', 0)).toBe(0);
  heat.observe('one/0', count(100_000), 0);
  expect(heat.of('d', 0)).toBe(0);
});

test('a steady rate comes to its power of two', () => {
  const heat = new Heat();
  run(heat, 100, 0, 60);
  expect(heat.of('d', 60 * minuteMs)).toBe(64);
});

test('requests of all engines add up', () => {
  const heat = new Heat();
  for (let minute = 0; minute < 60; minute++) {
    for (const life of ['one/0', 'two/0']) heat.observe(life, count(50 * minute), minute * minuteMs);
  }
  expect(heat.of('d', 60 * minuteMs)).toBe(64);
});

test('what trembles about a border stays at its level', () => {
  const heat = new Heat();
  // A rate of 15 is exactly the border between levels of 8 and 16.
  let requests = run(heat, 17, 0, 60);
  const level = heat.of('d', 60 * minuteMs);
  expect(level).toBe(16);
  for (let minute = 60; minute < 180; minute++) {
    requests = run(heat, minute % 4 < 2 ? 13 : 17, minute, 1, requests);
    expect(heat.of('d', minute * minuteMs)).toBe(level);
  }
});

test('what is asked for no more cools down', () => {
  const heat = new Heat();
  run(heat, 100, 0, 60);
  expect(heat.of('d', 120 * minuteMs)).toBe(0);
});

test('an engine that was started again counts from 0', () => {
  const heat = new Heat();
  heat.observe('one/0', count(0), 0);
  heat.observe('one/0', count(600), 0);
  heat.observe('one/0', count(5, 2), 0);
  heat.observe('two/0', count(0, 9), 0);
  expect(heat.of('d', 0)).toBe(2 ** Math.floor(Math.log2(1 + 605 / 10)));
});

test('engines that are gone and digests that are cold are forgotten', () => {
  const heat = new Heat();
  heat.observe('one/0', count(0), 0);
  heat.observe('one/0', count(1000), 0);
  heat.retain(new Set(), 0);
  expect(heat.of('d', 0)).toBe(64);
  // Its engine is not known any more, so its count is a first look again.
  heat.observe('one/0', count(9000), 0);
  expect(heat.of('d', 0)).toBe(64);
  heat.retain(new Set(), 24 * 60 * minuteMs);
  expect(heat.of('d', 24 * 60 * minuteMs)).toBe(0);
});
