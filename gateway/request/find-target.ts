// Who answers to the name that a request asks for.

import { chooseTarget, type WeightedTarget } from '../choose-target.ts';
import type { Directory } from '../directory.ts';
import { GatewayError } from '../errors.ts';
import type { Forward } from '../forward.ts';
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
};

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
  const caller = facts.tenant ?? null;
  if (directory.targetsOf(model, caller) === null) await directory.autoLoad(model, caller);
  const targets = directory.targetsOf(model, caller);
  if (targets === null) throw modelNotFound(model);
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
    await endpoints.refresh(baseModelsOf(targets));
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

/** Null when there are no BaseModels to tell engines apart. */
function baseModelsOf(targets: readonly Target[]): Set<string | null> | null {
  const names = new Set(targets.map(({ baseModel }) => baseModel));
  return names.has(null) ? null : names;
}
