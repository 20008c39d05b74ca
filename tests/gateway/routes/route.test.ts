import { describe, expect, test } from 'vitest';
import type { AdapterRoute } from '../../../crds/types.ts';
import type { AdapterList, ModelCard, Tier } from '../../../engine/protocol.ts';
import { newEndpoint } from '../../../gateway/endpoints.ts';
import {
  type Asker,
  routeRules,
  sharesNow,
  steppedWeights,
  stickyKey,
  warmthOf,
} from '../../../gateway/routes/route.ts';
import { adapterRoute } from '../resources.ts';

const asker = (parts: Partial<Asker> = {}): Asker => ({
  tenant: 'acme',
  user: null,
  header: () => undefined,
  ...parts,
});

describe('who belongs together', () => {
  const keyOf = (sticky: AdapterRoute['spec']['sticky'], parts?: Partial<Asker>) =>
    stickyKey(routeRules(adapterRoute('r', [], {}, sticky && { sticky })), asker(parts));

  test('is nobody by default, and nobody who does not say who asks', () => {
    expect(keyOf(undefined, { user: 'ann' })).toBeNull();
    expect(keyOf({ by: 'User' })).toBeNull();
    expect(keyOf({ by: 'Header', header: 'x-chat' })).toBeNull();
    expect(keyOf({ by: 'Tenant' }, { tenant: null })).toBeNull();
  });

  test('is said by the user of the body, within a tenant', () => {
    const ann = keyOf({ by: 'User' }, { user: 'ann' });
    expect(keyOf({ by: 'User' }, { user: 'ann' })).toBe(ann);
    expect(keyOf({ by: 'User' }, { user: 'bob' })).not.toBe(ann);
    expect(keyOf({ by: 'User' }, { user: 'ann', tenant: 'globex' })).not.toBe(ann);
  });

  test('is said by a header, or by the tenant alone', () => {
    const header = (name: string) => (name === 'x-chat' ? 'chat-1' : undefined);
    expect(keyOf({ by: 'Header', header: 'x-chat' }, { header })).toEqual(expect.any(String));
    expect(keyOf({ by: 'Tenant' }, { user: 'ann' })).toBe(keyOf({ by: 'Tenant' }, { user: 'bob' }));
  });
});

describe('a target is', () => {
  const engine = (name: string, tier: Tier | 'none' | 'unknown', baseModel = 'base') => {
    const cards = new Map(tier === 'none' ? [] : [['sql', { id: 'sql' } as ModelCard]]);
    const list = { object: 'list', data: [{ names: ['sql'], tier }] } as unknown as AdapterList;
    const made = newEndpoint({ id: name, name, url: 'http://x', baseModel });
    return { ...made, isReady: true, cards, adapterList: tier === 'unknown' ? null : list };
  };
  const target = { name: 'sql', baseModel: 'base' };

  test.each<[string, number | 'all', number | 'all', (Tier | 'none' | 'unknown')[], string]>([
    ['nobody has it', 1, 1, ['none', 'none'], 'absent'],
    ['one has it on the device', 1, 2, ['device', 'none'], 'warm'],
    ['one has it in the host arena', 1, 1, ['host'], 'warm'],
    ['all have it on disk', 1, 1, ['disk', 'disk'], 'cold'],
    ['one of two that are asked for', 2, 2, ['device', 'disk'], 'cold'],
    ['one of two that are asked for, the other not loaded yet', 2, 2, ['device', 'none'], 'cold'],
    ['the only copy that it has, where two are asked for', 2, 1, ['device', 'none'], 'warm'],
    ['one of all', 'all', 'all', ['device', 'none'], 'cold'],
    ['both of all', 'all', 'all', ['device', 'host'], 'warm'],
    ['an engine that tells no tiers', 1, 1, ['unknown'], 'warm'],
  ])('when %s', (_, warmCopies, copies, tiers, expected) => {
    const engines = tiers.map((tier, index) => engine(`e${index}`, tier));
    expect(warmthOf({ ...target, copies }, warmCopies, engines)).toBe(expected);
  });

  test('not served by engines of another base model, nor by those that are away', () => {
    const away = { ...engine('e1', 'device'), isReady: false };
    expect(warmthOf(target, 1, [engine('e0', 'device', 'other'), away])).toBe('absent');
  });
});

describe('shares', () => {
  const targets = [
    { name: 'v1', baseModel: 'base', weight: 90, isStable: true },
    { name: 'v2', baseModel: 'base', weight: 10, isStable: false },
  ];
  const never = () => false;
  const always = () => true;
  const named =
    (...names: string[]) =>
    ({ name }: { name: string }) =>
      names.includes(name);
  const weights = (shares: { weight: number }[]) => shares.map(({ weight }) => weight);

  test('are the weights of the spec while all are in', () => {
    expect(weights(sharesNow(targets, never, always))).toEqual([90, 10]);
  });

  test('leave out what is cold, unless all are', () => {
    expect(weights(sharesNow(targets, never, named('v1')))).toEqual([90, 0]);
    expect(weights(sharesNow(targets, never, never))).toEqual([90, 10]);
  });

  test('leave out what was aborted, also when nothing else had a weight', () => {
    expect(weights(sharesNow(targets, named('v2'), always))).toEqual([90, 0]);
    const shifted = targets.map((target, index) => ({ ...target, weight: index * 100 }));
    expect(weights(sharesNow(shifted, named('v2'), always))).toEqual([1, 0]);
    // The stable one is cold then, and better than one that fails.
    expect(weights(sharesNow(shifted, named('v2'), named('v2')))).toEqual([1, 0]);
  });
});

test('what was aborted under an earlier spec counts no more', () => {
  const route = adapterRoute('r', [{ adapter: 'a' }, { adapter: 'b' }], { generation: 3 });
  const aborted = (target: string, generation: number) => ({ target, generation, message: 'x', at: '' });
  const status = { aborted: [aborted('a', 2), aborted('b', 3)] };
  expect([...routeRules({ ...route, status }).aborted]).toEqual(['b']);
});

test('steps take the place of weights, the first until the operator has taken another for this spec', () => {
  const steps = [5, 50, 100].map((percent) => ({ percent, minutes: 10 }));
  const route = adapterRoute('r', [{ adapter: 'a' }, { adapter: 'b' }], { generation: 2 }, { steps });
  const at = (index: number, generation: number) =>
    steppedWeights({ ...route, status: { step: { index, generation, since: '' } } });
  expect(steppedWeights(route)).toEqual([95, 5]);
  expect(at(1, 2)).toEqual([50, 50]);
  expect(at(2, 2)).toEqual([0, 100]);
  expect(at(1, 1)).toEqual([95, 5]);
});
