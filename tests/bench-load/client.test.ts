// One request against a real server that answers as the test says.

import { once } from 'node:events';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { setTimeout as sleep } from 'node:timers/promises';
import { Agent } from 'undici';
import { describe, expect, onTestFinished, test } from 'vitest';
import { type Answer, requestBody, sendStreamed, type Wire } from '../bench/load/client.ts';
import { findModels } from '../bench/load/models.ts';
import {
  answerForever,
  beginStream,
  chunkEvent,
  type FakeEngine,
  refuse,
  type Script,
  startFakeEngine,
} from '../fixtures/fake-engine.ts';

const request = { index: 0, turn: 0, numTurns: 1, adapter: null, prompt: [11, 12, 13], outputTokens: 2 };

function wire(url: string, overrides: Partial<Wire> = {}): Wire {
  return {
    url,
    apiKey: null,
    endpoint: 'chat',
    baseModel: 'base',
    adapters: ['sql', 'dates'],
    adapterField: 'model',
    temperature: 0,
    ignoresEos: true,
    timeoutMs: 20_000,
    ...overrides,
  };
}

function agent(): Agent {
  const dispatcher = new Agent();
  onTestFinished(() => dispatcher.destroy());
  return dispatcher;
}

async function ask(
  script: Script,
  overrides: Partial<Wire> = {},
  signal = new AbortController().signal,
): Promise<{ answer: Answer; engine: FakeEngine }> {
  const engine = await startFakeEngine({ script });
  const answer = await sendStreamed(agent(), wire(engine.url, overrides), request, signal);
  return { answer, engine };
}

const event = (body: object) => `data: ${JSON.stringify(body)}\n\n`;
const usage = (prompt_tokens: number, completion_tokens: number) =>
  event({ choices: [], usage: { prompt_tokens, completion_tokens, total_tokens: 0 } });

describe('what is sent', () => {
  const body = (overrides: Partial<Wire>, adapter: number | null = null) =>
    requestBody(wire('', overrides), { ...request, adapter });

  test('for completions: token ids, the length, a stream with usage', () => {
    expect(body({ endpoint: 'completions' })).toEqual({
      model: 'base',
      prompt: [11, 12, 13],
      max_tokens: 2,
      temperature: 0,
      ignore_eos: true,
      stream: true,
      stream_options: { include_usage: true },
    });
  });

  test('for chat: a message', () => {
    expect(requestBody(wire(''), { ...request, prompt: 'the sea' })).toMatchObject({
      messages: [{ role: 'user', content: 'the sea' }],
    });
  });

  test('for a conversation: all of its messages', () => {
    const prompt = [
      { role: 'system', content: 'be brief' },
      { role: 'user', content: 'the sea' },
    ] as const;
    expect(requestBody(wire(''), { ...request, prompt: [...prompt] })).toMatchObject({ messages: prompt });
  });

  test('an adapter is the model, or for llama-server an id of scale 1; its base is an id of scale 0', () => {
    expect(body({}, 1)).toMatchObject({ model: 'dates' });
    expect(body({ adapterField: 'llama', adapters: ['4', '7'] }, 1)).toMatchObject({
      model: 'base',
      lora: [{ id: 7, scale: 1 }],
    });
    expect(body({ adapterField: 'llama', adapters: [] })).toMatchObject({ lora: [{ id: 0, scale: 0 }] });
  });

  test('fields that only some servers know are left out when they are not wanted', () => {
    expect(body({ ignoresEos: false })).not.toHaveProperty('ignore_eos');
    expect(body({})).not.toHaveProperty('lora');
  });

  test('the key, and the path below that of the URL', async () => {
    const engine = await startFakeEngine({ script: refuse(503, 'busy') });
    const target = wire(`${engine.url}/team`, { apiKey: 'a-key' });
    await sendStreamed(agent(), target, request, new AbortController().signal);
    const { path, headers } = engine.received[0]!;
    expect(path).toBe('/team/v1/chat/completions');
    expect(headers.authorization).toBe('Bearer a-key');
  });
});

describe('a stream', () => {
  test('is timed piece by piece; tokens are those of its usage', async () => {
    const { answer } = await ask(async ({ res }) => {
      beginStream(res);
      for (const word of ['a', 'b', 'c']) {
        res.write(chunkEvent(word));
        await sleep(20);
      }
      res.end(`${usage(7, 5)}data: [DONE]\n\n`);
    });
    expect(answer).toMatchObject({ code: 'ok', message: '', promptTokens: 7, outputTokens: 5 });
    expect(answer.gapsMs).toHaveLength(2);
    const { sentMs, firstMs, lastMs, endMs } = answer;
    expect([sentMs, firstMs, lastMs, endMs]).toEqual(
      [sentMs, firstMs, lastMs, endMs].toSorted((a, b) => a! - b!),
    );
    expect(answer.gapsMs[0]! + answer.gapsMs[1]!).toBeCloseTo(lastMs! - firstMs!);
  });

  test('begins with its first text: a role alone, as chats begin, is none', async () => {
    const release = Promise.withResolvers<void>();
    const engine = await startFakeEngine({
      async script({ res }) {
        beginStream(res);
        res.write(chunkEvent(''));
        await release.promise;
        res.end(`${chunkEvent('word')}data: [DONE]\n\n`);
      },
    });
    const asked = engine.nextReceived();
    const answer = sendStreamed(agent(), wire(engine.url), request, new AbortController().signal);
    await asked;
    await sleep(20);
    const releasedMs = performance.now();
    release.resolve();
    expect((await answer).firstMs).toBeGreaterThanOrEqual(releasedMs);
    expect((await answer).gapsMs).toEqual([]);
  });

  test('without any text begins with its end', async () => {
    const { answer } = await ask(({ res }) => {
      beginStream(res);
      res.end(
        `${event({ choices: [{ index: 0, text: '', finish_reason: 'length' }] })}${usage(1, 1)}data: [DONE]\n\n`,
      );
    });
    expect(answer).toMatchObject({ code: 'ok', outputTokens: 1 });
    expect(answer.firstMs).not.toBeNull();
  });

  test('is read across the borders of network pieces, in letters of several bytes and with CR LF', async () => {
    const bytes = Buffer.from(
      `${chunkEvent('für')}${chunkEvent('Müll')}${usage(3, 4)}data: [DONE]\n\n`.replaceAll('\n', '\r\n'),
    );
    const { answer } = await ask(async ({ res }) => {
      beginStream(res);
      for (let i = 0; i < bytes.length; i += 41) {
        res.write(bytes.subarray(i, i + 41));
        await new Promise(setImmediate);
      }
      res.end();
    });
    expect(answer).toMatchObject({ code: 'ok', outputTokens: 4 });
    expect(answer.gapsMs).toHaveLength(1);
  });

  test('has its text, to be sent back, and what of its prompt was cached', async () => {
    const { answer } = await ask(({ res }) => {
      beginStream(res);
      const thought = { choices: [{ index: 0, delta: { reasoning_content: 'hm' } }] };
      const cached = {
        prompt_tokens: 40,
        completion_tokens: 2,
        prompt_tokens_details: { cached_tokens: 32 },
      };
      res.write(event(thought) + chunkEvent('the ') + chunkEvent('sea'));
      res.end(`${event({ choices: [], usage: cached })}data: [DONE]\n\n`);
    });
    expect(answer).toMatchObject({ code: 'ok', text: 'the sea', promptTokens: 40, cachedTokens: 32 });
  });

  test('without usage has no token count', async () => {
    const { answer } = await ask(({ res }) => {
      beginStream(res);
      res.end(`${chunkEvent('word')}data: [DONE]\n\n`);
    });
    expect(answer).toMatchObject({ code: 'ok', promptTokens: null, outputTokens: null, cachedTokens: null });
  });
});

describe('a failure', () => {
  test('of a server that refuses is its status and its message', async () => {
    const { answer } = await ask(refuse(429, 'overloaded'));
    expect(answer).toMatchObject({ code: 'http_429', message: 'the fake engine refuses', firstMs: null });
  });

  test('of a server that hangs before its first byte is a timeout', async () => {
    const { answer } = await ask(() => {}, { timeoutMs: 60 });
    expect(answer).toMatchObject({ code: 'timeout', message: 'expected an answer within 60 ms' });
    expect(answer.endMs - answer.sentMs).toBeGreaterThanOrEqual(59);
  });

  test('of a server that hangs within its stream is a timeout, and the server is told', async () => {
    const { answer, engine } = await ask(answerForever, { timeoutMs: 60 });
    expect(answer.code).toBe('timeout');
    await engine.received[0]!.closed;
  });

  test('of a stream that is cut is a broken stream', async () => {
    const { answer } = await ask(({ res }) => {
      beginStream(res);
      res.write(chunkEvent('word'), () => res.destroy());
    });
    expect(answer.code).toBe('broken_stream');
  });

  test('of a stream that just ends is a broken stream too', async () => {
    const { answer } = await ask(({ res }) => {
      beginStream(res);
      res.end(chunkEvent('word'));
    });
    expect(answer).toMatchObject({
      code: 'broken_stream',
      message: 'the stream ended after 1 pieces of text, before its end',
    });
  });

  test('that the server tells inside of its stream is an error event', async () => {
    const { answer } = await ask(({ res }) => {
      beginStream(res);
      res.end(
        `${chunkEvent('word')}${event({ error: { message: 'the engine is gone', code: 'engine_gone' } })}`,
      );
    });
    expect(answer).toMatchObject({ code: 'error_event', message: 'the engine is gone' });
  });

  test.each<[string, Script, string]>([
    [
      'no stream',
      ({ res }) => void res.writeHead(200, { 'content-type': 'application/json' }).end('{}'),
      'content-type: expected text/event-stream, got application/json',
    ],
    [
      'no JSON',
      ({ res }) => {
        beginStream(res);
        res.end('data: <html>\n\n');
      },
      'expected events of JSON, got something else',
    ],
    [
      'an event without end',
      ({ res }) => {
        beginStream(res);
        res.end('x'.repeat((1 << 20) + 1));
      },
      'expected events of at most 1048576 characters, got more',
    ],
  ])('of an answer that is %s is an invalid answer', async (_name, script, message) => {
    expect((await ask(script)).answer).toMatchObject({ code: 'invalid_answer', message });
  });

  test('of no server is a connection', async () => {
    const engine = await startFakeEngine();
    await engine.kill();
    const answer = await sendStreamed(agent(), wire(engine.url), request, new AbortController().signal);
    expect(answer.code).toBe('connection');
    expect(answer.message).toContain('ECONNREFUSED');
  });

  test('that we made is cancelled', async () => {
    const abort = new AbortController();
    const { answer } = await ask(
      (received) => {
        answerForever(received);
        abort.abort();
      },
      {},
      abort.signal,
    );
    expect(answer).toMatchObject({ code: 'cancelled', message: '' });
  });

  test('never shows the key, nor a long page', async () => {
    const { answer } = await ask(
      ({ res }) => void res.writeHead(401).end(`no a-key here ${'x'.repeat(999)}`),
      {
        apiKey: 'a-key',
      },
    );
    expect(answer.message).toMatch(/^no \*\*\* here x+$/);
    expect(answer.message).toHaveLength(200);
  });
});

describe('which models there are', () => {
  const find = (url: string, overrides: object = {}) =>
    findModels(agent(), url, null, {
      model: null,
      adapters: { kind: 'all' },
      adapterField: 'model',
      ...overrides,
    });

  test('all that the server lists, in its order', async () => {
    const { url } = await startFakeEngine({ base: 'smollm2', adapters: ['sql', 'dates'] });
    expect(await find(url)).toEqual({ baseModel: 'smollm2', adapters: ['sql', 'dates'] });
  });

  test('the first of them', async () => {
    const { url } = await startFakeEngine({ adapters: ['sql', 'dates'] });
    const adapters = { kind: 'first', count: 1 };
    expect((await find(url, { adapters })).adapters).toEqual(['sql']);
    await expect(find(url, { adapters: { kind: 'first', count: 3 } })).rejects.toThrow(
      '--adapters: expected at most the 2 that the server lists, got 3',
    );
  });

  test("llama-server's adapters are its ids", async () => {
    const server = createServer((req, res) => {
      const list = [
        { id: 0, path: 'a.gguf', scale: 1 },
        { id: 1, path: 'b.gguf', scale: 1 },
      ];
      const models = { data: [{ id: 'smollm2.gguf' }] };
      res.end(JSON.stringify(req.url === '/lora-adapters' ? list : models));
    }).listen(0, '127.0.0.1');
    onTestFinished(() => void server.close());
    await once(server, 'listening');
    const url = `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
    expect(await find(url, { adapterField: 'llama' })).toEqual({
      baseModel: 'smollm2.gguf',
      adapters: ['0', '1'],
    });
  });

  test('a server is not asked for what was said', async () => {
    const engine = await startFakeEngine();
    const adapters = { kind: 'named', names: ['x'] };
    expect(await find(engine.url, { model: 'm', adapters })).toEqual({ baseModel: 'm', adapters: ['x'] });
    expect(engine.numLooks).toBe(0);
  });

  test('a server that is not there, or has no such list, is named', async () => {
    const engine = await startFakeEngine();
    await expect(find(`${engine.url}/elsewhere`)).rejects.toThrow(
      `GET ${engine.url}/elsewhere/v1/models: expected a list of models, got status 404`,
    );
    await engine.kill();
    await expect(find(engine.url)).rejects.toThrow(/got no answer \(ECONNREFUSED\)/);
  });
});
