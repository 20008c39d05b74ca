// How many tokens a request will probably cost, before it is known which engine and which target answers. What was estimated
// wrongly is put right when it has ended.

import type { Directory } from '../directory.ts';
import type { CompositionNames } from '../groups/composition.ts';
import type { Asked } from '../openai.ts';
import type { LengthPredictor } from '../queue/length-predictor.ts';

export type EstimateParts = {
  directory: Pick<Directory, 'targetsOf'>;
  lengths: Pick<LengthPredictor, 'predict'>;
  compositionNames: Pick<CompositionNames, 'find'>;
};

/** Lengths are learned by who answers, and nobody has this name. */
const nobody = '';

/**
 * Tokens of all its answers. For a route the mean over its targets, each as often as it gets requests. For adapters that answer together
 * what their composition gave before, and of a new one as much as the longest of them gives alone. Of what the caller may not use it
 * tells nothing: limits that are left show the estimate.
 *
 * @throws group_too_large
 */
export function estimateAnswer(
  { model, adapters, maxTokens, numChoices }: Asked,
  promptTokens: number,
  caller: string | null,
  { directory, lengths, compositionNames }: EstimateParts,
): number {
  const of = (name: string) => lengths.predict(name, promptTokens, maxTokens, numChoices);
  const ofModel = (name: string) => {
    const targets = (directory.targetsOf(name, caller) ?? []).filter(({ weight }) => weight > 0);
    const total = targets.reduce((sum, { weight }) => sum + weight, 0);
    if (total === 0) return of(nobody);
    return Math.ceil(targets.reduce((sum, { name, weight }) => sum + weight * of(name), 0) / total);
  };
  if (adapters === undefined) return ofModel(model);
  const names = adapters.map(({ name }) => name);
  const mayUseAll = names.every((name) => directory.targetsOf(name, caller) !== null);
  const known = mayUseAll ? compositionNames.find(names) : null;
  return known === null ? Math.max(...names.map(ofModel)) : of(known);
}
