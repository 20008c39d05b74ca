import { expect, test } from 'vitest';
import { rateLimitHeaders } from '../../../gateway/quota/headers.ts';
import {
  type Limits,
  meteredOf,
  refusalOf,
  type Scope,
  settlementsOf,
} from '../../../gateway/quota/limits.ts';
import { newMeters, settle, take } from '../../../gateway/quota/meter.ts';

const tenant = (limits: Limits): Scope => ({ of: 'tenant', id: 'team-a', limits });
const key = (limits: Limits): Scope => ({ of: 'key', id: 'k1', limits });

/** Takes requests one after another at one time; returns what came of the last. */
function enter(scopes: Scope[], numRequests: number, tokens = 0, meters = newMeters()) {
  let metered = meteredOf('team-a', scopes, tokens, '1');
  let taking = take(
    meters,
    0,
    metered.map(({ take }) => take),
  );
  for (let i = 2; i <= numRequests; i += 1) {
    metered = meteredOf('team-a', scopes, tokens, String(i));
    taking = take(
      meters,
      0,
      metered.map(({ take }) => take),
    );
  }
  return { metered, taking, meters };
}
const refusal = ({ metered, taking }: ReturnType<typeof enter>) => refusalOf(metered, taking)?.error;

test.each([1, 3, 7, 59, 61, 997])('a limit of %i a minute is as many at once', (limit) => {
  const scopes = [tenant({ requestsPerMinute: limit })];
  expect(refusal(enter(scopes, limit))).toBeUndefined();
  expect(refusal(enter(scopes, limit + 1))?.code).toBe('rate_limit_exceeded');
});

test.each<[Scope[], number, number, string, number]>([
  [[tenant({ requestsPerMinute: 2 })], 3, 0, 'this tenant may use 2 requests a minute; retry in 30 s', 30],
  [[tenant({ tokensPerMinute: 600 })], 2, 400, 'this tenant may use 600 tokens a minute; retry in 20 s', 20],
  [[key({ concurrency: 1 })], 2, 0, 'this key may use 1 requests at a time; retry in 1 s', 1],
  // The longest wait of all that refuse.
  [
    [tenant({ requestsPerMinute: 60 }), key({ requestsPerMinute: 1 })],
    2,
    0,
    'this key may use 1 requests a minute; retry in 60 s',
    60,
  ],
])(
  'a refusal names the limit and says when to come back: %#',
  (scopes, numRequests, tokens, message, seconds) => {
    expect(refusal(enter(scopes, numRequests, tokens))).toMatchObject({ message, retryAfterS: seconds });
  },
);

test('a request that is estimated beyond the limit enters alone, and owes what it cost', () => {
  const scopes = [tenant({ tokensPerMinute: 100 })];
  const { metered, meters } = enter(scopes, 1, 5_000);
  settle(meters, 0, settlementsOf(metered, 150));
  expect(refusal(enter(scopes, 1, 1, meters))?.retryAfterS).toBe(31);
});

test('what cannot be told stays as estimated, and the place comes back', () => {
  const { metered } = enter([tenant({ tokensPerMinute: 100, concurrency: 1 })], 1, 10);
  expect(settlementsOf(metered, null)).toEqual([expect.objectContaining({ kind: 'lease', id: '1' })]);
});

test('a meter of a key is not that of another, nor of its tenant', () => {
  const limits = { requestsPerMinute: 1 };
  const scopes = [tenant(limits), key(limits), { ...key(limits), id: 'k2' }];
  const keys = scopes.flatMap((scope) => meteredOf('team-a', [scope], 0, '1').map(({ take }) => take.key));
  expect(new Set(keys).size).toBe(3);
});

test('headers say every policy and what is left of it, in OpenAI’s words too', () => {
  const limits = { requestsPerMinute: 60, tokensPerMinute: 6_000, concurrency: 4 };
  const { metered, taking } = enter([tenant(limits), key({ requestsPerMinute: 10 })], 2, 100);
  expect(Object.fromEntries(rateLimitHeaders(metered, taking.readings))).toEqual({
    'RateLimit-Policy':
      '"tenant-requests";q=60;w=60, "tenant-tokens";q=6000;w=60;qu="tokens", "tenant-concurrency";q=4;qu="concurrent-requests", "key-requests";q=10;w=60',
    RateLimit:
      '"tenant-requests";r=58;t=2, "tenant-tokens";r=5800;t=2, "tenant-concurrency";r=2, "key-requests";r=8;t=12',
    'x-ratelimit-limit-requests': '10',
    'x-ratelimit-remaining-requests': '8',
    'x-ratelimit-reset-requests': '12s',
    'x-ratelimit-limit-tokens': '6000',
    'x-ratelimit-remaining-tokens': '5800',
    'x-ratelimit-reset-tokens': '2s',
  });
});

test.each([
  [1, '60ms'],
  [24, '1.44s'],
  [1_500, '1m30s'],
])('a reset of %i thousandths of a minute is %s', (thousandths, text) => {
  const { metered } = enter([tenant({ tokensPerMinute: 1_000 })], 1);
  const headers = Object.fromEntries(rateLimitHeaders(metered, [thousandths * 60_000]));
  expect(headers['x-ratelimit-reset-tokens']).toBe(text);
});
