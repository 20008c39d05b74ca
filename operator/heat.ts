/**
 * How much each adapter is asked for: requests per minute over the last ten or so, kept per digest and decayed, as powers of
 * two. Placement moves copies for it, so it must not tremble: a level is left only when the rate is a quarter of a
 * level beyond its border. It lives in memory alone; a new operator starts cold and learns within minutes.
 */

/** Time in which what was counted fades to 1/e. */
const fadeMs = 10 * 60_000;
/** In levels, that is powers of two. */
const reluctance = 0.25;

interface Count {
  /** Unix seconds; another one is another load. */
  since: number;
  requests: number;
}

interface Rate {
  /** Requests, faded. */
  value: number;
  atMs: number;
  level: number;
}

export class Heat {
  readonly #counts = new Map<string, Map<string, Count>>();
  readonly #rates = new Map<string, Rate>();

  /** Takes in what an engine said. @param engine of one life: another life counts from 0 */
  observe(
    engine: string,
    adapters: readonly { digest: string; since: number; requests: number }[],
    nowMs: number,
  ): void {
    const before = this.#counts.get(engine);
    this.#counts.set(
      engine,
      new Map(adapters.map(({ digest, since, requests }) => [digest, { since, requests }])),
    );
    // What was counted before the first look was counted over an unknown time.
    if (before === undefined) return;
    for (const { digest, since, requests } of adapters) {
      const last = before.get(digest);
      const isSameLoad = last?.since === since && last.requests <= requests;
      this.#add(digest, isSameLoad ? requests - last.requests : requests, nowMs);
    }
  }

  /** 0 for what is asked for less than about once a minute, then 2, 4, 8, … requests per minute. */
  of(digest: string, nowMs: number): number {
    const rate = this.#rates.get(digest);
    if (rate === undefined) return 0;
    fade(rate, nowMs);
    const exact = Math.log2(1 + rate.value / (fadeMs / 60_000));
    if (exact >= rate.level + 1 + reluctance || exact < rate.level - reluctance)
      rate.level = Math.floor(exact);
    return rate.level === 0 ? 0 : 2 ** rate.level;
  }

  /** Forgets engines that are not there any more, and what has faded. */
  retain(engines: ReadonlySet<string>, nowMs: number): void {
    for (const engine of [...this.#counts.keys()]) if (!engines.has(engine)) this.#counts.delete(engine);
    for (const [digest, rate] of this.#rates) {
      fade(rate, nowMs);
      if (rate.value < 0.5) this.#rates.delete(digest);
    }
  }

  #add(digest: string, requests: number, nowMs: number): void {
    if (requests === 0) return;
    const rate = this.#rates.get(digest) ?? { value: 0, atMs: nowMs, level: 0 };
    fade(rate, nowMs);
    rate.value += requests;
    this.#rates.set(digest, rate);
  }
}

function fade(rate: Rate, nowMs: number): void {
  rate.value *= Math.exp((rate.atMs - nowMs) / fadeMs);
  rate.atMs = nowMs;
}
