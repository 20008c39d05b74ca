import { expect, test } from 'vitest';
import type { AdapterList, AdapterStatus, ModelCard } from '../../../engine/protocol.ts';
import { consoleData, type VisibleModel } from '../../../gateway/console/console-data.ts';
import { Traffic } from '../../../gateway/console/traffic.ts';
import { type Endpoint, newEndpoint } from '../../../gateway/endpoints.ts';

const arena = { totalBytes: 100, freeBytes: 50, kvBytes: 30, adapterBytes: 20 };

function engine(name: string, baseModel: string | null, held: string[], parts: Partial<Endpoint> = {}) {
  const cards = new Map(held.map((id) => [id, { id } as ModelCard]));
  const data = held.slice(1).map((id) => ({ names: [id], tier: 'host', rank: 8, bytes: 10, inFlight: 2 }));
  const adapterList = { object: 'list', arena, data: data as unknown as AdapterStatus[] } as AdapterList;
  const made = newEndpoint({ id: name, name, url: `http://${name}`, baseModel });
  return { ...made, isReady: true, cards, adapterList, ...parts };
}

const model = (
  kind: VisibleModel['kind'],
  name: string,
  baseModel: string | null = 'b',
  parent = 'Base',
) => ({
  name,
  kind,
  parent: kind === 'baseModel' ? null : parent,
  targets: [{ name, baseModel, weight: 1 }],
});

const dataFor = (models: VisibleModel[], endpoints: Endpoint[]) =>
  consoleData('team', models, endpoints, new Traffic().of('team', 0));

test('an adapter is shown on each engine that holds it, with its tier', () => {
  const engines = [
    engine('e2', 'b', ['Base', 'sql'], { isReady: false }),
    engine('e1', 'b', ['Base', 'sql']),
  ];
  expect(dataFor([model('adapter', 'sql')], engines).adapters).toEqual([
    {
      name: 'sql',
      base: 'Base',
      rank: 8,
      bytes: 10,
      places: [
        { engine: 'e1', tier: 'host', inFlight: 2, isReady: true },
        { engine: 'e2', tier: 'host', inFlight: 2, isReady: false },
      ],
    },
  ]);
});

test('what the caller may not use is nowhere in it', () => {
  const engines = [engine('e1', 'b', ['Base', 'sql', 'secret']), engine('other-1', 'other', ['Other'])];
  const text = JSON.stringify(dataFor([model('adapter', 'sql')], engines));
  expect(text).toContain('sql');
  expect(text).not.toContain('secret');
  expect(text).not.toMatch(/other/i);
});

test('the base of an adapter is shown with its engines, and said not to be usable itself', () => {
  const engines = [engine('e1', 'b', ['Base', 'sql'], { inFlight: 3 })];
  expect(dataFor([model('adapter', 'sql')], engines).bases).toEqual([
    {
      name: 'Base',
      mayUse: false,
      engines: [{ name: 'e1', isReady: true, inFlight: 3, numAdapters: 1, arena, hostArena: null }],
    },
  ]);
});

test('a base whose engines are all gone is shown without any', () => {
  expect(dataFor([model('baseModel', 'Base')], []).bases).toEqual([
    { name: 'Base', mayUse: true, engines: [] },
  ]);
});

test('outside of a cluster engines belong to the base that they serve', () => {
  const engines = [engine('e1', null, ['Base']), engine('e2', null, ['Second'])];
  const { bases } = dataFor([model('baseModel', 'Base', null), model('baseModel', 'Second', null)], engines);
  expect(bases.map(({ name, engines }) => [name, ...engines.map((one) => one.name)])).toEqual([
    ['Base', 'e1'],
    ['Second', 'e2'],
  ]);
});

test('an engine without a list of adapters says nothing of tiers and memory', () => {
  const engines = [engine('e1', 'b', ['Base', 'sql'], { adapterList: null })];
  const { adapters, bases } = dataFor([model('adapter', 'sql')], engines);
  expect(adapters[0]).toMatchObject({ rank: null, bytes: null, places: [{ tier: null }] });
  expect(bases[0]!.engines[0]).toMatchObject({ numAdapters: null, arena: null });
});

test('a route shows its targets and which of them an engine holds', () => {
  const targets = ['v1', 'v2'].map((name) => ({ name, baseModel: 'b', weight: 1 }));
  const route: VisibleModel = { name: 'sql', kind: 'route', parent: 'Base', targets };
  expect(dataFor([route], [engine('e1', 'b', ['Base', 'v1'])]).routes).toEqual([
    {
      name: 'sql',
      targets: [
        { name: 'v1', weight: 1, isServed: true },
        { name: 'v2', weight: 1, isServed: false },
      ],
    },
  ]);
});

test('a group shows the members that the caller may use, and whether an engine holds all of them', () => {
  const members = ['law', 'tax'].map((name) => ({ name, weight: 0.5 }));
  const targets = [{ name: 'all', baseModel: 'b', weight: 1, members }];
  const group: VisibleModel = { name: 'all', kind: 'group', parent: 'Base', targets };
  const groupsWith = (...names: string[]) => dataFor([group], [engine('e1', 'b', names)]).groups;
  expect(groupsWith('Base', 'law', 'tax')).toEqual([
    { name: 'all', members: ['law', 'tax'], isServed: true },
  ]);
  expect(groupsWith('Base', 'law')).toMatchObject([{ isServed: false }]);
  expect(dataFor([{ ...group, targets: [] }], []).groups).toEqual([
    { name: 'all', members: null, isServed: false },
  ]);
});
