import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Redis } from 'ioredis';
import { expect, onTestFinished, test } from 'vitest';
import type { Limits } from '../../../gateway/quota/limits.ts';
import {
  newMeters,
  putLease,
  type Settlement,
  settle,
  type Take,
  take,
} from '../../../gateway/quota/meter.ts';
import { RedisMeters, type RedisOptions, scriptArguments } from '../../../gateway/quota/redis-meters.ts';
import { answer, type Received, startFakeEngine } from '../../fixtures/fake-engine.ts';
import { certificates } from '../../fixtures/https-source.ts';
import { type RunningRedis, startRedis } from '../../fixtures/redis.ts';
import { seededRandom } from '../../fixtures/seeded-random.ts';
import { chatBody, gatewayFor, until } from '../start-gateway.ts';

const second = 1_000_000;
const numSteps = Number(process.env.MOTET_QUOTA_STEPS ?? 1_500);

test('the script in Redis does what the functions do, over random schedules', async () => {
  const { url } = await startRedis();
  const lua = readFileSync(join(import.meta.dirname, '../../../gateway/quota/meter.lua'), 'utf8');
  const redis = new Redis(url, { scripts: { motetMeters: { lua } } });
  onTestFinished(() => redis.disconnect());
  const run = (action: string, nowUs: number, parts: readonly (Take | Settlement)[]) =>
    redis.motetMeters(
      parts.length,
      ...parts.map(({ key }) => key),
      action,
      nowUs,
      ...parts.flatMap(scriptArguments),
    );

  const seed = Date.now() % 2 ** 32;
  const random = seededRandom(seed);
  const meters = newMeters();
  const held: Extract<Take, { kind: 'lease' }>[] = [];
  let nowUs = 1_800_000_000 * second;
  let numTaken = 0;
  for (let step = 0; step < numSteps; step += 1) {
    nowUs += random.below(4 * second);
    const takes = [1, 2, 3].slice(0, random.from(1, 3)).map((n): Take => {
      if (random.unit() < 0.6) return { kind: 'rate', key: `r${n}`, costUs: random.below(30 * second) };
      const limit = random.from(1, 5);
      return { kind: 'lease', key: `l${n}`, limit, id: String(step), ttlUs: 15 * second };
    });
    const [isTaken, ...readings] = await run('take', nowUs, takes);
    const taking = take(meters, nowUs, takes);
    expect({ isTaken: isTaken === 1, readings }, `seed ${seed}, step ${step}`).toEqual(taking);
    if (taking.isTaken) {
      numTaken += 1;
      for (const each of takes) if (each.kind === 'lease') held.push(each);
    }

    if (random.unit() < 0.4) {
      const settlements: Settlement[] = [
        { kind: 'rate', key: random.pick(['r1', 'r2', 'r3']), addUs: random.from(-30 * second, 10 * second) },
      ];
      const done = held.splice(random.below(held.length + 1), 1)[0];
      if (done !== undefined) settlements.push({ kind: 'lease', key: done.key, id: done.id });
      await run('settle', nowUs, settlements);
      settle(meters, nowUs, settlements);
    }
    const renewed = held[random.below(held.length + 1)];
    if (renewed !== undefined && random.unit() < 0.3) {
      await run('renew', nowUs, [renewed]);
      putLease(meters, renewed.key, renewed.id, nowUs + renewed.ttlUs);
    }
  }
  // Both branches were walked.
  expect(numTaken).toBeGreaterThan(numSteps / 10);
  expect(numTaken).toBeLessThan(numSteps);
});

const apiKeys = new Map([['team-a', 'key-of-team-a-0123']]);
const asTeam = { headers: { authorization: 'Bearer key-of-team-a-0123' } };

async function gatewayOver(redis: RunningRedis, limits: Limits, options: Partial<RedisOptions> = {}) {
  return gatewayFor([await startFakeEngine()], {
    apiKeys,
    limits: new Map([['team-a', limits]]),
    redis: { url: redis.url, password: null, ca: null, timeoutMs: 2_000, ...options },
  });
}
type Gateway = Awaited<ReturnType<typeof gatewayOver>>;

/** Statuses of so many requests, one after another, in turns over the gateways. */
async function ask(gateways: Gateway[], count: number): Promise<number[]> {
  const statuses: number[] = [];
  for (let i = 0; i < count; i += 1) {
    const response = await gateways[i % gateways.length]!.chat(chatBody(), asTeam);
    await response.text();
    statuses.push(response.status);
  }
  return statuses;
}
const numOk = (statuses: number[]) => statuses.filter((status) => status === 200).length;
const logged = ({ logLines }: Gateway, text: string) =>
  logLines.filter(({ msg }) => String(msg).includes(text)).length;
const awayText = 'Redis does not answer';
const backText = 'Redis answers again';

test('gateways share a limit', async () => {
  const redis = await startRedis();
  const gateways = [
    await gatewayOver(redis, { requestsPerMinute: 3 }),
    await gatewayOver(redis, { requestsPerMinute: 3 }),
  ];
  // It may come back by one while they are asked, on a slow machine.
  const statuses = await ask(gateways, 8);
  expect(numOk(statuses)).toBeLessThanOrEqual(4);
  expect(statuses.slice(0, 3)).toEqual([200, 200, 200]);
});

test('a place of a request that ends while Redis is away is free when Redis is back', async () => {
  const redis = await startRedis();
  const held: Received[] = [];
  const engine = await startFakeEngine({ script: (received) => void held.push(received) });
  const gateway = await gatewayFor([engine], {
    apiKeys,
    limits: new Map([['team-a', { concurrency: 3 }]]),
    redis: { url: redis.url, password: null, ca: null, timeoutMs: 500 },
  });
  const statusOf = async () => (await gateway.chat(chatBody(), asTeam)).status;
  const areHeld = (count: number) =>
    until(
      () => held.length,
      (length) => length === count,
    );
  const isLogged = (text: string) =>
    until(
      () => logged(gateway, text),
      (count) => count === 1,
    );
  const statuses = [statusOf(), statusOf()];
  await areHeld(2);
  redis.freeze();
  // The one that finds out.
  statuses.push(statusOf());
  await areHeld(3);
  await isLogged(awayText);
  for (const received of held) void answer(received);
  expect(await Promise.all(statuses)).toEqual([200, 200, 200]);
  redis.thaw();
  await isLogged(backText);
  engine.script = answer;
  expect(await Promise.all([statusOf(), statusOf(), statusOf()])).toEqual([200, 200, 200]);
});

test('a Redis that is killed and comes back fails no request', async () => {
  const redis = await startRedis();
  const gateway = await gatewayOver(redis, { requestsPerMinute: 6_000, concurrency: 100 });
  let isOver = false;
  const statuses: number[] = [];
  const load = Array.from({ length: 4 }, async () => {
    while (!isOver) statuses.push(...(await ask([gateway], 1)));
  });
  const metric = async (name: string) => {
    const text = await (await fetch(`${gateway.url}/metrics`)).text();
    return Number(new RegExp(`^motet_gateway_quota_${name} (\\d+)$`, 'm').exec(text)![1]);
  };
  const numAlone = () => metric('alone_total');
  expect(await metric('store_away')).toBe(0);

  for (let round = 1; round <= 2; round += 1) {
    await redis.kill();
    await until(
      () => logged(gateway, awayText),
      (count) => count === round,
    );
    const before = await numAlone();
    await until(numAlone, (count) => count > before + 10);
    expect(await metric('store_away')).toBe(1);
    await redis.start();
    await until(
      () => logged(gateway, backText),
      (count) => count === round,
    );
    expect(await metric('store_away')).toBe(0);
  }
  isOver = true;
  await Promise.all(load);
  expect(new Set(statuses)).toEqual(new Set([200]));
});

test('a Redis that hangs is waited for once', async () => {
  const redis = await startRedis();
  const gateway = await gatewayOver(redis, { requestsPerMinute: 6_000 }, { timeoutMs: 300 });
  redis.freeze();
  expect(new Set(await ask([gateway], 20))).toEqual(new Set([200]));
  expect(logged(gateway, awayText)).toBe(1);
  redis.thaw();
  await until(
    () => logged(gateway, backText),
    (count) => count === 1,
  );
});

test('alone, a gateway goes on with its share of what Redis left', async () => {
  const redis = await startRedis();
  const limits = { requestsPerMinute: 8 };
  const gateways = [await gatewayOver(redis, limits), await gatewayOver(redis, limits)];
  // The first to look saw one gateway, the second two.
  expect(numOk(await ask([gateways[1]!], 4))).toBe(4);
  await redis.kill();
  // Half of the half that is left; one more may have come back meanwhile.
  const left = numOk(await ask([gateways[1]!], 6));
  expect(left).toBeGreaterThanOrEqual(2);
  expect(left).toBeLessThanOrEqual(3);
});

const options = (redis: RunningRedis): RedisOptions => ({
  url: redis.url,
  password: null,
  ca: null,
  timeoutMs: 2_000,
  numGateways: 1,
});
const silent = { info: () => {}, warn: () => {} };
const lease = (id: string): Take => ({ kind: 'lease', key: 'k', limit: 2, id, ttlUs: 15 * second });

async function metersOver(redis: RunningRedis, id: string): Promise<RedisMeters> {
  const meters = new RedisMeters(options(redis), id, silent, () => {});
  onTestFinished(() => meters.close());
  await meters.ready;
  return meters;
}

test('a Redis that lost its memory is told again who holds what', async () => {
  const redis = await startRedis();
  const [a, b] = [await metersOver(redis, 'a'), await metersOver(redis, 'b')];
  await a.take([lease('a1')]);
  const taken = await a.take([lease('a2')]);
  await redis.kill();
  await redis.start();
  await until(
    async () => {
      const { isTaken, settle } = await b.take([lease('b1')]);
      settle([{ kind: 'lease', key: 'k', id: 'b1' }]);
      return a.isShared && b.isShared && !isTaken;
    },
    (isRefused) => isRefused,
  );
  taken.settle([{ kind: 'lease', key: 'k', id: 'a2' }]);
  await until(async () => (await b.take([lease('b2')])).isTaken, Boolean);
});

test('who leaves gives its places back', async () => {
  const redis = await startRedis();
  const [a, b] = [await metersOver(redis, 'a'), await metersOver(redis, 'b')];
  for (const id of ['a1', 'a2']) expect((await a.take([lease(id)])).isTaken).toBe(true);
  expect((await b.take([lease('b1')])).isTaken).toBe(false);
  await a.close();
  expect((await b.take([lease('b1')])).isTaken).toBe(true);
});

test('a wrong password is one log line that does not show it, and nobody is kept out', async () => {
  const redis = await startRedis(['--requirepass', 'the-right-one']);
  const limits = { requestsPerMinute: 100 };
  const wrong = await gatewayOver(redis, limits, { password: 'the-wrong-one' });
  expect(await ask([wrong], 2)).toEqual([200, 200]);
  await until(
    () => logged(wrong, awayText),
    (count) => count === 1,
  );
  expect(JSON.stringify(wrong.logLines)).not.toContain('-one');
  const right = await gatewayOver(redis, limits, { password: 'the-right-one' });
  expect(await ask([right], 2)).toEqual([200, 200]);
  expect(logged(right, awayText)).toBe(0);
});

test('TLS trusts who the settings say, and nobody else', async () => {
  const { ca, cert, key } = certificates();
  const folder = mkdtempSync(join(tmpdir(), 'motet-redis-'));
  onTestFinished(() => rmSync(folder, { recursive: true }));
  for (const [name, text] of Object.entries({ cert, key })) writeFileSync(join(folder, name), text);
  const redis = await startRedis([
    ...['--port', '0', '--tls-port', 'PORT', '--tls-auth-clients', 'no'],
    ...['--tls-cert-file', join(folder, 'cert'), '--tls-key-file', join(folder, 'key')],
  ]);
  const tls = { ...redis, url: redis.url.replace('redis:', 'rediss:') };
  const trusting = await gatewayOver(tls, { requestsPerMinute: 100 }, { ca });
  expect(await ask([trusting], 1)).toEqual([200]);
  expect(logged(trusting, awayText)).toBe(0);
  const doubting = await gatewayOver(tls, { requestsPerMinute: 100 });
  await until(
    () => logged(doubting, awayText),
    (count) => count === 1,
  );
});
