// What a requested model name stands for, as a pure function of what the engines last said of themselves.
// An engine that left is remembered for a while: its models are then "away" (503, come back), not "unknown" (404).

import type { Endpoint } from './endpoints.ts';

export type Resolution =
  /** These engines have the model and are ready. At least one. */
  | { kind: 'served'; endpoints: Endpoint[] }
  /** Only engines that are away had it when they were last seen. */
  | { kind: 'away' }
  /** No engine was seen so far, so nothing can be said about any name. */
  | { kind: 'no_engine' }
  | { kind: 'unknown' };

/** For how long an engine that is away keeps its models from being called unknown. */
export const rememberMs = 10 * 60_000;

export function resolveModel(name: string, endpoints: readonly Endpoint[], nowMs: number): Resolution {
  const seen = endpoints.filter(({ lastSeenMs }) => lastSeenMs !== null && nowMs - lastSeenMs <= rememberMs);
  const having = seen.filter(({ cards }) => cards.has(name));
  const ready = having.filter(({ isReady }) => isReady);

  if (ready.length > 0) return { kind: 'served', endpoints: ready };
  if (having.length > 0) return { kind: 'away' };
  return seen.length === 0 ? { kind: 'no_engine' } : { kind: 'unknown' };
}
