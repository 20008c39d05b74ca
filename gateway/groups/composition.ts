// Who answers a request that names several adapters itself, each with a weight: all of them at once, as of a group. The caller
// needs the right to each.

import {
  formatAdapters,
  formatMerge,
  type MergeRule,
  type Problem,
  type WeightedName,
} from '../../engine/protocol.ts';
import type { WeightedTarget } from '../choose-target.ts';
import { GatewayError } from '../errors.ts';
import type { Target } from '../resolve-model.ts';

export type WeightedMember = { target: Target; weight: number };

const maxNames = 256;
const sharedName = 'composition';

/** What compositions are called in metrics, logs and lengths: after their adapters, up to a bound, and further ones share a name. */
export class CompositionNames {
  readonly #names = new Set<string>();

  /** @param adapters  that are there: what a client made up becomes no label */
  nameOf(adapters: readonly string[]): string {
    const name = joined(adapters);
    if (this.#names.size < maxNames) this.#names.add(name);
    return this.#names.has(name) ? name : sharedName;
  }

  /** The same, and nothing is kept: null when there was no such composition yet. */
  find(adapters: readonly string[]): string | null {
    const name = joined(adapters);
    return this.#names.has(name) ? name : null;
  }
}

function joined(adapters: readonly string[]): string {
  return [...adapters].sort().join('+');
}

/**
 * @param members  at least one
 * @param merge  how they are merged; undefined: they are a sum
 * @throws invalid_value when no engine can have them all, or one is no single adapter
 */
export function compositionTarget(
  members: readonly WeightedMember[],
  merge: MergeRule | undefined,
  names: CompositionNames,
): WeightedTarget {
  const [first, ...others] = [...members].sort((a, b) => (a.target.name < b.target.name ? -1 : 1));
  const { baseModel, parent } = first!.target;
  const stranger = others.find(({ target }) => target.baseModel !== baseModel || target.parent !== parent);
  if (stranger !== undefined) {
    const pair = `${first!.target.name} and ${stranger.target.name} have two`;
    throw refusal(`expected adapters of one base model, but ${pair}`);
  }
  const all = [first!, ...others];
  const target = together(names.nameOf(all.map(({ target }) => target.name)), all);
  return merge === undefined ? target : { ...target, merge };
}

/** Who has the same KV is called the same. */
export function voiceOf(
  name: string,
  members: readonly WeightedName[] | undefined,
  merge: MergeRule | undefined,
): string {
  if (members === undefined) return name;
  return formatAdapters(members) + (merge === undefined ? '' : ` ${formatMerge(merge)}`);
}

/** One target of all of them, which have one base: it needs what each of them needs. @param members  at least one */
export function together(name: string, members: readonly WeightedMember[]): WeightedTarget {
  const { baseModel, parent } = members[0]!.target;
  const asks = new Map(
    members.flatMap(({ target }) => (target.asks ?? []).map((ask) => [`${ask.kind}/${ask.name}`, ask])),
  );
  return {
    name,
    baseModel,
    ...(parent !== undefined && { parent }),
    weight: 1,
    members: members.map(({ target, weight }) => ({ name: target.name, weight })),
    ...(members.some(({ target }) => target.isHopeless) && { isHopeless: true }),
    ...(asks.size > 0 && { asks: [...asks.values()] }),
  };
}

/** @param adapters  as engine/protocol.ts read them */
export function acceptAdapters(adapters: WeightedName[] | Problem): WeightedName[] {
  if (Array.isArray(adapters)) return adapters;
  const { at, expected, got } = adapters;
  throw refusal(`expected ${expected}, got ${got}`, at);
}

export function refusal(message: string, at = ''): GatewayError {
  return new GatewayError('invalid_value', `adapters${at}: ${message}`, { param: 'adapters' });
}
