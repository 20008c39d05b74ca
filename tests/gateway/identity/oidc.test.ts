// Whose tokens are taken. The clock is the test's.

import { createHmac } from 'node:crypto';
import { exportJWK, exportSPKI } from 'jose';
import { expect, test } from 'vitest';
import { Tokens } from '../../../gateway/identity/tokens.ts';
import { startFakeEngine } from '../../fixtures/fake-engine.ts';
import { bearer } from '../start-cluster.ts';
import { chatBody, errorOf, gatewayFor } from '../start-gateway.ts';
import { type Claims, newKey, sign, startIssuer, startMs } from './issuer.ts';

function tokensOf(issuer: { url: string }) {
  const clock = { ms: startMs };
  const warnings: object[] = [];
  const log = { warn: (fields: object) => void warnings.push(fields) };
  const rules = { own: { issuer: issuer.url, audience: 'motet', tenantClaim: 'team' }, byTenant: null };
  return { tokens: new Tokens({ rules: () => rules, log, now: () => clock.ms }), clock, warnings };
}

const refused = { code: 'invalid_token' };

test('a token that the issuer signed for this gateway lets its tenant in', async () => {
  const key = await newKey('1');
  const issuer = await startIssuer(key);
  const { tokens } = tokensOf(issuer);
  const caller = await tokens.callerOf(await sign(issuer, key));
  expect(caller).toEqual({ tenant: 'red', keyId: expect.stringMatching(/^jwt:[0-9a-f]{12}$/) });
  expect(await tokens.callerOf(await sign(issuer, key, { aud: ['other', 'motet'] }))).toEqual(caller);
});

const nowSeconds = startMs / 1000;
test.each<[string, Claims]>([
  ['of another issuer', { iss: 'https://elsewhere' }],
  ['for others', { aud: 'another' }],
  ['for nobody', { aud: undefined }],
  ['that has expired', { exp: nowSeconds - 31 }],
  ['that never expires', { exp: undefined }],
  ['that is not good yet', { nbf: nowSeconds + 31 }],
  ['of nobody', { sub: undefined }],
  ['without a tenant', { team: undefined }],
  ['with a tenant that is a list', { team: ['red'] }],
  ['with a tenant that is a path', { team: '../red' }],
  ['with a tenant of 129 letters', { team: 'x'.repeat(129) }],
])('refuses a token %s', async (_, claims) => {
  const key = await newKey('1');
  const issuer = await startIssuer(key);
  await expect(tokensOf(issuer).tokens.callerOf(await sign(issuer, key, claims))).rejects.toMatchObject(
    refused,
  );
});

test('a clock that is 29 seconds off is forgiven', async () => {
  const key = await newKey('1');
  const issuer = await startIssuer(key);
  const { tokens } = tokensOf(issuer);
  for (const claims of [{ exp: nowSeconds - 29 }, { nbf: nowSeconds + 29 }])
    expect(await tokens.callerOf(await sign(issuer, key, claims))).toMatchObject({ tenant: 'red' });
});

test('refuses signatures that need no private key', async () => {
  const key = await newKey('1', 'RS256');
  const issuer = await startIssuer(key);
  const { tokens } = tokensOf(issuer);
  const good = await sign(issuer, key, {}, { alg: 'RS256' });
  expect(await tokens.callerOf(good)).toMatchObject({ tenant: 'red' });
  const [head = '', payload = '', signature = ''] = good.split('.');
  const encode = (value: object) => Buffer.from(JSON.stringify(value)).toString('base64url');
  const asSecret = async (secret: string | Buffer) => {
    const signed = `${encode({ alg: 'HS256', kid: '1' })}.${payload}`;
    return `${signed}.${createHmac('sha256', secret).update(signed).digest('base64url')}`;
  };
  const others = await newKey('1', 'RS256');
  const forged = [
    `${encode({ alg: 'none' })}.${payload}.`,
    `${encode({ alg: 'none', kid: '1' })}.${payload}.${signature}`,
    await asSecret(await exportSPKI(key.publicKey)),
    await asSecret(JSON.stringify(await exportJWK(key.publicKey))),
    await sign(issuer, others, {}, { alg: 'RS256' }),
    `${head}.${encode({ ...JSON.parse(Buffer.from(payload, 'base64url').toString()), team: 'blue' })}.${signature}`,
    `${encode({ alg: 'RS256', kid: '1', crit: ['x'], x: 1 })}.${payload}.${signature}`,
    `${head}.${payload}.`,
  ];
  for (const token of forged) await expect(tokens.callerOf(token), token).rejects.toMatchObject(refused);
});

test('a new key is asked for when its first token comes, and one that was withdrawn takes its tokens along', async () => {
  const [old, fresh] = [await newKey('1'), await newKey('2')];
  const issuer = await startIssuer(old);
  const { tokens, clock } = tokensOf(issuer);
  const before = await sign(issuer, old);
  await tokens.callerOf(before);
  issuer.keys = [fresh];
  clock.ms += 10_000;
  expect(await tokens.callerOf(await sign(issuer, fresh))).toMatchObject({ tenant: 'red' });
  await expect(tokens.callerOf(before)).rejects.toMatchObject(refused);
});

test('a flood of tokens with unknown keys asks the issuer once', async () => {
  const [key, unknown] = [await newKey('1'), await newKey('unknown')];
  const issuer = await startIssuer(key);
  const { tokens, clock } = tokensOf(issuer);
  await tokens.callerOf(await sign(issuer, key));
  const numAsked = issuer.numAsked;
  clock.ms += 10_000;
  const flood = await Promise.all(
    Array.from({ length: 50 }, (_, i) => sign(issuer, { ...unknown, kid: `k${i}` })),
  );
  for (const token of flood) await expect(tokens.callerOf(token)).rejects.toMatchObject(refused);
  // Its configuration, and its keys.
  expect(issuer.numAsked - numAsked).toBe(2);
});

test('while the issuer is away known keys go on, for a day', async () => {
  const key = await newKey('1');
  const issuer = await startIssuer(key);
  const { tokens, clock, warnings } = tokensOf(issuer);
  const at = () => sign(issuer, key, {}, { nowMs: clock.ms });
  await tokens.callerOf(await at());
  issuer.isAway = true;
  clock.ms += 23 * 3600_000;
  expect(await tokens.callerOf(await at())).toMatchObject({ tenant: 'red' });
  clock.ms += 2 * 3600_000;
  await expect(tokens.callerOf(await at())).rejects.toMatchObject({ code: 'issuer_unavailable' });
  expect(warnings.length).toBeGreaterThan(0);
  issuer.isAway = false;
  clock.ms += 10_000;
  expect(await tokens.callerOf(await at())).toMatchObject({ tenant: 'red' });
});

test('a gateway takes keys and tokens, and logs neither', async () => {
  const key = await newKey('1');
  const issuer = await startIssuer(key);
  const engine = await startFakeEngine();
  const gateway = await gatewayFor([engine], {
    apiKeys: new Map([['blue', 'key-of-blue-01234567']]),
    oidc: { issuer: issuer.url, audience: 'motet', tenantClaim: 'team' },
  });
  const nowMs = Date.now();
  const good = await sign(issuer, key, {}, { nowMs });
  const late = await sign(issuer, key, {}, { nowMs: nowMs - 3600_000 });
  expect((await gateway.chat(chatBody(), bearer('key-of-blue-01234567'))).status).toBe(200);
  expect((await gateway.chat(chatBody(), bearer(good))).status).toBe(200);
  expect(await errorOf(await gateway.chat(chatBody(), bearer(late)))).toMatchObject({
    status: 401,
    code: 'invalid_token',
  });
  expect(await errorOf(await gateway.chat(chatBody(), bearer('another-key-0123')))).toMatchObject({
    code: 'invalid_api_key',
  });
  issuer.isAway = true;
  const log = (await gateway.wholeLog()).filter(({ route }) => route !== '/metrics');
  const lines = log.filter(({ msg }) => msg === 'request').map(({ tenant }) => tenant ?? null);
  expect(lines).toEqual(['blue', 'red', null, null]);
  expect(engine.received).toHaveLength(2);
  for (const token of [good, late]) {
    for (const part of [token, ...token.split('.')]) expect(JSON.stringify(log)).not.toContain(part);
  }
});
