/**
 * Keys that want to be looked at. A key is run by one at a time; keys that come again while they wait are one; a key that
 * comes while it runs is run once more after it. A run that fails is tried again after a wait that doubles up to a bound,
 * with jitter, so that many keys that failed together do not come back together. A change is not kept waiting by that.
 */
import type { Clock } from './clock.ts';
import type { ReconcileResult } from './cluster.ts';

export interface WorkQueueOptions {
  run: (key: string) => Promise<ReconcileResult>;
  /** Runs at a time. */
  concurrency: number;
  clock: Clock;
  /** From 0 up to 1. */
  random: () => number;
  /** A run ended; `retryInMs` is null when it is not tried again. */
  onEnd: (key: string, outcome: { seconds: number; error: Error | null; retryInMs: number | null }) => void;
  /** Of a failure: whether the key is tried again. Default, always. */
  isRetried?: (error: Error) => boolean;
}

/** Wait after the first failure, and the longest. */
export const backoffMs = { first: 500, most: 60_000 };

export class WorkQueue {
  readonly #options: WorkQueueOptions;
  /** In the order in which they came. */
  readonly #waiting = new Set<string>();
  readonly #running = new Map<string, Promise<void>>();
  /** Keys that came while they ran. */
  readonly #again = new Set<string>();
  readonly #later = new Map<string, { atMs: number; cancel: () => void }>();
  readonly #failures = new Map<string, number>();
  #isClosed = false;

  constructor(options: WorkQueueOptions) {
    this.#options = options;
  }

  /** Keys that wait to be run now. */
  get depth(): number {
    return this.#waiting.size + this.#again.size;
  }

  add(key: string): void {
    if (this.#isClosed) return;
    this.#cancelLater(key);
    if (this.#running.has(key)) this.#again.add(key);
    else this.#waiting.add(key);
    this.#start();
  }

  /** The earlier of two times counts. */
  addAfter(key: string, ms: number): void {
    const { clock } = this.#options;
    const atMs = clock.nowMs() + ms;
    if (this.#isClosed || this.#waiting.has(key) || this.#again.has(key)) return;
    if ((this.#later.get(key)?.atMs ?? Number.POSITIVE_INFINITY) <= atMs) return;
    this.#cancelLater(key);
    this.#later.set(key, { atMs, cancel: clock.after(ms, () => this.add(key)) });
  }

  /** Forgets what waits, takes nothing more, and resolves when what runs has ended. */
  async drain(): Promise<void> {
    this.#isClosed = true;
    this.#waiting.clear();
    this.#again.clear();
    for (const key of [...this.#later.keys()]) this.#cancelLater(key);
    await Promise.all(this.#running.values());
  }

  #start(): void {
    for (const key of this.#waiting) {
      if (this.#running.size >= this.#options.concurrency) return;
      this.#waiting.delete(key);
      this.#running.set(key, this.#run(key));
    }
  }

  async #run(key: string): Promise<void> {
    const { run, clock, onEnd, isRetried = () => true } = this.#options;
    const startedMs = clock.nowMs();
    let error: Error | null = null;
    let nextMs: number | null = null;
    try {
      // Never in the caller's turn: `add` has to return before anything else happens.
      await Promise.resolve();
      nextMs = (await run(key)).requeueAfterMs ?? null;
      this.#failures.delete(key);
    } catch (thrown) {
      error = thrown as Error;
      nextMs = isRetried(error) ? this.#backoff(key) : null;
    }
    this.#running.delete(key);
    onEnd(key, { seconds: (clock.nowMs() - startedMs) / 1000, error, retryInMs: error && nextMs });
    if (this.#again.delete(key)) this.add(key);
    else if (nextMs !== null) this.addAfter(key, nextMs);
    this.#start();
  }

  #backoff(key: string): number {
    const failures = this.#failures.get(key) ?? 0;
    this.#failures.set(key, failures + 1);
    const waitMs = Math.min(backoffMs.first * 2 ** failures, backoffMs.most);
    return waitMs * (0.75 + this.#options.random() / 4);
  }

  #cancelLater(key: string): void {
    this.#later.get(key)?.cancel();
    this.#later.delete(key);
  }
}
