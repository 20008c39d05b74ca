import { expect, test } from 'vitest';
import { assertUnderstood, checkSpec, type Schema, specSchema } from '../../crds/check-spec.ts';

const tenant = specSchema('Tenant');
const group = specSchema('AdapterGroup');
const minimal = { keys: [{ secretRef: { name: 's' } }] };

test('fills in defaults as the API server does', () => {
  expect(checkSpec(minimal, tenant, 'spec')).toEqual({
    keys: [{ secretRef: { name: 's', key: 'key' } }],
    access: {},
  });
  expect(checkSpec({ baseModel: 'b', selector: {} }, group, 'spec')).toEqual({
    baseModel: 'b',
    selector: {},
    weights: 'equal',
    maxMembers: 8,
  });
});

test.each<[string, object, string]>([
  ['a field that is nearly one', { weigth: 2 }, 'spec: "weigth" is no field here; did you mean weight?'],
  ['another case', { Limits: {} }, 'spec: "Limits" is no field here; did you mean limits?'],
  [
    'a field that is far from any',
    { access: { colour: 1 } },
    'spec.access: "colour" is no field here; expected one of adapters, baseModels, routes, groups',
  ],
  ['a field of every object', { toString: 1 }, 'spec: "toString" is no field here; expected one of'],
  ['nothing', { limits: null }, 'spec.limits: expected an object, got nothing'],
  ['a list for an object', { limits: [] }, 'spec.limits: expected an object, got a list'],
  ['a text for a number', { weight: '2' }, 'spec.weight: expected an integer from 1 to 1000, got "2"'],
  ['half a number', { weight: 1.5 }, 'spec.weight: expected an integer from 1 to 1000, got 1.5'],
  ['what is no number', { weight: Number.NaN }, 'spec.weight: expected an integer from 1 to 1000, got NaN'],
  [
    'another word',
    { access: { adapters: { matchExpressions: [{ key: 'a', operator: 'Is' }] } } },
    'spec.access.adapters.matchExpressions[0].operator: expected In or NotIn or Exists or DoesNotExist, got "Is"',
  ],
  [
    'a rule that is broken',
    { access: { adapters: { matchExpressions: [{ key: 'a', operator: 'In' }] } } },
    'spec.access.adapters.matchExpressions[0]: expected values for In and NotIn, and none for Exists and DoesNotExist',
  ],
])('refuses %s, by name', (_, fields, message) => {
  expect(() => checkSpec({ ...minimal, ...fields }, tenant, 'spec')).toThrow(message);
});

test.each(['key-0123456789ab', 'x'.repeat(400)])('never shows a text that could be a key', (key) => {
  for (const value of [
    key,
    { keys: key },
    { keys: [key] },
    { keys: [{ [key]: 1 }] },
    { [key]: 1 },
    { keys: [{ secretRef: key }] },
    { keys: [{ secretRef: { name: key, key: `${key} ` } }] },
    { ...minimal, weight: key },
    { ...minimal, access: { adapters: { matchExpressions: [{ key: 'a', operator: key }] } } },
  ]) {
    const check = () => checkSpec(value, tenant, 'spec');
    expect(check).toThrow(/^spec/);
    expect(check).not.toThrow(key);
  }
});

test('takes no schema that says more than it looks at', () => {
  // Nothing but their own rules and words stands between a tenant and the rest: one that is not known must be seen at once.
  const strange: Schema[] = [
    { type: 'number' } as never,
    { type: 'object', 'x-kubernetes-validations': [{ rule: 'self.size() > 1', message: '' }] },
    { type: 'string', multipleOf: 2 } as never,
  ];
  for (const schema of strange) expect(() => assertUnderstood(schema, 'spec')).toThrow('knows nothing of');
});
