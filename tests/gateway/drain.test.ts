import { once } from 'node:events';
import { Agent, type IncomingMessage, request } from 'node:http';
import { createConnection } from 'node:net';
import { expect, test } from 'vitest';
import { answer, answerForever, chunkEvent, startFakeEngine } from '../fixtures/fake-engine.ts';
import { chatBody, errorOf, gatewayFor, until } from './start-gateway.ts';

const streaming = chatBody({ stream: true });

test('takes no more connections and lets a stream in flight end', async () => {
  const engine = await startFakeEngine({ script: answerForever });
  const gateway = await gatewayFor([engine], { drainTimeoutMs: 20_000 });
  const received = engine.nextReceived();
  const response = await gateway.chat(streaming);
  const drained = gateway.drain();

  await expect(fetch(`${gateway.url}/readyz`)).rejects.toThrow('fetch failed');
  const { res } = await received;
  res.write(chunkEvent(' words'));
  res.end('data: [DONE]\n\n');
  expect(await response.text()).toBe(`${chunkEvent('fake')}${chunkEvent(' words')}data: [DONE]\n\n`);
  await drained;
});

const head = 'POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json';
const asBytes = (body: string) => `${head}\r\nContent-Length: ${body.length}\r\n\r\n${body}`;

test('loses no request on a connection that is kept open: it is answered, and the client told to close', async () => {
  const engine = await startFakeEngine();
  const gateway = await gatewayFor([engine], { drainTimeoutMs: 20_000 });
  const socket = createConnection(gateway.port, '127.0.0.1').setEncoding('utf8');
  const answered = once(socket, 'data');
  socket.write(asBytes(JSON.stringify(chatBody())));
  expect((await answered)[0]).toMatch(/^HTTP\/1.1 200 .*Connection: keep-alive/s);

  const drained = gateway.drain();
  await expect(fetch(`${gateway.url}/livez`)).rejects.toThrow('fetch failed');
  socket.write(asBytes(JSON.stringify(chatBody())));
  const text = (await socket.toArray()).join('');
  expect(text).toMatch(/HTTP\/1.1 200 .*Connection: close.*"fake words"/s);
  expect(engine.received).toHaveLength(2);
  await drained;
});

test('loses none of many requests on connections that are kept open', async () => {
  const gateway = await gatewayFor([await startFakeEngine()], { drainTimeoutMs: 20_000 });
  let numAnswered = 0;
  const askUntilToldToClose = async () => {
    const agent = new Agent({ keepAlive: true, maxSockets: 1 });
    const body = JSON.stringify(chatBody());
    for (;;) {
      const response = await new Promise<IncomingMessage>((resolve, reject) => {
        const headers = { 'content-type': 'application/json', 'content-length': body.length };
        const url = `${gateway.url}/v1/chat/completions`;
        request(url, { method: 'POST', agent, headers }, resolve).on('error', reject).end(body);
      });
      expect(response.statusCode).toBe(200);
      expect(Buffer.concat(await response.toArray()).toString()).toContain('fake words');
      numAnswered += 1;
      if (response.headers.connection === 'close') return;
    }
  };
  const clients = Array.from({ length: 8 }, askUntilToldToClose);
  await until(
    () => numAnswered,
    (count) => count > 100,
  );
  const drained = gateway.drain();
  await Promise.all(clients);
  await drained;
});

test('an answer that began before the drain tells its client to close', async () => {
  const engine = await startFakeEngine({ script: () => {} });
  const gateway = await gatewayFor([engine], { drainTimeoutMs: 20_000 });
  const received = engine.nextReceived();
  const socket = createConnection(gateway.port, '127.0.0.1').setEncoding('utf8');
  socket.write(asBytes(JSON.stringify(chatBody())));
  const request = await received;
  const drained = gateway.drain();
  answer(request);
  expect((await socket.toArray()).join('')).toMatch(/^HTTP\/1.1 200 .*Connection: close/s);
  await drained;
});

test('is not ready while it drains', async () => {
  const engine = await startFakeEngine({ script: answerForever });
  const gateway = await gatewayFor([engine], { drainTimeoutMs: 20_000 });
  const received = engine.nextReceived();
  const socket = createConnection(gateway.port, '127.0.0.1').setEncoding('utf8');
  const begun = once(socket, 'data');
  socket.write(asBytes(JSON.stringify(streaming)));
  const { res } = await received;
  await begun;
  const drained = gateway.drain();
  socket.write('GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n', () => res.end('data: [DONE]\n\n'));

  const text = (await socket.toArray()).join('');
  expect(text).toContain('data: [DONE]');
  expect(text).toMatch(/HTTP\/1.1 503 .*Retry-After: 1\r\n.*"code":"shutting_down"/s);
  await drained;
});

test('does not wait for a connection on which nothing was asked', async () => {
  const gateway = await gatewayFor([await startFakeEngine()], { drainTimeoutMs: 20_000 });
  const socket = createConnection(gateway.port, '127.0.0.1').on('error', () => {});
  await once(socket, 'connect');
  await fetch(`${gateway.url}/livez`);
  await gateway.drain();
});

test('cuts off a stream that does not end in time, and says so in it', async () => {
  const engine = await startFakeEngine({ script: answerForever });
  const gateway = await gatewayFor([engine], { drainTimeoutMs: 50 });
  const response = await gateway.chat(streaming);
  await gateway.drain();
  expect(await response.text()).toMatch(/"code":"shutting_down"\}\}\n\n$/);
  await engine.received[0]!.closed;
});

test('cuts off a request that has no answer yet with a 503', async () => {
  const engine = await startFakeEngine({ script: () => {} });
  const gateway = await gatewayFor([engine], { drainTimeoutMs: 50 });
  const received = engine.nextReceived();
  const response = gateway.chat(chatBody());
  await received;
  await gateway.drain();
  expect(await errorOf(await response)).toMatchObject({ status: 503, code: 'shutting_down' });
});
