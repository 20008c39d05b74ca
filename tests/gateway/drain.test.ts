import { once } from 'node:events';
import { createConnection } from 'node:net';
import { expect, test } from 'vitest';
import { answerForever, chunkEvent, startFakeEngine } from '../fixtures/fake-engine.ts';
import { chatBody, errorOf, gatewayFor } from './start-gateway.ts';

const streaming = chatBody({ stream: true });

test('takes no more requests, fails readyz, and lets a stream in flight end', async () => {
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

test('refuses what comes in on a connection that is still in use', async () => {
  const engine = await startFakeEngine({ script: answerForever });
  const gateway = await gatewayFor([engine], { drainTimeoutMs: 20_000 });
  const received = engine.nextReceived();
  const socket = createConnection(gateway.port, '127.0.0.1').setEncoding('utf8');
  const body = JSON.stringify(streaming);
  const head = 'POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json';
  const chat = `${head}\r\nContent-Length: ${body.length}\r\n\r\n${body}`;
  socket.write(chat);
  const { res } = await received;
  const drained = gateway.drain();
  socket.write(`${chat}GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n`, () => res.end('data: [DONE]\n\n'));

  const text = (await socket.toArray()).join('');
  expect(text).toContain('data: [DONE]');
  expect(text).toMatch(/HTTP\/1.1 503 .*Retry-After: 1\r\n.*"code":"shutting_down"/s);
  expect(engine.received).toHaveLength(1);
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
