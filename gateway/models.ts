// What names clients may use and what they stand for, as pure functions of the resources: BaseModels, LoraAdapters,
// AdapterRoutes and AdapterGroups share one space of names. Of two resources with one name the older has it; the operator keeps the same
// rule. What a tenant may not use does not exist for it.

import { type LabelSelector, selects } from '../crds/label-selector.ts';
import { conditionTypes, loraAdapterReasons, servedNameOf, servedNamesOf } from '../crds/names.ts';
import type { AdapterGroup, AdapterRoute, BaseModel, LoraAdapter, TenantSpec } from '../crds/types.ts';
import type { WeightedTarget } from './choose-target.ts';
import { type GroupRules, groupRules, groupTarget, isTooLarge, membersFor } from './groups/group.ts';
import type { OnDemand } from './on-demand/ask-writer.ts';
import { type RouteRules, routeRules, steppedWeights } from './routes/route.ts';

export type Resources = {
  baseModels: readonly BaseModel[];
  loraAdapters: readonly LoraAdapter[];
  adapterRoutes: readonly AdapterRoute[];
  adapterGroups: readonly AdapterGroup[];
};

/** What a name stands for. */
export type Model = {
  /** The name that clients use. */
  name: string;
  kind: 'baseModel' | 'adapter' | 'route' | 'group';
  /** Of its resource. */
  labels: Readonly<Record<string, string>>;
  /** Unix seconds. */
  created: number;
  /** Served name of the base that all its targets share; null for a base, and for a route over several. */
  parent: string | null;
  /** Who may answer: one for a base and an adapter; for a route those that exist, perhaps none; for a group it depends on who asks. */
  targets: WeightedTarget[];
  /** Of a route. */
  rules?: RouteRules;
  group?: GroupRules;
};

type Named = BaseModel | LoraAdapter | AdapterRoute | AdapterGroup;

/** Served name -> what it stands for. */
export function buildModels({
  baseModels,
  loraAdapters,
  adapterRoutes,
  adapterGroups,
}: Resources): Map<string, Model> {
  const owners = ownersOfNames([
    ...baseModels.map((resource) => ({ resource, names: [servedNameOf(resource)] })),
    ...loraAdapters.map((resource) => ({ resource, names: servedNamesOf(resource) })),
    ...[...adapterRoutes, ...adapterGroups].map((resource) => ({
      resource,
      names: [servedNameOf(resource)],
    })),
  ]);
  const ownedBy = (resource: Named, names: string[]) => names.filter((name) => owners.get(name) === resource);

  const models = new Map<string, Model>();
  const targetOfBase = new Map<string, WeightedTarget>();
  const targetOfAdapter = new Map<string, WeightedTarget>();
  const wakes = new Map(baseModels.map((resource) => [resource.metadata.name!, onDemandOf(resource)]));
  for (const resource of baseModels) {
    const baseModel = resource.metadata.name!;
    for (const name of ownedBy(resource, [servedNameOf(resource)])) {
      const target = { name, baseModel, weight: 1, ...asksOf(wakes.get(baseModel)) };
      targetOfBase.set(baseModel, target);
      models.set(name, { ...common(resource, name), kind: 'baseModel', parent: null, targets: [target] });
    }
  }
  const parentOf = (baseModel: string | null) => targetOfBase.get(baseModel ?? '')?.name ?? null;
  for (const resource of loraAdapters) {
    const { baseModel } = resource.spec;
    for (const name of ownedBy(resource, servedNamesOf(resource))) {
      const target = {
        ...{ name, baseModel, weight: 1 },
        ...(isHopeless(resource) && { isHopeless: true }),
        ...asksOf(wakes.get(baseModel), onDemandOf(resource)),
      };
      // The first of its names is as good as any: engines know the adapter by each.
      if (!targetOfAdapter.has(resource.metadata.name!)) targetOfAdapter.set(resource.metadata.name!, target);
      const parent = parentOf(baseModel);
      models.set(name, { ...common(resource, name), kind: 'adapter', parent, targets: [target] });
    }
  }
  const copiesOf = new Map(loraAdapters.map(({ metadata, spec }) => [metadata.name!, copies(spec.copies)]));
  for (const resource of adapterRoutes) {
    const weights = steppedWeights(resource);
    for (const name of ownedBy(resource, [servedNameOf(resource)])) {
      const targets = resource.spec.targets.flatMap(({ adapter, baseModel, shadowPercent }, index) => {
        const target =
          adapter === undefined ? targetOfBase.get(baseModel ?? '') : targetOfAdapter.get(adapter);
        if (target === undefined) return [];
        return [
          {
            ...target,
            weight: weights[index]!,
            resource: adapter ?? baseModel!,
            copies: copiesOf.get(adapter ?? '') ?? 1,
            isStable: index === 0,
            ...(shadowPercent > 0 && { shadowPercent }),
          },
        ];
      });
      const bases = new Set(targets.map(({ baseModel }) => baseModel));
      const parent = bases.size === 1 ? parentOf([...bases][0]!) : null;
      const rules = routeRules(resource);
      models.set(name, { ...common(resource, name), kind: 'route', parent, targets, rules });
    }
  }
  for (const resource of adapterGroups) {
    const parent = parentOf(resource.spec.baseModel);
    for (const name of ownedBy(resource, [servedNameOf(resource)])) {
      const group = groupRules(resource, loraAdapters, (adapter) => targetOfAdapter.get(adapter));
      models.set(name, { ...common(resource, name), kind: 'group', parent, targets: [], group });
    }
  }
  return models;
}

function onDemandOf({ kind, metadata, spec }: BaseModel | LoraAdapter): OnDemand | undefined {
  return spec.onDemand && { kind, name: metadata.name!, idleMinutes: spec.onDemand.idleMinutes };
}

function asksOf(...resources: (OnDemand | undefined)[]): Pick<WeightedTarget, 'asks'> {
  const asks = resources.filter((one) => one !== undefined);
  return asks.length === 0 ? {} : { asks };
}

function copies(said: LoraAdapter['spec']['copies']): number | 'all' {
  return said === 'all' ? 'all' : Number(said);
}

const hopelessReasons: ReadonlySet<string | undefined> = new Set([
  loraAdapterReasons.refused,
  loraAdapterReasons.digestMismatch,
  loraAdapterReasons.claimNotMounted,
  loraAdapterReasons.baseModelNotFound,
]);

export function isHopeless({ status }: LoraAdapter): boolean {
  return hopelessReasons.has(status?.conditions?.find(({ type }) => type === conditionTypes.ready)?.reason);
}

/** Whether a tenant with this access sees, lists and calls the model. */
export function mayUse(access: TenantSpec['access'], { kind, labels, group }: Model): boolean {
  switch (kind) {
    case 'baseModel':
      return selects(access.baseModels, labels);
    case 'adapter':
      return selects(access.adapters, labels);
    case 'route':
      return selects(access.routes, labels);
    case 'group':
      return selects(access.groups, labels) && membersFor(group!, access.adapters).length > 0;
  }
}

/**
 * Who may answer for a caller that may use the model.
 *
 * @param adapters  what selects the adapters that the caller may use; null: it may use all
 * @throws group_too_large
 */
export function targetsFor(
  { name, targets, group }: Model,
  adapters: LabelSelector | undefined | null,
): readonly WeightedTarget[] {
  return group === undefined ? targets : [groupTarget(name, group, membersFor(group, adapters))];
}

/** The model with those targets; a group of which the caller may use too much stays without. */
export function seenBy(model: Model, adapters: LabelSelector | undefined | null): Model {
  const { name, group } = model;
  if (group === undefined) return model;
  const members = membersFor(group, adapters);
  return isTooLarge(group, members) ? model : { ...model, targets: [groupTarget(name, group, members)] };
}

function ownersOfNames(claims: { resource: Named; names: string[] }[]): Map<string, Named> {
  const owners = new Map<string, Named>();
  for (const { resource, names } of claims.sort((a, b) => byAge(a.resource, b.resource))) {
    for (const name of names) if (!owners.has(name)) owners.set(name, resource);
  }
  return owners;
}

/** Oldest first; of those made in one second, the one with the lesser uid. */
export function byAge(a: Pick<Named, 'metadata'>, b: Pick<Named, 'metadata'>): number {
  const [left, right] = [a.metadata, b.metadata];
  return createdMs(a) - createdMs(b) || (left.uid! < right.uid! ? -1 : Number(left.uid! > right.uid!));
}

function common({ metadata }: Named, name: string): Pick<Model, 'name' | 'labels' | 'created'> {
  return { name, labels: metadata.labels ?? {}, created: Math.floor(createdMs({ metadata }) / 1000) };
}

/** The type says Date; JSON from the API server has RFC 3339 text. */
function createdMs({ metadata }: Pick<Named, 'metadata'>): number {
  return new Date(metadata.creationTimestamp ?? 0).getTime();
}
