// Who answers a request that names several adapters with weights.

import type { MergeRule, WeightedName } from '../../engine/protocol.ts';
import type { WeightedTarget } from '../choose-target.ts';
import { GatewayError } from '../errors.ts';
import { compositionTarget, refusal } from '../groups/composition.ts';
import { modelNotFound } from '../openai.ts';
import { mayAppear, notServed, resolveModel, type Target } from '../resolve-model.ts';
import type { Facts } from './arrival.ts';
import { type FindParts, lookAgain, lookUp } from './find-target.ts';

/** Where a client names them. */
const param = 'adapters';

/**
 * The right to each adapter is looked up anew. `facts` get names that a resource or an engine said, as those of findTarget.
 *
 * @throws model_not_found naming the adapter, invalid_value, model_unavailable
 */
export async function findComposition(
  adapters: readonly WeightedName[],
  merge: MergeRule | undefined,
  facts: Pick<Facts, 'tenant' | 'model' | 'target'>,
  { directory, forward, compositionNames }: FindParts,
): Promise<WeightedTarget> {
  const { endpoints } = forward;
  const caller = facts.tenant ?? null;
  const find = async (name: string, at: string): Promise<Target> => {
    const [target] = await lookUp(name, caller, directory, param);
    const isBase = endpoints.all.some(({ cards }) => cards.get(name)?.parent === null);
    if (target === undefined || isBase || target.members !== undefined || directory.rulesOf(name) !== null)
      throw refusal('expected an adapter, got the name of a base model, a route or a group', at);
    return target;
  };
  const members: { target: Target; weight: number }[] = [];
  for (const [index, { name, weight }] of adapters.entries())
    members.push({ target: await find(name, `[${index}].name`), weight });
  const target = compositionTarget(members, merge, compositionNames);
  const kindOf = (one: Target) => resolveModel(one, endpoints.all, Date.now()).kind;
  if (kindOf(target) !== 'served') await lookAgain([target], endpoints);
  const unknown = members.find((member) => kindOf(member.target) === 'unknown' && !mayAppear(member.target));
  if (unknown !== undefined) throw modelNotFound(unknown.target.name, param);
  facts.model = target.name;
  facts.target = target.name;
  const kind = kindOf(target);
  const { merge: _, ...sum } = target;
  if (kind === 'unknown' && merge !== undefined && kindOf(sum) === 'served') {
    const message =
      'adapters_merge: expected none, since none of the engines that have the adapters merges any';
    throw new GatewayError('invalid_value', message, { param: 'adapters_merge' });
  }
  if (kind !== 'served' && !mayAppear(target)) throw notServed(target.name, target, kind);
  if (target.asks !== undefined) directory.ask(target.asks);
  return target;
}
