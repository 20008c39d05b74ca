import { expect, test } from 'vitest';
import { parseQuantity } from '../../operator/quantity.ts';

test.each([
  [2, 2],
  ['2', 2],
  ['0.5', 0.5],
  ['500m', 0.5],
  ['100m', 0.1],
  ['1Ki', 1024],
  ['1.5Gi', 1.5 * 2 ** 30],
  ['1024Mi', 2 ** 30],
  ['2k', 2000],
  ['1M', 1e6],
  ['2e3', 2000],
  ['1E', 1e18],
  ['1Ei', 2 ** 60],
  ['.5', 0.5],
])('%s is %d', (quantity, number) => {
  expect(parseQuantity(quantity)).toBe(number);
});

test.each(['', 'Gi', '1 Gi', '1gi', '1KB', 'nan', '--1'])('"%s" is none', (quantity) => {
  expect(parseQuantity(quantity)).toBeNaN();
});
