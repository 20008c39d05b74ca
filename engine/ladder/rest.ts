/** Leaves something alone for a while after it failed, each time twice as long, until it works again. */

export interface RestOptions {
  /** Milliseconds, never going back. */
  now: () => number;
  /** Called when it begins to fail, and when it works again: once each, however often it is tried between. */
  onChange: (isWorking: boolean, reason: unknown) => void;
}

const firstMs = 1000;
const longestMs = 60_000;

export class Rest {
  readonly #options: RestOptions;
  #waitMs = 0;
  #untilMs = 0;

  constructor(options: RestOptions) {
    this.#options = options;
  }

  /** It failed, and was not seen to work since. */
  get isFailing(): boolean {
    return this.#waitMs > 0;
  }

  /** It is not to be tried now. */
  get isResting(): boolean {
    return this.isFailing && this.#options.now() < this.#untilMs;
  }

  failed(reason: unknown): void {
    const wasFailing = this.isFailing;
    // What failed beside the first one, or was begun before, says nothing new.
    if (this.isResting) return;
    this.#waitMs = Math.min(longestMs, this.#waitMs * 2 || firstMs);
    this.#untilMs = this.#options.now() + this.#waitMs;
    if (!wasFailing) this.#options.onChange(false, reason);
  }

  worked(): void {
    // While it rests only what was begun before ends.
    if (!this.isFailing || this.isResting) return;
    this.#waitMs = 0;
    this.#options.onChange(true, null);
  }
}
