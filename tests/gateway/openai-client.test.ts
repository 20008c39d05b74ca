// The official client, as applications use it, against the gateway and fake engines.

import OpenAI, { APIError, NotFoundError, RateLimitError } from 'openai';
import { expect, test } from 'vitest';
import { answerForever, refuse, startFakeEngine } from '../fixtures/fake-engine.ts';
import { gatewayFor } from './start-gateway.ts';

const messages = [{ role: 'user' as const, content: 'hello' }];
const clientOf = ({ url }: { url: string }) =>
  new OpenAI({ baseURL: `${url}/v1`, apiKey: 'unused', maxRetries: 0 });

test('lists models and completes a chat', async () => {
  const client = clientOf(await gatewayFor([await startFakeEngine({ adapters: ['a'] })]));
  const models = await Array.fromAsync(client.models.list());
  expect(models.map(({ id }) => id)).toEqual(['base', 'a']);
  const { choices } = await client.chat.completions.create({ model: 'a', messages });
  expect(choices[0]?.message.content).toBe('fake words');
});

test('completes a text', async () => {
  const client = clientOf(await gatewayFor([await startFakeEngine()]));
  const { choices } = await client.completions.create({ model: 'base', prompt: 'hello' });
  expect(choices[0]?.text).toBe('fake words');
});

test('streams a chat', async () => {
  const client = clientOf(await gatewayFor([await startFakeEngine()]));
  const stream = await client.chat.completions.create({ model: 'base', messages, stream: true });
  const pieces = await Array.fromAsync(stream, ({ choices }) => choices[0]?.delta.content);
  expect(pieces.join('')).toBe('fake words');
});

test('gets its own exception for an unknown model', async () => {
  const client = clientOf(await gatewayFor([await startFakeEngine()]));
  const asked = client.chat.completions.create({ model: 'nowhere', messages });
  await expect(asked).rejects.toThrow(NotFoundError);
  await expect(asked).rejects.toMatchObject({ code: 'model_not_found', param: 'model', status: 404 });
});

test('gets its own exception for an engine that has no room', async () => {
  const client = clientOf(await gatewayFor([await startFakeEngine({ script: refuse(429, 'busy') })]));
  await expect(client.chat.completions.create({ model: 'base', messages })).rejects.toThrow(RateLimitError);
});

test('gets an exception, after the words that came, when the engine is killed within a stream', async () => {
  const engine = await startFakeEngine({ script: answerForever });
  const client = clientOf(await gatewayFor([engine]));
  const stream = await client.chat.completions.create({ model: 'base', messages, stream: true });
  const pieces: unknown[] = [];
  const read = async () => {
    for await (const { choices } of stream) {
      pieces.push(choices[0]?.delta.content);
      await engine.kill();
    }
  };
  const failed = read();
  await expect(failed).rejects.toThrow(APIError);
  await expect(failed).rejects.toMatchObject({ code: 'engine_failed' });
  expect(pieces).toEqual(['fake']);
});

test('stops the engine when it aborts a stream', async () => {
  const engine = await startFakeEngine({ script: answerForever });
  const client = clientOf(await gatewayFor([engine]));
  const stream = await client.chat.completions.create({ model: 'base', messages, stream: true });
  for await (const _ of stream) break;
  await engine.received[0]!.closed;
});
