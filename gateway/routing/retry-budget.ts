// How much may be asked again. A retry is work twice; if every request of a bad minute were asked again, the engines that are left
// would drown. Each request adds a share of a retry, each retry takes one, and a few are there from the start so that a quiet
// gateway can retry at all. As in Finagle. Copies that are sent before anything has failed (hedge.ts) have a budget of their own, which
// nothing but requests fills: it can wait, a failed request cannot.

/** Retries that may be saved up: what a burst of failures, such as an engine's death, may take at once. */
const maxSaved = 100;
const savedAtStart = 10;
/** Of itself, so that few requests have retries too. */
const perSecond = 1;

/** Copies that may be saved up. */
const maxCopiesSaved = 10;

/** At most `share` copies a request, whatever the time. */
export class CopyBudget {
  readonly #share: number;
  #saved = 0;

  constructor(share: number) {
    this.#share = share;
  }

  noteRequest(): void {
    this.#saved = Math.min(maxCopiesSaved, this.#saved + this.#share);
  }

  /** True when there is one, which is then taken. */
  take(): boolean {
    // Shares are sums of fractions.
    if (this.#saved < 1 - 1e-9) return false;
    this.#saved = Math.max(0, this.#saved - 1);
    return true;
  }
}

export class RetryBudget {
  readonly #share: number;
  #saved = savedAtStart;
  #atMs: number | null = null;

  /** @param share  retries that a request adds; 0.2 lets one in five be asked again */
  constructor(share: number) {
    this.#share = share;
  }

  noteRequest(): void {
    this.#saved = Math.min(maxSaved, this.#saved + this.#share);
  }

  /** True when there is one, which is then taken. */
  take(nowMs: number): boolean {
    const seconds = (nowMs - (this.#atMs ?? nowMs)) / 1000;
    this.#atMs = nowMs;
    this.#saved = Math.min(Math.max(this.#saved, savedAtStart), this.#saved + seconds * perSecond);
    if (this.#saved < 1) return false;
    this.#saved -= 1;
    return true;
  }
}
