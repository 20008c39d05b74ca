// Who runs a job, when several gateways see it. Each owner is an object `owners/NUMBER.json` that the store lets one process
// create; the highest number owns. The owner rewrites its object again and again. One that has not changed for a lease's time, by
// the clock of the process that looks, is taken for dead, and the next number may be created. Nobody's clock is compared with
// another's. An owner that was only slow finds the higher number at its next beat and stops; what it wrote until then counts
// once, since results are told apart by line (results.ts).

import { jsonBytes, readJson, type Store } from './store.ts';

/** What an owner says of itself. */
type OwnerRecord = { owner: string; beat: number; isReleased: boolean };

/** What a process saw last of a job's owner, and since when, on its own clock. */
export type Sighting = { text: string; sinceMs: number };

export class Lease {
  readonly number: number;
  readonly #store: Store;
  readonly #prefix: string;
  readonly #leaseMs: number;
  readonly #owner: string;
  readonly #lost = new AbortController();
  readonly #timer: NodeJS.Timeout;
  #beat = 0;
  #beating: Promise<void> = Promise.resolve();
  #lastBeatMs = performance.now();

  private constructor(store: Store, prefix: string, number: number, owner: string, leaseMs: number) {
    this.#store = store;
    this.#prefix = prefix;
    this.number = number;
    this.#owner = owner;
    this.#leaseMs = leaseMs;
    this.#timer = setInterval(() => {
      this.#beating = this.#beating.then(() => this.#beatOnce());
    }, leaseMs / 4);
  }

  /**
   * The lease on a job, or null when somebody else has it.
   *
   * @param prefix  of the job's owners, ends with `/`
   * @param sightings  by prefix: what this process saw before; kept up to date here
   */
  static async claim(
    store: Store,
    prefix: string,
    { owner, leaseMs }: { owner: string; leaseMs: number },
    sightings: Map<string, Sighting>,
  ): Promise<Lease | null> {
    const number = await latestOwner(store, prefix);
    if (number > 0) {
      const record = await readJson<OwnerRecord>(store, keyOf(prefix, number));
      // Another process has ended the job.
      if (record === null) return null;
      const seen = sighting(`${number} ${record.beat}`, sightings.get(prefix), performance.now());
      sightings.set(prefix, seen);
      if (!record.isReleased && performance.now() - seen.sinceMs < leaseMs) return null;
    }
    const first: OwnerRecord = { owner, beat: 0, isReleased: false };
    const isMine = await store.create(keyOf(prefix, number + 1), jsonBytes(first));
    return isMine ? new Lease(store, prefix, number + 1, owner, leaseMs) : null;
  }

  /** Aborted when another owner has come, or may have. */
  get lost(): AbortSignal {
    return this.#lost.signal;
  }

  /** Lets another process have it at once. */
  async release(): Promise<void> {
    clearInterval(this.#timer);
    await this.#beating;
    if (!this.#lost.signal.aborted) await this.#write(true);
  }

  /** The job has ended: there is nothing to own. */
  async end(): Promise<void> {
    clearInterval(this.#timer);
    await this.#beating;
  }

  async #beatOnce(): Promise<void> {
    if (this.#lost.signal.aborted) return;
    try {
      if ((await latestOwner(this.#store, this.#prefix)) > this.number) {
        return this.#lose('another gateway has taken over');
      }
      await this.#write(false);
      this.#lastBeatMs = performance.now();
    } catch (error) {
      // Before others may think so.
      if (performance.now() - this.#lastBeatMs > 0.75 * this.#leaseMs) this.#lose((error as Error).message);
    }
  }

  async #write(isReleased: boolean): Promise<void> {
    this.#beat += 1;
    const record: OwnerRecord = { owner: this.#owner, beat: this.#beat, isReleased };
    await this.#store.put(keyOf(this.#prefix, this.number), jsonBytes(record));
  }

  #lose(reason: string): void {
    clearInterval(this.#timer);
    this.#lost.abort(new Error(reason));
  }
}

/** Since when an owner has been seen as it is. */
function sighting(text: string, before: Sighting | undefined, nowMs: number): Sighting {
  return before?.text === text ? before : { text, sinceMs: nowMs };
}

async function latestOwner(store: Store, prefix: string): Promise<number> {
  const numbers = (await store.list(prefix)).map(({ key }) => Number.parseInt(key.slice(prefix.length), 10));
  return Math.max(0, ...numbers);
}

/** Padded, so that owners and their logs are listed in order. */
export function padded(number: number): string {
  return String(number).padStart(8, '0');
}

function keyOf(prefix: string, number: number): string {
  return `${prefix}${padded(number)}.json`;
}
