/** The engine as a process of its own, with the native core and a tiny checkpoint: start, serve, signals, refusals. */
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtempSync, readFileSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { describe, expect, onTestFinished, test } from 'vitest';
import { digestOfFolder } from '../../engine/adapters/adapter-file.ts';
import { enginePaths } from '../../engine/protocol.ts';
import { certificates, startHttpsSource } from '../fixtures/https-source.ts';

const root = join(import.meta.dirname, '../..');
const tiny = join(root, 'tests/goldens/tiny/llama3');
const adapter = join(tiny, 'adapter');

interface Line {
  msg: string;
  [field: string]: unknown;
}

interface EngineProcess {
  child: ChildProcess;
  /** Resolves with the next line of that message; rejects when the process ends before it. */
  line: (msg: string) => Promise<Line>;
  stderr: () => string;
  exit: Promise<number | null>;
}

function spawnEngine(args: string[], env: Record<string, string> = {}): EngineProcess {
  const child = spawn(process.execPath, [join(root, 'engine/main.ts'), ...args], {
    env: { PATH: process.env.PATH, HOME: mkdtempSync(join(tmpdir(), 'motet-')), ...env },
    stdio: ['ignore', 'pipe', 'pipe'],
  });
  onTestFinished(() => void child.kill('SIGKILL'));
  let stderr = '';
  child.stderr.on('data', (chunk) => {
    stderr += chunk;
  });
  const seen: Line[] = [];
  const waiting: { msg: string; resolve: (line: Line) => void; reject: (error: Error) => void }[] = [];
  createInterface({ input: child.stdout }).on('line', (text) => {
    if (!text.startsWith('{')) return;
    const line = JSON.parse(text) as Line;
    seen.push(line);
    for (const waiter of waiting) if (waiter.msg === line.msg) waiter.resolve(line);
  });
  const exit = once(child, 'close').then(([code]) => {
    for (const { reject } of waiting) reject(new Error(`the engine ended with ${code}: ${stderr}`));
    return code as number | null;
  });
  const line = (msg: string) => {
    const found = seen.find((one) => one.msg === msg);
    if (found) return Promise.resolve(found);
    return new Promise<Line>((resolve, reject) => waiting.push({ msg, resolve, reject }));
  };
  return { child, line, stderr: () => stderr, exit };
}

/** The environment of an engine that trusts the https servers of these tests. */
function trustingTestCa(): Record<string, string> {
  const path = join(mkdtempSync(join(tmpdir(), 'motet-')), 'ca.crt');
  writeFileSync(path, certificates().ca);
  return { NODE_EXTRA_CA_CERTS: path };
}

async function ready(args: string[] = [], env: Record<string, string> = {}) {
  const memory = args.includes('--device-memory') ? [] : ['--device-memory', '32MiB'];
  const model = args.includes('--model') ? [] : ['--model', tiny];
  const engine = spawnEngine([...model, '--port', '0', ...memory, ...args], env);
  const { port } = await engine.line('ready');
  const url = `http://127.0.0.1:${port}`;
  const post = (path: string, body: object) =>
    fetch(url + path, {
      method: 'POST',
      headers: { 'content-type': 'application/json' },
      body: JSON.stringify(body),
    });
  return { ...engine, url, post };
}

const completion = { prompt: [1, 2, 3, 4, 5], temperature: 0, max_tokens: 8, ignore_eos: true };

/** An engine that was told to end while it streams eight long sequences. */
async function drainingUnderLoad() {
  const engine = await ready();
  const response = await engine.post(enginePaths.completions, {
    ...completion,
    max_tokens: 900,
    n: 8,
    stream: true,
  });
  engine.child.kill('SIGTERM');
  await engine.line('draining');
  return { ...engine, response };
}

describe('the engine process', () => {
  test('prepares, says when it is ready, and answers as base and as adapter', async () => {
    const { line, url, post } = await ready(['--served-name', 'tiny', '--adapter', `tuned=${adapter}`]);
    expect(await line('preparing')).toMatchObject({ fraction: expect.any(Number) });
    expect((await fetch(url + enginePaths.readyz)).status).toBe(200);
    const texts = [];
    for (const model of ['tiny', 'tuned']) {
      const response = await post(enginePaths.completions, { ...completion, model });
      const body = (await response.json()) as { choices: { text: string }[]; usage: object };
      expect(body.usage).toMatchObject({ prompt_tokens: 5, completion_tokens: 8, total_tokens: 13 });
      texts.push(body.choices[0]?.text);
    }
    expect(texts[0]).not.toBe(texts[1]);
    const { data } = (await (await fetch(url + enginePaths.adapters)).json()) as { data: object[] };
    expect(data).toMatchObject([{ names: ['tuned'], tier: 'device', inFlight: 0 }]);
  });

  test('gives every byte back when an adapter is unloaded', async () => {
    const { url, post } = await ready();
    const arena = async () =>
      ((await (await fetch(url + enginePaths.adapters)).json()) as { arena: object }).arena;
    const before = await arena();
    expect((await post(enginePaths.loadAdapter, { lora_name: 'a', lora_path: adapter })).status).toBe(200);
    expect(await arena()).not.toEqual(before);
    expect((await post(enginePaths.unloadAdapter, { lora_name: 'a' })).status).toBe(200);
    expect(await arena()).toEqual(before);
  });

  test('answers concurrent mixed requests as it answers each alone', async () => {
    const { post } = await ready([
      '--served-name',
      'tiny',
      '--adapter',
      `tuned=${adapter}`,
      '--max-sequences',
      '8',
    ]);
    const bodies = Array.from({ length: 12 }, (_, i) => ({
      ...completion,
      model: i % 2 === 0 ? 'tiny' : 'tuned',
      prompt: Array.from({ length: 3 + 7 * i }, (_, j) => 1 + ((i * 31 + j * 7) % 200)),
    }));
    const answer = async (body: object) => {
      const response = await post(enginePaths.completions, body);
      return ((await response.json()) as { choices: { text: string }[] }).choices[0]?.text;
    };
    const together = await Promise.all(bodies.map(answer));
    const alone = [];
    for (const body of bodies) alone.push(await answer(body));
    expect(together).toEqual(alone);
  });

  test('answers the same when memory is so short that sequences are preempted', async () => {
    const { post, url } = await ready(['--device-memory', '2MiB']);
    const bodies = Array.from({ length: 6 }, (_, i) => ({
      ...completion,
      prompt: [1, 2 + i, 3],
      max_tokens: 60,
      seed: i,
    }));
    const answer = async (body: object) => {
      const response = await post(enginePaths.completions, { ...body, temperature: 1 });
      return ((await response.json()) as { choices: { text: string }[] }).choices[0]?.text;
    };
    const together = await Promise.all(bodies.map(answer));
    const metrics = await (await fetch(url + enginePaths.metrics)).text();
    expect(Number(/vllm:num_preemptions_total\{.*\} (\d+)/.exec(metrics)?.[1])).toBeGreaterThan(0);
    const alone = [];
    for (const body of bodies) alone.push(await answer(body));
    expect(together).toEqual(alone);
  });

  test('reads layers from the disk in each step when weights may take less memory, and says what that costs', async () => {
    const model = ['--model', join(root, 'tests/goldens/tiny/gemma3'), '--served-name', 'tiny'];
    const small = spawnEngine([
      ...model,
      '--port',
      '0',
      '--device-memory',
      '32MiB',
      '--weight-memory',
      '1KiB',
    ]);
    expect(await small.exit).toBe(2);
    const leastBytes = /weight memory: expected at least (\d+) bytes.*got 1024$/m.exec(small.stderr())?.[1];
    expect(leastBytes).toBeDefined();

    const mapped = await ready(model);
    const streaming = await ready([...model, '--weight-memory', leastBytes!]);
    const price = await streaming.line('weights stream');
    expect(price).toMatchObject({ numStreamedLayers: 3, numLayers: 3, memoryBytes: Number(leastBytes) });
    const { stepBytes, bytesPerSecond, stepSeconds } = price as Record<string, unknown> as Record<
      string,
      number
    >;
    expect(stepBytes).toBeGreaterThan(0);
    expect(stepSeconds).toBeCloseTo(stepBytes! / bytesPerSecond!, 9);
    const answers = [mapped, streaming].map(async ({ post, url }) => {
      const response = await post(enginePaths.completions, { ...completion, model: 'tiny' });
      const { choices } = (await response.json()) as { choices: { text: string }[] };
      const metrics = await (await fetch(url + enginePaths.metrics)).text();
      const read = /^motet_weight_read_bytes_total\{.*\} (\d+)$/m.exec(metrics)?.[1];
      return { text: choices[0]?.text, readBytes: Number(read) };
    });
    const [whole, streamed] = await Promise.all(answers);
    expect(streamed!.text).toBe(whole!.text);
    expect(whole!.readBytes).toBe(0);
    expect(streamed!.readBytes).toBeGreaterThan(8 * stepBytes!);
  });

  test('on SIGTERM finishes what runs, refuses what is new, and ends with 0', async () => {
    const { exit, url, response } = await drainingUnderLoad();
    expect((await fetch(url + enginePaths.readyz)).status).toBe(503);
    const text = await response.text();
    expect(text.match(/"finish_reason":"length"/g)?.length).toBe(8);
    expect(text.endsWith('data: [DONE]\n\n')).toBe(true);
    expect(await exit).toBe(0);
  });

  test('on a second signal ends at once', async () => {
    const { child, exit, response } = await drainingUnderLoad();
    child.kill('SIGTERM');
    expect(await exit).toBe(143);
    await response.text().catch(() => 'cut off');
  });

  test('on a signal ends at once, with 0, from its first moment on', async () => {
    // The signal comes as soon as there is a handler; nothing was done before that.
    const preload =
      "process.on('newListener',n=>n==='SIGTERM'&&setImmediate(()=>process.kill(process.pid,n)))";
    const env = { NODE_OPTIONS: `--import=data:text/javascript,${encodeURIComponent(preload)}` };
    const { line, exit } = spawnEngine(['--model', tiny, '--port', '0'], env);
    await expect(line('preparing')).rejects.toThrow('the engine ended with 0');
    expect(await exit).toBe(0);
  });

  test('on a signal ends at once, with 0, while its model is fetched', async () => {
    const server = await startHttpsSource();
    const isAsked = new Promise<void>((resolve) => {
      server.fault = () => {
        resolve();
        return true; // and never answers
      };
    });
    const model = ['--model', `${server.url}/m.gguf`, '--model-digest', `sha256:${'0'.repeat(64)}`];
    const { child, exit } = spawnEngine(model, trustingTestCa());
    await isAsked;
    child.kill('SIGTERM');
    expect(await exit).toBe(0);
  });

  test('fetches an adapter by digest, and counts that', async () => {
    const server = await startHttpsSource();
    for (const name of ['adapter_config.json', 'adapter_model.safetensors']) {
      server.files.set(`/tuned/${name}`, readFileSync(join(adapter, name)));
    }
    const { post, url } = await ready([], trustingTestCa());
    const body = { lora_name: 'tuned', lora_path: `${server.url}/tuned?key=secret` };
    const wrong = await post(enginePaths.loadAdapter, { ...body, digest: `sha256:${'0'.repeat(64)}` });
    expect([wrong.status, ((await wrong.json()) as { code: string }).code]).toEqual([
      400,
      'adapter_digest_mismatch',
    ]);
    const digest = await digestOfFolder(adapter);
    expect((await post(enginePaths.loadAdapter, { ...body, digest })).status).toBe(200);

    const listing = await (await fetch(url + enginePaths.adapters)).text();
    expect(JSON.parse(listing).data).toMatchObject([
      { names: ['tuned'], digest, path: `${server.url}/tuned` },
    ]);
    expect(listing).not.toContain('secret');
    const metrics = await (await fetch(url + enginePaths.metrics)).text();
    expect(metrics).toMatch(/motet_source_fetches_total\{kind="adapter",result="fetched",.*\} 1/);
    expect(metrics).toMatch(/motet_source_fetches_total\{kind="adapter",result="refused",.*\} 1/);

    // As the engine does without network: the copy outlives the source and the adapter.
    await server.stop();
    expect((await post(enginePaths.unloadAdapter, { lora_name: 'tuned' })).status).toBe(200);
    expect((await post(enginePaths.loadAdapter, { ...body, digest })).status).toBe(200);
    const other = { ...body, lora_name: 'other', digest: `sha256:${'1'.repeat(64)}` };
    const away = await post(enginePaths.loadAdapter, other);
    expect([away.status, away.headers.get('retry-after')]).toEqual([503, '5']);
    expect(await away.json()).toMatchObject({
      code: 'source_unavailable',
      message: `${server.url}/tuned/adapter_config.json: ECONNREFUSED`,
    });
  });

  test('ends with 1 and one line when its model cannot be had', async () => {
    const server = await startHttpsSource();
    const model = ['--model', `${server.url}/m.gguf`, '--model-digest', `sha256:${'0'.repeat(64)}`];
    const { exit, stderr } = spawnEngine(model, trustingTestCa());
    expect(await exit).toBe(1);
    expect(stderr()).toBe(`motet engine: ${server.url}/m.gguf: the server answered 404\n`);
  });

  test('prints its settings on --help', async () => {
    const engine = spawnEngine(['--help']);
    let text = '';
    engine.child.stdout!.on('data', (chunk) => {
      text += chunk;
    });
    expect(await engine.exit).toBe(0);
    expect(text).toContain('--device-memory BYTES');
  });

  test.each([
    ['an unknown flag', ['--modle', tiny], '--modle: unknown flag; did you mean --model?'],
    [
      'a device that this machine or this build lacks',
      ['--model', tiny, '--device', 'nvidia'],
      '--device nvidia: expected',
    ],
    ['a model that is not there', ['--model', '/none'], 'read model /none'],
    [
      'a context that the model lacks',
      ['--model', tiny, '--max-model-len', '4096'],
      '--max-model-len: expected at most',
    ],
    [
      'an adapter that is not there',
      ['--model', tiny, '--port', '0', '--adapter', 'a=/none'],
      "No adapter found for '/none'",
    ],
  ])('refuses %s in one line, with status 2', async (_name, args, message) => {
    const { exit, stderr } = spawnEngine(args);
    expect(await exit).toBe(2);
    expect(stderr()).toContain(message);
    expect(stderr().trimEnd().split('\n').length).toBe(1);
  });
});
