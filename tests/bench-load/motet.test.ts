// `motet bench` as a process: against a real engine whose own counters are compared, against servers that fail, with an engine
// that it starts itself, and interrupted.

import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { expect, onTestFinished, test } from 'vitest';
import type { AdapterList } from '../../engine/protocol.ts';
import { answer, answerForever, refuse, startFakeEngine } from '../fixtures/fake-engine.ts';
import { cacheFolder } from '../fixtures/models.ts';
import { getJson, startProcess } from '../fixtures/processes.ts';

const root = join(import.meta.dirname, '../..');
const tiny = join(root, 'tests/goldens/tiny/llama3');

function motet(args: string[], env: Record<string, string> = {}) {
  const child = spawn(join(root, 'scripts/motet.sh'), args, { env: { ...process.env, ...env } });
  onTestFinished(() => void child.kill('SIGKILL'));
  const text = { stdout: '', stderr: '' };
  for (const name of ['stdout', 'stderr'] as const) {
    child[name].setEncoding('utf8').on('data', (part) => {
      text[name] += part;
    });
  }
  return { child, ended: once(child, 'close').then(([code]) => ({ code: code as number | null, ...text })) };
}

function scratch(): string {
  const folder = mkdtempSync(join(tmpdir(), 'motet-bench-test-'));
  onTestFinished(() => rmSync(folder, { recursive: true }));
  return folder;
}

// biome-ignore lint/suspicious/noExplicitAny: the fields are what is asserted
const readJson = (path: string): any => JSON.parse(readFileSync(path, 'utf8'));

test('counts what a real engine counts: tokens, requests of each adapter, and lengths to the token', async () => {
  const adapter = join(tiny, 'adapter');
  const engine = await startProcess('engine', [
    ...['--model', tiny, '--served-name', 'base', '--cache', cacheFolder, '--port', '0'],
    ...['--device-memory', '32MiB', '--adapter', `first=${adapter}`],
  ]);
  onTestFinished(async () => void (await engine.stop()));
  const json = join(scratch(), 'report.json');
  const lengths = '--prompt-tokens 5:40 --output-tokens 3:9 --base-share 0.5 --vocab 512';
  const load = '--requests 30 --warmup 0 --concurrency 4 --slo e2e=60000';
  const args = `bench --url ${engine.url}/v1 ${load} ${lengths} --json ${json} --json-samples`;
  const run = motet(args.split(' '));
  const { code, stdout, stderr } = await run.ended;
  expect(stderr).toBe('');
  expect(code).toBe(0);

  const { summary, samples, load: shape, server } = readJson(json);
  const metrics = await (await fetch(`${engine.url}/metrics`)).text();
  const counter = (name: string) => Number(new RegExp(`^${name}\\{.*\\} (\\d+)$`, 'm').exec(metrics)![1]);
  expect(summary).toMatchObject({ numDone: 30, numFailed: 0, numOtherLength: 0, numWithoutUsage: 0 });
  expect(summary.promptTokens).toBe(counter('vllm:prompt_tokens_total'));
  expect(summary.outputTokens).toBe(counter('vllm:generation_tokens_total'));
  expect(counter('vllm:e2e_request_latency_seconds_count')).toBe(30);
  const { data } = await getJson<AdapterList>(`${engine.url}/v1/adapters`);
  const ofAdapter = summary.voices.find((voice: { adapter: string | null }) => voice.adapter === 'first');
  expect(ofAdapter.numRequests).toBe(data[0]!.requests);

  expect(shape).toMatchObject({ seed: 1, promptTokens: { kind: 'uniform', low: 5, high: 40 } });
  expect(server).toMatchObject({ baseModel: 'base', adapters: ['first'], startedHere: null });
  expect(samples).toHaveLength(30);
  for (const { outputTokens, wantedTokens, ttftMs, e2eMs } of samples) {
    expect(outputTokens).toBe(wantedTokens);
    expect(ttftMs).toBeLessThanOrEqual(e2eMs);
  }
  expect(stdout).toContain(`30 done, 0 failed`);
  expect(stdout).toContain('100.0 % of requests (e2e ≤ 60000 ms by 30)');
});

test('starts an engine and a gateway with random adapters, loads them, and leaves nothing behind', async () => {
  const json = join(scratch(), 'report.json');
  // Too small an arena for them: it is made larger.
  const env = { TMPDIR: scratch(), MOTET_DEVICE_MEMORY: '4MiB' };
  const load = '--rate 100 --requests 20 --warmup 2 --adapter-popularity zipf:1';
  const lengths = '--shared-prefix-tokens 16 --prompt-tokens 8 --output-tokens 4';
  const server = `--serve ${tiny} --register 12 --register-rank 2`;
  const args = `bench ${server} ${load} ${lengths} --vocab 512 --json ${json} -- --max-sequences 8`;
  const run = motet(args.split(' '), env);
  const { code, stdout, stderr } = await run.ended;
  expect(stderr).toBe(
    `starting an engine with ${tiny}\nstarting it again with --device-memory ${7 << 20}, which holds 12 adapters\n`,
  );
  expect(code).toBe(0);
  expect(stdout).toContain('open loop, 100 requests/s, burstiness 1, times count from the scheduled arrival');
  expect(stdout).toContain('llama3 on this machine, through the gateway, --max-sequences 8');
  expect(stdout).toContain('voices      12 adapters, by Zipf(1)');

  const { summary, server: started, client } = readJson(json);
  expect(started.startedHere).toMatchObject({ arenaBytes: 7 << 20, adapterBytes: 3 << 20 });
  expect(summary).toMatchObject({ numDone: 20, promptTokens: 20 * 24, outputTokens: 20 * 4 });
  expect(started.adapters).toHaveLength(12);
  expect(client.isa).toMatch(/^(scalar|avx2|avxvnni|avx512|amx)$/);
  await expect(fetch(started.url)).rejects.toThrow();
  expect(readdirSync(env.TMPDIR)).toEqual([]);
});

test('holds conversations with a real engine, which finds their earlier turns in its cache', async () => {
  const engine = await startProcess('engine', [
    ...['--model', tiny, '--served-name', 'base', '--cache', cacheFolder, '--port', '0'],
    ...['--device-memory', '32MiB'],
  ]);
  onTestFinished(async () => void (await engine.stop()));
  const json = join(scratch(), 'report.json');
  const load =
    '--turns 3 --concurrency 3 --conversations 4 --think-time exp:0.01 --warmup 0 --shared-prefix-tokens 20';
  const lengths = '--prompt-tokens 30 --follow-up-tokens 10:20 --output-tokens 8';
  const args = `bench --url ${engine.url} ${load} ${lengths} --json ${json} --json-samples`;
  const { code, stdout, stderr } = await motet(args.split(' ')).ended;
  expect(stderr).toBe('');
  expect(code).toBe(0);

  const { summary, samples } = readJson(json);
  const metrics = await (await fetch(`${engine.url}/metrics`)).text();
  const counter = (name: string) => Number(new RegExp(`^${name}\\{.*\\} (\\d+)$`, 'm').exec(metrics)![1]);
  expect(summary).toMatchObject({ numDone: 12, numFailed: 0 });
  expect(summary.conversations).toMatchObject({ numComplete: 4, numFailed: 0, numCut: 0 });
  expect(summary.promptTokens).toBe(counter('vllm:prompt_tokens_total'));
  expect(summary.cachedShare).toBeCloseTo(counter('vllm:prefix_cache_hits_total') / summary.promptTokens);
  expect(summary.conversations.laterTurns.cachedShare).toBeGreaterThan(
    summary.conversations.firstTurn.cachedShare,
  );
  // Each turn has all before it.
  const lengthsOf = (index: number) =>
    samples
      .filter((sample: { index: number }) => sample.index === index)
      .toSorted((a: { turn: number }, b: { turn: number }) => a.turn - b.turn)
      .map((sample: { promptTokens: number }) => sample.promptTokens);
  const [first, second, third] = lengthsOf(2);
  expect(second).toBeGreaterThan(first);
  expect(third).toBeGreaterThan(second);
  expect(stdout).toContain('of conversations: 4 complete');
  expect(stdout).toContain('one of 1 system messages of 20 words, then 30 words, later 10 to 20');
});

test('Ctrl-C ends the load and reports what was measured', async () => {
  const engine = await startFakeEngine();
  engine.script = (received) => (engine.received.length <= 5 ? answer(received) : answerForever(received));
  const run = motet([
    'bench',
    '--url',
    engine.url,
    '--endpoint',
    'chat',
    '--warmup',
    '0',
    '--concurrency',
    '1',
  ]);
  while (engine.received.length < 6) await engine.nextReceived();
  run.child.kill('SIGINT');
  const { code, stdout, stderr } = await run.ended;
  expect(stderr).toBe('stopping; what was measured is reported\n');
  expect(stdout).toContain('requests    5 done, 0 failed, 1 cancelled');
  expect(stdout).toContain('answers without usage, whose tokens are not counted: 5');
  expect(code).toBe(130);
});

test('reports refusals by code and with what the server said, and exits with 1 when nothing was answered', async () => {
  const engine = await startFakeEngine({ script: refuse(429, 'overloaded') });
  const key = 'a-secret-key';
  const json = join(scratch(), 'report.json');
  const args = ['bench', '--url', engine.url, '--requests', '4', '--warmup', '0', '--json', json];
  const { code, stdout, stderr } = await motet(args, { MOTET_API_KEY: key }).ended;
  expect(code).toBe(1);
  expect(stdout).toContain('0 done, 4 failed');
  expect(stdout).toContain('4 × http_429: the fake engine refuses');
  expect(engine.received[0]!.headers.authorization).toBe(`Bearer ${key}`);
  for (const text of [stdout, stderr, readFileSync(json, 'utf8')]) expect(text).not.toContain(key);
});

test('says so at once when not even the warm-up is answered', async () => {
  const { url } = await startFakeEngine({ script: refuse(401, 'unauthorized') });
  const { code, stdout, stderr } = await motet(['bench', '--url', url, '--warmup', '2']).ended;
  expect({ code, stdout, stderr }).toEqual({
    code: 1,
    stdout: '',
    stderr:
      'motet bench: no request of the warm-up was answered; the first one: http_401: the fake engine refuses\n',
  });
});

test.each([
  [[], 2, /^Usage: motet COMMAND/],
  [['serve'], 2, /^motet: unknown command serve\n\nUsage: motet COMMAND/],
  [['bench', '--rate', 'x'], 2, /^motet bench: --rate: expected a number from 0.001 to 100000, got "x"\n$/],
  [
    ['bench', '--json', '/nowhere/x.json'],
    2,
    /^motet bench: --json: expected a file .*, got ENOENT of \/nowhere\/x.json\n$/,
  ],
])('%j is refused with what would be right', async (args, expected, message) => {
  const { code, stderr } = await motet(args).ended;
  expect(code).toBe(expected);
  expect(stderr).toMatch(message);
});
