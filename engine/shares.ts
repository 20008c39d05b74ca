/**
 * What of the seats is fair to whom: max-min by weights. Who wants less than its share has all it wants, and what it leaves is shared
 * by the others, so what is fair changes as tenants come and go. Pure; what waits or runs at the lowest priority is not counted, since
 * it gives way to all others anyway.
 *
 * A tenant is below its share while one more seat would begin within it, and over it when it would have its share with one seat less.
 * None is both, and none becomes over by what it was given for being below: seats do not go to and fro.
 *
 * That is of now. Who asks seldom may ask for several at once, and by its share of now would wait for one who asks for all, always: so one
 * that got notably less lately (turns.ts, hasCredit) gets seats beyond its share of now, down to what the other would have if all that
 * were here lately were here now.
 */
import { lowestPriority } from './protocol.ts';
import type { Sequence } from './sequence.ts';

export interface Claim {
  weight: number;
  numRunning: number;
  numWaiting: number;
}

/** By tenant. */
export type Claims = Map<string, Claim>;

/** Sums of shares are not exact. */
const tolerance = 1e-9;

export function claimsOf(running: readonly Sequence[], waiting: readonly Sequence[]): Claims {
  const claims: Claims = new Map();
  for (const { standing, isFinished, isFull } of running)
    if (!isFinished && !isFull && standing.priority > lowestPriority) claimOf(claims, standing).numRunning++;
  for (const { standing } of waiting)
    if (standing.priority > lowestPriority) claimOf(claims, standing).numWaiting++;
  return claims;
}

/** Of a tenant that has none yet a new one is put in. */
export function claimOf(claims: Claims, { tenant, weight }: Sequence['standing']): Claim {
  let claim = claims.get(tenant);
  if (claim === undefined) {
    claim = { weight, numRunning: 0, numWaiting: 0 };
    claims.set(tenant, claim);
  }
  return claim;
}

/** Seats for a weight of 1 when `numSeats` are shared; Infinity: there are enough for all. */
export function fairLevel(claims: Claims, numSeats: number): number {
  const wants = [...claims.values()].map(({ weight, numRunning, numWaiting }) => ({
    weight,
    count: numRunning + numWaiting,
  }));
  wants.sort((a, b) => a.count / a.weight - b.count / b.weight);
  let weightLeft = wants.reduce((sum, { weight }) => sum + weight, 0);
  let seatsLeft = numSeats;
  for (const { weight, count } of wants) {
    const level = seatsLeft / weightLeft;
    if (count > level * weight + tolerance) return level;
    seatsLeft -= count;
    weightLeft -= weight;
  }
  return Number.POSITIVE_INFINITY;
}

export function isBelow(claim: Claim | undefined, level: number): boolean {
  return claim !== undefined && claim.numRunning < level * claim.weight - tolerance;
}

/** What it has over its share, in shares of weight 1; 0 when it would have less than its share with one seat less. */
export function seatsOver(claim: Claim | undefined, level: number): number {
  if (claim === undefined) return 0;
  const { numRunning, weight } = claim;
  return numRunning - 1 < level * weight - tolerance ? 0 : numRunning / weight - level;
}

/** What is left to it when others that had less lately want all: its share among all tenants that are here or were lately. */
export function keepsShare(claim: Claim | undefined, numSeats: number, recentWeight: number): boolean {
  if (claim === undefined || recentWeight === 0) return false;
  return claim.numRunning - 1 >= (numSeats * claim.weight) / recentWeight - tolerance;
}

/** Seats that tenants may have to give, at most. */
export function numSeatsToGive(claims: Claims, numSeats: number, recentWeight: number): number {
  if (claims.size < 2) return 0;
  let count = 0;
  for (const { numRunning, weight } of claims.values())
    count += Math.max(0, Math.floor(numRunning - (numSeats * weight) / recentWeight + tolerance));
  return count;
}
