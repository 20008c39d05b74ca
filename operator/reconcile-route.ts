/** One pass for one AdapterRoute: which of its targets an engine holds, and what share of the requests each gets. */
import { conditionTypes, adapterRouteReasons as reasons } from '../crds/names.ts';
import type { AdapterRoute, AdapterRouteStatus } from '../crds/types.ts';
import type { Cluster, Parts, ReconcileResult } from './cluster.ts';
import { conditionOf, type Finding, setCondition } from './conditions.ts';
import { sayTaken, takenNames } from './names.ts';

export interface Target {
  name: string;
  weight: number;
  exists: boolean;
  /** An engine holds it. */
  isReady: boolean;
}

/** @throws as `Cluster.write` */
export async function reconcileRoute(name: string, { cluster, clock, log }: Parts): Promise<ReconcileResult> {
  const route = cluster.adapterRoutes.get(name);
  if (route === undefined || route.metadata.deletionTimestamp) return {};
  const taken = takenNames(route, cluster.nameHolders);
  const before = cluster.lastStatus('AdapterRoute', route);
  const nameConflict = taken.length > 0 ? sayTaken(taken) : null;
  const status = routeStatus(route, before, targetsOf(route, cluster), nameConflict, clock.date());
  if (!(await cluster.writeStatus('AdapterRoute', route, status))) return {};

  const { reason, message } = conditionOf({ status }, conditionTypes.ready)!;
  if (before && conditionOf({ status: before }, conditionTypes.ready)?.reason === reason) return {};
  log.info({ route: name, reason }, message);
  cluster.event(route, reason === reasons.targetsReady ? 'Normal' : 'Warning', reason, message);
  return {};
}

function targetsOf({ spec }: AdapterRoute, cluster: Cluster): Target[] {
  return spec.targets.map(({ adapter, baseModel, weight }) => {
    if (adapter !== undefined) {
      const found = cluster.loraAdapters.get(adapter);
      const placements = found && cluster.lastStatus('LoraAdapter', found)?.placements;
      return { name: adapter, weight, exists: found !== undefined, isReady: (placements?.length ?? 0) > 0 };
    }
    const found = cluster.baseModels.get(baseModel!);
    const numReady = (found && cluster.lastStatus('BaseModel', found)?.readyReplicas) ?? 0;
    return { name: baseModel!, weight, exists: found !== undefined, isReady: numReady > 0 };
  });
}

/** Pure. */
export function routeStatus(
  route: AdapterRoute,
  before: AdapterRouteStatus | undefined,
  targets: readonly Target[],
  nameConflict: string | null,
  now: Date,
): AdapterRouteStatus {
  const { generation } = route.metadata;
  const total = targets.reduce((sum, { weight, isReady }) => sum + (isReady ? weight : 0), 0);
  const shown = targets.map(({ name, weight, isReady }) => ({
    name,
    weight,
    percent: isReady && total > 0 ? Math.round((100 * weight) / total) : 0,
    ready: isReady,
  }));
  const finding: Finding = {
    type: conditionTypes.ready,
    ...isServed(targets, nameConflict),
    observedGeneration: generation!,
  };
  return {
    observedGeneration: generation!,
    summary: shown.map(({ name, percent }) => `${name} ${percent}%`).join(', '),
    targets: shown,
    conditions: setCondition(before?.conditions, finding, now),
  };
}

function isServed(
  targets: readonly Target[],
  nameConflict: string | null,
): Pick<Finding, 'status' | 'reason' | 'message'> {
  const no = (reason: string, message: string) => ({ status: 'False', reason, message }) as const;
  if (nameConflict !== null) {
    return no(reasons.nameConflict, `${nameConflict}. Take another name, or delete the other resource.`);
  }
  const weighted = targets.filter(({ weight }) => weight > 0);
  const names = (of: Target[]) => of.map(({ name }) => name).join(', ');
  const rest = weighted.some(({ isReady }) => isReady)
    ? 'Its share goes to the other targets.'
    : 'Requests get an error until one is there.';
  const missing = weighted.filter(({ exists }) => !exists);
  if (missing.length > 0) {
    return no(reasons.targetNotFound, `There is no ${names(missing)} in this namespace. ${rest}`);
  }
  const absent = weighted.filter(({ isReady }) => !isReady);
  if (absent.length > 0) {
    return no(reasons.targetNotReady, `No engine holds ${names(absent)}; its conditions say why. ${rest}`);
  }
  return { status: 'True', reason: reasons.targetsReady, message: 'An engine holds every target' };
}
