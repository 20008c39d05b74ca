import { expect, test } from 'vitest';
import { type Total, totalsOf, usageBetween, usedRatios } from '../../../gateway/quota/tenant-usage.ts';
import { answer, answerForever, startFakeEngine } from '../../fixtures/fake-engine.ts';
import { chatBody, gatewayFor, until } from '../start-gateway.ts';

const counters = { requests: [], tokens: [], rateLimited: [], shed: [] };
const total = (fields: Partial<Total> = {}): Total => ({ requests: 0, tokens: 0, rejected: {}, ...fields });
const minuteMs = 60_000;

test('requests count that an engine answered, and those whose client hung up', () => {
  const of = (status: number, model = 'base', tenant = 'a') => ({
    value: 1,
    labels: { tenant, model, status },
  });
  const requests = [of(200), of(499), of(400), of(429), of(503), of(200, ''), of(200, 'base', 'b')];
  expect(totalsOf({ ...counters, requests })).toEqual(
    new Map([
      ['a', total({ requests: 2 })],
      ['b', total({ requests: 1 })],
    ]),
  );
});

test('cached tokens are among those of the prompt, and callers without a key are nobody’s', () => {
  const of = (kind: string, value: number, tenant = 'a') => ({
    value,
    labels: { tenant, model: 'base', kind },
  });
  const tokens = [of('prompt', 10), of('cached', 8), of('completion', 5), of('prompt', 99, '')];
  expect(totalsOf({ ...counters, tokens })).toEqual(new Map([['a', total({ tokens: 15 })]]));
});

test('what refused is told by its name', () => {
  const totals = totalsOf({
    ...counters,
    rateLimited: [{ value: 2, labels: { tenant: 'a', limit: 'tenant-concurrency' } }],
    shed: [
      { value: 3, labels: { tenant: 'a', reason: 'queue_full' } },
      { value: 0, labels: { tenant: '', reason: 'queue_full' } },
    ],
  });
  expect(totals).toEqual(new Map([['a', total({ rejected: { 'tenant-concurrency': 2, queue_full: 3 } })]]));
});

test('usage is what counters grew by, by the minute', () => {
  const before = new Map([['a', total({ requests: 10, tokens: 100, rejected: { timeout: 1 } })]]);
  const after = new Map([
    ['a', total({ requests: 40, tokens: 700, rejected: { timeout: 1, queue_full: 6 } })],
    ['new', total({ requests: 3, tokens: 9 })],
  ]);
  expect(usageBetween(before, after, new Map([['a', 4]]), 2 * minuteMs)).toEqual(
    new Map([
      ['a', { requestsPerMinute: 15, tokensPerMinute: 300, inFlight: 4, rejected: { queue_full: 3 } }],
      ['new', { requestsPerMinute: 2, tokensPerMinute: 5, inFlight: 0, rejected: {} }],
    ]),
  );
});

test('who used nothing is not there, and little is not nothing', () => {
  const before = new Map([
    ['idle', total({ requests: 5 })],
    ['rare', total({ requests: 5 })],
  ]);
  const after = new Map([
    ['idle', total({ requests: 5 })],
    ['rare', total({ requests: 6 })],
  ]);
  const usage = usageBetween(before, after, new Map([['long', 1]]), 10 * minuteMs);
  expect(usage).toEqual(
    new Map([
      ['rare', { requestsPerMinute: 1, tokensPerMinute: 0, inFlight: 0, rejected: {} }],
      ['long', { requestsPerMinute: 0, tokensPerMinute: 0, inFlight: 1, rejected: {} }],
    ]),
  );
});

test('a ratio is a part of a limit that the tenant has', () => {
  const before = new Map([['a', { requests: 100, tokens: 1_000, inFlight: 9 }]]);
  const after = new Map([
    ['a', { requests: 154, tokens: 1_500, inFlight: 2 }],
    ['gone', { requests: 1, tokens: 1, inFlight: 1 }],
    ['idle', { requests: 0, tokens: 0, inFlight: 0 }],
  ]);
  const limits = new Map([
    ['a', { requestsPerMinute: 60, tokensPerMinute: 2_000, concurrency: 4 }],
    ['idle', { requestsPerMinute: 60 }],
  ]);
  expect(usedRatios(before, after, minuteMs, (tenant) => limits.get(tenant))).toEqual([
    { tenant: 'a', limit: 'requestsPerMinute', ratio: 0.9 },
    { tenant: 'a', limit: 'tokensPerMinute', ratio: 0.25 },
    { tenant: 'a', limit: 'concurrency', ratio: 0.5 },
    { tenant: 'idle', limit: 'requestsPerMinute', ratio: 0 },
  ]);
});

const apiKeys = new Map([['team-a', 'key-of-team-a-0123']]);
const asTeam = { headers: { authorization: 'Bearer key-of-team-a-0123' } };

async function ratioOf(url: string, limit: string): Promise<number | null> {
  const text = await (await fetch(`${url}/metrics`)).text();
  const series = `motet_gateway_quota_used_ratio{tenant="team-a",limit="${limit}"} `;
  const line = text.split('\n').find((one) => one.startsWith(series));
  return line === undefined ? null : Number(line.slice(series.length));
}

test('the gateway says what part of its limits a tenant uses, without being asked by any request', async () => {
  let script = answerForever;
  const engine = await startFakeEngine({ script: (...parts) => script(...parts) });
  const limits = new Map([['team-a', { requestsPerMinute: 1_000_000, concurrency: 4 }]]);
  const gateway = await gatewayFor([engine], { apiKeys, limits, usageIntervalMs: 50 });
  const held = new AbortController();
  const stream = gateway.chat(chatBody({ stream: true }), { ...asTeam, signal: held.signal });
  await until(
    () => ratioOf(gateway.url, 'concurrency'),
    (ratio) => ratio === 0.25,
  );
  await until(
    () => ratioOf(gateway.url, 'requestsPerMinute'),
    (ratio) => ratio === 0,
  );

  script = answer;
  const seen = until(
    () => ratioOf(gateway.url, 'requestsPerMinute'),
    (ratio) => ratio! > 0,
  );
  let isSeen = false;
  void seen.then(() => {
    isSeen = true;
  });
  while (!isSeen) await (await gateway.chat(chatBody(), asTeam)).text();
  await seen;

  held.abort();
  await stream.then(({ body }) => body?.cancel()).catch(() => undefined);
  await until(
    () => ratioOf(gateway.url, 'concurrency'),
    (ratio) => ratio === 0,
  );
});
