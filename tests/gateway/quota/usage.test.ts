import { expect, test } from 'vitest';
import { formatUsage, parseUsage } from '../../../engine/protocol.ts';
import { StreamUsage, usageOfAnswer } from '../../../gateway/quota/usage.ts';
import { chunkEvent } from '../../fixtures/fake-engine.ts';

const usage = { promptTokens: 12, cachedTokens: 5, completionTokens: 34 };
const told = { ...usage, isEstimate: false };
const openai =
  '"usage":{"prompt_tokens":12,"completion_tokens":34,"total_tokens":46,"prompt_tokens_details":{"cached_tokens":5}}';

function streamed(events: string[], trailer?: string) {
  const stream = new StreamUsage(41);
  for (const event of events) stream.push(Buffer.from(event));
  return stream.usage(trailer);
}

test('what is written into the header is read from it', () => {
  expect(parseUsage(formatUsage(usage))).toEqual(usage);
  expect(parseUsage(`${formatUsage(usage)}, later=1`)).toEqual(usage);
});

test.each([
  undefined,
  '',
  'prompt=1',
  'prompt=-1, cached=0, completion=1',
  'prompt=1e3, cached=0, completion=1',
])('the header %s says nothing', (value) => expect(parseUsage(value)).toBeNull());

test("the engine's header goes before the answer's own usage", () => {
  const body = Buffer.from('{"usage":{"prompt_tokens":1,"completion_tokens":1}}');
  expect(usageOfAnswer(formatUsage(usage), body)).toEqual(told);
});

test.each([
  ['as OpenAI writes it', `{"choices":[],${openai}}`],
  ['with spaces', `{"choices":[], ${openai.replaceAll(':', ' : ')} , "prompt_logprobs":null}`],
  ['before a token of that name', `{${openai},"choices":[{"logprobs":{"top_logprobs":[{"usage":-1.5}]}}]}`],
  ['after text that quotes one', `{"text":${JSON.stringify('"usage":{"prompt_tokens":9}')},${openai}}`],
])('usage is read from a whole answer: %s', (_, body) => {
  expect(usageOfAnswer(undefined, Buffer.from(body))).toEqual(told);
});

test('an embedding has no completion tokens', () => {
  const body = Buffer.from('{"data":[],"usage":{"prompt_tokens":3,"total_tokens":3}}');
  expect(usageOfAnswer(undefined, body)).toMatchObject({ promptTokens: 3, completionTokens: 0 });
});

test.each([
  '{"error":{"message":"no"}}',
  '{"usage":{"prompt_tokens":"many"}}',
  '{"usage":{"prompt_tokens":1',
  '',
])('an answer that does not say has no usage: %s', (body) =>
  expect(usageOfAnswer(undefined, Buffer.from(body))).toBeNull(),
);

test('the trailer of a stream goes before its events', () => {
  expect(streamed([chunkEvent('a')], formatUsage(usage))).toEqual(told);
});

test('the usage event of a stream is read where no trailer comes', () => {
  expect(streamed([chunkEvent('a'), `data: {"choices":[],${openai}}\n\ndata: [DONE]\n\n`])).toEqual(told);
});

test('a stream that does not say is counted by its events, and its prompt by its length', () => {
  const begin = chunkEvent('');
  const end = 'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n';
  expect(
    streamed([begin, chunkEvent('a') + chunkEvent('b'), chunkEvent('c') + end, 'data: [DONE]\n\n']),
  ).toEqual({
    promptTokens: 11,
    cachedTokens: 0,
    completionTokens: 3,
    isEstimate: true,
  });
});

test('comments, errors and text that looks like events are no tokens', () => {
  const error = 'data: {"error":{"message":"no"}}\n\n';
  expect(streamed([': keep-alive\n\n', chunkEvent('a\n\ndata: {"choices":[{}]}'), error])).toMatchObject({
    completionTokens: 1,
  });
});
