import { expect, test } from 'vitest';
import { startFakeEngine } from '../fixtures/fake-engine.ts';
import { chatBody, errorOf, gatewayFor, until } from './start-gateway.ts';

async function modelIds(url: string): Promise<string[]> {
  const { data } = (await (await fetch(`${url}/v1/models`)).json()) as { data: { id: string }[] };
  return data.map(({ id }) => id);
}

test('lists the models of all engines, each once, the base first', async () => {
  const engines = [
    await startFakeEngine({ adapters: ['a', 'b'] }),
    await startFakeEngine({ adapters: ['b', 'c'] }),
  ];
  const gateway = await gatewayFor(engines);
  expect(await modelIds(gateway.url)).toEqual(['base', 'a', 'b', 'c']);
});

test('shows one model with its parent', async () => {
  const gateway = await gatewayFor([await startFakeEngine({ adapters: ['org/a'] })]);
  const response = await fetch(`${gateway.url}/v1/models/org%2Fa`);
  expect(await response.json()).toMatchObject({ id: 'org/a', object: 'model', parent: 'base' });
  expect(await errorOf(await fetch(`${gateway.url}/v1/models/b`))).toMatchObject({ code: 'model_not_found' });
});

test('finds an adapter that was loaded a moment ago', async () => {
  const engine = await startFakeEngine();
  // So slow that only a look made for the request can find it.
  const gateway = await gatewayFor([engine], { pollIntervalMs: 3_600_000 });
  engine.adapters.set('fresh', 'device');
  expect((await gateway.chat(chatBody({ model: 'fresh' }))).status).toBe(200);
});

test('refuses a model that no engine has, and names it', async () => {
  const gateway = await gatewayFor([await startFakeEngine()]);
  const error = await errorOf(await gateway.chat(chatBody({ model: 'nowhere' })));
  expect(error).toMatchObject({ status: 404, code: 'model_not_found', param: 'model' });
  expect(error.message).toContain('`nowhere`');
});

test('looks at an engine a few times a second however many unknown models are asked for', async () => {
  const engine = await startFakeEngine();
  const gateway = await gatewayFor([engine], { pollIntervalMs: 3_600_000 });
  const looksBefore = engine.numLooks;
  const startMs = performance.now();
  await Promise.all(Array.from({ length: 100 }, () => gateway.chat(chatBody({ model: 'nowhere' }))));
  const allowed = 2 + Math.ceil((performance.now() - startMs) / 100);
  expect(engine.numLooks - looksBefore).toBeLessThanOrEqual(allowed);
});

test('sends a request only to an engine that has the adapter', async () => {
  const engines = [await startFakeEngine(), await startFakeEngine({ adapters: ['a'] })];
  const gateway = await gatewayFor(engines);
  for (let i = 0; i < 4; i += 1) expect((await gateway.chat(chatBody({ model: 'a' }))).status).toBe(200);
  expect(engines.map(({ received }) => received.length)).toEqual([0, 4]);
});

test('takes turns between engines that are equally free', async () => {
  const engines = [await startFakeEngine(), await startFakeEngine()];
  const gateway = await gatewayFor(engines);
  for (let i = 0; i < 6; i += 1) await gateway.chat(chatBody());
  expect(engines.map(({ received }) => received.length)).toEqual([3, 3]);
});

test('says that a model is unavailable, and not unknown, when its engine is gone, and serves it when it is back', async () => {
  const [lost, other] = [
    await startFakeEngine({ adapters: ['a'] }),
    await startFakeEngine({ base: 'other' }),
  ];
  const gateway = await gatewayFor([lost, other]);
  await lost.kill();
  await until(
    () => modelIds(gateway.url),
    (ids) => !ids.includes('a'),
  );

  const response = await gateway.chat(chatBody({ model: 'a' }));
  expect(response.headers.get('retry-after')).toMatch(/^\d+$/);
  expect(await errorOf(response)).toMatchObject({ status: 503, code: 'model_unavailable' });
  expect(await errorOf(await gateway.chat(chatBody({ model: 'b' })))).toMatchObject({
    code: 'model_not_found',
  });

  await lost.revive();
  await until(
    () => gateway.chat(chatBody({ model: 'a' })),
    ({ status }) => status === 200,
  );
});

test('an adapter that its engine unloads is unknown afterwards', async () => {
  const engine = await startFakeEngine({ adapters: ['a'] });
  const gateway = await gatewayFor([engine]);
  engine.adapters.delete('a');
  const response = await until(
    () => gateway.chat(chatBody({ model: 'a' })),
    ({ status }) => status !== 200,
  );
  expect(await errorOf(response)).toMatchObject({ status: 404, code: 'model_not_found' });
});

test('is ready as long as one engine is', async () => {
  const engines = [await startFakeEngine(), await startFakeEngine()];
  const gateway = await gatewayFor(engines);
  const ready = () => fetch(`${gateway.url}/readyz`);
  engines[0]!.isReady = false;
  expect((await ready()).status).toBe(200);
  engines[1]!.isReady = false;
  const response = await until(ready, ({ status }) => status !== 200);
  expect(await errorOf(response)).toMatchObject({ status: 503, code: 'no_engine_ready' });
  expect((await fetch(`${gateway.url}/livez`)).status).toBe(200);
});

test('says that no engine is ready when none was ever seen', async () => {
  const engine = await startFakeEngine();
  await engine.kill();
  const gateway = await gatewayFor([engine]);
  expect(await errorOf(await gateway.chat(chatBody()))).toMatchObject({
    status: 503,
    code: 'no_engine_ready',
  });
});
