import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, expect, onTestFinished, test } from 'vitest';
import type { ErrorCode } from '../../engine/errors.ts';
import {
  claimOf,
  type EngineCallError,
  EngineClient,
  loraPathOf,
  parseAdapters,
} from '../../operator/engine-client.ts';
import { createMetrics } from '../../operator/metrics.ts';
import { digestOf, type SimulatedEngineOptions, SimulatedSources } from '../fixtures/simulated-engines.ts';
import { startSomewhere } from './simulated-world.ts';

/** A client and an engine that end with the test. */
async function startPair(options: Partial<SimulatedEngineOptions> = {}, tokenFile: string | null = null) {
  const sources = new SimulatedSources();
  const engine = await startSomewhere({ sources, ...options });
  const metrics = createMetrics();
  const client = new EngineClient({ tokenFile, metrics });
  onTestFinished(async () => {
    await client.close();
    await engine.stop();
  });
  return { sources, engine, client, metrics, ip: engine.address };
}

function failureOf(promise: Promise<unknown>): Promise<EngineCallError> {
  return promise.then(
    () => expect.fail('expected the call to fail'),
    (error) => error as EngineCallError,
  );
}

test('loads, lists and unloads', async () => {
  const { client, ip } = await startPair();
  await client.load(ip, 'sql', 'file:///motet/adapters/sql', undefined);
  const digest = digestOf('/motet/adapters/sql');
  const { arena, data } = await client.list(ip);
  expect(arena).toEqual({ totalBytes: 1 << 30, adapterBytes: 1 << 20 });
  expect(data).toMatchObject([{ digest, names: ['sql'], tier: 'device', rank: 8, requests: 0 }]);
  await client.unload(ip, 'sql');
  expect((await client.list(ip)).data).toEqual([]);
});

test('replaces what a name has, and takes a name that is not there for unloaded', async () => {
  const { client, engine, ip } = await startPair();
  await client.load(ip, 'sql', 'file:///v1', undefined);
  await client.load(ip, 'sql', 'file:///v2', undefined);
  expect(engine.names).toEqual({ sql: digestOf('/v2') });
  await client.unload(ip, 'another');
});

test('tells the engine the path under which it sees the source', async () => {
  expect(loraPathOf('pvc://team-a/sql/v1')).toBe('/motet/adapters/team-a/sql/v1');
  expect(loraPathOf('file:///motet/adapters/sql')).toBe('/motet/adapters/sql');
  expect(loraPathOf('https://models.example/sql')).toBe('https://models.example/sql');
  expect(claimOf('pvc://team-a/sql/v1')).toBe('team-a');
  expect(claimOf('https://models.example/pvc://x/y')).toBeNull();
});

test('a pin is asked for and taken back by loads that say so, and others leave it as it is', async () => {
  const { client, ip } = await startPair();
  const pinned = async () => (await client.list(ip)).data[0]!.pinned;
  const load = (isPinned?: boolean) => client.load(ip, 'sql', 'file:///sql', undefined, isPinned);
  await load();
  expect(await pinned()).toBe(false);
  await load(true);
  await load();
  expect(await pinned()).toBe(true);
  await load(false);
  expect(await pinned()).toBe(false);
});

describe('a refusal', () => {
  test.each([
    ['adapter_digest_mismatch', 'DigestMismatch'],
    ['source_unavailable', 'SourceUnavailable'],
    ['adapter_file_not_found', 'SourceUnavailable'],
    ['arena_full', 'NoRoom'],
    ['adapter_invalid', 'Refused'],
    ['adapter_rank_too_large', 'Refused'],
    ['adapter_path_refused', 'Refused'],
    ['invalid_value', 'Refused'],
    ['unauthorized', null],
    ['forbidden', null],
    ['too_many_loads', null],
    ['draining', null],
    ['not_ready', null],
    ['overloaded', null],
    ['internal', null],
  ] satisfies [ErrorCode, string | null][])('%s means %s', async (code, reason) => {
    const { sources, client, ip } = await startPair();
    sources.fail('/sql', code, `the engine's own words about ${code}`);
    const error = await failureOf(client.load(ip, 'sql', 'file:///sql', undefined));
    expect(error).toMatchObject({ code, reason, message: `the engine's own words about ${code}` });
  });

  test('names the digest that was expected', async () => {
    const { client, ip } = await startPair();
    const error = await failureOf(client.load(ip, 'sql', 'file:///sql', digestOf('another')));
    expect(error).toMatchObject({
      reason: 'DigestMismatch',
      message: expect.stringContaining(digestOf('another')),
    });
  });
});

describe('an engine that does not answer', () => {
  test('at all is told from one that refuses', async () => {
    const { engine, client, ip } = await startPair();
    await engine.stop();
    const error = await failureOf(client.list(ip));
    expect(error).toMatchObject({ code: null, reason: null, isRefusedConnection: true });
    expect(error.message).toContain(ip);
  });

  test.each([
    ['<html>', 'expected JSON'],
    ['{"data":[]}', 'arena'],
    ['{"arena":{"totalBytes":1,"adapterBytes":0},"data":[{"names":[]}]}', 'data.0.digest'],
    ['{"arena":{"totalBytes":-1,"adapterBytes":0},"data":[]}', 'arena.totalBytes'],
  ])('in its language but with %s is told what is wrong', (text, field) => {
    expect(() => parseAdapters(text)).toThrow(field);
  });

  test('without counts, as older ones, has adapters that nobody asks for', () => {
    const { requests: _, ...adapter } = {
      digest: 'd',
      names: ['sql'],
      tier: 'device',
      rank: 8,
      modules: [],
      kind: 'lora',
      bytes: 1,
      since: 1,
      requests: 5,
    };
    const text = JSON.stringify({ arena: { totalBytes: 1, adapterBytes: 1 }, data: [adapter] });
    expect(parseAdapters(text).data[0]!.requests).toBe(0);
  });
});

describe('the token', () => {
  function tokenFile(token: string): string {
    const folder = mkdtempSync(join(tmpdir(), 'motet-token-'));
    onTestFinished(() => rmSync(folder, { recursive: true }));
    writeFileSync(join(folder, 'token'), `${token}\n`);
    return join(folder, 'token');
  }

  test('is shown to the engine', async () => {
    const { client, ip } = await startPair({ token: 'eyJ.first' }, tokenFile('eyJ.first'));
    await client.list(ip);
  });

  test('of somebody else is refused, which says nothing about an adapter', async () => {
    const { client, ip } = await startPair({ token: 'eyJ.first' }, tokenFile('eyJ.other'));
    const error = await failureOf(client.load(ip, 'sql', 'file:///sql', undefined));
    expect(error).toMatchObject({ code: 'unauthorized', reason: null });
  });

  test('that cannot be read fails the call, and the next one reads it again', async () => {
    const path = tokenFile('eyJ.first');
    rmSync(path);
    const { client, ip } = await startPair({ token: 'eyJ.first' }, path);
    expect((await failureOf(client.list(ip))).message).toContain('ENOENT');
    writeFileSync(path, 'eyJ.first');
    await client.list(ip);
  });
});

test('calls are counted by what came of them', async () => {
  const { sources, engine, client, metrics, ip } = await startPair();
  await client.list(ip);
  sources.fail('/sql', 'arena_full', 'full');
  await failureOf(client.load(ip, 'sql', 'file:///sql', undefined));
  await engine.stop();
  await failureOf(client.unload(ip, 'sql'));
  const { values } = await metrics.engineCalls.get();
  expect(values.map(({ labels, value }) => `${labels.call} ${labels.result} ${value}`)).toEqual([
    'list ok 1',
    'load refused 1',
    'unload unreachable 1',
  ]);
});
