import { expect, test } from 'vitest';
import { type LabelSelector, selects } from '../../crds/label-selector.ts';

const labels = { team: 'sql', tier: 'gold', empty: '' };

const expression = (key: string, operator: string, values?: string[]): LabelSelector => ({
  matchExpressions: [{ key, operator: operator as 'In', ...(values && { values }) }],
});

test.each<[string, LabelSelector | undefined, boolean]>([
  ['no selector', undefined, false],
  ['the empty selector', {}, true],
  ['empty lists', { matchLabels: {}, matchExpressions: [] }, true],
  ['a label with its value', { matchLabels: { team: 'sql' } }, true],
  ['a label with another value', { matchLabels: { team: 'docs' } }, false],
  ['a label that is not there', { matchLabels: { region: 'eu' } }, false],
  ['a label with the empty value', { matchLabels: { empty: '' } }, true],
  ['two labels of which one fits', { matchLabels: { team: 'sql', tier: 'silver' } }, false],
  ['In with the value', expression('team', 'In', ['docs', 'sql']), true],
  ['In without the value', expression('team', 'In', ['docs']), false],
  ['In for a label that is not there', expression('region', 'In', ['eu']), false],
  ['In without values', expression('team', 'In'), false],
  ['NotIn with the value', expression('team', 'NotIn', ['docs', 'sql']), false],
  ['NotIn without the value', expression('team', 'NotIn', ['docs']), true],
  ['NotIn for a label that is not there', expression('region', 'NotIn', ['eu']), true],
  ['Exists', expression('team', 'Exists'), true],
  ['Exists for a label that is not there', expression('region', 'Exists'), false],
  ['DoesNotExist', expression('team', 'DoesNotExist'), false],
  ['DoesNotExist for a label that is not there', expression('region', 'DoesNotExist'), true],
  ['an operator of a later version', expression('team', 'Gt', ['1']), false],
  ['a name that every object inherits', expression('constructor', 'Exists'), false],
  [
    'a label and an expression of which one fits',
    { matchLabels: { team: 'sql' }, ...expression('tier', 'NotIn', ['gold']) },
    false,
  ],
])('%s', (_, selector, expected) => {
  expect(selects(selector, labels)).toBe(expected);
});
