// What became of a target's requests lately, and whether that is too bad. The window is kept in slices, so that it is
// bounded however many requests come; a time to the first token is kept as its place on a ladder of steps of 5 %.

import type { RouteRules } from './route.ts';

/** Of a request that an engine was asked: whether it failed, and when its first token came, if it was streamed. */
export type Judged = { isError: boolean; ttftMs: number | null };

type Slice = { index: number; requests: number; errors: number; ladder: Map<number, number> };

const numSlices = 12;
const stepFactor = 1.05;

export class OutcomeWindow {
  readonly #sliceMs: number;
  #slices: Slice[] = [];

  constructor(windowSeconds: number) {
    this.#sliceMs = (windowSeconds * 1000) / numSlices;
  }

  note({ isError, ttftMs }: Judged, nowMs: number): void {
    const index = Math.floor(nowMs / this.#sliceMs);
    let slice = this.#slices.at(-1);
    if (slice === undefined || slice.index < index) {
      slice = { index, requests: 0, errors: 0, ladder: new Map() };
      this.#slices.push(slice);
      this.#slices = this.#slices.filter((one) => one.index > index - numSlices);
    }
    slice.requests += 1;
    if (isError) slice.errors += 1;
    if (ttftMs !== null) {
      const rung = Math.ceil(Math.log(Math.max(1, ttftMs)) / Math.log(stepFactor) - 1e-9);
      slice.ladder.set(rung, (slice.ladder.get(rung) ?? 0) + 1);
    }
  }

  /** @returns sums over the window; `p95TtftMs` is at most 5 % too high, and null when nothing was streamed */
  sum(nowMs: number): { requests: number; errors: number; streams: number; p95TtftMs: number | null } {
    const oldest = Math.floor(nowMs / this.#sliceMs) - numSlices;
    const slices = this.#slices.filter(({ index }) => index > oldest);
    const ladder = new Map<number, number>();
    for (const slice of slices) {
      for (const [rung, count] of slice.ladder) ladder.set(rung, (ladder.get(rung) ?? 0) + count);
    }
    const total = (key: 'requests' | 'errors') => slices.reduce((sum, slice) => sum + slice[key], 0);
    const streams = [...ladder.values()].reduce((sum, count) => sum + count, 0);
    return { requests: total('requests'), errors: total('errors'), streams, p95TtftMs: p95(ladder, streams) };
  }
}

function p95(ladder: ReadonlyMap<number, number>, streams: number): number | null {
  let left = Math.ceil(0.95 * streams);
  for (const [rung, count] of [...ladder].sort(([a], [b]) => a - b)) {
    left -= count;
    if (left <= 0) return stepFactor ** rung;
  }
  return null;
}

/** What is too bad about it, for a person; null: nothing, or too little is known. */
export function whyAbort(
  window: OutcomeWindow,
  { maxErrorPercent, maxTtftMs, minRequests, windowSeconds }: NonNullable<RouteRules['abort']>,
  nowMs: number,
): string | null {
  const { requests, errors, streams, p95TtftMs } = window.sum(nowMs);
  const during = `within ${windowSeconds} s`;
  const errorPercent = (100 * errors) / requests;
  if (maxErrorPercent !== undefined && requests >= minRequests && errorPercent > maxErrorPercent) {
    return `${errors} of ${requests} requests failed ${during}, ${errorPercent.toFixed(1)} %; at most ${maxErrorPercent} % may`;
  }
  if (
    maxTtftMs !== undefined &&
    streams >= minRequests &&
    p95TtftMs !== null &&
    p95TtftMs > maxTtftMs * stepFactor
  ) {
    return `the first token of 95 of 100 streams came after ${Math.round(p95TtftMs)} ms ${during} (${streams} streams); at most ${maxTtftMs} ms is allowed`;
  }
  return null;
}
