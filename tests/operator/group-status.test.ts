import { expect, test } from 'vitest';
import { groupStatus, type Member } from '../../operator/group-status.ts';
import { adapterGroup } from './builders.ts';

const now = new Date('2026-11-28T10:00:00Z');

function statusFor(members: Member[], more: { nameConflict?: string; baseModelExists?: boolean } = {}) {
  const findings = { baseModelExists: true, nameConflict: null, members, now, ...more };
  return groupStatus(adapterGroup({ maxMembers: 2 }), undefined, findings);
}

const member = (name: string, ...pods: string[]): Member => ({ name, pods, isOnDemand: false });

test('is ready when an engine holds every member', () => {
  const status = statusFor([member('a', 'one', 'two'), member('b', 'two')]);
  expect(status).toMatchObject({ observedGeneration: 1, members: '2/2', adapters: ['a', 'b'] });
  expect(status.conditions).toMatchObject([
    { type: 'Ready', status: 'True', reason: 'MembersReady' },
    { type: 'Bounded', status: 'True', reason: 'WithinBound' },
  ]);
});

test('names a member that no engine holds', () => {
  const status = statusFor([member('a', 'one'), member('b')]);
  expect(status.members).toBe('1/2');
  expect(status.conditions![0]).toMatchObject({
    status: 'False',
    reason: 'MemberNotReady',
    message: expect.stringContaining('No engine holds b;'),
  });
});

test('says that no engine holds all of them', () => {
  expect(statusFor([member('a', 'one'), member('b', 'two')]).conditions![0]).toMatchObject({
    reason: 'MemberNotReady',
    message: expect.stringContaining('No engine holds all 2 members'),
  });
});

test('does not wait for what comes when somebody asks', () => {
  const lazy = { name: 'b', pods: [], isOnDemand: true };
  expect(statusFor([member('a', 'one'), lazy])).toMatchObject({
    members: '1/2',
    conditions: [{ reason: 'MembersReady' }, {}],
  });
});

test('says with both numbers that there are more members than a request composes', () => {
  const status = statusFor(['a', 'b', 'c'].map((name) => member(name, 'one')));
  expect(status.conditions).toMatchObject([
    { type: 'Ready', status: 'True' },
    {
      type: 'Bounded',
      status: 'False',
      reason: 'TooManyMembers',
      message: expect.stringMatching(/at most 2 .* 3\./),
    },
  ]);
});

test.for([
  ['NoMembers', {}, 'No LoraAdapter of tiny'],
  ['BaseModelNotFound', { baseModelExists: false }, 'no BaseModel tiny'],
  [
    'NameConflict',
    { baseModelExists: false, nameConflict: 'the name group is taken' },
    'is taken. Take another',
  ],
] as const)('%s', ([reason, more, message]) => {
  expect(statusFor([], more).conditions![0]).toMatchObject({
    status: 'False',
    reason,
    message: expect.stringContaining(message),
  });
});

test('shows a hundred names of a large group', () => {
  const status = statusFor(Array.from({ length: 150 }, (_, i) => member(`a${i}`, 'one')));
  expect(status.adapters).toHaveLength(100);
  expect(status.members).toBe('150/150');
});
