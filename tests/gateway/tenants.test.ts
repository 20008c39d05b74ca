import { expect, test } from 'vitest';
import type { Tenant } from '../../crds/types.ts';
import { type KeyState, readKey } from '../../gateway/identity/keys.ts';
import { changeOf } from '../../gateway/tenant-status.ts';
import { judgeTenants, statusOf, tokenRulesOf } from '../../gateway/tenants.ts';
import { tenant } from './resources.ts';

const text = 'key-0123456789abcdef';
const key = (value = text) => readKey(Buffer.from(value));

/** What the Secrets hold: `NAME/ENTRY` -> what is known of it. */
const secrets = (states: Record<string, KeyState>) => (secret: string, entry: string) =>
  states[`${secret}/${entry}`] ?? { kind: 'unread' as const };

test.each<[string, string | undefined, KeyState['kind'], RegExp?]>([
  ['a key', text, 'key'],
  ['a key with white space around it', `\n ${text}\r\n`, 'key'],
  ['a key of 512 characters', 'x'.repeat(512), 'key'],
  ['no entry', undefined, 'no_entry'],
  ['a key of 15 characters', 'x'.repeat(15), 'invalid', /at least 16 characters, got 15/],
  ['a key of 513 characters', 'x'.repeat(513), 'invalid', /at most 512 characters, got 513/],
  ['white space inside', 'key-01234567 89abcdef', 'invalid', /white space/],
  ['letters that a header cannot carry', 'schlüssel-0123456789', 'invalid', /ASCII/],
])('reads %s', (_, value, kind, problem) => {
  const state = readKey(value === undefined ? undefined : Buffer.from(value));
  expect(state.kind).toBe(kind);
  if (problem) expect((state as { problem: string }).problem).toMatch(problem);
});

test('white space around a key does not make another key of it', () => {
  expect(key(` ${text}\n`)).toEqual(key());
});

test('never shows a key', () => {
  const states = [key(), key('short-key'), key('a-broken key-of-someone')];
  const verdicts = judgeTenants(
    [tenant('a', { secrets: ['s/1', 's/2', 's/3'] })],
    secrets({ 's/1': states[0]!, 's/2': states[1]!, 's/3': states[2]! }),
  );
  const shown = JSON.stringify([states, verdicts, statusOf(verdicts[0]!, 0, new Date())]);
  for (const secret of [text, 'short-key', 'broken', 'of-someone']) expect(shown).not.toContain(secret);
});

test('the oldest tenant keeps a key that two have', () => {
  const states = secrets({ 'old/key': key(), 'young/key': key() });
  const verdicts = judgeTenants([tenant('young'), tenant('old', { ageS: 60 })], states);
  expect(verdicts.map(({ tenant: { metadata }, holders }) => [metadata.name, holders.length])).toEqual([
    ['old', 1],
    ['young', 0],
  ]);
  expect(verdicts[1]?.problems).toMatchObject([
    { reason: 'KeyTaken', message: expect.stringContaining('old') },
  ]);
});

test('a tenant that names one key twice has it once for each name', () => {
  const [verdict] = judgeTenants(
    [tenant('a', { secrets: ['s/1', 's/2'] })],
    secrets({ 's/1': key(), 's/2': key() }),
  );
  expect(verdict).toMatchObject({ problems: [], holders: [{ name: 'a' }, { name: 'a' }] });
});

test.each<[string, KeyState, string, RegExp]>([
  ['no Secret', { kind: 'no_secret' }, 'SecretNotFound', /no Secret a; create it/],
  ['no entry', { kind: 'no_entry' }, 'SecretNotFound', /no entry key; add it/],
  ['no right to read it', { kind: 'forbidden' }, 'SecretNotFound', /may not read/],
  ['an unusable key', key('short'), 'KeyInvalid', /at least 16/],
])('the status says that there is %s', (_, state, reason, message) => {
  const [verdict] = judgeTenants([tenant('a', { generation: 3 })], secrets({ 'a/key': state }));
  expect(statusOf(verdict!, 2, new Date('2026-01-02T03:04:05.678Z'))).toEqual({
    observedGeneration: 3,
    keys: '0/1',
    models: 2,
    conditions: [
      {
        type: 'Ready',
        status: 'False',
        reason,
        message: expect.stringMatching(message),
        lastTransitionTime: '2026-01-02T03:04:05Z',
        observedGeneration: 3,
      },
    ],
  });
});

test('the status counts the keys that are accepted, and is ready when all are', () => {
  const both = tenant('a', { secrets: ['s/1', 's/2'] });
  const [half] = judgeTenants([both], secrets({ 's/1': key(), 's/2': { kind: 'no_entry' } }));
  expect(statusOf(half!, 0, new Date())).toMatchObject({ keys: '1/2', conditions: [{ status: 'False' }] });
  const [whole] = judgeTenants([both], secrets({ 's/1': key(), 's/2': key(`${text}-2`) }));
  expect(statusOf(whole!, 0, new Date())).toMatchObject({
    keys: '2/2',
    conditions: [{ status: 'True', reason: 'KeysAccepted' }],
  });
});

test('the time of the last transition stays while the condition does', () => {
  const states = secrets({ 'a/key': key() });
  const first = statusOf(judgeTenants([tenant('a')], states)[0]!, 1, new Date('2026-01-01T00:00:00Z'));
  const again = { ...tenant('a', { generation: 2 }), status: first };
  const later = new Date('2026-01-01T01:00:00Z');
  expect(statusOf(judgeTenants([again], states)[0]!, 1, later).conditions).toMatchObject([
    { lastTransitionTime: '2026-01-01T00:00:00Z', observedGeneration: 2 },
  ]);
  const lost = judgeTenants([again], secrets({ 'a/key': { kind: 'no_secret' } }))[0]!;
  expect(statusOf(lost, 1, later).conditions).toMatchObject([{ lastTransitionTime: '2026-01-01T01:00:00Z' }]);
});

test('what could not be read so far is no verdict', () => {
  expect(judgeTenants([tenant('a')], secrets({}))).toMatchObject([
    { isUnread: true, holders: [], problems: [] },
  ]);
});

const own = { issuer: 'https://own', audience: 'motet', tenantClaim: 'team' };
const withTokens = (name: string, oidc: Tenant['spec']['oidc'], secrets: string[] = []) => {
  const made = tenant(name, { secrets });
  return { ...made, spec: { ...made.spec, ...(oidc && { oidc }) } };
};

test('a tenant without keys is ready by its tokens', () => {
  const tenants = [withTokens('a', {})];
  const [verdict] = judgeTenants(tenants, secrets({}), tokenRulesOf(tenants, own));
  expect(statusOf(verdict!, 0, new Date())).toMatchObject({
    keys: '0/0',
    conditions: [{ status: 'True', reason: 'TokensAccepted' }],
  });
});

test('the status says that no issuer is there for tokens', () => {
  const tenants = [withTokens('a', { claims: { groups: 'a' } }, ['a'])];
  const [verdict] = judgeTenants(tenants, secrets({ 'a/key': key() }), tokenRulesOf(tenants, null));
  expect(verdict!.holders).toHaveLength(1);
  expect(statusOf(verdict!, 0, new Date())).toMatchObject({
    keys: '1/1',
    conditions: [
      { status: 'False', reason: 'IssuerMissing', message: expect.stringMatching(/spec\.oidc\.?/) },
    ],
  });
});

test('the status names the other tenant whose claims are among its own', () => {
  const tenants = [
    withTokens('wide', { claims: { org: 'x' } }),
    withTokens('narrow', { claims: { org: 'x', group: 'y' } }),
  ];
  const verdicts = judgeTenants(tenants, secrets({}), tokenRulesOf(tenants, own));
  const said = verdicts.map((verdict) => {
    const [condition] = statusOf(verdict, 0, new Date()).conditions!;
    return [verdict.tenant.metadata.name, condition];
  });
  expect(Object.fromEntries(said)).toMatchObject({
    wide: { status: 'True' },
    narrow: { status: 'False', reason: 'TokensAmbiguous', message: expect.stringContaining('Tenant wide') },
  });
});

test.each<[string, Partial<Tenant> & { generation?: number; uid?: string }, string]>([
  ['its spec', { generation: 2 }, 'spec'],
  ['another under its name', { uid: 'other' }, 'spec'],
  ['what the gateways say of its keys', { status: { keys: '0/1' } }, 'status'],
  ['its usage', { status: { keys: '1/1', usage: usageOf(7) } }, 'other'],
  ['nothing', { status: { keys: '1/1', usage: usageOf(5) } }, 'other'],
])('a change of %s asks for what it needs and no more', (_, { status, ...meta }, expected) => {
  const before = { ...tenant('a'), status: { keys: '1/1', usage: usageOf(5) } };
  expect(changeOf({ ...tenant('a', meta), status: status ?? before.status }, before)).toBe(expected);
});

test('a tenant that comes or goes is judged', () => {
  expect([changeOf(tenant('a'), undefined), changeOf(undefined, tenant('a'))]).toEqual(['spec', 'spec']);
});

function usageOf(requestsPerMinute: number) {
  return { requestsPerMinute, tokensPerMinute: 0, inFlight: 0, rejectedPerMinute: 0, gateways: [] };
}
