import { expect, test } from 'vitest';
import type { TenantSpec } from '../../crds/types.ts';
import { buildModels, mayUse } from '../../gateway/models.ts';
import { adapterRoute, baseModel, loraAdapter } from './resources.ts';

const build = (resources: Partial<Parameters<typeof buildModels>[0]>) =>
  buildModels({ baseModels: [], loraAdapters: [], adapterRoutes: [], adapterGroups: [], ...resources });

test('a resource is known by its name, or by the served names that it gives', () => {
  const models = build({
    baseModels: [baseModel('base', { servedName: 'org/Base-1B' }), baseModel('other')],
    loraAdapters: [loraAdapter('sql'), loraAdapter('docs', { servedNames: ['docs-v1', 'docs-latest'] })],
  });
  expect([...models.keys()].sort()).toEqual(['docs-latest', 'docs-v1', 'org/Base-1B', 'other', 'sql']);
  expect(models.get('org/Base-1B')).toMatchObject({
    kind: 'baseModel',
    parent: null,
    targets: [{ name: 'org/Base-1B', baseModel: 'base' }],
  });
  expect(models.get('docs-latest')).toMatchObject({
    kind: 'adapter',
    parent: 'org/Base-1B',
    targets: [{ name: 'docs-latest', baseModel: 'base' }],
  });
});

test('the oldest resource has a name that several claim; of equally old ones that with the lesser uid', () => {
  const resources = {
    baseModels: [baseModel('x', { ageS: 1 })],
    loraAdapters: [
      loraAdapter('young', { servedNames: ['x', 'y'], ageS: 0 }),
      loraAdapter('old', { servedNames: ['y'], ageS: 2 }),
    ],
    adapterRoutes: [
      adapterRoute('z', [{ adapter: 'old' }], { uid: 'b' }),
      {
        ...adapterRoute('twin', [{ adapter: 'young' }], { uid: 'a' }),
        spec: { servedName: 'z', targets: [], warmCopies: 1 },
      },
    ],
  };
  const models = build(resources);
  expect(models.get('x')?.kind).toBe('baseModel');
  expect(models.get('y')?.targets).toMatchObject([{ name: 'y', baseModel: 'base' }]);
  expect(models.get('y')?.created).toBe(Date.UTC(2026, 0, 1, 12) / 1000 - 2);
  expect(models.get('z')?.targets).toEqual([]);
});

test('a route stands for those of its targets that exist, by the names that engines know', () => {
  const models = build({
    baseModels: [baseModel('base', { servedName: 'Base' })],
    loraAdapters: [loraAdapter('v1', { servedNames: ['sql-v1', 'sql-one'] }), loraAdapter('v2')],
    adapterRoutes: [
      adapterRoute('sql', [
        { adapter: 'v1', weight: 9 },
        { adapter: 'v2', weight: 1 },
        { adapter: 'v3', weight: 5 },
        { baseModel: 'base', weight: 0 },
      ]),
    ],
  });
  expect(models.get('sql')).toMatchObject({
    kind: 'route',
    parent: 'Base',
    targets: [
      { name: 'sql-v1', baseModel: 'base', weight: 9 },
      { name: 'v2', baseModel: 'base', weight: 1 },
      { name: 'Base', baseModel: 'base', weight: 0 },
    ],
  });
});

test('a route over several base models has no parent', () => {
  const models = build({
    baseModels: [baseModel('a'), baseModel('b')],
    adapterRoutes: [adapterRoute('r', [{ baseModel: 'a' }, { baseModel: 'b' }])],
  });
  expect(models.get('r')?.parent).toBeNull();
});

test('a target that lost all its names to older resources cannot be reached by a route', () => {
  const models = build({
    loraAdapters: [
      loraAdapter('a', { servedNames: ['x'], ageS: 1 }),
      loraAdapter('b', { servedNames: ['x'] }),
    ],
    adapterRoutes: [adapterRoute('r', [{ adapter: 'b' }])],
  });
  expect(models.get('r')?.targets).toEqual([]);
});

test.each<[string, TenantSpec['access'], string[]]>([
  ['nothing is said', {}, []],
  ['everything of one kind', { adapters: {} }, ['red', 'blue']],
  ['adapters by label', { adapters: { matchLabels: { team: 'red' } } }, ['red']],
  ['a base model', { baseModels: { matchLabels: { team: 'red' } } }, ['base']],
  ['a route and not its targets', { routes: {} }, ['route']],
  ['everything', { adapters: {}, baseModels: {}, routes: {} }, ['base', 'red', 'blue', 'route']],
])('a tenant may use what its access selects: %s', (_, access, expected) => {
  const models = build({
    baseModels: [baseModel('base', { labels: { team: 'red' } })],
    loraAdapters: [
      loraAdapter('red', { labels: { team: 'red' } }),
      loraAdapter('blue', { labels: { team: 'blue' } }),
    ],
    adapterRoutes: [adapterRoute('route', [{ adapter: 'blue' }])],
  });
  const allowed = [...models.values()].filter((model) => mayUse(access, model)).map(({ name }) => name);
  expect(allowed.sort()).toEqual([...expected].sort());
});

test.each([
  ['Refused', true],
  ['DigestMismatch', true],
  ['Loading', undefined],
  ['SourceUnavailable', undefined],
])('an adapter that is %s is hopeless: %s', (reason, isHopeless) => {
  const status = {
    conditions: [{ type: 'Ready', status: 'False', reason, message: '', lastTransitionTime: '' }],
  };
  const adapter = { ...loraAdapter('sql'), status } as ReturnType<typeof loraAdapter>;
  const [target] = build({ loraAdapters: [adapter] }).get('sql')!.targets;
  expect(target!.isHopeless).toBe(isHopeless);
});
