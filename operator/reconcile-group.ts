/** One pass for one AdapterGroup: which adapters it selects, and whether an engine can compose them. */
import { isMember } from '../crds/label-selector.ts';
import { conditionTypes, adapterGroupReasons as reasons } from '../crds/names.ts';
import type { AdapterGroup } from '../crds/types.ts';
import type { Cluster, Parts, ReconcileResult } from './cluster.ts';
import { conditionOf } from './conditions.ts';
import { groupStatus, type Member } from './group-status.ts';
import { sayTaken, takenNames } from './names.ts';

/** @throws as `Cluster.write` */
export async function reconcileGroup(name: string, { cluster, clock, log }: Parts): Promise<ReconcileResult> {
  const group = cluster.adapterGroups.get(name);
  if (group === undefined || group.metadata.deletionTimestamp) return {};
  const taken = takenNames(group, cluster.nameHolders);
  const before = cluster.lastStatus('AdapterGroup', group);
  const status = groupStatus(group, before, {
    baseModelExists: cluster.baseModels.get(group.spec.baseModel) !== undefined,
    members: membersOf(group, cluster),
    nameConflict: taken.length > 0 ? sayTaken(taken) : null,
    now: clock.date(),
  });
  if (!(await cluster.writeStatus('AdapterGroup', group, status))) return {};
  for (const [type, good] of [
    [conditionTypes.ready, reasons.membersReady],
    [conditionTypes.bounded, reasons.withinBound],
  ] as const) {
    const { reason, message } = conditionOf({ status }, type)!;
    const last = before && conditionOf({ status: before }, type)?.reason;
    if (last === reason || (last === undefined && reason === reasons.withinBound)) continue;
    log.info({ group: name, reason }, message);
    cluster.event(group, reason === good ? 'Normal' : 'Warning', reason, message);
  }
  return {};
}

function membersOf(group: AdapterGroup, cluster: Cluster): Member[] {
  return cluster.loraAdapters
    .list()
    .filter((adapter) => isMember(group, adapter) && !adapter.metadata.deletionTimestamp)
    .map((adapter) => ({
      name: adapter.metadata.name!,
      pods: (cluster.lastStatus('LoraAdapter', adapter)?.placements ?? []).map(({ pod }) => pod),
      // It comes when somebody asks.
      isOnDemand: adapter.spec.onDemand !== undefined,
    }))
    .sort((a, b) => (a.name < b.name ? -1 : 1));
}
