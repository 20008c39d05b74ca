import { describe, expect, test } from 'vitest';
import type { LabelSelector } from '../../../crds/label-selector.ts';
import type { AdapterGroup, TenantSpec } from '../../../crds/types.ts';
import { groupTarget, membersFor, whoAnswers } from '../../../gateway/groups/group.ts';
import { buildModels, type Model, mayUse } from '../../../gateway/models.ts';
import { adapterGroup, adapterRoute, baseModel, loraAdapter } from '../resources.ts';

/** Four wards of a clinic and an adapter of something else, in a group of what the clinic knows. */
const clinic = [
  loraAdapter('cardiology', { labels: { kind: 'knowledge', ward: 'cardiology' } }),
  loraAdapter('oncology', { labels: { kind: 'knowledge', ward: 'oncology' } }),
  loraAdapter('surgery', { labels: { kind: 'knowledge', ward: 'surgery' }, servedNames: ['cut', 'scalpel'] }),
  loraAdapter('triage', { labels: { kind: 'knowledge', ward: 'triage', open: 'yes' } }),
  loraAdapter('poems', { labels: { kind: 'style' } }),
  loraAdapter('elsewhere', { baseModel: 'other', labels: { kind: 'knowledge', ward: 'oncology' } }),
];
const knowledge = { selector: { matchLabels: { kind: 'knowledge' } } };
const ward = (...values: string[]): LabelSelector => ({
  matchExpressions: [{ key: 'ward', operator: 'In', values }],
});

function groupOf(spec: Partial<AdapterGroup['spec']> = knowledge, adapters = clinic): Model {
  const models = buildModels({
    baseModels: [baseModel('base'), baseModel('other')],
    loraAdapters: adapters,
    adapterRoutes: [],
    adapterGroups: [adapterGroup('clinic', spec, { labels: { for: 'wards' } })],
  });
  return models.get('clinic')!;
}

const namesFor = (adapters: TenantSpec['access']['adapters'] | null, model = groupOf()) =>
  membersFor(model.group!, adapters).map(({ target }) => target.name);

function targetFor(adapters: TenantSpec['access']['adapters'] | null, model = groupOf()) {
  return groupTarget(model.name, model.group!, membersFor(model.group!, adapters));
}

describe('rights', () => {
  type Access = TenantSpec['access'];
  const cases: [what: string, Access, members: string[] | null][] = [
    ['nothing', {}, null],
    ['the group alone', { groups: {} }, null],
    ['adapters alone', { adapters: {} }, null],
    ['another group', { adapters: {}, groups: { matchLabels: { for: 'others' } } }, null],
    ['the group and no member of it', { adapters: { matchLabels: { kind: 'style' } }, groups: {} }, null],
    ['the group and a made-up ward', { adapters: ward('radiology'), groups: {} }, null],
    ['base models and routes', { baseModels: {}, routes: {}, groups: {} }, null],
    ['one ward', { adapters: ward('oncology'), groups: {} }, ['oncology']],
    ['two wards', { adapters: ward('oncology', 'surgery'), groups: {} }, ['cut', 'oncology']],
    [
      'the group by its label',
      { adapters: ward('triage'), groups: { matchLabels: { for: 'wards' } } },
      ['triage'],
    ],
    [
      'all but one ward',
      {
        adapters: { matchExpressions: [{ key: 'ward', operator: 'NotIn', values: ['surgery'] }] },
        groups: {},
      },
      ['cardiology', 'oncology', 'triage'],
    ],
    [
      'what both requirements let in',
      { adapters: { matchLabels: { open: 'yes' }, ...ward('triage', 'oncology') }, groups: {} },
      ['triage'],
    ],
    ['everything', { adapters: {}, groups: {} }, ['cardiology', 'cut', 'oncology', 'triage']],
  ];
  test.for(cases.map(([what, access, members]) => ({ what, access, members })))(
    'to $what',
    ({ access, members }) => {
      const model = groupOf();
      expect(mayUse(access, model)).toBe(members !== null);
      if (members !== null) expect(namesFor(access.adapters, model)).toEqual(members);
    },
  );

  test('of everybody, where nobody needs a key', () => {
    expect(namesFor(null)).toEqual(['cardiology', 'cut', 'oncology', 'triage']);
  });

  test('a group without members is nobody’s', () => {
    const empty = groupOf({ selector: { matchLabels: { kind: 'none' } } });
    expect(mayUse({ adapters: {}, groups: {} }, empty)).toBe(false);
  });

  test('an adapter whose label changed is in it no more', () => {
    const moved = clinic.filter(({ metadata }) => metadata.name !== 'triage');
    expect(namesFor({}, groupOf(knowledge, moved))).toEqual(['cardiology', 'cut', 'oncology']);
  });
});

test('members count one over their number, or 1 each', () => {
  const two = [
    { name: 'cut', weight: 0.5 },
    { name: 'oncology', weight: 0.5 },
  ];
  expect(targetFor(ward('oncology', 'surgery')).members).toEqual(two);
  expect(targetFor(ward('oncology'), groupOf()).members).toEqual([{ name: 'oncology', weight: 1 }]);
  const sum = targetFor(ward('oncology', 'surgery'), groupOf({ ...knowledge, weights: 'sum' }));
  expect(sum.members).toEqual(two.map(({ name }) => ({ name, weight: 1 })));
});

test('members are merged when the group says how, and one alone is itself', () => {
  const merge = { method: 'ties', densityPercent: 20, majoritySign: 'frequency' } as const;
  const model = groupOf({ ...knowledge, merge });
  const two = targetFor(ward('oncology', 'surgery'), model);
  expect(two).toMatchObject({
    members: [{ weight: 0.5 }, { weight: 0.5 }],
    merge: { method: 'ties', density: 0.2, majoritySign: 'frequency' },
  });
  expect(whoAnswers('clinic', two)).toEqual({
    'x-motet-adapters': 'cut=0.5,oncology=0.5',
    'x-motet-merge': 'ties; density=0.2; majority-sign=frequency',
  });
  expect(targetFor(ward('oncology'), model)).not.toHaveProperty('merge');
  expect(targetFor(ward('oncology', 'surgery'))).not.toHaveProperty('merge');
});

test('more members than a request composes are refused with both numbers, never left out', () => {
  const model = groupOf({ ...knowledge, maxMembers: 3 });
  expect(() => targetFor({}, model)).toThrow(
    expect.objectContaining({
      code: 'group_too_large',
      param: 'model',
      message: 'model: expected a group of which you may use at most 3 adapters, got 4',
    }),
  );
  expect(targetFor(ward('triage', 'oncology', 'surgery'), model).members).toHaveLength(3);
});

test('an adapter of which no name is its own is no member', () => {
  const adapters = [
    ...clinic,
    loraAdapter('late', { servedNames: ['triage'], labels: { kind: 'knowledge' }, uid: 'z' }),
  ];
  expect(namesFor(null, groupOf(knowledge, adapters))).toEqual(['cardiology', 'cut', 'oncology', 'triage']);
});

test('what comes when somebody asks is asked for, by each resource once; one that never comes is said to', () => {
  const onDemand = { idleMinutes: 5 };
  const lazy = clinic.map((one) => ({ ...one, spec: { ...one.spec, onDemand } }));
  expect(targetFor(ward('oncology', 'triage'), groupOf(knowledge, lazy)).asks).toEqual([
    { kind: 'LoraAdapter', name: 'oncology', idleMinutes: 5 },
    { kind: 'LoraAdapter', name: 'triage', idleMinutes: 5 },
  ]);
  const refused = [
    { type: 'Ready', status: 'False', reason: 'Refused', message: '', lastTransitionTime: '' },
  ];
  const broken = clinic.map((one) =>
    one.metadata.name === 'triage' ? { ...one, status: { conditions: refused } } : one,
  ) as typeof clinic;
  expect(targetFor(ward('oncology', 'triage'), groupOf(knowledge, broken)).isHopeless).toBe(true);
  expect(targetFor(ward('oncology'), groupOf(knowledge, broken)).isHopeless).toBeUndefined();
});

test('a name is the oldest resource’s, be it a group’s or a route’s', () => {
  const models = buildModels({
    baseModels: [],
    loraAdapters: clinic,
    adapterRoutes: [adapterRoute('one', [{ adapter: 'triage' }], { ageS: 1 })],
    adapterGroups: [adapterGroup('one'), adapterGroup('mine', { servedName: 'two' }, { ageS: 2 })],
  });
  expect(models.get('one')!.kind).toBe('route');
  expect(models.get('two')!.kind).toBe('group');
});

test('an engine is told the members and not the name of the group', () => {
  const { baseModel, members, name } = targetFor(ward('oncology', 'surgery'));
  expect(whoAnswers('clinic', { name, baseModel, members: members! })).toEqual({
    'x-motet-adapters': 'cut=0.5,oncology=0.5',
  });
  expect(whoAnswers('triage', { name: 'triage', baseModel })).toEqual({});
  expect(whoAnswers('sql-stable', { name: 'sql-v2', baseModel })).toEqual({ 'x-motet-model': 'sql-v2' });
});
