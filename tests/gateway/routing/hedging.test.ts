/** Streams that are slow to begin are asked of a second engine. */
import { setTimeout as sleep } from 'node:timers/promises';
import { expect, test } from 'vitest';
import { answer, type FakeEngine, type Received, startFakeEngine } from '../../fixtures/fake-engine.ts';
import { chatBody, gatewayFor, routing, type TestGateway, until } from '../start-gateway.ts';

const streamBody = chatBody({ stream: true });

/** Two engines; `scripts` say in order of arrival, wherever it arrives, what is done with a request. */
async function pair(scripts: ((received: Received) => void | Promise<void>)[], settings = {}) {
  const arrived: Received[] = [];
  const script = (received: Received) => {
    arrived.push(received);
    return (scripts[arrived.length - 1] ?? answer)(received);
  };
  const engines = [await startFakeEngine({ script }), await startFakeEngine({ script })];
  const gateway = await gatewayFor(engines, {
    routing: { ...routing, hedgeAfterMs: 20, maxHedgeShare: 1, afterFailures: 1, ...settings },
  });
  return { gateway, engines, arrived };
}

const hold = () => {};

async function metricsOf({ url }: TestGateway): Promise<(series: string) => number> {
  const text = await (await fetch(`${url}/metrics`)).text();
  return (series) =>
    Number(
      text
        .split('\n')
        .find((line) => line.startsWith(`${series} `))
        ?.split(' ')[1] ?? 0,
    );
}
const hedges = (result: string) => `motet_gateway_hedges_total{result="${result}"}`;
const numReceived = (engines: FakeEngine[]) => engines.map(({ received }) => received.length);

test('a stream that does not begin is asked of a second engine: who begins is heard, the other is ended at once', async () => {
  const { gateway, engines, arrived } = await pair([hold]);
  const response = await gateway.chat(streamBody);
  const text = await response.text();
  expect(text.match(/\[DONE\]/g)).toHaveLength(1);
  expect(numReceived(engines)).toEqual([1, 1]);
  expect(arrived[1]!.body).toEqual(arrived[0]!.body);
  await arrived[0]!.closed;
  const count = await metricsOf(gateway);
  expect([count(hedges('won')), count(hedges('lost'))]).toEqual([1, 0]);
  // The one that was let go of has failed nothing, and what it did is nobody's cost.
  expect(count('motet_gateway_tokens_total{tenant="",model="base",kind="completion"}')).toBe(2);
  for (const { url } of engines) {
    expect(count(`motet_gateway_engine_ejections_total{engine="${url}"}`)).toBe(0);
    expect(count(`motet_gateway_engine_requests_in_flight{engine="${url}"}`)).toBe(0);
  }
  const line = await until(
    () => gateway.logLines.find(({ msg }) => msg === 'request'),
    (found) => found !== undefined,
  );
  expect(line).toMatchObject({ attempts: 2, hedge: 'won', status: 200 });
});

test('the first engine is heard when it begins first after all', async () => {
  const { gateway, arrived } = await pair([hold, hold]);
  const response = gateway.chat(streamBody);
  await until(
    () => arrived.length,
    (count) => count === 2,
  );
  await answer(arrived[0]!);
  expect(await (await response).text()).toContain('[DONE]');
  await arrived[1]!.closed;
  const count = await metricsOf(gateway);
  expect([count(hedges('won')), count(hedges('lost'))]).toEqual([0, 1]);
});

test('a second engine that breaks off or has no room is no answer: the first is waited for', async () => {
  for (const end of [
    ({ res }: Received) => void res.destroy(),
    ({ res }: Received) => void res.writeHead(429).end('{}'),
  ]) {
    const { gateway, arrived } = await pair([hold, end]);
    const response = gateway.chat(streamBody);
    await until(
      () => arrived.length,
      (count) => count === 2,
    );
    await arrived[1]!.closed;
    await answer(arrived[0]!);
    const got = await response;
    expect([got.status, (await got.text()).includes('[DONE]')]).toEqual([200, true]);
  }
});

test('both end when the client hangs up', async () => {
  const { gateway, arrived } = await pair([hold, hold]);
  const hangUp = new AbortController();
  const response = gateway.chat(streamBody, { signal: hangUp.signal });
  await until(
    () => arrived.length,
    (count) => count === 2,
  );
  hangUp.abort();
  await expect(response).rejects.toThrow();
  await Promise.all(arrived.map(({ closed }) => closed));
});

test('a whole answer takes as long as it is: no second engine is asked for it', async () => {
  const { gateway, engines } = await pair([
    async (received) => {
      await sleep(100);
      await answer(received);
    },
  ]);
  expect((await gateway.chat(chatBody())).status).toBe(200);
  expect(numReceived(engines).reduce((a, b) => a + b)).toBe(1);
});

test.each<[string, object, string]>([
  ['too many were', { maxHedgeShare: 0 }, 'too_many'],
  ['there is no other with room to spare', {}, 'no_room'],
])('no second engine is asked when %s', async (_, settings, result) => {
  const { gateway, engines, arrived } = await pair([hold], settings);
  if (result === 'no_room') {
    engines[1]!.isReady = false;
    await until(
      async () => (await metricsOf(gateway))('motet_gateway_engines{base_model="",state="ready"}'),
      (count) => count === 1,
    );
  }
  const response = gateway.chat(streamBody);
  await until(
    async () => (await metricsOf(gateway))(hedges(result)),
    (count) => count === 1,
  );
  expect(arrived.length).toBe(1);
  await answer(arrived[0]!);
  expect(await (await response).text()).toContain('[DONE]');
});
