// The gateway as a process of its own: how it starts, refuses to start, traces and ends.

import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { expect, onTestFinished, test } from 'vitest';
import { answerForever, startFakeEngine } from '../fixtures/fake-engine.ts';
import { chatBody } from './start-gateway.ts';

const mainPath = join(import.meta.dirname, '../../gateway/main.ts');

function startProcess(args: string[], env: Record<string, string> = {}) {
  const child = spawn(process.execPath, [mainPath, ...args], { env: { PATH: process.env.PATH, ...env } });
  onTestFinished(() => void child.kill('SIGKILL'));
  return child;
}

/** Starts a gateway on a free port; resolves when it says that it is ready. */
async function startReady(engineUrl: string, env: Record<string, string> = {}) {
  const child = startProcess(['--engine', engineUrl, '--port', '0'], env);
  const exited = once(child, 'exit') as Promise<[number | null, string | null]>;
  for await (const line of createInterface(child.stdout)) {
    const { msg, port } = JSON.parse(line) as { msg: string; port?: number };
    if (msg === 'ready') return { child, exited, url: `http://127.0.0.1:${port}` };
  }
  throw new Error('the gateway ended before it was ready');
}

const post = (url: string, body: object, headers: Record<string, string> = {}) =>
  fetch(`${url}/v1/chat/completions`, {
    method: 'POST',
    headers: { 'content-type': 'application/json', ...headers },
    body: JSON.stringify(body),
  });

test('refuses to listen to the world without keys, in one line that says what to do', async () => {
  const child = startProcess(['--engine', 'http://127.0.0.1:1', '--host', '0.0.0.0']);
  const text = (await child.stderr.setEncoding('utf8').toArray()).join('');
  expect(text).toMatch(/^gateway: no API keys are configured.*--api-keys-file.*\n$/);
  const code = child.exitCode ?? (await once(child, 'exit'))[0];
  expect(code).toBe(1);
});

test('refuses a port that is taken', async () => {
  const engine = await startFakeEngine();
  const child = startProcess(['--engine', engine.url, '--port', String(engine.port)]);
  const exited = once(child, 'exit');
  expect((await child.stderr.setEncoding('utf8').toArray()).join('')).toContain('EADDRINUSE');
  expect((await exited)[0]).toBe(1);
});

test('on SIGTERM a stream in flight ends as the engine meant it, then the process', async () => {
  const engine = await startFakeEngine({ script: answerForever });
  const { child, exited, url } = await startReady(engine.url);
  const received = engine.nextReceived();
  const response = await post(url, chatBody({ stream: true }));
  child.kill('SIGTERM');
  const { res } = await received;
  res.end('data: [DONE]\n\n');
  expect(await response.text()).toMatch(/data: \[DONE\]\n\n$/);
  expect(await exited).toEqual([0, null]);
});

test("exports a span that continues the client's trace, and the engine's continues it", async () => {
  const exported: string[] = [];
  const collector = createServer(async (req, res) => {
    exported.push(Buffer.concat(await req.toArray()).toString());
    res.end();
  });
  collector.listen(0, '127.0.0.1');
  await once(collector, 'listening');
  onTestFinished(() => void collector.close());
  const engine = await startFakeEngine();
  const { child, exited, url } = await startReady(engine.url, {
    OTEL_EXPORTER_OTLP_ENDPOINT: `http://127.0.0.1:${(collector.address() as AddressInfo).port}`,
  });

  const traceId = '0af7651916cd43dd8448eb211c80319c';
  await post(url, chatBody(), { traceparent: `00-${traceId}-b7ad6b7169203331-01` });
  child.kill('SIGTERM');
  await exited;
  const spans = exported
    .flatMap((text) => JSON.parse(text).resourceSpans)
    .flatMap(({ scopeSpans }) => scopeSpans)
    .flatMap(({ spans }) => spans);
  expect(spans).toHaveLength(1);
  expect(spans[0]).toMatchObject({ name: 'chat base', traceId, parentSpanId: 'b7ad6b7169203331' });
  expect(engine.received[0]?.headers.traceparent).toBe(`00-${traceId}-${spans[0].spanId}-01`);
  expect(exported.join('')).not.toContain('a secret question');
});

test('ends when it is told to, though nobody reads its log any more', async () => {
  const engine = await startFakeEngine();
  const { child, exited } = await startReady(engine.url);
  child.stdout.destroy();
  child.stderr.destroy();
  child.kill('SIGTERM');
  expect(await exited).toEqual([0, null]);
});
