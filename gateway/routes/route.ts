// What an AdapterRoute says beside its targets, and which of them get requests now, as pure functions: a target on trial
// that was aborted has no share, and one that is not in memory on enough engines has none yet.

import { createHash } from 'node:crypto';
import type { AdapterRoute } from '../../crds/types.ts';
import type { AdapterList } from '../../engine/protocol.ts';
import type { WeightedTarget } from '../choose-target.ts';
import type { Endpoint } from '../endpoints.ts';

export type RouteRules = {
  /** Of the resource. */
  name: string;
  uid: string;
  generation: number;
  sticky: NonNullable<AdapterRoute['spec']['sticky']> | null;
  warmCopies: number | 'all';
  abort: NonNullable<AdapterRoute['spec']['abort']> | null;
  /** Resources that were aborted under this generation, as a gateway wrote it. */
  aborted: ReadonlySet<string>;
};

export function routeRules({ metadata, spec, status }: AdapterRoute): RouteRules {
  const aborted = status?.aborted?.filter(({ generation }) => generation === metadata.generation) ?? [];
  return {
    name: metadata.name!,
    uid: metadata.uid!,
    generation: metadata.generation!,
    sticky: spec.sticky ?? null,
    warmCopies: spec.warmCopies === 'all' ? 'all' : Number(spec.warmCopies ?? 1),
    abort: spec.abort ?? null,
    aborted: new Set(aborted.map(({ target }) => target)),
  };
}

/**
 * The weights as the steps have them: the operator says which step is taken; until it has said so for this spec, the
 * first.
 */
export function steppedWeights({ metadata, spec, status }: AdapterRoute): number[] {
  if (spec.steps === undefined) return spec.targets.map(({ weight }) => weight);
  const { step } = status ?? {};
  const index = step?.generation === metadata.generation ? (step?.index ?? 0) : 0;
  const percent = spec.steps[Math.min(index, spec.steps.length - 1)]!.percent;
  return [100 - percent, percent];
}

/** What a request is known by. */
export type Asker = {
  tenant: string | null;
  /** The field `user` of its body. */
  user: string | null;
  header(name: string): string | undefined;
};

/** Text that is the same for all requests that shall go to one target; null: each is drawn by itself. */
export function stickyKey({ uid, sticky }: RouteRules, { tenant, user, header }: Asker): string | null {
  const part = () => {
    switch (sticky?.by) {
      case 'User':
        return user;
      case 'Header':
        return header(sticky.header!) ?? null;
      case 'Tenant':
        return '';
      default:
        return null;
    }
  };
  const own = part();
  if (own === null || (sticky?.by === 'Tenant' && tenant === null)) return null;
  // A client chooses its length.
  return createHash('sha256')
    .update(JSON.stringify([uid, tenant, own]))
    .digest('hex');
}

/** How far a target is on its way into memory. */
export type Warmth = 'warm' | 'cold' | 'absent';

export function warmthOf(
  { name, baseModel, copies = 1 }: Pick<WeightedTarget, 'name' | 'baseModel' | 'copies'>,
  warmCopies: number | 'all',
  endpoints: readonly Endpoint[],
): Warmth {
  const ready = endpoints.filter((endpoint) => endpoint.isReady && endpoint.baseModel === baseModel);
  const holding = ready.filter(({ cards }) => cards.has(name));
  if (holding.length === 0) return 'absent';
  const numWarm = holding.filter((endpoint) => isInMemory(name, endpoint)).length;
  const limits = [warmCopies, copies].filter((limit) => limit !== 'all');
  return numWarm >= Math.min(ready.length, ...limits) ? 'warm' : 'cold';
}

/** A base model always is, and so is what an engine that is not ours holds: it does not say otherwise. */
export function isInMemory(name: string, { adapterList }: Endpoint): boolean {
  return adapterList === null || !namesOnDisk(adapterList).has(name);
}

const onDisk = new WeakMap<AdapterList, ReadonlySet<string>>();

/** Read off a list once: requests ask more often than engines are looked at. */
function namesOnDisk(list: AdapterList): ReadonlySet<string> {
  let names = onDisk.get(list);
  if (names === undefined) {
    names = new Set(list.data.filter(({ tier }) => tier === 'disk').flatMap((one) => one.names ?? []));
    onDisk.set(list, names);
  }
  return names;
}

/**
 * The targets with the weights that they have now.
 *
 * @param isIn  the target may have its share: it was warm once and is still held. When this is true of none that has a
 *   weight, cold ones are better than nobody.
 */
export function sharesNow(
  targets: readonly WeightedTarget[],
  isAborted: (target: WeightedTarget) => boolean,
  isIn: (target: WeightedTarget) => boolean,
): WeightedTarget[] {
  const left = targets.map((target) => (isAborted(target) ? { ...target, weight: 0 } : target));
  // Whatever was aborted answered before; the stable target may have a weight of 0.
  const kept =
    left.some(({ weight }) => weight > 0) || !targets.some(({ isStable }) => isStable)
      ? left
      : targets.map((target) => ({ ...target, weight: target.isStable === true ? 1 : 0 }));
  const warm = kept.map((target) =>
    target.weight === 0 || isIn(target) ? target : { ...target, weight: 0 },
  );
  return warm.some(({ weight }) => weight > 0) ? warm : kept;
}
