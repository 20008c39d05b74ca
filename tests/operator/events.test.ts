import { KubeConfig } from '@kubernetes/client-node';
import { pino } from 'pino';
import { beforeAll, expect, test } from 'vitest';
import { Events } from '../../operator/events.ts';
import { type ControlPlane, createNamespace, sharedControlPlane } from '../fixtures/control-plane.ts';
import { baseModel } from './builders.ts';
import { FakeClock } from './fake-clock.ts';
import { namespaceOf } from './start-operator.ts';

let plane: ControlPlane;

beforeAll(async () => {
  plane = await sharedControlPlane();
});

async function eventsOf() {
  const namespace = namespaceOf(plane, await createNamespace(plane));
  const kubeConfig = new KubeConfig();
  kubeConfig.loadFromFile(plane.kubeconfig);
  const clock = new FakeClock();
  const log = pino({ level: 'silent' });
  const events = new Events({ kubeConfig, namespace: namespace.name, identity: 'me', clock, log });
  const told = async () => {
    await events.flushed();
    const { items } = JSON.parse(await namespace.kubectl(['get', 'events', '-o', 'json']));
    return items as {
      type: string;
      reason: string;
      message: string;
      involvedObject: { kind: string; name: string };
    }[];
  };
  return { clock, events, told };
}

test('an event is shown about its object, with its words', async () => {
  const { events, told } = await eventsOf();
  events.tell(baseModel(), 'Warning', 'EngineFailing', 'no such file');
  expect(await told()).toMatchObject([
    {
      type: 'Warning',
      reason: 'EngineFailing',
      message: 'no such file',
      involvedObject: { kind: 'BaseModel', name: 'tiny' },
    },
  ]);
});

test('the same words are told again after ten minutes only, other words at once', async () => {
  const { clock, events, told } = await eventsOf();
  const tell = (message: string) => events.tell(baseModel(), 'Normal', 'EnginesReady', message);
  for (const message of ['a', 'a', 'b']) tell(message);
  expect(await told()).toHaveLength(2);
  await clock.advance(10 * 60_000);
  tell('a');
  expect(await told()).toHaveLength(3);
});

test('an object that says too much is cut short, and others are not', async () => {
  const { clock, events, told } = await eventsOf();
  const say = async (count: number, from: number, uid: string) => {
    for (let i = 0; i < count; i++) {
      events.tell(baseModel({}, { uid }), 'Normal', 'Loud', `${from + i}`);
      await events.flushed();
    }
  };
  await say(40, 0, 'loud');
  expect(await told()).toHaveLength(25);
  await say(1, 0, 'quiet');
  await clock.advance(60_000);
  await say(10, 100, 'loud');
  expect(await told()).toHaveLength(25 + 1 + 2);
});

test('an event that cannot be sent is nobody trouble', async () => {
  const { events } = await eventsOf();
  events.tell({ ...baseModel(), kind: '' }, 'Normal', '', 'an event without a reason is refused');
  await events.flushed();
});
