import { describe, expect, test } from 'vitest';
import { lowestPriority } from '../../../engine/protocol.ts';
import { mayBeSent, mostPlacesOf, placesOf } from '../../../gateway/queue/places.ts';

const bounds = { maxInFlightPerEngine: 100, maxSequences: 8 };
const claimant = { tenant: 'quiet', weight: 1, priority: 0 };

/** What is in flight, by tenant of weight 1, or [weight, count]. */
function sent(counts: Record<string, number | [number, number]>) {
  const byTenant = new Map(
    Object.entries(counts).map(([tenant, count]) => {
      const [weight, of] = typeof count === 'number' ? [1, count] : count;
      return [tenant, { weight, count: of }];
    }),
  );
  return { inFlight: [...byTenant.values()].reduce((sum, { count }) => sum + count, 0), byTenant };
}

test.each([
  [{ maxInFlightPerEngine: 100, maxSequences: 8 }, 10, 18],
  [{ maxInFlightPerEngine: 12, maxSequences: 8 }, 10, 12],
  [{ maxInFlightPerEngine: 6, maxSequences: 8 }, 6, 6],
  [{ maxInFlightPerEngine: 32, maxSequences: undefined }, 32, 32],
])('of %j an engine has %i places, and %i for those who have fewer there', (given, places, most) => {
  expect([placesOf(given), mostPlacesOf(given)]).toEqual([places, most]);
});

describe('beyond the places', () => {
  test('goes who has fewer there than another, by weight', () => {
    expect(mayBeSent(sent({ flood: 9 }), bounds, { ...claimant, tenant: 'flood' })).toBe(true);
    expect(mayBeSent(sent({ flood: 10 }), bounds, { ...claimant, tenant: 'flood' })).toBe(false);
    expect(mayBeSent(sent({ flood: 10 }), bounds, claimant)).toBe(true);
    expect(mayBeSent(sent({ flood: 10, quiet: 3 }), bounds, claimant)).toBe(true);
    expect(mayBeSent(sent({ flood: 6, quiet: 5 }), bounds, claimant)).toBe(false);
    expect(mayBeSent(sent({ heavy: [4, 11], quiet: 2 }), bounds, claimant)).toBe(false);
    expect(mayBeSent(sent({ light: [1, 4], quiet: [2, 6] }), bounds, { ...claimant, weight: 2 })).toBe(true);
  });

  test('goes none of the lowest priority, and none beyond the last place', () => {
    expect(mayBeSent(sent({ flood: 10 }), bounds, { ...claimant, priority: lowestPriority })).toBe(false);
    expect(mayBeSent(sent({ flood: 17 }), bounds, claimant)).toBe(true);
    expect(mayBeSent(sent({ flood: 18 }), bounds, claimant)).toBe(false);
  });
});
