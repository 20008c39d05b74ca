// Who answers to the name that a request asks for.

import { chooseTarget, type WeightedTarget } from '../choose-target.ts';
import type { Directory } from '../directory.ts';
import { GatewayError } from '../errors.ts';
import type { Forward } from '../forward.ts';
import type { CompositionNames } from '../groups/composition.ts';
import { modelNotFound } from '../openai.ts';
import { mayAppear, notServed, resolveModel, type Target } from '../resolve-model.ts';
import { type Asker, stickyKey } from '../routes/route.ts';
import type { Routes } from '../routes/routes.ts';
import type { Facts } from './arrival.ts';

export type FindParts = {
  directory: Directory;
  forward: Pick<Forward, 'endpoints'>;
  /** Which targets of AdapterRoutes get requests, and what becomes of that. */
  routes: Routes;
  compositionNames: CompositionNames;
};

/**
 * Who may answer to this name for this caller. A name that means nothing may be one that is let in when it is asked for.
 *
 * @param param  where the client named it
 * @throws model_not_found, and what Directory.targetsOf and autoLoad throw
 */
export async function lookUp(
  name: string,
  caller: string | null,
  directory: Directory,
  param = 'model',
): Promise<readonly WeightedTarget[]> {
  if (directory.targetsOf(name, caller) === null) await directory.autoLoad(name, caller);
  const targets = directory.targetsOf(name, caller);
  if (targets === null) throw modelNotFound(name, param);
  return targets;
}

/**
 * Who answers to this name. What no engine is known to hold may have been loaded a moment ago: look once more before
 * saying so. `facts` get names that a resource or an engine said, never what a client typed, so they may become labels of
 * metrics.
 */
export async function findTarget(
  model: string,
  facts: Pick<Facts, 'tenant' | 'model' | 'target'>,
  { directory, forward, routes }: FindParts,
  asker: Asker,
): Promise<WeightedTarget> {
  const targets = await lookUp(model, facts.tenant ?? null, directory);
  const [first] = targets;
  if (first === undefined || first.baseModel !== null) facts.model = model;
  if (first === undefined) {
    throw new GatewayError('model_unavailable', 'none of the targets of this route exists', {
      param: 'model',
    });
  }

  const { endpoints } = forward;
  const resolve = (target: Target) => resolveModel(target, endpoints.all, Date.now());
  const rules = directory.rulesOf(model);
  const draw = (rules && stickyKey(rules, asker)) ?? Math.random();
  const shares = () => (rules === null ? targets : routes.sharesOf(rules, targets, Date.now()));
  const choose = () => chooseTarget(shares(), (target) => resolve(target).kind === 'served', draw);
  let target: WeightedTarget | null = choose();
  if (target === null) {
    await lookAgain(targets, endpoints);
    target = choose();
  }
  const { kind } = resolve(target ?? first);
  if (kind !== 'unknown' && kind !== 'no_engine') facts.model = model;
  // Nobody holds it; if it may appear, admission waits for it.
  target ??= chooseTarget(shares(), mayAppear, draw);
  if (target === null) throw notServed(model, first, kind === 'served' ? 'unknown' : kind);
  facts.target = target.name;
  if (target.asks !== undefined) directory.ask(target.asks);
  return target;
}

/** Looks once more at the engines that could hold them. */
export async function lookAgain(targets: readonly Target[], endpoints: Forward['endpoints']): Promise<void> {
  const baseModels = new Set(targets.map(({ baseModel }) => baseModel));
  // Without BaseModels nothing tells engines apart.
  await endpoints.refresh(baseModels.has(null) ? null : baseModels);
}
