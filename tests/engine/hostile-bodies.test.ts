/** What the API refuses, each with its status and a message that says what to change. */
import { describe, expect, test } from 'vitest';
import { enginePaths } from '../../engine/protocol.ts';
import { serveFake } from '../fixtures/serve-fake.ts';

const chat = { messages: [{ role: 'user', content: 'hi' }] };
const completion = { prompt: 'hi' };

describe('a chat body', () => {
  test.each([
    [[], 'body: expected a JSON object, got a list of 0'],
    ['null', 'body: expected a JSON object, got null'],
    ['7', 'body: expected a JSON object, got 7'],
    [{}, 'messages: expected a list of 1 to 4096 messages, got nothing'],
    [{ messages: [] }, 'messages: expected a list of 1 to 4096 messages, got a list of 0'],
    [{ messages: 'hi' }, 'messages: expected a list of 1 to 4096 messages, got "hi"'],
    [{ messages: [1] }, 'messages[0]: expected a message object, got 1'],
    [{ messages: [{ content: 'hi' }] }, 'messages[0].role: expected a string, got nothing'],
    [
      { messages: [{ role: 'user', content: 5 }] },
      'messages[0].content: expected a string, or a list of parts',
    ],
    [
      { messages: [{ role: 'user', content: [{ type: 'image_url', image_url: {} }] }] },
      'messages[0].content: expected a string, or a list of parts of type "text", got a list of 1',
    ],
    [{ ...chat, model: 5 }, 'model: expected a string, got 5'],
    [{ ...chat, temperature: 'hot' }, 'temperature: expected a number from 0 to 2, got "hot"'],
    [{ ...chat, temperature: -0.1 }, 'temperature: expected a number from 0 to 2, got -0.1'],
    [{ ...chat, temperature: 2.5 }, 'temperature: expected a number from 0 to 2, got 2.5'],
    [{ ...chat, top_p: 0 }, 'top_p: expected a number above 0 and up to 1, got 0'],
    [{ ...chat, top_k: -2 }, 'top_k: expected an integer from -1, got -2'],
    [{ ...chat, top_k: 1.5 }, 'top_k: expected an integer from -1, got 1.5'],
    [{ ...chat, min_p: 2 }, 'min_p: expected a number from 0 to 1, got 2'],
    [{ ...chat, presence_penalty: 3 }, 'presence_penalty: expected a number from -2 to 2, got 3'],
    [{ ...chat, repetition_penalty: 0 }, 'repetition_penalty: expected a number from 0.01 to 10, got 0'],
    [{ ...chat, seed: 1.5 }, 'seed: expected an integer, got 1.5'],
    [{ ...chat, n: 0 }, 'n: expected an integer from 1 to 16, got 0'],
    [{ ...chat, n: 1000 }, 'n: expected an integer from 1 to 16, got 1000'],
    [{ ...chat, stream: 'yes' }, 'stream: expected true or false, got "yes"'],
    [{ ...chat, max_tokens: 0 }, 'max_tokens: expected an integer from 1, got 0'],
    [{ ...chat, max_tokens: 1e12 }, 'max_tokens: expected an integer from 1, got 1000000000000'],
    [{ ...chat, min_tokens: 9, max_tokens: 3 }, 'min_tokens: expected at most max_tokens, which is 3, got 9'],
    [{ ...chat, stop: 5 }, 'stop: expected a string, or at most 16 strings'],
    [{ ...chat, stop: '' }, 'stop: expected a stop string that is not empty, got ""'],
    [{ ...chat, stop: Array(17).fill('x') }, 'stop: expected a string, or at most 16 strings'],
    [{ ...chat, stop_token_ids: [-1] }, 'stop_token_ids[0]: expected a token id, got -1'],
    [{ ...chat, stop_token_ids: [9999] }, 'stop_token_ids: expected token ids below 256, got 9999'],
    [{ ...chat, logit_bias: { x: 1 } }, 'logit_bias.x: expected token ids as keys'],
    [{ ...chat, logit_bias: { 5: 101 } }, 'logit_bias.5: expected a number from -100 to 100, got 101'],
    [{ ...chat, logit_bias: { 9999: 1 } }, 'logit_bias: expected token ids below 256, got 9999'],
    [{ ...chat, top_logprobs: 3 }, 'top_logprobs: expected logprobs: true beside it, got nothing'],
    [{ ...chat, logprobs: true, top_logprobs: 21 }, 'top_logprobs: expected an integer from 0 to 20, got 21'],
    [
      { ...chat, stream_options: { include_usage: true } },
      'stream_options: expected only beside stream: true',
    ],
    [{ ...chat, tools: 'all' }, 'tools: expected a list of at most 256 tools, got "all"'],
    [{ ...chat, tool_choice: 'required' }, 'tools: expected at least one beside tool_choice, got null'],
    [
      { ...chat, response_format: { type: 'xml' } },
      'response_format.type: expected text, json_object or json_schema, got "xml"',
    ],
    [{ ...chat, guided_json: 7 }, 'guided_json: expected a JSON schema: an object, true or false, got 7'],
    [{ ...chat, modalities: ['audio'] }, 'modalities: only ["text"] is supported'],
    [{ ...chat, chat_template: '{{ 1 }}' }, "chat_template: the model's own template is used"],
    [{ ...chat, functions: [{ name: 'f' }] }, 'functions: pass tools instead'],
  ])('%j', async (body, message) => {
    const response = await (await serveFake()).post(enginePaths.chat, body);
    expect([
      response.status,
      ((await response.json()) as { error: { message: string } }).error.message,
    ]).toEqual([400, expect.stringContaining(message)]);
  });
});

describe('a completion body', () => {
  test.each([
    [{}, 'prompt: expected a string, a list of strings'],
    [{ prompt: [] }, 'prompt: expected a string, a list of strings'],
    [{ prompt: '' }, 'prompt: expected at least one token, got none'],
    [{ prompt: [[]] }, 'prompt[0]: expected at least one token id, got a list of 0'],
    [{ prompt: [1, 'a'] }, 'prompt: expected a string, a list of strings'],
    [{ prompt: [-1] }, 'prompt[0]: expected a token id, got -1'],
    [{ prompt: [256] }, 'prompt: expected token ids below 256, got 256'],
    [{ prompt: Array(65).fill('x') }, 'at most 64 prompts'],
    [
      { prompt: Array(10).fill('x'), n: 10 },
      'expected at most 64 sequences in a request, got 10 prompts of 10 sequences',
    ],
    [{ ...completion, n: 3, best_of: 2 }, 'best_of: expected at least n, which is 3, got 2'],
    [{ ...completion, best_of: 2, stream: true }, 'best_of: expected no more than n when streaming, got 2'],
    [{ ...completion, suffix: 'x' }, 'suffix: insertion is not supported'],
    [{ ...completion, echo: true }, 'echo: echoing the prompt is not supported'],
    [{ ...completion, use_beam_search: true }, 'use_beam_search: beam search is not supported'],
    [{ ...completion, logprobs: true }, 'logprobs: expected an integer from 0 to 20, got true'],
    [{ prompt: 'x'.repeat(600) }, 'maximum context length is 512 tokens, but the prompt has 600 tokens'],
    [{ prompt: 'x'.repeat(10_000) }, 'the prompt has 10000 characters, more than 16 for each of them'],
    [{ prompt: 'x'.repeat(600), max_tokens: 1 }, 'but the prompt has 600 tokens.'],
    [{ ...completion, max_tokens: 511 }, 'the prompt has 2 tokens and max_tokens asks for 511 more'],
  ])('%j', async (body, message) => {
    const response = await (await serveFake()).post(enginePaths.completions, body);
    expect([
      response.status,
      ((await response.json()) as { error: { message: string } }).error.message,
    ]).toEqual([400, expect.stringContaining(message)]);
  });

  test('with null, false and unknown fields is taken as it is', async () => {
    const body = {
      ...completion,
      suffix: null,
      echo: false,
      stop: null,
      n: null,
      response_format: { type: 'text' },
    };
    const response = await (await serveFake()).post(enginePaths.completions, { ...body, whatever: { a: 1 } });
    expect(response.status).toBe(200);
  });
});

type Body = string | Uint8Array<ArrayBuffer> | null;

describe('a request', () => {
  const send = async (path: string, body: Body, init: RequestInit = {}) => {
    const served = await serveFake();
    return served.post(path, '', { body, ...init });
  };

  test.each<[string, Body, RequestInit, number, string]>([
    ['that is not JSON', '{"a":', {}, 400, 'invalid_json'],
    ['with no body', null, {}, 400, 'invalid_json'],
    ['that is not UTF-8', Uint8Array.of(0x22, 0xff, 0x22), {}, 400, 'invalid_json'],
    ['nested without end', '['.repeat(60_000), {}, 400, 'invalid_json'],
    ['that is too large', JSON.stringify('x'.repeat(70_000)), {}, 413, 'body_too_large'],
    [
      'that is a form',
      'a=1',
      { headers: { 'content-type': 'application/x-www-form-urlencoded' } },
      415,
      'unsupported_media_type',
    ],
    [
      'that is plain text',
      '{}',
      { headers: { 'content-type': 'text/plain' } },
      415,
      'unsupported_media_type',
    ],
    [
      'in an unknown encoding',
      '{}',
      { headers: { 'content-encoding': 'x-odd' } },
      415,
      'unsupported_media_type',
    ],
    [
      'that is not what its encoding says',
      '{}',
      { headers: { 'content-encoding': 'gzip' } },
      400,
      'invalid_json',
    ],
    ['with another method', null, { method: 'GET' }, 405, 'method_not_allowed'],
  ])('%s is refused', async (_name, body, init, status, code) => {
    const response = await send(enginePaths.completions, body, init);
    expect([response.status, await response.json()]).toEqual([
      status,
      expect.objectContaining({ code, error: expect.objectContaining({ code }) }),
    ]);
  });

  test('for an unknown path is 404', async () => {
    const response = await (await serveFake()).get('/v1/nothing');
    expect([response.status, await response.json()]).toEqual([
      404,
      expect.objectContaining({ code: 'path_not_found' }),
    ]);
  });

  test('for an unknown model is 404 with OpenAI’s code', async () => {
    const response = await (await serveFake()).post(enginePaths.chat, { ...chat, model: 'none' });
    expect([response.status, await response.json()]).toEqual([
      404,
      expect.objectContaining({
        error: expect.objectContaining({ code: 'model_not_found', param: 'model' }),
      }),
    ]);
  });

  test('with __proto__ in it changes nothing else', async () => {
    const served = await serveFake();
    await served.post(
      enginePaths.completions,
      '{"prompt":"hi","__proto__":{"echo":true},"logit_bias":{"__proto__":5}}',
    );
    expect(({} as { echo?: boolean }).echo).toBeUndefined();
    expect((await served.post(enginePaths.completions, completion)).status).toBe(200);
  });
});
