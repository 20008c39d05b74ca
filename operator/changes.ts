/**
 * Which keys a change touches. A key too many costs a look; a key too few is seen at the next resync only. Changes of a
 * status alone, most of them our own, do not touch the object's own key.
 */
import type { KubernetesObject, V1Pod } from '@kubernetes/client-node';
import { isMember } from '../crds/label-selector.ts';
import { labels } from '../crds/names.ts';
import type { AdapterGroup, AdapterRoute } from '../crds/types.ts';
import type { ReconcileKind } from './cluster.ts';
import { type Claimant, namesOf } from './names.ts';

export interface Key {
  kind: ReconcileKind;
  name: string;
}

const kinds = { BaseModel: 'base-model', AdapterRoute: 'route', AdapterGroup: 'group' } as const;

/** The key under which a resource is looked at: adapters of one base model share a pass. */
export function keyOf(claimant: Claimant): Key {
  const name = claimant.metadata.name!;
  if (claimant.kind === 'LoraAdapter') return { kind: 'adapters', name: claimant.spec.baseModel };
  return { kind: kinds[claimant.kind], name };
}

/** Without a key twice. */
export function keysOfEverything(claimants: readonly Claimant[]): Key[] {
  const keys = claimants.flatMap((one) => [
    keyOf(one),
    ...(one.kind === 'BaseModel' ? [adaptersOf(one.metadata.name!)] : []),
  ]);
  return [...new Map(keys.map((key) => [`${key.kind}/${key.name}`, key])).values()];
}

/** @param claimants  all that there are; the change is in it already */
export function keysOfClaimant(
  now: Claimant | undefined,
  before: Claimant | undefined,
  claimants: readonly Claimant[],
): Key[] {
  const both = [now, before].filter((one) => one !== undefined);
  const [{ kind, metadata }] = both as [Claimant];
  const isNamedBy = (one: Claimant): one is AdapterRoute =>
    one.kind === 'AdapterRoute' &&
    one.spec.targets.some((target) =>
      kind === 'LoraAdapter'
        ? target.adapter === metadata.name
        : kind === 'BaseModel' && target.baseModel === metadata.name,
    );
  const followers = [
    ...claimants.filter(isNamedBy).map(keyOf),
    ...claimants.filter((one) => one.kind === 'AdapterGroup' && concerns(one, both)).map(keyOf),
  ];
  if (isStatusOnly(now, before)) return [...followers, ...(hasNewSignal(now, before) ? [keyOf(now!)] : [])];

  // Engines hold what groups select.
  const engines = both.flatMap((one) =>
    one.kind === 'AdapterGroup' ? [adaptersOf(one.spec.baseModel)] : [],
  );
  return [...keysOfEverything([...both]), ...engines, ...followers, ...rivals(now, before, claimants)];
}

function adaptersOf(baseModel: string): Key {
  return { kind: 'adapters', name: baseModel };
}

/** Whether what is or was is a member of the group, or its base model. */
function concerns(group: AdapterGroup, both: readonly Claimant[]): boolean {
  return both.some((one) =>
    one.kind === 'LoraAdapter'
      ? isMember(group, one)
      : one.kind === 'BaseModel' && one.metadata.name === group.spec.baseModel,
  );
}

/** The others that claim a name that was taken or set free. */
function rivals(
  now: Claimant | undefined,
  before: Claimant | undefined,
  claimants: readonly Claimant[],
): Key[] {
  const [namesNow, namesBefore] = [now, before].map((one) => (one === undefined ? [] : namesOf(one)));
  const isSame = now?.metadata.uid === before?.metadata.uid && namesNow!.join() === namesBefore!.join();
  if (isSame) return [];
  const touched = new Set([...namesNow!, ...namesBefore!]);
  return claimants
    .filter((one) => one.metadata.uid !== now?.metadata.uid && namesOf(one).some((name) => touched.has(name)))
    .map(keyOf);
}

export function keysOfPod(now: V1Pod | undefined, before: V1Pod | undefined): Key[] {
  const names = [now, before].map((pod) => pod?.metadata?.labels?.[labels.baseModel]);
  return [...new Set(names)]
    .filter((name) => name !== undefined)
    .flatMap((name) => [
      { kind: 'base-model', name },
      { kind: 'adapters', name },
    ]);
}

/** Of a Deployment, Service or PodDisruptionBudget: its owner, and whom it stands in the way of. */
export function keysOfOwned(now: KubernetesObject | undefined, before: KubernetesObject | undefined): Key[] {
  const names = [now, before].flatMap((object) => [
    object?.metadata?.ownerReferences?.find(({ controller, kind }) => controller && kind === 'BaseModel')
      ?.name,
    object?.metadata?.labels?.[labels.baseModel],
    object?.metadata?.name,
  ]);
  return [...new Set(names)]
    .filter((name) => name !== undefined)
    .map((name) => ({ kind: 'base-model', name }));
}

/** What gateways write into a status is not our own. */
function hasNewSignal(now: Claimant | undefined, before: Claimant | undefined): boolean {
  const signalOf = (one: Claimant | undefined) =>
    one?.kind === 'AdapterRoute'
      ? JSON.stringify(one.status?.aborted)
      : // Labels decide which groups an adapter belongs to, and so on which engines it is.
        one?.kind === 'LoraAdapter'
        ? JSON.stringify([one.status?.askedAt, one.metadata.labels])
        : one?.kind === 'BaseModel'
          ? one.status?.askedAt
          : undefined;
  return signalOf(now) !== signalOf(before);
}

function isStatusOnly(now: KubernetesObject | undefined, before: KubernetesObject | undefined): boolean {
  if (now === undefined || before === undefined) return false;
  const { uid, generation, deletionTimestamp } = now.metadata!;
  const same = before.metadata!;
  return uid === same.uid && generation === same.generation && deletionTimestamp === same.deletionTimestamp;
}
