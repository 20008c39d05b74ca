// Conditions of a status: what holds, since when, and why. `lastTransitionTime` changes with `status` alone, so that it
// answers "since when" although reason and message were worded anew.

import type { Condition } from '../crds/names.ts';

/** What a reconcile found out about a condition. */
export type Finding = Omit<Condition, 'lastTransitionTime'>;

/** API servers take no longer message than this in their own conditions; people read less. */
const maxMessageLength = 4096;

/** @returns the conditions with `finding` in the place of the one of its type, or at the end */
export function setCondition(
  existing: readonly Condition[] | undefined,
  finding: Finding,
  now: Date,
): Condition[] {
  const before = existing?.find(({ type }) => type === finding.type);
  const { message, ...rest } = finding;
  const condition: Condition = {
    ...rest,
    message: message.length > maxMessageLength ? `${message.slice(0, maxMessageLength - 3)}...` : message,
    lastTransitionTime: before?.status === finding.status ? before.lastTransitionTime : seconds(now),
  };
  if (before === undefined) return [...(existing ?? []), condition];
  return existing!.map((one) => (one === before ? condition : one));
}

/** @returns the conditions without the one of that type */
export function withoutCondition(existing: readonly Condition[], type: string): Condition[] {
  return existing.filter((condition) => condition.type !== type);
}

export function conditionOf(
  object: { status?: { conditions?: Condition[] } },
  type: string,
): Condition | undefined {
  return object.status?.conditions?.find((condition) => condition.type === type);
}

/** RFC 3339 without fractions, as Kubernetes writes `metav1.Time`. */
export function seconds(date: Date): string {
  return `${date.toISOString().slice(0, 19)}Z`;
}
