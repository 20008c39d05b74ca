import { expect, test } from 'vitest';
import { callersByDigest } from '../../gateway/auth.ts';
import { digestOfKey } from '../../gateway/identity/keys.ts';
import { startFakeEngine } from '../fixtures/fake-engine.ts';
import { chatBody, errorOf, gatewayFor } from './start-gateway.ts';

const key = 'key-0123456789abcdef';
const apiKeys = new Map([
  ['team-a', key],
  ['team-b', 'key-of-another-team'],
]);
const bearer = (value: string) => ({ headers: { authorization: `Bearer ${value}` } });

test('lets the holder of a key in, and logs the name of the key and not the key', async () => {
  const gateway = await gatewayFor([await startFakeEngine()], { apiKeys });
  expect((await gateway.chat(chatBody(), bearer(key))).status).toBe(200);
  const log = await gateway.wholeLog();
  expect(log.find(({ msg }) => msg === 'request')).toMatchObject({
    tenant: 'team-a',
    status: 200,
  });
  expect(JSON.stringify(log)).not.toContain(key);
});

test('refuses who has no key', async () => {
  const engine = await startFakeEngine();
  const gateway = await gatewayFor([engine], { apiKeys });
  const response = await gateway.chat(chatBody());
  expect(response.headers.get('www-authenticate')).toBe('Bearer');
  expect(await errorOf(response)).toMatchObject({
    status: 401,
    type: 'authentication_error',
    code: 'missing_api_key',
  });
  expect(engine.received).toHaveLength(0);
});

test.each(['wrong', `${key}x`, key.slice(0, -1)])('refuses the key %s', async (wrong) => {
  const gateway = await gatewayFor([await startFakeEngine()], { apiKeys });
  expect(await errorOf(await gateway.chat(chatBody(), bearer(wrong)))).toMatchObject({
    status: 401,
    code: 'invalid_api_key',
  });
});

test.each(['/v1/models', '/v1/models/base', '/tokenize', '/v1/unheard-of'])(
  'keeps %s behind the key',
  async (path) => {
    const gateway = await gatewayFor([await startFakeEngine()], { apiKeys });
    expect((await fetch(gateway.url + path)).status).toBe(401);
  },
);

test.each(['/livez', '/readyz', '/metrics'])('answers %s without a key', async (path) => {
  const gateway = await gatewayFor([await startFakeEngine()], { apiKeys });
  expect((await fetch(gateway.url + path)).status).toBe(200);
});

test('never shows an engine the key or the cookies', async () => {
  const engine = await startFakeEngine();
  const gateway = await gatewayFor([engine], { apiKeys });
  await gateway.chat(chatBody(), { headers: { ...bearer(key).headers, cookie: 'a=b' } });
  expect(engine.received[0]?.headers).not.toHaveProperty('authorization');
  expect(engine.received[0]?.headers).not.toHaveProperty('cookie');
});

test('shows every engine the key that was configured for engines', async () => {
  const engine = await startFakeEngine();
  const gateway = await gatewayFor([engine], { engineKey: 'key-of-the-engines' });
  await gateway.chat(chatBody(), bearer('key-of-the-client'));
  expect(engine.received[0]?.headers.authorization).toBe('Bearer key-of-the-engines');
  expect(engine.lastLookHeaders.authorization).toBe('Bearer key-of-the-engines');
});

test('limits of a key come with it', () => {
  const limits = { requestsPerMinute: 5 };
  const digest = digestOfKey('key-0123456789abcdef');
  const callers = callersByDigest([{ name: 'a', digest, limits }]);
  expect(callers.get(digest)).toMatchObject({ tenant: 'a', limits });
});
