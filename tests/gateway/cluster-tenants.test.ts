// Tenants before a real API server: whose key enters, what it sees, and what their statuses say.

import { readFileSync } from 'node:fs';
import { KubeConfig } from '@kubernetes/client-node';
import { beforeAll, describe, expect, onTestFinished, test } from 'vitest';
import { type ApiCall, apiChannel } from '../../crds/api.ts';
import type { Tenant } from '../../crds/types.ts';
import { nextUsage, patchUsage } from '../../gateway/quota/usage-status.ts';
import { installCrds } from '../crds/install-crds.ts';
import { type ControlPlane, sharedControlPlane, startControlPlane } from '../fixtures/control-plane.ts';
import { answer, answerForever } from '../fixtures/fake-engine.ts';
import { newKey, sign, startIssuer } from './identity/issuer.ts';
import { adapterRoute, baseModel, loraAdapter, tenant } from './resources.ts';
import { bearer, type Cluster, type Engine, metricOf, modelIds, startCluster } from './start-cluster.ts';
import { chatBody, errorOf, type TestGateway, until } from './start-gateway.ts';

const longer = { timeout: 120_000 };
/** More than any change takes to be seen, on a busy machine. */
const secretMs = 40_000;
const keyOf = (name: string, version = 1) => `key-of-${name}-version-${version}`;

let plane: ControlPlane;
beforeAll(async () => {
  plane = await sharedControlPlane();
  await installCrds(plane);
});

/** A tenant whose key is keyOf(name). */
async function addTenant(
  cluster: Cluster,
  name: string,
  access: Tenant['spec']['access'] = {},
): Promise<void> {
  await cluster.setSecret(name, { key: keyOf(name) });
  await cluster.create(tenant(name, { access }));
}

const ready = (gateway: TestGateway) =>
  until(
    () => fetch(`${gateway.url}/readyz`),
    ({ status }) => status === 200,
  );

const ask = (gateway: TestGateway, model: string, key: string) =>
  gateway.chat(chatBody({ model }), bearer(key));
const statusOf = async (gateway: TestGateway, model: string, key: string) =>
  (await ask(gateway, model, key)).status;

const served = (gateway: TestGateway, model: string, key: string, timeoutMs?: number) =>
  until(
    () => statusOf(gateway, model, key),
    (status) => status === 200,
    timeoutMs,
  );

const readyCondition = async (cluster: Cluster, name: string, reason: string) => {
  const found = await until(
    () => cluster.tenant(name),
    ({ status }) => status?.conditions?.[0]?.reason === reason,
    secretMs,
  );
  return found.status!;
};

/** Two teams with an adapter each, on one engine that holds both. */
async function twoTeams(): Promise<{ cluster: Cluster; gateway: TestGateway; engine: Engine }> {
  const cluster = await startCluster(plane);
  await cluster.create(baseModel('base'));
  for (const team of ['red', 'blue']) {
    await cluster.create(loraAdapter(`${team}-sql`, { labels: { team } }));
    await addTenant(cluster, team, { adapters: { matchLabels: { team } } });
  }
  const engine = await cluster.engine({ adapters: ['red-sql', 'blue-sql'] });
  const gateway = await cluster.gateway();
  await ready(gateway);
  await served(gateway, 'red-sql', keyOf('red'));
  return { cluster, gateway, engine };
}

describe('rights', () => {
  test('a tenant sees and calls its own models, and of others it is told what it is told of made-up names', async () => {
    const { gateway, engine } = await twoTeams();
    expect(await modelIds(gateway, keyOf('red'))).toEqual(['red-sql']);
    expect(await modelIds(gateway, keyOf('blue'))).toEqual(['blue-sql']);
    expect(await statusOf(gateway, 'blue-sql', keyOf('blue'))).toBe(200);

    const asked = engine.fake.received.length;
    const said = async (model: string) => {
      const answers = [
        await ask(gateway, model, keyOf('red')),
        await fetch(`${gateway.url}/v1/models/${model}`, bearer(keyOf('red'))),
      ];
      return Promise.all(
        answers.map(async (answer) => {
          const names = [...answer.headers.keys()].filter((name) => name !== 'x-request-id');
          return { status: answer.status, names, text: (await answer.text()).replaceAll(model, 'NAME') };
        }),
      );
    };
    const ofMadeUp = await said('made-up');
    expect(ofMadeUp.map(({ status }) => status)).toEqual([404, 404]);
    for (const model of ['blue-sql', 'base']) expect(await said(model)).toEqual(ofMadeUp);
    expect(engine.fake.received).toHaveLength(asked);
    const text = await (await fetch(`${gateway.url}/metrics`)).text();
    expect(text).toContain('model="red-sql",target="red-sql",tenant="red",status="200"');
    expect(text).not.toContain('model="blue-sql",target="blue-sql",tenant="red"');
  });

  test('a tenant that is given nothing sees nothing', async () => {
    const { cluster, gateway } = await twoTeams();
    await addTenant(cluster, 'poor');
    await until(
      () => modelIds(gateway, keyOf('poor')),
      (ids) => !ids.includes('status 401'),
    );
    expect(await modelIds(gateway, keyOf('poor'))).toEqual([]);
    expect(await statusOf(gateway, 'base', keyOf('poor'))).toBe(404);
  });

  test('a label that changes gives and takes the right', async () => {
    const { cluster, gateway } = await twoTeams();
    await cluster.change('LoraAdapter', 'blue-sql', { metadata: { labels: { team: 'red' } } });
    await served(gateway, 'blue-sql', keyOf('red'));
    expect(await statusOf(gateway, 'blue-sql', keyOf('blue'))).toBe(404);
  });

  test('a route grants its targets through its own name alone', async () => {
    const { cluster, gateway } = await twoTeams();
    await cluster.create(adapterRoute('sql', [{ adapter: 'blue-sql' }], { labels: { for: 'all' } }));
    await cluster.change('Tenant', 'red', { spec: { access: { routes: { matchLabels: { for: 'all' } } } } });
    await served(gateway, 'sql', keyOf('red'));
    expect(await modelIds(gateway, keyOf('red'))).toEqual(['red-sql', 'sql']);
    expect(await statusOf(gateway, 'blue-sql', keyOf('red'))).toBe(404);
  });
});

describe('keys', () => {
  test('without a key that is accepted nobody enters, and failures are counted', async () => {
    const { gateway } = await twoTeams();
    expect(await errorOf(await gateway.chat(chatBody()))).toMatchObject({ code: 'missing_api_key' });
    const wrong = await ask(gateway, 'red-sql', keyOf('red', 2));
    expect(await errorOf(wrong)).toMatchObject({ status: 401, code: 'invalid_api_key' });
    expect(await modelIds(gateway, keyOf('green'))).toEqual(['status 401']);
    const failures = (reason: string) =>
      metricOf(gateway, `motet_gateway_auth_failures_total{reason="${reason}"}`);
    expect([await failures('missing_api_key'), await failures('invalid_api_key')]).toEqual([1, 2]);
    expect(await metricOf(gateway, 'motet_gateway_tenants')).toBe(2);
  });

  test('a key is rotated by its Secret, and the old one enters no more', longer, async () => {
    const { cluster, gateway } = await twoTeams();
    await cluster.setSecret('red', { key: `${keyOf('red', 2)}\n` });
    await served(gateway, 'red-sql', keyOf('red', 2), secretMs);
    expect(await statusOf(gateway, 'red-sql', keyOf('red'))).toBe(401);
    expect(await statusOf(gateway, 'blue-sql', keyOf('blue'))).toBe(200);
  });

  test('two keys let clients change over', async () => {
    const { cluster, gateway } = await twoTeams();
    await cluster.setSecret('red-next', { another: keyOf('red', 2) });
    const keys = [{ secretRef: { name: 'red' } }, { secretRef: { name: 'red-next', key: 'another' } }];
    await cluster.change('Tenant', 'red', { spec: { keys } });
    await served(gateway, 'red-sql', keyOf('red', 2));
    expect(await statusOf(gateway, 'red-sql', keyOf('red'))).toBe(200);
    expect(await readyCondition(cluster, 'red', 'KeysAccepted')).toMatchObject({ keys: '2/2' });
    await cluster.change('Tenant', 'red', { spec: { keys: keys.slice(1) } });
    await until(
      () => statusOf(gateway, 'red-sql', keyOf('red')),
      (status) => status === 401,
    );
  });

  test('a tenant that is deleted enters no more', async () => {
    const { cluster, gateway } = await twoTeams();
    await cluster.remove('Tenant', 'red');
    await until(
      () => statusOf(gateway, 'red-sql', keyOf('red')),
      (status) => status === 401,
    );
    expect(await metricOf(gateway, 'motet_gateway_tenants')).toBe(1);
  });

  test(
    'a Secret that is deleted takes its key with it, and one that comes back brings it',
    longer,
    async () => {
      const { cluster, gateway } = await twoTeams();
      await cluster.core('/secrets/red', { method: 'DELETE' });
      await until(
        () => statusOf(gateway, 'red-sql', keyOf('red')),
        (status) => status === 401,
        secretMs,
      );
      expect(await readyCondition(cluster, 'red', 'SecretNotFound')).toMatchObject({ keys: '0/1' });
      await cluster.setSecret('red', { key: keyOf('red') });
      await served(gateway, 'red-sql', keyOf('red'), secretMs);
      expect(await readyCondition(cluster, 'red', 'KeysAccepted')).toMatchObject({ keys: '1/1' });
    },
  );

  test('a key that is taken away is refused at once, and a stream that it began goes on to its end', async () => {
    const { cluster, gateway, engine } = await twoTeams();
    engine.fake.script = answerForever;
    const begun = engine.fake.nextReceived();
    const stream = await gateway.chat(chatBody({ model: 'red-sql', stream: true }), bearer(keyOf('red')));
    expect(stream.status).toBe(200);
    engine.fake.script = answer;
    const startMs = performance.now();
    await cluster.core('/secrets/red', { method: 'DELETE' });
    await until(
      () => statusOf(gateway, 'red-sql', keyOf('red')),
      (status) => status === 401,
    );
    const seenMs = Math.round(performance.now() - startMs);
    console.log(`a Secret was deleted: its key is refused after ${seenMs} ms`);
    (await begun).res.end('data: [DONE]\n\n');
    expect(await stream.text()).toContain('data: [DONE]');
  });

  test('a gateway that may not watch Secrets reads them again every few seconds', longer, async () => {
    const cluster = await startCluster(plane, { mayWatchSecrets: false });
    await cluster.create(baseModel('base'));
    await addTenant(cluster, 'red', { baseModels: {} });
    await cluster.engine();
    const gateway = await cluster.gateway({ secretIntervalMs: 1_000 });
    await served(gateway, 'base', keyOf('red'));
    await cluster.setSecret('red', { key: keyOf('red', 2) });
    await served(gateway, 'base', keyOf('red', 2), secretMs);
    expect(await statusOf(gateway, 'base', keyOf('red'))).toBe(401);
    expect(gateway.logLines.filter(({ what }) => what === 'watch of secrets')).toHaveLength(1);
    expect(await metricOf(gateway, 'motet_gateway_watch_stale_seconds{resource="secrets"}')).toBe(null);
  });

  test('a token names its Tenant, whose rights it has, and enters no more when that is deleted', async () => {
    const { cluster } = await twoTeams();
    const key = await newKey('1');
    const issuer = await startIssuer(key);
    const gateway = await cluster.gateway({
      oidc: { issuer: issuer.url, audience: 'motet', tenantClaim: 'team' },
    });
    await ready(gateway);
    const token = (team: string) => sign(issuer, key, { team }, { nowMs: Date.now() });
    const red = await token('red');
    await served(gateway, 'red-sql', red);
    expect(await modelIds(gateway, red)).toEqual(['red-sql']);
    expect(await statusOf(gateway, 'blue-sql', red)).toBe(404);
    expect(await errorOf(await ask(gateway, 'red-sql', await token('green')))).toMatchObject({
      status: 401,
      code: 'invalid_token',
    });
    await cluster.remove('Tenant', 'red');
    await until(
      () => statusOf(gateway, 'red-sql', red),
      (status) => status === 401,
    );
  });

  test('tokens are a tenant’s by claims and issuer of its own, and those of two are refused', async () => {
    const { cluster } = await twoTeams();
    const key = await newKey('1');
    const [issuer, theirs] = [await startIssuer(key), await startIssuer(key)];
    const gateway = await cluster.gateway({
      oidc: { issuer: issuer.url, audience: 'motet', tenantClaim: 'team' },
    });
    const oidc = (claims: object, of?: { url: string }) => ({
      spec: { oidc: { claims, ...(of && { issuer: of.url, audience: 'motet' }) } },
    });
    const green = { ...tenant('green', { secrets: [] }), spec: { oidc: { claims: { groups: 'g' } } } };
    await cluster.create(green as never);
    await cluster.change('Tenant', 'red', oidc({ groups: 'r' }, theirs));
    await ready(gateway);
    const token = (groups: string[], of = issuer) =>
      sign(of, key, { groups, team: undefined }, { nowMs: Date.now() });
    const ofRed = await token(['r'], theirs);
    await served(gateway, 'red-sql', ofRed);
    expect(await statusOf(gateway, 'red-sql', await token(['r']))).toBe(401);
    expect(await modelIds(gateway, await token(['g']))).toEqual([]);
    expect(await readyCondition(cluster, 'green', 'TokensAccepted')).toMatchObject({ keys: '0/0' });

    await cluster.change('Tenant', 'blue', oidc({ groups: 'b' }));
    const both = await token(['b', 'g']);
    const refused = await until(
      async () => errorOf(await ask(gateway, 'blue-sql', both)),
      ({ code }) => code === 'ambiguous_token',
    );
    expect(refused).toMatchObject({ status: 403, message: expect.stringContaining('blue and green') });
    await cluster.change('Tenant', 'blue', oidc({ groups: 'g' }));
    for (const name of ['blue', 'green']) await readyCondition(cluster, name, 'TokensAmbiguous');
    await cluster.change('Tenant', 'red', oidc({ groups: 'other' }));
    await until(
      () => statusOf(gateway, 'red-sql', ofRed),
      (status) => status === 401,
    );
    expect(await statusOf(gateway, 'red-sql', keyOf('red'))).toBe(200);
  });

  test('the older tenant keeps a key that two have', longer, async () => {
    const { cluster, gateway } = await twoTeams();
    // Ages are whole seconds.
    await new Promise((resolve) => setTimeout(resolve, 1_100));
    await cluster.setSecret('thief', { key: keyOf('red') });
    await cluster.create(tenant('thief', { access: { baseModels: {} } }));
    expect(await readyCondition(cluster, 'thief', 'KeyTaken')).toMatchObject({ keys: '0/1' });
    expect(await statusOf(gateway, 'red-sql', keyOf('red'))).toBe(200);
    expect(await modelIds(gateway, keyOf('red'))).toEqual(['red-sql']);
    await cluster.remove('Tenant', 'red');
    await until(
      () => modelIds(gateway, keyOf('red')),
      (ids) => ids.includes('base'),
    );
  });

  test('no key is ever logged or shown', async () => {
    const { cluster, gateway } = await twoTeams();
    await cluster.setSecret('short', { key: 'short-key' });
    await cluster.create(tenant('short'));
    const { conditions } = await readyCondition(cluster, 'short', 'KeyInvalid');
    const text =
      JSON.stringify([conditions, await gateway.wholeLog()]) +
      (await (await fetch(`${gateway.url}/metrics`)).text());
    for (const key of [keyOf('red'), keyOf('blue'), 'short-key']) expect(text).not.toContain(key);
    expect(gateway.logLines.find(({ route }) => route === '/v1/chat/completions')).toMatchObject({
      tenant: 'red',
    });
  });
});

test('a tenant and its key each have their limit', async () => {
  const cluster = await startCluster(plane);
  await cluster.create(baseModel('base'));
  await cluster.setSecret('red', { one: keyOf('red', 1), two: keyOf('red', 2) });
  const red = tenant('red', { access: { baseModels: {} } });
  const keys = [
    { secretRef: { name: 'red', key: 'one' }, limits: { requestsPerMinute: 1 } },
    { secretRef: { name: 'red', key: 'two' } },
  ];
  Object.assign(red.spec, { keys, limits: { requestsPerMinute: 2 } });
  await cluster.create(red);
  await cluster.engine({});
  const gateway = await cluster.gateway();
  await ready(gateway);

  const first = await ask(gateway, 'base', keyOf('red', 1));
  expect(first.status).toBe(200);
  expect(first.headers.get('ratelimit-policy')).toBe('"tenant-requests";q=2;w=60, "key-requests";q=1;w=60');
  expect((await errorOf(await ask(gateway, 'base', keyOf('red', 1)))).message).toMatch('this key may use 1 ');
  expect(await statusOf(gateway, 'base', keyOf('red', 2))).toBe(200);
  expect((await errorOf(await ask(gateway, 'base', keyOf('red', 2)))).message).toMatch(
    'this tenant may use 2 ',
  );
});

describe('status', () => {
  test('says what was accepted and how many names there are, and follows both', longer, async () => {
    const { cluster } = await twoTeams();
    const status = await readyCondition(cluster, 'red', 'KeysAccepted');
    expect(status).toMatchObject({ observedGeneration: 1, keys: '1/1', models: 1 });
    await cluster.create(loraAdapter('red-docs', { labels: { team: 'red' } }));
    const models = async () => (await cluster.tenant('red')).status?.models;
    await until(models, (count) => count === 2);
    await cluster.change('Tenant', 'red', { spec: { access: { adapters: { matchLabels: null } } } });
    await until(models, (count) => count === 3);
    const last = (await cluster.tenant('red')).status;
    expect(last?.observedGeneration).toBe(2);
    expect(last?.conditions?.[0]?.lastTransitionTime).toBe(status.conditions?.[0]?.lastTransitionTime);
  });

  test('is written when it changes and not otherwise, by several gateways together', longer, async () => {
    const { cluster, gateway } = await twoTeams();
    const second = await cluster.gateway();
    await ready(second);
    for (const name of ['red', 'blue']) await readyCondition(cluster, name, 'KeysAccepted');
    const writes = () =>
      readFileSync(plane.auditLog, 'utf8')
        .split('\n')
        .filter((line) => line.includes(`"namespace":"${cluster.namespace}"`) && line.includes('"tenants"'))
        .map(
          (line) => JSON.parse(line) as { verb: string; objectRef: { subresource?: string; name: string } },
        )
        .filter(({ verb, objectRef }) => verb === 'patch' && objectRef.subresource === 'status');
    const reads = countSecretReads();
    const lookAgain = async () => {
      const numReads = reads();
      for (const name of ['red', 'blue']) await cluster.touchSecret(name);
      await until(reads, (count) => count >= numReads + 4);
    };
    await lookAgain();
    // Each of the two may write a status once, when both see the change in the same moment.
    const before = writes().length;
    expect(before).toBeLessThanOrEqual(4);
    // Deploys, requests and looks at Secrets change nothing that a status says.
    await cluster.engine({ adapters: ['red-sql'] });
    for (let i = 0; i < 5; i += 1) await ask(gateway, 'red-sql', keyOf('red'));
    await lookAgain();
    expect(writes().length).toBe(before);
  });
});

describe('usage', () => {
  const usageOf = async (cluster: Cluster, name: string) => (await cluster.tenant(name)).status?.usage;

  test('of two gateways that write in one moment the second is refused, and overwrites nothing', async () => {
    const cluster = await startCluster(plane);
    await addTenant(cluster, 'red');
    const admin = new KubeConfig();
    admin.loadFromFile(plane.kubeconfig);
    const seen = await cluster.tenant('red');
    const used = { requestsPerMinute: 1, tokensPerMinute: 1, inFlight: 0, rejected: {} };
    const write = (gateway: string) => {
      const usage = nextUsage(seen.status?.usage, gateway, used, 60_000, new Date())!;
      return patchUsage(admin, cluster.namespace, seen, usage, AbortSignal.timeout(10_000));
    };
    await write('first');
    await expect(write('second')).rejects.toMatchObject({ status: 409 });
    expect((await usageOf(cluster, 'red'))?.gateways.map(({ name }) => name)).toEqual(['first']);
  });

  test('has an entry of each gateway and their sum, and one that is gone is taken out', longer, async () => {
    const { cluster, engine } = await twoTeams();
    await cluster.change('Tenant', 'red', { spec: { limits: { concurrency: 1 } } });
    const settings = { usageIntervalMs: 1_000 };
    const gateways = [await cluster.gateway(settings), await cluster.gateway(settings)];
    for (const gateway of gateways) await served(gateway, 'red-sql', keyOf('red'));
    // Each gateway has its part of the one request at a time, which is one at least.
    engine.fake.script = answerForever;
    const held = new AbortController();
    onTestFinished(() => held.abort());
    for (const gateway of gateways) {
      const body = chatBody({ model: 'red-sql', stream: true });
      void gateway.chat(body, { ...bearer(keyOf('red')), signal: held.signal }).catch(() => undefined);
    }
    const both = await until(
      async () => {
        for (const gateway of gateways) await statusOf(gateway, 'red-sql', keyOf('red'));
        return usageOf(cluster, 'red');
      },
      (usage) => usage?.inFlight === 2 && usage.rejectedPerMinute > 0,
      secretMs,
    );
    expect(both!.gateways.map(({ inFlight }) => inFlight)).toEqual([1, 1]);
    const rejected = both!.gateways.flatMap(({ rejected }) => Object.entries(rejected));
    expect(new Set(rejected.map(([reason]) => reason))).toEqual(new Set(['tenant-concurrency']));
    expect(rejected.reduce((sum, [, count]) => sum + count, 0)).toBe(both!.rejectedPerMinute);
    expect(await usageOf(cluster, 'blue')).toBeUndefined();

    // Keys, rights and conditions are written by another manager, and stay.
    const { keys, models, conditions } = (await cluster.tenant('red')).status!;
    expect([keys, models, conditions?.[0]?.status]).toEqual(['1/1', 1, 'True']);

    // Killed, it could not say that it has gone.
    await gateways[0]!.drain();
    const one = await until(
      () => usageOf(cluster, 'red'),
      (usage) => usage?.gateways.length === 1,
      secretMs,
    );
    expect(one).toMatchObject({ inFlight: 1 });
    held.abort();
    const none = await until(
      () => usageOf(cluster, 'red'),
      (usage) => usage?.gateways.length === 0,
      secretMs,
    );
    expect(none).toMatchObject({ requestsPerMinute: 0, tokensPerMinute: 0, inFlight: 0 });
  });
});

/** How often a gateway of this process has read a Secret since. */
function countSecretReads(): () => number {
  let count = 0;
  const onCall = (message: unknown) => {
    const { verb, resource } = message as ApiCall;
    if (verb === 'get' && resource === 'secrets') count += 1;
  };
  apiChannel.subscribe(onCall);
  onTestFinished(() => void apiChannel.unsubscribe(onCall));
  return () => count;
}

describe('the API server', () => {
  test('is away: keys go on to be accepted, and a rotation is seen when it is back', longer, async () => {
    const own = await startControlPlane({ controllers: false });
    onTestFinished(() => own.stop());
    await installCrds(own);
    const cluster = await startCluster(own);
    await cluster.create(baseModel('base'));
    await addTenant(cluster, 'red', { baseModels: {} });
    await cluster.engine();
    const gateway = await cluster.gateway();
    await ready(gateway);
    await served(gateway, 'base', keyOf('red'));
    await own.stopApiserver();
    for (const resource of ['tenants', 'secrets']) {
      await until(
        () => metricOf(gateway, `motet_gateway_watch_stale_seconds{resource="${resource}"}`),
        (seconds) => seconds! > 1,
        secretMs,
      );
    }
    expect(await statusOf(gateway, 'base', keyOf('red'))).toBe(200);
    expect(await statusOf(gateway, 'base', keyOf('green'))).toBe(401);
    expect((await fetch(`${gateway.url}/readyz`)).status).toBe(200);
    await own.startApiserver();
    await cluster.setSecret('red', { key: keyOf('red', 2) });
    await served(gateway, 'base', keyOf('red', 2), secretMs);
    expect(await statusOf(gateway, 'base', keyOf('red'))).toBe(401);
  });
});
