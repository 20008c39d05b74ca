// Requests that have adapters merged: who may, what the engine is told, and which engines are asked.

import { expect, test } from 'vitest';
import { adaptersHeader, mergeHeader } from '../../../engine/protocol.ts';
import { type FakeEngine, startFakeEngine } from '../../fixtures/fake-engine.ts';
import { begin, clientOf, echo, ended, gatewayWithBatches, line } from '../batches/batches-setup.ts';
import { chatBody, errorOf, gatewayFor } from '../start-gateway.ts';

const adapters = [
  { name: 'b', weight: -0.5 },
  { name: 'a', weight: 1 },
];
const adapters_merge = { method: 'ties', density: 0.2 };
const rule = 'ties; density=0.2; majority-sign=total';

const merging = () => startFakeEngine({ adapters: ['a', 'b'], merges: true });
const toldTo = ({ received }: FakeEngine) =>
  received.map(({ headers }) => [headers[adaptersHeader], headers[mergeHeader]]);

test('the engine is told the rule beside the adapters, and so is the client', async () => {
  const engine = await merging();
  const gateway = await gatewayFor([engine]);
  const answer = await gateway.chat(chatBody({ adapters, adapters_merge }));
  expect([answer.status, answer.headers.get(mergeHeader)]).toEqual([200, rule]);
  expect(toldTo(engine)).toEqual([['a=1,b=-0.5', rule]]);
  const linear = await gateway.chat(chatBody({ adapters, adapters_merge: { method: 'linear' } }));
  expect([linear.status, linear.headers.get(mergeHeader)]).toEqual([200, null]);
  expect(toldTo(engine)[1]).toEqual(['a=1,b=-0.5', undefined]);
});

test('what the client says in a header is not passed on', async () => {
  const engine = await merging();
  const gateway = await gatewayFor([engine]);
  const headers = { [mergeHeader]: 'ties' };
  expect((await gateway.chat(chatBody({ adapters }), { headers })).status).toBe(200);
  expect(toldTo(engine)).toEqual([['a=1,b=-0.5', undefined]]);
});

test('LoRAX has its strategies merged in the same way', async () => {
  const engine = await merging();
  const gateway = await gatewayFor([engine]);
  const merged_adapters = { ids: ['a', 'b'], merge_strategy: 'dare_linear', density: 0.25 };
  const answer = await fetch(`${gateway.url}/generate`, {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify({ inputs: 'x', parameters: { merged_adapters } }),
  });
  await answer.text();
  expect(toldTo(engine)).toEqual([['a=1,b=1', 'dare_linear; density=0.25']]);
});

test('an engine that merges none is not asked, and when there is no other that is said', async () => {
  const other = await startFakeEngine({ adapters: ['a', 'b'] });
  const engine = await merging();
  const gateway = await gatewayFor([other, engine]);
  for (let i = 0; i < 4; i++) await gateway.chat(chatBody({ adapters, adapters_merge }));
  expect([other.received.length, engine.received.length]).toEqual([0, 4]);

  const without = await gatewayFor([other]);
  expect(await errorOf(await without.chat(chatBody({ adapters, adapters_merge })))).toMatchObject({
    status: 400,
    param: 'adapters_merge',
    message: expect.stringContaining('none of the engines'),
  });
  expect((await without.chat(chatBody({ adapters }))).status).toBe(200);
});

test('with several engines the same merge is made by one', async () => {
  const engines = await Promise.all([merging(), merging(), merging()]);
  const gateway = await gatewayFor(engines);
  for (let i = 0; i < 6; i++)
    await gateway.chat(chatBody({ adapters, adapters_merge, messages: [{ role: 'user', content: `${i}` }] }));
  expect(engines.filter(({ received }) => received.length > 0)).toHaveLength(1);
});

test.each([
  [{ adapters_merge }, 'adapters_merge', 'adapters_merge: expected adapters beside it, got none'],
  [{ adapters, adapters_merge: 'ties' }, 'adapters_merge', 'adapters_merge: expected an object'],
  [
    { adapters, adapters_merge: { method: 'ties', density: 2 } },
    'adapters_merge',
    'adapters_merge.density: expected a number above 0 and at most 1, got 2',
  ],
  [
    { adapters: [...adapters, { name: 'none', weight: 1 }], adapters_merge },
    'adapters',
    'The model `none` does not exist.',
  ],
])('%j is refused by name, and no engine is asked', async (fields, param, message) => {
  const engine = await merging();
  const gateway = await gatewayFor([engine]);
  const error = await errorOf(await gateway.chat(chatBody(fields)));
  expect(error).toMatchObject({ param, message: expect.stringContaining(message) });
  expect(engine.received).toEqual([]);
});

test('lines of a batch may have them, each rule as a voice of its own', async () => {
  const engine = await startFakeEngine({ adapters: ['a', 'b'], merges: true, script: echo });
  const client = clientOf(await gatewayWithBatches([engine], { linesPerEngine: 1 }));
  const voices = [{ adapters }, { adapters, adapters_merge }];
  const lines = Array.from({ length: 8 }, (_, i) => {
    const { body, ...rest } = line(`${i}`) as { body: object };
    return { ...rest, body: { ...body, ...voices[i % 2] } };
  });
  const batch = await ended(client, (await begin(client, lines)).id);
  expect(batch.request_counts).toEqual({ total: 8, completed: 8, failed: 0 });
  const asked = toldTo(engine).map(([, merge]) => merge);
  expect(asked.filter((merge, i) => merge !== asked[i - 1])).toHaveLength(2);
  expect(asked.filter((merge) => merge === rule)).toHaveLength(4);
});
