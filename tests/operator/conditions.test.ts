import { expect, test } from 'vitest';
import { conditionOf, type Finding, setCondition } from '../../operator/conditions.ts';

const earlier = new Date('2026-01-01T00:00:00Z');
const later = new Date('2026-01-01T00:01:00.500Z');

const finding = (more: Partial<Finding> = {}): Finding => ({
  type: 'Ready',
  status: 'False',
  reason: 'EnginesStarting',
  message: '0 of 1',
  observedGeneration: 1,
  ...more,
});

test('says since when, in whole seconds', () => {
  expect(setCondition(undefined, finding(), later)).toEqual([
    { ...finding(), lastTransitionTime: '2026-01-01T00:01:00Z' },
  ]);
});

test('keeps the time while the status is the same, whatever the reason', () => {
  const before = setCondition(undefined, finding(), earlier);
  const [now] = setCondition(
    before,
    finding({ reason: 'EngineFailing', message: 'no', observedGeneration: 2 }),
    later,
  );
  expect(now).toEqual({
    ...finding({ reason: 'EngineFailing', message: 'no', observedGeneration: 2 }),
    lastTransitionTime: '2026-01-01T00:00:00Z',
  });
});

test('changes the time with the status', () => {
  const before = setCondition(undefined, finding(), earlier);
  const [now] = setCondition(before, finding({ status: 'True' }), later);
  expect(now!.lastTransitionTime).toBe('2026-01-01T00:01:00Z');
});

test('leaves conditions of other types alone, and in their order', () => {
  const both = setCondition(
    setCondition(undefined, finding(), earlier),
    finding({ type: 'Progressing' }),
    earlier,
  );
  const now = setCondition(both, finding({ status: 'True' }), later);
  expect(now.map(({ type, status }) => `${type} ${status}`)).toEqual(['Ready True', 'Progressing False']);
  expect(now[1]).toBe(both[1]);
  expect(conditionOf({ status: { conditions: now } }, 'Ready')).toBe(now[0]);
});

test('cuts a message that nobody would read to its end', () => {
  const [now] = setCondition(undefined, finding({ message: 'x'.repeat(10_000) }), later);
  expect(now!.message).toHaveLength(4096);
  expect(now!.message.endsWith('...')).toBe(true);
});
