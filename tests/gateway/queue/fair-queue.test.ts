// On a clock of the tests: an engine that works off one request after another, each for as long as it costs.

import { expect, test } from 'vitest';
import { highestPriority, lowestPriority } from '../../../engine/protocol.ts';
import { type Ask, expectedCost } from '../../../gateway/queue/ask.ts';
import { FairQueue } from '../../../gateway/queue/fair-queue.ts';
import { seededRandom } from '../../fixtures/seeded-random.ts';

const ageingMs = 1_000;

function ask(fields: Partial<Ask> = {}): Ask {
  return {
    ...{ tenant: 'a', weight: 1, priority: 0, adapter: 'base', promptTokens: 10, outputTokens: 0 },
    ...{ numChoices: 1, arrivedMs: 0, deadlineMs: null },
    ...fields,
  };
}

const always = () => true;

function queueOf(asks: readonly Ask[], nowMs = 0): FairQueue<string> {
  const queue = new FairQueue<string>(ageingMs);
  for (const [index, one] of asks.entries()) queue.add(one, `${one.tenant}${index}`, nowMs);
  return queue;
}

/** Sends all that wait, in order. */
function order(
  queue: FairQueue<string>,
  nowMs = 0,
  hasRoom: (adapter: string) => boolean = always,
): string[] {
  const sent: string[] = [];
  const take = ({ waiter }: { waiter: string }) => sent.push(waiter) > 0;
  while (queue.sendNext(nowMs, hasRoom, take) !== null);
  return sent;
}

/** What each tenant got of an engine that sends one after another, while all of them always wait. */
function shares(
  tenants: readonly Partial<Ask>[],
  options: { numSent: number; trueCost?: (ask: Ask) => number; numAtOnce?: number },
): Map<string, number> {
  const { numSent, trueCost = expectedCost, numAtOnce = 1 } = options;
  const queue = new FairQueue<null>(ageingMs);
  const got = new Map<string, number>();
  const flying: (() => void)[] = [];
  for (const fields of tenants) for (let i = 0; i < 3; i++) queue.add(ask(fields), null, 0);
  for (let i = 0; i < numSent; i++) {
    let sent: Ask | undefined;
    const charge = queue.sendNext(0, always, (entry) => {
      sent = entry.ask;
      return true;
    })!;
    const cost = trueCost(sent!);
    got.set(sent!.tenant, (got.get(sent!.tenant) ?? 0) + cost);
    flying.push(() => queue.settle(charge, cost));
    if (flying.length >= numAtOnce) flying.shift()!();
    queue.add(sent!, null, 0);
  }
  return got;
}

test('tenants take turns, however many requests one of them has', () => {
  const flood = Array.from({ length: 6 }, () => ask({ tenant: 'flood' }));
  const queue = queueOf([...flood, ask({ tenant: 'b' }), ask({ tenant: 'c' })]);
  expect(order(queue)).toEqual(['flood0', 'b6', 'c7', 'flood1', 'flood2', 'flood3', 'flood4', 'flood5']);
});

test('one tenant with one adapter sees the order in which it asked', () => {
  const queue = queueOf(Array.from({ length: 50 }, (_, i) => ask({ arrivedMs: i * 100 })));
  expect(order(queue)).toEqual(Array.from({ length: 50 }, (_, i) => `a${i}`));
});

test('who sends long requests is sent fewer of them', () => {
  const got = shares(
    [
      { tenant: 'long', promptTokens: 400 },
      { tenant: 'short', promptTokens: 10 },
    ],
    {
      numSent: 4_100,
    },
  );
  expect(got.get('long')! / got.get('short')!).toBeCloseTo(1, 1);
});

test('weights 1, 2 and 4 get shares of 1, 2 and 4', () => {
  const got = shares(
    [1, 2, 4].map((weight) => ({ tenant: `w${weight}`, weight, promptTokens: 10 * weight + 3 })),
    { numSent: 7_000 },
  );
  const [one, two, four] = [1, 2, 4].map((weight) => got.get(`w${weight}`)!);
  expect(two! / one!).toBeCloseTo(2, 1);
  expect(four! / one!).toBeCloseTo(4, 1);
});

test('guesses that are wrong on purpose change no share', () => {
  // One is believed to cost nothing and costs 200; the other is believed to cost 400 and costs 20.
  const got = shares(
    [
      { tenant: 'under', promptTokens: 1, outputTokens: 0 },
      { tenant: 'over', promptTokens: 0, outputTokens: 200 },
    ],
    { numSent: 11_000, trueCost: ({ tenant }) => (tenant === 'under' ? 200 : 20), numAtOnce: 8 },
  );
  expect(got.get('under')! / got.get('over')!).toBeCloseTo(1, 1);
});

test('adapters of one tenant take turns too', () => {
  const queue = queueOf([
    ...Array.from({ length: 3 }, () => ask({ adapter: 'x' })),
    ask({ adapter: 'y' }),
    ask({ adapter: 'z' }),
  ]);
  expect(order(queue)).toEqual(['a0', 'a3', 'a4', 'a1', 'a2']);
});

test('who was away cannot save up: it takes turns when it comes back', () => {
  const queue = new FairQueue<string>(ageingMs);
  for (let i = 0; i < 100; i++) queue.settle(queue.charge(ask({ tenant: 'busy' }), 0), 10);
  for (let i = 0; i < 3; i++) queue.add(ask({ tenant: 'busy' }), `busy${i}`, 0);
  for (let i = 0; i < 3; i++) queue.add(ask({ tenant: 'back' }), `back${i}`, 0);
  expect(order(queue)).toEqual(['back0', 'busy0', 'back1', 'busy1', 'back2', 'busy2']);
});

test('nor does going away for a moment pay a debt', () => {
  const queue = new FairQueue<string>(ageingMs);
  queue.add(ask({ tenant: 'good' }), 'good0', 0);
  queue.add(ask({ tenant: 'good' }), 'good1', 0);
  const charge = queue.charge(ask({ tenant: 'big' }), 0);
  queue.settle(charge, 1_000);
  queue.add(ask({ tenant: 'big' }), 'big', 0);
  expect(order(queue)).toEqual(['good0', 'good1', 'big']);
});

test('of requests that came in the same second the shortest answer goes first, and never before those of a second earlier', () => {
  const queue = queueOf([
    ask({ arrivedMs: 100, outputTokens: 900 }),
    ask({ arrivedMs: 200, outputTokens: 30 }),
    ask({ arrivedMs: 300, outputTokens: 30 }),
    ask({ arrivedMs: 1_000, outputTokens: 1 }),
  ]);
  expect(order(queue)).toEqual(['a1', 'a2', 'a0', 'a3']);
});

test('a higher priority goes first', () => {
  const queue = queueOf([ask({ priority: -1 }), ask({ priority: 0 }), ask({ priority: 3 })]);
  expect(order(queue)).toEqual(['a2', 'a1', 'a0']);
});

test.each([
  [0, 1],
  [lowestPriority, highestPriority],
])(
  'priority %i waits for its turn as long as it is below %i and no longer, under a flood of that',
  (low, high) => {
    const queue = new FairQueue<string>(ageingMs);
    const stepMs = 70;
    for (let i = 0; i < 5; i++) queue.add(ask({ tenant: 'low', priority: low }), 'low', 0);
    queue.add(ask({ tenant: 'high', priority: high }), 'high', 0);
    const sentMs: number[] = [0];
    for (let nowMs = 0; sentMs.length < 6; nowMs += stepMs) {
      queue.sendNext(nowMs, always, ({ waiter }) => {
        if (waiter === 'low') sentMs.push(nowMs);
        return true;
      });
      queue.add(ask({ tenant: 'high', priority: high }), 'high', nowMs);
    }
    const gaps = sentMs.slice(1).map((ms, i) => ms - sentMs[i]!);
    expect(Math.max(...gaps)).toBeLessThanOrEqual((high - low) * ageingMs + stepMs);
    // And not much sooner, or the priority would mean nothing.
    expect(Math.min(...gaps)).toBeGreaterThanOrEqual((high - low) * ageingMs - stepMs);
  },
);

test('what another engine has room for does not hold back who waits for this one', () => {
  const queue = new FairQueue<string>(ageingMs);
  queue.add(ask({ tenant: 'low', adapter: 'here', priority: -1 }), 'low', 0);
  for (let nowMs = 0; nowMs <= 1_000; nowMs += 100)
    queue.charge(ask({ tenant: 'low', adapter: 'there', priority: -1 }), nowMs);
  queue.add(ask({ tenant: 'high', adapter: 'here' }), 'high', 1_000);
  expect(order(queue, 1_000)).toEqual(['low', 'high']);
});

test('between two requests of a tenant that waits, another is sent no more than the bound', () => {
  const random = seededRandom(7).unit;
  const maxCost = 300;
  const names = ['a', 'b', 'c', 'd'];
  const weights = [1, 2, 3, 5];
  const queue = new FairQueue<null>(ageingMs);
  const some = (i: number) =>
    ask({ tenant: names[i]!, weight: weights[i]!, promptTokens: 1 + Math.floor(random() * (maxCost - 1)) });
  for (let i = 0; i < 4; i++) for (let k = 0; k < 5; k++) queue.add(some(i), null, 0);
  const since = names.map(() => names.map(() => 0));
  for (let step = 0; step < 20_000; step++) {
    let sent = -1;
    queue.sendNext(0, always, ({ ask }) => {
      sent = names.indexOf(ask.tenant);
      for (const row of since) row[sent]! += expectedCost(ask);
      return true;
    });
    for (const [other, cost] of since[sent]!.entries()) {
      if (other === sent) continue;
      const bound = maxCost * (weights[other]! / weights[sent]! + 1) * 2;
      expect(cost).toBeLessThanOrEqual(bound);
    }
    since[sent] = names.map(() => 0);
    queue.add(some(sent), null, 0);
  }
});

test('who makes room is of the lowest priority, of the tenant most over its share, and came last', () => {
  const queue = queueOf([
    ask({ tenant: 'high', priority: 1, promptTokens: 9_000 }),
    ask({ tenant: 'flood' }),
    ask({ tenant: 'flood' }),
    ask({ tenant: 'heavy', weight: 4, promptTokens: 40 }),
    ask({ tenant: 'small' }),
  ]);
  expect(queue.victimFor(ask({ tenant: 'new' }))?.waiter).toBe('flood2');
  expect(queue.victimFor(ask({ tenant: 'new', priority: 1 }))?.waiter).toBe('flood2');
  // Its own is the newest of those that are most over their share.
  expect(queue.victimFor(ask({ tenant: 'flood' }))).toBeNull();
  expect(queue.victimFor(ask({ tenant: 'new', priority: -1 }))).toBeNull();
  expect(queue.victimFor(ask({ tenant: 'new', promptTokens: 1_000 }))).toBeNull();
});

test('the work ahead of a request is what is sent before it', () => {
  const queue = queueOf([
    ...Array.from({ length: 10 }, () => ask({ tenant: 'flood' })),
    ask({ tenant: 'high', priority: 1 }),
    ask({ tenant: 'low', priority: -1 }),
  ]);
  // Itself, the higher one, and one of the flood.
  expect(queue.workAhead(ask({ tenant: 'new' }))).toBe(30);
  expect(queue.workAhead(ask({ tenant: 'flood' }))).toBe(120);
});

test('random requests come, go and are settled: counts hold, and in the end nothing is kept', () => {
  const random = seededRandom(11).unit;
  const queue = new FairQueue<number>(ageingMs);
  const waiting = new Set<ReturnType<typeof queue.add>>();
  const flying: ReturnType<typeof queue.charge>[] = [];
  for (let step = 0; step < 5_000; step++) {
    const dice = random();
    if (dice < 0.4) {
      const fields = { tenant: `t${Math.floor(random() * 5)}`, adapter: `x${Math.floor(random() * 3)}` };
      waiting.add(queue.add(ask({ ...fields, priority: Math.floor(random() * 3) }), step, step));
    } else if (dice < 0.5) {
      const [one] = waiting;
      if (one) queue.remove(one);
      if (one) waiting.delete(one);
    } else if (dice < 0.8) {
      const charge = queue.sendNext(
        step,
        (adapter) => adapter !== 'x1' || step % 3 === 0,
        (entry) => waiting.delete(entry),
      );
      if (charge) flying.push(charge);
    } else if (flying.length > 0) queue.settle(flying.shift()!, random() < 0.2 ? null : random() * 500);
    expect(queue.size).toBe(waiting.size);
    expect([...queue.numByTenant.values()].reduce((sum, count) => sum + count, 0)).toBe(waiting.size);
  }
  for (const one of waiting) queue.remove(one);
  expect(queue.size).toBe(0);
  expect(queue.numByTenant.size).toBe(0);
});
