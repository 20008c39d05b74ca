/** A group before a real API server, gateway and engine: each tenant is answered by the sum of the adapters that it may use. */
import { afterAll, beforeAll, expect, test } from 'vitest';
import { installCrds } from '../crds/install-crds.ts';
import { type ControlPlane, sharedControlPlane } from '../fixtures/control-plane.ts';
import type { FakeEngine } from '../fixtures/fake-engine.ts';
import { evalItems, type RunningProcess, startSmollm2 } from '../fixtures/processes.ts';
import { adapterGroup, baseModel, loraAdapter, tenant } from '../gateway/resources.ts';
import { bearer, modelIds, startCluster } from '../gateway/start-cluster.ts';
import { type TestGateway, until } from '../gateway/start-gateway.ts';

const names = ['sql', 'dates', 'triage'];
const keyOf = (name: string) => `key-of-${name}-and-more`;

let plane: ControlPlane;
let engine: RunningProcess;
beforeAll(async () => {
  engine = await startSmollm2([]);
  plane = await sharedControlPlane();
  await installCrds(plane);
});
afterAll(() => engine.stop());

const { messages } = evalItems('sql')[0]!;
const body = { messages, max_tokens: 24, temperature: 0, ignore_eos: true };

async function textOf(url: string, headers: Record<string, string>, model: string): Promise<string> {
  const answer = await fetch(`${url}/v1/chat/completions`, {
    method: 'POST',
    headers: { 'content-type': 'application/json', ...headers },
    body: JSON.stringify({ ...body, model }),
  });
  const reply = (await answer.json()) as {
    choices?: { message: { content: string } }[];
    error?: { code: string };
  };
  return reply.choices?.[0]?.message.content ?? `error ${reply.error?.code}`;
}

test('the answer is that of the adapters that the tenant may use, and of no other', {
  timeout: 120_000,
}, async () => {
  const cluster = await startCluster(plane);
  await cluster.create(baseModel('base'));
  for (const name of names) await cluster.create(loraAdapter(name, { labels: { name } }));
  await cluster.create(adapterGroup('all', { weights: 'sum' }));
  const tenants = { one: ['dates'], two: ['sql', 'dates'], three: names, none: ['other'] };
  for (const [name, values] of Object.entries(tenants)) {
    await cluster.setSecret(name, { key: keyOf(name) });
    const access = {
      adapters: { matchExpressions: [{ key: 'name', operator: 'In' as const, values }] },
      groups: {},
    };
    await cluster.create(tenant(name, { access }));
  }
  const port = Number(new URL(engine.url).port);
  await cluster.engine({ fake: { port } as FakeEngine });
  const gateway: TestGateway = await cluster.gateway();
  await until(
    () => modelIds(gateway, keyOf('three')),
    (ids) => ids.includes('all'),
    30_000,
  );

  const direct = (...members: string[]) =>
    textOf(engine.url, { 'x-motet-adapters': members.map((name) => `${name}=1`).join(',') }, 'all');
  const through = (name: string) => textOf(gateway.url, bearer(keyOf(name)).headers, 'all');
  const answers = {
    one: await through('one'),
    two: await through('two'),
    three: await through('three'),
  };
  expect(answers).toEqual({
    one: await textOf(engine.url, {}, 'dates'),
    two: await direct('dates', 'sql'),
    three: await direct('triage', 'dates', 'sql'),
  });
  expect(new Set(Object.values(answers)).size).toBe(3);
  expect(Object.values(answers)).not.toContain(await textOf(engine.url, {}, 'base'));
  expect(await through('none')).toBe('error model_not_found');
});
