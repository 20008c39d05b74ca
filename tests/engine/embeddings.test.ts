import OpenAI from 'openai';
import { describe, expect, test } from 'vitest';
import { normalise, Pool } from '../../engine/embeddings.ts';
import { enginePaths, modelHeader, usageHeader } from '../../engine/protocol.ts';
import { fakeHiddenSize } from '../fixtures/fake-runtime.ts';
import { type Served, serveFake } from '../fixtures/serve-fake.ts';

const long = 'a text that takes several steps of 32 tokens, since it is longer than one of them by far';

async function vectorsOf(served: Served, body: object, headers: Record<string, string> = {}) {
  const response = await served.post(enginePaths.embeddings, body, { headers });
  expect(response.status).toBe(200);
  const { data } = (await response.json()) as { data: { embedding: number[] }[] };
  return data.map(({ embedding }) => embedding);
}

describe('embeddings', () => {
  test('answer in OpenAI’s shape, with vectors of length 1', async () => {
    const served = await serveFake();
    const response = await served.post(
      enginePaths.embeddings,
      { model: 'base', input: ['one', 'seven'] },
      { headers: { te: 'trailers' } },
    );
    const answer = (await response.json()) as { data: { embedding: number[] }[] };
    expect(answer).toEqual({
      object: 'list',
      data: [0, 1].map((index) => ({ object: 'embedding', index, embedding: expect.any(Array) })),
      model: 'base',
      usage: { prompt_tokens: 8, total_tokens: 8, prompt_tokens_details: { cached_tokens: 0 } },
    });
    for (const { embedding } of answer.data) {
      expect(embedding).toHaveLength(fakeHiddenSize);
      expect(Math.hypot(...embedding)).toBeCloseTo(1, 6);
    }
    expect(response.headers.get(usageHeader)).toBe('prompt=8, cached=0, completion=0');
  });

  test('are the same for text and its tokens, and from OpenAI’s client, which asks for base64', async () => {
    const served = await serveFake();
    const [text] = await vectorsOf(served, { input: 'hello' });
    expect(await vectorsOf(served, { input: [...Buffer.from('hello')] })).toEqual([text]);
    expect(await vectorsOf(served, { input: [[...Buffer.from('hello')]] })).toEqual([text]);
    const client = new OpenAI({ baseURL: `${served.url}/v1`, apiKey: 'none', maxRetries: 0 });
    const { data } = await client.embeddings.create({ model: 'base', input: 'hello' });
    expect(Array.from(data[0]!.embedding)).toEqual(text);
  });

  test.each(['last', 'mean'] as const)(
    'with pooling %s do not depend on chunks, neighbours or the cache',
    async (pooling) => {
      const whole = await serveFake({ limits: { maxBatchTokens: 256 }, server: { pooling } });
      const expected = await vectorsOf(whole, { input: [long, long, `${long} and on`] });
      expect(expected[0]).not.toEqual(expected[2]);
      const chunked = await serveFake({
        limits: { maxBatchTokens: 8, maxSequences: 8 },
        server: { pooling },
      });
      for (let times = 0; times < 2; times++) {
        expect(await vectorsOf(chunked, { input: [long, long, `${long} and on`] })).toEqual(expected);
      }
    },
  );

  test('of more inputs than the queue holds come in order', async () => {
    const served = await serveFake({ limits: { maxWaiting: 40 } });
    const input = Array.from({ length: 100 }, (_, i) => `text ${i}`);
    const all = await vectorsOf(served, { input });
    expect(all).toHaveLength(100);
    expect(all[73]).toEqual((await vectorsOf(served, { input: input[73] }))[0]);
  });

  test('of an adapter are its own, by body and by header', async () => {
    const served = await serveFake();
    await served.tiers.load('tone', '/tone-r2', false);
    const [base] = await vectorsOf(served, { input: 'hello' });
    const [tone] = await vectorsOf(served, { model: 'tone', input: 'hello' });
    expect(tone).not.toEqual(base);
    expect(await vectorsOf(served, { model: 'alias', input: 'hello' }, { [modelHeader]: 'tone' })).toEqual([
      tone,
    ]);
  });

  test('are cut to dimensions, at length 1', async () => {
    const served = await serveFake();
    const [whole] = await vectorsOf(served, { input: 'hello' });
    const [cut] = await vectorsOf(served, { input: 'hello', dimensions: 2 });
    expect(cut).toHaveLength(2);
    expect(Math.hypot(...cut!)).toBeCloseTo(1, 6);
    expect(cut![0]! / cut![1]!).toBeCloseTo(whole![0]! / whole![1]!, 4);
  });

  test('count no output tokens, and leave nothing behind', async () => {
    const served = await serveFake();
    await vectorsOf(served, { input: [long, 'short'] });
    const text = await (await served.get('/metrics')).text();
    expect(text).toMatch(/^vllm:generation_tokens_total(\{.*\})? 0$/m);
    await expect.poll(() => served.blocks.numHeldPages).toBe(0);
  });

  test.each([
    ['no input', {}, 'input'],
    ['empty text', { input: '' }, 'input'],
    ['an empty list', { input: [] }, 'input'],
    ['a token that the model has not', { input: [99_999] }, 'input'],
    ['more than 2048 inputs', { input: Array(2049).fill('a') }, 'input'],
    ['more dimensions than there are', { input: 'a', dimensions: fakeHiddenSize + 1 }, 'dimensions'],
    ['another encoding', { input: 'a', encoding_format: 'int8' }, 'encoding_format'],
    ['an unknown model', { input: 'a', model: 'nobody' }, 'model'],
    ['a text longer than the context', { input: 'a'.repeat(600) }, 'input'],
  ])('are refused by name for %s', async (_, body, param) => {
    const served = await serveFake();
    const response = await served.post(enginePaths.embeddings, body);
    const { error } = (await response.json()) as { error: { param: string } };
    expect([response.status < 500, error.param]).toEqual([true, param]);
  });

  test('end with the client’s connection', async () => {
    const served = await serveFake();
    const gate = Promise.withResolvers<void>();
    served.runtime.gate = gate.promise;
    const hangUp = new AbortController();
    const asked = served.post(enginePaths.embeddings, { input: [long, long] }, { signal: hangUp.signal });
    await expect.poll(() => served.engine.numRunning).toBe(1);
    hangUp.abort();
    await expect(asked).rejects.toThrow();
    gate.resolve();
    await expect.poll(() => served.engine.numRunning + served.engine.numWaiting).toBe(0);
  });
});

test('a pool begins anew when rows come again', () => {
  const pool = new Pool();
  pool.add(0, Float32Array.of(9, 9, 9, 9), 2);
  pool.add(0, Float32Array.of(1, 2), 1);
  pool.add(1, Float32Array.of(3, 4, 5, 6), 2);
  expect([...pool.mean()]).toEqual([3, 4]);
});

test('a vector of zeros has no direction and stays', () => {
  expect([...normalise(new Float64Array(2), null)]).toEqual([0, 0]);
});
