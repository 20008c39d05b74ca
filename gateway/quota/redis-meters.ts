// Meters that several gateways share, in Redis or Valkey. Every request asks once before it enters and tells once in the end;
// each is one atomic script (meter.lua).
//
// While Redis cannot be asked, a gateway goes on alone, with its share of every limit: the limit divided by the gateways that
// were there last. It begins where Redis left off, since it keeps what Redis read last. Nobody waits longer than the timeout, and
// that once: from then on Redis is asked again by a look a second, not by requests. What is spent meanwhile is not told
// to Redis afterwards, but for leases: those that ended meanwhile are given back when it answers again. Leases are renewed every few
// seconds, which also puts them back into a Redis that lost them.

import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { Redis, type Result } from 'ioredis';
import type { Settlement, Take } from './meter.ts';
import { LocalMeters, type MeterStore, type Taken } from './meter-store.ts';

export type RedisOptions = {
  /** `redis://[USER@]HOST[:PORT][/DB]`, or `rediss://` for TLS. */
  url: string;
  password: string | null;
  /** PEM of who signed the server's certificate; null: those that Node knows. */
  ca: string | null;
  /** Longest wait for an answer. */
  timeoutMs: number;
  /** Gateways that share the limits, until Redis says how many there are. */
  numGateways: number;
};

type Log = { info(fields: object, message: string): void; warn(fields: object, message: string): void };

const script = readFileSync(join(import.meta.dirname, 'meter.lua'), 'utf8');
/** Leases that one call renews or gives back: a script holds up all others. */
const maxRenewed = 500;
/** More than that end by the time. */
const maxOwed = 10_000;
const renewMs = 5_000;
const lookMs = 1_000;
const gatewaysKey = 'motet:quota:gateways';
/** A gateway that says nothing for so long is not counted any more. */
const gatewayTtlUs = 15_000_000;

declare module 'ioredis' {
  interface RedisCommander<Context> {
    motetMeters(numKeys: number, ...keysAndArguments: (string | number)[]): Result<number[], Context>;
  }
}

export class RedisMeters implements MeterStore {
  readonly #redis: Redis;
  readonly #local: LocalMeters;
  readonly #gatewayId: string;
  readonly #log: Log;
  /** Taken and not given back: `key id` -> how to renew it. */
  readonly #leases = new Map<string, Extract<Take, { kind: 'lease' }>>();
  /** Ended, and Redis may not know of it: `key id` -> how to give it back. */
  readonly #owed = new Map<string, Settlement>();
  #isAway = false;
  #isClosed = false;
  readonly #ready = Promise.withResolvers<void>();
  #timer: NodeJS.Timeout | undefined;
  readonly #onAlone: () => void;

  constructor(
    { url, password, ca, timeoutMs, numGateways }: RedisOptions,
    gatewayId: string,
    log: Log,
    onAlone: () => void,
  ) {
    this.#gatewayId = gatewayId;
    this.#log = log;
    this.#onAlone = onAlone;
    this.#local = new LocalMeters(numGateways);
    this.#redis = new Redis(url, {
      ...(password !== null && { password }),
      ...(ca !== null && { tls: { ca } }),
      connectTimeout: Math.max(timeoutMs, 1_000),
      commandTimeout: timeoutMs,
      // Whoever waits for a connection would wait longer than the timeout.
      enableOfflineQueue: false,
      maxRetriesPerRequest: 0,
      autoResendUnfulfilledCommands: false,
      retryStrategy: (numTries) => Math.min(numTries * 50, 1_000),
      scripts: { motetMeters: { lua: script } },
    });
    // Told by the looks.
    this.#redis.on('error', () => {});
    this.#redis.on('ready', () => void this.#look());
    this.#timer = setTimeout(() => void this.#look(), lookMs);
  }

  /** Resolves when Redis was asked for the first time, whatever came of it. */
  get ready(): Promise<void> {
    return this.#ready.promise;
  }

  /** False while a gateway is on its own. */
  get isShared(): boolean {
    return !this.#isAway && this.#redis.status === 'ready';
  }

  async take(takes: readonly Take[]): Promise<Taken> {
    if (!this.isShared) return this.#takeAlone(takes);
    let isTaken: boolean;
    let readings: number[];
    try {
      [isTaken, readings] = await this.#takeShared(takes);
    } catch (error) {
      this.#noteAway(error as Error);
      return this.#takeAlone(takes);
    }
    this.#local.mirror(takes, { isTaken, readings });
    if (isTaken) this.#noteLeases(takes);
    return { isTaken, readings, settle: (settlements) => void this.#settleShared(settlements) };
  }

  async close(): Promise<void> {
    this.#isClosed = true;
    clearTimeout(this.#timer);
    // The leases of requests that were cut off, and this gateway's place among the others.
    const gone = [...this.#leases.values()].map(({ key, id }): Settlement => ({ kind: 'lease', key, id }));
    gone.push({ kind: 'lease', key: gatewaysKey, id: this.#gatewayId });
    if (this.isShared) await this.#call('settle', gone.slice(0, maxRenewed)).catch(() => undefined);
    this.#redis.disconnect();
  }

  async #takeShared(takes: readonly Take[]): Promise<[isTaken: boolean, readings: number[]]> {
    const [isTaken, ...readings] = await this.#call('take', takes);
    return [isTaken === 1, readings];
  }

  /** A lease that cannot be given back now is owed. */
  async #settleShared(settlements: readonly Settlement[]): Promise<void> {
    this.#forgetLeases(settlements);
    if (settlements.length === 0) return;
    if (!this.isShared) return this.#oweLeases(settlements);
    await this.#call('settle', settlements).catch((error) => {
      this.#noteAway(error);
      this.#oweLeases(settlements);
    });
  }

  #oweLeases(settlements: readonly Settlement[]): void {
    for (const each of settlements) {
      if (each.kind === 'lease' && this.#owed.size < maxOwed) this.#owed.set(`${each.key} ${each.id}`, each);
    }
  }

  async #giveBackOwed(): Promise<void> {
    const owed = [...this.#owed];
    for (let begin = 0; begin < owed.length; begin += maxRenewed) {
      const some = owed.slice(begin, begin + maxRenewed);
      await this.#call(
        'settle',
        some.map(([, settlement]) => settlement),
      );
      for (const [name] of some) this.#owed.delete(name);
    }
  }

  #takeAlone(takes: readonly Take[]): Taken {
    this.#onAlone();
    const taken = this.#local.take(takes);
    if (taken.isTaken) this.#noteLeases(takes);
    return {
      ...taken,
      settle: (settlements) => {
        taken.settle(settlements);
        // Redis may know of it by now, from a renewal.
        void this.#settleShared(settlements.filter(({ kind }) => kind === 'lease'));
      },
    };
  }

  #noteLeases(takes: readonly Take[]): void {
    for (const each of takes) if (each.kind === 'lease') this.#leases.set(`${each.key} ${each.id}`, each);
  }

  #forgetLeases(settlements: readonly Settlement[]): void {
    const leases = settlements.filter(({ kind }) => kind === 'lease');
    for (const { key, id } of leases as { key: string; id: string }[]) this.#leases.delete(`${key} ${id}`);
    this.#local.settle(leases);
  }

  /** Renews what is held, and finds out whether Redis answers. */
  async #look(): Promise<void> {
    clearTimeout(this.#timer);
    try {
      const self: Take = {
        kind: 'lease',
        key: gatewaysKey,
        limit: 0,
        id: this.#gatewayId,
        ttlUs: gatewayTtlUs,
      };
      await this.#call('renew', [self]);
      const [, numGateways] = await this.#call('take', [self]);
      const leases = [...this.#leases.values()];
      for (let begin = 0; begin < leases.length; begin += maxRenewed) {
        await this.#call('renew', leases.slice(begin, begin + maxRenewed));
      }
      await this.#giveBackOwed();
      this.#local.numGateways = Math.max(numGateways!, 1);
      if (this.#isAway) this.#log.info({ gateways: numGateways }, 'Redis answers again; quotas are shared');
      this.#isAway = false;
    } catch (error) {
      this.#noteAway(error as Error);
    }
    this.#ready.resolve();
    if (this.#isClosed) return;
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => void this.#look(), this.#isAway ? lookMs : renewMs);
  }

  #noteAway(error: Error): void {
    if (this.#isAway || this.#isClosed) return;
    this.#isAway = true;
    this.#log.warn(
      { cause: error.message, gateways: this.#local.numGateways },
      'Redis does not answer; quotas are kept by this gateway alone, with its share of them',
    );
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => void this.#look(), lookMs);
  }

  #call(action: 'take' | 'settle' | 'renew', parts: readonly (Take | Settlement)[]): Promise<number[]> {
    return this.#redis.motetMeters(
      parts.length,
      ...parts.map(({ key }) => key),
      action,
      '',
      ...parts.flatMap((part) => scriptArguments(part)),
    );
  }
}

/** As meter.lua reads them. */
export function scriptArguments(part: Take | Settlement): (string | number)[] {
  if (part.kind === 'rate') return ['rate', 'costUs' in part ? part.costUs : part.addUs, 0, 0];
  return 'ttlUs' in part ? ['lease', part.limit, part.id, part.ttlUs] : ['lease', 0, part.id, 0];
}
