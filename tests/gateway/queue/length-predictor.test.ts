import { expect, test } from 'vitest';
import { LengthPredictor } from '../../../gateway/queue/length-predictor.ts';

function after(lengths: readonly number[], adapter = 'sql', promptTokens = 100): LengthPredictor {
  const predictor = new LengthPredictor();
  for (const tokens of lengths) predictor.note(adapter, promptTokens, tokens);
  return predictor;
}

test('learns how long the answers of an adapter are, each by itself', () => {
  const predictor = after(Array.from({ length: 20 }, () => 20));
  for (let i = 0; i < 20; i++) predictor.note('essay', 100, 1_000);
  expect(predictor.predict('sql', 100, null)).toBe(24);
  expect(predictor.predict('essay', 100, null)).toBe(768);
});

test('knows that long prompts have other answers than short ones', () => {
  const predictor = after(
    Array.from({ length: 10 }, () => 500),
    'sql',
    1_000,
  );
  for (let i = 0; i < 10; i++) predictor.note('sql', 10, 5);
  expect(predictor.predict('sql', 20, null)).toBe(6);
  expect(predictor.predict('sql', 2_000, null)).toBe(384);
});

test('follows a change', () => {
  const predictor = after(Array.from({ length: 200 }, () => 10));
  for (let i = 0; i < 60; i++) predictor.note('sql', 100, 300);
  expect(predictor.predict('sql', 100, null)).toBe(384);
});

test('an answer is never expected to be longer than it may be, and several count as many', () => {
  const predictor = after([1_000, 1_000, 1_000, 1_000]);
  expect(predictor.predict('sql', 100, 50)).toBe(50);
  expect(predictor.predict('sql', 100, 50, 4)).toBe(200);
  expect(predictor.predict('unknown', 100, 16)).toBe(16);
});

test('forgets the adapters that answered least recently', () => {
  const predictor = new LengthPredictor();
  for (let i = 0; i < 4_096; i++) predictor.note(`a${i}`, 10, 1_000);
  predictor.note('a0', 10, 1_000);
  expect(predictor.numAdapters).toBe(4_096);
  for (let i = 4_096; i < 10_000; i++) {
    predictor.note(`a${i}`, 10, 1_000);
    expect(predictor.numAdapters).toBeLessThanOrEqual(4_096);
    if (i === 4_096) expect([0, 1].map((of) => predictor.predict(`a${of}`, 10, null))).toEqual([768, 128]);
  }
  expect(predictor.numAdapters).toBeGreaterThan(3_500);
  expect(predictor.predict('a0', 10, null)).toBe(128);
  expect(predictor.predict('a9999', 10, null)).toBe(768);
});
