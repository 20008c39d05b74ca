import { pino } from 'pino';
import { describe, expect, test } from 'vitest';
import {
  AdapterLoads,
  backoffMs,
  type LoadSource,
  limits,
  type Start,
} from '../../operator/adapter-loads.ts';
import type { Step } from '../../operator/adapter-plan.ts';
import { EngineCallError } from '../../operator/engine-client.ts';
import { FakeClock, settle } from './fake-clock.ts';

const one = { pod: 'one', ip: '127.0.0.1', life: 'one/0' };
const two = { pod: 'two', ip: '127.0.0.2', life: 'two/0' };

function load(name: string): Step {
  return { do: 'load', pod: 'one', name, adapterId: name, reason: 'missing' };
}

function pin(name: string): Step {
  const reason = 'to be pinned';
  return { do: 'pin', pod: 'one', name, adapterId: name, reason, digest: 'sha256:it', isPinned: true };
}

function source(name: string, generation = 1): LoadSource {
  return { adapterUid: `uid-of-${name}`, generation, uri: `file:///${name}`, digest: undefined };
}

/** Loads through a client whose calls end when the test says so. */
function startLoads() {
  const clock = new FakeClock();
  const calls: { name: string; rest: unknown[]; resolve: () => void; reject: (error: Error) => void }[] = [];
  const call = (_ip: string, name: string, ...rest: unknown[]) => {
    const { promise, resolve, reject } = Promise.withResolvers<void>();
    calls.push({ name, rest, resolve, reject });
    return promise;
  };
  let numEnds = 0;
  const loads = new AdapterLoads({
    client: { load: call, unload: call },
    clock,
    log: pino({ level: 'silent' }),
    random: () => 1,
    total: { running: 0 },
    onEnd: () => numEnds++,
  });
  return {
    clock,
    calls,
    loads,
    numEnds: () => numEnds,
    /** As a pass that asked the engine just now. */
    async start(name: string, engine = one, of = source(name), step = load(name)): Promise<Start> {
      await clock.advance(1);
      return loads.start(engine, step, of, clock.nowMs());
    },
    /** The last call fails so. */
    async fail(code: string | null, status = 400): Promise<void> {
      calls.at(-1)!.reject(new EngineCallError(`said ${code}`, code, { status }));
      await settle();
    },
    /** The last call succeeds. */
    async end(): Promise<void> {
      calls.at(-1)!.resolve();
      await settle();
    },
  };
}

describe('calls', () => {
  test('are one at a time for a name on an engine', async () => {
    const { start, calls } = startLoads();
    expect(await start('sql')).toBe('begun');
    expect(await start('sql')).toBe('busy');
    expect(await start('sql', two)).toBe('begun');
    expect(calls.map(({ name }) => name)).toEqual(['sql', 'sql']);
  });

  test('are a few at a time for an engine', async () => {
    const { start, end } = startLoads();
    for (let index = 0; index < limits.ofEngine; index++) expect(await start(`a${index}`)).toBe('begun');
    expect(await start('one more')).toBe('full');
    expect(await start('elsewhere', two)).toBe('begun');
    await end();
    expect(await start('one more')).toBe('full');
  });

  test('make room when they end', async () => {
    const { start, end } = startLoads();
    for (let index = 0; index < limits.ofEngine; index++) await start(`a${index}`);
    await end();
    expect(await start('one more')).toBe('begun');
  });

  test('are bounded over all engines', async () => {
    const { start } = startLoads();
    const results: Start[] = [];
    for (let index = 0; index <= limits.ofAll; index++) {
      results.push(await start('sql', { ...one, life: `${index}/0` }));
    }
    expect(results.indexOf('full')).toBe(limits.ofAll);
  });

  test('that ended after the engine was asked make its answer out of date', async () => {
    const { clock, loads, start, end, numEnds } = startLoads();
    const askedAtMs = clock.nowMs();
    await start('sql');
    await end();
    expect(numEnds()).toBe(1);
    expect(loads.start(one, load('sql'), source('sql'), askedAtMs)).toBe('busy');
    expect(await start('sql')).toBe('begun');
  });
});

describe('a failure', () => {
  test('waits twice as long each time, up to a bound', async () => {
    const { clock, loads, start, fail } = startLoads();
    const waitsMs: number[] = [];
    for (let turn = 0; turn < 12; turn++) {
      expect(await start('sql')).toBe('begun');
      await fail('source_unavailable', 503);
      expect(await start('sql')).toBe('waits');
      const waitMs = loads.nextRetryAtMs()! - clock.nowMs();
      waitsMs.push(waitMs + 1);
      await clock.advance(waitMs);
    }
    expect(waitsMs.slice(0, 4)).toEqual([1_000, 2_000, 4_000, 8_000]);
    expect(waitsMs.at(-1)).toBe(backoffMs.most);
  });

  test('that refuses the adapter waits long, but not for a change of the spec', async () => {
    const { clock, start, fail } = startLoads();
    await start('sql');
    await fail('adapter_invalid');
    await clock.advance(backoffMs.refused - 1_000);
    expect(await start('sql')).toBe('waits');
    expect(await start('sql', one, source('sql', 2))).toBe('begun');
  });

  test('is told with the engine’s words and what they mean, for the spec that it was about', async () => {
    const { loads, start, fail } = startLoads();
    await start('sql');
    await fail('arena_full', 503);
    expect(loads.failuresOf(source('sql'))).toMatchObject([
      { pod: 'one', name: 'sql', reason: 'NoRoom', message: 'said arena_full' },
    ]);
    expect(loads.failuresOf(source('sql', 2))).toEqual([]);
  });

  test('is forgotten with the next success', async () => {
    const { clock, loads, start, fail, end } = startLoads();
    await start('sql');
    await fail(null);
    await clock.advance(backoffMs.first);
    await start('sql');
    await end();
    expect(loads.failuresOf(source('sql'))).toEqual([]);
    expect(loads.lastLoad(one, 'sql')).toMatchObject({ source: source('sql') });
  });

  test('for want of room keeps the engine from being asked again for a while', async () => {
    const { clock, loads, start, fail } = startLoads();
    await start('sql');
    await fail('arena_full', 503);
    expect(loads.podsWithoutRoom(source('sql'))).toEqual(new Set(['one']));
    expect(loads.podsInvolved(source('sql'))).toEqual([]);
    await clock.advance(backoffMs.first);
    expect(loads.podsWithoutRoom(source('sql'))).toEqual(new Set());
  });

  test('of another kind keeps the place, and so does a load under way', async () => {
    const { loads, start, fail } = startLoads();
    await start('sql');
    expect(loads.podsInvolved(source('sql'))).toEqual(['one']);
    await fail('source_unavailable', 503);
    expect(loads.podsInvolved(source('sql'))).toEqual(['one']);
  });

  test('is what content counts as that should not have come', () => {
    const { loads } = startLoads();
    loads.reject(one, 'sql', source('sql'), 'it finds other content');
    expect(loads.failuresOf(source('sql'))).toMatchObject([{ reason: 'DigestMismatch' }]);
  });

  test('ends with the life of its engine', async () => {
    const { loads, start, fail } = startLoads();
    await start('sql');
    await fail(null);
    loads.retain(new Set(['one/0']), new Set(['uid-of-sql']));
    expect(loads.failuresOf(source('sql'))).toHaveLength(1);
    loads.retain(new Set(['one/1']), new Set(['uid-of-sql']));
    expect(loads.failuresOf(source('sql'))).toEqual([]);
    expect(loads.nextRetryAtMs()).toBeNull();
  });

  test('ends with its adapter', async () => {
    const { loads, start, fail } = startLoads();
    await start('sql');
    await fail(null);
    loads.retain(new Set(['one/0']), new Set(['uid-of-another']));
    expect(loads.nextRetryAtMs()).toBeNull();
  });
});

describe('a pin', () => {
  test('names the content that is there, so that nothing is fetched', async () => {
    const { calls, start } = startLoads();
    await start('sql', one, source('sql'), pin('sql'));
    expect(calls).toMatchObject([{ name: 'sql', rest: ['file:///sql', 'sha256:it', true] }]);
  });

  test('says nothing about what the source has', async () => {
    const { loads, start, end } = startLoads();
    await start('sql', one, source('sql'), pin('sql'));
    await end();
    expect(loads.lastLoad(one, 'sql')).toBeUndefined();
  });

  test('that is refused keeps the place, waits, and holds up no load', async () => {
    const { loads, start, fail } = startLoads();
    await start('sql', one, source('sql'), pin('sql'));
    await fail('arena_full', 503);
    expect(loads.failuresOf(source('sql'))).toMatchObject([{ call: 'pin', reason: 'NoRoom' }]);
    expect(loads.podsWithoutRoom(source('sql'))).toEqual(new Set());
    expect(loads.podsInvolved(source('sql'))).toEqual(['one']);
    expect(await start('sql', one, source('sql'), pin('sql'))).toBe('waits');
    expect(await start('sql')).toBe('begun');
  });
});

test('the time of the next retry is the first of all', async () => {
  const { clock, loads, start, fail } = startLoads();
  await start('a');
  await fail('adapter_invalid');
  await start('b');
  await fail(null);
  expect(loads.nextRetryAtMs()! - clock.nowMs()).toBe(backoffMs.first);
});
