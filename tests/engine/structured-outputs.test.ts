// Forms of outputs and tool calls through the server, around a fake grammar library: an expression allows itself alone.

import OpenAI from 'openai';
import { expect, test } from 'vitest';
import { enginePaths } from '../../engine/protocol.ts';
import { eventsOf, type Served, serveFake } from '../fixtures/serve-fake.ts';

const chat = {
  model: 'base',
  messages: [{ role: 'user' as const, content: 'hi' }],
  max_tokens: 200,
  temperature: 0,
};
const tools = [
  { type: 'function' as const, function: { name: 'f', parameters: { type: 'object', properties: {} } } },
];
const call = '<tool_call>\n{"name": "f", "arguments": {"a": [1]}}\n</tool_call>';

/** The scripted model answers the chat above with `words`. */
function spell(served: Served, words: string) {
  const { length } = 'user: hi\nassistant:';
  served.runtime.script = (position) => words.charCodeAt(position - length + 1) || 255;
}

const clientOf = (served: Served) =>
  new OpenAI({ baseURL: `${served.url}/v1`, apiKey: 'none', maxRetries: 0 });

test('every choice follows the grammar with a matcher of its own, which is closed at the end', async () => {
  const served = await serveFake();
  const response = await served.post(enginePaths.completions, {
    model: 'base',
    prompt: ['one', 'two'],
    n: 2,
    guided_regex: 'form',
  });
  const { choices } = (await response.json()) as { choices: { text: string; finish_reason: string }[] };
  expect(choices.map(({ text, finish_reason }) => [text, finish_reason])).toEqual(
    Array.from({ length: 4 }, () => ['form', 'stop']),
  );
  await expect.poll(() => served.runtime.matchers.size).toBe(0);
});

test('a sequence that was preempted goes on where it was', async () => {
  const served = await serveFake({ runtime: { numPages: 8 } });
  const form = 'a form that is longer than its share of the arena, so that somebody has to wait';
  const answers = Array.from({ length: 4 }, async (_, i) => {
    const body = { model: 'base', prompt: `${i} asks`, max_tokens: 100, guided_regex: form };
    const response = await served.post(enginePaths.completions, body);
    return ((await response.json()) as { choices: { text: string }[] }).choices[0]!.text;
  });
  expect(await Promise.all(answers)).toEqual(answers.map(() => form));
  expect((await served.metrics.preemptions.get()).values[0]!.value).toBeGreaterThan(0);
});

test('max_tokens cuts what follows a form too', async () => {
  const served = await serveFake();
  const response = await served.post(enginePaths.chat, { ...chat, max_tokens: 2, guided_regex: 'form' });
  expect(await response.json()).toMatchObject({
    choices: [{ message: { content: 'fo' }, finish_reason: 'length' }],
  });
});

test('a form that cannot be followed is refused by its field', async () => {
  const served = await serveFake();
  const response = await served.post(enginePaths.chat, { ...chat, guided_regex: '!' });
  expect(response.status).toBe(400);
  expect(await response.json()).toMatchObject({
    error: {
      code: 'invalid_value',
      param: 'guided_regex',
      message: expect.stringContaining('got: it says so'),
    },
  });
  expect(served.runtime.matchers.size).toBe(0);
});

test('a grammar that fails in the middle ends its sequence alone', async () => {
  const served = await serveFake();
  const [failed, other] = await Promise.all([
    served.post(enginePaths.chat, { ...chat, guided_regex: 'so!' }),
    served.post(enginePaths.chat, { ...chat, guided_regex: 'form' }),
  ]);
  expect(failed.status).toBe(400);
  expect(await failed.json()).toMatchObject({ error: { code: 'grammar_failed' } });
  expect(await other.json()).toMatchObject({ choices: [{ message: { content: 'form' } }] });
});

test.each([
  [{ ignore_eos: true, guided_regex: 'a' }, 'ignore_eos'],
  [{ ignore_eos: true, tools }, 'ignore_eos'],
  [{ tools, response_format: { type: 'json_object' } }, 'response_format'],
])('%j is refused', async (fields, param) => {
  const served = await serveFake();
  const response = await served.post(enginePaths.chat, { ...chat, ...fields });
  expect(response.status).toBe(400);
  expect(await response.json()).toMatchObject({ error: { code: 'invalid_value', param } });
});

test('a form goes beside tools that may not be called', async () => {
  const served = await serveFake();
  const response = await served.post(enginePaths.chat, {
    ...chat,
    tools,
    tool_choice: 'none',
    guided_regex: 'form',
  });
  expect(await response.json()).toMatchObject({ choices: [{ message: { content: 'form' } }] });
});

test('calls are told as OpenAI tells them', async () => {
  const served = await serveFake();
  spell(served, `I look.\n${call}\n${call}`);
  const completion = await clientOf(served).chat.completions.create({ ...chat, tools });
  expect(completion.choices[0]).toMatchObject({
    finish_reason: 'tool_calls',
    message: {
      content: 'I look.\n',
      tool_calls: Array.from({ length: 2 }, () => ({
        id: expect.stringMatching(/^call_/),
        type: 'function',
        function: { name: 'f', arguments: '{"a": [1]}' },
      })),
    },
  });
});

test('an answer of calls alone has no content, and one without calls has no calls', async () => {
  const served = await serveFake();
  spell(served, call);
  const [called] = (await clientOf(served).chat.completions.create({ ...chat, tools })).choices;
  expect(called!.message.content).toBeNull();
  spell(served, 'No need.');
  const [said] = (await clientOf(served).chat.completions.create({ ...chat, tools })).choices;
  expect(said).toMatchObject({ finish_reason: 'stop', message: { content: 'No need.' } });
  expect(said!.message.tool_calls).toBeUndefined();
});

test('a stream of calls adds up in the client', async () => {
  const served = await serveFake();
  spell(served, `I look.\n${call}\n${call}`);
  const stream = clientOf(served).chat.completions.stream({ ...chat, tools, logprobs: true });
  const [choice] = (await stream.finalChatCompletion()).choices;
  expect(choice).toMatchObject({
    finish_reason: 'tool_calls',
    message: {
      content: 'I look.\n',
      tool_calls: [
        { type: 'function', function: { name: 'f', arguments: '{"a": [1]}' } },
        { type: 'function', function: { name: 'f', arguments: '{"a": [1]}' } },
      ],
    },
  });
  // None of the tokens' logprobs is lost: one a byte, and the end token.
  expect(choice!.logprobs!.content).toHaveLength(`I look.\n${call}\n${call}`.length + 1);
});

test('a stream that is cut in a call ends by length', async () => {
  const served = await serveFake();
  spell(served, call);
  const response = await served.post(enginePaths.chat, { ...chat, max_tokens: 50, tools, stream: true });
  const events = await eventsOf(response);
  expect(events.at(-1)).toBe('[DONE]');
  const { choices } = JSON.parse(events.at(-2)!) as { choices: unknown[] };
  expect(choices[0]).toMatchObject({ delta: {}, finish_reason: 'length' });
});
