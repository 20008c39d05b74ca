import { createConnection } from 'node:net';
import { expect, test } from 'vitest';
import { startFakeEngine } from '../fixtures/fake-engine.ts';
import { chatBody, errorOf, gatewayFor, until } from './start-gateway.ts';

const json = { 'content-type': 'application/json' };

test.each<
  [string, string | Uint8Array, Record<string, string>, { status: number; code: string; message: RegExp }]
>([
  ['malformed JSON', '{"model":', json, { status: 400, code: 'invalid_json', message: /expected JSON/ }],
  ['no body', '', json, { status: 400, code: 'invalid_json', message: /expected JSON/ }],
  [
    'bytes that are not UTF-8',
    new Uint8Array([0x7b, 0xff, 0x7d]),
    json,
    { status: 400, code: 'invalid_utf8', message: /expected UTF-8/ },
  ],
  [
    'an array',
    '[]',
    json,
    { status: 400, code: 'invalid_type', message: /expected a JSON object, got an array/ },
  ],
  ['null', 'null', json, { status: 400, code: 'invalid_type', message: /got null/ }],
  [
    'no model',
    '{"messages":[]}',
    json,
    { status: 400, code: 'missing_required_parameter', message: /^model: expected .*got nothing/ },
  ],
  [
    'a model that is a number',
    '{"model":7}',
    json,
    { status: 400, code: 'invalid_type', message: /^model: expected a string, got a number/ },
  ],
  [
    'a model without a name',
    '{"model":""}',
    json,
    { status: 400, code: 'invalid_type', message: /^model: .*an empty string/ },
  ],
  [
    'another content type',
    '{}',
    { 'content-type': 'text/plain' },
    { status: 415, code: 'invalid_content_type', message: /expected application\/json, got "text\/plain"/ },
  ],
  [
    'a compressed body',
    'zzz',
    { ...json, 'content-encoding': 'gzip' },
    { status: 415, code: 'unsupported_content_encoding', message: /expected none/ },
  ],
])('refuses %s and never asks an engine', async (_, body, headers, expected) => {
  const engine = await startFakeEngine();
  const gateway = await gatewayFor([engine]);
  const error = await errorOf(await gateway.chat(body, { headers }));
  expect(error).toMatchObject({
    status: expected.status,
    code: expected.code,
    type: 'invalid_request_error',
  });
  expect(error.message).toMatch(expected.message);
  expect(engine.received).toHaveLength(0);
});

test('refuses a body over the limit, and says the limit and the size', async () => {
  const engine = await startFakeEngine();
  const gateway = await gatewayFor([engine], { maxBodyBytes: 100 });
  const error = await errorOf(await gateway.chat(chatBody({ filler: 'x'.repeat(200) })));
  expect(error).toMatchObject({ status: 413, code: 'body_too_large' });
  expect(error.message).toMatch(/at most 100 bytes, got \d+ bytes/);
  expect(engine.received).toHaveLength(0);
});

test('refuses a body over the limit whose length is not said beforehand', async () => {
  const gateway = await gatewayFor([await startFakeEngine()], { maxBodyBytes: 100 });
  const body = new Blob(['x'.repeat(200)]).stream();
  const init = { body, duplex: 'half' } as RequestInit;
  expect(await errorOf(await gateway.chat('', init))).toMatchObject({ status: 413, code: 'body_too_large' });
});

test('a client that goes away in the middle of its body is logged as that', async () => {
  const gateway = await gatewayFor([await startFakeEngine()]);
  const socket = createConnection(gateway.port, '127.0.0.1');
  const head =
    'POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n';
  socket.write(`${head}\r\n{"model"`, () => socket.destroy());
  const line = await until(
    () => gateway.logLines.find(({ msg }) => msg === 'request'),
    (found) => found !== undefined,
  );
  expect(['incomplete_body', 'client_closed_request']).toContain(line?.errorCode);
});

test('the body goes to the engine byte for byte', async () => {
  const engine = await startFakeEngine();
  const gateway = await gatewayFor([engine]);
  const body = Buffer.from('{ "model" :"base",\n "seed": 1.0e2, "unheard_of": [ "ü" , null] }');
  expect((await gateway.chat(body)).status).toBe(200);
  expect(engine.received[0]?.body).toEqual(body);
});
