import { once } from 'node:events';
import { expect, test } from 'vitest';
import type { Limits } from '../../../gateway/quota/limits.ts';
import { answer, answerForever, refuse, type Script, startFakeEngine } from '../../fixtures/fake-engine.ts';
import { chatBody, errorOf, gatewayFor, until } from '../start-gateway.ts';

const apiKeys = new Map([
  ['team-a', 'key-of-team-a-0123'],
  ['team-b', 'key-of-team-b-0123'],
]);
const of = (name: string) => ({ headers: { authorization: `Bearer ${apiKeys.get(name)}` } });

async function limited(limits: Record<string, Limits>, script: Script = answer) {
  const engine = await startFakeEngine({ script });
  const gateway = await gatewayFor([engine], { apiKeys, limits: new Map(Object.entries(limits)) });
  return { engine, gateway };
}

test('requests over the limit are refused with what OpenAI’s clients read, and reach no engine', async () => {
  const { engine, gateway } = await limited({ 'team-a': { requestsPerMinute: 1 } });
  const first = await gateway.chat(chatBody(), of('team-a'));
  expect(first.status).toBe(200);
  expect(first.headers.get('ratelimit')).toBe('"tenant-requests";r=0;t=60');
  expect(first.headers.get('x-ratelimit-remaining-requests')).toBe('0');

  const second = await gateway.chat(chatBody(), of('team-a'));
  expect(Number(second.headers.get('retry-after'))).toBeGreaterThan(50);
  expect(second.headers.get('ratelimit-policy')).toBe('"tenant-requests";q=1;w=60');
  expect(await errorOf(second)).toMatchObject({
    status: 429,
    type: 'rate_limit_error',
    code: 'rate_limit_exceeded',
  });
  expect(engine.received.length).toBe(1);
  expect(await (await fetch(`${gateway.url}/metrics`)).text()).toContain(
    'motet_gateway_rate_limited_total{tenant="team-a",limit="tenant-requestsPerMinute"} 1',
  );
});

test('one caller’s limit is not another’s, and who has none gets no headers', async () => {
  const { gateway } = await limited({ 'team-a': { requestsPerMinute: 1 } });
  await gateway.chat(chatBody(), of('team-a'));
  const other = await gateway.chat(chatBody(), of('team-b'));
  expect(other.status).toBe(200);
  expect([...other.headers.keys()].filter((name) => name.includes('ratelimit'))).toEqual([]);
});

test('the limit of * holds for each who is not named, by itself', async () => {
  const { gateway } = await limited({ '*': { requestsPerMinute: 1 } });
  expect((await gateway.chat(chatBody(), of('team-a'))).status).toBe(200);
  expect((await gateway.chat(chatBody(), of('team-b'))).status).toBe(200);
  expect((await gateway.chat(chatBody(), of('team-b'))).status).toBe(429);
});

test('tokens are settled at what the answer cost', async () => {
  const { gateway } = await limited({ 'team-a': { tokensPerMinute: 1_000 } });
  const first = await gateway.chat(chatBody(), of('team-a'));
  const estimated = 1_000 - Number(first.headers.get('x-ratelimit-remaining-tokens'));
  expect(estimated).toBeGreaterThan(10);
  await first.text();
  // The fake engine says 1 and 2.
  const second = await until(
    () => gateway.chat(chatBody(), of('team-a')),
    ({ headers }) => Number(headers.get('x-ratelimit-remaining-tokens')) >= 1_000 - estimated - 4,
  );
  expect(second.status).toBe(200);
});

test('an answer is estimated by those before it, and never longer than max_tokens', async () => {
  const engine = await startFakeEngine();
  const limits = new Map([['*', { tokensPerMinute: 100_000 }]]);
  const keys = new Map(Array.from({ length: 3 }, (_, i) => [`team-${i}`, `key-of-a-team-${i}-0123`]));
  const gateway = await gatewayFor([engine], { apiKeys: keys, limits });
  /** By a tenant that has asked for nothing yet. */
  const estimate = async (team: number, fields: object = {}) => {
    const body = chatBody({ ...fields, stream: false });
    const bearer = { headers: { authorization: `Bearer ${keys.get(`team-${team}`)}` } };
    const answer = await gateway.chat(body, bearer);
    await answer.text();
    const estimated = 100_000 - Number(answer.headers.get('x-ratelimit-remaining-tokens'));
    return estimated - Math.ceil(JSON.stringify(body).length / 4);
  };
  // Nothing is known of the adapter, whose answers are taken for longer.
  expect(await estimate(0, { max_tokens: 10, n: 2 })).toBe(20);
  // The fake engine's two answers have a token each, which is counted as a bucket from 1 to 2.
  expect(await estimate(1)).toBe(2);
  expect(await estimate(2, { max_tokens: 1 })).toBe(1);
});

test('what an engine refuses or no engine was sent costs no tokens', async () => {
  const { gateway } = await limited({ 'team-a': { tokensPerMinute: 100 } }, refuse(400, 'no'));
  for (let i = 0; i < 12; i += 1) {
    expect((await gateway.chat(chatBody(), of('team-a'))).status).toBe(400);
    expect((await gateway.chat(chatBody({ model: 'unknown' }), of('team-a'))).status).toBe(404);
  }
});

test('requests at a time are bounded, and a place comes back with the end of its request', async () => {
  const { engine, gateway } = await limited({ 'team-a': { concurrency: 1 } }, answerForever);
  const hangUp = new AbortController();
  const streaming = chatBody({ stream: true });
  const received = engine.nextReceived();
  await gateway.chat(streaming, { ...of('team-a'), signal: hangUp.signal });
  const refused = await gateway.chat(streaming, of('team-a'));
  expect(refused.headers.get('retry-after')).toBe('1');
  expect(refused.status).toBe(429);

  hangUp.abort();
  await (await received).closed;
  engine.script = answer;
  const next = await until(
    () => gateway.chat(streaming, of('team-a')),
    ({ status }) => status === 200,
  );
  expect(await next.text()).toContain('[DONE]');
});

test('who hangs up on a whole answer pays what was estimated', async () => {
  const { engine, gateway } = await limited({ 'team-a': { tokensPerMinute: 30 } }, () => {});
  const hangUp = new AbortController();
  const received = engine.nextReceived();
  const asked = gateway.chat(chatBody(), { ...of('team-a'), signal: hangUp.signal }).catch(() => null);
  const { res } = await received;
  const closed = once(res, 'close');
  hangUp.abort();
  await Promise.all([asked, closed]);
  expect((await gateway.chat(chatBody(), of('team-a'))).status).toBe(429);
});
