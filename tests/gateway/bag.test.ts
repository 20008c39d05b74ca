import { expect, test } from 'vitest';
import { Bag } from '../../gateway/bag.ts';
import { seededRandom } from '../fixtures/seeded-random.ts';

test('holds what was added and not taken out, as a Map would', () => {
  const random = seededRandom(7);
  const bag = new Bag<number>();
  const held = new Map<number, () => void>();
  for (let i = 0; i < 5_000; i++) {
    if (random.below(2) === 0) held.set(i, bag.add(i));
    else {
      const [value, remove] = [...held][random.below(Math.max(1, held.size))] ?? [];
      remove?.();
      remove?.();
      if (value !== undefined) held.delete(value);
    }
    expect(bag.size).toBe(held.size);
  }
  expect(bag.values().toSorted((a, b) => a - b)).toEqual([...held.keys()]);
  for (const remove of held.values()) remove();
  expect(bag.values()).toEqual([]);
});

test('what goes while the rest is looked at is not missed, and misses nothing', () => {
  const bag = new Bag<() => void>();
  const called: number[] = [];
  const removes = [0, 1, 2, 3].map((i) =>
    bag.add(() => {
      called.push(i);
      removes[i]!();
    }),
  );
  for (const each of bag.values()) each();
  expect(called).toEqual([0, 1, 2, 3]);
  expect(bag.size).toBe(0);
});
