import { describe, expect, test } from 'vitest';
import { MeasuredCosts } from '../../../engine/ladder/costs.ts';
import { seededRandom } from '../../fixtures/seeded-random.ts';

describe('computing', () => {
  test('costs what it was measured to cost', () => {
    const costs = new MeasuredCosts();
    for (let i = 0; i < 5; i++) costs.observePrefill(0.2, 100, 50);
    expect(costs.prefillSeconds(16, 50)).toBeCloseTo(0.032, 9);
    expect(costs.prefillSeconds(16, 5000)).toBeCloseTo(0.032, 9);
  });

  test('costs more the further back it looks, as far as that was measured, noise and all', () => {
    const costs = new MeasuredCosts();
    const random = seededRandom(1);
    for (let i = 0; i < 200; i++) {
      const position = random.below(4000);
      const noise = 0.9 + random.below(201) / 1000;
      costs.observePrefill(256 * (1e-3 + 5e-7 * position) * noise, 256, position);
    }
    expect(costs.prefillSeconds(1, 0) / 1e-3).toBeCloseTo(1, 0);
    expect(costs.prefillSeconds(1, 4000) / 3e-3).toBeCloseTo(1, 0);
  });

  test('follows a machine that changes', () => {
    const costs = new MeasuredCosts();
    for (let i = 0; i < 100; i++) costs.observePrefill(1, 100, 50);
    for (let i = 0; i < 50; i++) costs.observePrefill(0.1, 100, 50);
    expect(costs.prefillSeconds(100, 50)).toBeLessThan(0.11);
  });

  test('is never free, nor cheaper further back, whatever is measured', () => {
    const costs = new MeasuredCosts();
    for (const [seconds, position] of [
      [1, 0],
      [0.01, 4000],
      [1e-9, 8000],
    ] as const) {
      costs.observePrefill(seconds, 100, position);
      expect(costs.prefillSeconds(16, 0)).toBeGreaterThan(0);
      expect(costs.prefillSeconds(16, 8000)).toBeGreaterThanOrEqual(costs.prefillSeconds(16, 0));
    }
  });

  test('is not measured by steps that are too short to say anything', () => {
    const costs = new MeasuredCosts();
    costs.observePrefill(100, 15, 0);
    costs.observePrefill(0, 100, 0);
    expect(costs.prefillSeconds(1000, 0)).toBeCloseTo(1, 9);
  });
});

test('copying costs what it was measured to cost, large copies counting by their bytes', () => {
  const costs = new MeasuredCosts();
  expect(costs.copySeconds(4e9)).toBeCloseTo(1, 9);
  costs.observeCopy(1, 1e9);
  costs.observeCopy(1, 3e9);
  expect(costs.copySeconds(1e9)).toBeCloseTo(1.9 / 3.9, 9);
});
