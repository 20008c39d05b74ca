import { expect, onTestFinished, test } from 'vitest';
import { Gate, roomFor } from '../../../gateway/batches/gate.ts';
import { until } from '../start-gateway.ts';

const idle = { linesPerEngine: 8, numEngines: 2, numOnline: 0 };

test.each([
  ['idle engines are filled', {}, 16],
  ['online requests in flight are left their room', { numOnline: 10 }, 6],
  ['more of them leave that of one line, which waits for its turn', { numOnline: 20 }, 1],
  ['without an engine there is none', { numEngines: 0 }, 0],
] as const)('%s', (_name, more, expected) => {
  expect(roomFor({ ...idle, ...more }).maxInFlight).toBe(expected);
});

test('lets in as many as there is room for, in turn, and looks again by itself', async () => {
  let maxInFlight = 2;
  const gate = new Gate(() => ({ maxInFlight, numEngines: 1 }));
  const end = new AbortController();
  onTestFinished(() => end.abort(new Error('the test is over')));
  const order: number[] = [];
  const places = [0, 1, 2, 3].map((i) =>
    gate.take(end.signal).then((release) => {
      order.push(i);
      return release;
    }),
  );
  const [release] = await Promise.all(places.slice(0, 2));
  expect(order).toEqual([0, 1]);
  release!();
  release!();
  await places[2];
  expect(gate.numInFlight).toBe(2);
  maxInFlight = 3;
  await until(
    () => order.length,
    (count) => count === 4,
  );
  expect(order).toEqual([0, 1, 2, 3]);
});

test('who gives up waiting takes no place', async () => {
  const gate = new Gate(() => ({ maxInFlight: 1, numEngines: 1 }));
  const [stays, leaves] = [new AbortController(), new AbortController()];
  const release = await gate.take(stays.signal);
  const waiting = gate.take(leaves.signal);
  leaves.abort(new Error('gone'));
  await expect(waiting).rejects.toThrow('gone');
  release();
  expect(gate.numInFlight).toBe(0);
  (await gate.take(stays.signal))();
});
