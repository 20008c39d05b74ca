/**
 * The status of an AdapterRoute from what is known about its targets (pure): which get requests and which share, which step
 * is taken, and why the route is not as its spec wants it. The gateways share requests out by the same rules; what they wrote
 * about targets that were too bad is in the status already.
 */
import { conditionTypes, adapterRouteReasons as reasons } from '../crds/names.ts';
import type { AdapterRoute, AdapterRouteStatus } from '../crds/types.ts';
import { type Finding, seconds, setCondition } from './conditions.ts';

export interface Target {
  name: string;
  weight: number;
  exists: boolean;
  /** An engine holds it. */
  isReady: boolean;
  /** Engines that have it in memory, of those that must before it gets requests. */
  numWarm: number;
  numToWarm: number;
}

type Step = NonNullable<AdapterRouteStatus['step']>;
type Verdict = Pick<Finding, 'status' | 'reason' | 'message'>;

interface Judged extends Target {
  abortedFor: string | null;
  /** It may have its share: it is in memory, or was and is still held. */
  isIn: boolean;
}

/** @returns the status, and when the next step is due */
export function routeStatus(
  route: AdapterRoute,
  before: AdapterRouteStatus | undefined,
  targets: readonly Target[],
  nameConflict: string | null,
  now: Date,
): { status: AdapterRouteStatus; nextStepInMs: number | null } {
  const generation = route.metadata.generation!;
  const judged = targets.map((target) => judge(target, before, generation));
  const { step, nextStepInMs } = takeStep(route, before, judged, now);
  const weighted = weigh(route, step, judged);
  const shares = sharesOf(weighted);
  const shown = weighted.map(({ name, weight, isReady }, index) => ({
    name,
    weight,
    percent: Math.round(shares[index]!),
    ready: isReady,
  }));
  const finding: Finding = {
    type: conditionTypes.ready,
    ...isServed(weighted, nameConflict),
    observedGeneration: generation,
  };
  const status = {
    observedGeneration: generation,
    summary: shown
      .map(({ name, percent }, index) =>
        weighted[index]!.abortedFor === null ? `${name} ${percent}%` : `${name} aborted`,
      )
      .join(', '),
    targets: shown,
    ...(step && { step }),
    conditions: setCondition(before?.conditions, finding, now),
  };
  return { status, nextStepInMs };
}

function judge(target: Target, before: AdapterRouteStatus | undefined, generation: number): Judged {
  const { name, isReady, numWarm, numToWarm } = target;
  const aborted = before?.aborted?.find((one) => one.target === name && one.generation === generation);
  const hadShare = before?.targets?.some((one) => one.name === name && one.ready && one.percent > 0) ?? false;
  return {
    ...target,
    abortedFor: aborted?.message ?? null,
    isIn: isReady && (numWarm >= numToWarm || hadShare),
  };
}

/** A step lasts its time once the second target can take its share; one that was aborted goes nowhere. */
function takeStep(
  { spec, metadata }: AdapterRoute,
  before: AdapterRouteStatus | undefined,
  [, second]: readonly Judged[],
  now: Date,
): { step: Step | null; nextStepInMs: number | null } {
  if (spec.steps === undefined || second === undefined) return { step: null, nextStepInMs: null };
  const begun = (index: number): Step => ({ index, since: seconds(now), generation: metadata.generation! });
  const known = before?.step?.generation === metadata.generation ? before?.step : undefined;
  const step = known ?? begun(0);
  const { percent, minutes } = spec.steps[step.index] ?? spec.steps.at(-1)!;
  if (step.index >= spec.steps.length - 1 || second.abortedFor !== null) return { step, nextStepInMs: null };
  // The clock of a step that cannot be taken stands.
  if (percent > 0 && !second.isIn) return { step: known ? begun(step.index) : step, nextStepInMs: null };
  const leftMs = new Date(step.since).getTime() + minutes * 60_000 - now.getTime();
  if (leftMs > 0) return { step, nextStepInMs: leftMs };
  const next = spec.steps[step.index + 1]!;
  const isLast = step.index + 1 >= spec.steps.length - 1;
  return { step: begun(step.index + 1), nextStepInMs: isLast ? null : next.minutes * 60_000 };
}

function weigh({ spec }: AdapterRoute, step: Step | null, targets: readonly Judged[]): Judged[] {
  if (step === null || spec.steps === undefined) return [...targets];
  const { percent } = spec.steps[step.index] ?? spec.steps.at(-1)!;
  return targets.map((target, index) => ({ ...target, weight: index === 0 ? 100 - percent : percent }));
}

/** In percent. Targets that are cold get none while another one is warm. */
function sharesOf(targets: readonly Judged[]): number[] {
  const isTaken = (target: Judged) => target.isReady && target.abortedFor === null;
  const hasWarm = targets.some((target) => target.weight > 0 && isTaken(target) && target.isIn);
  const weights = targets.map((target) => (isTaken(target) && (target.isIn || !hasWarm) ? target.weight : 0));
  // When all that had a weight were aborted, the first answers.
  if (weights.every((weight) => weight === 0) && targets.some(({ abortedFor }) => abortedFor !== null)) {
    return targets.map((target, index) => (index === 0 && target.isReady ? 100 : 0));
  }
  const total = weights.reduce((sum, weight) => sum + weight, 0);
  return weights.map((weight) => (total > 0 ? (100 * weight) / total : 0));
}

function isServed(targets: readonly Judged[], nameConflict: string | null): Verdict {
  const no = (reason: string, message: string) => ({ status: 'False', reason, message }) as const;
  if (nameConflict !== null) {
    return no(reasons.nameConflict, `${nameConflict}. Take another name, or delete the other resource.`);
  }
  const weighted = targets.filter(({ weight }) => weight > 0);
  const names = (of: readonly Target[]) => of.map(({ name }) => name).join(', ');
  const rest = weighted.some(({ isReady }) => isReady)
    ? 'Its share goes to the other targets.'
    : 'Requests get an error until one is there.';
  const missing = weighted.filter(({ exists }) => !exists);
  if (missing.length > 0) {
    return no(reasons.targetNotFound, `There is no ${names(missing)} in this namespace. ${rest}`);
  }
  const aborted = targets.find(({ abortedFor }) => abortedFor !== null);
  if (aborted !== undefined) {
    const why = `${aborted.name} was aborted: ${aborted.abortedFor}.`;
    return no(reasons.targetAborted, `${why} Its share goes to the other targets until the spec changes.`);
  }
  const absent = weighted.filter(({ isReady }) => !isReady);
  if (absent.length > 0) {
    return no(reasons.targetNotReady, `No engine holds ${names(absent)}; its conditions say why. ${rest}`);
  }
  const cold = weighted.find(({ isIn }) => !isIn);
  if (cold !== undefined) {
    const have = `${cold.numWarm} of ${cold.numToWarm} copies of ${cold.name} are in memory`;
    return no(reasons.targetWarming, `${have}. It gets its share when all are.`);
  }
  return { status: 'True', reason: reasons.targetsReady, message: 'An engine holds every target' };
}
