/** One pass for one BaseModel: observe, make the objects that it should have, write what is. */
import { baseModelReasons, conditionTypes } from '../crds/names.ts';
import type { BaseModel, BaseModelStatus } from '../crds/types.ts';
import { applyObject } from './apply.ts';
import { baseModelStatus } from './base-model-status.ts';
import type { Parts, ReconcileResult } from './cluster.ts';
import { conditionOf } from './conditions.ts';
import { desiredObjects, serviceName } from './desired.ts';
import { sayTaken, takenNames } from './names.ts';
import { wantedReplicas } from './on-demand.ts';

/** What the API server refused it may take later, when a quota or a webhook changed; no watch tells. */
const refusedRetryMs = 60_000;

/** @throws as `Cluster.write` */
export async function reconcileBaseModel(name: string, parts: Parts): Promise<ReconcileResult> {
  const { cluster, clock, metrics } = parts;
  const live = cluster.baseModels.get(name);
  if (live === undefined) {
    // What it owned is collected by the cluster.
    metrics.forgetBaseModel(name);
    return {};
  }
  if (live.metadata.deletionTimestamp) return {};
  const { replicas, askAgainInMs } = wantedReplicas(live, clock.date());
  const baseModel = { ...live, spec: { ...live.spec, replicas } };

  const taken = takenNames(baseModel, cluster.nameHolders);
  // A newcomer without a name gets no engines; engines that there are already are left as they are.
  const { refusals, waits } =
    taken.length > 0 ? { refusals: [], waits: [] } : await applyAll(baseModel, parts);

  const before = cluster.lastStatus('BaseModel', baseModel);
  const status = baseModelStatus({
    baseModel,
    before,
    deployment: cluster.deployments.get(name),
    pods: cluster.podsOf(name),
    report: cluster.reportOf(name),
    nameConflict: taken.length > 0 ? sayTaken(taken) : null,
    refusals,
    waits,
    now: clock.date(),
  });
  const isNews = await cluster.writeStatus('BaseModel', baseModel, status);
  if (isNews) tellTransitions(baseModel, before, status, parts);
  metrics.baseModelEngines.set({ base_model: name, state: 'ready' }, status.readyReplicas!);
  metrics.baseModelEngines.set({ base_model: name, state: 'wanted' }, baseModel.spec.replicas);
  const againMs = Math.min(
    refusals.length > 0 ? refusedRetryMs : Number.POSITIVE_INFINITY,
    askAgainInMs ?? Number.POSITIVE_INFINITY,
  );
  return Number.isFinite(againMs) ? { requeueAfterMs: againMs } : {};
}

/** @returns what was refused and what has to wait, for a person */
async function applyAll(
  baseModel: BaseModel,
  { cluster, config, log }: Parts,
): Promise<{ refusals: string[]; waits: string[] }> {
  const name = baseModel.metadata.name!;
  const { deployment, service, podDisruptionBudget } = desiredObjects(baseModel, config);
  const refusals: string[] = [];
  const waits: string[] = [];
  for (const [wish, live] of [
    [deployment, cluster.deployments.get(name)],
    [service, cluster.services.get(serviceName(name))],
    [podDisruptionBudget, cluster.podDisruptionBudgets.get(name)],
  ] as const) {
    const outcome = await applyObject(cluster, wish, live);
    if (outcome.result === 'refused') refusals.push(outcome.message);
    if (outcome.result === 'waiting') waits.push(outcome.message);
    if (outcome.result === 'applied') {
      const { kind, metadata } = wish;
      log.info({ baseModel: name, kind, name: metadata!.name, reason: outcome.reason }, 'applied');
    }
  }
  return { refusals, waits };
}

const goodReasons: string[] = [
  baseModelReasons.enginesReady,
  baseModelReasons.enginesStarting,
  baseModelReasons.scaledToZero,
  baseModelReasons.rollingOut,
  baseModelReasons.rolledOut,
];

function tellTransitions(
  baseModel: BaseModel,
  before: BaseModelStatus | undefined,
  now: BaseModelStatus,
  { cluster, log }: Parts,
): void {
  for (const type of Object.values(conditionTypes)) {
    const { reason, message } = conditionOf({ status: now }, type)!;
    if (before && conditionOf({ status: before }, type)?.reason === reason) continue;
    log.info({ baseModel: baseModel.metadata.name, condition: type, reason }, message);
    cluster.event(baseModel, goodReasons.includes(reason) ? 'Normal' : 'Warning', reason, message);
  }
}
