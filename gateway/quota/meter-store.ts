// Where meters are kept. A gateway alone has them in its memory (here); several share them in Redis (redis-meters.ts).

import {
  newMeters,
  putLease,
  type Settlement,
  settle,
  sweep,
  type Take,
  type Taking,
  take,
} from './meter.ts';

/** `settle` gives back to where it was taken. */
export type Taken = Taking & { settle(settlements: readonly Settlement[]): void };

export interface MeterStore {
  take(takes: readonly Take[]): Taken | Promise<Taken>;
  /** Refuses nobody from now on for want of an answer, and leaves nothing behind that keeps a process alive. */
  close(): Promise<void>;
}

/** More meters than this are looked through for such as say nothing any more. */
const maxKept = 10_000;

export class LocalMeters implements MeterStore {
  readonly #meters = newMeters();
  readonly #nowUs: () => number;
  #sweepAt = maxKept;

  /** @param nowUs  a clock that never goes back */
  constructor(nowUs: () => number = monotonicUs) {
    this.#nowUs = nowUs;
  }

  take(takes: readonly Take[]): Taken {
    const taking = take(this.#meters, this.#nowUs(), takes.map(withoutEnd));
    if (this.#meters.fullAtUs.size > this.#sweepAt) {
      sweep(this.#meters, this.#nowUs());
      this.#sweepAt = Math.max(maxKept, 2 * this.#meters.fullAtUs.size);
    }
    return {
      ...taking,
      settle: (settlements) => this.settle(settlements),
    };
  }

  /** Takes over what was taken elsewhere, and reads there as it reads here from now on. */
  mirror(takes: readonly Take[], { isTaken, readings }: Taking): void {
    const nowUs = this.#nowUs();
    for (const [index, each] of takes.entries()) {
      if (each.kind === 'rate') this.#meters.fullAtUs.set(each.key, nowUs + readings[index]!);
      else if (isTaken) putLease(this.#meters, each.key, each.id, Number.POSITIVE_INFINITY);
    }
  }

  settle(settlements: readonly Settlement[]): void {
    settle(this.#meters, this.#nowUs(), settlements);
  }

  async close(): Promise<void> {}
}

/** Who holds a lease here ends with the meter. */
function withoutEnd(each: Take): Take {
  return each.kind === 'lease' ? { ...each, ttlUs: Number.POSITIVE_INFINITY } : each;
}

function monotonicUs(): number {
  return Math.floor(performance.now() * 1000);
}
