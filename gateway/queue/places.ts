// How many requests an engine is sent at a time, and which of them may go beyond that: those of a tenant that has fewer there than
// another, by weight. The engine takes a seat from the other for them, when that is fair (engine/shares.ts), and orders them by what
// tenants got; a queue here would only keep that from it.

import { lowestPriority } from '../../engine/protocol.ts';

/** Whose a request is. */
export type Claimant = { tenant: string; weight: number; priority: number };

/** What an engine was sent and has not ended. */
export type Sent = { inFlight: number; byTenant: ReadonlyMap<string, { weight: number; count: number }> };

/** @param maxSequences  what it says it can run at once; undefined: it does not say */
export type Bounds = { maxInFlightPerEngine: number; maxSequences: number | undefined };

/** What keeps an engine busy while answers travel. */
export function placesOf({ maxInFlightPerEngine, maxSequences }: Bounds): number {
  if (maxSequences === undefined) return maxInFlightPerEngine;
  return Math.min(maxInFlightPerEngine, maxSequences + Math.ceil(maxSequences / 4));
}

/** With those that only tenants below their shares may have: as many as could have others' seats. */
export function mostPlacesOf(bounds: Bounds): number {
  const { maxInFlightPerEngine, maxSequences = 0 } = bounds;
  return Math.min(maxInFlightPerEngine, placesOf(bounds) + maxSequences);
}

export function mayBeSent({ inFlight, byTenant }: Sent, bounds: Bounds, claimant: Claimant): boolean {
  if (inFlight < placesOf(bounds)) return true;
  if (inFlight >= mostPlacesOf(bounds) || claimant.priority <= lowestPriority) return false;
  const { tenant, weight } = claimant;
  const own = ((byTenant.get(tenant)?.count ?? 0) + 1) / weight;
  for (const other of byTenant.values()) if (own < other.count / other.weight) return true;
  return false;
}
