import { once } from 'node:events';
import { createConnection, type Socket } from 'node:net';
import { expect, test } from 'vitest';
import { parseStanding } from '../../engine/protocol.ts';
import {
  answer,
  answerForever,
  beginStream,
  chunkEvent,
  type FakeEngine,
  type Received,
  refuse,
  startFakeEngine,
} from '../fixtures/fake-engine.ts';
import { chatBody, errorOf, gatewayFor, routing, until } from './start-gateway.ts';

const streaming = chatBody({ stream: true });

test.each(['/v1/chat/completions', '/v1/completions', '/tokenize', '/detokenize'])(
  'passes %s on',
  async (path) => {
    const engine = await startFakeEngine();
    const gateway = await gatewayFor([engine]);
    const init = {
      method: 'POST',
      body: '{"model":"base"}',
      headers: { 'content-type': 'application/json' },
    };
    expect((await fetch(gateway.url + path, init)).status).toBe(200);
    expect(engine.received[0]).toMatchObject({ path });
  },
);

test('streams events as they come', async () => {
  const engine = await startFakeEngine({ script: answerForever });
  const gateway = await gatewayFor([engine]);
  const received = engine.nextReceived();
  const response = await gateway.chat(streaming);
  const reader = response.body!.getReader();
  const text = async () => Buffer.from((await reader.read()).value ?? []).toString();

  expect(response.headers.get('content-type')).toBe('text/event-stream');
  expect(await text()).toBe(chunkEvent('fake'));
  const { res } = await received;
  res.write(chunkEvent(' words'));
  expect(await text()).toBe(chunkEvent(' words'));
  res.end('data: [DONE]\n\n');
  expect(await text()).toBe('data: [DONE]\n\n');
  expect((await reader.read()).done).toBe(true);
});

test("keeps the client's request id and trace, and gives them to the engine", async () => {
  const engine = await startFakeEngine();
  const gateway = await gatewayFor([engine]);
  const traceparent = '00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01';
  const response = await gateway.chat(chatBody(), { headers: { 'x-request-id': 'my-id.1', traceparent } });
  expect(response.headers.get('x-request-id')).toBe('my-id.1');
  expect(engine.received[0]?.headers).toMatchObject({ 'x-request-id': 'my-id.1', traceparent });
});

test('tells the engine whose a request is, and not what the client says of that', async () => {
  const engine = await startFakeEngine();
  const gateway = await gatewayFor([engine], { apiKeys: new Map([['team ä', 'key-of-team-a-0123']]) });
  const claims = { 'x-motet-tenant': 'other', 'x-motet-weight': '1000', 'x-motet-priority': '-3' };
  const authorization = 'Bearer key-of-team-a-0123';
  expect((await gateway.chat(chatBody(), { headers: { ...claims, authorization } })).status).toBe(200);
  const { headers } = engine.received[0]!;
  // Its own requests a client may put behind others of its tenant.
  expect(parseStanding((name) => headers[name] as string)).toEqual({
    tenant: 'team ä',
    weight: 1,
    priority: -3,
  });
});

test.each([undefined, 'has a space', 'x'.repeat(129)])('makes a request id in place of %s', async (asked) => {
  const gateway = await gatewayFor([await startFakeEngine()]);
  const response = await gateway.chat(chatBody(), asked ? { headers: { 'x-request-id': asked } } : {});
  expect(response.headers.get('x-request-id')).toMatch(/^[0-9a-f-]{36}$/);
});

test("passes an engine's refusal on as it is", async () => {
  const gateway = await gatewayFor([
    await startFakeEngine({ script: refuse(400, 'context_length_exceeded') }),
  ]);
  const response = await gateway.chat(chatBody());
  expect(response.status).toBe(400);
  expect(response.headers.get('retry-after')).toBe('7');
  const error = {
    message: 'the fake engine refuses',
    type: 'fake_error',
    param: null,
    code: 'context_length_exceeded',
  };
  expect(await response.json()).toEqual({ error });
});

test.each([429, 503, 404])('asks another engine when one answers %i', async (status) => {
  const engines = [await startFakeEngine({ script: refuse(status, 'busy') }), await startFakeEngine()];
  const gateway = await gatewayFor(engines);
  for (let i = 0; i < 2; i += 1) expect((await gateway.chat(chatBody())).status).toBe(200);
  expect(engines[0]!.received.length).toBeGreaterThan(0);
});

test('passes on the last refusal when every engine refuses', async () => {
  const gateway = await gatewayFor([
    await startFakeEngine({ script: refuse(503, 'busy') }),
    await startFakeEngine({ script: refuse(503, 'busy') }),
  ]);
  expect(await errorOf(await gateway.chat(chatBody()))).toMatchObject({ status: 503, code: 'busy' });
});

test('asks another engine when one breaks off before its first byte', async () => {
  const engines = [
    await startFakeEngine({ script: ({ res }) => void res.destroy() }),
    await startFakeEngine(),
  ];
  const gateway = await gatewayFor(engines);
  for (let i = 0; i < 2; i += 1) expect((await gateway.chat(streaming)).status).toBe(200);
  expect(engines[0]!.received.length).toBeGreaterThan(0);
});

test('asks another engine when one breaks off within a whole answer', async () => {
  const breakOff = startFakeEngine({
    script: ({ res }) => {
      res.writeHead(200, { 'content-type': 'application/json', 'content-length': '100' });
      res.write('{"half":', () => res.destroy());
    },
  });
  const engines = [await breakOff, await startFakeEngine()];
  const gateway = await gatewayFor(engines);
  for (let i = 0; i < 2; i += 1) {
    const response = await gateway.chat(chatBody());
    expect(await response.json()).toMatchObject({ object: 'chat.completion' });
  }
  expect(engines[0]!.received.length).toBeGreaterThan(0);
});

test('asks no other engine when too many requests were asked again already', async () => {
  const breakOff = { script: ({ res }: Received) => void res.destroy() };
  const engines = [await startFakeEngine(breakOff), await startFakeEngine(breakOff)];
  const gateway = await gatewayFor(engines, {
    routing: { ...routing, maxRetryShare: 0, afterFailures: 1_000 },
  });
  // The last twenty answers of each would eject one of them.
  for (let i = 0; i < 12; i += 1) {
    expect(await errorOf(await gateway.chat(chatBody()))).toMatchObject({ code: 'engine_failed' });
  }
  const numReceived = () => engines.reduce((sum, { received }) => sum + received.length, 0);
  // Ten retries are there from the start, and one more for each second.
  expect(numReceived()).toBeLessThan(24);
  expect(numReceived()).toBeGreaterThanOrEqual(22);
  const metrics = await (await fetch(`${gateway.url}/metrics`)).text();
  expect(metrics).toMatch(/motet_gateway_retries_total\{allowed="false"\} [12]/);
});

test('an engine that fails what it gets is left alone, and asked again when its time is over', async () => {
  const engines = [await startFakeEngine({ script: refuse(500, 'broken') }), await startFakeEngine()];
  const [sick, well] = engines as [FakeEngine, FakeEngine];
  const gateway = await gatewayFor(engines, { routing: { ...routing, ejectMs: 300 } });
  for (let i = 0; i < 10; i += 1) await gateway.chat(chatBody());
  expect(sick.received).toHaveLength(5);
  for (let i = 0; i < 5; i += 1) expect((await gateway.chat(chatBody())).status).toBe(200);
  const metrics = await (await fetch(`${gateway.url}/metrics`)).text();
  expect(metrics).toContain(`motet_gateway_engine_ejections_total{engine="${sick.url}"} 1`);
  sick.script = answer;
  await until(
    () => gateway.chat(chatBody()),
    () => sick.received.length > 5,
  );
  expect(well.received.length).toBeGreaterThanOrEqual(10);
});

test('an engine that hangs is left for another once it has answered no look for long', async () => {
  const engines = [await startFakeEngine({ script: () => {} }), await startFakeEngine()];
  const hanging = engines[0]!;
  const gateway = await gatewayFor(engines, { silentAfterMs: 50 });
  const received = hanging.nextReceived();
  const answers = [gateway.chat(chatBody()), gateway.chat(chatBody())];
  await received;
  // Its port is closed and the connection of the request stays: as good as stopped.
  hanging.deafen();
  for (const one of answers) expect((await one).status).toBe(200);
  expect(engines[1]!.received).toHaveLength(2);
});

test('the log says which engine was picked and why', async () => {
  const engines = [await startFakeEngine(), await startFakeEngine()];
  const gateway = await gatewayFor(engines);
  const content = 'x'.repeat(2_000);
  const turns = [[content], [content, 'an answer', 'more']];
  for (const turn of turns) {
    await gateway.chat(chatBody({ messages: turn.map((text) => ({ role: 'user', content: text })) }));
  }
  const lines = await until(
    () => gateway.logLines.filter(({ msg }) => msg === 'request'),
    ({ length }) => length === 2,
  );
  expect(lines[1]).toMatchObject({
    engine: lines[0]!.engine,
    picked: { reason: 'prefix', knownTokens: 448 },
  });
});

test('asks another engine when one is gone', async () => {
  const engines = [await startFakeEngine(), await startFakeEngine()];
  const gateway = await gatewayFor(engines, { pollIntervalMs: 3_600_000 });
  await engines[0]!.kill();
  for (let i = 0; i < 2; i += 1) expect((await gateway.chat(chatBody())).status).toBe(200);
  expect(engines[1]!.received).toHaveLength(2);
});

test('says that the engine could not be reached when there is no other', async () => {
  const engine = await startFakeEngine();
  const gateway = await gatewayFor([engine], { pollIntervalMs: 3_600_000 });
  await engine.kill();
  const error = await errorOf(await gateway.chat(chatBody()));
  expect(error).toMatchObject({ status: 503, code: 'engine_unreachable' });
  expect(await errorOf(await gateway.chat(chatBody()))).toMatchObject({
    status: 503,
    code: 'model_unavailable',
  });
});

test('asks again when the engine closes a kept-alive connection as the request is sent on it', async () => {
  const used = new WeakSet<Socket>();
  const engine = await startFakeEngine({
    script: (received) => {
      const socket = received.res.socket!;
      if (used.has(socket)) return void received.res.destroy();
      used.add(socket);
      return answer(received);
    },
  });
  const gateway = await gatewayFor([engine]);
  for (let i = 0; i < 3; i += 1) expect((await gateway.chat(chatBody())).status).toBe(200);
  expect(engine.received).toHaveLength(5);
});

test('says that the engine failed when it breaks off and there is no other', async () => {
  const gateway = await gatewayFor([await startFakeEngine({ script: ({ res }) => void res.destroy() })]);
  expect(await errorOf(await gateway.chat(chatBody()))).toMatchObject({ status: 502, code: 'engine_failed' });
});

test('ends a stream with an error event, after the last whole event, when the engine is killed', async () => {
  const engine = await startFakeEngine({
    script: ({ res }) => {
      beginStream(res);
      res.write(`${chunkEvent('fake')}data: {"half":`);
    },
  });
  const gateway = await gatewayFor([engine]);
  const response = await gateway.chat(streaming);
  const reader = response.body!.getReader();
  expect(Buffer.from((await reader.read()).value!).toString()).toBe(chunkEvent('fake'));
  await engine.kill();

  const last = Buffer.from((await reader.read()).value!).toString();
  expect(last).toMatch(/^data: \{"error":.*\}\n\n$/);
  expect(JSON.parse(last.slice('data: '.length)).error).toMatchObject({
    type: 'server_error',
    code: 'engine_failed',
  });
  expect((await reader.read()).done).toBe(true);
  const line = await until(() => gateway.logLines.find(({ msg }) => msg === 'request'), Boolean);
  expect(line).toMatchObject({ status: 502, errorCode: 'engine_failed', attempts: 1 });
});

test('does not ask another engine after the first byte', async () => {
  const breakOff = startFakeEngine({
    script: ({ res }) => {
      beginStream(res);
      res.write(chunkEvent('fake'), () => res.destroy());
    },
  });
  const engines = [await breakOff, await startFakeEngine({ adapters: ['unused'] })];
  const gateway = await gatewayFor(engines, { pollIntervalMs: 3_600_000 });
  const text = await (await gateway.chat(streaming)).text();
  expect(text).toContain('"code":"engine_failed"');
  expect(engines[1]!.received).toHaveLength(0);
});

test('gives up on an engine that sends no first byte', async () => {
  const gateway = await gatewayFor([await startFakeEngine({ script: () => {} })], { firstByteTimeoutMs: 50 });
  expect(await errorOf(await gateway.chat(chatBody()))).toMatchObject({
    status: 504,
    code: 'engine_timeout',
  });
});

test('gives up on an engine that falls silent within a stream', async () => {
  const engine = await startFakeEngine({ script: answerForever });
  const gateway = await gatewayFor([engine], { idleTimeoutMs: 50 });
  expect(await (await gateway.chat(streaming)).text()).toContain('"code":"engine_timeout"');
  await engine.received[0]!.closed;
});

test('a long stream may take longer than the idle timeout', async () => {
  const engine = await startFakeEngine({
    script: async ({ res }) => {
      beginStream(res);
      for (let i = 0; i < 30; i += 1) {
        res.write(chunkEvent(String(i)));
        await new Promise((resolve) => setTimeout(resolve, 30));
      }
      res.end('data: [DONE]\n\n');
    },
  });
  const gateway = await gatewayFor([engine], { idleTimeoutMs: 800 });
  expect(await (await gateway.chat(streaming)).text()).toMatch(/\[DONE\]\n\n$/);
});

test.each([
  ['within a stream', answerForever, streaming],
  ['before the first byte', () => {}, chatBody()],
])('closes the connection to the engine when the client hangs up %s', async (_, script, body) => {
  const engine = await startFakeEngine({ script });
  const gateway = await gatewayFor([engine]);
  const hangUp = new AbortController();
  const received = engine.nextReceived();
  const response = gateway.chat(body, { signal: hangUp.signal }).catch((error: unknown) => error);
  const { closed } = await received;
  hangUp.abort();
  await closed;
  await response;
  const line = await until(() => gateway.logLines.find(({ msg }) => msg === 'request'), Boolean);
  expect(line).toMatchObject({ status: 499, errorCode: 'client_closed_request' });
});

test('closes the connection to the engine when the client stops reading', async () => {
  const engine = await startFakeEngine({
    script: async ({ res }) => {
      beginStream(res);
      const event = chunkEvent('x'.repeat(100_000));
      while (!res.destroyed) if (!res.write(event)) await once(res, 'drain');
    },
  });
  const gateway = await gatewayFor([engine], { idleTimeoutMs: 500 });
  const received = engine.nextReceived();
  const body = JSON.stringify(streaming);
  const socket = createConnection(gateway.port, '127.0.0.1').pause();
  const head = `POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n`;
  socket.write(`${head}Content-Length: ${body.length}\r\n\r\n${body}`);
  await (await received).closed;
  const line = await until(() => gateway.logLines.find(({ msg }) => msg === 'request'), Boolean);
  expect(line).toMatchObject({ status: 499, errorCode: 'client_closed_request' });
  const metrics = await (await fetch(`${gateway.url}/metrics`)).text();
  expect(metrics).not.toContain('motet_gateway_engine_errors_total{');
  socket.destroy();
});

test('does not hold a whole answer for ever for a client that does not read it', async () => {
  const engine = await startFakeEngine({
    script: ({ res }) => {
      res.writeHead(200, { 'content-type': 'application/json' });
      res.end(JSON.stringify('x'.repeat(20_000_000)));
    },
  });
  const gateway = await gatewayFor([engine], { idleTimeoutMs: 100 });
  const body = JSON.stringify(chatBody());
  const socket = createConnection(gateway.port, '127.0.0.1').pause();
  const head = `POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n`;
  socket.write(`${head}Content-Length: ${body.length}\r\n\r\n${body}`);
  const line = await until(() => gateway.logLines.find(({ msg }) => msg === 'request'), Boolean);
  expect(line).toMatchObject({ status: 499, errorCode: 'client_closed_request' });
  socket.destroy();
});

test('answers an unknown path and a wrong method in the shape of OpenAI', async () => {
  const gateway = await gatewayFor([await startFakeEngine()]);
  expect(await errorOf(await fetch(`${gateway.url}/v1/unheard-of`))).toMatchObject({
    code: 'route_not_found',
  });
  const response = await fetch(`${gateway.url}/v1/chat/completions`);
  expect(response.headers.get('allow')).toBe('POST');
  expect(await errorOf(response)).toMatchObject({ status: 405, code: 'method_not_allowed' });
});

test('refuses a path that is not well-formed', async () => {
  const gateway = await gatewayFor([await startFakeEngine()]);
  expect(await errorOf(await fetch(`${gateway.url}/v1/models/%zz`))).toMatchObject({
    status: 404,
    code: 'route_not_found',
  });
});

test('counts requests by route, model, tenant and status, and never by a name a client made up', async () => {
  const engine = await startFakeEngine({ adapters: ['a'] });
  const gateway = await gatewayFor([engine]);
  await gateway.chat(chatBody({ model: 'a' }));
  await gateway.chat(chatBody({ model: 'made-up-name' }));
  engine.script = ({ res }) => void res.destroy();
  await gateway.chat(chatBody());
  engine.script = answer;

  const metrics = await (await fetch(`${gateway.url}/metrics`)).text();
  const route = 'route="/v1/chat/completions"';
  const nobody = 'tenant=""';
  expect(metrics).toContain(
    `motet_gateway_requests_total{${route},model="a",target="a",${nobody},status="200"} 1`,
  );
  expect(metrics).toContain(
    `motet_gateway_requests_total{${route},model="",target="",${nobody},status="404"} 1`,
  );
  expect(metrics).toContain(
    `motet_gateway_requests_total{${route},model="base",target="base",${nobody},status="502"} 1`,
  );
  expect(metrics).toContain(
    `motet_gateway_engine_errors_total{engine="${engine.url}",reason="engine_failed"} 1`,
  );
  expect(metrics).toContain(`motet_gateway_time_to_first_byte_seconds_count{${route},model="a"} 1`);
  expect(metrics).toContain(`motet_gateway_engine_ready{engine="${engine.url}"} 1`);
  expect(metrics).not.toContain('made-up-name');
});

test('names that clients make up while no engine was ever seen are counted under none', async () => {
  const engine = await startFakeEngine();
  await engine.kill();
  const gateway = await gatewayFor([engine]);
  await gateway.chat(chatBody({ model: 'made-up-name' }));
  expect(await (await fetch(`${gateway.url}/metrics`)).text()).not.toContain('made-up-name');
});

test('an answer that breaks the rules of HTTP is not logged', async () => {
  const engine = await startFakeEngine({
    script: ({ res }) => {
      res.socket!.end('HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nno number, but fake words\r\n');
    },
  });
  const gateway = await gatewayFor([engine]);
  expect((await gateway.chat(chatBody())).status).toBe(502);
  const log = JSON.stringify(
    await until(
      () => gateway.logLines,
      (lines) => lines.some(({ msg }) => msg === 'request'),
    ),
  );
  expect(log).toContain('HTTPParserError');
  expect(log).not.toContain('fake words');
});

test('neither prompts nor answers are logged', async () => {
  const gateway = await gatewayFor([await startFakeEngine()]);
  await gateway.chat(chatBody());
  await gateway.chat(`${JSON.stringify(chatBody())} a secret question`);
  const log = JSON.stringify(
    await until(
      () => gateway.logLines,
      (lines) => lines.length >= 3,
    ),
  );
  expect(log).not.toMatch(/secret question|fake words/);
});

test.each([401, 403])(
  'does not pass on that an engine refuses the gateway itself with %i',
  async (status) => {
    const [refusing, other] = [
      await startFakeEngine({ script: refuse(status, 'unauthorized') }),
      await startFakeEngine({ script: refuse(status, 'unauthorized') }),
    ];
    const gateway = await gatewayFor([refusing, other]);
    expect(await errorOf(await gateway.chat(chatBody()))).toMatchObject({
      status: 502,
      code: 'engine_failed',
    });
    other.script = answer;
    for (let i = 0; i < 2; i += 1) expect((await gateway.chat(chatBody())).status).toBe(200);
  },
);
