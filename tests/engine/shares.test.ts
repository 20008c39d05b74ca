/** What is fair of the seats, and that they do not go to and fro: over random tenants, weights and loads. */
import { expect, test } from 'vitest';
import { lowestPriority, type Standing } from '../../engine/protocol.ts';
import { defaultSampling } from '../../engine/sampling.ts';
import { schedule } from '../../engine/scheduler.ts';
import { maxYields, Sequence } from '../../engine/sequence.ts';
import { type Claims, claimsOf, fairLevel, isBelow, numSeatsToGive, seatsOver } from '../../engine/shares.ts';
import { maxCredit, maxPassedOver, maxPassesOfBand, Turns } from '../../engine/turns.ts';
import { type SeededRandom, seededRandom } from '../fixtures/seeded-random.ts';

/** Raised for a long proof. */
const numSchedules = Number(process.env.MOTET_SCHEDULES ?? 30);

const claims = (...rows: [weight: number, numRunning: number, numWaiting: number][]): Claims =>
  new Map(
    rows.map(([weight, numRunning, numWaiting], i) => [`tenant ${i}`, { weight, numRunning, numWaiting }]),
  );

test.each([
  { rows: [[1, 2, 0]] as const, numSeats: 4, level: Number.POSITIVE_INFINITY },
  {
    rows: [
      [1, 4, 9],
      [1, 0, 1],
    ] as const,
    numSeats: 4,
    level: 3,
  },
  {
    rows: [
      [1, 4, 9],
      [1, 0, 9],
    ] as const,
    numSeats: 4,
    level: 2,
  },
  {
    rows: [
      [1, 4, 9],
      [3, 0, 9],
    ] as const,
    numSeats: 4,
    level: 1,
  },
  {
    rows: [
      [1, 8, 9],
      [1, 1, 0],
      [1, 0, 2],
      [2, 1, 9],
    ] as const,
    numSeats: 10,
    level: 7 / 3,
  },
])('of $numSeats seats, $rows have $level for a weight of 1', ({ rows, numSeats, level }) => {
  expect(fairLevel(claims(...rows.map((row) => [...row] as [number, number, number])), numSeats)).toBeCloseTo(
    level,
    9,
  );
});

test('a seat that changes hands makes nobody owe one', () => {
  for (let seed = 0; seed < 2_000; seed++) {
    const random = seededRandom(seed);
    const numSeats = random.from(1, 32);
    const held: Claims = new Map();
    for (let i = random.from(2, 12); i > 0; i--)
      held.set(`${i}`, {
        weight: random.pick([1, 1, 2, 4, 0.3]),
        numRunning: 0,
        numWaiting: random.below(40),
      });
    const all = [...held.values()];
    for (let i = 0; i < numSeats; i++) {
      const waiting = all.filter(({ numWaiting }) => numWaiting > 0);
      if (waiting.length === 0) break;
      const one = random.pick(waiting);
      one.numRunning++;
      one.numWaiting--;
    }
    const level = fairLevel(held, numSeats);
    const weight = all.reduce((sum, one) => sum + one.weight, 0);
    const most = numSeatsToGive(held, numSeats, weight);
    let numMoved = 0;
    for (;;) {
      const below = all.find((one) => one.numWaiting > 0 && isBelow(one, level));
      const over = all.find((one) => seatsOver(one, level) > 0);
      if (!below || !over) break;
      below.numRunning++;
      below.numWaiting--;
      over.numRunning--;
      over.numWaiting++;
      numMoved++;
      expect(seatsOver(below, level), `seed ${seed}`).toBe(0);
      expect(isBelow(over, level), `seed ${seed}`).toBe(false);
    }
    expect(numMoved, `seed ${seed}`).toBeLessThanOrEqual(most);
    // What wants is what is shared, wherever it is: the level stays.
    expect(fairLevel(held, numSeats)).toBeCloseTo(level, 9);
  }
});

/** Seats, turns and shares as the engine has them, without tokens: a sequence runs for so many steps. */
class Seats {
  readonly turns = new Turns();
  readonly waiting: Sequence[] = [];
  readonly running: Sequence[] = [];
  readonly numSeats: number;
  numYields = 0;

  constructor(numSeats: number) {
    this.numSeats = numSeats;
  }

  add(sequence: Sequence): void {
    this.waiting.push(sequence);
    this.turns.wait(sequence);
  }

  /** @returns those that began */
  step(): readonly Sequence[] {
    for (let numPlans = 0; ; numPlans++) {
      if (numPlans > 2 + this.numSeats) throw new Error('seats go to and fro');
      const claims = claimsOf(this.running, this.waiting);
      const numGivingWay = this.running.filter(({ givesWay }) => givesWay).length;
      const numFree = this.numSeats - this.running.length;
      const { recentWeight } = this.turns;
      const most = numFree + numGivingWay + numSeatsToGive(claims, this.numSeats, recentWeight);
      const plan = schedule({
        waiting: this.turns.order(this.waiting, most),
        running: this.running,
        claims,
        recentWeight,
        numFreePages: 1_000_000,
        numFreeHostPages: 0,
        prefixCache: { find: () => null, numPagesOfItsOwn: ({ numBlocks }) => numBlocks },
        numWantedPages: 0,
        blockSizeTokens: 16,
        maxBatchTokens: 1_000,
        maxSequences: this.numSeats,
      });
      if (plan.yielded.length === 0) {
        const began = plan.admitted.map(({ sequence }) => sequence);
        for (const sequence of began) {
          this.turns.begin(sequence, this.waiting);
          this.waiting.splice(this.waiting.indexOf(sequence), 1);
          this.running.push(sequence);
          this.turns.charge(sequence, 1);
        }
        for (const { sequence, numTokens } of plan.chunks) sequence.numComputedTokens += numTokens;
        return began;
      }
      for (const { sequence } of plan.yielded) {
        sequence.numYields++;
        sequence.numComputedTokens = 0;
        this.numYields++;
        this.running.splice(this.running.indexOf(sequence), 1);
        const after = this.waiting.findIndex(({ id }) => id > sequence.id);
        this.waiting.splice(after < 0 ? this.waiting.length : after, 0, sequence);
        this.turns.wait(sequence);
      }
    }
  }
}

test('who had little lately has seats for several at once, down to what the other has if all come back', () => {
  const seats = new Seats(8);
  let nextId = 0;
  const bring = (tenant: string, count: number) => {
    for (let i = 0; i < count; i++) seats.add(sequenceOf(nextId++, { tenant, weight: 1, priority: 0 }, 1));
  };
  const numOf = (tenant: string) => seats.running.filter(({ standing }) => standing.tenant === tenant).length;
  for (let i = 0; i < 8; i++) bring(`tenant ${i}`, 1);
  seats.step();
  for (const sequence of seats.running.splice(0)) seats.turns.end(sequence, false);
  bring('flood', 20);
  seats.step();
  seats.turns.charge(seats.running[0]!, 2 * maxCredit);
  expect(numOf('flood')).toBe(8);
  bring('tenant 0', 9);
  seats.step();
  expect([numOf('flood'), numOf('tenant 0')]).toEqual([1, 7]);
  seats.step();
  expect([numOf('flood'), numOf('tenant 0')]).toEqual([1, 7]);
  // It had as much now, and a little more: each has half.
  seats.turns.charge(seats.running.at(-1)!, 2 * maxCredit + 100);
  for (let i = 0; i < 4; i++) seats.step();
  expect([numOf('flood'), numOf('tenant 0')]).toEqual([4, 4]);
  seats.step();
  expect([numOf('flood'), numOf('tenant 0')]).toEqual([4, 4]);
});

function sequenceOf(id: number, standing: Standing, numTokens: number): Sequence {
  return new Sequence({
    id,
    promptTokens: new Int32Array(numTokens),
    maxTotalTokens: 1_000,
    params: defaultSampling(),
    standing,
  });
}

function randomSequence(id: number, random: SeededRandom): Sequence {
  const tenant = random.below(5);
  const priority = random.pick([0, 0, 0, 0, 1, lowestPriority]);
  const standing = { tenant: `${tenant}`, weight: [1, 1, 2, 4, 0.5][tenant]!, priority };
  return sequenceOf(id, standing, random.pick([1, 5, 40]));
}

test('whatever comes, no seat is idle while one waits, none yields more than twice, and each begins within its bounds', () => {
  let numYields = 0;
  const most = { yields: 0, passedOver: 0, ofOthers: 0, idleSeats: 0 };
  for (let seed = 0; seed < numSchedules; seed++) {
    const random = seededRandom(seed);
    const seats = new Seats(random.from(1, 8));
    const where = `seed ${seed}`;
    const stepsLeft = new Map<Sequence, number>();
    /** By priority, since it waits: how many of others began. */
    const passes = new Map<number, number>();
    let nextId = 0;
    for (let step = 0; step < 600 || stepsLeft.size > 0; step++) {
      if (step > 20_000) throw new Error(`${where}: ${stepsLeft.size} do not end`);
      for (let i = step < 600 ? random.below(3) : 0; i > 0 && seats.waiting.length < 60; i--) {
        const sequence = randomSequence(nextId++, random);
        stepsLeft.set(sequence, random.from(1, 12));
        seats.add(sequence);
      }
      const began = seats.step();
      const numIdle = Math.min(seats.numSeats, stepsLeft.size) - seats.running.length;
      most.idleSeats = Math.max(most.idleSeats, numIdle);
      const waited = new Set([...began, ...seats.waiting].map(({ standing }) => standing.priority));
      for (const { standing } of began) {
        for (const priority of waited) {
          const count = priority === standing.priority ? 0 : (passes.get(priority) ?? 0) + 1;
          passes.set(priority, count);
          most.ofOthers = Math.max(most.ofOthers, count);
        }
      }
      for (const priority of [...passes.keys()]) if (!waited.has(priority)) passes.delete(priority);
      for (const { numYields, numPassedOver } of stepsLeft.keys()) {
        most.yields = Math.max(most.yields, numYields);
        most.passedOver = Math.max(most.passedOver, numPassedOver);
      }
      for (const sequence of [...seats.running]) {
        const left = stepsLeft.get(sequence)! - 1;
        stepsLeft.set(sequence, left);
        if (left > 0) continue;
        stepsLeft.delete(sequence);
        seats.running.splice(seats.running.indexOf(sequence), 1);
        seats.turns.end(sequence, false);
      }
    }
    numYields += seats.numYields;
  }
  expect(most.idleSeats).toBe(0);
  expect(most.ofOthers).toBeLessThanOrEqual(maxPassesOfBand);
  expect(most.passedOver).toBeLessThanOrEqual(maxPassedOver);
  expect(most.yields).toBe(maxYields);
  // Otherwise the loads say nothing.
  expect(numYields).toBeGreaterThan(numSchedules);
  expect(most.passedOver).toBeGreaterThan(0);
  expect(most.ofOthers).toBeGreaterThan(0);
});
