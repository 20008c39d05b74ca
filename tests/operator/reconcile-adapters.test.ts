import { beforeAll, expect, test, vi } from 'vitest';
import { type ControlPlane, sharedControlPlane } from '../fixtures/control-plane.ts';
import { digestOf } from '../fixtures/simulated-engines.ts';
import { type EnginePod, startWorld, type World } from './simulated-world.ts';
import { applyCrds } from './start-operator.ts';

let plane: ControlPlane;

beforeAll(async () => {
  plane = await sharedControlPlane();
  await applyCrds(plane);
});

const patience = { timeout: 20_000, interval: 50 };
const digestAt = (name: string) => digestOf(`/motet/adapters/${name}`);

/** A base model with the engines. */
async function worldWith(...pods: string[]): Promise<[World, ...EnginePod[]]> {
  const world = await startWorld(plane);
  await world.addBaseModel('base');
  const engines: EnginePod[] = [];
  for (const pod of pods) engines.push(await world.addEngine(pod, 'base'));
  return [world, ...engines];
}

function readyOf(object: { status?: { conditions?: { type: string }[] } }) {
  return object.status?.conditions?.find(({ type }) => type === 'Ready');
}

test('an adapter is loaded on as many engines as it asks for, and says where it is', async () => {
  const [world, ...pods] = await worldWith('one', 'two');
  await world.addAdapter('sql', 'base', { copies: 'all' });
  const { status } = await world.untilReason('LoraAdapter', 'sql', 'Resident');
  const digest = digestAt('sql');
  expect(status).toMatchObject({
    digest,
    rank: 8,
    kind: 'lora',
    modules: ['q_proj', 'v_proj'],
    bytes: 1 << 20,
    desiredCopies: 2,
    readyCopies: 2,
    copies: '2/2',
    tier: 'device',
    placements: [
      { pod: 'one', tier: 'device', digest },
      { pod: 'two', tier: 'device', digest },
    ],
  });
  for (const { names } of pods) expect(names).toEqual({ sql: digest });
});

test('all its served names point at it, and a name that it gives up goes', async () => {
  const [world, one] = await worldWith('one');
  await world.addAdapter('sql', 'base', { servedNames: ['sql', 'team/sql'] });
  await world.untilReason('LoraAdapter', 'sql', 'Resident');
  expect(one!.names).toEqual({ sql: digestAt('sql'), 'team/sql': digestAt('sql') });
  await world.addAdapter('sql', 'base', { servedNames: ['sql', 'database'] });
  await vi.waitFor(
    () => expect(one!.names).toEqual({ database: digestAt('sql'), sql: digestAt('sql') }),
    patience,
  );
  await world.untilReason('LoraAdapter', 'sql', 'Resident');
});

test('a deleted adapter is unloaded, and so is a name that nobody knows', async () => {
  const [world, one] = await worldWith('one');
  await world.addAdapter('sql', 'base');
  await world.addAdapter('chat', 'base');
  await world.untilReason('LoraAdapter', 'sql', 'Resident');
  await world.untilReason('LoraAdapter', 'chat', 'Resident');
  one!.engine.put('stray', '/motet/adapters/stray');
  await world.remove('LoraAdapter', 'sql');
  await vi.waitFor(() => expect(one!.names).toEqual({ chat: digestAt('chat') }), patience);
});

test('a changed source is loaded in place of the old one', async () => {
  const [world, one] = await worldWith('one');
  await world.addAdapter('sql', 'base');
  await world.untilReason('LoraAdapter', 'sql', 'Resident');
  await world.addAdapter('sql', 'base', { source: { uri: 'file:///motet/adapters/sql-v2' } });
  const { status } = await world.untilReason('LoraAdapter', 'sql', 'Resident');
  expect(status).toMatchObject({ digest: digestAt('sql-v2'), copies: '1/1' });
  expect(one!.names).toEqual({ sql: digestAt('sql-v2') });
  expect(one!.engine.calls.filter(({ call }) => call === 'unload')).toEqual([]);
});

test('while a new version cannot be had, the old one is served and the status says both', async () => {
  const [world, one] = await worldWith('one');
  await world.addAdapter('sql', 'base');
  await world.untilReason('LoraAdapter', 'sql', 'Resident');
  world.sources.fail('/motet/adapters/v2', 'adapter_invalid', 'adapter_config.json: expected r, got none');
  await world.addAdapter('sql', 'base', { source: { uri: 'file:///motet/adapters/v2' } });
  const refused = await world.untilReason('LoraAdapter', 'sql', 'Refused');
  expect(readyOf(refused)).toMatchObject({ message: 'adapter_config.json: expected r, got none' });
  expect(refused.status).toMatchObject({
    copies: '0/1',
    placements: [{ pod: 'one', digest: digestAt('sql') }],
  });
  expect(refused.status!.digest).toBeUndefined();
  expect(one!.names).toEqual({ sql: digestAt('sql') });
  expect(one!.engine.calls.filter(({ path }) => path === '/motet/adapters/v2')).toHaveLength(1);
  // A change of the spec is a reason to try again.
  world.sources.heal('/motet/adapters/v2');
  await world.addAdapter('sql', 'base', { source: { uri: 'file:///motet/adapters/v2' }, copies: 2 });
  await world.untilReason('LoraAdapter', 'sql', 'Resident');
  expect(one!.names).toEqual({ sql: digestAt('v2') });
});

test('a source that is away is tried again until it is back', async () => {
  const [world, one] = await worldWith('one');
  world.sources.fail('/motet/adapters/sql', 'source_unavailable', 'connect ECONNREFUSED 203.0.113.1:443');
  await world.addAdapter('sql', 'base');
  const away = await world.untilReason('LoraAdapter', 'sql', 'SourceUnavailable');
  expect(readyOf(away)).toMatchObject({ status: 'False', message: 'connect ECONNREFUSED 203.0.113.1:443' });
  world.sources.heal('/motet/adapters/sql');
  await world.untilReason('LoraAdapter', 'sql', 'Resident');
  expect(one!.names).toEqual({ sql: digestAt('sql') });
});

test('what has another digest than said is not served', async () => {
  const [world, one] = await worldWith('one');
  const source = { uri: 'https://models.example/sql', digest: digestOf('what was reviewed') };
  world.sources.set('https://models.example/sql', { digest: digestOf('what is there') });
  await world.addAdapter('sql', 'base', { source });
  await world.untilReason('LoraAdapter', 'sql', 'DigestMismatch');
  expect(one!.names).toEqual({});
  world.sources.set('https://models.example/sql', { digest: source.digest });
  const { status } = await world.untilReason('LoraAdapter', 'sql', 'Resident');
  expect(status!.digest).toBe(source.digest);
});

test('new content at the same source comes to all engines when one finds it', async () => {
  const [world, one] = await worldWith('one', 'two');
  await world.addAdapter('sql', 'base', { copies: 'all' });
  await world.untilReason('LoraAdapter', 'sql', 'Resident');
  world.sources.set('/motet/adapters/sql', { digest: digestOf('overwritten') });
  await one!.restart();
  await world.until('LoraAdapter', 'sql', ({ status }) => {
    expect(status!.digest).toBe(digestOf('overwritten'));
    expect(status!.copies).toBe('2/2');
    expect(status!.placements!.map(({ digest }) => digest)).toEqual(Array(2).fill(digestOf('overwritten')));
  });
});

test('a claim that the base model does not mount is named, and loads begin when it does', async () => {
  const [world, one] = await worldWith('one');
  await world.addAdapter('sql', 'base', { source: { uri: 'pvc://team-a/sql' } });
  const missing = await world.untilReason('LoraAdapter', 'sql', 'ClaimNotMounted');
  expect(readyOf(missing)).toMatchObject({ message: expect.stringContaining('claim team-a') });
  expect(one!.engine.calls.some(({ call }) => call === 'load')).toBe(false);
  await world.addBaseModel('base', { adapterClaims: ['team-a'] });
  await world.untilReason('LoraAdapter', 'sql', 'Resident');
  expect(one!.engine.calls).toContainEqual({ call: 'load', name: 'sql', path: '/motet/adapters/team-a/sql' });
});

test('without its base model, then without an engine, an adapter says so', async () => {
  const world = await startWorld(plane);
  await world.addAdapter('sql', 'base');
  await world.untilReason('LoraAdapter', 'sql', 'BaseModelNotFound');
  await world.addBaseModel('base');
  await world.untilReason('LoraAdapter', 'sql', 'NoEngineReady');
  await world.addEngine('one', 'base');
  await world.untilReason('LoraAdapter', 'sql', 'Resident');
  await world.remove('BaseModel', 'base');
  const { status } = await world.untilReason('LoraAdapter', 'sql', 'BaseModelNotFound');
  expect(status!.placements ?? []).toEqual([]);
});

test('the older of two resources keeps a served name; the younger gets it when the older goes', async () => {
  const [world, one] = await worldWith('one');
  await world.addAdapter('first', 'base', { servedNames: ['sql'] });
  await world.untilReason('LoraAdapter', 'first', 'Resident');
  // Ages count in seconds.
  await new Promise((resolve) => setTimeout(resolve, 1_100));
  await world.addAdapter('second', 'base', { servedNames: ['sql'] });
  await world.untilReason('LoraAdapter', 'second', 'NameConflict');
  expect(one!.names).toEqual({ sql: digestAt('first') });
  await world.remove('LoraAdapter', 'first');
  await world.untilReason('LoraAdapter', 'second', 'Resident');
  expect(one!.names).toEqual({ sql: digestAt('second') });
});

test('an adapter that fits nowhere says so, moves nobody, and comes when there is room', async () => {
  const world = await startWorld(plane);
  await world.addBaseModel('base');
  const one = await world.addEngine('one', 'base', { totalBytes: 10 << 20 });
  await world.addAdapter('small', 'base');
  await world.untilReason('LoraAdapter', 'small', 'Resident');
  world.sources.set('/motet/adapters/large', { bytes: 12 << 20 });
  await world.addAdapter('large', 'base');
  const full = await world.untilReason('LoraAdapter', 'large', 'NoRoom');
  expect(readyOf(full)).toMatchObject({ message: expect.stringContaining('device arena') });
  expect(one.names).toEqual({ small: digestAt('small') });
  await world.addEngine('two', 'base', { totalBytes: 100 << 20 });
  await world.untilReason('LoraAdapter', 'large', 'Resident');
  expect((await world.get('LoraAdapter', 'small')).status!.copies).toBe('1/1');
});

test('an engine with a host arena takes what that holds too, and the status says where each copy is', async () => {
  const world = await startWorld(plane);
  await world.addBaseModel('base');
  await world.addEngine('one', 'base', { totalBytes: 10 << 20, hostBytes: 30 << 20 });
  const names = ['a', 'b', 'c'];
  for (const name of names) {
    world.sources.set(`/motet/adapters/${name}`, { bytes: 8 << 20 });
    await world.addAdapter(name, 'base');
  }
  const found = await Promise.all(names.map((name) => world.untilReason('LoraAdapter', name, 'Resident')));
  const tiers = (found as { status?: { tier?: string } }[]).map(({ status }) => status?.tier);
  expect(tiers.sort()).toEqual(['device', 'host', 'host']);
});

function pinnedOf(object: { status?: { conditions?: { type: string }[] } }) {
  return object.status?.conditions?.find(({ type }) => type === 'Pinned');
}

test('a pin is set when it is wanted, kept by a container that starts again, and goes when it is not', async () => {
  const [world, one] = await worldWith('one');
  await world.addAdapter('sql', 'base');
  await world.untilReason('LoraAdapter', 'sql', 'Resident');
  await world.addAdapter('sql', 'base', { pin: true });
  const isPinned = () =>
    world.until('LoraAdapter', 'sql', (adapter) => {
      expect(pinnedOf(adapter)).toMatchObject({ status: 'True', reason: 'Pinned' });
      expect(adapter.status!.placements).toMatchObject([{ pinned: true }]);
    });
  await isPinned();
  await one!.restart();
  await vi.waitFor(() => expect(one!.engine.calls.filter(({ pinned }) => pinned)).toHaveLength(2), patience);
  await isPinned();
  await world.addAdapter('sql', 'base', { pin: false });
  const { status } = await world.until('LoraAdapter', 'sql', (adapter) => {
    expect(pinnedOf(adapter)).toBeUndefined();
    expect(adapter.status!.placements).toMatchObject([{ pinned: false }]);
  });
  expect(status!.copies).toBe('1/1');
});

test('an adapter that an engine refuses to pin is served, says so, and is pinned when there is room', async () => {
  const world = await startWorld(plane);
  await world.addBaseModel('base');
  const one = await world.addEngine('one', 'base', { pinBytes: 0 });
  await world.addAdapter('sql', 'base', { pin: true });
  const refused = await world.until('LoraAdapter', 'sql', (adapter) => {
    expect(pinnedOf(adapter)).toMatchObject({ status: 'False', reason: 'NoRoom' });
    expect(readyOf(adapter)).toMatchObject({ status: 'True', reason: 'Resident' });
  });
  expect(pinnedOf(refused)).toMatchObject({
    message: expect.stringContaining('pins would take more than 0'),
  });
  one.engine.pinBytes = 1 << 20;
  await world.until('LoraAdapter', 'sql', (adapter) => {
    expect(pinnedOf(adapter)).toMatchObject({ status: 'True' });
  });
});

test('a container that is started again gets its adapters back', async () => {
  const [world, one] = await worldWith('one');
  for (const name of ['a', 'b', 'c']) await world.addAdapter(name, 'base');
  for (const name of ['a', 'b', 'c']) await world.untilReason('LoraAdapter', name, 'Resident');
  await one!.restart();
  await vi.waitFor(() => expect(Object.keys(one!.names)).toEqual(['a', 'b', 'c']), patience);
  for (const name of ['a', 'b', 'c']) await world.untilReason('LoraAdapter', name, 'Resident');
});

test('what a lost pod held comes to the others, and its placements go', async () => {
  const [world, one, two] = await worldWith('one', 'two');
  const names = Array.from({ length: 8 }, (_, index) => `a${index}`);
  for (const name of names) await world.addAdapter(name, 'base');
  for (const name of names) await world.untilReason('LoraAdapter', name, 'Resident');
  expect(Object.keys(one!.names).length).toBeGreaterThan(0);
  await one!.remove();
  await vi.waitFor(() => expect(Object.keys(two!.names)).toEqual(names), patience);
  for (const name of names) {
    await world.until('LoraAdapter', name, ({ status }) => {
      expect(status).toMatchObject({ copies: '1/1', placements: [{ pod: 'two' }] });
    });
  }
});

test('a new engine takes its share: copies go from the old ones after they came to the new', async () => {
  const [world, one] = await worldWith('one');
  const names = Array.from({ length: 12 }, (_, index) => `a${index}`);
  for (const name of names) await world.addAdapter(name, 'base');
  for (const name of names) await world.untilReason('LoraAdapter', name, 'Resident');
  const two = await world.addEngine('two', 'base');
  await vi.waitFor(() => {
    const both = [...Object.keys(one!.names), ...Object.keys(two.names)];
    expect(both.sort()).toEqual(names.toSorted());
    expect(Object.keys(two.names).length).toBeGreaterThan(1);
  }, patience);
  const unloaded = one!.engine.calls.filter(({ call }) => call === 'unload').map(({ name }) => name);
  expect(unloaded.sort()).toEqual(Object.keys(two.names).sort());
});

test('a source that takes long holds up no other adapter', async () => {
  const world = await startWorld(plane);
  await world.addBaseModel('base');
  const loadMs = (path: string) => (path.endsWith('/slow') ? 3_000 : 0);
  await world.addEngine('one', 'base', { loadMs });
  await world.addAdapter('slow', 'base');
  await world.untilReason('LoraAdapter', 'slow', 'Loading');
  const names = Array.from({ length: 10 }, (_, index) => `a${index}`);
  for (const name of names) await world.addAdapter(name, 'base');
  for (const name of names) await world.untilReason('LoraAdapter', name, 'Resident');
  expect(readyOf(await world.get('LoraAdapter', 'slow'))).toMatchObject({ reason: 'Loading' });
  await world.untilReason('LoraAdapter', 'slow', 'Resident');
});

test('an engine gets a few loads at a time', async () => {
  const world = await startWorld(plane);
  await world.addBaseModel('base');
  const one = await world.addEngine('one', 'base', { loadMs: 200 });
  const names = Array.from({ length: 10 }, (_, index) => `a${index}`);
  await Promise.all(names.map((name) => world.addAdapter(name, 'base')));
  for (const name of names) await world.untilReason('LoraAdapter', name, 'Resident');
  expect(one.engine.maxLoadsAtOnce).toBe(4);
});

test('a new operator takes over without a load', async () => {
  const [world, one] = await worldWith('one');
  await world.addAdapter('sql', 'base');
  await world.untilReason('LoraAdapter', 'sql', 'Resident');
  const before = await world.get('LoraAdapter', 'sql');
  await world.replaceOperator();
  one!.engine.calls.length = 0;
  await vi.waitFor(() => expect(one!.engine.calls.length).toBeGreaterThan(3), patience);
  expect(one!.engine.calls.every(({ call }) => call === 'list')).toBe(true);
  expect((await world.get('LoraAdapter', 'sql')).metadata.resourceVersion).toBe(
    before.metadata.resourceVersion,
  );
});

test('a world that rests is looked at and not written to', async () => {
  const [world, one] = await worldWith('one', 'two');
  for (const name of ['a', 'b', 'c', 'd']) await world.addAdapter(name, 'base', { copies: 'all' });
  for (const name of ['a', 'b', 'c', 'd']) await world.untilReason('LoraAdapter', name, 'Resident');
  const versions = async () =>
    Promise.all(
      ['a', 'b', 'c', 'd'].map(
        async (name) => (await world.get('LoraAdapter', name)).metadata.resourceVersion,
      ),
    );
  const before = await versions();
  one!.engine.calls.length = 0;
  await vi.waitFor(() => expect(one!.engine.calls.length).toBeGreaterThan(3), patience);
  expect(one!.engine.calls.every(({ call }) => call === 'list')).toBe(true);
  expect(await versions()).toEqual(before);
});

test('the base model says how many copies are resident and what they hold', async () => {
  const [world] = await worldWith('one', 'two');
  await world.addAdapter('sql', 'base', { copies: 'all' });
  await world.until('BaseModel', 'base', ({ status }) => {
    expect(status).toMatchObject({
      adapters: '2/2',
      memory: { totalBytes: 2 * (1 << 30), adapterBytes: 2 * (1 << 20) },
    });
  });
});

test('the story is told in events: what was wrong, and that it is resident', async () => {
  const [world] = await worldWith('one');
  world.sources.fail('/motet/adapters/sql', 'adapter_rank_too_large', 'r: expected at most 64, got 512');
  await world.addAdapter('sql', 'base');
  await world.untilReason('LoraAdapter', 'sql', 'Refused');
  await world.addAdapter('sql', 'base', { source: { uri: 'file:///motet/adapters/small' } });
  await world.untilReason('LoraAdapter', 'sql', 'Resident');
  await vi.waitFor(async () => {
    const events = (await world.events('sql')).map(({ type, reason, note }) => ({ type, reason, note }));
    expect(events).toEqual([
      { type: 'Warning', reason: 'Refused', note: 'r: expected at most 64, got 512' },
      { type: 'Normal', reason: 'Resident', note: '1 of 1 copies are resident' },
    ]);
  }, patience);
});
