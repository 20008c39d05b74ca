// Whose a token is, when tenants say which are theirs.

import { expect, test } from 'vitest';
import type { Identity } from '../../../gateway/identity/oidc.ts';
import {
  ambiguousTenants,
  type OidcMatch,
  ruleOf,
  type TokenRules,
  Tokens,
  tenantOf,
} from '../../../gateway/identity/tokens.ts';
import { newKey, sign, startIssuer, startMs } from './issuer.ts';

const own = { issuer: 'https://own', audience: 'motet', tenantClaim: 'team' };
const theirs = { issuer: 'https://theirs', audience: 'us' };

function rulesOf(matches: Record<string, OidcMatch>): TokenRules {
  return {
    own,
    byTenant: Object.entries(matches).flatMap(([name, match]) => ruleOf(name, match, own) ?? []),
  };
}

const token = (claims: Identity['claims'], issuer = own.issuer): Identity => ({
  issuer,
  claims: { sub: 'someone', aud: 'motet', ...claims },
});

const tenants = rulesOf({
  red: {},
  blue: { claims: { groups: 'blue' } },
  green: { claims: { groups: 'green', stage: 'live' } },
  white: { ...theirs, claims: { hd: 'white.example' } },
});

test.each<[string, Identity, string]>([
  ['a name in the claim of the gateway', token({ team: 'red' }), 'red'],
  ['a list that has the text', token({ groups: ['a', 'blue'] }), 'blue'],
  ['the text itself', token({ groups: 'blue' }), 'blue'],
  ['all claims of a rule', token({ groups: ['green'], stage: 'live' }), 'green'],
  ['one audience of several', token({ team: 'red', aud: ['x', 'motet'] }), 'red'],
  ['an issuer of its own', token({ hd: 'white.example', aud: 'us' }, theirs.issuer), 'white'],
])('a token is of the tenant by %s', (_, identity, tenant) => {
  expect(tenantOf(identity, tenants)).toBe(tenant);
});

test.each<[string, Identity, string]>([
  ['no claims of anybody', token({ groups: ['black'] }), 'invalid_token'],
  ['a part of the claims', token({ groups: ['green'] }), 'invalid_token'],
  ['a text that only begins so', token({ groups: ['blue-ish'], team: 'red2' }), 'invalid_token'],
  ['a claim that every object has', token({ groups: [] }), 'invalid_token'],
  ['the name of a tenant that asks for other claims', token({ team: 'blue' }), 'invalid_token'],
  ['a list in the claim that names tenants', token({ team: ['red'] }), 'invalid_token'],
  ['another audience', token({ team: 'red', aud: 'us' }), 'invalid_token'],
  ['the audience of another issuer', token({ hd: 'white.example' }, theirs.issuer), 'invalid_token'],
  [
    "another tenant's claims, of one's own issuer",
    token({ team: 'red', groups: 'blue', aud: 'us' }, theirs.issuer),
    'invalid_token',
  ],
  ['claims of two tenants', token({ team: 'red', groups: ['blue'] }), 'ambiguous_token'],
])('a token is refused that has %s', (_, identity, code) => {
  expect(() => tenantOf(identity, tenants)).toThrow(expect.objectContaining({ code }));
});

test('who has a token of two tenants is told which', () => {
  const both = token({ team: 'red', groups: ['blue'] });
  expect(() => tenantOf(both, tenants)).toThrow(/two tenants, blue and red/);
});

test('a tenant without an issuer has no tokens', () => {
  expect(ruleOf('red', {}, null)).toBe(null);
  expect(ruleOf('red', { claims: { a: 'b' } }, null)).toBe(null);
  expect(ruleOf('white', { ...theirs, claims: { a: 'b' } }, null)).toMatchObject({ issuer: theirs.issuer });
});

test('tenants every token of whom is also another’s are found', () => {
  const found = (matches: Record<string, OidcMatch>) =>
    Object.fromEntries(ambiguousTenants(rulesOf(matches).byTenant!));
  expect(found({ red: {}, blue: { claims: { groups: 'blue' } } })).toEqual({});
  expect(found({ a: { claims: { g: '1', h: '2' } }, b: { claims: { h: '2', g: '1' } } })).toEqual({
    a: 'b',
    b: 'a',
  });
  expect(found({ wide: { claims: { g: '1' } }, narrow: { claims: { f: '0', g: '1' } } })).toEqual({
    narrow: 'wide',
  });
  expect(found({ red: {}, thief: { claims: { team: 'red' } } })).toEqual({ red: 'thief', thief: 'red' });
  const claims = { g: '1' };
  expect(found({ a: { claims }, b: { ...theirs, claims } })).toEqual({});
});

test('rules that change hold for tokens that are known', async () => {
  const key = await newKey('1');
  const [first, second] = [await startIssuer(key), await startIssuer(key)];
  const ofFirst = { issuer: first.url, audience: 'motet', claims: { team: 'red' } };
  const rule = (tenant: string, match: OidcMatch) => ruleOf(tenant, match, null)!;
  let rules: TokenRules = { own: null, byTenant: [] };
  const log = { warn: () => {} };
  const tokens = new Tokens({ rules: () => rules, log, now: () => startMs });
  expect(tokens.isOn).toBe(false);

  rules = { own: null, byTenant: [rule('a', ofFirst)] };
  const good = await sign(first, key);
  expect(tokens.isOn).toBe(true);
  expect(await tokens.callerOf(good)).toMatchObject({ tenant: 'a' });
  await expect(tokens.callerOf(await sign(second, key))).rejects.toThrow(/an issuer that is trusted/);
  expect(second.numAsked).toBe(0);

  rules = { own: null, byTenant: [rule('b', ofFirst), rule('c', { ...ofFirst, issuer: second.url })] };
  expect(await tokens.callerOf(good)).toMatchObject({ tenant: 'b' });
  expect(await tokens.callerOf(await sign(second, key))).toMatchObject({ tenant: 'c' });
  // One issuer does not speak for another.
  await expect(tokens.callerOf(await sign(second, await newKey('1')))).rejects.toMatchObject({
    code: 'invalid_token',
  });
  rules = { own: null, byTenant: [rule('c', { ...ofFirst, issuer: second.url })] };
  await expect(tokens.callerOf(good)).rejects.toMatchObject({ code: 'invalid_token' });
});
