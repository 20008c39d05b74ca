// How much a caller may use: what a request takes of its limits when it comes, and what it really cost when it has ended.

import type { TokenUsage } from '../../engine/protocol.ts';
import type { GatewayError } from '../errors.ts';
import { type HeaderPair, rateLimitHeaders } from './headers.ts';
import { type Metered, meteredOf, refusalOf, type Scope, settlementsOf } from './limits.ts';
import type { MeterStore, Taken } from './meter-store.ts';

export type Entry = {
  /** For the answer, whatever it will be. */
  headers: HeaderPair[];
  /** The limit that refuses the request, if one does. Nothing was taken then. */
  refusal: GatewayError | null;
  /** Called once, in the end. `usage`: what it cost; null: it cannot be told, so the estimate stays. */
  settle(usage: TokenUsage | null): void;
};

/** What a tenant took of its limits so far, and what it holds now. */
export type Used = { requests: number; tokens: number; inFlight: number };

export const noTokens: TokenUsage = { promptTokens: 0, cachedTokens: 0, completionTokens: 0 };

const unlimited: Entry = { headers: [], refusal: null, settle: () => {} };

/** @param gatewayId  tells the leases of this gateway from those of others */
export class Quota {
  readonly #store: MeterStore;
  readonly #gatewayId: string;
  readonly #onRefusal: (tenant: string, limit: string) => void;
  readonly #used = new Map<string, Used>();
  #numRequests = 0;

  constructor(
    store: MeterStore,
    gatewayId: string,
    onRefusal: (tenant: string, limit: string) => void = () => {},
  ) {
    this.#store = store;
    this.#gatewayId = gatewayId;
    this.#onRefusal = onRefusal;
  }

  /**
   * Takes what the request may cost from every limit, or nothing from any. At once when the meters are in memory.
   *
   * @param scopes  whose limits hold; without limits nothing is counted
   * @param tokens  of prompt and answer, estimated
   */
  enter(tenant: string | null, scopes: readonly Scope[], tokens: number): Entry | Promise<Entry> {
    if (tenant === null || scopes.length === 0) return unlimited;
    this.#numRequests += 1;
    const leaseId = `${this.#gatewayId}:${this.#numRequests}`;
    const metered = meteredOf(tenant, scopes, tokens, leaseId);
    if (metered.length === 0) return unlimited;
    const taken = this.#store.take(metered.map(({ take }) => take));
    const toEntry = (taken: Taken) => this.#entryOf(tenant, tokens, metered, taken);
    return taken instanceof Promise ? taken.then(toEntry) : toEntry(taken);
  }

  /** Of each tenant that came with a limit, since the start. */
  get used(): ReadonlyMap<string, Readonly<Used>> {
    return this.#used;
  }

  close(): Promise<void> {
    return this.#store.close();
  }

  #usedBy(tenant: string): Used {
    const used = this.#used.get(tenant) ?? { requests: 0, tokens: 0, inFlight: 0 };
    this.#used.set(tenant, used);
    return used;
  }

  #entryOf(tenant: string, estimated: number, metered: readonly Metered[], taken: Taken): Entry {
    const headers = rateLimitHeaders(metered, taken.readings);
    const refused = refusalOf(metered, taken);
    const used = this.#usedBy(tenant);
    if (refused === null) {
      used.requests += 1;
      used.inFlight += 1;
      const settle = (usage: TokenUsage | null) => {
        const tokens = usage === null ? null : usage.promptTokens + usage.completionTokens;
        used.tokens += tokens ?? estimated;
        used.inFlight -= 1;
        taken.settle(settlementsOf(metered, tokens));
      };
      return { headers, refusal: null, settle };
    }
    this.#onRefusal(tenant, `${refused.by.scope.of}-${refused.by.name}`);
    return { headers, refusal: refused.error, settle: () => {} };
  }
}
