/** One pass for one AdapterRoute: which of its targets an engine holds, and what share of the requests each gets. */
import { conditionTypes, adapterRouteReasons as reasons } from '../crds/names.ts';
import type { AdapterRoute } from '../crds/types.ts';
import type { Cluster, Parts, ReconcileResult } from './cluster.ts';
import { conditionOf } from './conditions.ts';
import { sayTaken, takenNames } from './names.ts';
import { routeStatus, type Target } from './route-status.ts';

/** @throws as `Cluster.write` */
export async function reconcileRoute(name: string, { cluster, clock, log }: Parts): Promise<ReconcileResult> {
  const route = cluster.adapterRoutes.get(name);
  if (route === undefined || route.metadata.deletionTimestamp) return {};
  const taken = takenNames(route, cluster.nameHolders);
  const before = cluster.lastStatus('AdapterRoute', route);
  const nameConflict = taken.length > 0 ? sayTaken(taken) : null;
  // What gateways wrote is in the live copy, also when our own last write is newer than it.
  const known = { ...before, ...(route.status?.aborted && { aborted: route.status.aborted }) };
  const { status, nextStepInMs } = routeStatus(
    route,
    known,
    targetsOf(route, cluster),
    nameConflict,
    clock.date(),
  );
  const result: ReconcileResult = nextStepInMs === null ? {} : { requeueAfterMs: nextStepInMs };
  if (!(await cluster.writeStatus('AdapterRoute', route, status))) return result;

  if (status.step && before?.step?.index !== status.step.index) {
    const message = `Step ${status.step.index + 1} of ${route.spec.steps!.length}: ${status.summary}`;
    log.info({ route: name }, message);
    cluster.event(route, 'Normal', 'StepTaken', message);
  }
  const { reason, message } = conditionOf({ status }, conditionTypes.ready)!;
  if (before && conditionOf({ status: before }, conditionTypes.ready)?.reason === reason) return result;
  log.info({ route: name, reason }, message);
  cluster.event(route, reason === reasons.targetsReady ? 'Normal' : 'Warning', reason, message);
  return result;
}

function targetsOf({ spec }: AdapterRoute, cluster: Cluster): Target[] {
  return spec.targets.map(({ adapter, baseModel, weight }) => {
    if (adapter !== undefined) {
      const found = cluster.loraAdapters.get(adapter);
      const { placements = [], desiredCopies = 1 } =
        (found && cluster.lastStatus('LoraAdapter', found)) ?? {};
      const asked = spec.warmCopies === 'all' ? desiredCopies : Number(spec.warmCopies);
      return {
        name: adapter,
        weight,
        exists: found !== undefined,
        isReady: placements.length > 0,
        numWarm: placements.filter(({ tier }) => tier !== 'disk').length,
        numToWarm: Math.min(asked, desiredCopies),
      };
    }
    const found = cluster.baseModels.get(baseModel!);
    const numReady = (found && cluster.lastStatus('BaseModel', found)?.readyReplicas) ?? 0;
    const isReady = numReady > 0;
    return { name: baseModel!, weight, exists: found !== undefined, isReady, numWarm: 1, numToWarm: 1 };
  });
}
