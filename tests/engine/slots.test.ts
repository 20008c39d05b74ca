import { expect, test } from 'vitest';
import { Slots } from '../../engine/slots.ts';

test('work that leaves its place lets others work, and goes on before those in line', async () => {
  const slots = new Slots(1, 4, 'loads');
  const order: string[] = [];
  const waited = Promise.withResolvers<void>();
  const held = Promise.withResolvers<void>();
  const first = slots.run(async ({ leave }) => {
    order.push('first');
    await leave(() => waited.promise);
    order.push('first again');
  });
  const second = slots.run(async () => {
    order.push('second');
    await held.promise;
  });
  const third = slots.run(async () => void order.push('third'));
  await Promise.resolve();
  waited.resolve();
  await new Promise((resolve) => setImmediate(resolve));
  expect(order).toEqual(['first', 'second']);
  held.resolve();
  await Promise.all([first, second, third]);
  expect(order).toEqual(['first', 'second', 'first again', 'third']);
});

test('a place that was left is not given back twice when the wait fails', async () => {
  const slots = new Slots(1, 0, 'loads');
  const failed = slots.run(({ leave }) => leave(() => Promise.reject(new Error('no pages'))));
  await expect(failed).rejects.toThrow('no pages');
  const held = Promise.withResolvers<void>();
  const only = slots.run(() => held.promise);
  await expect(slots.run(async () => {})).rejects.toMatchObject({ code: 'too_many_loads' });
  held.resolve();
  await only;
});

test('of those in line the lowest rank is next, as it is then, and of equals the first that came', async () => {
  const slots = new Slots(1, 4, 'loads');
  const held = Promise.withResolvers<void>();
  const order: string[] = [];
  const ranks = new Map([
    ['a', 2],
    ['b', 2],
    ['c', 3],
    ['d', 1],
  ]);
  const first = slots.run(() => held.promise);
  const others = [...ranks.keys()].map((name) =>
    slots.run(
      async () => void order.push(name),
      () => ranks.get(name)!,
    ),
  );
  ranks.set('c', 0);
  held.resolve();
  await Promise.all([first, ...others]);
  expect(order).toEqual(['c', 'd', 'a', 'b']);
});
