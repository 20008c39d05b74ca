/**
 * The main job as an application team sees it: the official OpenAI client, the gateway, one engine, every example
 * adapter. Each adapter must solve its held-out set as well as PEFT does with the same files, all in one batch.
 */
import OpenAI from 'openai';
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

/** Held-out items per adapter that are asked here; all of them, at most. */
const numItems = 100;
/** How far exact match may be from PEFT's, in points of a hundred. */
const maxPointsOff = 2;

let engine: RunningProcess;
let gateway: RunningProcess;
let client: OpenAI;
beforeAll(async () => {
  engine = await startSmollm2();
  gateway = await startGatewayOver([engine.url]);
  client = new OpenAI({ baseURL: `${gateway.url}/v1`, apiKey: 'none', maxRetries: 0 });
});
afterAll(async () => {
  expect(await gateway.stop()).toBe(0);
  expect(await engine.stop()).toBe(0);
});

test('the base and every adapter are listed, adapters with their parent', async () => {
  const models = (await client.models.list()).data as (OpenAI.Model & { parent: string | null })[];
  expect(models.map(({ id }) => id).sort()).toEqual(
    ['base', ...exampleAdapters.map(({ name }) => name)].sort(),
  );
  for (const { id, parent } of models) expect(parent).toBe(id === 'base' ? null : 'base');
});

test('each adapter solves a prompt of its task that the base does not', async () => {
  for (const { name, maxTokens } of exampleAdapters) {
    const [item] = evalItems(name);
    const ask = async (model: string) => {
      const { messages } = item!;
      const reply = await client.chat.completions.create({
        model,
        messages,
        max_tokens: maxTokens,
        temperature: 0,
      });
      return reply.choices[0]!.message.content!.trim();
    };
    expect(await ask(name)).toBe(item!.answer);
    expect(await ask('base')).not.toBe(item!.answer);
  }
});

test('a stream says the same as the whole answer', async () => {
  const { name, maxTokens } = exampleAdapters[0]!;
  const request = {
    model: name,
    messages: evalItems(name)[1]!.messages,
    max_tokens: maxTokens,
    temperature: 0,
  };
  const whole = await client.chat.completions.create(request);
  let streamed = '';
  let usage: OpenAI.CompletionUsage | null | undefined;
  const stream = await client.chat.completions.create({
    ...request,
    stream: true,
    stream_options: { include_usage: true },
  });
  for await (const chunk of stream) {
    streamed += chunk.choices[0]?.delta.content ?? '';
    usage = chunk.usage ?? usage;
  }
  expect(streamed).toBe(whole.choices[0]!.message.content);
  // The second time the prefix cache has more of the prompt.
  const { prompt_tokens_details: cached, ...counts } = usage!;
  expect(whole.usage).toMatchObject(counts);
  expect(cached!.cached_tokens).toBe(Math.floor((usage!.prompt_tokens - 1) / 16) * 16);
});

/** How many of its first `numItems` held-out items each adapter solves, all adapters asked at once. */
function scoresOf(openai: OpenAI, numItems: number) {
  return Promise.all(
    exampleAdapters.map(async ({ name, maxTokens }) => {
      const items = evalItems(name).slice(0, numItems);
      let correct = 0;
      let asPeft = 0;
      const queue = items.values();
      // Eight at a time per adapter: batches mix all adapters, and the engine's queue stays short.
      const worker = async () => {
        for (const { messages, answer, peft } of queue) {
          const reply = await openai.chat.completions.create({
            model: name,
            messages,
            max_tokens: maxTokens,
            temperature: 0,
          });
          const text = reply.choices[0]!.message.content!.trim();
          if (text === answer.trim()) correct++;
          if (text === peft.trim()) asPeft++;
        }
      };
      await Promise.all(Array.from({ length: 8 }, worker));
      const peftCorrect = items.filter(({ answer, peft }) => answer.trim() === peft.trim()).length;
      return {
        adapter: name,
        items: items.length,
        correct,
        'PEFT correct': peftCorrect,
        'same text as PEFT': asPeft,
      };
    }),
  );
}

test('exact match of every adapter, asked all at once, is within 2 points of PEFT', async () => {
  const scores = await scoresOf(client, numItems);
  console.table(scores);
  for (const score of scores) {
    const pointsOff = (100 * Math.abs(score.correct - score['PEFT correct'])) / score.items;
    expect(pointsOff, score.adapter).toBeLessThanOrEqual(maxPointsOff);
  }
}, 300_000);

test('rounded to int8, every adapter solves its task to one item in 25', async () => {
  const rounded = await startSmollm2(['--adapter-quantization', 'int8']);
  const openai = new OpenAI({ baseURL: `${rounded.url}/v1`, apiKey: 'none', maxRetries: 0 });
  const scores = await scoresOf(openai, 25);
  console.table(scores);
  for (const score of scores) {
    expect(Math.abs(score.correct - score['PEFT correct']), score.adapter).toBeLessThanOrEqual(1);
  }
  const [kept, halved] = await Promise.all(
    [engine, rounded].map(({ url }) => getJson<AdapterList>(`${url}/v1/adapters`)),
  );
  expect(halved!.arena.adapterBytes).toBeLessThan(kept!.arena.adapterBytes);
  expect(halved!.data.map(({ digest }) => digest).sort()).toEqual(
    kept!.data.map(({ digest }) => digest).sort(),
  );
  expect(await rounded.stop()).toBe(0);
}, 120_000);

test('after all of that no sequence holds memory', async () => {
  // The last answer may be out before the last step is over.
  await vi.waitFor(async () => {
    const { arena, data } = await getJson<AdapterList>(`${engine.url}/v1/adapters`);
    expect(arena.kvBytes).toBe(0);
    expect(data.map(({ inFlight }) => inFlight)).toEqual(exampleAdapters.map(() => 0));
    expect(arena.freeBytes + arena.adapterBytes).toBe(arena.totalBytes);
  }, 5_000);
});
