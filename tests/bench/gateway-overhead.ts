/**
 * What does the gateway cost? An engine that computes nothing is asked directly, through nginx (the floor), through the least that Node
 * does of the same (`bare`: node:http in, undici out, nothing between) and through the gateway, in turns, so that a busy moment of the
 * machine hits all alike. nginx has one worker and each Node one thread, all pinned to core 0; engine and load are on core 1. Load is
 * wrk's: it takes little of its core, and is a closed loop: the next request of a connection goes when the answer is there, so what
 * is done after an answer counts too. Both Nodes are warm first, `--warm` seconds with 16 in flight: a gateway that has just started takes
 * several times as long, since its code is compiled on the same core.
 *
 *   node tests/bench/gateway-overhead.ts [--rounds 5] [--seconds 3] [--warm 10] [--streams 2000] [--only whole,events,streams] [--profile FOLDER]
 *
 * Wants wrk and taskset; without nginx its rows are left out, and the engine is a Node that serves less than the gateway
 * could. `--profile` writes a CPU profile of the gateway.
 */
import { type ChildProcess, execFileSync, spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { parseArgs } from 'node:util';
import { Agent, request } from 'undici';
import type { ModelList } from '../../engine/protocol.ts';
import { freePort } from '../fixtures/free-port.ts';
import { memoryOf } from '../fixtures/processes.ts';

const { values: options } = parseArgs({
  options: {
    rounds: { type: 'string', default: '5' },
    seconds: { type: 'string', default: '3' },
    warm: { type: 'string', default: '10' },
    streams: { type: 'string', default: '2000' },
    only: { type: 'string', default: 'whole,events,streams' },
    profile: { type: 'string' },
    engine: { type: 'boolean', default: false },
    bare: { type: 'string' },
  },
});
const numRounds = Number(options.rounds);
const secondsPerRun = Number(options.seconds);
const secondsWarm = Number(options.warm);
const numOpen = Number(options.streams);
const parts = new Set(options.only.split(','));
const numStreams = 8;
const eventsPerStream = 500;

const root = join(import.meta.dirname, '../..');
const key = 'key-of-the-bench-0123';
const chat = { model: 'base', messages: [{ role: 'user', content: 'hello, what can you do for me today?' }] };
const event = `data: ${JSON.stringify({ object: 'chat.completion.chunk', choices: [{ index: 0, delta: { content: ' word' } }] })}\n\n`;
const usage = { prompt_tokens: 12, completion_tokens: 34, total_tokens: 46 };
const whole = JSON.stringify({
  object: 'chat.completion',
  choices: [
    { index: 0, message: { role: 'assistant', content: 'words '.repeat(34) }, finish_reason: 'stop' },
  ],
  usage,
});
const cards = JSON.stringify({
  object: 'list',
  data: [{ id: 'base', object: 'model', parent: null }],
} as unknown as ModelList);

const staticEngine = `
  location = /v1/models { default_type application/json; return 200 '${cards}'; }
  location = /readyz { return 200 '{}'; }
  location = /v1/chat/completions { default_type application/json; return 200 '${whole}'; }`;

if (options.engine) await serveEngine();
else if (options.bare) await serveBare(options.bare);
else await measure();

/** @property pid  of the process whose CPU time is told */
type Way = { name: string; url: string; pid?: number };

async function measure(): Promise<void> {
  if (!hasProgram('wrk') || !hasProgram('taskset'))
    throw new Error('wanted: wrk and taskset (Debian: wrk, util-linux)');
  const folder = mkdtempSync(join(tmpdir(), 'motet-overhead-'));
  const children: ChildProcess[] = [];
  try {
    const nodeEngine = await startNode(1, [import.meta.filename, '--engine'], children);
    const hasNginx = hasProgram('nginx');
    if (!hasNginx) console.log('not measured: nginx, which is not installed (Debian: nginx-light)');
    const engineUrl = hasNginx
      ? await startNginx(folder, 'engine', 1, staticEngine, children)
      : nodeEngine.url;
    const ways: Way[] = [{ name: 'direct', url: engineUrl }];
    if (hasNginx) {
      const proxied = (url: string) => proxyTo(new URL(url).port);
      ways.push({ name: 'nginx', url: await startNginx(folder, 'proxy', 0, proxied(engineUrl), children) });
    }
    const keys = join(folder, 'keys');
    writeFileSync(keys, `bench ${key}\n`);
    const startGateway = (url: string) =>
      startNode(
        0,
        [
          ...(options.profile ? ['--cpu-prof', `--cpu-prof-dir=${options.profile}`] : []),
          ...[join(root, 'gateway/main.ts'), '--engine', url, '--port', '0', '--api-keys-file', keys],
          ...['--max-in-flight-per-engine', String(numOpen + 256), '--max-queued', String(numOpen)],
        ],
        children,
      );
    if (parts.has('whole')) {
      const gateway = await startGateway(engineUrl);
      const bare = await startNode(0, [import.meta.filename, '--bare', engineUrl], children);
      ways.push({ name: 'bare', url: bare.url, pid: bare.child.pid! });
      ways.push({ name: 'gateway', url: gateway.url, pid: gateway.child.pid! });
      await measureWhole(ways, folder, gateway.url);
      await stop(gateway.child);
      await stop(bare.child);
    }
    if (parts.has('events') || parts.has('streams')) {
      const gateway = await startGateway(nodeEngine.url);
      const streamed: Way[] = [
        { name: 'direct', url: nodeEngine.url },
        { name: 'gateway', url: gateway.url },
      ];
      await tellStalls(gateway.url, 'while it started');
      if (parts.has('events')) {
        await measureEvents(streamed);
        await tellStalls(gateway.url, 'under streams of events');
      }
      if (parts.has('streams')) await measureOpenStreams(gateway, nodeEngine.child);
      await stop(gateway.child);
    }
  } finally {
    await Promise.all(children.map(stop));
    rmSync(folder, { recursive: true });
  }
}

/** Latency with one request at a time, and requests a second with many. */
async function measureWhole(ways: Way[], folder: string, gatewayUrl: string): Promise<void> {
  const script = join(folder, 'post.lua');
  writeFileSync(
    script,
    `wrk.method = 'POST'\nwrk.body = ${JSON.stringify(JSON.stringify(chat))}\n` +
      `wrk.headers = { ['content-type'] = 'application/json', ['authorization'] = 'Bearer ${key}' }\n` +
      `function done(summary, latency)\n  io.write(string.format('%d %d %d %d %d %d\\n', summary.requests, summary.duration, ` +
      `latency:percentile(50), latency:percentile(99), latency.max, summary.errors.status + summary.errors.connect + ` +
      `summary.errors.read + summary.errors.timeout))\nend\n`,
  );
  for (const way of ways) if (way.pid !== undefined) await runWrk(way, 16, script, secondsWarm);
  await tellStalls(gatewayUrl, 'while it started and became warm');
  const rows: Record<string, Record<string, string>> = {};
  for (const inFlight of [1, 16, 64]) {
    const figures = await inTurns(ways, (way) => runWrk(way, inFlight, script));
    await tellStalls(gatewayUrl, `with ${inFlight} in flight`);
    for (const [name, runs] of figures) {
      rows[`whole, ${inFlight} in flight, ${name}`] = {
        'per second': spread(
          runs.map(({ perSecond }) => perSecond),
          0,
        ),
        'p50 µs': spread(
          runs.map(({ p50Us }) => p50Us),
          0,
        ),
        'p99 µs': spread(
          runs.map(({ p99Us }) => p99Us),
          0,
        ),
        'max ms': spread(
          runs.map(({ maxUs }) => maxUs / 1000),
          1,
        ),
        'CPU µs a request': runs.some(({ cpuUs }) => cpuUs === null)
          ? '–'
          : spread(
              runs.map(({ cpuUs }) => cpuUs!),
              0,
            ),
      };
    }
  }
  console.table(rows);
}

async function runWrk({ url, pid }: Way, inFlight: number, script: string, seconds = secondsPerRun) {
  const cpuBeforeUs = pid === undefined ? null : cpuOf(pid);
  const wrk = spawn(
    'taskset',
    [
      ...['-c', '1', 'wrk', '-t', '1', '-c', String(inFlight), '-d', `${seconds}s`],
      '-s',
      script,
      `${url}/v1/chat/completions`,
    ],
    { stdio: ['ignore', 'pipe', 'inherit'] },
  );
  let output = '';
  wrk.stdout.on('data', (bytes) => {
    output += bytes;
  });
  await once(wrk, 'close');
  const [requests, durationUs, p50Us, p99Us, maxUs, errors] = output
    .trim()
    .split('\n')
    .at(-1)!
    .split(' ')
    .map(Number);
  if (errors !== 0) throw new Error(`${url}: ${errors} requests failed: ${output}`);
  const cpuUs = cpuBeforeUs === null ? null : (cpuOf(pid!) - cpuBeforeUs) / requests!;
  return { perSecond: requests! / (durationUs! / 1e6), p50Us: p50Us!, p99Us: p99Us!, maxUs: maxUs!, cpuUs };
}

/** Microseconds of CPU that the process has had, all its threads together; the kernel counts in hundredths of a second. */
function cpuOf(pid: number): number {
  const [, fields] = readFileSync(`/proc/${pid}/stat`, 'utf8').split(') ');
  const [userTicks, systemTicks] = fields!.split(' ').slice(11, 13).map(Number);
  return (userTicks! + systemTicks!) * 10_000;
}

/** Events a second over some streams that run as fast as they can. The engine writes each event by itself. */
async function measureEvents(ways: Way[]): Promise<void> {
  const rows: Record<string, Record<string, string>> = {};
  const figures = await inTurns(ways, async ({ url }) => {
    const dispatcher = new Agent({ connections: numStreams });
    const startMs = performance.now();
    const read = async () => {
      const text = await (await ask(url, dispatcher)).text();
      if (text.length !== event.length * eventsPerStream) throw new Error('a stream was not whole');
    };
    await Promise.all(Array.from({ length: numStreams }, read));
    const perSecond = (numStreams * eventsPerStream * 1000) / (performance.now() - startMs);
    await dispatcher.close();
    return perSecond;
  });
  for (const [name, perSecond] of figures) {
    rows[`events, ${numStreams} streams, ${name}`] = { 'per second': spread(perSecond, 0) };
  }
  console.table(rows);
}

/**
 * Memory of the gateway with many streams that are open and wait for their next event, and its stalls when they are opened, when all
 * of their clients hang up in one moment, and when their engine is killed.
 */
async function measureOpenStreams({ url, child }: Started, engine: ChildProcess): Promise<void> {
  const before = memoryOf(child.pid!).rssBytes;
  const startMs = performance.now();
  const clients = await openStreams(url);
  const openedMs = performance.now() - startMs;
  await tellStalls(url, `while ${numOpen} streams were opened`);
  await sleep(2_000);
  const after = memoryOf(child.pid!).rssBytes;
  const mib = (bytes: number) => (bytes / 2 ** 20).toFixed(0);
  console.log(
    `${numOpen} open streams: ${mib(after)} MiB resident, ${mib(before)} before; opened in ${(openedMs / 1000).toFixed(1)} s`,
  );
  await clients.destroy();
  await sleep(1_000);
  await tellStalls(url, `while ${numOpen} clients hung up at once`);
  const others = await openStreams(url);
  await tellStalls(url, `while ${numOpen} streams were opened again`);
  engine.kill('SIGKILL');
  await sleep(2_000);
  await tellStalls(url, `while the engine of ${numOpen} streams died`);
  await others.destroy();
}

/** @returns whose streams they are: each has had its first event */
async function openStreams(url: string): Promise<Agent> {
  const dispatcher = new Agent({ connections: numOpen, headersTimeout: 0, bodyTimeout: 0 });
  for (let numOpened = 0; numOpened < numOpen; numOpened += 100) {
    const open = async () => {
      const body = await ask(url, dispatcher, { waits: true });
      await body[Symbol.asyncIterator]().next();
      body.on('error', () => {});
    };
    await Promise.all(Array.from({ length: Math.min(100, numOpen - numOpened) }, open));
  }
  return dispatcher;
}

/** Since this was asked last: by monitorEventLoopDelay in the gateway, whose values have its own interval of 10 ms in them. */
async function tellStalls(url: string, when: string): Promise<void> {
  const text = await (await request(`${url}/metrics`)).body.text();
  const of = (name: string) =>
    Math.max(
      0,
      Number(new RegExp(`^nodejs_eventloop_lag_${name}_seconds (\\S+)$`, 'm').exec(text)![1]) * 1000 - 10,
    );
  console.log(
    `event loop of the gateway ${when}: p99 ${of('p99').toFixed(1)} ms late, at most ${of('max').toFixed(1)} ms`,
  );
}

/** One warm-up round, then `numRounds` in which every way has its turn. */
async function inTurns<T>(ways: Way[], run: (way: Way) => Promise<T>): Promise<Map<string, T[]>> {
  const figures = new Map(ways.map(({ name }): [string, T[]] => [name, []]));
  for (let round = -1; round < numRounds; round++) {
    for (const way of ways) {
      const figure = await run(way);
      if (round >= 0) figures.get(way.name)!.push(figure);
    }
  }
  return figures;
}

async function ask(url: string, dispatcher: Agent, more: object = {}) {
  const { statusCode, body } = await request(`${url}/v1/chat/completions`, {
    method: 'POST',
    headers: { 'content-type': 'application/json', authorization: `Bearer ${key}` },
    body: JSON.stringify({ ...chat, stream: true, ...more }),
    dispatcher,
  });
  if (statusCode !== 200) throw new Error(`${url} answered ${statusCode}: ${await body.text()}`);
  return body;
}

async function serveEngine(): Promise<void> {
  const server = createServer(async (req, res) => {
    let body = '';
    for await (const part of req) body += part;
    if (req.url === '/v1/adapters') return res.writeHead(404).end();
    const { stream, waits } = body === '' ? {} : JSON.parse(body);
    res.setHeader('content-type', stream ? 'text/event-stream' : 'application/json');
    if (!stream) return res.end(req.url === '/v1/models' ? cards : whole);
    if (waits) return res.write(event);
    for (let i = 0; i < eventsPerStream; i++) {
      res.write(event);
      await new Promise(setImmediate);
    }
    res.end();
  });
  server.listen(0, '127.0.0.1');
  await once(server, 'listening');
  console.log(JSON.stringify({ msg: 'ready', port: (server.address() as AddressInfo).port }));
}

/** The least that Node does of what the gateway does. */
async function serveBare(origin: string): Promise<void> {
  const dispatcher = new Agent({ headersTimeout: 0, bodyTimeout: 0 });
  const server = createServer((req, res) => {
    const parts: Buffer[] = [];
    req.on('data', (part: Buffer) => parts.push(part));
    req.on('end', () => {
      const headers = { 'content-type': 'application/json' };
      dispatcher.dispatch(
        { origin, path: req.url!, method: 'POST', headers, body: Buffer.concat(parts) },
        {
          onRequestStart() {},
          onResponseStart: (_, status, headers) => void res.writeHead(status, headers),
          onResponseData: (_, bytes) => void res.write(bytes),
          onResponseEnd: () => void res.end(),
          onResponseError: () => void res.destroy(),
        },
      );
    });
  });
  server.listen(0, '127.0.0.1');
  await once(server, 'listening');
  console.log(JSON.stringify({ msg: 'ready', port: (server.address() as AddressInfo).port }));
}

/** @param port  of the engine */
function proxyTo(port: string): string {
  return `location / { proxy_pass http://127.0.0.1:${port}; proxy_http_version 1.1; proxy_set_header Connection ''; proxy_buffering off; }`;
}

async function startNginx(
  folder: string,
  name: string,
  core: number,
  locations: string,
  children: ChildProcess[],
): Promise<string> {
  const port = await freePort();
  const upstream = locations.includes('proxy_pass')
    ? `upstream engine { server ${/proxy_pass http:\/\/([\d.:]+)/.exec(locations)![1]}; keepalive 128; }`
    : '';
  const server = locations.replace(/proxy_pass http:\/\/[\d.:]+/, 'proxy_pass http://engine');
  const temporary = ['client_body', 'proxy', 'fastcgi', 'uwsgi', 'scgi'].map(
    (kind) => `${kind}_temp_path ${join(folder, kind)};`,
  );
  const file = join(folder, `${name}.conf`);
  writeFileSync(
    file,
    `daemon off; worker_processes 1; pid ${join(folder, name)}.pid; error_log stderr crit;
events { worker_connections 8192; }
http { access_log off; keepalive_requests 100000000; ${temporary.join(' ')} ${upstream}
  server { listen 127.0.0.1:${port}; ${server} } }`,
  );
  const child = spawn('taskset', ['-c', String(core), 'nginx', '-c', file], {
    stdio: ['ignore', 'ignore', 'inherit'],
  });
  children.push(child);
  const url = `http://127.0.0.1:${port}`;
  for (let tries = 0; ; tries += 1) {
    try {
      await (await request(url)).body.dump();
      return url;
    } catch (error) {
      if (tries === 100) throw error;
      await sleep(50);
    }
  }
}

type Started = { url: string; child: ChildProcess };

/** Starts a process that says `ready` and its port in a line of JSON. */
async function startNode(core: number, args: string[], children: ChildProcess[]): Promise<Started> {
  const child = spawn('taskset', ['-c', String(core), process.execPath, ...args], {
    cwd: root,
    stdio: ['ignore', 'pipe', 'inherit'],
  });
  children.push(child);
  let text = '';
  const port = await new Promise<number>((resolve, reject) => {
    child.once('close', () => reject(new Error(`${args.join(' ')} ended: ${text}`)));
    child.stdout!.on('data', function find(bytes) {
      text += bytes;
      const line = text.split('\n').find((line) => line.includes('"msg":"ready"'));
      if (line === undefined) return;
      child.stdout!.off('data', find);
      // Its log is read, as in a container.
      child.stdout!.resume();
      resolve(JSON.parse(line).port);
    });
  });
  return { url: `http://127.0.0.1:${port}`, child };
}

async function stop(child: ChildProcess): Promise<void> {
  if (child.exitCode !== null || child.signalCode !== null) return;
  const closed = once(child, 'close');
  child.kill('SIGTERM');
  await closed;
}

function hasProgram(name: string): boolean {
  try {
    execFileSync('sh', ['-c', `command -v ${name}`], { stdio: 'ignore' });
    return true;
  } catch {
    return false;
  }
}

/** The median, and from where to where. */
function spread(values: number[], digits: number): string {
  const sorted = values.toSorted((a, b) => a - b);
  const at = (fraction: number) =>
    sorted[Math.min(sorted.length - 1, Math.floor(sorted.length * fraction))]!.toFixed(digits);
  return `${at(0.5)} (${at(0)}–${at(1)})`;
}
