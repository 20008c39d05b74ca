import { expect, test } from 'vitest';
import { type Endpoint, listedEngine, newEndpoint } from '../../gateway/endpoints.ts';
import { notServed, rememberMs, resolveModel } from '../../gateway/resolve-model.ts';

const nowMs = 1_000_000;

function endpoint(models: string[], fields: Partial<Endpoint> = {}): Endpoint {
  const cards = new Map(models.map((id) => [id, { id } as never]));
  return {
    ...newEndpoint(listedEngine(`http://${models.join('-')}`)),
    isReady: true,
    lastSeenMs: nowMs,
    cards,
    ...fields,
  };
}

const x = { name: 'x', baseModel: null };

test('a name is served by every ready engine that has it', () => {
  const [a, b, c] = [endpoint(['base', 'x']), endpoint(['base']), endpoint(['base', 'x'])];
  expect(resolveModel(x, [a, b, c], nowMs)).toEqual({ kind: 'served', endpoints: [a, c] });
});

test('a name is served by the engine that is ready while another that had it is away', () => {
  const [a, b] = [endpoint(['x'], { isReady: false }), endpoint(['x'])];
  expect(resolveModel(x, [a, b], nowMs)).toEqual({ kind: 'served', endpoints: [b] });
});

test('a name whose only engine is away is away', () => {
  expect(resolveModel(x, [endpoint(['x'], { isReady: false }), endpoint(['y'])], nowMs).kind).toBe('away');
});

test('a name that no engine ever listed is unknown, also while engines are away', () => {
  expect(resolveModel(x, [endpoint(['y'], { isReady: false })], nowMs).kind).toBe('unknown');
});

test('a name that a live engine no longer lists is unknown', () => {
  expect(resolveModel(x, [endpoint(['y'])], nowMs).kind).toBe('unknown');
});

test('a group is served by the engines that have each of its members and can compose them', () => {
  const members = ['x', 'y'].map((name) => ({ name, weight: 1 }));
  const group = { name: 'group', baseModel: null, members };
  const adapterList = { data: [] } as never;
  const [a, b, c] = ['x y', 'x group', 'y'].map((names) => endpoint(names.split(' '), { adapterList }));
  const vllm = endpoint(['x', 'y']);
  expect(resolveModel(group, [a!, b!, c!, vllm], nowMs)).toEqual({ kind: 'served', endpoints: [a] });
  expect(resolveModel(group, [b!, c!, vllm], nowMs).kind).toBe('unknown');
});

test('an engine that is away is forgotten after a bounded time', () => {
  const [gone, other] = [
    endpoint(['x'], { isReady: false, lastSeenMs: nowMs - rememberMs - 1 }),
    endpoint(['y']),
  ];
  expect(resolveModel(x, [gone, other], nowMs).kind).toBe('unknown');
});

test('nothing is said about any name before an engine was seen', () => {
  expect(resolveModel(x, [endpoint([], { isReady: false, lastSeenMs: null })], nowMs).kind).toBe('no_engine');
});

test('only engines of its own base model are asked for what a resource declares', () => {
  const [a, b] = [endpoint(['x'], { baseModel: 'a' }), endpoint(['x'], { baseModel: 'b' })];
  expect(resolveModel({ name: 'x', baseModel: 'b' }, [a, b], nowMs)).toEqual({
    kind: 'served',
    endpoints: [b],
  });
  expect(resolveModel({ name: 'x', baseModel: 'c' }, [a, b], nowMs).kind).toBe('no_engine');
});

test.each([
  ['a name that no engine lists', null, 'unknown', 404, 'model_not_found'],
  ['what a resource declares and no engine holds', 'a', 'unknown', 503, 'model_unavailable'],
  ['what engines hold that are away', 'a', 'away', 503, 'model_unavailable'],
  ['what has no engine', 'a', 'no_engine', 503, 'no_engine_ready'],
] as const)('says of %s what the client can do', (_, baseModel, kind, status, code) => {
  const error = notServed('x', { name: 'x', baseModel }, kind);
  expect(error).toMatchObject({ code, row: { status } });
});
