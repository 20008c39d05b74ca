import { expect, test } from 'vitest';
import { blockBytes, homeOf, PrefixMap, prefixOf } from '../../../gateway/routing/prefix.ts';

const body = (messages: string[], fields: object = {}) =>
  Buffer.from(JSON.stringify({ model: 'x', ...fields, messages: messages.map((content) => ({ content })) }));
const long = (letter: string, numBlocks = 2) => letter.repeat(numBlocks * blockBytes);
const first = [long('a'), long('b')];

test('the next turn of a conversation begins with the chain of the last one', () => {
  const turn = prefixOf('x', body(first));
  const next = prefixOf('x', body([...first, long('c')]));
  // The end of a body is not in what comes next: a block that has it is not shared.
  expect(turn.chain.length).toBe(4);
  expect(next.chain.slice(0, 4)).toEqual(turn.chain);
  expect(next.chain.length).toBeGreaterThan(5);
});

test('prompts are told apart from the first block in which they differ', () => {
  const [one, other] = [prefixOf('x', body(first)), prefixOf('x', body([long('a'), long('z')]))];
  expect(one.chain.slice(0, 2)).toEqual(other.chain.slice(0, 2));
  expect(one.chain[3]).not.toBe(other.chain[3]);
});

test('the same prompt to another adapter has nothing in common with it', () => {
  const chain = new Set(prefixOf('x', body(first)).chain);
  expect(prefixOf('y', body(first)).chain.filter((hash) => chain.has(hash))).toEqual([]);
});

test('what stands before the prompt does not count', () => {
  expect(prefixOf('x', body(first, { temperature: 1, max_tokens: 7 }))).toEqual(prefixOf('x', body(first)));
});

test('a completion is known by its prompt; what has none, by nothing', () => {
  const prompt = (text: string) => prefixOf('x', Buffer.from(JSON.stringify({ model: 'x', prompt: text })));
  expect(prompt(long('a', 3)).chain.slice(0, 3)).toEqual(prompt(long('a', 4)).chain.slice(0, 3));
  expect(prefixOf('x', Buffer.from('{"tokens":[1,2]}')).chain).toEqual([]);
  expect(prefixOf('x', Buffer.alloc(0))).toEqual({ chain: [], session: null, promptBytes: 0 });
});

test('of a prompt that is very long the beginning is read', () => {
  expect(prefixOf('x', body([long('a', 5_000)])).chain.length).toBe(256);
});

test('finds how much of a prompt each engine was sent', () => {
  const map = new PrefixMap(100);
  map.note(prefixOf('x', body(first)), 'one');
  map.note(prefixOf('x', body([long('a'), long('z')])), 'other');
  const found = map.find(prefixOf('x', body([...first, long('c')])));
  expect(found).toEqual(
    new Map([
      ['one', 4 * blockBytes],
      ['other', 2 * blockBytes],
    ]),
  );
  expect(map.find(prefixOf('y', body(first))).size).toBe(0);
});

test('remembers the engines that got a prefix last, four of them', () => {
  const map = new PrefixMap(100);
  const prefix = prefixOf('x', body(first));
  for (const id of ['a', 'b', 'c', 'd', 'a', 'e']) map.note(prefix, id);
  expect([...map.find(prefix).keys()].sort()).toEqual(['a', 'c', 'd', 'e']);
});

test('holds no more than it may, and lets go of what was used longest ago, ends before beginnings', () => {
  const map = new PrefixMap(5);
  const [old, young] = [prefixOf('x', body([long('o', 3)])), prefixOf('x', body([long('y', 3)]))];
  map.note(old, 'one');
  map.note(young, 'one');
  expect(map.size).toBe(5);
  expect(map.find(young).get('one')).toBe(3 * blockBytes);
  expect(map.find(old).get('one')).toBe(2 * blockBytes);
});

test("a session is where its last request went, by the caller's word", () => {
  const map = new PrefixMap(100);
  map.note(prefixOf('x', body([long('a')]), 'me'), 'one');
  expect(map.ofSession(prefixOf('x', body([long('z')]), 'me'))).toBe('one');
  expect(map.ofSession(prefixOf('x', body([long('z')]), 'you'))).toBeUndefined();
  expect(map.ofSession(prefixOf('x', body([long('z')])))).toBeUndefined();
});

test('names are at home evenly, and move only with the engine that was their home', () => {
  const ids = ['a', 'b', 'c', 'd'];
  const names = Array.from({ length: 400 }, (_, i) => `adapter-${i}`);
  const homes = names.map((name) => homeOf(name, ids)!);
  for (const id of ids) expect(homes.filter((home) => home === id).length).toBeGreaterThan(70);
  const without = names.map((name) => homeOf(name, ['a', 'b', 'd'])!);
  expect(without.filter((home, i) => homes[i] !== 'c' && home !== homes[i])).toEqual([]);
  expect(homeOf('x', [])).toBeUndefined();
});
