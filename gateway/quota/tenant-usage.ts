// What tenants use: the counters of the metrics are read once in a while, and what they grew by meanwhile is told by the minute. So
// no request pays for it, and what the metrics count is what everybody is told.

import { setImmediate, setTimeout as sleep } from 'node:timers/promises';
import type { Metrics } from '../metrics.ts';
import type { Limits } from './limits.ts';
import type { Used } from './quota.ts';

/** Of one tenant by one gateway. */
export type TenantUsage = {
  /** Answered by an engine; those whose client hung up are among them. */
  requestsPerMinute: number;
  /** Of prompts and of answers, those of batches among them. */
  tokensPerMinute: number;
  /** Under way now, those that wait for an engine among them. */
  inFlight: number;
  /** Why requests were refused -> how many a minute; what refused none is not there. */
  rejected: Record<string, number>;
};

/** Of one tenant since the start. */
export type Total = { requests: number; tokens: number; rejected: Record<string, number> };

/** One value of a counter, as prom-client has it. */
type Value = { value: number; labels: Partial<Record<string, string | number>> };

/** @param counters  values of the counters of their names */
export function totalsOf(counters: {
  requests: readonly Value[];
  tokens: readonly Value[];
  rateLimited: readonly Value[];
  shed: readonly Value[];
}): Map<string, Total> {
  const totals = new Map<string, Total>();
  const totalOf = ({ tenant }: Value['labels']): Total => {
    const total = totals.get(String(tenant)) ?? { requests: 0, tokens: 0, rejected: {} };
    totals.set(String(tenant), total);
    return total;
  };
  for (const { value, labels } of counters.requests) {
    if (labels.tenant && labels.model && isAnswered(Number(labels.status))) totalOf(labels).requests += value;
  }
  for (const { value, labels } of counters.tokens) {
    // Cached tokens are among those of the prompt.
    if (labels.tenant && labels.kind !== 'cached') totalOf(labels).tokens += value;
  }
  const countRejected = (labels: Value['labels'], reason: string, value: number) => {
    if (!labels.tenant) return;
    const { rejected } = totalOf(labels);
    rejected[reason] = (rejected[reason] ?? 0) + value;
  };
  for (const { value, labels } of counters.rateLimited) countRejected(labels, String(labels.limit), value);
  for (const { value, labels } of counters.shed) countRejected(labels, String(labels.reason), value);
  return totals;
}

function isAnswered(status: number): boolean {
  return (status >= 200 && status < 300) || status === 499;
}

/**
 * What was used between two looks. Tenants that used nothing are not there.
 *
 * @param inFlight   now, by tenant
 * @param elapsedMs  between the looks
 */
export function usageBetween(
  before: ReadonlyMap<string, Total>,
  after: ReadonlyMap<string, Total>,
  inFlight: ReadonlyMap<string, number>,
  elapsedMs: number,
): Map<string, TenantUsage> {
  const usage = new Map<string, TenantUsage>();
  for (const tenant of new Set([...after.keys(), ...inFlight.keys()])) {
    const was = before.get(tenant) ?? none;
    const is = after.get(tenant) ?? none;
    const rejected = Object.entries(is.rejected)
      .map(([reason, count]) => [reason, perMinute(count - (was.rejected[reason] ?? 0), elapsedMs)] as const)
      .filter(([, count]) => count > 0)
      .sort(([a], [b]) => (a < b ? -1 : 1));
    const used: TenantUsage = {
      requestsPerMinute: perMinute(is.requests - was.requests, elapsedMs),
      tokensPerMinute: perMinute(is.tokens - was.tokens, elapsedMs),
      inFlight: inFlight.get(tenant) ?? 0,
      rejected: Object.fromEntries(rejected),
    };
    if (!isNothing(used)) usage.set(tenant, used);
  }
  return usage;
}

const none: Total = { requests: 0, tokens: 0, rejected: {} };

function isNothing({ requestsPerMinute, tokensPerMinute, inFlight, rejected }: TenantUsage): boolean {
  return requestsPerMinute + tokensPerMinute + inFlight === 0 && Object.keys(rejected).length === 0;
}

/** Whole; what is little is never told as nothing. */
function perMinute(count: number, elapsedMs: number): number {
  return count <= 0 ? 0 : Math.max(1, Math.round((count * 60_000) / elapsedMs));
}

export type UsedRatio = { tenant: string; limit: keyof Limits; ratio: number };

/**
 * Which part of its limits each tenant took by the minute between two looks, and of `concurrency` what it holds.
 *
 * @param limitsOf  as of now; undefined: none, or there is no such tenant any more
 */
export function usedRatios(
  before: ReadonlyMap<string, Readonly<Used>>,
  after: ReadonlyMap<string, Readonly<Used>>,
  elapsedMs: number,
  limitsOf: (tenant: string) => Limits | undefined,
): UsedRatio[] {
  return [...after].flatMap(([tenant, { requests, tokens, inFlight }]) => {
    const was = before.get(tenant) ?? { requests: 0, tokens: 0 };
    const minutes = elapsedMs / 60_000;
    const used: Required<Limits> = {
      requestsPerMinute: (requests - was.requests) / minutes,
      tokensPerMinute: (tokens - was.tokens) / minutes,
      concurrency: inFlight,
    };
    return Object.entries(limitsOf(tenant) ?? {}).map(([name, most]) => {
      const limit = name as keyof Limits;
      return { tenant, limit, ratio: used[limit] / most };
    });
  });
}

export type UsageWatchOptions = {
  metrics: Pick<Metrics, 'requests' | 'tokens' | 'rateLimited' | 'shed'>;
  /** Requests under way, by tenant. */
  inFlight: () => ReadonlyMap<string, number>;
  /** What limits were taken so far. */
  used: () => ReadonlyMap<string, Readonly<Used>>;
  limitsOf: (tenant: string) => Limits | undefined;
  intervalMs: number;
  onUsage: (usage: ReadonlyMap<string, TenantUsage>) => void;
};

type Look = { atMs: number; totals: Map<string, Total>; used: Map<string, Used> };

/** Looks again and again, each gateway at a time of its own. */
export class UsageWatch {
  readonly #options: UsageWatchOptions;
  readonly #closing = new AbortController();
  readonly #loop: Promise<void>;
  #ratios: readonly UsedRatio[] = [];

  constructor(options: UsageWatchOptions) {
    this.#options = options;
    this.#loop = this.#run();
  }

  /** As of the last look. */
  get ratios(): readonly UsedRatio[] {
    return this.#ratios;
  }

  async close(): Promise<void> {
    this.#closing.abort();
    await this.#loop;
  }

  async #run(): Promise<void> {
    const { intervalMs, inFlight, limitsOf, onUsage } = this.#options;
    await this.#pause(intervalMs * Math.random());
    let before = await this.#look();
    for (;;) {
      await this.#pause(intervalMs);
      if (this.#closing.signal.aborted) return;
      const now = await this.#look();
      const elapsedMs = now.atMs - before.atMs;
      this.#ratios = usedRatios(before.used, now.used, elapsedMs, limitsOf);
      onUsage(usageBetween(before.totals, now.totals, inFlight(), elapsedMs));
      before = now;
    }
  }

  async #look(): Promise<Look> {
    const { metrics, used } = this.#options;
    // Of very many tenants and models that takes a while: requests pass in between.
    const read = async (counter: { get(): Promise<{ values: Value[] }> }) => {
      const { values } = await counter.get();
      await setImmediate();
      return values;
    };
    const counters = {
      requests: await read(metrics.requests),
      tokens: await read(metrics.tokens),
      rateLimited: await read(metrics.rateLimited),
      shed: await read(metrics.shed),
    };
    return {
      atMs: performance.now(),
      totals: totalsOf(counters),
      used: new Map([...used()].map(([tenant, one]) => [tenant, { ...one }])),
    };
  }

  async #pause(ms: number): Promise<void> {
    await sleep(ms, undefined, { signal: this.#closing.signal, ref: false }).catch(() => undefined);
  }
}
