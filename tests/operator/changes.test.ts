import { expect, test } from 'vitest';
import {
  type Key,
  keysOfClaimant,
  keysOfEverything,
  keysOfOwned,
  keysOfPod,
} from '../../operator/changes.ts';
import { adapterGroup, adapterRoute, baseModel, loraAdapter, pod } from './builders.ts';

const text = (keys: Key[]) => [...new Set(keys.map(({ kind, name }) => `${kind}/${name}`))].sort();

test('a pod touches its base model, and the placement of adapters on it', () => {
  expect(text(keysOfPod(pod(), undefined))).toEqual(['adapters/tiny', 'base-model/tiny']);
  expect(text(keysOfPod(undefined, pod({ baseModel: 'other' })))).toEqual([
    'adapters/other',
    'base-model/other',
  ]);
});

test('a pod whose label changed touches both base models', () => {
  const keys = keysOfPod(pod({ baseModel: 'b' }), pod({ baseModel: 'a' }));
  expect(text(keys)).toEqual(['adapters/a', 'adapters/b', 'base-model/a', 'base-model/b']);
});

test('a base model touches itself, its adapters and the routes to it', () => {
  const model = baseModel();
  const route = adapterRoute({ targets: [{ baseModel: 'tiny', weight: 1, shadowPercent: 0 }] });
  expect(text(keysOfClaimant(model, undefined, [model, route]))).toEqual([
    'adapters/tiny',
    'base-model/tiny',
    'route/route',
  ]);
});

test('a status alone touches only the routes to the object', () => {
  const before = loraAdapter();
  const now = { ...before, status: { readyCopies: 1 } };
  expect(text(keysOfClaimant(now, before, [now, adapterRoute()]))).toEqual(['route/route']);
  const changed = { ...now, metadata: { ...now.metadata, generation: 2 } };
  expect(text(keysOfClaimant(changed, before, [changed]))).toEqual(['adapters/tiny']);
});

test('a group touches itself and the placement of its members, and is touched by what it selects', () => {
  const group = adapterGroup({ selector: { matchLabels: { team: 'red' } } });
  expect(text(keysOfClaimant(group, undefined, [group]))).toEqual(['adapters/tiny', 'group/group']);
  const status = { ...group, status: { members: '1/1' } };
  expect(text(keysOfClaimant(status, group, [status]))).toEqual([]);

  const red = loraAdapter({}, { labels: { team: 'red' } });
  const blue = loraAdapter({}, { labels: { team: 'blue' } });
  const held = { ...red, status: { readyCopies: 1 } };
  expect(text(keysOfClaimant(held, red, [held, group]))).toEqual(['group/group']);
  // A label that changed changes no generation.
  expect(text(keysOfClaimant(blue, red, [blue, group]))).toEqual(['adapters/tiny', 'group/group']);
  expect(text(keysOfClaimant(blue, undefined, [blue, group]))).toEqual(['adapters/tiny']);
  expect(text(keysOfClaimant(baseModel(), undefined, [group]))).toContain('group/group');
});

test('an object made again under its name is no change of a status', () => {
  const before = loraAdapter();
  const now = loraAdapter({}, { uid: 'another' });
  expect(text(keysOfClaimant(now, before, [now]))).toEqual(['adapters/tiny']);
});

test('a name that is set free touches the others that claim it', () => {
  const gone = baseModel({ servedName: 'chat' });
  const waiting = [
    loraAdapter({ servedNames: ['chat'], baseModel: 'other' }),
    adapterRoute({ servedName: 'chat' }),
  ];
  const bystander = loraAdapter({ servedNames: ['else'], baseModel: 'third' });
  expect(text(keysOfClaimant(undefined, gone, [...waiting, bystander]))).toEqual([
    'adapters/other',
    'adapters/tiny',
    'base-model/tiny',
    'route/route',
  ]);
});

test('names that an adapter gives up and takes touch those who claim them', () => {
  const [before, now] = [['a'], ['b']].map((servedNames) => loraAdapter({ servedNames }));
  now!.metadata.generation = 2;
  const others = ['a', 'b', 'c'].map((servedName) =>
    adapterRoute({ servedName, targets: [] }, { name: servedName }),
  );
  expect(text(keysOfClaimant(now, before, [now!, ...others]))).toEqual([
    'adapters/tiny',
    'route/a',
    'route/b',
  ]);
});

test('what is made for a base model touches it, and so does what is in its way', () => {
  const owner = {
    apiVersion: 'motet.dev/v1alpha1',
    kind: 'BaseModel',
    name: 'tiny',
    uid: '1',
    controller: true,
  };
  expect(text(keysOfOwned(undefined, { metadata: { name: 'service', ownerReferences: [owner] } }))).toEqual([
    'base-model/service',
    'base-model/tiny',
  ]);
  expect(text(keysOfOwned({ metadata: { name: 'tiny' } }, undefined))).toEqual(['base-model/tiny']);
});

test('everything is each key once, adapters of a base model that does not exist among them', () => {
  const all = [
    baseModel(),
    loraAdapter(),
    loraAdapter({}, { name: 'b' }),
    loraAdapter({ baseModel: 'none' }),
    adapterRoute(),
  ];
  expect(keysOfEverything(all).map(({ kind, name }) => `${kind}/${name}`)).toEqual([
    'base-model/tiny',
    'adapters/tiny',
    'adapters/none',
    'route/route',
  ]);
});
