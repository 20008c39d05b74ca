// Tokens as a certified OpenID Connect provider makes them, not as this project thinks that they are made.

import { expect, test } from 'vitest';
import { ruleOf, Tokens } from '../../../gateway/identity/tokens.ts';
import { startFakeEngine } from '../../fixtures/fake-engine.ts';
import { bearer } from '../start-cluster.ts';
import { chatBody, errorOf, gatewayFor } from '../start-gateway.ts';
import { newKey } from './issuer.ts';
import { startProvider, webClientId } from './provider.ts';

const ownOf = ({ url }: { url: string }) => ({ issuer: url, audience: 'motet', tenantClaim: 'team' });

test('a machine enters by client credentials, and a person’s token for another client does not', async () => {
  const provider = await startProvider(await newKey('1'));
  const engine = await startFakeEngine();
  const gateway = await gatewayFor([engine], { oidc: ownOf(provider) });
  const token = await provider.machineToken();
  expect((await gateway.chat(chatBody(), bearer(token))).status).toBe(200);
  expect(await errorOf(await gateway.chat(chatBody(), bearer(await provider.personToken())))).toMatchObject({
    status: 401,
    code: 'invalid_token',
    message: expect.stringContaining('another aud'),
  });
  const log = await gateway.wholeLog();
  expect(log.find(({ msg, status }) => msg === 'request' && status === 200)).toMatchObject({
    tenant: 'red',
  });
  expect(JSON.stringify(log)).not.toContain(token.split('.')[2]);
});

test('a person enters by the ID token of a code flow, as the tenant whose group it has', async () => {
  const provider = await startProvider(await newKey('1'));
  const match = (group: string) => ({
    issuer: provider.url,
    audience: webClientId,
    claims: { groups: group },
  });
  const rules = {
    own: null,
    byTenant: ['staff', 'guests'].map((tenant) => ruleOf(tenant, match(tenant), null)!),
  };
  const tokens = new Tokens({ rules: () => rules, log: { warn: () => {} } });
  expect(await tokens.callerOf(await provider.personToken())).toMatchObject({ tenant: 'staff' });
  await expect(tokens.callerOf(await provider.machineToken())).rejects.toMatchObject({
    code: 'invalid_token',
  });
});

test('its keys are rotated while it runs, and while it is away those that are known go on', async () => {
  const provider = await startProvider(await newKey('1'));
  let laterMs = 0;
  const warnings: object[] = [];
  const rules = { own: ownOf(provider), byTenant: null };
  const tokens = new Tokens({
    rules: () => rules,
    log: { warn: (fields) => void warnings.push(fields) },
    now: () => Date.now() + laterMs,
  });
  const enters = (token: string) =>
    tokens.callerOf(token).then(
      ({ tenant }) => tenant,
      ({ code }) => code,
    );
  const old = await provider.machineToken();
  expect(await enters(old)).toBe('red');

  await provider.signWith(await newKey('2'));
  const fresh = await provider.machineToken();
  laterMs += 10_000;
  expect(await enters(fresh)).toBe('red');
  expect(await enters(old)).toBe('invalid_token');

  const unseen = await provider.machineToken();
  await provider.signWith(await newKey('3'));
  const ofThird = await provider.machineToken();
  await provider.stop();
  laterMs += 10_000;
  expect(await enters(ofThird)).toBe('invalid_token');
  expect(await enters(unseen)).toBe('red');
  expect(warnings).toHaveLength(1);
  await provider.start();
  laterMs += 10_000;
  expect(await enters(ofThird)).toBe('red');
});
