// Reads the Secrets that Tenants name, one by one: the gateway may get a Secret by its name and can neither list nor
// watch them. A Secret is read when it is first named, when asked again, and every few seconds, since nothing tells when
// it changes. While the API server is away, what was read last holds.

import { setTimeout as sleep } from 'node:timers/promises';
import type { V1Secret } from '@kubernetes/client-node';
import { ApiError } from '../crds/api.ts';
import { type KeyState, readKey } from './tenants.ts';

export type SecretKeysOptions = {
  read: (name: string, signal: AbortSignal) => Promise<V1Secret>;
  /** Something that is known of a key has changed. */
  onChange: () => void;
  onError: (secret: string, error: Error) => void;
  /** The longest time until a change is seen. */
  intervalMs: number;
};

/** What is known of one Secret: the entries that are named, or what the whole of it is. */
type Known = {
  entries: ReadonlySet<string>;
  states: Map<string, KeyState>;
  dueMs: number;
};

/** Secrets that are read at a time. */
const maxReads = 4;
/** A Secret of which nothing is known yet is asked for again after this. */
const retryMs = 1_000;

export class SecretKeys {
  readonly #options: SecretKeysOptions;
  readonly #secrets = new Map<string, Known>();
  readonly #closing = new AbortController();
  readonly #loop: Promise<void>;
  #wake = new AbortController();

  constructor(options: SecretKeysOptions) {
    this.#options = options;
    this.#loop = this.#run();
  }

  /** What is named from now on: Secret -> entries. The rest is forgotten. */
  name(wanted: ReadonlyMap<string, ReadonlySet<string>>): void {
    for (const name of [...this.#secrets.keys()]) if (!wanted.has(name)) this.#secrets.delete(name);
    for (const [name, entries] of wanted) {
      const known = this.#secrets.get(name);
      const hasAll = known !== undefined && [...entries].every((entry) => known.states.has(entry));
      this.#secrets.set(name, {
        entries,
        states: known?.states ?? new Map(),
        dueMs: hasAll ? known.dueMs : 0,
      });
    }
    this.#wake.abort();
  }

  /** Reads these at once: somebody changed what names them, perhaps after changing them. */
  readAgain(names: Iterable<string>): void {
    for (const name of names) {
      const known = this.#secrets.get(name);
      if (known !== undefined) known.dueMs = 0;
    }
    this.#wake.abort();
  }

  stateOf(secret: string, entry: string): KeyState {
    return this.#secrets.get(secret)?.states.get(entry) ?? { kind: 'unread' };
  }

  /** Every Secret that is named has been read, or found missing or closed. */
  get isComplete(): boolean {
    return [...this.#secrets.values()].every(({ entries, states }) =>
      [...entries].every((entry) => states.has(entry)),
    );
  }

  async close(): Promise<void> {
    this.#closing.abort();
    await this.#loop;
  }

  async #run(): Promise<void> {
    while (!this.#closing.signal.aborted) {
      this.#wake = new AbortController();
      const queue = [...this.#secrets].filter(([, { dueMs }]) => dueMs <= Date.now()).map(([name]) => name);
      const readSome = async () => {
        for (let name = queue.shift(); name !== undefined; name = queue.shift()) await this.#read(name);
      };
      await Promise.all(Array.from({ length: maxReads }, readSome));

      const nextMs = Math.min(...[...this.#secrets.values()].map(({ dueMs }) => dueMs), Date.now() + 60_000);
      const signal = AbortSignal.any([this.#closing.signal, this.#wake.signal]);
      await sleep(Math.max(nextMs - Date.now(), 0), undefined, { signal }).catch(() => undefined);
    }
  }

  async #read(name: string): Promise<void> {
    const asked = this.#secrets.get(name);
    if (asked === undefined || this.#closing.signal.aborted) return;
    // Whoever asks from now on wants a read that begins later.
    asked.dueMs = Number.POSITIVE_INFINITY;
    const stateOf = await this.#ask(name);
    const known = this.#secrets.get(name);
    if (known === undefined) return;
    // Spread, so that the API server is not asked for all of them at once.
    const isUnread = stateOf === null && known.states.size === 0;
    const intervalMs = isUnread ? retryMs : this.#options.intervalMs;
    known.dueMs = Math.min(known.dueMs, Date.now() + intervalMs * (0.6 + 0.3 * Math.random()));
    if (stateOf === null) return;
    const states = new Map([...known.entries].map((entry) => [entry, stateOf(entry)]));
    const isSame = [...states].every(([entry, state]) => isEqual(state, known.states.get(entry)));
    known.states = states;
    if (!isSame) this.#options.onChange();
  }

  /** What the Secret says of an entry; null when it cannot be told now, and what is known holds. */
  async #ask(name: string): Promise<((entry: string) => KeyState) | null> {
    try {
      const { data = {} } = await this.#options.read(name, this.#closing.signal);
      return (entry) => readKey(Object.hasOwn(data, entry) ? Buffer.from(data[entry]!, 'base64') : undefined);
    } catch (error) {
      if (this.#closing.signal.aborted) return null;
      const status = error instanceof ApiError ? error.status : null;
      if (status === 404) return () => ({ kind: 'no_secret' });
      this.#options.onError(name, error as Error);
      // A right that was taken away takes no key away; one that never was there leaves nothing to wait for.
      return status === 403 ? (entry) => this.#known(name, entry) ?? { kind: 'forbidden' } : null;
    }
  }

  #known(secret: string, entry: string): KeyState | undefined {
    return this.#secrets.get(secret)?.states.get(entry);
  }
}

function isEqual(a: KeyState, b: KeyState | undefined): boolean {
  if (a.kind === 'key' && b?.kind === 'key') return a.digest.equals(b.digest);
  return a.kind === b?.kind && (a.kind !== 'invalid' || a.problem === (b as typeof a).problem);
}
