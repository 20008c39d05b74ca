/** 300 clients stream at once over HTTP and a third of them hang up midway: nobody else notices, and nothing is lost. */
import { once } from 'node:events';
import { request as httpRequest } from 'node:http';
import { afterAll, beforeAll, expect, test, vi } from 'vitest';
import type { AdapterList } from '../../engine/protocol.ts';
import {
  evalItems,
  exampleAdapters,
  getJson,
  type RunningProcess,
  startGatewayOver,
  startSmollm2,
} from '../fixtures/processes.ts';

const numClients = 300;
const maxTokens = 24;

let engine: RunningProcess;
let gateway: RunningProcess;
beforeAll(async () => {
  engine = await startSmollm2(['--max-waiting', String(numClients)]);
  gateway = await startGatewayOver([engine.url], ['--max-in-flight-per-engine', String(numClients)]);
});
afterAll(async () => {
  await gateway.stop();
  await engine.stop();
});

interface Stream {
  text: string;
  isDone: boolean;
  hungUp: boolean;
}

/** One client with a connection of its own. It hangs up after that many events, if a number is given. */
async function stream(model: string, body: object, hangUpAfter: number | null): Promise<Stream> {
  const request = httpRequest(`${gateway.url}/v1/chat/completions`, {
    method: 'POST',
    agent: false,
    headers: { 'content-type': 'application/json' },
  });
  request.end(JSON.stringify({ ...body, model, stream: true }));
  const [response] = await once(request, 'response');
  if (response.statusCode !== 200) throw new Error(`status ${response.statusCode}`);
  const result: Stream = { text: '', isDone: false, hungUp: false };
  let rest = '';
  let numEvents = 0;
  try {
    for await (const bytes of response.setEncoding('utf8')) {
      rest += bytes;
      const events = rest.split('\n\n');
      rest = events.pop()!;
      for (const event of events) {
        // A comment: the stream waits for room in the engine.
        if (event.startsWith(':')) continue;
        const data = event.replace(/^data: /, '');
        if (data === '[DONE]') {
          result.isDone = true;
          continue;
        }
        const { choices, error } = JSON.parse(data);
        if (error) throw new Error(error.message);
        result.text += choices[0]?.delta?.content ?? '';
        if (++numEvents === hangUpAfter) {
          result.hungUp = true;
          request.destroy();
          return result;
        }
      }
    }
  } catch (error) {
    if (!result.hungUp) throw error;
  }
  return result;
}

test('300 streams, a third cut off midway: no error, no leak, the others as if alone', async () => {
  const models = ['base', ...exampleAdapters.map(({ name }) => name)];
  const requests = Array.from({ length: numClients }, (_, i) => {
    const model = models[i % models.length]!;
    const items = evalItems(model === 'base' ? models[1]! : model);
    const { messages } = items[Math.floor(i / models.length) % 10]!;
    return { model, body: { messages, max_tokens: maxTokens, temperature: 0, ignore_eos: true } };
  });
  const before = await getJson<AdapterList>(`${engine.url}/v1/adapters`);

  // What each gives alone; equal requests are asked once.
  const alone = new Map<string, string>();
  for (const { model, body } of requests) {
    const key = JSON.stringify([model, body]);
    if (!alone.has(key)) alone.set(key, (await stream(model, body, null)).text);
  }

  const streams = await Promise.all(
    requests.map(({ model, body }, i) => stream(model, body, i % 3 === 2 ? 1 + (i % 12) : null)),
  );
  for (const [i, { text, isDone, hungUp }] of streams.entries()) {
    const expected = alone.get(JSON.stringify([requests[i]!.model, requests[i]!.body]))!;
    if (i % 3 === 2) {
      expect(hungUp).toBe(true);
      expect(expected.startsWith(text)).toBe(true);
    } else {
      expect(isDone).toBe(true);
      expect(text).toBe(expected);
    }
  }

  await vi.waitFor(
    async () => {
      const { arena, data } = await getJson<AdapterList>(`${engine.url}/v1/adapters`);
      // What only the prefix cache has counts as free.
      expect({ ...arena, cachedBytes: 0 }).toEqual(before.arena);
      expect(data.map(({ inFlight }) => inFlight)).toEqual(exampleAdapters.map(() => 0));
    },
    { timeout: 10_000, interval: 50 },
  );
}, 600_000);
