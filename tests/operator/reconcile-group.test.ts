import { beforeAll, expect, test } from 'vitest';
import { type ControlPlane, sharedControlPlane } from '../fixtures/control-plane.ts';
import { startWorld } from './simulated-world.ts';
import { applyCrds } from './start-operator.ts';

let plane: ControlPlane;

beforeAll(async () => {
  plane = await sharedControlPlane();
  await applyCrds(plane);
});

test('a group follows its base model and its members, and every engine holds them', async () => {
  const world = await startWorld(plane);
  await world.apply('AdapterGroup', 'knowledge', { baseModel: 'base', selector: {}, maxMembers: 1 });
  await world.untilReason('AdapterGroup', 'knowledge', 'BaseModelNotFound');
  await world.addBaseModel('base');
  await world.untilReason('AdapterGroup', 'knowledge', 'NoMembers');
  await world.addAdapter('law', 'base');
  await world.untilReason('AdapterGroup', 'knowledge', 'MemberNotReady');
  await world.addEngine('one', 'base');
  await world.addEngine('two', 'base');
  await world.untilReason('AdapterGroup', 'knowledge', 'MembersReady');
  // One copy is what its spec says.
  await world.until('LoraAdapter', 'law', ({ status }) => expect(status!.copies).toBe('2/2'));

  await world.addAdapter('tax', 'base');
  const { status } = await world.until('AdapterGroup', 'knowledge', ({ status }) =>
    expect(status).toMatchObject({ members: '2/2', adapters: ['law', 'tax'] }),
  );
  expect(status!.conditions).toMatchObject([
    { type: 'Ready', status: 'True' },
    { type: 'Bounded', status: 'False', reason: 'TooManyMembers' },
  ]);
  await expect
    .poll(async () => (await world.events('knowledge')).map(({ reason }) => reason), { timeout: 10_000 })
    .toContain('TooManyMembers');

  await world.remove('AdapterGroup', 'knowledge');
  await world.until('LoraAdapter', 'tax', ({ status }) => expect(status!.copies).toBe('1/1'));
});
