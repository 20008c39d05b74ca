import { expect, test } from 'vitest';
import {
  type Lane,
  nextLane,
  type PlannedLine,
  planLanes,
  prefixKey,
} from '../../../gateway/batches/order.ts';
import { seededRandom } from '../../fixtures/seeded-random.ts';

const line = (index: number, voice: string, prompt: string, length = prompt.length): PlannedLine => ({
  ...{ index, voice, length, offset: 0, numFailed: 0 },
  prefix: prefixKey({ messages: [{ role: 'user', content: prompt }] }),
});
const lane = (voice: string, numLines: number, more: Partial<Lane> = {}): Lane => ({
  ...{ voice, numInFlight: 0, pausedUntilMs: 0, pauseMs: 0 },
  lines: Array.from({ length: numLines }, (_, i) => line(i, voice, '')),
  ...more,
});
/** As they are taken. */
const indexes = (lane: Lane | undefined) => lane!.lines.toReversed().map(({ index }) => index);

test('prompts that begin alike have keys that begin alike', () => {
  const system = 'You answer in one word. '.repeat(20);
  const keyOf = (text: string) => prefixKey({ messages: [{ role: 'system', content: system + text }] });
  const [a, b] = [keyOf('One'.repeat(99)), keyOf('Two'.repeat(99))];
  const other = prefixKey({ messages: [{ role: 'system', content: `No. ${system}` }] });
  const inCommon = (x: string, y: string) => [...Array(x.length).keys()].findIndex((i) => x[i] !== y[i]);
  expect(inCommon(a, b)).toBeGreaterThanOrEqual(2 * Math.floor(system.length / 64));
  expect(inCommon(a, other)).toBeLessThan(2);
});

test('a completion, tools and embeddings have keys too', () => {
  const long = 'x'.repeat(200);
  expect(prefixKey({ prompt: long })).not.toBe('');
  expect(prefixKey({ input: long })).not.toBe('');
  const messages = [{ role: 'user', content: long }];
  expect(prefixKey({ messages, tools: [{ type: 'function' }] })).not.toBe(prefixKey({ messages }));
  expect(prefixKey({})).toBe('');
});

test('lines of one voice stand together, the most bytes first, and in a lane those that begin alike', async () => {
  const [p, q] = ['p'.repeat(300), 'q'.repeat(300)];
  const lines = [
    line(0, 'a', `${p}1`),
    line(1, 'b', `${q}1`),
    line(2, 'a', `${q}2`),
    line(3, 'b', `${q}2`),
    line(4, 'a', `${p}3`),
    line(5, 'a', `${q}4`),
  ];
  const lanes = await planLanes(lines);
  expect(lanes.map(({ voice }) => voice)).toEqual(['a', 'b']);
  expect([
    [0, 4, 2, 5],
    [2, 5, 0, 4],
  ]).toContainEqual(indexes(lanes[0]));
  expect(indexes(lanes[1])).toEqual([1, 3]);
});

test('whatever the order of a file, each prefix at each depth is a run', async () => {
  const random = seededRandom(7);
  const prompts = Array.from({ length: 7000 }, () =>
    [3, 4, 5].map((count) => String(random.below(count)).repeat(128)).join(''),
  );
  const [only] = await planLanes(prompts.map((prompt, index) => line(index, 'a', prompt)));
  const taken = only!.lines.map(({ index }) => prompts[index]!);
  for (const depth of [128, 256, 384]) {
    const prefixes = taken.map((prompt) => prompt.slice(0, depth));
    const numRuns = prefixes.filter((prefix, i) => prefix !== prefixes[i - 1]).length;
    expect(numRuns).toBe(new Set(prefixes).size);
  }
});

test('with one engine a lane runs to its end before the next begins', () => {
  const [a, b] = [lane('a', 2), lane('b', 5)];
  expect(nextLane([a, b], 8, 1, 0)).toBe(a);
  a.numInFlight = 7;
  expect(nextLane([a, b], 8, 1, 0)).toBe(a);
  a.lines = [];
  expect(nextLane([a, b], 8, 1, 0)).toBe(b);
});

test('with several engines as many lanes run at a time, and the last shares all', () => {
  const lanes = [lane('a', 9), lane('b', 9), lane('c', 9)];
  lanes[0]!.numInFlight = 4;
  expect(nextLane(lanes, 8, 2, 0)).toBe(lanes[1]);
  lanes[1]!.numInFlight = 3;
  expect(nextLane(lanes, 8, 2, 0)).toBe(lanes[1]);
  expect(nextLane([lanes[0]!], 8, 2, 0)).toBe(lanes[0]);
});

test('a lane that waits is passed over, and there may be nothing to do', () => {
  const [a, b] = [lane('a', 2, { pausedUntilMs: 100 }), lane('b', 0)];
  expect(nextLane([a, b], 8, 1, 99)).toBeNull();
  expect(nextLane([a, b], 8, 1, 100)).toBe(a);
});
