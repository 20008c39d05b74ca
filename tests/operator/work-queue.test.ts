import { expect, test } from 'vitest';
import { WorkQueue, type WorkQueueOptions } from '../../operator/work-queue.ts';
import { seededRandom } from '../fixtures/seeded-random.ts';
import { FakeClock, settle } from './fake-clock.ts';

/** A queue whose runs end when the test says so. */
function queueOf(options: Partial<WorkQueueOptions> = {}) {
  const clock = new FakeClock();
  const started: string[] = [];
  const running = new Map<string, PromiseWithResolvers<{ requeueAfterMs?: number }>>();
  const retries: (number | null)[] = [];
  const queue = new WorkQueue({
    run(key) {
      started.push(key);
      const end = Promise.withResolvers<{ requeueAfterMs?: number }>();
      running.set(key, end);
      return end.promise;
    },
    concurrency: 2,
    clock,
    random: () => 1,
    onEnd: (_, { retryInMs }) => retries.push(retryInMs),
    ...options,
  });
  const end = async (key: string, result: { requeueAfterMs?: number } | Error = {}) => {
    if (result instanceof Error) running.get(key)!.reject(result);
    else running.get(key)!.resolve(result);
    await settle();
  };
  return { clock, queue, started, end, retries };
}

test('runs keys in the order in which they came, and no more than it may at a time', async () => {
  const { queue, started, end } = queueOf();
  for (const key of ['a', 'b', 'c', 'd']) queue.add(key);
  await settle();
  expect(started).toEqual(['a', 'b']);
  expect(queue.depth).toBe(2);
  await end('b');
  expect(started).toEqual(['a', 'b', 'c']);
});

test('folds a key that comes again while it waits', async () => {
  const { queue, started, end } = queueOf({ concurrency: 1 });
  queue.add('a');
  await settle();
  for (let i = 0; i < 3; i++) queue.add('b');
  await end('a');
  await end('b');
  expect(started).toEqual(['a', 'b']);
});

test('runs a key that comes while it runs once more, after it', async () => {
  const { queue, started, end } = queueOf();
  queue.add('a');
  await settle();
  queue.add('a');
  queue.add('a');
  await settle();
  expect(started).toEqual(['a']);
  await end('a');
  await end('a');
  expect(started).toEqual(['a', 'a']);
});

test('waits twice as long after each failure, up to a minute, and forgets failures at a success', async () => {
  const { clock, queue, end, retries } = queueOf();
  queue.add('a');
  for (let failure = 0; failure < 9; failure++) {
    await settle();
    await end('a', new Error('no'));
    await clock.advance(60_000);
  }
  expect(retries).toEqual([500, 1000, 2000, 4000, 8000, 16000, 32000, 60000, 60000]);
  await end('a');
  queue.add('a');
  await settle();
  await end('a', new Error('no'));
  expect(retries.slice(-2)).toEqual([null, 500]);
});

test('spreads what failed together over a quarter of the wait', async () => {
  const { queue, end, retries } = queueOf({ random: () => 0 });
  queue.add('a');
  await settle();
  await end('a', new Error('no'));
  expect(retries).toEqual([375]);
});

test('does not keep a change waiting for a backoff', async () => {
  const { clock, queue, started, end } = queueOf();
  queue.add('a');
  await settle();
  await end('a', new Error('no'));
  queue.add('a');
  await settle();
  expect(started).toEqual(['a', 'a']);
  await end('a');
  await clock.advance(60_000);
  expect(started).toEqual(['a', 'a']);
});

test('does not try again what is not to be tried again', async () => {
  const { clock, queue, started, end, retries } = queueOf({ isRetried: () => false });
  queue.add('a');
  await settle();
  await end('a', new Error('no'));
  await clock.advance(60_000);
  expect(started).toEqual(['a']);
  expect(retries).toEqual([null]);
});

test('comes back when a run asks for it, at the earlier of two times', async () => {
  const { clock, queue, started, end } = queueOf();
  queue.add('a');
  await settle();
  await end('a', { requeueAfterMs: 5000 });
  queue.addAfter('a', 2000);
  queue.addAfter('a', 9000);
  await clock.advance(1999);
  expect(started).toEqual(['a']);
  await clock.advance(1);
  expect(started).toEqual(['a', 'a']);
  await end('a');
  await clock.advance(60_000);
  expect(started).toEqual(['a', 'a']);
});

test('lets what runs end when it is drained, and starts nothing more', async () => {
  const { clock, queue, started, end } = queueOf({ concurrency: 1 });
  queue.add('a');
  queue.add('b');
  queue.addAfter('c', 10);
  await settle();
  let isDrained = false;
  const drained = queue.drain().then(() => {
    isDrained = true;
  });
  queue.add('d');
  await clock.advance(1000);
  expect(isDrained).toBe(false);
  await end('a', { requeueAfterMs: 1 });
  await drained;
  await clock.advance(1000);
  expect(started).toEqual(['a']);
  expect(clock.numTimers).toBe(0);
});

test('never runs a key twice at a time and never forgets one, over random runs', async () => {
  const seed = 7;
  const { below } = seededRandom(seed);
  const random = () => below(1_000_000) / 1_000_000;
  const clock = new FakeClock();
  const running = new Set<string>();
  /** Key -> whether it was run to its end after it was last added. */
  const isDone = new Map<string, boolean>();
  const queue = new WorkQueue({
    async run(key) {
      expect(running.has(key), `seed ${seed}`).toBe(false);
      running.add(key);
      expect(running.size).toBeLessThanOrEqual(3);
      isDone.set(key, true);
      await new Promise<void>((resolve) => clock.after(random() * 100, resolve));
      running.delete(key);
      if (random() < 0.3) {
        isDone.set(key, false);
        throw new Error('no');
      }
      return random() < 0.2 ? { requeueAfterMs: random() * 1000 } : {};
    },
    concurrency: 3,
    clock,
    random,
    onEnd: () => {},
  });
  for (let turn = 0; turn < 2000; turn++) {
    const key = `key-${below(10)}`;
    isDone.set(key, false);
    if (random() < 0.8) queue.add(key);
    else queue.addAfter(key, random() * 500);
    if (random() < 0.3) await clock.advance(random() * 200);
  }
  await clock.advance(1_000_000);
  expect([...isDone.values()]).toEqual(Array(10).fill(true));
  expect(queue.depth).toBe(0);
});
