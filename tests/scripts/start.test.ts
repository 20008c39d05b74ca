// `npm start` after its set-up: a real engine with the real model and the example adapters, as a newcomer sees it.

import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import type { AddressInfo } from 'node:net';
import { createServer } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { expect, onTestFinished, test } from 'vitest';
import { freePort } from '../fixtures/free-port.ts';

const root = join(import.meta.dirname, '../..');

function start(port: number, env: Record<string, string> = {}) {
  const child = spawn(process.execPath, [join(root, 'scripts/start.ts')], {
    env: { ...process.env, MOTET_PORT: String(port), ...env },
  });
  onTestFinished(() => void child.kill('SIGTERM'));
  return { child, exited: once(child, 'exit') as Promise<[number | null, string | null]> };
}

/** The right answer to the question that the summary asks. */
function expectedAnswer(name: string): string {
  const [line = ''] = readFileSync(join(root, 'examples/adapters', name, 'eval.jsonl'), 'utf8').split(
    '\n',
    1,
  );
  return (JSON.parse(line) as { answer: string }).answer;
}

test('prints one request per adapter that can be pasted and is answered as the adapter was trained to', async () => {
  const { child, exited } = start(await freePort());
  const lines: string[] = [];
  for await (const line of createInterface(child.stdout)) {
    lines.push(line);
    if (line === 'Ctrl-C stops it.') break;
  }
  const requests = lines.flatMap((line) => {
    const [, url = '', body = ''] = /^ {2}curl -s (\S+\/chat\/completions) .* -d '(.*)'$/.exec(line) ?? [];
    return url === '' ? [] : [{ url, body: body.replaceAll("'\\''", "'") }];
  });
  const { adapters } = JSON.parse(readFileSync(join(root, 'examples/adapters/index.json'), 'utf8')) as {
    adapters: { name: string }[];
  };
  expect(requests).toHaveLength(adapters.length + 1);

  for (const { url, body } of requests.slice(0, -1)) {
    const response = await fetch(url, {
      method: 'POST',
      headers: { 'content-type': 'application/json' },
      body,
    });
    const { model, choices } = (await response.json()) as {
      model: string;
      choices: { message: { content: string } }[];
    };
    expect(`${model}: ${choices[0]?.message.content}`).toBe(`${model}: ${expectedAnswer(model)}`);
  }
  child.kill('SIGTERM');
  expect(await exited).toEqual([0, null]);
});

test('says so and ends when its port is taken', async () => {
  const server = createServer().listen(0, '127.0.0.1');
  await once(server, 'listening');
  onTestFinished(() => void server.close());
  const { child, exited } = start((server.address() as AddressInfo).port);
  const text = (await child.stderr.setEncoding('utf8').toArray()).join('');
  expect(text).toMatch(/port \d+ cannot be used .*MOTET_PORT=N chooses another/);
  expect((await exited)[0]).toBe(1);
});

test('starts with API keys and a quiet log, and ends with its terminal', async () => {
  const folder = mkdtempSync(join(tmpdir(), 'motet-'));
  onTestFinished(() => rmSync(folder, { recursive: true }));
  const keysFile = join(folder, 'keys');
  writeFileSync(keysFile, 'me 0123456789abcdef\n');
  const port = await freePort();
  const { child, exited } = start(port, { MOTET_API_KEYS_FILE: keysFile, MOTET_LOG_LEVEL: 'error' });
  const lines: string[] = [];
  for await (const line of createInterface(child.stdout)) {
    lines.push(line);
    if (line === 'Ctrl-C stops it.') break;
  }
  expect(lines.join('\n')).toContain("-H 'authorization: Bearer YOUR-KEY'");
  child.kill('SIGHUP');
  expect(await exited).toEqual([0, null]);
  await expect(fetch(`http://127.0.0.1:${port}/livez`)).rejects.toThrow('fetch failed');
});

test("serves a model of the user's own without the example adapters", async () => {
  const port = await freePort();
  const { child, exited } = start(port, { MOTET_MODEL: join(root, 'tests/goldens/tiny/qwen3') });
  const lines: string[] = [];
  for await (const line of createInterface(child.stdout)) {
    lines.push(line);
    if (line === 'Ctrl-C stops it.') break;
  }
  expect(lines.join('\n')).toContain(`Motet serves qwen3 and 0 adapters at http://127.0.0.1:${port}`);
  const response = await fetch(`http://127.0.0.1:${port}/v1/completions`, {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify({ model: 'qwen3', prompt: 'The sea', max_tokens: 4 }),
  });
  expect(response.status).toBe(200);
  child.kill('SIGTERM');
  expect(await exited).toEqual([0, null]);
});

test('ends with an error when the engine does', async () => {
  const { child, exited } = start(await freePort());
  const errors = child.stderr.setEncoding('utf8').toArray();
  for await (const line of createInterface(child.stdout)) if (line === 'Ctrl-C stops it.') break;
  const [enginePid] = readFileSync(`/proc/${child.pid}/task/${child.pid}/children`, 'utf8').split(' ');
  process.kill(Number(enginePid), 'SIGKILL');
  expect((await exited)[0]).toBe(1);
  expect((await errors).join('')).toContain('the engine ended by itself (SIGKILL)');
});
