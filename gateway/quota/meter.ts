// What is left of a limit, as plain functions over plain data. meter.lua is the same in Redis, and a test holds the two
// together over random schedules.
//
// A rate is kept by GCRA (ITU-T I.371), the token bucket told in time: one number says when the bucket will be full again. Taking
// n of `limit` a minute moves it n/limit minutes on, and it may not be more than a minute ahead. It was chosen over a bucket with a
// level and a time, and over windows, since one number is changed by adding: an estimate is settled by adding the
// difference, two gateways may do so in any order, and when the time is past the number says nothing any more and may go.
// All of it is in whole microseconds, so that both languages come to the same.
//
// Concurrency is kept as leases, each with an end: a gateway that is killed renews none, and its places come back.

export const windowUs = 60_000_000;

/** One thing to take. `key` names the meter. */
export type Take =
  | { kind: 'rate'; key: string; costUs: number }
  /** Refused when `limit` leases are held. */
  | { kind: 'lease'; key: string; limit: number; id: string; ttlUs: number };

/** Rates: microseconds until the meter is full again. Leases: how many are held. After the taking, or as it is. */
export type Taking = { isTaken: boolean; readings: number[] };

/** What to give back or to take further, in the end. */
export type Settlement =
  | { kind: 'rate'; key: string; addUs: number }
  | { kind: 'lease'; key: string; id: string };

/** Meters that are not here are full. */
export type Meters = {
  /** When the meter will be full again. */
  fullAtUs: Map<string, number>;
  /** Lease -> its end. */
  leases: Map<string, Map<string, number>>;
};

export function newMeters(): Meters {
  return { fullAtUs: new Map(), leases: new Map() };
}

/** Takes all of it or, when one meter has not enough, nothing. */
export function take(meters: Meters, nowUs: number, takes: readonly Take[]): Taking {
  const readings = takes.map((each) => read(meters, nowUs, each));
  const isTaken = takes.every((each, index) => hasRoom(each, readings[index]!));
  if (!isTaken) return { isTaken, readings };
  for (const [index, each] of takes.entries()) {
    if (each.kind === 'rate') {
      readings[index]! += each.costUs;
      if (readings[index]! > 0) meters.fullAtUs.set(each.key, nowUs + readings[index]!);
    } else {
      readings[index]! += 1;
      putLease(meters, each.key, each.id, nowUs + each.ttlUs);
    }
  }
  return { isTaken, readings };
}

/** A meter that is past its minute owes: it was settled for more than it had. */
export function settle(meters: Meters, nowUs: number, settlements: readonly Settlement[]): void {
  for (const each of settlements) {
    if (each.kind === 'rate') {
      const { key, addUs } = each;
      const fullAtUs = meters.fullAtUs.get(key) ?? 0;
      const newUs = (addUs > 0 ? Math.max(fullAtUs, nowUs) : fullAtUs) + addUs;
      if (newUs > nowUs) meters.fullAtUs.set(key, newUs);
      else meters.fullAtUs.delete(key);
    } else {
      const leases = meters.leases.get(each.key);
      leases?.delete(each.id);
      if (leases?.size === 0) meters.leases.delete(each.key);
    }
  }
}

export function putLease({ leases }: Meters, key: string, id: string, endUs: number): void {
  const held = leases.get(key) ?? new Map<string, number>();
  leases.set(key, held.set(id, endUs));
}

/** Forgets what says nothing any more. */
export function sweep(meters: Meters, nowUs: number): void {
  for (const [key, fullAtUs] of meters.fullAtUs) if (fullAtUs <= nowUs) meters.fullAtUs.delete(key);
  for (const key of meters.leases.keys()) countLeases(meters, nowUs, key);
}

export function hasRoom(each: Take, reading: number): boolean {
  return each.kind === 'rate' ? reading + each.costUs <= windowUs : reading < each.limit;
}

function read(meters: Meters, nowUs: number, { kind, key }: Take): number {
  if (kind === 'lease') return countLeases(meters, nowUs, key);
  return Math.max((meters.fullAtUs.get(key) ?? 0) - nowUs, 0);
}

function countLeases({ leases }: Meters, nowUs: number, key: string): number {
  const held = leases.get(key);
  if (held === undefined) return 0;
  for (const [id, endUs] of held) if (endUs <= nowUs) held.delete(id);
  if (held.size === 0) leases.delete(key);
  return held.size;
}
