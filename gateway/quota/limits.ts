// How much a caller may use: plain data, from a Tenant or from a file, and what a request takes of it.

import { GatewayError } from '../errors.ts';
import { hasRoom, type Settlement, type Take, type Taking, windowUs } from './meter.ts';

export type Limits = {
  requestsPerMinute?: number;
  /** Of prompts and of answers. */
  tokensPerMinute?: number;
  /** Requests at a time, those that wait for an engine among them. */
  concurrency?: number;
};

/** Who is limited: a tenant, or one of its keys beside it. */
export type Scope = { of: 'tenant' | 'key'; id: string; limits: Limits };

/** A limit as one request meets it. */
export type Metered = { scope: Scope; name: keyof Limits; limit: number; take: Take };

/** How long a lease holds without being renewed: so long are places of a killed gateway taken. */
export const leaseTtlUs = 15_000_000;

/**
 * What a request takes. Of tokens at most a whole minute's: a request whose estimate is larger than the limit enters when
 * nothing else was used, and owes what it really cost beyond it.
 *
 * @param scopes    of one tenant
 * @param leaseId   of this request
 */
export function meteredOf(
  tenant: string,
  scopes: readonly Scope[],
  tokens: number,
  leaseId: string,
): Metered[] {
  return scopes.flatMap((scope) => {
    const prefix = `motet:quota:${tenant}:${scope.of === 'key' ? `key:${scope.id}:` : ''}`;
    const { requestsPerMinute, tokensPerMinute, concurrency } = scope.limits;
    const metered: Metered[] = [];
    const rate = (name: keyof Limits, limit: number, amount: number) => {
      const costUs = Math.min(costOf(amount, limit), windowUs);
      metered.push({ scope, name, limit, take: { kind: 'rate', key: prefix + name, costUs } });
    };
    if (requestsPerMinute !== undefined) rate('requestsPerMinute', requestsPerMinute, 1);
    if (tokensPerMinute !== undefined) rate('tokensPerMinute', tokensPerMinute, tokens);
    if (concurrency !== undefined) {
      const key = `${prefix}concurrency`;
      const take: Take = { kind: 'lease', key, limit: concurrency, id: leaseId, ttlUs: leaseTtlUs };
      metered.push({ scope, name: 'concurrency', limit: concurrency, take });
    }
    return metered;
  });
}

/** @param tokens  that the request really cost; null: as estimated */
export function settlementsOf(metered: readonly Metered[], tokens: number | null): Settlement[] {
  const settlements: Settlement[] = [];
  for (const { name, limit, take } of metered) {
    if (take.kind === 'lease') settlements.push({ kind: 'lease', key: take.key, id: take.id });
    else if (name === 'tokensPerMinute' && tokens !== null) {
      const addUs = costOf(tokens, limit) - take.costUs;
      if (addUs !== 0) settlements.push({ kind: 'rate', key: take.key, addUs });
    }
  }
  return settlements;
}

/** What is left of a limit, in its own unit. */
export function remainingOf({ limit, take }: Metered, reading: number): number {
  if (take.kind === 'lease') return Math.max(limit - reading, 0);
  return Math.max(Math.floor(((windowUs - reading) * limit) / windowUs), 0);
}

/** The refusal, with the limit that is waited for longest; null when the taking was not refused. */
export function refusalOf(
  metered: readonly Metered[],
  { isTaken, readings }: Taking,
): { error: GatewayError; by: Metered } | null {
  if (isTaken) return null;
  let by: Metered | undefined;
  let waitS = 0;
  for (const [index, each] of metered.entries()) {
    const reading = readings[index]!;
    if (hasRoom(each.take, reading)) continue;
    const ownWaitS = waitSecondsOf(each.take, reading);
    if (ownWaitS <= waitS) continue;
    by = each;
    waitS = ownWaitS;
  }
  const whose = by!.scope.of === 'key' ? 'this key' : 'this tenant';
  const message = `${whose} may use ${by!.limit} ${units[by!.name]}; retry in ${waitS} s`;
  return { error: new GatewayError('rate_limit_exceeded', message, { retryAfterS: waitS }), by: by! };
}

const units: Record<keyof Limits, string> = {
  requestsPerMinute: 'requests a minute',
  tokensPerMinute: 'tokens a minute',
  concurrency: 'requests at a time',
};

/** A place of another request may come back at any time. */
function waitSecondsOf(take: Take, reading: number): number {
  return take.kind === 'lease' ? 1 : Math.max(Math.ceil((reading + take.costUs - windowUs) / 1e6), 1);
}

/** Rounded down, or a whole minute's worth in single requests would not fit into a minute. */
function costOf(amount: number, limit: number): number {
  return Math.floor((amount * windowUs) / limit);
}
