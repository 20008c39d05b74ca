// Reads the Secrets that Tenants name, one by one, each by its name. A Secret is read when it is first named, when asked
// again (as when a watch tells that it changed), and every now and then. While the API server is away, what was read last
// holds.

import { setTimeout as sleep } from 'node:timers/promises';
import type { V1Secret } from '@kubernetes/client-node';
import { ApiError } from '../crds/api.ts';
import { type KeyState, readKey } from './identity/keys.ts';

export type SecretKeysOptions = {
  read: (name: string, signal: AbortSignal) => Promise<V1Secret>;
  /** Something that is known of a key has changed. */
  onChange: () => void;
  onError: (secret: string, error: Error) => void;
  /** How long what was read is good for, as of now: the longest time until a change is seen that nobody tells of. */
  intervalMs: () => number;
};

/** What is known of one Secret: the entries that are named, or what the whole of it is. */
type Known = {
  entries: ReadonlySet<string>;
  states: Map<string, KeyState>;
  dueMs: number;
  /** It was asked for since it was last read with success. */
  isAsked: boolean;
};

/** `isSure`: the API server let the gateway read it, or says that there is none. */
type Answer = { stateOf: (entry: string) => KeyState; isSure: boolean };

/** Secrets that are read at a time. */
const maxReads = 4;
/** A Secret that was asked for and could not be read is read again after this: its key may have been taken away. */
const retryMs = 1_000;
/** One that could not be read when its time came, after this at the most. */
const unsureMs = 15_000;

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
        isAsked: known?.isAsked ?? true,
      });
    }
    this.#wake.abort();
  }

  /** Reads these at once: somebody changed what names them, perhaps after changing them. */
  readAgain(names: Iterable<string>): void {
    for (const name of names) {
      const known = this.#secrets.get(name);
      if (known !== undefined) Object.assign(known, { dueMs: 0, isAsked: true });
    }
    this.#wake.abort();
  }

  /** What was read is good for `intervalMs` from now on and no longer. */
  shorten(): void {
    for (const known of this.#secrets.values())
      known.dueMs = Math.min(known.dueMs, Date.now() + this.#waitMs());
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
    const answer = await this.#ask(name);
    const known = this.#secrets.get(name);
    if (known === undefined) return;
    if (answer !== null) known.isAsked = false;
    const waitMs = answer === null && known.isAsked ? retryMs : this.#waitMs(answer?.isSure ?? false);
    known.dueMs = Math.min(known.dueMs, Date.now() + waitMs);
    if (answer === null) return;
    const states = new Map([...known.entries].map((entry) => [entry, answer.stateOf(entry)]));
    const isSame = [...states].every(([entry, state]) => isEqual(state, known.states.get(entry)));
    known.states = states;
    if (!isSame) this.#options.onChange();
  }

  /** Spread, so that the API server is not asked for all of them at once. */
  #waitMs(isSure = true): number {
    const goodForMs = this.#options.intervalMs();
    return (isSure ? goodForMs : Math.min(goodForMs, unsureMs)) * (0.6 + 0.3 * Math.random());
  }

  /** Null when nothing can be told now, and what is known holds. */
  async #ask(name: string): Promise<Answer | null> {
    const sure = (stateOf: Answer['stateOf']): Answer => ({ stateOf, isSure: true });
    try {
      const { data = {} } = await this.#options.read(name, this.#closing.signal);
      return sure((entry) =>
        readKey(Object.hasOwn(data, entry) ? Buffer.from(data[entry]!, 'base64') : undefined),
      );
    } catch (error) {
      if (this.#closing.signal.aborted) return null;
      const status = error instanceof ApiError ? error.status : null;
      if (status === 404) return sure(() => ({ kind: 'no_secret' }));
      this.#options.onError(name, error as Error);
      if (status !== 403) return null;
      // A right that was taken away takes no key away; one that never was there leaves nothing to wait for.
      return { stateOf: (entry) => this.#known(name, entry) ?? { kind: 'forbidden' }, isSure: false };
    }
  }

  #known(secret: string, entry: string): KeyState | undefined {
    return this.#secrets.get(secret)?.states.get(entry);
  }
}

function isEqual(a: KeyState, b: KeyState | undefined): boolean {
  if (a.kind === 'key' && b?.kind === 'key') return a.digest === b.digest;
  return a.kind === b?.kind && (a.kind !== 'invalid' || a.problem === (b as typeof a).problem);
}
