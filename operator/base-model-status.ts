/**
 * The status of a BaseModel from what is known about it. Conditions answer two questions: does it serve as it should
 * (Ready), and is something still changing (Progressing). The checks of each are an ordered list; the first that has
 * something to say is the reason.
 */
import type { V1Deployment, V1Pod } from '@kubernetes/client-node';
import { conditionTypes, baseModelReasons as reasons } from '../crds/names.ts';
import type { BaseModel, BaseModelStatus } from '../crds/types.ts';
import { type EnginesReport, isReady } from './cluster.ts';
import { type Finding, setCondition } from './conditions.ts';
import { selectorOf } from './desired.ts';
import { type PodTrouble, troubleOf } from './pod-trouble.ts';

export interface Observed {
  baseModel: BaseModel;
  /** The newest status that is known. */
  before: BaseModelStatus | undefined;
  deployment: V1Deployment | undefined;
  /** All pods of the base model. */
  pods: readonly V1Pod[];
  /** Undefined when engines were not asked yet. */
  report: EnginesReport | undefined;
  /** Another resource has its name: a sentence about it. */
  nameConflict: string | null;
  /** What could not be applied, and why. */
  refusals: readonly string[];
  /** What could not be applied yet, and why. */
  waits: readonly string[];
  now: Date;
}

type Verdict = Pick<Finding, 'status' | 'reason' | 'message'>;

interface Engines {
  wanted: number;
  /** A request may bring more. */
  isOnDemand: boolean;
  ready: number;
  troubles: { name: string; trouble: PodTrouble }[];
}

/** Pods whose trouble is told in a condition; the others are counted. All are in status.pods. */
const maxPodsTold = 3;

export function baseModelStatus(observed: Observed): BaseModelStatus {
  const { baseModel, before, report, now } = observed;
  const { name, generation } = baseModel.metadata;
  const pods = observed.pods.filter(isCounted).toSorted((a, b) => (nameOf(a) < nameOf(b) ? -1 : 1));
  const troubles = pods.map((pod) => ({ name: nameOf(pod), trouble: troubleOf(pod) }));
  const engines: Engines = {
    wanted: baseModel.spec.replicas,
    isOnDemand: baseModel.spec.onDemand !== undefined,
    ready: pods.filter(isReady).length,
    troubles: troubles.filter((one): one is Engines['troubles'][number] => one.trouble !== null),
  };
  const finding = (type: string, verdict: Verdict): Finding => ({
    type,
    ...verdict,
    observedGeneration: generation!,
  });
  const readyFinding = finding(conditionTypes.ready, isServing(observed, engines));
  const progressFinding = finding(conditionTypes.progressing, isChanging(observed));
  return {
    observedGeneration: generation!,
    replicas: pods.length,
    readyReplicas: engines.ready,
    selector: Object.entries(selectorOf(name!))
      .map(([label, value]) => `${label}=${value}`)
      .join(),
    engines: `${Math.min(engines.ready, engines.wanted)}/${engines.wanted}`,
    ...adaptersAndMemory(before, report),
    pods: pods.map((pod, index) => podStatus(pod, troubles[index]!.trouble, before, report)),
    conditions: setCondition(setCondition(before?.conditions, readyFinding, now), progressFinding, now),
  };
}

/** Evicted and ended pods are no engines any more, and those that end take no requests. */
function isCounted({ metadata, status }: V1Pod): boolean {
  return !metadata!.deletionTimestamp && status?.phase !== 'Failed' && status?.phase !== 'Succeeded';
}

function isServing({ nameConflict, refusals, deployment }: Observed, engines: Engines): Verdict {
  const { wanted, isOnDemand, ready, troubles } = engines;
  const no = (reason: string, message: string): Verdict => ({ status: 'False', reason, message });
  if (nameConflict !== null) {
    const advice = 'Delete one of the two; the name of a base model cannot be changed.';
    return no(reasons.nameConflict, `${nameConflict}. ${advice}`);
  }
  if (refusals.length > 0) return no(reasons.applyRefused, refusals.join('; '));
  if (wanted === 0) {
    const more = isOnDemand ? ', and nobody asked lately; a request wakes it' : '';
    return no(reasons.scaledToZero, `replicas is 0${more}`);
  }
  if (ready >= wanted) {
    return {
      status: 'True',
      reason: reasons.enginesReady,
      message: `${wanted} of ${wanted} engines take requests`,
    };
  }
  const start = `${ready} of ${wanted} engines take requests. `;
  const failing = troubles.filter(({ trouble }) => trouble.kind === 'failing');
  if (failing.length > 0) return no(reasons.engineFailing, start + tell(failing));
  const pending = troubles.filter(({ trouble }) => trouble.kind === 'pending');
  if (pending.length > 0) return no(reasons.podsPending, start + tell(pending));
  const failure = deployment?.status?.conditions?.find(({ type }) => type === 'ReplicaFailure');
  if (failure?.status === 'True') return no(reasons.podsPending, start + failure.message!);
  const missing = troubles.length > 0 ? tell(troubles) : 'Pods are being made.';
  return no(reasons.enginesStarting, start + missing);
}

function isChanging({ baseModel, deployment, nameConflict, refusals, waits }: Observed): Verdict {
  if (nameConflict !== null) return { status: 'False', reason: reasons.nameConflict, message: nameConflict };
  if (refusals.length > 0) {
    return { status: 'False', reason: reasons.applyRefused, message: refusals.join('; ') };
  }
  const wanted = baseModel.spec.replicas;
  const {
    observedGeneration = 0,
    replicas = 0,
    updatedReplicas = 0,
    availableReplicas = 0,
  } = deployment?.status ?? {};
  const changing = (message: string): Verdict => ({ status: 'True', reason: reasons.rollingOut, message });
  if (waits.length > 0) return changing(waits.join('; '));
  if (deployment === undefined || observedGeneration < deployment.metadata!.generation!) {
    return changing('the Deployment changes');
  }
  if (updatedReplicas < wanted)
    return changing(`${updatedReplicas} of ${wanted} pods are of the newest version`);
  if (replicas > updatedReplicas) return changing(`${replicas - updatedReplicas} former pods are to end`);
  if (availableReplicas < updatedReplicas) {
    return changing(`${availableReplicas} of ${updatedReplicas} pods of the newest version are ready`);
  }
  return { status: 'False', reason: reasons.rolledOut, message: `${wanted} pods, all of the newest version` };
}

/** E.g. `llama-7d9-abc: prepares its weights; llama-7d9-def: ...; and 4 more`. */
function tell(troubles: Engines['troubles']): string {
  const told = troubles.slice(0, maxPodsTold).map(({ name, trouble }) => `${name}: ${trouble.message}`);
  if (troubles.length > maxPodsTold) told.push(`and ${troubles.length - maxPodsTold} more`);
  return told.join('; ');
}

/** As the engines said; as it was, until they are asked: an operator that was just started knows nothing new. */
function adaptersAndMemory(
  before: BaseModelStatus | undefined,
  report: EnginesReport | undefined,
): Pick<BaseModelStatus, 'adapters' | 'memory'> {
  if (report === undefined) {
    return {
      ...(before?.adapters !== undefined && { adapters: before.adapters }),
      ...(before?.memory && { memory: before.memory }),
    };
  }
  const memory = { totalBytes: 0, adapterBytes: 0 };
  for (const { totalBytes, adapterBytes } of report.engines.values()) {
    memory.totalBytes += totalBytes;
    memory.adapterBytes += adapterBytes;
  }
  return { adapters: `${report.copies.ready}/${report.copies.wanted}`, memory };
}

function podStatus(
  pod: V1Pod,
  trouble: PodTrouble | null,
  before: BaseModelStatus | undefined,
  report: EnginesReport | undefined,
): NonNullable<BaseModelStatus['pods']>[number] {
  const name = nameOf(pod);
  const held =
    report === undefined ? before?.pods?.find((one) => one.name === name) : report.engines.get(name);
  return {
    name,
    ...(pod.spec?.nodeName && { node: pod.spec.nodeName }),
    ready: trouble === null,
    ...(held?.adapters !== undefined && { adapters: held.adapters, adapterBytes: held.adapterBytes ?? 0 }),
    ...(trouble && { message: trouble.message }),
  };
}

function nameOf(pod: V1Pod): string {
  return pod.metadata!.name!;
}
