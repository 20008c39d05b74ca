import { expect, test } from 'vitest';
import type { WeightedTarget } from '../../../gateway/choose-target.ts';
import { CompositionNames } from '../../../gateway/groups/composition.ts';
import type { Asked } from '../../../gateway/openai.ts';
import { LengthPredictor } from '../../../gateway/queue/length-predictor.ts';
import { estimateAnswer } from '../../../gateway/quota/estimate.ts';

const target = (name: string, weight = 1): WeightedTarget => ({ name, baseModel: 'base', weight });

/** Names that mean something to the caller; `hidden` has answered too, and is another tenant's. */
const targets: Record<string, WeightedTarget[]> = {
  short: [target('short')],
  long: [target('long')],
  route: [target('short', 90), target('long', 10)],
  'route that begins with what listens': [target('long', 0), target('short', 1)],
  'route without targets': [],
};

function parts() {
  const lengths = new LengthPredictor();
  // The middles of their buckets, 6 and 768.
  for (let i = 0; i < 10; i++) {
    lengths.note('short', 10, 5);
    for (const name of ['long', 'hidden']) lengths.note(name, 10, 600);
  }
  const directory = { targetsOf: (name: string) => targets[name] ?? null };
  return { directory, lengths, compositionNames: new CompositionNames() };
}

function asked(fields: Partial<Asked>): Asked {
  return { model: 'short', maxTokens: null, numChoices: 1, isStream: false, user: null, ...fields };
}

const together = (...names: string[]) => ({
  model: 'whatever',
  adapters: names.map((name) => ({ name, weight: 1 })),
});

test.each<[string, Partial<Asked>, number]>([
  ['an adapter', { model: 'short' }, 6],
  ['an adapter, two answers', { model: 'short', numChoices: 2 }, 12],
  ['an adapter that is cut short', { model: 'long', maxTokens: 100 }, 100],
  ['a route, by the shares of its targets', { model: 'route' }, 83],
  ['a route, without a target that gets no requests', { model: 'route that begins with what listens' }, 6],
  ['a route that nobody answers', { model: 'route without targets' }, 128],
  ['a new composition, by the longest of its adapters', together('short', 'long'), 768],
  ["a name that is not the caller's, as one that nobody has", { model: 'hidden' }, 128],
  ['a composition with such a name', together('short', 'hidden'), 128],
])('expects of %s', (_, fields, tokens) => {
  expect(estimateAnswer(asked(fields), 10, 'a', parts())).toBe(tokens);
});

test('expects of a composition what it gave before, if the caller may still use it', () => {
  const all = parts();
  const names = [
    all.compositionNames.nameOf(['long', 'short']),
    all.compositionNames.nameOf(['hidden', 'short']),
  ];
  for (const name of names) for (let i = 0; i < 10; i++) all.lengths.note(name, 10, 20);
  expect(estimateAnswer(asked(together('short', 'long')), 10, 'a', all)).toBe(24);
  expect(estimateAnswer(asked(together('short', 'hidden')), 10, 'a', all)).toBe(128);
});
