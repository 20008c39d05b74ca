// The clients that people have, unchanged and from their registries, against the gateway over a real engine: OpenAI's for JavaScript
// and Python, LoRAX's for Python, and LangChain. The Python ones are scripts in clients/, one line for each flow.

import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import OpenAI, {
  type APIError,
  AuthenticationError,
  BadRequestError,
  NotFoundError,
  RateLimitError,
  toFile,
} from 'openai';
import { zodResponseFormat } from 'openai/helpers/zod';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { z } from 'zod';
import { writeRandomAdapter } from '../bench/random-adapter.ts';
import {
  evalItems,
  exampleAdapters,
  type RunningProcess,
  startGatewayOver,
  startSmollm2,
} from '../fixtures/processes.ts';
import { runPythonClient, type Seen } from '../fixtures/python-clients.ts';

const key = 'key-of-the-clients-0123456789';
const limitedKey = 'key-of-one-at-a-time-0123456789';
/** An adapter of the rank of `dates`, to be merged with it. */
const mate = 'mate';
const names = ['base', ...[...exampleAdapters.map(({ name }) => name), mate].sort()];
const { messages, answer } = evalItems('dates').find(({ answer, peft }) => answer === peft)!;
/** As the model's chat template has it: LoRAX takes the text. */
const prompt = `${messages.map(({ role, content }) => `<|im_start|>${role}\n${content}<|im_end|>\n`).join('')}<|im_start|>assistant\n`;
const dims = 576;
const smollm2Dims = {
  ...{ numLayers: 30, hiddenSize: dims, intermediateSize: 1536 },
  ...{ numHeads: 9, numKvHeads: 3, headDim: 64 },
};

const folder = mkdtempSync(join(tmpdir(), 'motet-clients-'));
/** With the list of packages that each runs with. */
const scripts = {
  'openai_client.py': 'langchain',
  'langchain_client.py': 'langchain',
  'lorax_client.py': 'lorax',
};
const seen = new Map<string, ReadonlyMap<string, Seen>>();
let engine: RunningProcess;
let gateway: RunningProcess;

beforeAll(async () => {
  writeFileSync(join(folder, 'keys'), `clients ${key}\nlimited ${limitedKey}\n`);
  writeFileSync(join(folder, 'limits'), 'limited: { concurrency: 1 }\n');
  await writeRandomAdapter(join(folder, mate), smollm2Dims, 8, ['q_proj', 'v_proj'], 5);
  engine = await startSmollm2(['--adapter', `${mate}=${join(folder, mate)}`]);
  gateway = await startGatewayOver(
    [engine.url],
    [
      ...['--api-keys-file', join(folder, 'keys'), '--limits-file', join(folder, 'limits')],
      ...['--batch-store', join(folder, 'batches')],
    ],
  );
  const given = { url: gateway.url, key, limitedKey, item: { messages, prompt, answer } };
  const runs = Object.entries(scripts).map(async ([script, packages]) => {
    seen.set(script, await runPythonClient(packages, script, given));
  });
  await Promise.all(runs);
});

afterAll(async () => {
  await gateway?.stop();
  await engine?.stop();
  rmSync(folder, { recursive: true, force: true });
});

/** What a script saw in one of its flows. */
function flowsOf(script: keyof typeof scripts): (flow: string) => Seen {
  return (flow) => {
    const found = seen.get(script)!.get(flow);
    if (found === undefined) throw new Error(`${script}: expected the flow ${flow}, got none`);
    if (found.failed !== undefined) throw new Error(found.failed);
    return found;
  };
}

const dot = (a: number[], b: number[]) => a.reduce((sum, value, i) => sum + value * b[i]!, 0);
/** Vectors have length 1. */
const cosine = (a: number[], b: number[]) => dot(a, b) / Math.sqrt(dot(a, a) * dot(b, b));

const booking = { city: expect.stringMatching(/^(Paris|Rome)$/), breakfast: expect.any(Boolean) };

describe('OpenAI for Python', () => {
  const flow = flowsOf('openai_client.py');

  test('lists the models', () => {
    expect(flow('models').ids).toEqual(names);
  });

  test('streams what it gets whole', () => {
    const { text, finish, usage, streamUsage, pieces, logprobs } = flow('chat');
    expect([text, finish]).toEqual([answer, 'stop']);
    expect(pieces.join('')).toBe(answer);
    expect(pieces.length).toBeGreaterThan(2);
    expect(streamUsage).toBe(usage);
    expect(logprobs.length).toBeGreaterThan(2);
    for (const logprob of logprobs) expect(logprob).toBeLessThanOrEqual(0);
  });

  test('completes several prompts several times', () => {
    expect(flow('completions')).toEqual({ indices: [0, 1, 2, 3], tokens: 16 });
  });

  test('has tools called, also in a stream, and goes on with their results', () => {
    const called = { city: expect.stringMatching(/^(Paris|Rome)$/), nights: expect.any(Number) };
    const { finish, name, after, ...args } = flow('tool_calls');
    expect([finish, name]).toEqual(['tool_calls', 'book_room']);
    expect(args).toEqual({ arguments: called, streamed: args.arguments });
    expect(after).not.toBe('');
  });

  test('parses an answer into its class', () => {
    expect(flow('json_schema').parsed).toEqual(booking);
  });

  test('gets embeddings, as base64 and as numbers, of texts and of tokens', () => {
    const { packed, plain, adapted, tokens, short } = flow('embeddings');
    expect(packed.map((vector: number[]) => vector.length)).toEqual([dims, dims]);
    expect(cosine(packed[0], plain[0])).toBeCloseTo(1, 6);
    expect(cosine(packed[1], plain[1])).toBeCloseTo(1, 6);
    expect(cosine(plain[0], plain[1])).toBeLessThan(0.9999);
    expect(cosine(adapted, plain[0])).toBeLessThan(0.9999);
    expect(cosine(tokens, plain[0])).toBeGreaterThan(0.9999);
    expect(short).toHaveLength(64);
    expect(cosine(short, plain[0].slice(0, 64))).toBeGreaterThan(0.9999);
  });

  test('runs a batch', () => {
    const { status, counts, outputs, errors } = flow('batch');
    expect([status, counts]).toEqual(['completed', { total: 3, completed: 2, failed: 1 }]);
    expect(outputs).toEqual({ 'dates-line': answer, 'base-line': expect.any(String) });
    expect(errors).toEqual(['nobody-line']);
  });

  test('raises its own exceptions', () => {
    const { key, model, long, field } = flow('errors');
    expect(key).toMatchObject({ type: 'AuthenticationError', code: 'invalid_api_key' });
    expect(model).toMatchObject({ type: 'NotFoundError', code: 'model_not_found', param: 'model' });
    expect(long).toMatchObject({
      type: 'BadRequestError',
      code: 'context_length_exceeded',
      param: 'messages',
    });
    expect(field).toMatchObject({ type: 'BadRequestError', param: 'temperature' });
  });

  test('waits as long as a refusal says, and comes again', () => {
    const { refused, waited, finish } = flow('rate_limit');
    expect(refused).toMatchObject({ type: 'RateLimitError', code: 'rate_limit_exceeded' });
    expect(waited[0]).toBe(refused.retryAfter);
    expect(finish).toBe('length');
  });
});

describe('LangChain', () => {
  const flow = flowsOf('langchain_client.py');

  test('invokes, streams and batches, and counts tokens', () => {
    const { usage, ...seen } = flow('invoke');
    expect(seen).toEqual({
      ...{ text: answer, streamed: answer, batched: [answer, answer] },
      ...{ counted: [usage], streamUsage: usage, pieces: expect.any(Number) },
    });
    expect(seen.pieces).toBeGreaterThan(2);
  });

  test('binds tools and goes on with their results', () => {
    expect(flow('tools')).toEqual({ name: 'book_room', args: booking, isMessage: true, isAnswer: true });
  });

  test('has structured output, by schema and by function', () => {
    expect(flow('structured')).toEqual({ json_schema: booking, function_calling: booking });
  });

  test('embeds queries and documents', () => {
    const { query, documents } = flow('embeddings');
    expect(query).toHaveLength(dims);
    expect(cosine(query, documents[0])).toBeGreaterThan(0.9999);
    expect(cosine(query, documents[1])).toBeLessThan(0.9999);
  });

  test('passes on the exceptions', () => {
    const { key, model } = flow('errors');
    expect(key).toMatchObject({ type: expect.stringContaining('AuthenticationError') });
    expect(model).toMatchObject({ type: expect.stringContaining('NotFoundError') });
  });
});

describe('LoRAX for Python', () => {
  const flow = flowsOf('lorax_client.py');

  test('generates with an adapter and without, whole and as a stream', () => {
    const { text, tokens, details, full, base, streamed, streamText, streamDetails } = flow('generate');
    expect([text, tokens.join(''), full]).toEqual([answer, answer, prompt + answer]);
    expect([streamText, streamed.join('')]).toEqual([answer, answer]);
    expect(details).toEqual({
      ...{ finish: 'eos_token', seed: null },
      ...{ promptTokens: expect.any(Number), generatedTokens: tokens.length + 1 },
    });
    expect(streamDetails).toEqual(details);
    expect(base).toBe(4);
  });

  test('samples, by a seed that it is told, with best_of, to a stop sequence', () => {
    const { first, again, stopped, best } = flow('sampling');
    expect(again).toBe(first);
    expect(stopped).toBe('stop_sequence');
    expect(best).toBeGreaterThan(0);
  });

  test('composes adapters, as weights say', async () => {
    const { one, two } = flow('merged');
    const members = [
      { name: 'dates', weight: 0.5 },
      { name: 'sql', weight: 0.5 },
    ];
    const { choices } = await clientOf().completions.create({
      ...{ model: 'base', prompt, max_tokens: 8, temperature: 0 },
      ...({ adapters: members } as object),
    });
    expect([one, two]).toEqual([answer, choices[0]!.text]);
  });

  test.each([
    ['ties', { method: 'ties', density: 0.3, majority_sign: 'frequency' }],
    ['dare', { method: 'dare_linear', density: 0.3 }],
  ])('has adapters merged by %s, as an OpenAI client has them', async (name, adapters_merge) => {
    const adapters = [
      { name: mate, weight: 0.5 },
      { name: 'dates', weight: 1 },
    ];
    const { choices } = await clientOf().completions.create({
      ...{ model: 'base', prompt, max_tokens: 8, temperature: 0 },
      ...({ adapters, adapters_merge } as object),
    });
    expect(flow('merged')[name]).toBe(choices[0]!.text);
  });

  test('gets JSON by a schema', () => {
    expect(flow('json_schema').parsed).toEqual(booking);
  });

  test('does so asynchronously', () => {
    const { text, streamed } = flow('asynchronous');
    expect([text, streamed.join('')]).toEqual([answer, answer]);
  });

  test('embeds a text', async () => {
    const { vector } = flow('embed');
    const { data } = await clientOf().embeddings.create({ model: 'base', input: 'a quiet room' });
    expect(cosine(vector, data[0]!.embedding)).toBeGreaterThan(0.9999);
  });

  test('raises its own exceptions', () => {
    const { key, model, stream, long, field, classify, classifyBatch } = flow('errors');
    expect(key).toMatchObject({ type: 'UnknownError', message: expect.stringContaining('401') });
    expect(model.type).toBe('NotFoundError');
    expect(stream.type).toBe('NotFoundError');
    expect(long.type).toBe('ValidationError');
    expect(field).toMatchObject({
      type: 'ValidationError',
      message: expect.stringContaining('adapter_source'),
    });
    expect(classify).toMatchObject({
      type: 'ValidationError',
      message: expect.stringContaining('/classify'),
    });
    expect(classifyBatch.type).toBe('ValidationError');
  });
});

function clientOf(apiKey = key): OpenAI {
  return new OpenAI({ baseURL: `${gateway.url}/v1`, apiKey, maxRetries: 0 });
}

describe('OpenAI for JavaScript', () => {
  const ask = { model: 'dates', messages, temperature: 0, max_tokens: 16 };

  test('streams what it gets whole', async () => {
    const client = clientOf();
    const { choices, usage } = await client.chat.completions.create(ask);
    expect(choices[0]).toMatchObject({ message: { content: answer }, finish_reason: 'stop' });
    const stream = client.chat.completions.stream({ ...ask, stream_options: { include_usage: true } });
    expect(await stream.finalContent()).toBe(answer);
    expect((await stream.totalUsage()).total_tokens).toBe(usage!.total_tokens);
  });

  test('runs tools', async () => {
    const calls: unknown[] = [];
    const parameters = {
      type: 'object',
      properties: { city: { enum: ['Paris', 'Rome'] }, breakfast: { type: 'boolean' } },
      required: ['city', 'breakfast'],
      additionalProperties: false,
    };
    const book = (args: object) => {
      calls.push(args);
      return 'Booked.';
    };
    const runner = clientOf().chat.completions.runTools(
      {
        model: 'base',
        messages: [{ role: 'user', content: 'Book a room in Rome, with breakfast.' }],
        tools: [
          {
            type: 'function',
            function: {
              name: 'book_room',
              description: 'Books a room.',
              parameters,
              parse: JSON.parse,
              function: book,
            },
          },
        ],
        tool_choice: { type: 'function', function: { name: 'book_room' } },
        temperature: 0,
        max_tokens: 64,
      },
      { maxChatCompletions: 1 },
    );
    await runner.done();
    expect(calls).toEqual([booking]);
  });

  test('parses an answer by a schema of zod', async () => {
    const shape = z.object({ city: z.enum(['Paris', 'Rome']), breakfast: z.boolean() });
    const { choices } = await clientOf().chat.completions.parse({
      model: 'base',
      messages: [{ role: 'user', content: 'Book a room in Rome.' }],
      response_format: zodResponseFormat(shape, 'booking'),
      temperature: 1,
      seed: 5,
      max_tokens: 64,
    });
    expect(choices[0]!.message.parsed).toEqual(booking);
  });

  test('gets embeddings, as base64 and as numbers', async () => {
    const asked = { model: 'dates', input: 'a quiet room' };
    // It asks for base64 unless it is told.
    const packed = await clientOf().embeddings.create(asked);
    const plain = await clientOf().embeddings.create({ ...asked, encoding_format: 'float' });
    expect(packed.data[0]!.embedding).toHaveLength(dims);
    expect(cosine(packed.data[0]!.embedding, plain.data[0]!.embedding)).toBeCloseTo(1, 6);
  });

  test('runs a batch', async () => {
    const client = clientOf();
    const url = '/v1/chat/completions' as const;
    const lines = ['a', 'b'].map((custom_id) =>
      JSON.stringify({ custom_id, method: 'POST', url, body: ask }),
    );
    const file = await client.files.create({
      purpose: 'batch',
      file: await toFile(Buffer.from(lines.join('\n')), 'lines.jsonl'),
    });
    const { id } = await client.batches.create({
      input_file_id: file.id,
      endpoint: url,
      completion_window: '24h',
    });
    await expect
      .poll(async () => (await client.batches.retrieve(id)).status, { timeout: 25_000 })
      .toBe('completed');
    const { output_file_id } = await client.batches.retrieve(id);
    const output = await (await client.files.content(output_file_id!)).text();
    const answers = output
      .trimEnd()
      .split('\n')
      .map((line) => JSON.parse(line))
      .map(({ custom_id, response }) => [custom_id, response.body.choices[0].message.content]);
    expect(answers.sort()).toEqual([
      ['a', answer],
      ['b', answer],
    ]);
  });

  test('throws its own exceptions', async () => {
    const hello = [{ role: 'user' as const, content: 'hello' }];
    const create = (model: string, content = 'hello', apiKey = key): Promise<unknown> =>
      clientOf(apiKey).chat.completions.create({ model, messages: [{ role: 'user', content }] });
    await expect(create('base', 'hello', 'wrong')).rejects.toThrow(AuthenticationError);
    await expect(create('nobody')).rejects.toThrow(NotFoundError);
    await expect(create('base', 'word '.repeat(9000))).rejects.toThrow(BadRequestError);
    const running = await clientOf(limitedKey).chat.completions.create({
      ...{ model: 'base', messages: hello, stream: true, max_tokens: 4000 },
      ...({ ignore_eos: true } as object),
    });
    const refused = await create('base', 'hello', limitedKey).catch((error: unknown) => error);
    running.controller.abort();
    expect(refused).toBeInstanceOf(RateLimitError);
    expect(Number((refused as APIError).headers?.get('retry-after'))).toBeGreaterThan(0);
  });
});
