// Kubernetes label selectors: which objects a selector means, by their labels. The rules are those of
// https://kubernetes.io/docs/concepts/overview/working-with-objects/labels/#label-selectors

import type { AdapterGroup, LoraAdapter, TenantSpec } from './types.ts';

export type LabelSelector = NonNullable<TenantSpec['access']['adapters']>;

/** All requirements must hold, so an empty selector selects everything. An absent one selects nothing. */
export function selects(
  selector: LabelSelector | undefined,
  labels: Readonly<Record<string, string>>,
): boolean {
  if (selector === undefined) return false;
  const { matchLabels = {}, matchExpressions = [] } = selector;
  return (
    Object.entries(matchLabels).every(([key, value]) => labelOf(labels, key) === value) &&
    matchExpressions.every((requirement) => holds(requirement, labelOf(labels, requirement.key)))
  );
}

/** Whether an adapter belongs to a group. */
export function isMember(
  { spec: group }: Pick<AdapterGroup, 'spec'>,
  { metadata, spec }: Pick<LoraAdapter, 'metadata'> & { spec: Pick<LoraAdapter['spec'], 'baseModel'> },
): boolean {
  return spec.baseModel === group.baseModel && selects(group.selector, metadata.labels ?? {});
}

type Requirement = NonNullable<LabelSelector['matchExpressions']>[number];

function holds({ operator, values = [] }: Requirement, value: string | undefined): boolean {
  switch (operator) {
    case 'In':
      return value !== undefined && values.includes(value);
    case 'NotIn':
      return value === undefined || !values.includes(value);
    case 'Exists':
      return value !== undefined;
    case 'DoesNotExist':
      return value === undefined;
    default:
      // A later version's operator: what is not understood opens nothing.
      return false;
  }
}

function labelOf(labels: Readonly<Record<string, string>>, key: string): string | undefined {
  return Object.hasOwn(labels, key) ? labels[key] : undefined;
}
