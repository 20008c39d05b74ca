// Where meters are kept. In the memory of a gateway (here), which then has its share of every limit: the limit divided by the
// gateways that there are. Or in Redis for all of them (redis-meters.ts).

import {
  newMeters,
  putLease,
  type Settlement,
  settle,
  sweep,
  type Take,
  type Taking,
  take,
  windowUs,
} from './meter.ts';

/** `settle` gives back to where it was taken. */
export type Taken = Taking & { settle(settlements: readonly Settlement[]): void };

export interface MeterStore {
  take(takes: readonly Take[]): Taken | Promise<Taken>;
  close(): Promise<void>;
}

/** More meters than this are looked through for such as say nothing any more. */
const maxKept = 10_000;

export class LocalMeters implements MeterStore {
  /** That share the limits. */
  numGateways: number;
  readonly #meters = newMeters();
  readonly #nowUs: () => number;
  #sweepAt = maxKept;

  /** @param nowUs  a clock that never goes back */
  constructor(numGateways: number, nowUs: () => number = monotonicUs) {
    this.numGateways = numGateways;
    this.#nowUs = nowUs;
  }

  take(takes: readonly Take[]): Taken {
    const { numGateways } = this;
    const shares = takes.map((each) => shareOf(each, numGateways));
    const taking = take(this.#meters, this.#nowUs(), shares);
    if (this.#meters.fullAtUs.size > this.#sweepAt) {
      sweep(this.#meters, this.#nowUs());
      this.#sweepAt = Math.max(maxKept, 2 * this.#meters.fullAtUs.size);
    }
    return {
      ...taking,
      settle: (settlements) =>
        this.settle(settlements.map((each) => settledShare(each, takes, shares, numGateways))),
    };
  }

  /** Takes over what was taken elsewhere, and reads from now on as it reads there. */
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

/** Every cost weighs as much more as there are gateways. A lease has no end: who holds it ends with the meter. */
export function shareOf(each: Take, numGateways: number): Take {
  return each.kind === 'rate'
    ? { ...each, costUs: Math.min(each.costUs * numGateways, windowUs) }
    : {
        ...each,
        limit: Math.max(Math.floor(each.limit / numGateways), 1),
        ttlUs: Number.POSITIVE_INFINITY,
      };
}

/** What is settled of a share: the true cost, as much heavier as the share's was. */
function settledShare(
  each: Settlement,
  takes: readonly Take[],
  shares: readonly Take[],
  numGateways: number,
): Settlement {
  if (each.kind === 'lease' || numGateways === 1) return each;
  const index = takes.findIndex(({ key }) => key === each.key);
  const costOf = (list: readonly Take[]) => (list[index] as Extract<Take, { kind: 'rate' }>).costUs;
  return { ...each, addUs: (costOf(takes) + each.addUs) * numGateways - costOf(shares) };
}

function monotonicUs(): number {
  return Math.floor(performance.now() * 1000);
}
