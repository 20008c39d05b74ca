import { expect, test } from 'vitest';
import { Traffic, type TrafficFacts } from '../../../gateway/console/traffic.ts';

const nowMs = 1_800_000_000_500;
const ended = { status: 200, ttfbMs: 40, completionTokens: 7 };

test('a request is under way until it ends, and waits until it has an engine', () => {
  const traffic = new Traffic();
  const live: TrafficFacts = { tenant: 'a', model: 'sql' };
  const end = traffic.begin(live);
  expect(traffic.of('a', nowMs)).toMatchObject({ inFlight: 1, waiting: 1 });
  live.engine = 'engine-1';
  expect(traffic.of('a', nowMs)).toMatchObject({ inFlight: 1, waiting: 0 });
  end(ended, nowMs);
  expect(traffic.of('a', nowMs)).toMatchObject({ inFlight: 0, waiting: 0 });
});

test('what ended is summed by model once its second is over', () => {
  const traffic = new Traffic();
  for (const model of ['sql', 'sql', 'docs']) traffic.begin({ tenant: 'a', model })(ended, nowMs);
  traffic.begin({ tenant: 'a', model: 'sql' })({ status: 503, completionTokens: 0 }, nowMs);
  expect(traffic.of('a', nowMs).models.size).toBe(0);
  const { models, requestsBySecond, completionTokensBySecond } = traffic.of('a', nowMs + 1000);
  expect(models.get('sql')).toEqual({ requests: 3, errors: 1, completionTokens: 14, ttfbMs: 80, timed: 2 });
  expect(models.get('docs')).toMatchObject({ requests: 1 });
  expect(requestsBySecond).toHaveLength(60);
  expect(requestsBySecond.at(-1)).toBe(4);
  expect(completionTokensBySecond.at(-1)).toBe(21);
});

test('a caller sees nothing of another', () => {
  const traffic = new Traffic();
  traffic.begin({ tenant: 'b', model: 'sql' })(ended, nowMs);
  const { inFlight, models, requestsBySecond } = traffic.of('a', nowMs + 1000);
  expect([inFlight, models.size, Math.max(...requestsBySecond)]).toEqual([0, 0, 0]);
});

test('sums by model are of ten seconds, curves of a minute, and a minute later nothing is left', () => {
  const traffic = new Traffic();
  traffic.begin({ model: 'sql' })(ended, nowMs);
  const at = (seconds: number) => traffic.of(null, nowMs + seconds * 1000);
  expect(at(10).models.get('sql')?.requests).toBe(1);
  expect(at(11).models.size).toBe(0);
  expect(at(60).requestsBySecond[0]).toBe(1);
  expect(Math.max(...at(61).requestsBySecond)).toBe(0);
  expect(Math.max(...at(120).requestsBySecond)).toBe(0);
});

test('a name that means nothing is not kept', () => {
  const traffic = new Traffic();
  const facts = { tenant: 'a' };
  const end = traffic.begin(facts);
  expect(traffic.of('a', nowMs).inFlight).toBe(0);
  end(ended, nowMs);
  expect(traffic.of('a', nowMs + 1000).models.size).toBe(0);
});
