// Files and batches as the official client uses them.

import type OpenAI from 'openai';
import { BadRequestError, ConflictError, NotFoundError, toFile } from 'openai';
import type { FileListParams } from 'openai/resources/files';
import { describe, expect, test } from 'vitest';
import { answerForever, refuse, type Script, startFakeEngine } from '../../fixtures/fake-engine.ts';
import { errorOf, until } from '../start-gateway.ts';
import {
  asked,
  begin,
  clientOf,
  echo,
  ended,
  endpoint,
  gatewayWithBatches,
  jsonl,
  keys,
  line,
  linesOf,
} from './batches-setup.ts';

const upload = async (client: OpenAI, text: string, name = 'lines.jsonl') =>
  client.files.create({ purpose: 'batch', file: await toFile(Buffer.from(text), name) });

describe('files', () => {
  test('are uploaded, listed, read and deleted', async () => {
    const client = clientOf(await gatewayWithBatches([await startFakeEngine()]));
    const file = await upload(client, 'one\ntwo\n', 'my lines.jsonl');
    expect(file).toMatchObject({ object: 'file', bytes: 8, filename: 'my lines.jsonl', purpose: 'batch' });
    expect(file.expires_at! - file.created_at).toBe(30 * 86_400);
    expect(await client.files.retrieve(file.id)).toEqual(file);
    expect(await (await client.files.content(file.id)).text()).toBe('one\ntwo\n');
    expect((await client.files.list()).data).toEqual([file]);
    expect(await client.files.delete(file.id)).toEqual({ id: file.id, object: 'file', deleted: true });
    await expect(client.files.retrieve(file.id)).rejects.toThrow(NotFoundError);
    await expect(client.files.content(file.id)).rejects.toMatchObject({
      code: 'file_not_found',
      status: 404,
    });
  });

  test('are listed page by page, in both orders and by purpose', async () => {
    const client = clientOf(await gatewayWithBatches([await startFakeEngine()]));
    const ids: string[] = [];
    for (let i = 0; i < 5; i++) {
      ids.push((await upload(client, 'x')).id);
      await new Promise((resolve) => setTimeout(resolve, 2));
    }
    const listed = async (query: FileListParams) =>
      (await Array.fromAsync(client.files.list(query))).map(({ id }) => id);
    expect(await listed({ limit: 2 })).toEqual(ids.toReversed());
    expect(await listed({ limit: 2, order: 'asc' })).toEqual(ids);
    expect(await listed({ purpose: 'batch_output' })).toEqual([]);
    const page = await client.files.list({ limit: 2, after: ids[3]! });
    expect(page.data.map(({ id }) => id)).toEqual([ids[2], ids[1]]);
    expect(page.has_more).toBe(true);
    await expect(client.files.list({ after: '../..' })).rejects.toMatchObject({ param: 'after' });
    await expect(client.files.list({ limit: 0 })).rejects.toMatchObject({
      code: 'invalid_value',
      param: 'limit',
    });
  });

  test('may be kept for less long', async () => {
    const client = clientOf(await gatewayWithBatches([await startFakeEngine()]));
    const file = await client.files.create({
      ...{ purpose: 'batch', expires_after: { anchor: 'created_at', seconds: 7200 } },
      file: await toFile(Buffer.from('x'), 'x'),
    });
    expect(file.expires_at! - file.created_at).toBe(7200);
  });

  test("are the tenant's own: another's are not there", async () => {
    const gateway = await gatewayWithBatches([await startFakeEngine({ script: answerForever })]);
    const [a, b] = [clientOf(gateway), clientOf(gateway, 'team-b')];
    const file = await upload(a, jsonl([line('1')]));
    const batch = await begin(a, [line('1')]);
    expect((await b.files.list()).data).toEqual([]);
    expect((await b.batches.list()).data).toEqual([]);
    for (const ask of [
      () => b.files.retrieve(file.id),
      () => b.files.content(file.id),
      () => b.files.delete(file.id),
      () => b.batches.create({ input_file_id: file.id, endpoint, completion_window: '24h' }),
      () => b.batches.retrieve(batch.id),
      () => b.batches.cancel(batch.id),
    ]) {
      await expect(ask()).rejects.toThrow(NotFoundError);
    }
    await a.batches.cancel(batch.id);
    await ended(a, batch.id);
    const withoutKey = await fetch(`${gateway.url}/v1/files`);
    expect(withoutKey.status).toBe(401);
  });

  test('that are too large, or too many for a tenant, are refused, and take no room', async () => {
    const gateway = await gatewayWithBatches([await startFakeEngine()], {
      maxFileBytes: 1000,
      maxTenantBytes: 2500,
    });
    const client = clientOf(gateway);
    await expect(upload(client, 'x'.repeat(1001))).rejects.toMatchObject({
      status: 413,
      code: 'file_too_large',
    });
    for (let i = 0; i < 2; i++) await upload(client, 'x'.repeat(1000));
    await expect(upload(client, 'x'.repeat(1000))).rejects.toMatchObject({ code: 'tenant_storage_full' });
    expect((await client.files.list()).data).toHaveLength(2);
    await upload(clientOf(gateway, 'team-b'), 'x'.repeat(1000));
  });
});

describe('an upload that is not as it must be', () => {
  const boundary = 'XX';
  const part = (name: string, content: string, more = '') =>
    `--${boundary}\r\nContent-Disposition: form-data; name="${name}"${more}\r\n\r\n${content}\r\n`;
  const file = part('file', 'x', '; filename="f"');
  const end = `--${boundary}--\r\n`;
  const purpose = part('purpose', 'batch');

  test.each([
    ['no file', purpose + end, 400, 'missing_required_parameter'],
    ['no purpose', file + end, 400, 'missing_required_parameter'],
    ['another purpose', part('purpose', 'assistants') + file + end, 400, 'invalid_value'],
    ['two files', purpose + file + file + end, 400, 'invalid_multipart'],
    ['a file of another name', purpose + part('data', 'x', '; filename="f"') + end, 400, 'invalid_multipart'],
    ['many fields', Array(40).fill(purpose).join('') + file + end, 400, 'invalid_multipart'],
    ['a long field', part('purpose', 'x'.repeat(5000)) + file + end, 400, 'invalid_multipart'],
    ['no end', purpose + file, 400, 'invalid_multipart'],
    ['nothing', '', 400, 'invalid_multipart'],
    ['something else', '{"purpose":"batch"}', 400, 'invalid_multipart'],
    ['a life too short', purpose + part('expires_after[seconds]', '5') + file + end, 400, 'invalid_value'],
  ])('%s', async (_name, body, status, code) => {
    const gateway = await gatewayWithBatches([await startFakeEngine()]);
    const response = await fetch(`${gateway.url}/v1/files`, {
      method: 'POST',
      headers: {
        authorization: `Bearer ${keys.get('team-a')}`,
        'content-type': `multipart/form-data; boundary=${boundary}`,
      },
      body,
    });
    expect(await errorOf(response)).toMatchObject({ status, code });
    expect((await clientOf(gateway).files.list()).data).toEqual([]);
  });

  test.each([
    ['application/json', 'invalid_content_type'],
    ['multipart/form-data', 'invalid_content_type'],
    ['multipart/form-data; charset=utf-8', 'invalid_multipart'],
  ])('the type %s', async (type, code) => {
    const gateway = await gatewayWithBatches([await startFakeEngine()]);
    const headers = { authorization: `Bearer ${keys.get('team-a')}`, 'content-type': type };
    const response = await fetch(`${gateway.url}/v1/files`, { method: 'POST', headers, body: 'x' });
    expect((await errorOf(response)).code).toBe(code);
  });

  test('one that its client breaks off leaves nothing', async () => {
    const gateway = await gatewayWithBatches([await startFakeEngine()]);
    const away = new AbortController();
    async function* body() {
      yield Buffer.from(
        `${purpose}--${boundary}\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n`,
      );
      yield Buffer.alloc(100_000, 'x');
      setTimeout(() => away.abort(), 50);
      await new Promise(() => {});
    }
    const headers = {
      authorization: `Bearer ${keys.get('team-a')}`,
      'content-type': `multipart/form-data; boundary=${boundary}`,
    };
    const init = { method: 'POST', headers, body: body(), duplex: 'half', signal: away.signal };
    await expect(fetch(`${gateway.url}/v1/files`, init as unknown as RequestInit)).rejects.toThrow();
    await until(
      () => gateway.logLines,
      (lines) => lines.some(({ route, errorCode }) => route === '/v1/files' && errorCode !== undefined),
    );
    expect((await clientOf(gateway).files.list()).data).toEqual([]);
  });
});

describe('a batch', () => {
  test('answers each line once, whatever became of it', async () => {
    const script: Script = (received) =>
      received.body.includes('bad') ? refuse(400, 'bad_request')(received) : echo(received);
    const gateway = await gatewayWithBatches([await startFakeEngine({ adapters: ['a'], script })]);
    const client = clientOf(gateway);
    const lines = [
      ...Array.from({ length: 20 }, (_, i) => line(`n${i}`, { model: i % 2 ? 'a' : 'base' })),
      line('wrong', { content: 'a bad one' }),
      line('nobody', { model: 'nowhere' }),
    ];
    const begun = await begin(client, lines);
    expect(begun).toMatchObject({ object: 'batch', endpoint, completion_window: '24h', errors: null });
    expect(begun.expires_at! - begun.created_at).toBe(86_400);

    const batch = await ended(client, begun.id);
    expect(batch).toMatchObject({ status: 'completed', metadata: null });
    expect(batch.request_counts).toEqual({ total: 22, completed: 20, failed: 2 });
    expect(batch.usage).toMatchObject({ input_tokens: 140, output_tokens: 40, total_tokens: 180 });
    expect(batch.usage!.input_tokens_details.cached_tokens).toBe(100);
    const times = [batch.created_at, batch.in_progress_at, batch.finalizing_at, batch.completed_at];
    expect(times).toEqual(times.toSorted());

    const output = await linesOf(client, batch.output_file_id);
    expect(output.map(({ custom_id }) => custom_id).sort()).toEqual(
      Array.from({ length: 20 }, (_, i) => `n${i}`).sort(),
    );
    for (const { custom_id, response, error } of output) {
      expect(error).toBeNull();
      expect(response!.status_code).toBe(200);
      expect(response!.body.choices[0].message.content).toBe(`answer to question ${custom_id}`);
    }
    const errors = await linesOf(client, batch.error_file_id);
    const failed = errors.map(({ custom_id, response }) => [custom_id, response!.status_code]);
    expect(failed.sort()).toEqual([
      ['nobody', 404],
      ['wrong', 400],
    ]);
    expect(errors.find(({ custom_id }) => custom_id === 'nobody')!.response!.body.error.code).toBe(
      'model_not_found',
    );
    const file = await client.files.retrieve(batch.output_file_id!);
    expect(file).toMatchObject({ purpose: 'batch_output', filename: `${batch.id}_output.jsonl` });
    expect(JSON.stringify(await gateway.wholeLog())).not.toMatch(/question|answer to|a bad one/);
  });

  test('runs adapter by adapter, and prefix by prefix', async () => {
    const engine = await startFakeEngine({ adapters: ['a'], script: echo });
    const client = clientOf(await gatewayWithBatches([engine], { linesPerEngine: 1 }));
    const prefixes = ['p', 'q', 'r'].map((letter) => letter.repeat(300));
    const lines = Array.from({ length: 24 }, (_, i) =>
      line(`${i}`, { model: i % 2 ? 'a' : 'base', content: `${prefixes[i % 3]}${i}` }),
    );
    await ended(client, (await begin(client, lines)).id);
    const models = engine.received.map(({ body }) => JSON.parse(body.toString()).model);
    const runsOf = (values: string[]) => values.filter((value, i) => value !== values[i - 1]).length;
    expect(runsOf(models)).toBe(2);
    expect(runsOf(asked(engine).map((content, i) => `${models[i]}${content[0]}`))).toBe(6);
    expect(new Set(engine.received.map(({ headers }) => headers['x-motet-priority']))).toEqual(
      new Set(['-10']),
    );
  });

  test('runs compositions, each as a voice of its own whatever the order of its names', async () => {
    const engine = await startFakeEngine({ adapters: ['a', 'b'], script: echo });
    const client = clientOf(await gatewayWithBatches([engine], { linesPerEngine: 1 }));
    const [a, b] = [
      { name: 'a', weight: 0.5 },
      { name: 'b', weight: -1 },
    ];
    const voices = [{ adapters: [a, b] }, { model: 'a' }, { adapters: [b, a] }, { adapters: [a] }];
    const lines = Array.from({ length: 12 }, (_, i) => {
      const { body, ...rest } = line(`${i}`) as { body: { messages: unknown } };
      return { ...rest, body: { messages: body.messages, ...voices[i % 4] } };
    });
    lines.push({ ...line('none'), body: { messages: [], adapters: [{ name: 'none', weight: 1 }] } } as never);
    const batch = await ended(client, (await begin(client, lines)).id);
    expect(batch.request_counts).toEqual({ total: 13, completed: 12, failed: 1 });
    const asked = engine.received.map(({ headers }) => headers['x-motet-adapters'] ?? 'alone');
    expect(asked.filter((who, i) => who !== asked[i - 1])).toHaveLength(3);
    expect(asked.filter((who) => who === 'a=0.5,b=-1')).toHaveLength(6);
    expect(asked.filter((who) => who === 'a=0.5')).toHaveLength(3);
    const [failed] = await linesOf(client, batch.error_file_id);
    expect(failed!.response).toMatchObject({
      status_code: 404,
      body: { error: { code: 'model_not_found', param: 'adapters' } },
    });
  });

  test.each([
    ['not JSON', '{"custom_id": oops', 'invalid_json_line', 1],
    ['a wrong method', { ...line('1'), method: 'GET' }, 'invalid_method', 1],
    ['another url', line('1', { url: '/v1/completions' }), 'mismatched_url', 1],
    ['nothing', '', 'empty_file', null],
  ] as const)('that has %s fails before anything is asked', async (_name, first, code, lineNumber) => {
    const engine = await startFakeEngine({ script: echo });
    const client = clientOf(await gatewayWithBatches([engine]));
    const text = typeof first === 'string' ? first : JSON.stringify(first);
    const batch = await ended(client, (await begin(client, text === '' ? '\n' : `${text}\n`)).id);
    expect(batch).toMatchObject({ status: 'failed', output_file_id: null, error_file_id: null });
    expect(batch.failed_at).toEqual(expect.any(Number));
    expect(batch.errors).toMatchObject({ object: 'list', data: [{ code, line: lineNumber }] });
    expect(engine.received).toEqual([]);
  });

  test('tells which lines are wrong, the second of a custom_id among them', async () => {
    const client = clientOf(await gatewayWithBatches([await startFakeEngine({ script: echo })]));
    const lines = [line('1'), line('1'), { ...line('2'), body: {} }, line('3')];
    const { errors } = await ended(client, (await begin(client, lines)).id);
    expect(errors!.data!.map(({ code, line }) => [code, line])).toEqual([
      ['duplicate_custom_id', 2],
      ['missing_model', 3],
    ]);
  });

  test('is refused when it is not as it must be', async () => {
    const client = clientOf(await gatewayWithBatches([await startFakeEngine()]));
    const { id } = await upload(client, jsonl([line('1')]));
    const good = { input_file_id: id, endpoint, completion_window: '24h' };
    for (const [bad, param] of [
      [{ ...good, endpoint: '/v1/models' }, 'endpoint'],
      [{ ...good, completion_window: 'soon' }, 'completion_window'],
      [{ ...good, completion_window: '8d' }, 'completion_window'],
      [{ ...good, metadata: { a: 1 } }, 'metadata'],
      [{ ...good, metadata: { a: 'x'.repeat(513) } }, 'metadata'],
      [{ ...good, input_file_id: 7 }, 'input_file_id'],
      [{ ...good, output_expires_after: { anchor: 'created_at', seconds: 1 } }, 'output_expires_after'],
      [{ endpoint, completion_window: '24h' }, 'input_file_id'],
    ] as const) {
      const refused = client.batches.create(bad as unknown as OpenAI.BatchCreateParams);
      await expect(refused).rejects.toThrow(BadRequestError);
      await expect(refused).rejects.toMatchObject({ param });
    }
    const soonGone = await client.files.create({
      ...{ purpose: 'batch', expires_after: { anchor: 'created_at', seconds: 3600 } },
      file: await toFile(Buffer.from(jsonl([line('1')])), 'x'),
    });
    const tooLong = client.batches.create({ ...good, completion_window: '24h', input_file_id: soonGone.id });
    await expect(tooLong).rejects.toMatchObject({ code: 'invalid_value', param: 'input_file_id' });
    const nowhere = client.batches.create({ ...good, completion_window: '24h', input_file_id: 'file-1' });
    await expect(nowhere).rejects.toMatchObject({ status: 404, code: 'file_not_found' });
    expect((await client.batches.list()).data).toEqual([]);
  });

  test('is cancelled, and what was answered is kept', async () => {
    const script: Script = (received) => (received.body.includes('slow') ? undefined : echo(received));
    const engine = await startFakeEngine({ script });
    const client = clientOf(await gatewayWithBatches([engine], { linesPerEngine: 2 }));
    const lines = [
      line('quick'),
      ...Array.from({ length: 9 }, (_, i) => line(`${i}`, { content: `slow ${i}` })),
    ];
    const { id } = await begin(client, lines);
    await until(
      () => client.batches.retrieve(id),
      ({ request_counts }) => request_counts!.completed === 1,
    );
    const cancelling = await client.batches.cancel(id);
    expect(['cancelling', 'cancelled']).toContain(cancelling.status);
    const batch = await ended(client, id);
    expect(batch).toMatchObject({
      status: 'cancelled',
      request_counts: { total: 10, completed: 1, failed: 0 },
    });
    expect(batch.cancelled_at).toBeGreaterThanOrEqual(batch.cancelling_at!);
    expect((await linesOf(client, batch.output_file_id)).map(({ custom_id }) => custom_id)).toEqual([
      'quick',
    ]);
    await Promise.all(engine.received.map(({ closed }) => closed));
    await expect(client.batches.cancel(id)).rejects.toThrow(ConflictError);
    await expect(client.batches.cancel(id)).rejects.toMatchObject({ code: 'batch_not_cancellable' });
    await expect(client.batches.cancel('batch_1')).rejects.toMatchObject({ code: 'batch_not_found' });
  });

  test('holds its input file', async () => {
    const client = clientOf(await gatewayWithBatches([await startFakeEngine({ script: () => {} })]));
    const batch = await begin(client, [line('1')]);
    await expect(client.files.delete(batch.input_file_id)).rejects.toMatchObject({ code: 'file_in_use' });
    await client.batches.cancel(batch.id);
    await ended(client, batch.id);
    expect(await client.files.delete(batch.input_file_id)).toMatchObject({ deleted: true });
  });

  test('is listed page by page, the newest first', async () => {
    const client = clientOf(await gatewayWithBatches([await startFakeEngine({ script: echo })]));
    const ids: string[] = [];
    for (let i = 0; i < 3; i++) ids.push((await begin(client, [line('1')])).id);
    const listed = await Array.fromAsync(client.batches.list({ limit: 2 }));
    expect(listed.map(({ id }) => id)).toEqual(ids.toReversed());
  });

  test('asks again when there was no room or an engine failed, and gives up on what always fails', async () => {
    const tries = new Map<string, number>();
    const engine = await startFakeEngine({
      script(received) {
        const text = received.body.toString();
        const numTries = (tries.get(text) ?? 0) + 1;
        tries.set(text, numTries);
        if (text.includes('poison')) received.res.destroy();
        else if (numTries < 3 && text.includes('busy')) refuse(429, 'busy')(received);
        else echo(received);
      },
    });
    const gateway = await gatewayWithBatches([engine]);
    const client = clientOf(gateway);
    const { id } = await begin(client, [
      line('1', { content: 'busy' }),
      line('2', { content: 'poison' }),
      line('3'),
    ]);
    const batch = await ended(client, id);
    expect(batch.request_counts).toEqual({ total: 3, completed: 2, failed: 1 });
    const [failed] = await linesOf(client, batch.error_file_id);
    expect(failed).toMatchObject({ custom_id: '2', response: { status_code: 502 } });
    const metrics = await until(
      async () => (await fetch(`${gateway.url}/metrics`)).text(),
      (text) => text.includes('motet_gateway_batches_unfinished 0'),
    );
    expect(metrics).toContain('motet_gateway_batch_lines_total{result="completed"} 2');
    expect(metrics).toContain('motet_gateway_batch_lines_total{result="failed"} 1');
  });

  test('goes behind online requests that wait, and goes on when none does', async () => {
    const held = Promise.withResolvers<void>();
    const engine = await startFakeEngine({
      async script(received) {
        if (received.body.includes('online')) await held.promise;
        echo(received);
      },
    });
    const settings = { maxInFlightPerEngine: 1, maxQueued: 100 };
    const gateway = await gatewayWithBatches([engine], { linesPerEngine: 1 }, settings);
    const client = clientOf(gateway);
    const online = [1, 2].map((i) =>
      client.chat.completions.create({ model: 'base', messages: [{ role: 'user', content: `online ${i}` }] }),
    );
    await engine.nextReceived();
    const { id } = await begin(client, [line('1'), line('2')]);
    await until(
      () => client.batches.retrieve(id),
      ({ status }) => status === 'in_progress',
    );
    held.resolve();
    await Promise.all(online);
    await ended(client, id);
    expect(asked(engine).slice(0, 2).sort()).toEqual(['online 1', 'online 2']);
  });
});

test('only so many files are uploaded at a time', async () => {
  const gateway = await gatewayWithBatches([await startFakeEngine()]);
  const away = new AbortController();
  const headers = {
    authorization: `Bearer ${keys.get('team-a')}`,
    'content-type': 'multipart/form-data; boundary=XX',
  };
  const stalled = Array.from({ length: 8 }, () => {
    async function* body() {
      yield Buffer.from('--XX\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n');
      await new Promise(() => {});
    }
    const init = { method: 'POST', headers, body: body(), duplex: 'half', signal: away.signal };
    return fetch(`${gateway.url}/v1/files`, init as unknown as RequestInit).catch(() => null);
  });
  const refused = await until(
    () => upload(clientOf(gateway), 'x').then(null, (error: unknown) => error),
    (error) => error !== null,
  );
  expect(refused).toMatchObject({ status: 429, code: 'too_many_uploads' });
  away.abort();
  await Promise.all(stalled);
  await until(
    () => upload(clientOf(gateway), 'x').catch(() => null),
    (file) => file !== null,
  );
});

test('a gateway without a store has no such routes', async () => {
  const gateway = await gatewayWithBatches([await startFakeEngine()], {}, { batches: null });
  await expect(clientOf(gateway).files.list()).rejects.toMatchObject({
    status: 404,
    code: 'route_not_found',
  });
});

test('other methods are refused by name', async () => {
  const gateway = await gatewayWithBatches([await startFakeEngine()]);
  const headers = { authorization: `Bearer ${keys.get('team-a')}` };
  const response = await fetch(`${gateway.url}/v1/files/file-1`, { method: 'PUT', headers });
  expect(response.headers.get('allow')).toBe('GET, DELETE');
  expect((await errorOf(response)).code).toBe('method_not_allowed');
});
