import { beforeAll, describe, expect, test } from 'vitest';
import { motetPath } from '../../crds/api.ts';
import { apiVersion } from '../../crds/types.ts';
import { isWanted, wantedReplicas } from '../../operator/on-demand.ts';
import { type ControlPlane, sharedControlPlane } from '../fixtures/control-plane.ts';
import { baseModel, loraAdapter } from './builders.ts';
import { startWorld, type World } from './simulated-world.ts';
import { applyCrds } from './start-operator.ts';

const now = new Date('2026-11-25T10:00:00Z');
const minutesAgo = (minutes: number) => new Date(now.getTime() - minutes * 60_000).toISOString();

test('an adapter is wanted always, or for a while after somebody asked', () => {
  const onDemand = { idleMinutes: 10 };
  const asked = (at?: string) => ({
    ...loraAdapter({ onDemand }),
    status: at === undefined ? {} : { askedAt: at },
  });
  expect(isWanted(loraAdapter(), now)).toBe(true);
  expect(isWanted(asked(), now)).toBe(false);
  expect(isWanted(asked(minutesAgo(9)), now)).toBe(true);
  expect(isWanted(asked(minutesAgo(10)), now)).toBe(false);
});

test.each([
  ['without onDemand', 0, undefined, 1, 0],
  ['nobody asked', 0, 2, undefined, 0],
  ['somebody asks', 0, 2, 1, 2],
  ['an autoscaler wants more', 5, 2, 1, 5],
  ['nobody asked lately', 0, 2, 30, 0],
])('a base model has the engines that it should: %s', (_, replicas, more, askedMinutesAgo, expected) => {
  const onDemand = more === undefined ? undefined : { replicas: more, idleMinutes: 30 };
  const model = {
    ...baseModel({ replicas, ...(onDemand && { onDemand }) }),
    status: askedMinutesAgo === undefined ? {} : { askedAt: minutesAgo(askedMinutesAgo) },
  };
  const wanted = wantedReplicas(model, now);
  expect(wanted.replicas).toBe(expected);
  expect(wanted.askAgainInMs).toBe(expected > replicas ? 29 * 60_000 : null);
});

describe('against an API server', () => {
  let plane: ControlPlane;
  beforeAll(async () => {
    plane = await sharedControlPlane();
    await applyCrds(plane);
  });

  /** What a gateway writes. */
  const ask = (world: World, kind: 'BaseModel' | 'LoraAdapter', name: string, at: Date) =>
    world.api({
      method: 'PATCH',
      path: motetPath(kind, world.namespace, name, 'status'),
      query: { fieldManager: 'motet-gateway', force: 'true' },
      contentType: 'application/apply-patch+yaml',
      body: { apiVersion, kind, metadata: { name }, status: { askedAt: at.toISOString() } },
    });
  const longAgo = new Date(Date.now() - 3_600_000);

  test('an adapter is loaded when somebody asks, and unloaded when nobody has for long', async () => {
    const world = await startWorld(plane);
    await world.addBaseModel('base');
    await world.addAdapter('sql', 'base', { onDemand: { idleMinutes: 10 } });
    await world.addEngine('one', 'base');
    await world.untilReason('LoraAdapter', 'sql', 'NotAsked');
    await ask(world, 'LoraAdapter', 'sql', new Date());
    const { status } = await world.untilReason('LoraAdapter', 'sql', 'Resident');
    expect(status!.placements).toHaveLength(1);
    expect(status!.askedAt).toBeDefined();
    await ask(world, 'LoraAdapter', 'sql', longAgo);
    await world.until('LoraAdapter', 'sql', (object) => {
      expect(object.status).toMatchObject({ copies: '0/0', placements: [] });
    });
  });

  test('a base model of no replicas has engines while somebody asks', async () => {
    const world = await startWorld(plane);
    await world.addBaseModel('base', { replicas: 0, onDemand: { replicas: 2, idleMinutes: 10 } });
    const path = `/apis/apps/v1/namespaces/${world.namespace}/deployments/base`;
    const replicas = async () => (await world.api<{ spec: { replicas: number } }>({ path })).spec.replicas;
    const { status } = await world.untilReason('BaseModel', 'base', 'ScaledToZero');
    expect(status!.conditions!.find(({ type }) => type === 'Ready')!.message).toContain('a request wakes it');
    await ask(world, 'BaseModel', 'base', new Date());
    await expect.poll(replicas, { timeout: 20_000 }).toBe(2);
    await ask(world, 'BaseModel', 'base', longAgo);
    await expect.poll(replicas, { timeout: 20_000 }).toBe(0);
  });
});
