/** Sequences that wait, begin and end in one simulated engine: who begins next, and what nobody has to wait longer than. */
import { describe, expect, test } from 'vitest';
import { highestPriority, lowestPriority, type Standing } from '../../engine/protocol.ts';
import { defaultSampling } from '../../engine/sampling.ts';
import { defaultStanding, Sequence } from '../../engine/sequence.ts';
import {
  maxCredit,
  maxPassedOver,
  maxPassesOfBand,
  outputWeight,
  passesPerRise,
  Turns,
} from '../../engine/turns.ts';
import { seededRandom } from '../fixtures/seeded-random.ts';

let nextId = 0;
function sequence(standing: Partial<Standing> = {}, adapterKey = '', numTokens = 10): Sequence {
  return new Sequence({
    id: nextId++,
    promptTokens: new Int32Array(numTokens),
    maxTotalTokens: 1_000,
    params: defaultSampling(),
    adapterKey,
    standing: { ...defaultStanding, ...standing },
  });
}

/** An engine that has one seat: what begins has its tokens and ends. */
class Queue {
  readonly turns = new Turns();
  readonly waiting: Sequence[] = [];

  add(...sequences: Sequence[]): void {
    for (const one of sequences) {
      this.waiting.push(one);
      this.turns.wait(one);
    }
  }

  next(): Sequence {
    const [first] = this.turns.order(this.waiting, 1);
    this.turns.begin(first!, this.waiting);
    this.waiting.splice(this.waiting.indexOf(first!), 1);
    return first!;
  }

  end(one: Sequence, numOutputTokens: number): void {
    this.turns.charge(one, one.numPromptTokens + outputWeight * numOutputTokens);
    this.turns.end(one, false);
  }

  serve(numOutputTokens = 5): Sequence {
    const one = this.next();
    this.end(one, numOutputTokens);
    return one;
  }
}

describe('tenants', () => {
  test('get tokens as their weights are, whatever their requests are like', () => {
    const queue = new Queue();
    const random = seededRandom(7);
    const weights = [1, 2, 4];
    const addOf = (weight: number) =>
      queue.add(sequence({ tenant: `of ${weight}`, weight }, '', weight === 1 ? 100 : random.from(1, 40)));
    for (const weight of weights) for (let i = 0; i < 3; i++) addOf(weight);
    const tokens = new Map(weights.map((weight) => [weight, 0]));
    for (let i = 0; i < 5_000; i++) {
      const one = queue.next();
      const { weight } = one.standing;
      const numOutputTokens = weight === 2 ? 60 : random.from(1, 30);
      queue.end(one, numOutputTokens);
      tokens.set(weight, tokens.get(weight)! + one.numPromptTokens + outputWeight * numOutputTokens);
      addOf(weight);
    }
    const [one, two, four] = weights.map((weight) => tokens.get(weight)!);
    expect(two! / one!).toBeCloseTo(2, 1);
    expect(four! / one!).toBeCloseTo(4, 1);
  });

  test('do not wait behind the flood of another', () => {
    const queue = new Queue();
    const flood = Array.from({ length: 50 }, () => sequence({ tenant: 'flood' }));
    queue.add(...flood);
    const quiet = sequence({ tenant: 'quiet' });
    queue.serve();
    queue.add(quiet);
    expect(queue.serve()).toBe(quiet);
    expect(queue.serve()).toBe(flood[1]);
  });

  test('save up their credit while they are away, and no more', () => {
    const queue = new Queue();
    queue.add(sequence({ tenant: 'back' }));
    queue.serve();
    queue.add(...Array.from({ length: 400 }, () => sequence({ tenant: 'here' })));
    for (let i = 0; i < 300; i++) queue.serve();
    queue.add(...Array.from({ length: 200 }, () => sequence({ tenant: 'back' })));
    const cost = queue.waiting[0]!.numPromptTokens + outputWeight * 5;
    const served = Array.from({ length: 100 }, () => queue.serve().standing.tenant);
    const numFirst = served.indexOf('here');
    expect(numFirst).toBeGreaterThanOrEqual(Math.floor(maxCredit / cost));
    expect(numFirst).toBeLessThanOrEqual(Math.ceil(maxCredit / cost) + 1);
    const numHere = served.filter((tenant) => tenant === 'here').length;
    expect(Math.abs(2 * numHere - (served.length - numFirst))).toBeLessThanOrEqual(2);
  });

  test('that come one after another have the same credit', () => {
    const queue = new Queue();
    queue.add(...Array.from({ length: 300 }, () => sequence({ tenant: 'here' })));
    for (let i = 0; i < 300; i++) queue.serve();
    for (const tenant of ['a', 'b', 'c'])
      queue.add(...Array.from({ length: 40 }, () => sequence({ tenant })));
    const served = Array.from({ length: 60 }, () => queue.serve().standing.tenant);
    expect(['a', 'b', 'c'].map((tenant) => served.filter((one) => one === tenant).length)).toEqual([
      20, 20, 20,
    ]);
  });

  test('alternate within one step, before anything is counted', () => {
    const queue = new Queue();
    const [a, b, c, d] = ['a', 'a', 'b', 'b'].map((tenant) => sequence({ tenant }));
    queue.add(a!, b!, c!, d!);
    expect(queue.turns.order(queue.waiting, 4)).toEqual([a, c, b, d]);
  });
});

describe('the line for what must be brought', () => {
  test('has tenants by what they bring, and stays as it is while tokens come', () => {
    const queue = new Queue();
    const flood = Array.from({ length: 3 }, () => sequence({ tenant: 'flood' }));
    const others = ['b', 'c'].map((tenant) => sequence({ tenant }));
    queue.add(...flood, ...others);
    const line = [flood[0], others[0], others[1], flood[1], flood[2]];
    expect(queue.turns.line(queue.waiting)).toEqual(line);
    queue.turns.charge(others[0]!, 10_000);
    expect(queue.turns.line(queue.waiting)).toEqual(line);
    const late = sequence({ tenant: 'late' });
    queue.add(late);
    expect(queue.turns.line(queue.waiting)).toEqual([...line.slice(0, 3), late, ...line.slice(3)]);
  });

  test('has priorities first, and who was passed over too often first of its own', () => {
    const queue = new Queue();
    const [a, b, c] = [sequence({ tenant: 'a' }), sequence({ tenant: 'a' }), sequence({ tenant: 'b' })];
    const high = sequence({ tenant: 'a', priority: 1 });
    queue.add(a!, b!, c!, high);
    expect(queue.turns.line(queue.waiting)).toEqual([high, a, c, b]);
    b!.numPassedOver = maxPassedOver;
    expect(queue.turns.line(queue.waiting)).toEqual([high, b, a, c]);
  });
});

test('adapters of a tenant take turns by their tokens', () => {
  const queue = new Queue();
  const flood = Array.from({ length: 5 }, () => sequence({}, 'flood'));
  const quiet = sequence({}, 'quiet');
  queue.add(...flood, quiet);
  expect([queue.serve(), queue.serve(), queue.serve()]).toEqual([flood[0], quiet, flood[1]]);
});

describe('priorities', () => {
  test('go first, and a lower one that waits has one turn in so many', () => {
    const queue = new Queue();
    const low = Array.from({ length: 3 }, () => sequence({ priority: -2 }));
    queue.add(...low);
    const served = Array.from({ length: 5 * passesPerRise }, () => {
      queue.add(sequence({ priority: 0 }));
      return queue.serve().standing.priority;
    });
    expect(served.indexOf(-2)).toBe(2 * passesPerRise);
    expect(served.indexOf(-2, 2 * passesPerRise + 1)).toBe(4 * passesPerRise + 1);
  });
});

test('a tenant that left counts as one that was here lately, until others had much', () => {
  const queue = new Queue();
  const [a, b] = [sequence({ tenant: 'a' }), sequence({ tenant: 'b' })];
  queue.add(a, b);
  queue.turns.end(queue.waiting.shift()!, true);
  expect(queue.turns.recentWeight).toBe(2);
  expect(queue.serve()).toBe(b);
  queue.add(sequence({ tenant: 'b' }));
  queue.serve(4 * maxCredit);
  queue.add(sequence({ tenant: 'b' }));
  queue.serve();
  queue.add(sequence({ tenant: 'b' }));
  expect(queue.turns.recentWeight).toBe(1);
  expect(queue.turns.numTenants).toBe(1);
});

test('counters of tenants that left are bounded', () => {
  const queue = new Queue();
  const stays = sequence({ tenant: 'stays' });
  queue.add(stays);
  for (let i = 0; i < 5_000; i++) {
    const one = sequence({ tenant: `tenant ${i}` });
    queue.add(one);
    queue.turns.begin(one, queue.waiting);
    queue.waiting.pop();
    queue.end(one, 50);
  }
  expect(queue.turns.numTenants).toBeLessThanOrEqual(4_097);
  expect(queue.serve()).toBe(stays);
});

test('one that others of its priority passed often enough is next, whatever its weight', () => {
  const queue = new Queue();
  const [first, second] = [0, 1].map(() => sequence({ tenant: 'light', weight: 0.001 }));
  queue.add(first!, second!, sequence({ tenant: 'heavy', weight: 1_000 }));
  expect(queue.serve()).toBe(first);
  for (let i = 0; i < maxPassedOver; i++) {
    queue.add(sequence({ tenant: 'heavy', weight: 1_000 }));
    expect(queue.serve()).not.toBe(second);
  }
  expect(queue.serve()).toBe(second);
});

test('nothing waits beyond its bounds, whatever comes', () => {
  let mostOfOthers = 0;
  let mostPassedOver = 0;
  for (let seed = 0; seed < 20; seed++) {
    const random = seededRandom(seed);
    const queue = new Queue();
    const priorities = random.pick([
      [0],
      [lowestPriority, highestPriority],
      [lowestPriority, -1, 0, 4, highestPriority],
    ]);
    const weights = random.pick([[1], [0.001, 1000], [1, 2, 4]]);
    const running: Sequence[] = [];
    /** By priority, since it waits: how many of others began. */
    const passes = new Map(priorities.map((priority) => [priority, 0]));
    for (let turn = 0; turn < 2_000; turn++) {
      for (let i = random.below(6); i > 0; i--) {
        const priority = random.pick(priorities);
        const tenant = random.below(4);
        const isOwn = ({ standing }: Sequence) =>
          standing.priority === priority && standing.tenant === `${tenant}`;
        if (queue.waiting.filter(isOwn).length >= 3) continue;
        const weight = weights[tenant % weights.length]!;
        const standing = { tenant: `${tenant}`, weight, priority };
        queue.add(sequence(standing, `${random.below(3)}`, random.pick([1, 10, 500])));
      }
      if (running.length > random.below(8)) queue.end(running.shift()!, random.from(1, 100));
      if (queue.waiting.length === 0) continue;
      const waited = new Set(queue.waiting.map(({ standing }) => standing.priority));
      const one = queue.next();
      running.push(one);
      mostPassedOver = Math.max(mostPassedOver, ...queue.waiting.map(({ numPassedOver }) => numPassedOver));
      for (const priority of priorities) {
        const isPassed = waited.has(priority) && one.standing.priority !== priority;
        passes.set(priority, isPassed ? passes.get(priority)! + 1 : 0);
        mostOfOthers = Math.max(mostOfOthers, passes.get(priority)!);
      }
    }
  }
  expect(mostOfOthers).toBeLessThanOrEqual(maxPassesOfBand);
  expect(mostPassedOver).toBeLessThanOrEqual(maxPassedOver);
  // Otherwise the load says nothing about the bounds.
  expect(mostOfOthers).toBeGreaterThanOrEqual(passesPerRise * (highestPriority - lowestPriority));
  expect(mostPassedOver).toBeGreaterThan(100);
});
