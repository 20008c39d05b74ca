import { expect, test } from 'vitest';
import { chooseTarget } from '../../gateway/choose-target.ts';
import { seededRandom } from '../fixtures/seeded-random.ts';

const target = (name: string, weight: number) => ({ name, baseModel: 'base', weight });
const all = () => true;

test.each([
  [0, 'a'],
  [0.29, 'a'],
  [0.31, 'b'],
  [0.999_999, 'b'],
])('a random number of %d falls into the share of %s', (random, name) => {
  expect(chooseTarget([target('a', 3), target('b', 7)], all, random)?.name).toBe(name);
});

test('many requests are shared by weight', () => {
  const random = seededRandom(4);
  const counts = new Map<string, number>();
  const targets = [target('a', 1), target('b', 2), target('c', 0), target('d', 7)];
  for (let i = 0; i < 10_000; i += 1) {
    const { name } = chooseTarget(targets, all, random.below(1_000_000) / 1_000_000)!;
    counts.set(name, (counts.get(name) ?? 0) + 1);
  }
  expect(counts.get('a')! / 10_000).toBeCloseTo(0.1, 1);
  expect(counts.get('b')! / 10_000).toBeCloseTo(0.2, 1);
  expect(counts.get('d')! / 10_000).toBeCloseTo(0.7, 1);
  expect(counts.has('c')).toBe(false);
});

test('a target that no engine holds leaves its share to the others', () => {
  const isServed = ({ name }: { name: string }) => name !== 'a';
  for (const random of [0, 0.5, 0.99]) {
    expect(chooseTarget([target('a', 99), target('b', 1)], isServed, random)?.name).toBe('b');
  }
});

test('nobody is chosen when all that have a weight are away', () => {
  const isServed = ({ name }: { name: string }) => name !== 'a';
  expect(chooseTarget([target('a', 1), target('b', 0)], isServed, 0.5)).toBeNull();
  expect(chooseTarget([], all, 0.5)).toBeNull();
});

test('a sticky request always goes to the same target, and targets get their shares', () => {
  const targets = [target('a', 1), target('b', 2), target('c', 0), target('d', 7)];
  const counts = new Map<string, number>();
  for (let i = 0; i < 10_000; i += 1) {
    const { name } = chooseTarget(targets, all, `user-${i}`)!;
    expect(chooseTarget([...targets].reverse(), all, `user-${i}`)!.name).toBe(name);
    counts.set(name, (counts.get(name) ?? 0) + 1);
  }
  expect(counts.get('a')! / 10_000).toBeCloseTo(0.1, 1);
  expect(counts.get('b')! / 10_000).toBeCloseTo(0.2, 1);
  expect(counts.get('c')).toBeUndefined();
});

test('a change of weights moves only the users that must move', () => {
  const before = [target('a', 90), target('b', 10)];
  const after = [target('a', 80), target('b', 20)];
  let numMoved = 0;
  for (let i = 0; i < 10_000; i += 1) {
    const [was, is] = [before, after].map((targets) => chooseTarget(targets, all, `user-${i}`)!.name);
    if (was === is) continue;
    expect([was, is]).toEqual(['a', 'b']);
    numMoved += 1;
  }
  // Ten of a hundred.
  expect(numMoved / 10_000).toBeCloseTo(0.1, 1);
});

test('a user whose target is away goes to another, and comes back with it', () => {
  const targets = [target('a', 1), target('b', 1), target('c', 1)];
  const home = chooseTarget(targets, all, 'ann')!.name;
  const away = chooseTarget(targets, ({ name }) => name !== home, 'ann')!.name;
  expect(away).not.toBe(home);
  expect(chooseTarget(targets, all, 'ann')!.name).toBe(home);
});
