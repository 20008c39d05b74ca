// Hostile clients, as bytes on sockets: what they send reaches no engine, ends no gateway, and is written in no log.

import type { RequestListener } from 'node:http';
import { connect } from 'node:net';
import { gzipSync } from 'node:zlib';
import { expect, onTestFinished, test } from 'vitest';
import { serve } from '../../../gateway/serve.ts';
import { startFakeEngine } from '../../fixtures/fake-engine.ts';
import { type SeededRandom, seededRandom } from '../../fixtures/seeded-random.ts';
import { chatBody, gatewayFor, type TestGateway, until } from '../start-gateway.ts';

const key = 'key-of-team-a-0123456789';
const prompt = 'a secret question';
const apiKeys = new Map([['team-a', key]]);
const seed = Number(process.env.MOTET_FUZZ_SEED ?? 1);
const numRounds = Number(process.env.MOTET_FUZZ_ROUNDS ?? 300);

/** Sends the bytes on a connection of their own; resolves with all that comes back when the gateway ends it. */
async function exchange(port: number, bytes: string | Buffer, { hangUp = false } = {}): Promise<string> {
  const socket = connect(port, '127.0.0.1');
  let answer = '';
  socket.on('data', (data) => {
    answer += data.toString('latin1');
  });
  // Who sends on after a refusal is reset, and may lose the answer.
  socket.on('error', () => {
    answer ||= 'HTTP/1.1 0 reset';
  });
  const closed = new Promise((resolve) => socket.once('close', resolve));
  if (hangUp) socket.end(bytes);
  else socket.write(bytes);
  await closed;
  return answer;
}

/** In place of a status. */
const reset = 0;

const statusesOf = (answer: string) =>
  [...answer.matchAll(/^HTTP\/1\.1 (\d+)/gm)].map(([, code]) => Number(code));

type Parts = { path?: string; headers?: string[]; body?: string | Buffer; withKey?: boolean };

/** A request of one connection, good but for what is given. */
function request({
  path = '/v1/chat/completions',
  headers = [],
  body = JSON.stringify(chatBody()),
  withKey = true,
}: Parts) {
  const given = headers.map((header) => header.slice(0, header.indexOf(':')).toLowerCase());
  const own = [
    'Host: gateway',
    'Connection: close',
    ...(withKey ? [`Authorization: Bearer ${key}`] : []),
    'Content-Type: application/json',
    `Content-Length: ${Buffer.byteLength(body)}`,
  ].filter((header) => !given.includes(header.slice(0, header.indexOf(':')).toLowerCase()));
  const head = [`POST ${path} HTTP/1.1`, ...own, ...headers, '', ''].join('\r\n');
  return Buffer.concat([Buffer.from(head, 'latin1'), Buffer.from(body)]);
}

/** It lives, and nothing of a client is in its log. */
async function expectSound(gateway: TestGateway): Promise<void> {
  expect((await fetch(`${gateway.url}/livez`)).status).toBe(200);
  const text = JSON.stringify(await gateway.wholeLog());
  for (const secret of [key, prompt, 'fake words']) expect(text).not.toContain(secret);
}

const withKey = `Authorization: Bearer ${key}`;
const chunked = 'Transfer-Encoding: chunked';
const inner = `POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n${withKey}\r\nContent-Length: 0\r\n\r\n`;
const withoutModel = { messages: [{ role: 'user', content: prompt }] };

test.each<[string, Buffer | string, number[]]>([
  ['two keys', request({ headers: [withKey, withKey] }), [401]],
  ['a key, then another', request({ headers: [withKey, 'Authorization: Bearer other'] }), [401]],
  [
    'no key, then one in a folded line',
    request({ headers: ['X-A: b', ` ${withKey}`], withKey: false }),
    [400, 401],
  ],
  ['a key before a NUL', request({ headers: [`Authorization: Bearer ${key}\0x`] }), [400]],
  ['a bare CR in a header', request({ headers: ['X-A: b\rX-B: c'] }), [400]],
  ['a space before the colon', request({ headers: ['X-A : b'] }), [400]],
  ['a header without a colon', request({ headers: ['X-A'] }), [400]],
  ['two lengths', request({ headers: ['Content-Length: 5', 'Content-Length: 6'] }), [400]],
  ['a length below zero', request({ headers: ['Content-Length: -1'] }), [400]],
  ['a length that is no number', request({ headers: ['Content-Length: 0x10'] }), [400]],
  [
    'a length and chunks',
    request({ headers: ['Content-Length: 4', chunked], body: `0\r\n\r\n${inner}` }),
    [400],
  ],
  ['chunks twice', request({ headers: [chunked, 'Transfer-Encoding: identity'], body: '0\r\n\r\n' }), [400]],
  ['chunks in disguise', request({ headers: ['Transfer-Encoding: xchunked'], body: inner }), [400]],
  [
    'a chunk of a size that is no number',
    request({ headers: [chunked, 'X: y'], body: 'zz\r\n{}\r\n0\r\n\r\n' }),
    [400],
  ],
  ['headers of 64 KiB', request({ headers: [`X-A: ${'a'.repeat(65_536)}`] }), [431, reset]],
  [
    'ten thousand headers',
    request({ headers: Array.from({ length: 10_000 }, (_, i) => `X-${i}: 1`) }),
    [431, reset],
  ],
  ['a path of 64 KiB', request({ path: `/${'a'.repeat(65_536)}` }), [431, reset]],
  ['a NUL in the path', request({ path: '/v1/chat\0/completions' }), [400]],
  ['an encoded NUL in the path', request({ path: '/v1/models/%00' }), [404, 405]],
  ['a path that climbs', request({ path: '/console/../v1/chat/completions' }), [404, 405]],
  ['a path that climbs, encoded', request({ path: '/console/%2e%2e/%2e%2e/package.json' }), [404, 405]],
  ['a path that climbs by an encoded slash', request({ path: '/console/..%2f..%2fmain.ts' }), [404, 405]],
  ['a path with a broken escape', request({ path: '/v1/models/%zz' }), [404, 405]],
  ['two slashes', request({ path: '//v1/chat/completions' }), [404]],
  [
    'a gzip bomb',
    request({ headers: ['Content-Encoding: gzip'], body: gzipSync(Buffer.alloc(1 << 24, 'x')) }),
    [415],
  ],
  ['a body in an encoding of no name', request({ headers: ['Content-Encoding: bomb'] }), [415]],
  [
    'a body over the bound',
    request({ body: JSON.stringify(chatBody({ a: 'x'.repeat(2 << 20) })) }),
    [413, reset],
  ],
  [
    'chunks over the bound',
    request({ headers: [chunked, 'X: y'], body: `300000\r\n${'x'.repeat(0x300000)}\r\n0\r\n\r\n` }),
    [400, 413, reset],
  ],
  ['a form', request({ headers: ['Content-Type: text/plain'] }), [415]],
  ['bytes that are not UTF-8', request({ body: Buffer.from([0x7b, 0xff, 0xfe, 0x7d]) }), [400]],
  ['JSON that breaks off', request({ body: `{"model":"base","messages":"${prompt}` }), [400]],
  [
    '100,000 brackets',
    request({ body: `{"model":"base","messages":${'['.repeat(1e5)}${']'.repeat(1e5)}}` }),
    [400],
  ],
  ['100,000 braces', request({ body: `${'{"a":'.repeat(1e5)}1${'}'.repeat(1e5)}` }), [400]],
  [
    'a model by the prototype',
    request({ body: JSON.stringify(withoutModel).replace('{', '{"__proto__":{"model":"base"},') }),
    [400],
  ],
  ['a model by the constructor', request({ body: '{"constructor":{"prototype":{"model":"base"}}}' }), [400]],
  [
    'a model named like a field of objects',
    request({ body: JSON.stringify(chatBody({ model: '__proto__' })) }),
    [404],
  ],
  ['a model named like a method', request({ body: JSON.stringify(chatBody({ model: 'toString' })) }), [404]],
  ['a list in place of a body', request({ body: '["base"]' }), [400]],
  ['a tunnel', `CONNECT gateway:80 HTTP/1.1\r\nHost: x\r\n${withKey}\r\n\r\n`, []],
  ['HTTP/2 by force', 'PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n', [400, 505]],
  ['HTTP/0.9', 'GET /\r\n\r\n', [400, 401]],
  ['no host', `POST /v1/chat/completions HTTP/1.1\r\n${withKey}\r\n\r\n`, [400]],
  ['a greeting of TLS', Buffer.from('16030100a5010000a10303', 'hex'), [400]],
  ['an expectation that nobody meets', request({ headers: ['Expect: a-miracle'] }), [417]],
])('%s is refused and reaches no engine', async (_, bytes, statuses) => {
  const engine = await startFakeEngine();
  const gateway = await gatewayFor([engine], { apiKeys });
  const got = statusesOf(await exchange(gateway.port, bytes));
  if (statuses.length > 0) {
    expect(got).toHaveLength(1);
    expect(statuses).toContain(got[0]);
  } else expect(got).toEqual([]);
  expect(engine.received).toEqual([]);
  await expectSound(gateway);
});

test('of what a client sends an engine gets no header that is not on the list', async () => {
  const engine = await startFakeEngine();
  const gateway = await gatewayFor([engine], { apiKeys });
  const smuggled = ['model', 'tenant', 'adapters', 'usage'].map((name) => `X-Motet-${name}: base`);
  const headers = [
    ...smuggled,
    // A caller may lower its priority, and never raise it.
    'X-Motet-Priority: 7',
    'Cookie: a=b',
    'X-Forwarded-For: 1.2.3.4',
    'Connection: close, te',
    'Proxy: x',
  ];
  expect(statusesOf(await exchange(gateway.port, request({ headers })))).toEqual([200]);
  const { headers: seen } = engine.received[0]!;
  for (const name of ['cookie', 'x-forwarded-for', 'proxy', 'authorization'])
    expect(seen).not.toHaveProperty(name);
  for (const [name, value] of Object.entries(seen))
    if (name.startsWith('x-motet-')) expect(['base', '7']).not.toContain(value);
  await expectSound(gateway);
});

/** Changes bytes here and there: other values, cuts, copies, and pieces that parsers know. */
function mutate(bytes: Buffer, random: SeededRandom): Buffer {
  const pieces = [
    '\r\n',
    '\0',
    ':',
    ' ',
    '\r\n\r\n',
    'chunked',
    '%2e',
    '"',
    '[',
    '{',
    '\xff',
    'Content-Length: 9\r\n',
  ];
  let out = bytes;
  for (let left = random.from(1, 4); left > 0; left -= 1) {
    const at = random.below(out.length);
    const end = Math.min(out.length, at + random.below(20));
    const piece = Buffer.from(random.pick(pieces), 'latin1');
    const middle = [Buffer.of(random.below(256)), piece, out.subarray(at, end), Buffer.alloc(0)];
    out = Buffer.concat([out.subarray(0, at), random.pick(middle), out.subarray(end)]);
  }
  return out;
}

test(`requests with bytes changed at random (seed ${seed}) reach an engine whole or not at all`, async () => {
  const engine = await startFakeEngine();
  const gateway = await gatewayFor([engine], { apiKeys });
  const random = seededRandom(seed);
  const strangers = request({ headers: ['Authorization: Bearer key-of-nobody-0123456789'] });
  const ours = request({});
  for (let round = 0; round < numRounds; round += 10) {
    const hangUp = { hangUp: true };
    await Promise.all(
      Array.from({ length: 10 }, (_, i) =>
        exchange(gateway.port, mutate(i % 2 ? ours : strangers, random), hangUp),
      ),
    );
  }
  for (const { path, headers, body } of engine.received) {
    expect(path).toBe('/v1/chat/completions');
    expect(headers['content-type']?.toLowerCase()).toMatch(/^application\/json/);
    expect(Object.keys(headers).filter((name) => /^(authorization|cookie)$/.test(name))).toEqual([]);
    expect(JSON.parse(body.toString())).toMatchObject({ model: 'base' });
  }
  // Those of strangers are none of them.
  const admitted = (await gateway.wholeLog()).filter(({ tenant }) => tenant === 'team-a').length;
  expect(engine.received.length).toBeLessThanOrEqual(admitted);
  expect((await gateway.chat(chatBody(), { headers: { authorization: `Bearer ${key}` } })).status).toBe(200);
  expect((await fetch(`${gateway.url}/livez`)).status).toBe(200);
  expect(JSON.stringify(await gateway.wholeLog())).not.toContain(prompt);
});

test('a client that is slow with its headers, its body, or that sends nothing is sent away', async () => {
  const answerWhole: RequestListener = (req, res) => void req.resume().on('end', () => res.end());
  const bounds = { maxHeaderBytes: 1024, headersMs: 100, requestMs: 300, checkMs: 20 };
  const serving = await serve(answerWhole, 0, '127.0.0.1', bounds);
  onTestFinished(() => serving.drain(10, () => {}));
  expect(statusesOf(await exchange(serving.port, 'POST / HTTP/1.1\r\nHost: x\r\nX-A: '))).toEqual([408]);
  expect(
    statusesOf(await exchange(serving.port, 'POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nabc')),
  ).toEqual([408]);
  expect(statusesOf(await exchange(serving.port, ''))).toEqual([408]);
});

test('clients that stop in the middle of a body leave nothing behind', async () => {
  const engine = await startFakeEngine();
  const gateway = await gatewayFor([engine], { apiKeys });
  const whole = request({});
  const half = whole.subarray(0, whole.length - 10);
  await Promise.all(Array.from({ length: 20 }, () => exchange(gateway.port, half, { hangUp: true })));
  const inFlight = async () => {
    const text = await (await fetch(`${gateway.url}/metrics`)).text();
    return /^motet_gateway_requests_in_flight (\d+)$/m.exec(text)?.[1];
  };
  // The one that asks.
  await until(inFlight, (count) => count === '1');
  expect(engine.received).toEqual([]);
  await expectSound(gateway);
});
