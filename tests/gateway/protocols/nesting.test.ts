import { expect, test } from 'vitest';
import { isNestedDeeper } from '../../../gateway/protocols/nesting.ts';

test.each<[string, number]>([
  ['[]', 1],
  ['[[1],[2]]', 2],
  ['{"a":[{"b":1}]}', 3],
  ['["[[[["]', 1],
  ['["\\"[[[["]', 1],
  ['["\\\\",[["\\\\\\"["]]]', 3],
  ['{"[":{"{":0}}', 2],
])('%s is nested %i deep', (text, depth) => {
  expect(() => JSON.parse(text)).not.toThrow();
  expect(isNestedDeeper(Buffer.from(text), depth)).toBe(false);
  expect(isNestedDeeper(Buffer.from(text), depth - 1)).toBe(true);
});

test('a string without an end ends the look', () => {
  expect(isNestedDeeper(Buffer.from('["[[[['), 1)).toBe(false);
});
