// How fast the queue is worked off, measured while somebody waits: what was sent, over the time that it took.

/** What was seen this long ago counts half. */
const halfLifeMs = 10_000;
/** Before so much was seen there is no answer. */
const minSent = 5;
const minSpanMs = 200;

export class Pace {
  #cost = 0;
  #spanMs = 0;
  #numSent = 0;
  #lastMs: number | null = null;

  /** The queue begins to wait, or has nothing to wait for any more. */
  restart(nowMs: number | null): void {
    this.#lastMs = nowMs;
  }

  /** One that waited was sent. */
  noteSent(cost: number, nowMs: number): void {
    const gapMs = this.#lastMs === null ? 0 : Math.max(0, nowMs - this.#lastMs);
    const keep = 2 ** (-gapMs / halfLifeMs);
    this.#cost = this.#cost * keep + cost;
    this.#spanMs = this.#spanMs * keep + gapMs;
    this.#numSent++;
    this.#lastMs = nowMs;
  }

  /** Until so much work has been sent; null: not measured yet. */
  msFor(work: number): number | null {
    if (this.#numSent < minSent || this.#spanMs < minSpanMs) return null;
    return (work * this.#spanMs) / this.#cost;
  }
}
