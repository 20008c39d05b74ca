// Which engine gets a request, of those that hold its model: the one that is done with it first, by a guess. The guess is a sum of
// costs, all in tokens that an engine computes, so that they can be weighed against each other and shown:
//
//   work     what it has been sent, by whomever, and has not ended
//   prompt   what of the prompt it has to compute: all but what its KV probably has
//   room     the KV that it lacks: others have to end first
//   load     what it could compute while it brings the adapter to its device
//
// Before that, engines are left out that have no room, that fail (health.ts), and that are hot: an engine may have so many requests
// in flight more than its share, whoever sent them and whatever it has in memory (consistent hashing with bounded loads, Mirrokni et al., 2018). Of
// equals the one that waited longest for a turn. Affinity with a guard on load as in Preble (Srivatsa et al., 2024).
//
// A pure function over plain numbers; router.ts collects them.

export const routingRules = ['affinity', 'least-load', 'round-robin'] as const;
export type RoutingRule = (typeof routingRules)[number];

export type Candidate = {
  /** Requests that this gateway sent, and those that others did by the engine's word. */
  inFlight: number;
  othersInFlight: number;
  /** Tokens of what it was sent and has not ended. */
  workTokens: number;
  /** Tokens of KV that it lacks for this request until others have ended. */
  lackTokens: number;
  /** Of this prompt, those that its KV probably has. */
  cachedTokens: number;
  /** What it could compute in the time that the adapter takes to be on its device; 0 when it is there. */
  loadTokens: number;
  /** Its share of requests: 1, less while it is new. Above 0. */
  weight: number;
  /** It fails and gets nothing before that; 0 or past: it is well. */
  ejectedUntilMs: number;
  /** Number of the pick that was its last; 0: it never was picked. */
  lastTurn: number;
};

export type PickSettings = {
  rule: RoutingRule;
  /** Of this gateway's requests. */
  maxInFlight: number;
  /** Requests in flight that an engine may have, over its share of all. At least 1. */
  maxLoadFactor: number;
};

/**
 * Why this one and no other:
 * - `only`      no other had room and was well
 * - `prefix`    it probably has KV of the prompt, more than the others
 * - `adapter`   it has the adapter on its device, or nearer to it than another
 * - `bounded`   a cheaper one was hot
 * - `load`      it has the least to do, or the rule asks for nothing else
 * - `turn`      it was its turn
 */
export type PickReason = 'only' | 'prefix' | 'adapter' | 'bounded' | 'load' | 'turn';
export const pickReasons: readonly PickReason[] = ['only', 'prefix', 'adapter', 'bounded', 'load', 'turn'];

/** So many in flight are no heat: they fit one batch, and moving one costs its KV. */
const coolInFlight = 4;

/**
 * The candidate to use, or null when all are full: the request waits.
 *
 * @param promptTokens  of this request
 */
export function pickEndpoint<C extends Candidate>(
  promptTokens: number,
  candidates: readonly C[],
  settings: PickSettings,
  nowMs: number,
): { picked: C; reason: PickReason } | null {
  const open = leaveOutEjected(candidates, nowMs).filter(({ inFlight }) => inFlight < settings.maxInFlight);
  const [first] = open;
  if (first === undefined) return null;
  if (open.length === 1) return { picked: first, reason: 'only' };

  const byTurn = (a: C, b: C) => a.lastTurn - b.lastTurn;
  if (settings.rule === 'round-robin') return { picked: least(open, byTurn), reason: 'turn' };
  if (settings.rule === 'least-load') {
    const byLoad = (a: C, b: C) => allInFlight(a) / a.weight - allInFlight(b) / b.weight;
    const picked = least(open, (a, b) => byLoad(a, b) || byTurn(a, b));
    return { picked, reason: open.every((one) => byLoad(one, picked) === 0) ? 'turn' : 'load' };
  }

  const cost = ({ workTokens, lackTokens, cachedTokens, loadTokens, weight }: C) =>
    (workTokens + lackTokens + promptTokens - cachedTokens) / weight + loadTokens;
  const byCost = (a: C, b: C) => cost(a) - cost(b) || byTurn(a, b);
  const cheapest = least(open, byCost);
  const isCool = boundOn(open, settings.maxLoadFactor);
  if (!isCool(cheapest)) return { picked: least(open.filter(isCool), byCost), reason: 'bounded' };
  return { picked: cheapest, reason: reasonOf(cheapest, open) };
}

/** Those that fail, but at most half of all: the ones whose time is over first are asked again. */
function leaveOutEjected<C extends Candidate>(candidates: readonly C[], nowMs: number): readonly C[] {
  const ejected = candidates.filter(({ ejectedUntilMs }) => ejectedUntilMs > nowMs);
  if (ejected.length === 0) return candidates;
  const left = new Set(
    ejected
      .toSorted((a, b) => b.ejectedUntilMs - a.ejectedUntilMs)
      .slice(0, Math.floor(candidates.length / 2)),
  );
  return candidates.filter((one) => !left.has(one));
}

/** Whether one may get one more. At least one may: the bounds together are more than all that is in flight. */
function boundOn<C extends Candidate>(open: readonly C[], maxLoadFactor: number): (one: C) => boolean {
  const numInFlight = sum(open.map(allInFlight)) + 1;
  const weights = sum(open.map(({ weight }) => weight));
  return (one) =>
    allInFlight(one) <
    Math.max(coolInFlight, Math.ceil((maxLoadFactor * numInFlight * one.weight) / weights));
}

function allInFlight({ inFlight, othersInFlight }: Candidate): number {
  return inFlight + othersInFlight;
}

function reasonOf<C extends Candidate>(picked: C, open: readonly C[]): PickReason {
  const others = open.filter((one) => one !== picked);
  if (others.every(({ cachedTokens }) => picked.cachedTokens > cachedTokens)) return 'prefix';
  if (others.some(({ loadTokens }) => picked.loadTokens < loadTokens)) return 'adapter';
  if (picked.cachedTokens > 0 && others.some(({ cachedTokens }) => picked.cachedTokens > cachedTokens)) {
    return 'prefix';
  }
  const busyness = ({ workTokens, lackTokens }: C) => workTokens + lackTokens;
  return others.every((one) => busyness(one) === busyness(picked)) ? 'turn' : 'load';
}

function least<T>(items: readonly T[], compare: (a: T, b: T) => number): T {
  return items.reduce((best, one) => (compare(one, best) < 0 ? one : best));
}

function sum(numbers: readonly number[]): number {
  return numbers.reduce((a, b) => a + b, 0);
}
