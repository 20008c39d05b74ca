import { describe, expect, test } from 'vitest';
import { parseLorax } from '../../../gateway/protocols/lorax.ts';
import {
  answerForever,
  beginStream,
  refuse,
  type Script,
  startFakeEngine,
} from '../../fixtures/fake-engine.ts';
import { gatewayFor } from '../start-gateway.ts';

const inputs = 'a secret question';

/** One token of a completion as our engine says it. */
const choice = (token: string, id: number, end: object = { finish_reason: null }, text = token) => ({
  index: 0,
  text,
  logprobs: {
    tokens: [token],
    token_logprobs: [-0.5],
    top_logprobs: [null],
    text_offset: [0],
    token_ids: [id],
  },
  ...end,
});
const stop = { finish_reason: 'stop', stop_reason: null };
const usage = { prompt_tokens: 7, completion_tokens: 3, total_tokens: 10 };

/** Answers like an engine that says `Hi!` and its end token. */
const completion: Script = ({ body, res }) => {
  const { stream, model } = JSON.parse(body.toString());
  const choices = [choice('Hi', 11), choice('!', 12), choice('<end>', 2, stop, '')];
  if (!stream) {
    const logprobs = {
      tokens: ['Hi', '!', '<end>'],
      token_logprobs: [-0.5, -0.5, -0.5],
      token_ids: [11, 12, 2],
    };
    res.writeHead(200, { 'content-type': 'application/json' });
    res.end(JSON.stringify({ model, choices: [{ index: 0, text: 'Hi!', logprobs, ...stop }], usage }));
    return;
  }
  beginStream(res);
  for (const one of choices) res.write(`data: ${JSON.stringify({ choices: [one], usage: null })}\n\n`);
  res.end(`data: ${JSON.stringify({ choices: [], usage })}\n\ndata: [DONE]\n\n`);
};

async function start(script: Script = completion, adapters = ['tone']) {
  const engine = await startFakeEngine({ adapters, script });
  const gateway = await gatewayFor([engine]);
  const post = (path: string, body: unknown) =>
    fetch(gateway.url + path, {
      method: 'POST',
      body: JSON.stringify(body),
      headers: { 'content-type': 'application/json' },
    });
  const sent = () => JSON.parse(engine.received.at(-1)!.body.toString());
  return { engine, gateway, post, sent };
}

async function eventsOf(response: Response) {
  const text = await response.text();
  return text
    .split('\n\n')
    .filter((event) => event !== '')
    .map((event) => JSON.parse(event.replace(/^data:/, '')));
}

const token = (id: number, text: string, special = false) => ({ id, text, logprob: -0.5, special });

describe('/generate', () => {
  test('answers the text, and with details its tokens', async () => {
    const { post, sent, engine } = await start();
    const plain = await post('/generate', { inputs });
    expect([plain.status, await plain.json()]).toEqual([200, { generated_text: 'Hi!' }]);
    expect(engine.received[0]!.path).toBe('/v1/completions');
    expect(sent()).toMatchObject({ model: 'base', prompt: inputs, temperature: 0, max_tokens: 100 });

    const answer = await post('/generate', { inputs, parameters: { adapter_id: 'tone', details: true } });
    expect(await answer.json()).toEqual({
      generated_text: 'Hi!',
      details: {
        finish_reason: 'eos_token',
        prompt_tokens: 7,
        generated_tokens: 3,
        seed: null,
        prefill: [],
        tokens: [token(11, 'Hi'), token(12, '!'), token(2, '<end>', true)],
      },
    });
    expect(sent()).toMatchObject({ model: 'tone' });
  });

  test('counts its tokens and names its model in the metrics', async () => {
    const { post, gateway } = await start();
    await (await post('/generate', { inputs, parameters: { adapter_id: 'tone' } })).text();
    const metrics = await (await fetch(`${gateway.url}/metrics`)).text();
    expect(metrics).toMatch(/requests_total\{route="\/generate",model="tone"[^}]*status="200"\} 1/);
    expect(metrics).toMatch(/tokens_total\{[^}]*model="tone"[^}]*\} 7/);
  });
});

describe('/generate_stream', () => {
  test('says one event a token, and the whole in the last one', async () => {
    const { post } = await start();
    const response = await post('/generate_stream', {
      inputs,
      parameters: { details: true, return_full_text: true, do_sample: true, seed: 5 },
    });
    expect(response.headers.get('content-type')).toContain('text/event-stream');
    expect(await eventsOf(response)).toEqual([
      { token: token(11, 'Hi'), generated_text: null, details: null },
      { token: token(12, '!'), generated_text: null, details: null },
      {
        token: token(2, '<end>', true),
        generated_text: `${inputs}Hi!`,
        details: { finish_reason: 'eos_token', prompt_tokens: 7, generated_tokens: 3, seed: 5 },
      },
    ]);
  });

  test('tells an engine’s failure in the middle as an event', async () => {
    const { post } = await start(({ res }) => {
      beginStream(res);
      res.write(`data: ${JSON.stringify({ choices: [choice('Hi', 11)] })}\n\n`);
      res.end(`data: ${JSON.stringify({ error: { message: 'the step failed', code: 'step_failed' } })}\n\n`);
    });
    const events = await eventsOf(await post('/generate_stream', { inputs }));
    expect(events.slice(1)).toEqual([{ error: 'the step failed', error_type: 'generation' }]);
  });

  test('tells an engine that dies as an event', async () => {
    const { post, engine } = await start(({ res }) => {
      beginStream(res);
      res.write(`data: ${JSON.stringify({ choices: [choice('Hi', 11)] })}\n\n`, () => void engine.kill());
    });
    const events = await eventsOf(await post('/generate_stream', { inputs }));
    expect(events.slice(1)).toEqual([{ error: expect.any(String), error_type: 'generation' }]);
  });

  test('ends in the engine when its client hangs up', async () => {
    const { post, engine } = await start(answerForever);
    const received = engine.nextReceived();
    const response = await post('/generate_stream', { inputs });
    await response.body!.cancel();
    await (await received).closed;
  });
});

describe('/', () => {
  test('answers a list, or a stream when the body says so', async () => {
    const { post } = await start();
    expect(await (await post('/', { inputs, stream: false })).json()).toEqual([{ generated_text: 'Hi!' }]);
    expect(await eventsOf(await post('/', { inputs, stream: true }))).toHaveLength(3);
  });
});

describe('/embed', () => {
  const embedding: Script = ({ res }) => {
    res.writeHead(200, { 'content-type': 'application/json' });
    res.end(JSON.stringify({ data: [{ index: 0, embedding: [0.6, 0.8] }], usage: { prompt_tokens: 3 } }));
  };

  test('answers the vector of a text, also of an adapter', async () => {
    const { post, sent, engine } = await start(embedding);
    // As LoRAX's client sends it.
    const response = await post('/embed', { inputs, parameters: null, stream: false });
    expect([response.status, await response.json()]).toEqual([200, { embeddings: [0.6, 0.8] }]);
    expect(engine.received[0]!.path).toBe('/v1/embeddings');
    expect(sent()).toEqual({ model: 'base', input: inputs, encoding_format: 'float' });
    await post('/embed', { inputs, parameters: { adapter_id: 'tone' } });
    expect(sent()).toMatchObject({ model: 'tone' });
  });

  test.each([
    ['no text', { inputs: '' }, completion, 422, 'validation'],
    ['what cannot be honoured', { inputs, parameters: { api_token: 'a' } }, completion, 422, 'validation'],
    ['no such adapter', { inputs, parameters: { adapter_id: 'nobody' } }, completion, 404, 'model_not_found'],
    ['an engine that refuses', { inputs }, refuse(400, 'some_code'), 422, 'validation'],
    ['an answer without a vector', { inputs }, completion, 424, 'generation'],
  ] as const)('tells %s in LoRAX’s shape', async (_, body, script, status, error_type) => {
    const { post } = await start(script);
    const response = await post('/embed', body);
    expect([response.status, await response.json()]).toEqual([
      status,
      { error: expect.any(String), error_type },
    ]);
  });
});

test.each(['/classify', '/classify_batch'])('%s says that there is no head for it', async (path) => {
  const { post, engine } = await start();
  const response = await post(path, { inputs });
  expect([response.status, await response.json()]).toEqual([
    422,
    { error: expect.stringMatching(`^${path}: expected .* got causal`), error_type: 'validation' },
  ]);
  expect(engine.received).toEqual([]);
});

describe('parameters', () => {
  const translate = (parameters: object, stream = false) =>
    JSON.parse(parseLorax({ inputs, parameters }, ['base'], stream, () => 42).body.toString());

  test('that sample do so, with a seed that clients are told', () => {
    expect(translate({ temperature: 0.7, top_k: 5, top_p: 0.9 })).toMatchObject({
      temperature: 0.7,
      top_k: 5,
      top_p: 0.9,
      seed: 42,
    });
    expect(translate({ do_sample: true, seed: 7 })).toMatchObject({ temperature: 1, seed: 7 });
    expect(translate({ temperature: 0, do_sample: true })).toMatchObject({ temperature: 0 });
  });

  test('of the output go to the engine', () => {
    const schema = { type: 'object' };
    expect(
      translate({
        max_new_tokens: 9,
        stop: ['END'],
        ignore_eos_token: true,
        repetition_penalty: 1.2,
        response_format: { type: 'json_object', schema },
      }),
    ).toMatchObject({
      max_tokens: 9,
      stop: ['END'],
      ignore_eos: true,
      repetition_penalty: 1.2,
      response_format: { type: 'json_schema', json_schema: { name: 'response', schema } },
    });
  });

  test.each([
    ['adapter_source', { adapter_source: 'hub' }],
    ['api_token', { api_token: 'hf_secret' }],
    ['truncate', { truncate: 5 }],
    ['typical_p', { typical_p: 0.5 }],
    ['watermark', { watermark: true }],
    ['decoder_input_details', { decoder_input_details: true }],
    ['return_k_alternatives', { return_k_alternatives: 2 }],
    ['merged_adapters', { merged_adapters: { ids: ['a'], weights: [1] }, adapter_id: 'b' }],
    [
      'merged_adapters.merge_strategy',
      { merged_adapters: { ids: ['a'], weights: [1], merge_strategy: 'slerp' } },
    ],
    ['merged_adapters.density', { merged_adapters: { ids: ['a', 'b'], merge_strategy: 'ties' } }],
    [
      'merged_adapters.density',
      { merged_adapters: { ids: ['a', 'b'], merge_strategy: 'dare_linear', density: 0 } },
    ],
    [
      'merged_adapters.majority_sign_method',
      { merged_adapters: { ids: ['a'], majority_sign_method: 'most' } },
    ],
    ['merged_adapters.weights', { merged_adapters: { ids: ['a', 'b'], weights: [1] } }],
    ['adapters[1].weight', { merged_adapters: { ids: ['a', 'b'], weights: [1, 0] } }],
    ['adapters[1].name', { merged_adapters: { ids: ['a', 'a'] } }],
    ['adapters', { merged_adapters: { ids: [] } }],
    ['best_of', { best_of: 2 }],
    ['max_new_tokens', { max_new_tokens: 0 }],
    ['temperature', { temperature: 'hot' }],
  ])('that cannot be honoured are refused by name: %s', async (field, parameters) => {
    const { post, engine } = await start();
    const response = await post('/generate', { inputs, parameters });
    const { error, error_type } = (await response.json()) as { error: string; error_type: string };
    expect([response.status, error_type]).toEqual([422, 'validation']);
    expect(error).toContain(`${field}: `);
    expect(error).not.toContain('hf_secret');
    expect(engine.received).toHaveLength(0);
  });

  test('of merged adapters are a composition, with weights of 1 where none are given', () => {
    const asked = (merged_adapters: object) =>
      parseLorax({ inputs, parameters: { merged_adapters } }, ['base'], false, () => 1).asked;
    expect(
      asked({ ids: ['a', 'b'], weights: [0.5, -2], merge_strategy: 'linear', density: 0 }),
    ).toMatchObject({
      model: 'a+b',
      adapters: [
        { name: 'a', weight: 0.5 },
        { name: 'b', weight: -2 },
      ],
    });
    expect(asked({ ids: ['a', 'b'], weights: [] }).adapters?.map(({ weight }) => weight)).toEqual([1, 1]);
  });

  test.each(['ties', 'dare_linear', 'dare_ties'])('of merged adapters are merged by %s', (method) => {
    const asked = (more: object) => {
      const merged_adapters = {
        ids: ['a', 'b'],
        weights: [1, 2],
        merge_strategy: method,
        density: 0.2,
        ...more,
      };
      return parseLorax({ inputs, parameters: { merged_adapters } }, ['base'], false, () => 1).asked;
    };
    expect(asked({ majority_sign_method: null })).toMatchObject({
      model: 'a+b',
      merge: { method, density: 0.2, majoritySign: 'total' },
    });
    expect(asked({ majority_sign_method: 'frequency' }).merge?.majoritySign).toBe('frequency');
    expect(asked({ merge_strategy: 'linear' })).not.toHaveProperty('merge');
  });

  test('that clients send as null or false change nothing', () => {
    const nothing = { adapter_source: null, api_token: null, watermark: false, truncate: null, top_k: null };
    expect(translate({ ...nothing, merged_adapters: null, adapter_id: '' })).toEqual(translate({}));
  });

  test('must name a base model when there are several', () => {
    const parse = (bases: string[]) => () => parseLorax({ inputs }, bases, false, () => 1);
    expect(parse(['a', 'b'])).toThrow('adapter_id: expected one of the base models a, b');
    expect(parse([])).toThrow('no base model');
  });
});

describe('errors', () => {
  test.each([
    ['without inputs', {}, 422, 'validation'],
    [
      'for a model that does not exist',
      { inputs, parameters: { adapter_id: 'nobody' } },
      404,
      'model_not_found',
    ],
  ])('%s have LoRAX’s shape', async (_, body, status, error_type) => {
    const { post } = await start();
    const response = await post('/generate', body);
    expect([response.status, await response.json()]).toEqual([
      status,
      { error: expect.any(String), error_type },
    ]);
  });

  test.each([
    [400, 422, 'validation'],
    [429, 429, 'overloaded'],
    [500, 424, 'generation'],
  ])('of an engine that answers %i are %i', async (engineStatus, status, error_type) => {
    const { post } = await start(refuse(engineStatus, 'some_code'));
    const response = await post('/generate', { inputs });
    expect([response.status, await response.json()]).toEqual([
      status,
      { error: 'the fake engine refuses', error_type },
    ]);
  });

  test('of a missing key and of the method too', async () => {
    const engine = await startFakeEngine();
    const gateway = await gatewayFor([engine], { apiKeys: new Map([['us', 'k'.repeat(32)]]) });
    const missing = await fetch(`${gateway.url}/generate`, { method: 'POST', body: '{}' });
    expect([missing.status, await missing.json()]).toEqual([
      401,
      { error: expect.any(String), error_type: 'missing_api_key' },
    ]);
    const { url } = await gatewayFor([engine]);
    const got = await fetch(`${url}/generate`);
    expect([got.status, got.headers.get('allow'), await got.json()]).toEqual([
      405,
      'POST',
      { error: expect.any(String), error_type: 'method_not_allowed' },
    ]);
  });
});

test('/health and /info say what there is', async () => {
  const { gateway, engine } = await start();
  expect((await fetch(`${gateway.url}/health`)).status).toBe(200);
  expect(await (await fetch(`${gateway.url}/info`)).json()).toMatchObject({
    model_id: 'base',
    model_pipeline_tag: 'text-generation',
  });
  await engine.kill();
  await expect.poll(async () => (await fetch(`${gateway.url}/health`)).status).toBe(503);
});
