// What tenants use, in their statuses: an entry a gateway, and the sum of all. Each gateway writes its own entry and leaves those of
// others, but for such as nobody has renewed. A write says which version of the Tenant it is about, so that of two gateways that
// write in one moment the second is refused, looks again and adds to what the first wrote.

import { setTimeout as sleep } from 'node:timers/promises';
import type { KubeConfig } from '@kubernetes/client-node';
import { ApiError, callApi, motetPath } from '../../crds/api.ts';
import type { Tenant, TenantStatus } from '../../crds/types.ts';
import type { TenantUsage } from './tenant-usage.ts';

export type UsageStatus = NonNullable<TenantStatus['usage']>;
type Entry = UsageStatus['gateways'][number];

const fieldManager = 'motet-gateway-usage';
/** Entries that a status has at most, the newest. */
export const maxEntries = 100;
/** An entry that has not been written for so many intervals is one of a gateway that is gone. */
const keptIntervals = 3;
/** One that says the same as before is written again after so many. */
const renewedIntervals = 1.5;

/**
 * The usage that the status should have; null when it has it.
 *
 * @param own  undefined: nothing was used
 */
export function nextUsage(
  before: UsageStatus | undefined,
  gateway: string,
  own: TenantUsage | undefined,
  intervalMs: number,
  now: Date,
): UsageStatus | null {
  const ageOf = ({ time }: Entry) => now.getTime() - Date.parse(time);
  const entries = before?.gateways ?? [];
  const last = entries.find(({ name }) => name === gateway);
  const isSaid =
    own === undefined
      ? last === undefined
      : last !== undefined && isSame(last, own) && ageOf(last) < renewedIntervals * intervalMs;
  const others = entries.filter(
    (entry) => entry.name !== gateway && ageOf(entry) < keptIntervals * intervalMs,
  );
  const numOthers = entries.length - (last === undefined ? 0 : 1);
  if (isSaid && others.length === numOthers) return null;

  const time = now.toISOString().replace(/\.\d+Z$/, 'Z');
  const mine = own === undefined ? [] : [{ name: gateway, time, ...own }];
  const gateways = [...others, ...mine]
    .sort((a, b) => ageOf(a) - ageOf(b))
    .slice(0, maxEntries)
    .sort((a, b) => (a.name < b.name ? -1 : 1));
  const sum = (of: (entry: Entry) => number) => gateways.reduce((total, entry) => total + of(entry), 0);
  return {
    requestsPerMinute: sum((entry) => entry.requestsPerMinute),
    tokensPerMinute: sum((entry) => entry.tokensPerMinute),
    inFlight: sum((entry) => entry.inFlight),
    rejectedPerMinute: sum(({ rejected }) => Object.values(rejected).reduce((a, b) => a + b, 0)),
    gateways,
  };
}

function isSame(entry: Entry, own: TenantUsage): boolean {
  const said = ({ requestsPerMinute, tokensPerMinute, inFlight, rejected }: TenantUsage) =>
    JSON.stringify([requestsPerMinute, tokensPerMinute, inFlight, Object.entries(rejected).sort()]);
  return said(entry) === said(own);
}

export type UsageWriterOptions = {
  /** Of this gateway; no other has it. */
  gateway: string;
  intervalMs: number;
  tenants: { list(): Tenant[]; get(name: string): Tenant | undefined };
  /** Carries one write out; the signal ends it with the writer. */
  write: (tenant: Tenant, usage: UsageStatus, signal: AbortSignal) => Promise<void>;
  onError: (error: Error) => void;
  /** Between two writes. */
  gapMs?: number;
  /** Before the writes that were refused, since another gateway was first, are tried again. */
  retryMs?: number;
};

/** How often a write is tried in a round; the next round has newer numbers. */
const maxTries = 3;

export class UsageWriter {
  readonly #options: Required<UsageWriterOptions>;
  readonly #closing = new AbortController();
  #usage: ReadonlyMap<string, TenantUsage> = new Map();
  #round: Promise<void> | null = null;

  constructor(options: UsageWriterOptions) {
    this.#options = { gapMs: 50, retryMs: 500, ...options };
  }

  /** Begins a round of writes. One that is under way goes on with the newer numbers. */
  note(usage: ReadonlyMap<string, TenantUsage>): void {
    this.#usage = usage;
    if (this.#closing.signal.aborted) return;
    this.#round ??= this.#writeAll().finally(() => {
      this.#round = null;
    });
  }

  async close(): Promise<void> {
    this.#closing.abort();
    await this.#round;
  }

  async #writeAll(): Promise<void> {
    const { tenants, retryMs } = this.#options;
    const names = tenants.list().map(({ metadata }) => metadata.name!);
    // Gateways begin at different places, so they seldom meet; and where a round breaks off, it is not the same that go without.
    const begin = Math.floor(Math.random() * names.length);
    let left = [...names.slice(begin), ...names.slice(0, begin)];
    for (let tries = 1; tries <= maxTries && left.length > 0; tries += 1) {
      if (tries > 1) await this.#pause(retryMs * (1 + Math.random()));
      const refused: string[] = [];
      for (const name of left) {
        if (this.#closing.signal.aborted) return;
        const result = await this.#writeOne(name);
        if (result === 'away') return;
        if (result === 'conflict') refused.push(name);
      }
      left = refused;
    }
  }

  async #writeOne(name: string): Promise<'done' | 'conflict' | 'away'> {
    const { gateway, intervalMs, tenants, write, onError, gapMs } = this.#options;
    const tenant = tenants.get(name);
    if (tenant === undefined) return 'done';
    const usage = nextUsage(tenant.status?.usage, gateway, this.#usage.get(name), intervalMs, new Date());
    if (usage === null) return 'done';
    try {
      await write(tenant, usage, this.#closing.signal);
      await this.#pause(gapMs);
      return 'done';
    } catch (error) {
      if (this.#closing.signal.aborted) return 'away';
      if (error instanceof ApiError && error.status === 409) return 'conflict';
      if (error instanceof ApiError && error.status === 404) return 'done';
      onError(error as Error);
      // What is refused of one may be accepted of another; who does not answer is not asked again and again.
      return error instanceof ApiError ? 'done' : 'away';
    }
  }

  async #pause(ms: number): Promise<void> {
    await sleep(ms, undefined, { signal: this.#closing.signal }).catch(() => undefined);
  }
}

/** @throws ApiError 409 when the Tenant is no longer as it was read */
export async function patchUsage(
  kubeConfig: KubeConfig,
  namespace: string,
  { metadata }: Tenant,
  usage: UsageStatus,
  signal: AbortSignal,
): Promise<void> {
  const { name, resourceVersion } = metadata;
  await callApi(kubeConfig, {
    signal,
    method: 'PATCH',
    path: motetPath('Tenant', namespace, name!, 'status'),
    query: { fieldManager },
    contentType: 'application/merge-patch+json',
    body: { metadata: { resourceVersion }, status: { usage } },
  });
}
