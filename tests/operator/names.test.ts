import { expect, test } from 'vitest';
import { nameHolders, sayTaken, takenNames } from '../../operator/names.ts';
import { adapterRoute, baseModel, loraAdapter } from './builders.ts';

test('each kind claims its names, and its own when it says none', () => {
  const holders = nameHolders([
    baseModel({ servedName: 'org/tiny' }),
    loraAdapter({ servedNames: ['a', 'b'] }),
    loraAdapter({}, { name: 'c' }),
    adapterRoute(),
  ]);
  expect([...holders.keys()].sort()).toEqual(['a', 'b', 'c', 'org/tiny', 'route']);
});

test('the oldest has the name, whatever its kind', () => {
  const old = loraAdapter({ servedNames: ['chat'] }, { createdAt: '2026-01-01T00:00:00Z' });
  const young = baseModel({ servedName: 'chat' }, { createdAt: '2026-01-01T00:00:01Z' });
  expect(nameHolders([young, old]).get('chat')).toBe(old);
});

test('of two of the same second the lesser uid has it, in any order', () => {
  const [a, b] = ['a', 'b'].map((uid) =>
    loraAdapter({ servedNames: ['chat'] }, { name: `adapter-${uid}`, uid }),
  );
  expect(nameHolders([a!, b!]).get('chat')).toBe(a);
  expect(nameHolders([b!, a!]).get('chat')).toBe(a);
});

test('says which of several names are taken, and whose they are', () => {
  const old = baseModel({ servedName: 'chat' }, { createdAt: '2025-01-01T00:00:00Z' });
  const young = loraAdapter({ servedNames: ['sql', 'chat'] });
  const holders = nameHolders([old, young]);
  expect(takenNames(old, holders)).toEqual([]);
  expect(takenNames(young, holders)).toEqual([{ name: 'chat', holder: old }]);
  expect(sayTaken(takenNames(young, holders))).toBe(
    'the name chat is that of BaseModel tiny, which is older',
  );
});
