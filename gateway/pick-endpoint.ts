// Which engine gets a request, of those that have its model: the one with the least requests in flight; of equals
// the one with the adapter on its device; of those the one that was sent the least so far, so that turns are taken.

import type { Endpoint } from './endpoints.ts';

/**
 * The engine to use, or undefined when all of them are full.
 *
 * @param name  by which engines know the model
 */
export function pickEndpoint(
  name: string,
  endpoints: readonly Endpoint[],
  maxInFlight: number,
): Endpoint | undefined {
  const byPreference = (a: Endpoint, b: Endpoint) =>
    a.inFlight - b.inFlight ||
    Number(b.namesOnDevice.has(name)) - Number(a.namesOnDevice.has(name)) ||
    a.numSent - b.numSent;
  return endpoints.filter(({ inFlight }) => inFlight < maxInFlight).sort(byPreference)[0];
}
