// Which engines are left alone for a while because they fail. Looks (endpoints.ts) find those that are away; this finds those that
// say they are ready and fail what they get. Five failures in a row, or half of the last twenty, and an engine gets nothing for
// five seconds, twice as long each time again. After it, it is on trial: one failure ends it, one success clears it.
// As in Envoy's outlier detection. Never more than half of the engines are left alone (pick-endpoint.ts): when all fail, it is no
// outlier.

export type Health = {
  /** Failures since the last success. */
  readonly numFailed: number;
  /** Of the last answers, the latest last: true for a failure. */
  readonly recent: readonly boolean[];
  /** Times it was ejected without having been well for a minute. */
  readonly numEjections: number;
  /** It gets nothing until then. */
  readonly ejectedUntilMs: number;
};

export type EjectionRule = {
  /** In a row. */
  afterFailures: number;
  /** The first time. */
  ejectMs: number;
};

const windowLength = 20;
const failedShare = 0.5;
/** Twice as long each time, up to 2^6. */
const maxDoublings = 6;
/** An engine that was well for so long begins anew. */
const forgetMs = 60_000;

export const healthy: Health = { numFailed: 0, recent: [], numEjections: 0, ejectedUntilMs: 0 };

/** Its health after one more answer. `ejectedUntilMs` that differs from before says that it was ejected just now. */
export function afterAnswer(health: Health, hasFailed: boolean, nowMs: number, rule: EjectionRule): Health {
  // Answers to what it was sent before say nothing new.
  if (nowMs < health.ejectedUntilMs) return health;
  if (!hasFailed && isSpotless(health)) return health;
  const recent = [...health.recent, hasFailed].slice(-windowLength);
  if (!hasFailed) {
    const isForgiven = nowMs - health.ejectedUntilMs > forgetMs;
    return { ...health, numFailed: 0, recent, numEjections: isForgiven ? 0 : health.numEjections };
  }
  const numFailed = health.numFailed + 1;
  const isMostly =
    recent.length === windowLength && recent.filter(Boolean).length >= windowLength * failedShare;
  if (numFailed < rule.afterFailures && !isMostly) return { ...health, numFailed, recent };
  return {
    // On trial afterwards.
    numFailed: rule.afterFailures - 1,
    recent: [],
    numEjections: health.numEjections + 1,
    ejectedUntilMs: nowMs + rule.ejectMs * 2 ** Math.min(health.numEjections, maxDoublings),
  };
}

/** One more good answer would change nothing. */
function isSpotless({ numFailed, recent, numEjections }: Health): boolean {
  return (
    numFailed === 0 &&
    numEjections === 0 &&
    recent.length === windowLength &&
    recent.every((failed) => !failed)
  );
}
