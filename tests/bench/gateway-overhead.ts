/**
 * What does the gateway cost? The same requests to an engine that computes nothing, directly and through the gateway, in
 * turns, so that a busy moment of the machine hits both alike. Each is a process of its own. The client is in a third and
 * takes as much processor time as they do, so requests per second on few cores are a lower bound.
 */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { Agent, request } from 'undici';
import type { ModelList } from '../../engine/protocol.ts';
import { startGatewayOver } from '../fixtures/processes.ts';

const numRounds = 7;
const numWhole = 400;
const numStreams = 8;
const eventsPerStream = 500;
const event = `data: ${JSON.stringify({ object: 'chat.completion.chunk', choices: [{ index: 0, delta: { content: ' word' } }] })}\n\n`;

if (process.argv.includes('--engine')) await serveEngine();
else await measure();

async function measure(): Promise<void> {
  const engine = spawn(process.execPath, [import.meta.filename, '--engine'], {
    stdio: ['ignore', 'pipe', 'inherit'],
  });
  const [line] = (await once(engine.stdout, 'data')) as [Buffer];
  const engineUrl = line.toString().trim();
  const gateway = await startGatewayOver([engineUrl]);
  const ways = [
    { name: 'direct', url: engineUrl },
    { name: 'gateway', url: gateway.url },
  ];

  const rows: Record<string, Record<string, string>> = {};
  for (const inFlight of [1, 16]) {
    const figures = await inTurns(ways, (url) => wholeAnswers(url, inFlight));
    for (const [name, rounds] of figures) {
      rows[`whole, ${inFlight} in flight, ${name}`] = {
        'per second': median(rounds.map(({ perSecond }) => perSecond)).toFixed(0),
        'p50 ms': median(rounds.map(({ latenciesMs }) => percentile(latenciesMs, 0.5))).toFixed(2),
        'p99 ms': median(rounds.map(({ latenciesMs }) => percentile(latenciesMs, 0.99))).toFixed(2),
      };
    }
  }
  for (const [name, rounds] of await inTurns(ways, events)) {
    rows[`events, ${numStreams} streams, ${name}`] = { 'per second': median(rounds).toFixed(0) };
  }
  console.table(rows);
  await gateway.stop();
  engine.kill();
}

/** One warm-up round, then `numRounds` in which every way has its turn. */
async function inTurns<T>(
  ways: { name: string; url: string }[],
  run: (url: string) => Promise<T>,
): Promise<Map<string, T[]>> {
  const figures = new Map(ways.map(({ name }): [string, T[]] => [name, []]));
  for (let round = -1; round < numRounds; round++) {
    for (const { name, url } of ways) {
      const figure = await run(url);
      if (round >= 0) figures.get(name)!.push(figure);
    }
  }
  return figures;
}

async function wholeAnswers(url: string, inFlight: number) {
  const dispatcher = new Agent({ connections: inFlight });
  const latenciesMs: number[] = [];
  let numLeft = numWhole;
  const startMs = performance.now();
  const client = async () => {
    while (numLeft-- > 0) {
      const sentMs = performance.now();
      await (await ask(url, false, dispatcher)).text();
      latenciesMs.push(performance.now() - sentMs);
    }
  };
  await Promise.all(Array.from({ length: inFlight }, client));
  const perSecond = (numWhole * 1000) / (performance.now() - startMs);
  await dispatcher.close();
  return { perSecond, latenciesMs };
}

/** Events per second over all streams. The engine writes each event by itself. */
async function events(url: string): Promise<number> {
  const dispatcher = new Agent({ connections: numStreams });
  const startMs = performance.now();
  const read = async () => {
    const text = await (await ask(url, true, dispatcher)).text();
    if (text.length !== event.length * eventsPerStream) throw new Error('a stream was not whole');
  };
  await Promise.all(Array.from({ length: numStreams }, read));
  const perSecond = (numStreams * eventsPerStream * 1000) / (performance.now() - startMs);
  await dispatcher.close();
  return perSecond;
}

async function ask(url: string, stream: boolean, dispatcher: Agent) {
  const { statusCode, body } = await request(`${url}/v1/chat/completions`, {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify({ model: 'base', stream, messages: [{ role: 'user', content: 'hello' }] }),
    dispatcher,
  });
  if (statusCode !== 200) throw new Error(`${url} answered ${statusCode}`);
  return body;
}

async function serveEngine(): Promise<void> {
  const cards = {
    object: 'list',
    data: [{ id: 'base', object: 'model', parent: null }],
  } as unknown as ModelList;
  const whole = JSON.stringify({ object: 'chat.completion', choices: [{ message: { content: 'words' } }] });
  const server = createServer(async (req, res) => {
    let body = '';
    for await (const part of req) body += part;
    const isStream = body !== '' && JSON.parse(body).stream === true;
    res.setHeader('content-type', isStream ? 'text/event-stream' : 'application/json');
    if (!isStream) return res.end(body === '' ? JSON.stringify(cards) : whole);
    for (let i = 0; i < eventsPerStream; i++) {
      res.write(event);
      await new Promise(setImmediate);
    }
    res.end();
  });
  server.listen(0, '127.0.0.1');
  await once(server, 'listening');
  console.log(`http://127.0.0.1:${(server.address() as AddressInfo).port}`);
}

function median(values: number[]): number {
  return percentile(values, 0.5);
}

function percentile(values: number[], fraction: number): number {
  const sorted = values.toSorted((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.floor(sorted.length * fraction))]!;
}
