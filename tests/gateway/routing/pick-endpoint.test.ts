import { expect, test } from 'vitest';
import {
  type Candidate,
  type PickSettings,
  pickEndpoint,
  type RoutingRule,
} from '../../../gateway/routing/pick-endpoint.ts';
import { seededRandom } from '../../fixtures/seeded-random.ts';

type Named = Candidate & { name: string };

/** An engine that is idle, well, and has nothing of use. */
const engine = (name: string, fields: Partial<Candidate> = {}): Named => ({
  name,
  inFlight: 0,
  othersInFlight: 0,
  workTokens: 0,
  lackTokens: 0,
  cachedTokens: 0,
  loadTokens: 0,
  weight: 1,
  ejectedUntilMs: 0,
  lastTurn: 0,
  ...fields,
});
const settings: PickSettings = { rule: 'affinity', maxInFlight: 100, maxLoadFactor: 1.5 };
const nowMs = 1_000;
const pick = (engines: Named[], promptTokens = 100, fields: Partial<PickSettings> = {}) => {
  const found = pickEndpoint(promptTokens, engines, { ...settings, ...fields }, nowMs);
  return found && `${found.picked.name}: ${found.reason}`;
};

test.each<[string, Named[], string]>([
  ['the one that has to do the least', [engine('a', { workTokens: 9 }), engine('b')], 'b: load'],
  ['of equals, the one whose turn is longest ago', [engine('a', { lastTurn: 2 }), engine('b')], 'b: turn'],
  [
    'the one whose KV has the prompt, though it has more to do',
    [engine('a'), engine('b', { cachedTokens: 80, workTokens: 70 })],
    'b: prefix',
  ],
  [
    'another when what it saves is less than the work before it',
    [engine('a'), engine('b', { cachedTokens: 80, workTokens: 90 })],
    'a: load',
  ],
  [
    'one that has the KV of the prompt no more than another that has room for it',
    [engine('a'), engine('b', { cachedTokens: 40, lackTokens: 60 })],
    'a: load',
  ],
  [
    'the one with the adapter on its device',
    [engine('a', { loadTokens: 50 }), engine('b', { workTokens: 40 })],
    'b: adapter',
  ],
  [
    'one that has to load, when the others have more to do than that takes',
    [engine('a', { loadTokens: 50 }), engine('b', { workTokens: 60 })],
    'a: load',
  ],
  [
    'the one that has the adapter nearer',
    [engine('a', { loadTokens: 50 }), engine('b', { loadTokens: 5 })],
    'b: adapter',
  ],
  [
    'an old engine with some work rather than one that is new',
    [engine('a', { weight: 0.1 }), engine('b', { workTokens: 500 })],
    'b: load',
  ],
  [
    'a new engine when the old ones have much to do',
    [engine('a', { weight: 0.1 }), engine('b', { workTokens: 2_000 })],
    'a: load',
  ],
])('picks %s', (_, engines, expected) => {
  expect(pick(engines)).toBe(expected);
});

test('no engine has much more than its share in flight, whatever its KV holds', () => {
  const hot = engine('hot', { inFlight: 8, cachedTokens: 100 });
  const others = [engine('b', { inFlight: 3, workTokens: 50 }), engine('c', { inFlight: 3 })];
  // The share of 15 requests is 5, of which half as much again is allowed.
  expect(pick([hot, ...others], 10_000)).toBe('c: bounded');
  expect(pick([hot, ...others], 10_000, { maxLoadFactor: 2 })).toBe('hot: prefix');
});

test('what others sent makes an engine hot as well, and does not fill the places of this gateway', () => {
  const hot = engine('hot', { inFlight: 2, othersInFlight: 8, cachedTokens: 100 });
  const others = [engine('b', { inFlight: 3 }), engine('c', { inFlight: 3 })];
  expect(pick([hot, ...others], 10_000)).toBe('b: bounded');
  expect(pick([{ ...hot, othersInFlight: 0 }, ...others], 10_000)).toBe('hot: prefix');
  expect(pick([engine('busy', { othersInFlight: 500 })])).toBe('busy: only');
  expect(
    pick([engine('a', { inFlight: 1, othersInFlight: 2 }), engine('b', { inFlight: 2 })], 100, {
      rule: 'least-load',
    }),
  ).toBe('b: load');
});

test('four in flight are no heat', () => {
  const engines = [engine('a', { inFlight: 3, cachedTokens: 90, workTokens: 30 }), engine('b')];
  expect(pick(engines)).toBe('a: prefix');
});

test('an engine that is full gets nothing, and when all are the request waits', () => {
  const full = engine('a', { inFlight: 100, cachedTokens: 100 });
  expect(pick([full, engine('b', { inFlight: 99, workTokens: 10_000 })])).toBe('b: only');
  expect(pick([full])).toBeNull();
  expect(pick([])).toBeNull();
});

test('an engine that fails gets nothing until its time is over', () => {
  const ejected = engine('a', { ejectedUntilMs: nowMs + 1, cachedTokens: 100 });
  expect(pick([ejected, engine('b')])).toBe('b: only');
  expect(pick([{ ...ejected, ejectedUntilMs: nowMs }, engine('b')])).toBe('a: prefix');
});

test('of engines that fail, no more than half are left out: those whose time is over first are asked', () => {
  const until = (name: string, ms: number) => engine(name, { ejectedUntilMs: nowMs + ms });
  expect(pick([until('a', 30), until('b', 10), until('c', 20)])).toBe('b: turn');
  expect(pick([until('a', 30)])).toBe('a: only');
});

test.each<[RoutingRule, string]>([
  ['least-load', 'b: load'],
  ['round-robin', 'c: turn'],
])('by %s, neither KV nor adapters count', (rule, expected) => {
  const engines = [
    engine('a', { inFlight: 2, cachedTokens: 100, lastTurn: 2 }),
    engine('b', { inFlight: 1, loadTokens: 100, lastTurn: 3 }),
    engine('c', { inFlight: 2, lastTurn: 1 }),
  ];
  expect(pick(engines, 100, { rule })).toBe(expected);
});

test('in any situation somebody with room is picked, and nobody has more than the bound', () => {
  const random = seededRandom(7);
  for (let run = 0; run < 2_000; run++) {
    const engines = Array.from({ length: 1 + random.below(6) }, (_, i) =>
      engine(`${i}`, {
        inFlight: random.below(20),
        othersInFlight: random.below(20),
        lackTokens: random.below(100),
        workTokens: random.below(1_000),
        cachedTokens: random.below(100),
        loadTokens: random.below(100),
        lastTurn: random.below(10),
      }),
    );
    const { picked } = pickEndpoint(100, engines, { ...settings, maxLoadFactor: 1 }, nowMs)!;
    const numIn = ({ inFlight, othersInFlight }: Candidate) => inFlight + othersInFlight;
    const share = engines.reduce((sum, one) => sum + numIn(one), 1) / engines.length;
    expect(numIn(picked) + 1).toBeLessThanOrEqual(Math.max(4, Math.ceil(share)));
  }
});
