// Who answers to the name of an AdapterGroup: the adapters of the group that the caller may use, all of them at once. The group
// gives no right to an adapter, and none of what the caller may use is left out: an engine that cannot compose all of it, or a
// bound that is too small, is an error and not a poorer answer. One adapter a domain of access, composed when it is asked for, as
// in AdapterSwap (Fleshman et al., 2024).

import { isMember, type LabelSelector, selects } from '../../crds/label-selector.ts';
import type { AdapterGroup, LoraAdapter } from '../../crds/types.ts';
import {
  adaptersHeader,
  formatAdapters,
  formatMerge,
  mergeHeader,
  modelHeader,
} from '../../engine/protocol.ts';
import type { WeightedTarget } from '../choose-target.ts';
import { GatewayError } from '../errors.ts';
import type { Target } from '../resolve-model.ts';
import { together } from './composition.ts';

/** An adapter that the group selects. */
export type Member = { labels: Readonly<Record<string, string>>; target: Target };

export type GroupRules = Pick<AdapterGroup['spec'], 'weights' | 'maxMembers' | 'merge'> & {
  /** By name. */
  members: readonly Member[];
};

/** What is asked of an adapter to know of which groups it is. */
export type GroupedAdapter = Pick<LoraAdapter, 'metadata'> & { spec: Pick<LoraAdapter['spec'], 'baseModel'> };

/** @param targetOf  null for an adapter of which no name is its own */
export function groupRules(
  group: Pick<AdapterGroup, 'spec'>,
  loraAdapters: readonly GroupedAdapter[],
  targetOf: (adapter: string) => Target | undefined,
): GroupRules {
  const { weights, maxMembers, merge } = group.spec;
  const members = loraAdapters
    .filter((adapter) => isMember(group, adapter))
    .flatMap(({ metadata }) => {
      const target = targetOf(metadata.name!);
      return target === undefined ? [] : [{ labels: metadata.labels ?? {}, target }];
    })
    .sort((a, b) => (a.target.name < b.target.name ? -1 : 1));
  return { weights, maxMembers, ...(merge && { merge }), members };
}

/** @param adapters  what selects the adapters that the caller may use; null: it may use all */
export function membersFor({ members }: GroupRules, adapters: LabelSelector | undefined | null): Member[] {
  return members.filter(({ labels }) => adapters === null || selects(adapters, labels));
}

/** A request cannot compose them, and does not choose among them. */
export function isTooLarge({ maxMembers }: GroupRules, members: readonly Member[]): boolean {
  return members.length > maxMembers;
}

/**
 * @param name     of the group
 * @param members  those that the caller may use, at least one
 * @throws group_too_large
 */
export function groupTarget(name: string, group: GroupRules, members: readonly Member[]): WeightedTarget {
  const { weights, maxMembers, merge } = group;
  if (isTooLarge(group, members)) {
    const message = `model: expected a group of which you may use at most ${maxMembers} adapters, got ${members.length}`;
    throw new GatewayError('group_too_large', message, { param: 'model' });
  }
  const weight = weights === 'equal' ? 1 / members.length : 1;
  const target = together(
    name,
    members.map(({ target }) => ({ target, weight })),
  );
  // One alone is itself.
  if (merge === undefined || members.length === 1) return target;
  const { method, densityPercent, majoritySign } = merge;
  return { ...target, merge: { method, density: densityPercent / 100, majoritySign } };
}

/** The headers that tell an engine who is to answer, where the name in the body does not. */
export function whoAnswers(model: string, { name, members, merge }: Target): Record<string, string> {
  if (members !== undefined)
    return {
      [adaptersHeader]: formatAdapters(members),
      ...(merge !== undefined && { [mergeHeader]: formatMerge(merge) }),
    };
  return name === model ? {} : { [modelHeader]: name };
}
