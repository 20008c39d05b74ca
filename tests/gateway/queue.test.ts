import { expect, test } from 'vitest';
import { answer, type FakeEngine, startFakeEngine } from '../fixtures/fake-engine.ts';
import { chatBody, errorOf, gatewayFor, type TestGateway, until } from './start-gateway.ts';

const streaming = chatBody({ stream: true });

/** An engine that answers a request only when the test lets it. */
async function heldEngine(options: { adapters?: string[] } = {}) {
  const held: (() => void)[] = [];
  const engine = await startFakeEngine({
    ...options,
    script: async (received) => {
      await new Promise<void>((resolve) => held.push(resolve));
      await answer(received);
    },
  });
  return { engine, letOneGo: () => held.shift()!(), numHeld: () => held.length };
}

async function numQueued(gateway: TestGateway): Promise<number> {
  const metrics = await (await fetch(`${gateway.url}/metrics`)).text();
  return Number(/^motet_gateway_queued_requests (\d+)$/m.exec(metrics)?.[1]);
}

const arrivals = (engine: FakeEngine, count: number) =>
  until(
    () => engine.received.length,
    (length) => length === count,
  );

test('an engine never has more requests than its bound, and the rest wait their turn', async () => {
  const { engine, letOneGo, numHeld } = await heldEngine();
  const gateway = await gatewayFor([engine], { maxInFlightPerEngine: 2 });
  const responses = Array.from({ length: 5 }, () => gateway.chat(chatBody()));
  await until(
    () => numQueued(gateway),
    (queued) => queued === 3,
  );
  expect(numHeld()).toBe(2);
  for (let arrived = 3; arrived <= 5; arrived += 1) {
    letOneGo();
    await arrivals(engine, arrived);
    expect(numHeld()).toBe(2);
  }
  letOneGo();
  letOneGo();
  for (const response of responses) expect((await response).status).toBe(200);
});

test('refuses a request when the queue is full, and says when to come back', async () => {
  const { engine, letOneGo } = await heldEngine();
  const gateway = await gatewayFor([engine], { maxInFlightPerEngine: 1, maxQueued: 1 });
  const responses = [gateway.chat(chatBody()), gateway.chat(chatBody())];
  await until(
    () => numQueued(gateway),
    (queued) => queued === 1,
  );

  const refused = await gateway.chat(chatBody());
  expect(refused.headers.get('retry-after')).toMatch(/^\d+$/);
  expect(await errorOf(refused)).toMatchObject({ status: 429, type: 'rate_limit_error', code: 'queue_full' });
  letOneGo();
  await arrivals(engine, 2);
  letOneGo();
  for (const response of responses) expect((await response).status).toBe(200);
});

test('a request does not wait longer than the bound', async () => {
  const { engine, letOneGo } = await heldEngine();
  const gateway = await gatewayFor([engine], { maxInFlightPerEngine: 1, queueTimeoutMs: 50 });
  const first = gateway.chat(chatBody());
  await arrivals(engine, 1);
  expect(await errorOf(await gateway.chat(chatBody()))).toMatchObject({ status: 503, code: 'queue_timeout' });
  letOneGo();
  expect((await first).status).toBe(200);
});

test('a request whose engine has room is not held up by one whose engine is full', async () => {
  const { engine: full, letOneGo } = await heldEngine({ adapters: ['a'] });
  const free = await startFakeEngine({ adapters: ['b'] });
  const gateway = await gatewayFor([full, free], { maxInFlightPerEngine: 1 });
  const waiting = [gateway.chat(chatBody({ model: 'a' })), gateway.chat(chatBody({ model: 'a' }))];
  await until(
    () => numQueued(gateway),
    (queued) => queued === 1,
  );
  expect((await gateway.chat(chatBody({ model: 'b' }))).status).toBe(200);
  letOneGo();
  await arrivals(full, 2);
  letOneGo();
  for (const response of waiting) expect((await response).status).toBe(200);
});

test('a client that hangs up leaves the queue', async () => {
  const { engine, letOneGo } = await heldEngine();
  const gateway = await gatewayFor([engine], { maxInFlightPerEngine: 1 });
  const first = gateway.chat(chatBody());
  await arrivals(engine, 1);
  const hangUp = new AbortController();
  const second = gateway.chat(streaming, { signal: hangUp.signal }).catch((error: unknown) => error);
  await until(
    () => numQueued(gateway),
    (queued) => queued === 1,
  );
  hangUp.abort();
  await second;
  await until(
    () => numQueued(gateway),
    (queued) => queued === 0,
  );
  letOneGo();
  expect((await first).status).toBe(200);
  expect(engine.received).toHaveLength(1);
});

test('a request that waits is told when the engine it waits for goes away', async () => {
  const { engine } = await heldEngine();
  const gateway = await gatewayFor([engine], { maxInFlightPerEngine: 1 });
  const first = gateway.chat(chatBody());
  await arrivals(engine, 1);
  const second = gateway.chat(chatBody());
  await until(
    () => numQueued(gateway),
    (queued) => queued === 1,
  );
  await engine.kill();
  expect((await first).status).toBe(502);
  expect([502, 503]).toContain((await second).status);
});
