import { expect, test } from 'vitest';
import { CopyBudget, RetryBudget } from '../../../gateway/routing/retry-budget.ts';

const takeAll = (budget: RetryBudget, atMs: number) => {
  let count = 0;
  while (budget.take(atMs)) count += 1;
  return count;
};

test('has ten from the start, then one in so many requests', () => {
  const budget = new RetryBudget(0.25);
  expect(takeAll(budget, 0)).toBe(10);
  for (let i = 0; i < 40; i++) budget.noteRequest();
  expect(takeAll(budget, 0)).toBe(10);
});

test('saves up a hundred at most', () => {
  const budget = new RetryBudget(1);
  for (let i = 0; i < 500; i++) budget.noteRequest();
  expect(takeAll(budget, 0)).toBe(100);
});

test('gets one a second by itself, up to ten', () => {
  const budget = new RetryBudget(0);
  expect(takeAll(budget, 0)).toBe(10);
  expect(takeAll(budget, 3_000)).toBe(3);
  expect(takeAll(budget, 60_000)).toBe(10);
});

test('of copies no more are made than their share of requests, and a few are saved up', () => {
  const budget = new CopyBudget(0.1);
  let numTaken = 0;
  for (let i = 0; i < 1_000; i++) {
    budget.noteRequest();
    if (budget.take()) numTaken += 1;
  }
  expect(numTaken).toBe(100);
  for (let i = 0; i < 1_000; i++) budget.noteRequest();
  for (let i = 0; i < 10; i++) expect(budget.take()).toBe(true);
  expect(budget.take()).toBe(false);
});
