import { expect, test } from 'vitest';
import { type Endpoint, listedEngine, newEndpoint } from '../../gateway/endpoints.ts';
import { pickEndpoint } from '../../gateway/pick-endpoint.ts';

const endpoint = (url: string, fields: Partial<Endpoint> = {}): Endpoint => ({
  ...newEndpoint(listedEngine(url)),
  ...fields,
});
const picked = (endpoints: Endpoint[], maxInFlight = 4) => pickEndpoint('x', endpoints, maxInFlight)?.url;
const onDevice = new Set(['x']);

test.each<[string, Endpoint[], string]>([
  [
    'the engine with the least requests in flight',
    [endpoint('a', { inFlight: 2 }), endpoint('b', { inFlight: 1 }), endpoint('c', { inFlight: 3 })],
    'b',
  ],
  [
    'of equally busy engines the one with the adapter on its device',
    [endpoint('a'), endpoint('b', { namesOnDevice: onDevice })],
    'b',
  ],
  [
    'a free engine rather than a busy one with the adapter on its device',
    [endpoint('a', { inFlight: 1, namesOnDevice: onDevice }), endpoint('b')],
    'b',
  ],
  [
    'of equal engines the one that was sent the least',
    [endpoint('a', { numSent: 5 }), endpoint('b', { numSent: 4 })],
    'b',
  ],
])('picks %s', (_, endpoints, url) => {
  expect(picked(endpoints)).toBe(url);
});

test('picks no engine that is full', () => {
  expect(
    picked([endpoint('a', { inFlight: 4, namesOnDevice: onDevice }), endpoint('b', { inFlight: 3 })]),
  ).toBe('b');
  expect(picked([endpoint('a', { inFlight: 4 })])).toBeUndefined();
});
