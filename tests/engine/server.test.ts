import { connect } from 'node:net';
import { setImmediate as nextTurn } from 'node:timers/promises';
import OpenAI from 'openai';
import { request } from 'undici';
import { describe, expect, test, vi } from 'vitest';
import { EngineError } from '../../engine/errors.ts';
import {
  type AdapterList,
  adaptersHeader,
  enginePaths,
  formatAdapters,
  formatStanding,
  modelHeader,
  type Standing,
  senderHeader,
  usageHeader,
  weightHeader,
} from '../../engine/protocol.ts';
import { readFakeAdapter } from '../fixtures/fake-engine-parts.ts';
import { eventsOf, type Served, serveFake } from '../fixtures/serve-fake.ts';

const chat = { model: 'base', messages: [{ role: 'user', content: 'hi' }], max_tokens: 4, temperature: 0 };
const completion = { model: 'base', prompt: 'hello', max_tokens: 4, temperature: 0 };

/** The scripted model answers with `words` after whatever prompt, then with end tokens. */
function spell(served: Served, numPromptTokens: number, words: string) {
  served.runtime.script = (position) => words.charCodeAt(position - numPromptTokens + 1) || 255;
}
const chatPromptLength = 'user: hi\nassistant:'.length;

/** Steps wait until it is called. */
function holdSteps({ runtime }: Served): () => void {
  const gate = Promise.withResolvers<void>();
  runtime.gate = gate.promise;
  return gate.resolve;
}
const allBack = ({ blocks }: Served) =>
  vi.waitFor(() => expect(blocks.numHeldPages).toBe(0), { interval: 1 });

describe('chat completions', () => {
  test('answer in OpenAI’s shape', async () => {
    const served = await serveFake();
    spell(served, chatPromptLength, 'ok');
    const response = await served.post(enginePaths.chat, chat);
    expect(await response.json()).toEqual({
      id: expect.stringMatching(/^chatcmpl-[0-9a-f]{32}$/),
      object: 'chat.completion',
      created: expect.any(Number),
      model: 'base',
      choices: [
        {
          index: 0,
          message: { role: 'assistant', content: 'ok', refusal: null },
          logprobs: null,
          finish_reason: 'stop',
          stop_reason: null,
        },
      ],
      usage: {
        prompt_tokens: chatPromptLength,
        completion_tokens: 3,
        total_tokens: chatPromptLength + 3,
        prompt_tokens_details: { cached_tokens: 0 },
      },
    });
  });

  test('stream the role, the text, the reason and the usage', async () => {
    const served = await serveFake();
    spell(served, chatPromptLength, 'ok');
    const response = await served.post(enginePaths.chat, {
      ...chat,
      stream: true,
      stream_options: { include_usage: true },
    });
    expect(response.headers.get('content-type')).toBe('text/event-stream; charset=utf-8');
    const events = await eventsOf(response);
    expect(events.pop()).toBe('[DONE]');
    const chunks = events.map((event) => JSON.parse(event));
    expect(chunks.map(({ choices }) => choices[0]?.delta)).toEqual([
      { role: 'assistant', content: '' },
      { content: 'o' },
      { content: 'k' },
      {},
      undefined,
    ]);
    expect(chunks[3].choices[0].finish_reason).toBe('stop');
    expect(chunks[0].usage).toBe(null);
    expect(chunks[4]).toMatchObject({ choices: [], usage: { completion_tokens: 3 } });
  });

  test('give as many choices as n, each with its own draw', async () => {
    const served = await serveFake();
    const response = await served.post(enginePaths.chat, { ...chat, temperature: 1, seed: 7, n: 3 });
    const { choices, usage } = (await response.json()) as OpenAI.ChatCompletion;
    expect(choices.map(({ index }) => index)).toEqual([0, 1, 2]);
    expect(new Set(choices.map(({ message }) => message.content)).size).toBe(3);
    expect(usage?.completion_tokens).toBe(12);
  });

  test('carry logprobs with tokens and bytes', async () => {
    const served = await serveFake();
    spell(served, chatPromptLength, 'ok');
    const response = await served.post(enginePaths.chat, { ...chat, logprobs: true, top_logprobs: 2 });
    const { choices } = (await response.json()) as OpenAI.ChatCompletion;
    const [first] = choices[0]!.logprobs!.content!;
    expect(first).toMatchObject({ token: 'o', bytes: [111], logprob: expect.any(Number) });
    expect(first!.top_logprobs.map(({ token }) => token)).toEqual(['o', 'p']);
  });

  test('join text parts and pass tools to the template', async () => {
    const served = await serveFake();
    const content = [
      { type: 'text', text: 'a' },
      { type: 'text', text: 'b' },
    ];
    const body = {
      ...chat,
      messages: [{ role: 'user', content }],
      tools: [{ type: 'function', function: { name: 'f' } }],
    };
    const { usage } = (await (await served.post(enginePaths.chat, body)).json()) as OpenAI.ChatCompletion;
    expect(usage?.prompt_tokens).toBe('user: a\nb\nassistant:'.length);
  });

  test('work with OpenAI’s own client, whole and streamed', async () => {
    const served = await serveFake();
    spell(served, chatPromptLength, 'ok');
    const client = new OpenAI({ baseURL: `${served.url}/v1`, apiKey: 'none' });
    const messages = [{ role: 'user' as const, content: 'hi' }];
    const whole = await client.chat.completions.create({ model: 'base', messages });
    expect(whole.choices[0]?.message.content).toBe('ok');
    let streamed = '';
    for await (const chunk of await client.chat.completions.create({
      model: 'base',
      messages,
      stream: true,
    })) {
      streamed += chunk.choices[0]?.delta.content ?? '';
    }
    expect(streamed).toBe('ok');
    const models = await client.models.list();
    expect(models.data.map(({ id }) => id)).toEqual(['base']);
  });
});

describe('completions', () => {
  test('answer in OpenAI’s shape', async () => {
    const served = await serveFake();
    spell(served, 5, 'abcdef');
    const response = await served.post(enginePaths.completions, { ...completion, logprobs: 1 });
    expect(await response.json()).toMatchObject({
      id: expect.stringMatching(/^cmpl-/),
      object: 'text_completion',
      choices: [
        {
          index: 0,
          text: 'abcd',
          finish_reason: 'length',
          logprobs: {
            tokens: ['a', 'b', 'c', 'd'],
            text_offset: [0, 1, 2, 3],
            top_logprobs: [{ a: expect.any(Number) }, {}, {}, {}],
          },
        },
      ],
    });
  });

  test.each([
    ['text', 'hello', 1],
    ['a list of texts', ['hello', 'you'], 2],
    ['token ids', [104, 105], 1],
    ['lists of token ids', [[104], [105, 106], [107]], 3],
  ])('take %s as prompt', async (_name, prompt, numChoices) => {
    const served = await serveFake();
    const response = await served.post(enginePaths.completions, { ...completion, prompt });
    const { choices } = (await response.json()) as OpenAI.Completion;
    expect(choices.map(({ index }) => index)).toEqual(
      Array.from({ length: numChoices }, (_, index) => index),
    );
  });

  test('return the likeliest n of best_of', async () => {
    const served = await serveFake();
    const ask = async (extra: object) => {
      const body = { ...completion, temperature: 1, seed: 3, logprobs: 0, ...extra };
      return ((await (await served.post(enginePaths.completions, body)).json()) as OpenAI.Completion).choices;
    };
    const mean = ({ logprobs }: OpenAI.CompletionChoice) =>
      logprobs!.token_logprobs!.reduce((sum, value) => sum + value, 0) / logprobs!.token_logprobs!.length;
    const all = (await ask({ n: 5 })).map(mean).sort((a, b) => b - a);
    const best = (await ask({ n: 2, best_of: 5 })).map(mean);
    expect(best).toEqual(all.slice(0, 2));
  });

  test('stream text pieces of several prompts, each under its index', async () => {
    const served = await serveFake();
    const body = { ...completion, prompt: ['hello', 'there'], stream: true };
    const events = await eventsOf(await served.post(enginePaths.completions, body));
    const whole = await served.post(enginePaths.completions, { ...completion, prompt: ['hello', 'there'] });
    const texts = ['', ''];
    for (const event of events.slice(0, -1)) {
      const [choice] = JSON.parse(event).choices;
      texts[choice.index] += choice.text;
    }
    const { choices } = (await whole.json()) as OpenAI.Completion;
    expect(texts).toEqual(choices.map(({ text }) => text));
  });

  test('end at a stop string and name it', async () => {
    const served = await serveFake();
    spell(served, 5, 'one. two');
    const body = { ...completion, max_tokens: 8, stop: ['. '] };
    const { choices } = (await (
      await served.post(enginePaths.completions, body)
    ).json()) as OpenAI.Completion;
    expect(choices[0]).toMatchObject({ text: 'one', finish_reason: 'stop', stop_reason: '. ' });
  });

  test('honour logit_bias', async () => {
    const served = await serveFake();
    const body = { ...completion, logit_bias: { 120: 100 } };
    const { choices } = (await (
      await served.post(enginePaths.completions, body)
    ).json()) as OpenAI.Completion;
    expect(choices[0]?.text).toBe('xxxx');
  });
});

describe('x-motet-usage', () => {
  const usage = (numCached: number) => `prompt=${chatPromptLength}, cached=${numCached}, completion=3`;
  async function ask(served: Served, fields: object, headers: Record<string, string>) {
    spell(served, chatPromptLength, 'ok');
    const body = JSON.stringify({ ...chat, ...fields });
    const answer = await request(served.url + enginePaths.chat, {
      method: 'POST',
      headers: { 'content-type': 'application/json', ...headers },
      body,
    });
    await answer.body.dump();
    return answer;
  }

  test('heads a whole answer and trails a stream', async () => {
    const served = await serveFake();
    expect((await ask(served, {}, { te: 'trailers' })).headers[usageHeader]).toBe(usage(0));
    const stream = await ask(served, { stream: true }, { te: 'gzip, trailers' });
    expect(stream.headers.trailer).toBe(usageHeader);
    // Of the same prompt one block was kept.
    expect(stream.trailers[usageHeader]).toBe(usage(16));
  });

  test('trails a stream that failed, with what was generated', async () => {
    const served = await serveFake();
    const release = holdSteps(served);
    const answer = ask(served, { stream: true }, { te: 'trailers' });
    await vi.waitFor(() => expect(served.blocks.numHeldPages).toBeGreaterThan(0), { interval: 1 });
    served.runtime.failNextStep = new Error('boom');
    release();
    expect((await answer).trailers[usageHeader]).toMatch(
      new RegExp(`^prompt=${chatPromptLength}, cached=0, completion=[01]$`),
    );
  });

  test('is told to nobody who did not ask', async () => {
    const served = await serveFake();
    for (const stream of [false, true]) {
      const { headers, trailers } = await ask(served, { stream }, {});
      expect({ ...headers, ...trailers }).not.toHaveProperty(usageHeader);
    }
  });
});

describe('adapters over HTTP', () => {
  const load = (served: Served, body: object) => served.post(enginePaths.loadAdapter, body);

  test('are loaded, listed, used and unloaded', async () => {
    const served = await serveFake();
    const response = await load(served, { lora_name: 'tuned', lora_path: '/tmp' });
    expect([response.status, await response.text()]).toEqual([
      200,
      "Success: LoRA adapter 'tuned' added successfully.",
    ]);

    const models = await (await served.get(enginePaths.models)).json();
    expect(models).toMatchObject({
      data: [
        { id: 'base', parent: null },
        { id: 'tuned', parent: 'base' },
      ],
    });
    const list = await (await served.get(enginePaths.adapters)).json();
    expect(list).toMatchObject({
      arena: { totalBytes: 64 * 1024, freeBytes: 62 * 1024, kvBytes: 0, adapterBytes: 2 * 1024 },
      data: [{ names: ['tuned'], tier: 'device', rank: 2, inFlight: 0, bytes: 2 * 1024 }],
    });

    const texts = [];
    for (const model of ['base', 'tuned', '']) {
      const reply = await served.post(enginePaths.completions, { ...completion, model });
      texts.push(((await reply.json()) as OpenAI.Completion).choices[0]?.text);
    }
    expect(texts[1]).not.toBe(texts[0]);
    expect(texts[2]).toBe(texts[0]);
    const { base, data } = (await (await served.get(enginePaths.adapters)).json()) as AdapterList;
    const [tuned] = data.map(({ prefixCache }) => prefixCache!);
    expect(tuned!.promptTokens).toBeGreaterThan(0);
    expect(base).toEqual({
      name: 'base',
      maxSequences: 8,
      prefixCache: { promptTokens: 2 * tuned!.promptTokens, cachedTokens: 0 },
    });

    const unloaded = await served.post(enginePaths.unloadAdapter, { lora_name: 'tuned' });
    expect(await unloaded.text()).toBe("Success: LoRA adapter 'tuned' removed successfully.");
    expect((await served.post(enginePaths.completions, { ...completion, model: 'tuned' })).status).toBe(404);
    expect(served.arena.numFree).toBe(64);
  });

  test.each([
    ['without a name', { lora_path: '/tmp' }, 400, 'InvalidUserInput', "Both 'lora_name' and 'lora_path'"],
    ['without a path', { lora_name: 'a' }, 400, 'InvalidUserInput', "Both 'lora_name' and 'lora_path'"],
    ['with an empty name', { lora_name: '', lora_path: '/tmp' }, 400, 'InvalidUserInput', 'must be provided'],
    [
      'with a comma in the name',
      { lora_name: 'a,b', lora_path: '/tmp' },
      400,
      'InvalidUserInput',
      'without commas',
    ],
    [
      'under the base’s name',
      { lora_name: 'base', lora_path: '/tmp' },
      400,
      'InvalidUserInput',
      'already been loaded',
    ],
    ['from nowhere', { lora_name: 'a', lora_path: '/none' }, 404, 'NotFoundError', 'No adapter found'],
    [
      'by a relative path',
      { lora_name: 'a', lora_path: 'x' },
      400,
      'BadRequestError',
      'expected an absolute path',
    ],
    [
      'in place, said wrong',
      { lora_name: 'a', lora_path: '/tmp', load_inplace: 1 },
      400,
      'invalid_request_error',
      'true or false',
    ],
  ])('are refused %s', async (_name, body, status, type, message) => {
    const response = await load(await serveFake(), body);
    const error = (await response.json()) as { error: object };
    expect(response.status).toBe(status);
    const fields = { type, message: expect.stringContaining(message) };
    expect(error).toMatchObject({ ...fields, object: 'error', error: fields });
  });

  const digestOf = (path: string) => `sha256:${Buffer.from(path).toString('hex').padEnd(64, '0')}`;
  /** Folders whose digests have the length that digests have. */
  const withDigests = () =>
    serveFake({
      tiers: { readFile: async (path) => ({ ...(await readFakeAdapter(path)), digest: digestOf(path) }) },
    });

  test('are loaded when they have the digest that was named, and refused when not', async () => {
    const served = await withDigests();
    const body = { lora_name: 'a', lora_path: '/tmp' };
    const refused = await load(served, { ...body, digest: digestOf('/usr') });
    expect(await refused.json()).toMatchObject({
      code: 'adapter_digest_mismatch',
      param: 'digest',
      message: `/tmp: expected digest ${digestOf('/usr')}, got ${digestOf('/tmp')}`,
    });
    expect(refused.status).toBe(400);
    expect((await load(served, { ...body, digest: digestOf('/tmp') })).status).toBe(200);
    expect(served.tiers.statuses()).toMatchObject([{ names: ['a'], path: '/tmp', digest: digestOf('/tmp') }]);
  });

  test('may be named by a file URI, which is what the listing shows', async () => {
    const served = await serveFake();
    expect((await load(served, { lora_name: 'a', lora_path: 'file:///tmp' })).status).toBe(200);
    const { data } = (await (await served.get(enginePaths.adapters)).json()) as AdapterList;
    expect(data).toMatchObject([{ path: 'file:///tmp', loadSeconds: { fetch: 0 } }]);
  });

  const anyDigest = `sha256:${'0'.repeat(64)}`;
  test.each([
    [
      'https without a digest',
      { lora_path: 'https://host/a' },
      'invalid_value',
      'digest: expected the digest',
    ],
    [
      'a digest of another kind',
      { lora_path: '/tmp', digest: 'md5:00' },
      'invalid_value',
      'digest: expected sha256:',
    ],
    [
      'a digest in capitals',
      { lora_path: '/tmp', digest: `sha256:${'A'.repeat(64)}` },
      'invalid_value',
      'digest',
    ],
    [
      'a scheme that is not known',
      { lora_path: 'gs://bucket/a', digest: anyDigest },
      'adapter_path_refused',
      'got gs://',
    ],
    ['http', { lora_path: 'http://host/a', digest: anyDigest }, 'adapter_path_refused', 'got http://'],
    [
      'a password',
      { lora_path: 'https://u:p@host/a', digest: anyDigest },
      'adapter_path_refused',
      'no user and password',
    ],
    ['no URL', { lora_path: 'https://', digest: anyDigest }, 'adapter_path_refused', 'got something else'],
    ['a file of another host', { lora_path: 'file://host/tmp' }, 'adapter_path_refused', 'got the host host'],
    ['a hidden slash', { lora_path: 'file:///tmp%2f..' }, 'adapter_path_refused', 'without encoded slashes'],
  ])('are refused by %s', async (_name, body, code, message) => {
    const response = await load(await serveFake(), { lora_name: 'a', ...body });
    const reply = (await response.json()) as { code: string; message: string };
    expect([response.status, reply.code]).toEqual([400, code]);
    expect(reply.message).toContain(message);
    expect(reply.message).not.toContain('u:p');
  });

  test('are listed by name while they are loaded', async () => {
    const gate = Promise.withResolvers<void>();
    const readFile = async (path: string) => {
      await gate.promise;
      return readFakeAdapter(path);
    };
    const served = await serveFake({ tiers: { readFile } });
    const loadingNow = async () =>
      ((await (await served.get(enginePaths.adapters)).json()) as AdapterList).loading;
    const loads = ['b', 'a'].map((name) => load(served, { lora_name: name, lora_path: '/tmp' }));
    await vi.waitFor(async () => expect(await loadingNow()).toEqual(['a', 'b']));
    gate.resolve();
    for (const response of await Promise.all(loads)) expect(response.status).toBe(200);
    expect(await loadingNow()).toEqual([]);
  });

  test('are listed with what there is to do, and who asks is told what of it others sent', async () => {
    const served = await serveFake({ limits: { maxSequences: 1 } });
    const release = holdSteps(served);
    const from = (sender: string) => ({ [senderHeader]: sender });
    const replies = [from('a'), from('b'), from('b'), {}].map((headers) =>
      served.post(enginePaths.completions, completion, { headers }),
    );
    const loadFor = async (headers: Record<string, string>) =>
      ((await (await served.get(enginePaths.adapters, headers)).json()) as AdapterList).load!;
    const numTokens = completion.prompt.length;
    await vi.waitFor(async () =>
      expect(await loadFor({})).toMatchObject({ running: 1, waiting: 3, promptTokens: 3 * numTokens }),
    );
    const all = await loadFor({});
    expect(all.others).toEqual({ running: 1, waiting: 3, promptTokens: 3 * numTokens });
    // One of b's may have come before a's.
    const loads = await Promise.all([from('a'), from('b'), from('c')].map(loadFor));
    expect(loads.map(({ others }) => others.running + others.waiting)).toEqual([3, 2, 4]);
    expect(loads.map(({ running, waiting }) => running + waiting)).toEqual([4, 4, 4]);
    expect(all.freeTokens).toBeLessThan(64 * served.runtime.blockTokens);
    release();
    for (const reply of replies) expect((await reply).status).toBe(200);
    await allBack(served);
    expect(await loadFor({})).toEqual({
      ...{ running: 0, waiting: 0, promptTokens: 0, freeTokens: 64 * served.runtime.blockTokens },
      others: { running: 0, waiting: 0, promptTokens: 0 },
    });
  });

  test('are not loaded any more while the engine drains', async () => {
    const served = await serveFake();
    await served.engine.drain(1);
    const response = await load(served, { lora_name: 'a', lora_path: '/tmp' });
    expect([response.status, await response.json()]).toEqual([
      503,
      expect.objectContaining({ code: 'draining' }),
    ]);
  });

  test('are refused a second time under one name, unless in place', async () => {
    const served = await serveFake();
    const body = { lora_name: 'a', lora_path: '/tmp' };
    expect((await load(served, body)).status).toBe(200);
    const again = await load(served, body);
    expect([again.status, await again.text()]).toEqual([400, expect.stringContaining('already been loaded')]);
    expect((await load(served, { ...body, load_inplace: true })).status).toBe(200);
  });

  test('that are not there cannot be unloaded', async () => {
    const response = await (await serveFake()).post(enginePaths.unloadAdapter, { lora_name: 'a' });
    expect([response.status, await response.json()]).toEqual([
      404,
      expect.objectContaining({ type: 'NotFoundError', message: expect.stringContaining('cannot be found') }),
    ]);
  });

  test('are refused outside the adapter root, links followed', async () => {
    const served = await serveFake({ adapterRoot: '/tmp' });
    const response = await load(served, { lora_name: 'a', lora_path: '/tmp/../usr' });
    expect([response.status, await response.text()]).toEqual([
      400,
      expect.stringContaining('under --adapter-root'),
    ]);
  });

  test('that are unloaded while prompts are encoded answer 404', async () => {
    const served = await serveFake();
    await served.tiers.load('a', '/a-r1', false);
    const reply = served.post(enginePaths.completions, { ...completion, model: 'a', prompt: ['x', 'y'] });
    const find = served.tiers.get.bind(served.tiers);
    served.tiers.get = (name) => {
      const adapter = find(name);
      if (adapter) served.tiers.unload(name);
      return adapter;
    };
    expect((await reply).status).toBe(404);
    expect(served.arena.numFree).toBe(64);
  });

  test('that find no room say how much there is, and when to come back', async () => {
    const served = await serveFake({ runtime: { numPages: 1 }, limits: { maxModelLen: 16 } });
    const response = await load(served, { lora_name: 'a', lora_path: '/tmp' });
    expect([response.status, response.headers.get('retry-after')]).toEqual([503, '1']);
    expect(await response.json()).toMatchObject({
      code: 'arena_full',
      message: expect.stringContaining('2048 bytes'),
    });
  });
});

describe('a composition', () => {
  const sum = [
    { name: 'a', weight: 0.5 },
    { name: 'b', weight: -1 },
  ];
  const withBoth = async () => {
    const served = await serveFake();
    for (const name of ['a', 'b']) await served.tiers.load(name, `/${name}-r1`, false);
    const ask = async (body: object, headers = {}) => {
      const reply = await served.post(enginePaths.completions, { ...completion, ...body }, { headers });
      const { choices, model, ...error } = (await reply.json()) as {
        choices?: { text: string }[];
        model: string;
      };
      return { status: reply.status, text: choices?.[0]?.text, model, error };
    };
    return { ...served, ask };
  };

  test('answers by body and by header alike, in any order, in place of the model', async () => {
    const { ask } = await withBoth();
    const byBody = await ask({ adapters: sum });
    expect(byBody).toMatchObject({ status: 200, model: 'base' });
    const others = [
      await ask({ adapters: [...sum].reverse() }),
      await ask({ model: 'base' }, { [adaptersHeader]: formatAdapters(sum) }),
      await ask({ model: 'base', adapters: sum.slice(1) }, { [adaptersHeader]: formatAdapters(sum) }),
      await ask({}, { [adaptersHeader]: formatAdapters(sum), [modelHeader]: 'b' }),
    ];
    expect(others.map(({ text }) => text)).toEqual(others.map(() => byBody.text));
    const single = await Promise.all(['base', 'a', 'b'].map((model) => ask({ model })));
    expect(new Set([byBody.text, ...single.map(({ text }) => text)]).size).toBe(4);
  });

  test('of one adapter with weight 1 is that adapter', async () => {
    const { ask } = await withBoth();
    expect((await ask({ adapters: [{ name: 'a', weight: 1 }] })).text).toBe((await ask({ model: 'a' })).text);
  });

  test('answers chats and streams, and embeds', async () => {
    const served = await withBoth();
    const headers = { [adaptersHeader]: formatAdapters(sum) };
    const chats = [
      { ...chat, model: 'base', adapters: sum },
      { ...chat, model: 'base', stream: true },
    ];
    for (const body of chats)
      expect((await served.post(enginePaths.chat, body, { headers })).status).toBe(200);
    const vector = async (body: object) => {
      const reply = await served.post(enginePaths.embeddings, { model: 'base', input: 'hello', ...body });
      return JSON.stringify(((await reply.json()) as { data: unknown }).data);
    };
    expect(await vector({ adapters: sum })).not.toBe(await vector({}));
  });

  test('with an adapter that is not there is 404, and says which', async () => {
    const { ask } = await withBoth();
    for (const name of ['c', 'base']) {
      const { status, error } = await ask({ adapters: [...sum, { name, weight: 1 }] });
      expect([status, error]).toMatchObject([
        404,
        { param: 'adapters', message: expect.stringContaining(name) },
      ]);
    }
  });

  test.each([
    [{ adapters: [] }, {}, 'adapters: expected a list of 1 to 8'],
    [
      { adapters: [{ name: 'a', weight: 0 }] },
      {},
      'adapters[0].weight: expected a number between -10 and 10, not 0',
    ],
    [{ adapters: 'a' }, {}, 'adapters: expected a list'],
    [{}, { [adaptersHeader]: 'a=1,a=2' }, 'x-motet-adapters[1].name: expected each adapter once'],
    [{}, { [adaptersHeader]: '' }, 'x-motet-adapters[0]: expected name=weight'],
    [{ adapters: sum }, { [modelHeader]: 'a' }, 'adapters: expected none beside x-motet-model'],
  ])('%j with headers %j is refused', async (body, headers, message) => {
    const { ask } = await withBoth();
    const { status, error } = await ask(body, headers);
    expect([status, error]).toMatchObject([400, { message: expect.stringContaining(message) }]);
  });
});

describe('x-motet-model', () => {
  const paths = [
    ['chat', enginePaths.chat, chat],
    ['text', enginePaths.completions, completion],
  ] as const;

  test.each(paths)(
    'chooses the adapter of a %s request, and the reply says what the body said',
    async (_name, path, body) => {
      const served = await serveFake();
      await served.tiers.load('tuned', '/a-r1', false);
      const answer = async (model: string, header?: string) => {
        const headers: Record<string, string> = header === undefined ? {} : { [modelHeader]: header };
        const reply = await served.post(path, { ...body, model }, { headers });
        const { model: said, choices } = (await reply.json()) as {
          model: string;
          choices: { text?: string; message?: { content: string } }[];
        };
        return [said, choices[0]!.text ?? choices[0]!.message?.content];
      };
      const [[, base], [, tuned]] = [await answer('base'), await answer('tuned')];
      expect(base).not.toBe(tuned);
      expect(await answer('an-alias', 'tuned')).toEqual(['an-alias', tuned]);
      expect(await answer('tuned', 'base')).toEqual(['tuned', base]);
    },
  );

  test('chooses for streams too, in each event', async () => {
    const served = await serveFake();
    await served.tiers.load('tuned', '/a-r1', false);
    const headers = { [modelHeader]: 'tuned' };
    const body = { ...completion, model: 'an-alias', stream: true };
    const events = await eventsOf(await served.post(enginePaths.completions, body, { headers }));
    expect(events.slice(0, -1).map((event) => JSON.parse(event).model)).toEqual(
      Array.from({ length: events.length - 1 }, () => 'an-alias'),
    );
    expect(served.tiers.statuses()).toMatchObject([{ names: ['tuned'], requests: 1 }]);
  });

  test('that names nothing is 404, also for /tokenize', async () => {
    const served = await serveFake();
    const headers = { [modelHeader]: 'none' };
    for (const [path, body] of [
      [enginePaths.completions, completion],
      [enginePaths.tokenize, { model: 'base', prompt: 'x' }],
    ] as const) {
      const reply = await served.post(path, body, { headers });
      expect([reply.status, await reply.json()]).toEqual([
        404,
        expect.objectContaining({ code: 'model_not_found', message: expect.stringContaining('`none`') }),
      ]);
    }
  });

  test.each([
    ['empty', ''],
    ['too long', 'x'.repeat(257)],
    ['not printable', 'a\tb'],
    ['not ASCII', 'caf\u00e9'],
  ])('that is %s is refused', async (_name, header) => {
    const served = await serveFake();
    const reply = await served.post(enginePaths.completions, completion, {
      headers: { [modelHeader]: header },
    });
    expect([reply.status, await reply.json()]).toEqual([
      400,
      expect.objectContaining({ code: 'invalid_value', param: modelHeader }),
    ]);
  });
});

describe('whose a request is', () => {
  test('decides who is next, by the headers that the gateway sets', async () => {
    const served = await serveFake({ limits: { maxSequences: 1 } });
    const release = holdSteps(served);
    const ended: string[] = [];
    const replies: Promise<unknown>[] = [];
    const ask = async (name: string, standing: Standing, path: string, body: object) => {
      const numWaiting = served.engine.numWaiting + served.engine.numRunning;
      const reply = served.post(path, body, { headers: formatStanding(standing) });
      await vi.waitFor(() =>
        expect(served.engine.numWaiting + served.engine.numRunning).toBe(numWaiting + 1),
      );
      replies.push(reply.then(({ status }) => ended.push(`${name} ${status}`)));
    };
    const of = (tenant: string, priority = 0) => ({ tenant, weight: 1, priority });
    await ask('first', of('a'), enginePaths.completions, completion);
    await ask('low', of('a', -1), enginePaths.completions, completion);
    await ask('second', of('a'), enginePaths.chat, chat);
    await ask('vector', of('b'), enginePaths.embeddings, { model: 'base', input: 'text' });
    release();
    await Promise.all(replies);
    expect(ended).toEqual(['first 200', 'vector 200', 'second 200', 'low 200']);
  });

  test('is refused by the name of the header that is wrong', async () => {
    const served = await serveFake();
    const response = await served.post(enginePaths.completions, completion, {
      headers: { [weightHeader]: '-1' },
    });
    const { error } = (await response.json()) as { error: { param: string; message: string } };
    expect([response.status, error.param]).toEqual([400, weightHeader]);
    expect(error.message).toBe('x-motet-weight: expected a number above 0 and up to 1000, got -1');
  });
});

describe('load', () => {
  test('beyond the queue gets 429 with Retry-After', async () => {
    const served = await serveFake({ limits: { maxSequences: 1, maxWaiting: 0 } });
    const release = holdSteps(served);
    const first = served.post(enginePaths.completions, completion);
    await vi.waitFor(() => expect(served.engine.numRunning).toBe(1), { interval: 1 });
    const refused = await served.post(enginePaths.completions, completion);
    expect(refused.status).toBe(429);
    expect(Number(refused.headers.get('retry-after'))).toBeGreaterThan(0);
    expect(await refused.json()).toMatchObject({ error: { type: 'rate_limit_error', code: 'overloaded' } });
    release();
    expect((await first).status).toBe(200);
  });

  test('while draining gets 503, and what runs is finished', async () => {
    const served = await serveFake();
    const release = holdSteps(served);
    const first = served.post(enginePaths.completions, completion);
    await vi.waitFor(() => expect(served.engine.numRunning).toBe(1), { interval: 1 });
    const drained = served.engine.drain(60_000);
    const refused = await served.post(enginePaths.completions, completion);
    expect([refused.status, refused.headers.get('retry-after')]).toEqual([503, '5']);
    expect((await served.get(enginePaths.readyz)).status).toBe(503);
    expect((await served.get(enginePaths.livez)).status).toBe(200);
    release();
    expect((await first).status).toBe(200);
    await drained;
  });
});

describe('a client that goes away', () => {
  test.each([true, false])('frees its blocks (stream: %s)', async (stream) => {
    const served = await serveFake();
    const abort = new AbortController();
    const body = { ...completion, max_tokens: 500, ignore_eos: true, stream };
    const reply = served.post(enginePaths.completions, body, { signal: abort.signal });
    const ended = reply.then((response) => response.text()).catch(() => 'gone');
    await vi.waitFor(() => expect(served.blocks.numHeldPages).toBeGreaterThan(0), { interval: 1 });
    abort.abort();
    await allBack(served);
    expect(await ended).toBe('gone');
    expect(served.runtime.steps.length).toBeLessThan(500);
  });

  test('or only stops reading is dropped when its buffer is full', async () => {
    const served = await serveFake({
      runtime: { numPages: 8192 },
      limits: { maxModelLen: 120_000 },
      server: { maxBufferedBytes: 16 * 1024 },
    });
    served.runtime.script = () => 120;
    const body = JSON.stringify({ ...completion, max_tokens: 100_000, stream: true, logprobs: 20 });
    const socket = connect(served.port, '127.0.0.1');
    socket.write(
      `POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: ${body.length}\r\n\r\n${body}`,
    );
    socket.pause();
    const isClosed = new Promise((resolve) => socket.once('close', resolve).on('error', () => {}));
    await vi.waitFor(() => expect(served.blocks.numHeldPages).toBeGreaterThan(0), { interval: 1 });
    await vi.waitFor(() => expect(served.blocks.numHeldPages).toBe(0), { timeout: 20_000, interval: 5 });
    expect(served.runtime.steps.length).toBeLessThan(100_000);
    socket.resume();
    await isClosed;
  });
});

describe('a step that fails', () => {
  test('is a 500 that says nothing of the inside', async () => {
    const served = await serveFake();
    served.runtime.failNextStep = new Error('secret address 0x1234');
    const response = await served.post(enginePaths.completions, completion);
    expect(response.status).toBe(500);
    expect(await response.text()).not.toContain('secret');
    expect((await served.post(enginePaths.completions, completion)).status).toBe(200);
  });

  test('after the first event ends the stream with an error event', async () => {
    const served = await serveFake();
    const release = holdSteps(served);
    const response = await served.post(enginePaths.completions, { ...completion, stream: true });
    served.runtime.failNextStep = new Error('boom');
    release();
    const events = await eventsOf(response);
    expect(JSON.parse(events.at(-1)!)).toMatchObject({ error: { code: 'step_failed' } });
    await nextTurn();
    await allBack(served);
  });
});

describe('text routes', () => {
  test('tokenize a prompt and a conversation, and go back', async () => {
    const served = await serveFake();
    const tokens = await (await served.post(enginePaths.tokenize, { prompt: 'hi' })).json();
    expect(tokens).toEqual({ count: 2, max_model_len: 512, tokens: [104, 105], token_strs: null });
    const { messages } = chat;
    expect(await (await served.post(enginePaths.tokenize, { messages })).json()).toMatchObject({
      count: chatPromptLength,
    });
    const back = await served.post(enginePaths.detokenize, { tokens: [104, 105] });
    expect(await back.json()).toEqual({ prompt: 'hi' });
  });
});

describe('keys', () => {
  test.each([
    ['none', {}, 401],
    ['a wrong one', { authorization: 'Bearer no' }, 401],
    ['another scheme', { authorization: 'Basic one' }, 401],
    ['a known one', { authorization: 'Bearer two' }, 200],
  ])('%s', async (_name, headers, status) => {
    const served = await serveFake({ server: { apiKeys: ['one', 'two'] } });
    expect((await served.get(enginePaths.models, headers)).status).toBe(status);
    expect((await served.get(enginePaths.livez)).status).toBe(200);
  });
});

describe('callers of the cluster', () => {
  /** Judges as the real one does; caller-identity.test.ts has the judging itself. */
  const callers = {
    async check(token: string) {
      if (token === 'good.token') return;
      if (token === 'other.token') throw new EngineError('forbidden', 'not among those');
      throw new EngineError('unauthorized', 'no such token');
    },
  };

  test.each([
    ['none', '', 401],
    ['a trusted one', 'Bearer good.token', 200],
    ['another one', 'Bearer other.token', 403],
    ['a bad token', 'Bearer bad.token', 401],
    ['the scheme alone', 'Bearer', 401],
    ['another scheme', 'Basic good.token', 401],
    ['a key beside them', 'Bearer one', 200],
  ])('%s', async (_name, authorization, status) => {
    const served = await serveFake({ server: { apiKeys: ['one'], callers } });
    expect((await served.get(enginePaths.adapters, { authorization })).status).toBe(status);
    for (const path of [enginePaths.livez, enginePaths.readyz, enginePaths.metrics]) {
      expect((await served.get(path)).status).toBe(200);
    }
  });

  test('are asked for where there are no keys', async () => {
    const served = await serveFake({ server: { callers } });
    expect((await served.get(enginePaths.models)).status).toBe(401);
    expect((await served.get(enginePaths.models, { authorization: 'Bearer good.token' })).status).toBe(200);
  });
});

describe('x-request-id', () => {
  test('is echoed, or made when absent or odd', async () => {
    const served = await serveFake();
    const idOf = async (headers: Record<string, string>) =>
      (await served.get(enginePaths.livez, headers)).headers.get('x-request-id');
    expect(await idOf({ 'x-request-id': 'mine-1' })).toBe('mine-1');
    expect(await idOf({})).toMatch(/^[0-9a-f-]{36}$/);
    expect(await idOf({ 'x-request-id': 'x'.repeat(200) })).toMatch(/^[0-9a-f-]{36}$/);
  });
});

describe('metrics', () => {
  const metricsOf = async (served: Served) => (await served.get(enginePaths.metrics)).text();

  test('carry vLLM’s names with the model’s', async () => {
    const served = await serveFake();
    await served.post(enginePaths.completions, completion);
    const text = await metricsOf(served);
    expect(text).toContain('vllm:num_requests_running{model_name="base",engine="0"} 0');
    expect(text).toContain('vllm:generation_tokens_total{model_name="base",engine="0"} 4');
    expect(text).toContain('vllm:prompt_tokens_total{model_name="base",engine="0"} 5');
    expect(text).toMatch(/vllm:request_success_total\{finished_reason="length",.*\} 1/);
    expect(text).toMatch(/vllm:time_to_first_token_seconds_count\{.*\} 1/);
    expect(text).toMatch(/motet_arena_bytes\{kind="free",.*\} 65536/);
  });

  test('tell what taken pages waste: nothing when nobody runs, and what an adapter leaves of its last page', async () => {
    const served = await serveFake();
    await served.tiers.load('b', '/b-r3', false);
    const text = await metricsOf(served);
    expect(text).toMatch(/motet_arena_unused_bytes\{kind="kv",.*\} 0/);
    expect(text).toMatch(/motet_arena_unused_bytes\{kind="adapter",.*\} 512/);
  });

  test('show residency, and one live series of LoRA information', async () => {
    const served = await serveFake();
    await metricsOf(served);
    await served.tiers.load('b', '/b-r3', false);
    await metricsOf(served);
    await served.tiers.load('a', '/a-r1', false);
    const text = await metricsOf(served);
    const series = text.split('\n').filter((line) => line.startsWith('vllm:lora_requests_info{'));
    expect(series).toEqual([expect.stringContaining('running_lora_adapters="a,b",waiting_lora_adapters=""')]);
    expect(text).toMatch(
      /vllm:lora_adapter_loaded\{adapter_name="b",level="gpu",pinned="false",rank="3",.*\} 1/,
    );
    served.tiers.unload('b');
    expect(await metricsOf(served)).not.toContain('adapter_name="b"');
  });

  test('count what was asked of sources, and time what was not cached', async () => {
    const served = await serveFake();
    const { metrics } = served;
    metrics.observeFetch({ kind: 'adapter', result: 'fetched', seconds: 2, bytes: 100 });
    metrics.observeFetch({ kind: 'adapter', result: 'cached', seconds: 0, bytes: 0 });
    metrics.observeFetch({ kind: 'model', result: 'unavailable', seconds: 3, bytes: 0 });
    const text = await metricsOf(served);
    expect(text).toMatch(/motet_source_fetches_total\{kind="adapter",result="fetched",.*\} 1/);
    expect(text).toMatch(/motet_source_fetches_total\{kind="adapter",result="cached",.*\} 1/);
    expect(text).toMatch(/motet_source_fetches_total\{kind="model",result="unavailable",.*\} 1/);
    expect(text).toMatch(/motet_source_fetch_seconds_count\{.*kind="adapter".*\} 1/);
    expect(text).toMatch(/motet_source_fetch_bytes_total\{kind="adapter",.*\} 100/);
  });
});
