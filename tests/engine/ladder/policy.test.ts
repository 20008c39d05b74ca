import { describe, expect, test } from 'vitest';
import { halfLifeMs, type Kept, rules, touch } from '../../../engine/ladder/policy.ts';
import { seededRandom } from '../../fixtures/seeded-random.ts';

function kept(fields: Partial<Kept> = {}): Kept {
  return { restoreSeconds: 1, numBytes: 1024, uses: 1, lastUsedMs: 0, ...fields };
}

/** Seconds a byte that keeping it is expected to save: what ranks stand for. */
function value({ restoreSeconds, numBytes, uses, lastUsedMs }: Kept, nowMs: number): number {
  return (restoreSeconds * uses * 2 ** ((lastUsedMs - nowMs) / halfLifeMs)) / numBytes;
}

describe('what is kept', () => {
  test.each<[string, Partial<Kept>]>([
    ['takes longer to bring back', { restoreSeconds: 2 }],
    ['takes fewer bytes', { numBytes: 512 }],
    ['is used more often', { uses: 2 }],
    ['was used later', { lastUsedMs: 1 }],
  ])('by cost, what %s leaves later', (_, fields) => {
    expect(rules.cost(kept(fields))).toBeGreaterThan(rules.cost(kept()));
  });

  test('counts a use in full, and those before it by their age', () => {
    const used = kept({ uses: 4 });
    touch(used, halfLifeMs);
    expect(used).toMatchObject({ uses: 3, lastUsedMs: halfLifeMs });
  });

  test('by lru leaves in the order of its last use, whatever it costs', () => {
    expect(rules.lru(kept({ lastUsedMs: 1, restoreSeconds: 9 }))).toBeLessThan(
      rules.lru(kept({ lastUsedMs: 2 })),
    );
  });

  test('is ranked as its values are, at any time', () => {
    const random = seededRandom(1);
    const some = () =>
      kept({
        restoreSeconds: 0.001 + random.unit(),
        numBytes: random.from(1, 100) * 1024,
        uses: 1 + random.unit() * 9,
        lastUsedMs: random.below(halfLifeMs),
      });
    for (let i = 0; i < 1000; i++) {
      const [a, b] = [some(), some()];
      const nowMs = halfLifeMs * random.from(1, 5);
      expect(rules.cost(a) < rules.cost(b)).toBe(value(a, nowMs) < value(b, nowMs));
    }
  });
});
