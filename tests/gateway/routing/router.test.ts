import { expect, test } from 'vitest';
import type { AdapterStatus, EngineLoad, ModelCard, PendingWork } from '../../../engine/protocol.ts';
import { type Endpoint, listedEngine, newEndpoint } from '../../../gateway/endpoints.ts';
import { blockBytes, homeOf, prefixOf } from '../../../gateway/routing/prefix.ts';
import { type Pick, type RouteAsk, Router, type RouterSettings } from '../../../gateway/routing/router.ts';
import { routing } from '../start-gateway.ts';

type Adapters = Record<string, Partial<AdapterStatus>>;

/** An engine that was looked at, at 1,000 ms. `null`: it has no list of adapters. */
function engine(url: string, adapters: Adapters | null = {}, fields: Partial<Endpoint> = {}): Endpoint {
  const status = (name: string, given: Partial<AdapterStatus>) =>
    ({
      names: [name],
      tier: 'device',
      inFlight: 0,
      loadSeconds: { verify: 0, device: 0.2, host: 0.02 },
      ...given,
    }) as AdapterStatus;
  const statuses = Object.entries(adapters ?? {}).map(([name, given]) => status(name, given));
  return {
    ...newEndpoint(listedEngine(url)),
    cards: new Map([['base', { parent: null } as ModelCard]]),
    adapters: new Map(statuses.map((one) => [one.names[0]!, one])),
    adapterList: adapters === null ? null : ({ data: statuses } as never),
    lastSeenMs: 1_000,
    readySinceMs: 0,
    ...fields,
  };
}

const ask = (name: string, prompt = '', session: string | null = null): RouteAsk => ({
  name,
  members: [name],
  prefix: prefixOf(name, Buffer.from(JSON.stringify({ prompt })), session),
  outputTokens: 10,
});
const start = (settings: Partial<RouterSettings> = {}) => new Router({ ...routing, ...settings });
const pick = (router: Router, asked: RouteAsk, engines: Endpoint[], nowMs = 2_000) =>
  router.pick(asked, engines, 100, nowMs)!;
/** Picks, and sends it there. */
function send(router: Router, asked: RouteAsk, engines: Endpoint[], nowMs = 2_000): Pick & { end(): void } {
  const picked = pick(router, asked, engines, nowMs);
  picked.endpoint.inFlight += 1;
  const forget = router.begin(asked, picked, nowMs);
  const end = () => {
    picked.endpoint.inFlight -= 1;
    forget();
  };
  return Object.assign(picked, { end });
}
const text = (letter: string, numBlocks: number) => letter.repeat(numBlocks * blockBytes);

test('a conversation goes where its last turn went', () => {
  const router = start();
  const engines = [engine('a'), engine('b'), engine('c')];
  const first = send(router, ask('base', text('x', 8)), engines);
  first.end();
  send(router, ask('base', text('y', 2)), engines).end();
  const next = pick(router, ask('base', text('x', 9)), engines);
  expect(next).toMatchObject({
    endpoint: first.endpoint,
    reason: 'prefix',
    knownTokens: 8 * (blockBytes / 4),
  });
});

test('a conversation with an adapter is none with the base', () => {
  const router = start();
  const engines = [engine('a', { sql: {} }), engine('b', { sql: {} })];
  const first = send(router, ask('base', text('x', 8)), engines);
  first.end();
  expect(pick(router, ask('sql', text('x', 8)), engines).endpoint).not.toBe(first.endpoint);
});

test('requests without anything in common are spread by what is under way', () => {
  const router = start();
  const engines = [engine('a'), engine('b'), engine('c')];
  const sent = ['p', 'q', 'r'].map((letter) => send(router, ask('base', text(letter, 4)), engines));
  expect(new Set(sent.map(({ endpoint }) => endpoint)).size).toBe(3);
  sent[1]!.end();
  expect(pick(router, ask('base', text('s', 4)), engines).endpoint).toBe(sent[1]!.endpoint);
});

test('a prompt is work until the first byte of its answer', () => {
  const router = start();
  const engines = [engine('a'), engine('b')];
  const long = send(router, ask('base', text('p', 20)), engines);
  const short = send(router, ask('base', text('q', 4)), engines);
  expect(pick(router, ask('base', 'x'), engines).endpoint).toBe(short.endpoint);
  router.noteFirstByte(long);
  expect(pick(router, ask('base', 'x'), engines).endpoint).toBe(long.endpoint);
  for (const { end } of [long, short]) end();
  expect(pick(router, ask('base', 'x'), engines).reason).toBe('turn');
});

/** What it says of its load. */
const says = (load: Partial<EngineLoad>, others: Partial<PendingWork> = {}) =>
  ({
    data: [],
    load: {
      ...{ running: 0, waiting: 0, promptTokens: 0, freeTokens: 100_000, ...load },
      others: { running: 0, waiting: 0, promptTokens: 0, ...others },
    },
  }) as never;

test("the load that other gateways bring counts, as long as it outweighs what the engine's KV has", () => {
  const router = start();
  const [a, b] = [engine('a'), engine('b')];
  const asked = ask('base', text('x', 4));
  for (const one of [a, b]) one.adapterList = says({});
  const first = send(router, asked, [a, b]);
  first.end();
  const other = first.endpoint === a ? b : a;
  first.endpoint.adapterList = says({}, { running: 1, promptTokens: 100 });
  expect(pick(router, asked, [a, b]).endpoint).toBe(first.endpoint);
  first.endpoint.adapterList = says({}, { running: 1, waiting: 1, promptTokens: 400 });
  expect(pick(router, asked, [a, b]).endpoint).toBe(other);
});

test("a gateway's own requests are counted by itself alone, whatever the engine says of all", () => {
  const router = start();
  const [a, b] = [engine('a'), engine('b')];
  const sent = send(router, ask('base', text('p', 4)), [a, b]);
  // The engine says of the same request that it waits: it is no one else's.
  sent.endpoint.adapterList = says({ running: 0, waiting: 1, promptTokens: 5_000 });
  sent.end();
  send(router, ask('base', text('q', 1)), [a, b]);
  expect(pick(router, ask('base', 'x'), [a, b]).endpoint).toBe(sent.endpoint);
});

test('an engine without room for the KV of the request comes after one that has it, until it was looked at again', () => {
  const router = start();
  const [a, b] = [engine('a'), engine('b')];
  a.adapterList = says({ freeTokens: 300 });
  b.adapterList = says({ freeTokens: 100_000 }, { running: 1, promptTokens: 150 });
  const asked = (letter: string) => ask('base', text(letter, 4));
  // 256 tokens of a prompt and 10 of an answer fit once.
  const first = send(router, asked('p'), [a, b]);
  expect(first.endpoint).toBe(a);
  router.noteFirstByte(first);
  expect(pick(router, asked('q'), [a, b]).endpoint).toBe(b);
  first.end();
  a.lastSeenMs = 1_500;
  expect(pick(router, asked('q'), [a, b]).endpoint).toBe(a);
});

test.each<[string, Adapters | null, Adapters | null]>([
  ['on its device before one in its host arena', { sql: {} }, { sql: { tier: 'host' } }],
  ['in its host arena before one on its disk', { sql: { tier: 'host' } }, { sql: { tier: 'disk' } }],
  [
    'nearer by the time that its way took the last time',
    { sql: { tier: 'host', loadSeconds: { verify: 0, device: 9, host: 0.01 } } },
    { sql: { tier: 'host', loadSeconds: { verify: 0, device: 0.01, host: 0.5 } } },
  ],
  [
    'on its way for another before one on the disk',
    { sql: { tier: 'disk', inFlight: 1 } },
    { sql: { tier: 'disk' } },
  ],
])('prefers an engine that has the adapter %s', (_, near, far) => {
  for (const urls of [
    ['a', 'b'],
    ['b', 'a'],
  ]) {
    const engines = [engine(urls[0]!, near), engine(urls[1]!, far)];
    expect(pick(start(), ask('sql'), engines)).toMatchObject({ endpoint: engines[0], reason: 'adapter' });
  }
});

test('a composition goes where most of its members are, and takes them all along', () => {
  const cold = { tier: 'disk' } as const;
  const [none, one, three] = [
    engine('none', { a: cold, b: cold, c: cold, d: cold }),
    engine('one', { a: {}, b: cold, c: cold, d: cold }),
    engine('three', { a: cold, b: {}, c: {}, d: {} }),
  ];
  const composed: RouteAsk = { ...ask('a@0.5+b@1+c@-1+d@1'), members: ['a', 'b', 'c', 'd'] };
  const router = start();
  expect(pick(router, composed, [none, one, three])).toMatchObject({ endpoint: three, reason: 'adapter' });
  // They are on their way: who asks for one of them goes there too.
  const sent = send(router, composed, [none, one]);
  expect(pick(router, ask('c'), [none, one])).toMatchObject({ endpoint: sent.endpoint, reason: 'adapter' });
});

test('a cold adapter is loaded once: who asks next goes where it is on its way to', () => {
  const router = start();
  const engines = ['a', 'b', 'c', 'd'].map((url) => engine(url, { sql: { tier: 'disk' } }));
  const first = send(router, ask('sql'), engines, 1_500);
  for (let i = 0; i < 3; i++) expect(send(router, ask('sql'), engines, 1_501).endpoint).toBe(first.endpoint);
  // What the engine says once it was looked at again counts more than what it was sent.
  first.endpoint.lastSeenMs = 5_000;
  expect(pick(router, ask('sql'), engines, 6_000).endpoint).not.toBe(first.endpoint);
});

test('an adapter that is cold everywhere goes to the same engine from every gateway', () => {
  const engines = ['a', 'b', 'c', 'd'].map((url) =>
    engine(url, { sql: { tier: 'disk' }, code: { tier: 'disk' } }),
  );
  for (const name of ['sql', 'code']) {
    const home = homeOf(
      name,
      engines.map(({ id }) => id),
    );
    for (const order of [engines, engines.toReversed()]) {
      expect(pick(start(), ask(name), order).endpoint.id).toBe(home);
    }
  }
});

test('an engine without a list is believed to keep the adapters that it was sent last', () => {
  const router = start();
  const engines = [engine('a', null), engine('b', null)];
  const first = send(router, ask('sql'), engines);
  first.end();
  expect(pick(router, ask('sql'), engines, 90_000).endpoint).toBe(first.endpoint);
  for (let i = 0; i < 200; i++) send(router, ask(`other-${i}`), engines).end();
  // Both have forgotten it, and it is the other's turn or its home: no word of an adapter that is there.
  expect(pick(router, ask('sql'), engines, 90_000).knownTokens).toBe(0);
});

test("where prompts say nothing, the caller's session does", () => {
  const router = start();
  const engines = [engine('a'), engine('b'), engine('c')];
  const first = send(router, ask('base', 'one', 'me'), engines);
  first.end();
  send(router, ask('base', 'two', 'you'), engines).end();
  expect(pick(router, ask('base', 'three', 'me'), engines).endpoint).toBe(first.endpoint);
});

test('an engine whose cache does not keep what it was sent is trusted less', () => {
  const router = start();
  const engines = [engine('a'), engine('b')];
  const asked = ask('base', text('x', 8));
  const first = send(router, asked, engines);
  first.end();
  const again = () => pick(router, asked, engines);
  const workBefore = again().promptWorkTokens;
  const told: object[] = [];
  router.on('predicted', (predicted) => told.push(predicted));
  for (let i = 0; i < 100; i++) {
    router.noteUsage(
      { ...again(), endpoint: first.endpoint, knownTokens: 512 },
      { promptTokens: 600, cachedTokens: 0, completionTokens: 9 },
      0,
    );
  }
  expect(told[0]).toEqual({ expectedTokens: 512, cachedTokens: 0 });
  expect(pick(router, asked, [first.endpoint]).promptWorkTokens).toBeGreaterThan(workBefore + 400);
});

test('an engine that fails again and again gets nothing for a while, and says so once', () => {
  const router = start({ afterFailures: 3, ejectMs: 1_000 });
  const engines = [engine('a'), engine('b')];
  const ejected: Endpoint[] = [];
  router.on('ejected', (endpoint) => ejected.push(endpoint));
  for (let i = 0; i < 5; i++) router.noteAnswer(engines[0]!, true, 2_000);
  expect(ejected).toEqual([engines[0]]);
  for (let i = 0; i < 4; i++) expect(send(router, ask('base'), engines, 2_500).endpoint).toBe(engines[1]);
  expect(pick(router, ask('base'), engines, 3_000).endpoint).toBe(engines[0]);
});

test('an engine that has just become ready gets less, and its share in the end', () => {
  const router = start({ slowStartMs: 10_000 });
  const engines = [engine('old'), engine('new', {}, { readySinceMs: 100_000 })];
  const count = (nowMs: number) => {
    const sent = Array.from({ length: 12 }, () =>
      send(router, ask('base', 'short'.repeat(40)), engines, nowMs),
    );
    for (const { end } of sent) end();
    return sent.filter(({ endpoint }) => endpoint.url === 'new').length;
  };
  const counts = [count(101_000), count(110_000)];
  expect(counts[0]).toBeLessThan(3);
  expect(counts[1]).toBeGreaterThan(4);
});

test('nobody is picked when all are full', () => {
  const full = engine('a', {}, { inFlight: 100 });
  expect(start().pick(ask('base'), [full], 100, 0)).toBeNull();
});

test('says how many retries were allowed and how many not', () => {
  const router = start({ maxRetryShare: 0 });
  const told: boolean[] = [];
  router.on('retried', (isAllowed) => told.push(isAllowed));
  for (let i = 0; i < 11; i++) router.takeRetry(0);
  expect(told.filter(Boolean).length).toBe(10);
  expect(told.at(-1)).toBe(false);
});
