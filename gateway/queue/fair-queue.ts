// In what order requests that wait are sent, and who goes when too many wait. Times and costs are handed in.
//
//   1. Bands, one a priority: the highest goes first, but a band that waits rises by one for every `ageingMs` in which none of
//      it was sent. When it has caught up with a higher one it sends a request, and falls back. So a band is sent at least one
//      request every (highest band that waits − its own) · ageingMs, and at the next place that comes free in an engine that it can
//      go to; of several bands that are due the one that waits for its due longest. Only what engines have room for ages a band.
//   2. In a band, tenants: the smallest virtual counter first. A counter grows by what was sent, over the tenant's weight:
//      estimated then, put right when it is known. A tenant that comes is lifted to where the band is, so that nobody saves up.
//      Between two requests of a tenant that waits, another gets at most 2·C·(its weight / the tenant's + 1), with C the largest cost.
//   3. Of a tenant, adapters: the same once more.
//   4. Of an adapter, those that came in the same second by their expected length, the shortest first; otherwise in turn.
//
// Sources: virtual token counters, Sheng et al., OSDI '24; the lift is start-time fair queueing's, Goyal et al., 1996.

import { type Ask, expectedCost } from './ask.ts';

export type Entry<W> = {
  readonly ask: Ask;
  readonly waiter: W;
  /** Of all that came, the how manieth. */
  readonly turn: number;
};

/** What was charged for a request that was sent, until it is known what it cost. */
export type Charge = { readonly ask: Ask; readonly cost: number };

/** A counter, and the time on it of those below. */
type Counted = {
  counter: number;
  /** When it was last sent one, in turns: of equals the one that waits longer is next. */
  lastTurn: number;
  numWaiting: number;
  numSent: number;
};

type Line<W> = Counted & { entries: Entry<W>[] };
type Voice<W> = Counted & {
  weight: number;
  /** Of those that wait, what they cost. */
  work: number;
  lines: Map<string, Line<W>>;
  /** Where its adapters are. */
  virtual: number;
};
type Band<W> = {
  priority: number;
  voices: Map<string, Voice<W>>;
  virtual: number;
  work: number;
  numWaiting: number;
  /** Since when somebody waits in it. */
  sinceMs: number;
  /** Adapter -> how many wait for it, and when one was sent last. */
  adapters: Map<string, { numWaiting: number; sentMs: number }>;
};

/** Within it the shorter request goes first. */
const equalMs = 1_000;

export class FairQueue<W> {
  readonly #ageingMs: number;
  readonly #bands = new Map<number, Band<W>>();
  readonly #numByTenant = new Map<string, number>();
  #size = 0;
  #turn = 0;

  constructor(ageingMs: number) {
    this.#ageingMs = ageingMs;
  }

  get size(): number {
    return this.#size;
  }

  numOf(tenant: string): number {
    return this.#numByTenant.get(tenant) ?? 0;
  }

  /** Those that wait, by tenant. */
  get numByTenant(): ReadonlyMap<string, number> {
    return this.#numByTenant;
  }

  /** How far apart the counters of tenants are that wait beside each other, in tokens; 0 when fewer than two wait. */
  get lag(): number {
    let most = 0;
    for (const band of this.#bands.values()) {
      const counters = waitingOf(band.voices).map(({ counter }) => counter);
      if (counters.length > 1) most = Math.max(most, Math.max(...counters) - Math.min(...counters));
    }
    return most;
  }

  /** All that wait, in no order that means anything. They may be removed meanwhile. */
  entries(): Entry<W>[] {
    const all: Entry<W>[] = [];
    for (const { voices } of this.#bands.values())
      for (const { lines } of voices.values()) for (const { entries } of lines.values()) all.push(...entries);
    return all;
  }

  add(ask: Ask, waiter: W, nowMs: number): Entry<W> {
    const { band, voice, line } = this.#placeOf(ask);
    if (band.numWaiting === 0) band.sinceMs = nowMs;
    lift(voice, band.virtual);
    lift(line, voice.virtual);
    const entry = { ask, waiter, turn: ++this.#turn };
    line.entries.splice(placeIn(line.entries, entry), 0, entry);
    this.#count(ask, 1);
    return entry;
  }

  /** It does not wait any more, and is not sent. */
  remove(entry: Entry<W>): void {
    const { line } = this.#placeOf(entry.ask);
    const index = line.entries.indexOf(entry);
    if (index < 0) return;
    line.entries.splice(index, 1);
    this.#count(entry.ask, -1);
    this.#forget(entry.ask);
  }

  /**
   * Offers those that wait in their order until `take` takes one, which has left the queue then and is charged.
   *
   * @param hasRoom  whether some engine that has this adapter could take one more
   */
  sendNext(
    nowMs: number,
    hasRoom: (adapter: string) => boolean,
    take: (entry: Entry<W>) => boolean,
  ): Charge | null {
    for (const entry of this.#inOrder(nowMs, hasRoom)) {
      if (!take(entry)) continue;
      const charge = this.charge(entry.ask, nowMs);
      this.remove(entry);
      return charge;
    }
    return null;
  }

  /** The request is sent. Called by itself for one that need not wait. */
  charge(ask: Ask, nowMs: number): Charge {
    const { band, voice, line } = this.#placeOf(ask);
    lift(voice, band.virtual);
    lift(line, voice.virtual);
    band.virtual = Math.max(band.virtual, voice.counter);
    voice.virtual = Math.max(voice.virtual, line.counter);
    const adapter = band.adapters.get(ask.adapter);
    if (adapter) adapter.sentMs = nowMs;
    const cost = expectedCost(ask);
    voice.counter += cost / voice.weight;
    line.counter += cost;
    voice.lastTurn = line.lastTurn = ++this.#turn;
    voice.numSent++;
    line.numSent++;
    return { ask, cost };
  }

  /** The request has ended. @param cost  what it cost in truth; null: nobody knows, the guess stands */
  settle(charge: Charge, cost: number | null): void {
    const { voice, line } = this.#placeOf(charge.ask);
    const error = cost === null ? 0 : cost - charge.cost;
    voice.counter += error / voice.weight;
    line.counter += error;
    voice.numSent--;
    line.numSent--;
    this.#forget(charge.ask);
  }

  /**
   * Who makes room for one more: of the lowest band the tenant whose waiting work is most over its weight, and of that the one that
   * came last. Null: the new one itself.
   */
  victimFor(ask: Ask): Entry<W> | null {
    const lowest = Math.min(...waitingOf(this.#bands).map(({ priority }) => priority));
    if (ask.priority < lowest) return null;
    const band = this.#bands.get(lowest)!;
    const overShare = (voice: Voice<W>, more: number) => (voice.work + more) / voice.weight;
    const isSameBand = ask.priority === lowest;
    const own = band.voices.get(ask.tenant);
    const ownShare = own
      ? overShare(own, isSameBand ? expectedCost(ask) : 0)
      : expectedCost(ask) / ask.weight;
    let worst: Voice<W> | null = null;
    let most = isSameBand ? ownShare : Number.NEGATIVE_INFINITY;
    for (const [tenant, voice] of band.voices) {
      if (voice.numWaiting === 0 || (isSameBand && tenant === ask.tenant)) continue;
      const share = overShare(voice, 0);
      if (share > most) [worst, most] = [voice, share];
    }
    if (worst === null) return null;
    let newest: Entry<W> | null = null;
    for (const { entries } of worst.lines.values())
      for (const entry of entries) if (newest === null || entry.turn > newest.turn) newest = entry;
    return newest;
  }

  /**
   * What is sent before the request would be, as it stands, and itself: all of higher bands, and of its own what each tenant's share
   * is while the request's tenant gets to it.
   */
  workAhead(ask: Ask): number {
    const cost = expectedCost(ask);
    let ahead = cost;
    for (const band of this.#bands.values()) if (band.priority > ask.priority) ahead += band.work;
    const band = this.#bands.get(ask.priority);
    if (band === undefined) return ahead;
    const ownWork = band.voices.get(ask.tenant)?.work ?? 0;
    for (const [tenant, { work, weight }] of band.voices)
      ahead += tenant === ask.tenant ? work : Math.min(work, ((ownWork + cost) * weight) / ask.weight);
    return ahead;
  }

  *#inOrder(nowMs: number, hasRoom: (adapter: string) => boolean): Generator<Entry<W>> {
    const due: { band: Band<W>; rank: number; open: Set<string> }[] = [];
    for (const band of waitingOf(this.#bands)) {
      const open = new Set([...band.adapters.keys()].filter(hasRoom));
      if (open.size === 0) continue;
      let { sinceMs } = band;
      for (const adapter of open) sinceMs = Math.max(sinceMs, band.adapters.get(adapter)!.sentMs);
      due.push({ band, rank: band.priority + Math.floor((nowMs - sinceMs) / this.#ageingMs), open });
    }
    due.sort((a, b) => b.rank - a.rank || a.band.priority - b.band.priority);
    for (const { band, open } of due) {
      for (const voice of waitingOf(band.voices).sort(byCounter)) {
        for (const [, line] of [...voice.lines].filter(isOpen(open)).sort(([, a], [, b]) => byCounter(a, b)))
          yield* [...line.entries];
      }
    }
  }

  #placeOf({ tenant, weight, priority, adapter }: Ask) {
    let band = this.#bands.get(priority);
    if (band === undefined) {
      band = {
        priority,
        voices: new Map(),
        virtual: 0,
        work: 0,
        numWaiting: 0,
        sinceMs: 0,
        adapters: new Map(),
      };
      this.#bands.set(priority, band);
    }
    let voice = band.voices.get(tenant);
    if (voice === undefined) {
      voice = { ...counted(band.virtual), weight, work: 0, lines: new Map(), virtual: 0 };
      band.voices.set(tenant, voice);
    }
    voice.weight = weight;
    let line = voice.lines.get(adapter);
    if (line === undefined) {
      line = { ...counted(voice.virtual), entries: [] };
      voice.lines.set(adapter, line);
    }
    return { band, voice, line };
  }

  #count(ask: Ask, by: 1 | -1): void {
    const { band, voice, line } = this.#placeOf(ask);
    const cost = by * expectedCost(ask);
    this.#size += by;
    band.numWaiting += by;
    voice.numWaiting += by;
    line.numWaiting += by;
    const adapter = band.adapters.get(ask.adapter) ?? { numWaiting: 0, sentMs: Number.NEGATIVE_INFINITY };
    adapter.numWaiting += by;
    if (adapter.numWaiting === 0) band.adapters.delete(ask.adapter);
    else band.adapters.set(ask.adapter, adapter);
    band.work += cost;
    voice.work += cost;
    const count = this.numOf(ask.tenant) + by;
    if (count === 0) this.#numByTenant.delete(ask.tenant);
    else this.#numByTenant.set(ask.tenant, count);
  }

  /** Drops counters that a newcomer would have as well: what is left is bounded by the tenants and adapters that exist. */
  #forget(ask: Ask): void {
    const { band, voice, line } = this.#placeOf(ask);
    if (isIdle(line) && line.counter <= voice.virtual) voice.lines.delete(ask.adapter);
    if (isIdle(voice) && voice.counter <= band.virtual) band.voices.delete(ask.tenant);
  }
}

function counted(counter: number): Counted {
  return { counter, lastTurn: 0, numWaiting: 0, numSent: 0 };
}

function lift(counted: Counted, virtual: number): void {
  if (counted.numWaiting === 0) counted.counter = Math.max(counted.counter, virtual);
}

function isIdle({ numWaiting, numSent }: Counted): boolean {
  return numWaiting === 0 && numSent === 0;
}

function waitingOf<T extends { numWaiting: number }>(map: ReadonlyMap<unknown, T>): T[] {
  return [...map.values()].filter(({ numWaiting }) => numWaiting > 0);
}

function isOpen(open: ReadonlySet<string>) {
  return ([adapter, { numWaiting }]: [string, Counted]) => numWaiting > 0 && open.has(adapter);
}

function byCounter(a: Counted, b: Counted): number {
  return a.counter - b.counter || a.lastTurn - b.lastTurn;
}

/** Where an entry belongs among those that wait for the same adapter. */
function placeIn<W>(entries: readonly Entry<W>[], { ask }: Entry<W>): number {
  const second = Math.floor(ask.arrivedMs / equalMs);
  let index = entries.length;
  for (; index > 0; index--) {
    const before = entries[index - 1]!.ask;
    const secondBefore = Math.floor(before.arrivedMs / equalMs);
    if (secondBefore < second || (secondBefore === second && before.outputTokens <= ask.outputTokens)) break;
  }
  return index;
}
