// Starts one engine and the gateway on this machine, loads the example adapters, and says how to try them.
// Nothing is restarted: when one of the two ends by itself, so does this, with a non-zero exit code.
//
//   MOTET_PORT    port of the gateway on 127.0.0.1, 8080 when not given
//   MOTET_MODEL   model to serve, SmolLM2-135M-Instruct from the cache when not given
//   MOTET_...     every other setting of engine/config.ts and gateway/config.ts

import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { createWriteStream, existsSync, mkdirSync, readFileSync } from 'node:fs';
import { createServer } from 'node:net';
import { homedir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { setTimeout as sleep } from 'node:timers/promises';
import { enginePaths, type ModelList } from '../engine/protocol.ts';

/** A line of examples/adapters/index.json: scores are exact matches out of `numItems` held-out prompts. */
type ExampleAdapter = {
  name: string;
  maxTokens: number;
  numItems: number;
  exactMatchBase: number;
  exactMatchAdapter: number;
};
/** A log line of ours. `fraction`: how much of a long piece of work is done, 0 to 1. */
type LogLine = { level?: number; msg?: string; port?: number; fraction?: number };

const root = join(import.meta.dirname, '..');
const cache =
  process.env.MOTET_CACHE || join(process.env.XDG_CACHE_HOME || join(homedir(), '.cache'), 'motet');
const model = process.env.MOTET_MODEL || join(cache, 'models/SmolLM2-135M-Instruct.Q4_1.gguf');
const port = Number(process.env.MOTET_PORT || 8080);
const adaptersFolder = join(root, 'examples/adapters');
const logFolder = join(cache, 'logs');

/** The gateway has a bound on its own drain; this one is for an engine, or for a gateway that does not keep it. */
const stopTimeoutMs = { gateway: 35_000, engine: 10_000 };

const children = new Map<'gateway' | 'engine', ChildProcess>();
let isStopping = false;

async function main(): Promise<void> {
  const startMs = performance.now();
  stopOnSignal();
  mkdirSync(logFolder, { recursive: true });
  await assertPortIsFree();

  const enginePort = await startProcess('engine', [
    ...['--model', model, '--cache', cache, '--host', '127.0.0.1', '--port', '0'],
  ]);
  const engineUrl = `http://127.0.0.1:${enginePort}`;
  await untilOk(`${engineUrl}${enginePaths.readyz}`);
  const gatewayPort = startProcess('gateway', [
    '--engine',
    engineUrl,
    '--host',
    '127.0.0.1',
    '--port',
    String(port),
  ]);
  const adapters = exampleAdapters();
  for (const { name } of adapters) await loadAdapter(engineUrl, name);

  const url = `http://127.0.0.1:${await gatewayPort}`;
  await untilOk(`${url}/readyz`);
  printSummary(url, engineUrl, await baseName(engineUrl), adapters, (performance.now() - startMs) / 1000);
}

/**
 * Starts a process of ours; resolves with its port when its log says that it is ready. Its log goes to a file, and what
 * a person should see of it to the screen: what it does until it is ready, warnings always.
 */
async function startProcess(name: 'gateway' | 'engine', args: string[]): Promise<number> {
  // The log is where it says that it is ready, and goes to a file whatever its level.
  const { MOTET_PORT: _port, MOTET_HOST: _host, MOTET_LOG_LEVEL: _level, ...env } = process.env;
  const child = spawn(process.execPath, [join(root, name, 'main.ts'), ...args], {
    cwd: root,
    env,
    stdio: ['ignore', 'pipe', 'pipe'],
    // A group of its own: Ctrl-C in a terminal goes to the whole group, and the order of stopping is ours to keep.
    detached: true,
  });
  children.set(name, child);
  child.once('exit', (code, signal) => {
    children.delete(name);
    fail(`the ${name} ended by itself (${signal ?? `exit code ${code}`})`);
  });

  const file = createWriteStream(join(logFolder, `${name}.log`));
  file.on('error', ({ message }) => fail(`the log of the ${name} cannot be written (${message})`));
  child.stderr.on('data', (bytes: Buffer) => {
    file.write(bytes);
    process.stderr.write(bytes);
  });
  return new Promise((resolve) => {
    let isReady = false;
    createInterface(child.stdout).on('line', (line) => {
      file.write(`${line}\n`);
      const { level = 30, msg = '', port: readyPort, fraction } = parseLogLine(line);
      if (msg === 'ready' && readyPort !== undefined) {
        isReady = true;
        resolve(readyPort);
      } else if (level >= 40 || (name === 'engine' && !isReady)) {
        const percent = fraction === undefined ? '' : ` ${Math.round(fraction * 100)} %`;
        console.log(`  ${name}: ${msg}${percent}`);
      }
    });
  });
}

function parseLogLine(line: string): LogLine {
  try {
    return JSON.parse(line) as LogLine;
  } catch {
    return { msg: line };
  }
}

/** None for a model of the user's own: they were trained on the default one. */
function exampleAdapters(): ExampleAdapter[] {
  const index = join(adaptersFolder, 'index.json');
  if (process.env.MOTET_MODEL || !existsSync(index)) return [];
  return (JSON.parse(readFileSync(index, 'utf8')) as { adapters: ExampleAdapter[] }).adapters;
}

async function loadAdapter(engineUrl: string, name: string): Promise<void> {
  const response = await fetch(`${engineUrl}${enginePaths.loadAdapter}`, {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify({ lora_name: name, lora_path: join(adaptersFolder, name) }),
  });
  const text = await response.text();
  if (!response.ok)
    throw new Error(`the engine did not load the adapter ${name}: ${response.status} ${text}`);
}

async function untilOk(url: string): Promise<void> {
  for (;;) {
    const response = await fetch(url).catch(() => null);
    await response?.body?.cancel();
    if (response?.ok) return;
    await sleep(50);
  }
}

/** Asked of the engine: the gateway may want a key. */
async function baseName(engineUrl: string): Promise<string> {
  const { data } = (await (await fetch(`${engineUrl}${enginePaths.models}`)).json()) as ModelList;
  return data.find(({ parent }) => parent === null)!.id;
}

function printSummary(
  url: string,
  engineUrl: string,
  base: string,
  adapters: ExampleAdapter[],
  seconds: number,
): void {
  const first = adapters[0];
  const lines = [
    '',
    `Motet serves ${base} and ${adapters.length} adapters at ${url}, ${seconds.toFixed(1)} s after its start.`,
    `OpenAI's API: base_url ${url}/v1, model one of the names below. Logs: ${logFolder}`,
  ];
  for (const { name, maxTokens, numItems, exactMatchBase, exactMatchAdapter } of adapters) {
    lines.push(
      '',
      `${name}: exact answers ${exactMatchAdapter} of ${numItems}; the base alone ${exactMatchBase}`,
    );
    lines.push(
      curlLine(url, 'chat/completions', {
        model: name,
        messages: firstMessages(name),
        max_tokens: maxTokens,
        temperature: 0,
      }),
    );
  }
  if (first !== undefined) {
    lines.push('', `${base}: the same question as ${first.name}, without an adapter`);
    lines.push(
      curlLine(url, 'chat/completions', {
        model: base,
        messages: firstMessages(first.name),
        max_tokens: first.maxTokens,
        temperature: 0,
      }),
    );
  } else {
    // Not every model has a chat template; every one completes.
    lines.push('', `${base}: a completion`);
    lines.push(curlLine(url, 'completions', { model: base, prompt: 'The sea', max_tokens: 32 }));
  }
  lines.push('', 'another adapter, a folder that PEFT wrote, while these are served:');
  lines.push(
    `  curl -s ${engineUrl}${enginePaths.loadAdapter} -H 'content-type: application/json' -d '{"lora_name":"mine","lora_path":"/path/to/folder"}'`,
  );
  lines.push('', 'Ctrl-C stops it.');
  console.log(lines.join('\n'));
}

function firstMessages(name: string): unknown {
  const [line = ''] = readFileSync(join(adaptersFolder, name, 'eval.jsonl'), 'utf8').split('\n', 1);
  return (JSON.parse(line) as { messages: unknown }).messages;
}

/** One line for a shell: JSON has no single quotes of its own, and those of the text are written as '\''. */
function curlLine(url: string, path: string, body: object): string {
  const quoted = JSON.stringify(body).replaceAll("'", "'\\''");
  const { MOTET_API_KEYS_FILE, MOTET_TENANTS_FILE } = process.env;
  const key = MOTET_API_KEYS_FILE || MOTET_TENANTS_FILE ? ` -H 'authorization: Bearer YOUR-KEY'` : '';
  return `  curl -s ${url}/v1/${path}${key} -H 'content-type: application/json' -d '${quoted}'`;
}

async function assertPortIsFree(): Promise<void> {
  const server = createServer().listen(port, '127.0.0.1');
  try {
    await once(server, 'listening');
  } catch (error) {
    const { message } = error as Error;
    throw new Error(`port ${port} cannot be used (${message}); MOTET_PORT=N chooses another`);
  }
  await new Promise((resolve) => server.close(resolve));
}

function stopOnSignal(): void {
  let firstMs: number | null = null;
  // The processes are in groups of their own, so they would outlive a closed terminal and whatever else ends this.
  process.on('exit', () => {
    for (const child of children.values()) child.kill('SIGTERM');
  });
  // Nobody reads any more, as under `npm start | head`. That is no reason to stop serving.
  for (const stream of [process.stdout, process.stderr]) stream.on('error', () => {});
  for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) {
    process.on(signal, () => {
      // A terminal and npm may each send the same Ctrl-C, so only a later one means "at once".
      if (firstMs !== null && performance.now() - firstMs < 1_000) return;
      if (firstMs !== null) for (const child of children.values()) child.kill('SIGKILL');
      else console.log('\nStopping: requests in flight may end. Ctrl-C again stops at once.');
      firstMs ??= performance.now();
      void stopAll(0);
    });
  }
}

/** Ends everything. What fails because everything is ending already is no news. */
function fail(reason: string): void {
  if (isStopping) return;
  console.error(`\nmotet: ${reason}. Logs: ${logFolder}`);
  void stopAll(1);
}

/** The gateway first, so that the engine is there until the last stream has ended. */
async function stopAll(exitCode: number): Promise<void> {
  if (isStopping) return;
  isStopping = true;
  for (const name of ['gateway', 'engine'] as const) {
    const child = children.get(name);
    if (child === undefined) continue;
    const exited = once(child, 'exit');
    child.kill('SIGTERM');
    const timer = setTimeout(() => child.kill('SIGKILL'), stopTimeoutMs[name]);
    await exited;
    clearTimeout(timer);
  }
  process.exit(exitCode);
}

main().catch((error: Error) => fail(error.message));
