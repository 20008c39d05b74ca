// What each caller's requests did lately, for the console: what is under way, and sums of what ended, second by second for
// a minute. Bounded by the minute and by the names that resources and engines say: a name that a client made up is not kept.

import { Bag } from '../bag.ts';

/** A request as the gateway's log knows it. Filled in as it happens. */
export type TrafficFacts = {
  tenant?: string;
  /** As the client named it; absent for a name that means nothing. */
  model?: string;
  /** The engine that it was sent to; absent while it waits. */
  engine?: string;
};

export type Ended = { status: number; ttfbMs?: number; completionTokens: number };

export type Sums = {
  requests: number;
  errors: number;
  completionTokens: number;
  ttfbMs: number;
  timed: number;
};

export type RecentTraffic = {
  /** Of this caller, now. */
  inFlight: number;
  /** Of these, those that wait for an engine. */
  waiting: number;
  /** Requests that ended in each of the last seconds, the newest last; the second under way is left out. */
  requestsBySecond: number[];
  completionTokensBySecond: number[];
  /** Model -> sums over the last `windowS` seconds. */
  models: Map<string, Sums>;
};

const keptS = 60;
/** Of the sums by model: long enough to be steady, short enough to be now. */
export const windowS = 10;

type Second = { atS: number; byCaller: Map<string | null, Map<string, Sums>> };

export class Traffic {
  readonly #live = new Bag<TrafficFacts>();
  readonly #seconds: Second[] = Array.from({ length: keptS + 1 }, () => ({ atS: -1, byCaller: new Map() }));

  /** @returns to be called when it has ended */
  begin(facts: TrafficFacts): (ended: Ended, nowMs: number) => void {
    const remove = this.#live.add(facts);
    return (ended, nowMs) => {
      remove();
      this.#noteEnd(facts, ended, nowMs);
    };
  }

  #noteEnd(facts: TrafficFacts, ended: Ended, nowMs: number): void {
    if (facts.model === undefined) return;
    const atS = Math.floor(nowMs / 1000);
    const second = this.#seconds[atS % this.#seconds.length]!;
    if (second.atS !== atS) {
      second.atS = atS;
      second.byCaller = new Map();
    }
    const caller = facts.tenant ?? null;
    const models = second.byCaller.get(caller) ?? new Map<string, Sums>();
    second.byCaller.set(caller, models);
    const sums = models.get(facts.model) ?? noSums();
    models.set(facts.model, sums);
    sums.requests += 1;
    if (ended.status >= 500) sums.errors += 1;
    sums.completionTokens += ended.completionTokens;
    if (ended.ttfbMs !== undefined) {
      sums.ttfbMs += ended.ttfbMs;
      sums.timed += 1;
    }
  }

  /** Requests under way, by tenant; those of whom none is are not there. */
  inFlightByTenant(): Map<string, number> {
    const inFlight = new Map<string, number>();
    for (const { tenant, model } of this.#live.values()) {
      if (tenant !== undefined && model !== undefined) inFlight.set(tenant, (inFlight.get(tenant) ?? 0) + 1);
    }
    return inFlight;
  }

  /** @param caller  null where nobody needs a key */
  of(caller: string | null, nowMs: number): RecentTraffic {
    const live = this.#live
      .values()
      .filter(({ tenant, model }) => model !== undefined && (tenant ?? null) === caller);
    const lastS = Math.floor(nowMs / 1000) - 1;
    const models = new Map<string, Sums>();
    const requestsBySecond: number[] = [];
    const completionTokensBySecond: number[] = [];
    for (let atS = lastS - keptS + 1; atS <= lastS; atS += 1) {
      const second =
        this.#seconds[((atS % this.#seconds.length) + this.#seconds.length) % this.#seconds.length]!;
      const found = second.atS === atS ? second.byCaller.get(caller) : undefined;
      const total = noSums();
      for (const [model, sums] of found ?? []) {
        add(total, sums);
        if (atS <= lastS - windowS) continue;
        const ofModel = models.get(model) ?? noSums();
        models.set(model, ofModel);
        add(ofModel, sums);
      }
      requestsBySecond.push(total.requests);
      completionTokensBySecond.push(total.completionTokens);
    }
    return {
      inFlight: live.length,
      waiting: live.filter(({ engine }) => engine === undefined).length,
      requestsBySecond,
      completionTokensBySecond,
      models,
    };
  }
}

function noSums(): Sums {
  return { requests: 0, errors: 0, completionTokens: 0, ttfbMs: 0, timed: 0 };
}

function add(to: Sums, from: Sums): void {
  for (const name of Object.keys(to) as (keyof Sums)[]) to[name] += from[name];
}
