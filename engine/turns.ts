/**
 * In what order sequences that wait begin to run. It keeps the books that fairness needs, and decides nothing about pages or seats.
 *
 *   1. Priorities, a band each: the highest first, but a band that waits rises by one for every `passesPerRise` sequences of others that
 *      begin meanwhile. When one of its own begins it falls back. Of bands that are level the lower one has waited longer.
 *   2. In a band, tenants: the smallest counter of tokens over weight. A token of a prompt that is computed counts one, one that is
 *      drawn `outputWeight`, as it comes. A tenant that comes to wait is lifted to `maxCredit` below what those have that begin: who had little
 *      lately is first with what it brings at once, and nobody saves up more.
 *   3. Of a tenant, adapters: the same once more, without weights. Of an adapter, in turn; what was preempted stands where it stood.
 *
 * Bounds, which tests/engine/turns.test.ts holds. While one of a band waits, at most `maxPassesOfBand` of other bands begin between two
 * of its own. Of its own band, at most `maxPassedOver` that came later begin before a sequence; then it is next of its band, behind such
 * ones that came before it.
 *
 * Source: virtual token counters, Sheng et al., OSDI '24. The gateway's queue has the same order (gateway/queue/fair-queue.ts); here
 * what a sequence costs is counted and not guessed, and what passes is counted in place of time, so that the same load has the same order.
 */
import { highestPriority, lowestPriority } from './protocol.ts';
import type { Sequence } from './sequence.ts';

/** A drawn token takes a step of its own, and a prompt's share one: it costs as two. */
export const outputWeight = 2;
export const passesPerRise = 8;
/** It rises over all others, and then each of them passes it once more at most. */
export const maxPassesOfBand =
  passesPerRise * (highestPriority - lowestPriority) + (highestPriority - lowestPriority);
export const maxPassedOver = 256;
/** Tokens, by weight: what some requests cost, and at most what a newcomer gets before others have their turns again. */
export const maxCredit = 1024;
/** So many tokens of others after it had something here a tenant counts as one that was here lately. */
const recentTokens = 4 * maxCredit;
/** What one of two equals may get before the other in turns. */
const notableCredit = maxCredit / 4;
/** Counters that are kept of those that have nothing here. */
const maxAccounts = 4096;

/** Each costs a look at all that wait, and few begin in one step. */
const maxOrdered = 16;

interface Account {
  readonly key: string;
  counter: number;
  /** When one of it began last, in turns: of equals the one that waits longer is next. */
  lastTurn: number;
  numWaiting: number;
  /** Waiting and running. */
  numLive: number;
  /** While an order is made: the counter and the turn as they would be. */
  planned: number;
  plannedTurn: number;
}

interface Tenant extends Account {
  weight: number;
  /** Where the next that comes would stand in line. */
  lineEnd: number;
  adapters: Ledger<Account>;
}

interface Band {
  priority: number;
  tenants: Ledger<Tenant>;
  numWaiting: number;
  /** Sequences of others that began since one of its own did, while it waited. */
  numPasses: number;
  plannedPasses: number;
}

/** Where a sequence is counted. */
export interface Accounts {
  readonly band: Band;
  readonly tenant: Tenant;
  readonly adapter: Account;
}

/** Accounts that are compared with each other. */
class Ledger<A extends Account> {
  readonly #accounts = new Map<string, A>();
  readonly #make: (key: string) => A;
  /** The most that one had whose sequence began. Of all that wait about the least, as those begin first; but credit does not lower it. */
  #virtual = 0;

  constructor(make: (key: string) => A) {
    this.#make = make;
  }

  get size(): number {
    return this.#accounts.size;
  }

  open(key: string): A {
    let account = this.#accounts.get(key);
    if (account === undefined) {
      account = this.#make(key);
      this.#accounts.set(key, account);
    }
    return account;
  }

  wait(account: A): void {
    if (account.numWaiting === 0) account.counter = Math.max(account.counter, this.#virtual - maxCredit);
    account.numWaiting++;
  }

  begin(account: A, turn: number): void {
    account.numWaiting--;
    account.lastTurn = turn;
    this.#virtual = Math.max(this.#virtual, account.counter);
  }

  /** Those that have something here, or had lately; others are forgotten, as newcomers have no more. */
  *recent(): Generator<A> {
    const least = this.#virtual - recentTokens;
    for (const [key, account] of this.#accounts) {
      if (account.numLive > 0 || account.counter > least) yield account;
      else this.#accounts.delete(key);
    }
  }

  /** Nothing is left of it. Its counter stays for a while: it may be above what a newcomer would have. */
  rest(account: A): void {
    this.#accounts.delete(account.key);
    if (account.counter > this.#virtual - recentTokens) this.#accounts.set(account.key, account);
    if (this.#accounts.size <= maxAccounts) return;
    for (const [key, { numLive }] of this.#accounts) {
      if (numLive > 0) continue;
      this.#accounts.delete(key);
      return;
    }
  }
}

export class Turns {
  readonly #bands = new Map<number, Band>();
  #turn = 0;

  /** Tenants that are counted, over all bands. */
  get numTenants(): number {
    let count = 0;
    for (const { tenants } of this.#bands.values()) count += tenants.size;
    return count;
  }

  /** Of all tenants that are here, or were lately, without those that have the lowest priority alone. */
  get recentWeight(): number {
    const weights = new Map<string, number>();
    for (const { priority, tenants } of this.#bands.values()) {
      if (priority === lowestPriority) continue;
      for (const { key, weight } of tenants.recent()) weights.set(key, weight);
    }
    let sum = 0;
    for (const weight of weights.values()) sum += weight;
    return sum;
  }

  /** It comes to wait, for the first time or again. */
  wait(sequence: Sequence): void {
    const isNew = sequence.accounts === null;
    sequence.accounts ??= this.#open(sequence);
    const { band, tenant, adapter } = sequence.accounts;
    const isFirst = tenant.numWaiting === 0;
    band.tenants.wait(tenant);
    if (isNew) {
      sequence.lineTag = isFirst ? tenant.counter : Math.max(tenant.counter, tenant.lineEnd);
      tenant.lineEnd =
        sequence.lineTag + (sequence.numPendingTokens + outputWeight) / sequence.standing.weight;
    }
    tenant.adapters.wait(adapter);
    if (band.numWaiting++ === 0) band.numPasses = 0;
  }

  /**
   * The next `most` of `waiting`, or fewer, in order, if each of them begins and nothing else happens. Changes nothing.
   * @param waiting  in the order they came
   */
  order(waiting: readonly Sequence[], most: number): readonly Sequence[] {
    const first = waiting[0]?.accounts;
    if (most <= 0) return [];
    if (waiting.every(({ accounts }) => accounts!.adapter === first!.adapter)) return waiting.slice(0, most);
    const numOrdered = Math.min(most, maxOrdered);
    for (const band of this.#bands.values()) band.plannedPasses = band.numPasses;
    for (const { accounts } of waiting) {
      const { tenant, adapter } = accounts!;
      for (const account of [tenant, adapter]) {
        account.planned = account.counter;
        account.plannedTurn = account.lastTurn;
      }
    }
    const left = [...waiting];
    const order: Sequence[] = [];
    while (order.length < numOrdered && left.length > 0) {
      let next = 0;
      for (let i = 1; i < left.length; i++) if (goesBefore(left[i]!, left[next]!)) next = i;
      const [sequence] = left.splice(next, 1);
      this.#plan(sequence!, order.length);
      order.push(sequence!);
    }
    return order;
  }

  /**
   * All of `waiting` in the order in which what they lack is brought to the device: by priorities, in a band by what their tenants
   * had when they came and what those bring themselves, of a tenant as they came. That stays while they wait, so that
   * adapters do not take turns on the device before anybody runs.
   * @param waiting  in the order they came
   */
  line(waiting: readonly Sequence[]): readonly Sequence[] {
    const first = waiting[0]?.accounts;
    if (waiting.every(({ accounts }) => accounts!.tenant === first!.tenant)) return waiting;
    for (const band of this.#bands.values()) band.plannedPasses = band.numPasses;
    return waiting.toSorted((a, b) => {
      const [ofA, ofB] = [a.accounts!.band, b.accounts!.band];
      if (ofA !== ofB) return rankOf(ofB) - rankOf(ofA) || ofA.priority - ofB.priority;
      const [isDueA, isDueB] = [a.numPassedOver >= maxPassedOver, b.numPassedOver >= maxPassedOver];
      if (isDueA || isDueB) return Number(isDueB) - Number(isDueA);
      return a.lineTag - b.lineTag;
    });
  }

  #plan({ accounts, numPendingTokens, standing }: Sequence, index: number): void {
    const { band, tenant, adapter } = accounts!;
    for (const other of this.#bands.values()) if (other.numWaiting > 0) other.plannedPasses++;
    band.plannedPasses = 0;
    tenant.planned += numPendingTokens / standing.weight;
    adapter.planned += numPendingTokens;
    tenant.plannedTurn = adapter.plannedTurn = this.#turn + 1 + index;
  }

  /** It begins to run. @param waiting  all that wait, it among them, in the order they came */
  begin(sequence: Sequence, waiting: readonly Sequence[]): void {
    const { band, tenant, adapter } = sequence.accounts!;
    for (let i = 0; waiting[i] !== sequence; i++)
      if (waiting[i]!.accounts!.band === band) waiting[i]!.numPassedOver++;
    for (const other of this.#bands.values()) if (other.numWaiting > 0) other.numPasses++;
    band.numPasses = 0;
    band.numWaiting--;
    this.#turn++;
    band.tenants.begin(tenant, this.#turn);
    tenant.adapters.begin(adapter, this.#turn);
  }

  /** So many tokens, as they are weighed, are computed for it. */
  charge({ accounts, standing }: Sequence, numTokens: number): void {
    const { tenant, adapter } = accounts!;
    tenant.counter += numTokens / standing.weight;
    adapter.counter += numTokens;
  }

  /** It has ended and let go of all. @param wasWaiting  it did not run again */
  end({ accounts }: Sequence, wasWaiting: boolean): void {
    const { band, tenant, adapter } = accounts!;
    if (wasWaiting) {
      for (const account of [tenant, adapter]) account.numWaiting--;
      band.numWaiting--;
    }
    if (--adapter.numLive === 0) tenant.adapters.rest(adapter);
    if (--tenant.numLive === 0) band.tenants.rest(tenant);
  }

  #open({ standing, adapterKey }: Sequence): Accounts {
    const { priority } = standing;
    let band = this.#bands.get(priority);
    if (band === undefined) {
      const tenants = new Ledger<Tenant>((key) => ({
        ...account(key),
        weight: 1,
        lineEnd: 0,
        adapters: new Ledger(account),
      }));
      band = { priority, tenants, numWaiting: 0, numPasses: 0, plannedPasses: 0 };
      this.#bands.set(priority, band);
    }
    const tenant = band.tenants.open(standing.tenant);
    tenant.weight = standing.weight;
    const adapter = tenant.adapters.open(adapterKey);
    tenant.numLive++;
    adapter.numLive++;
    return { band, tenant, adapter };
  }
}

/** Its tenant got notably less lately than the other's, which is of the same priority. */
export function hasCredit({ accounts: own }: Sequence, { accounts: other }: Sequence): boolean {
  if (own === null || other === null || own.band !== other.band) return false;
  return own.tenant.counter + notableCredit < other.tenant.counter;
}

/** @param b  came earlier */
function goesBefore(a: Sequence, b: Sequence): boolean {
  const [ofA, ofB] = [a.accounts!, b.accounts!];
  if (ofA.band !== ofB.band) {
    const [rankA, rankB] = [rankOf(ofA.band), rankOf(ofB.band)];
    return rankA === rankB ? ofA.band.priority < ofB.band.priority : rankA > rankB;
  }
  const [isDueA, isDueB] = [a.numPassedOver >= maxPassedOver, b.numPassedOver >= maxPassedOver];
  if (isDueA || isDueB) return !isDueB;
  if (ofA.tenant !== ofB.tenant) return isBehind(ofA.tenant, ofB.tenant);
  return ofA.adapter !== ofB.adapter && isBehind(ofA.adapter, ofB.adapter);
}

function rankOf({ priority, plannedPasses }: Band): number {
  return priority + Math.floor(plannedPasses / passesPerRise);
}

function isBehind(a: Account, b: Account): boolean {
  return a.planned === b.planned ? a.plannedTurn < b.plannedTurn : a.planned < b.planned;
}

function account(key: string): Account {
  return { key, counter: 0, lastTurn: 0, numWaiting: 0, numLive: 0, planned: 0, plannedTurn: 0 };
}
