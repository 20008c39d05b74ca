/**
 * The status of an AdapterGroup from what is known about its members (pure). Who may use which of them is not the operator's to
 * know: gateways compose, to each tenant its own.
 */
import { conditionTypes, adapterGroupReasons as reasons } from '../crds/names.ts';
import type { AdapterGroup, AdapterGroupStatus } from '../crds/types.ts';
import { type Finding, setCondition } from './conditions.ts';

export interface Member {
  name: string;
  /** That hold it. */
  pods: readonly string[];
  /** It is on no engine while nobody asks, and that is well. */
  isOnDemand: boolean;
}

export interface Findings {
  baseModelExists: boolean;
  /** By name. */
  members: readonly Member[];
  nameConflict: string | null;
  now: Date;
}

type Verdict = Pick<Finding, 'status' | 'reason' | 'message'>;

/** As many names as the status has room for. */
const maxShown = 100;

export function groupStatus(
  group: AdapterGroup,
  before: AdapterGroupStatus | undefined,
  findings: Findings,
): AdapterGroupStatus {
  const { members, now } = findings;
  const observedGeneration = group.metadata.generation!;
  const ready = { type: conditionTypes.ready, ...isServed(group, findings), observedGeneration };
  const bounded = { type: conditionTypes.bounded, ...isBounded(group, members.length), observedGeneration };
  return {
    observedGeneration,
    members: `${members.filter(isHeld).length}/${members.length}`,
    adapters: members.slice(0, maxShown).map(({ name }) => name),
    conditions: setCondition(setCondition(before?.conditions, ready, now), bounded, now),
  };
}

function isServed(
  { spec: { baseModel } }: AdapterGroup,
  { baseModelExists, members, nameConflict }: Findings,
): Verdict {
  const no = (reason: string, message: string): Verdict => ({ status: 'False', reason, message });
  if (nameConflict !== null) {
    return no(reasons.nameConflict, `${nameConflict}. Take another name, or delete the other resource.`);
  }
  if (!baseModelExists) {
    return no(reasons.baseModelNotFound, `There is no BaseModel ${baseModel} in this namespace.`);
  }
  if (members.length === 0) {
    return no(reasons.noMembers, `No LoraAdapter of ${baseModel} has the labels that the selector wants.`);
  }
  const absent = members.filter((member) => !isHeld(member) && !member.isOnDemand);
  const rest = 'Tenants that may use it get an error until then.';
  if (absent.length > 0) {
    const names = absent.slice(0, maxShown).map(({ name }) => name);
    return no(reasons.memberNotReady, `No engine holds ${names.join(', ')}; its conditions say why. ${rest}`);
  }
  const held = members.filter(isHeld);
  if (held.length > 0 && !held[0]!.pods.some((pod) => held.every(({ pods }) => pods.includes(pod)))) {
    return no(
      reasons.memberNotReady,
      `No engine holds all ${held.length} members yet. Tenants that may use members of several engines get an error until then.`,
    );
  }
  return { status: 'True', reason: reasons.membersReady, message: 'An engine holds every member' };
}

function isBounded({ spec: { maxMembers } }: AdapterGroup, numMembers: number): Verdict {
  if (numMembers <= maxMembers) {
    const message = `A request composes at most ${maxMembers} adapters, and the group has ${numMembers}`;
    return { status: 'True', reason: reasons.withinBound, message };
  }
  return {
    status: 'False',
    reason: reasons.tooManyMembers,
    message: `A request composes at most ${maxMembers} adapters, and the group has ${numMembers}. Tenants that may use more than ${maxMembers} of them are refused; narrow their access or the selector.`,
  };
}

function isHeld({ pods }: Member): boolean {
  return pods.length > 0;
}
