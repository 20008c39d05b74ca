// Who comes: the holder of a bearer key. Keys come from a file (config.ts) or from Tenants (tenants.ts); where they come
// from no key, everybody may enter, and config.ts sees to it that this was meant.

import { createHash, timingSafeEqual } from 'node:crypto';
import { GatewayError } from './errors.ts';

/** Returns the name of the key's holder for an Authorization header, null where nobody needs a key, or throws a 401. */
export type Authenticate = (authorization: string | undefined) => string | null;

export type Holder = { name: string; digest: Buffer };

/** @param holders  of keys as of now; the first of those with one key has it */
export function createAuthenticate(holders: () => readonly Holder[]): (authorization?: string) => string {
  return (authorization) => {
    const given = /^Bearer +(\S+) *$/i.exec(authorization ?? '')?.[1];
    if (given === undefined) {
      throw new GatewayError('missing_api_key', 'Authorization: expected `Bearer KEY`, got no bearer key');
    }
    const digest = digestOfKey(given);
    // Digests are of one length, and every key is compared, so the time taken tells nothing about a key.
    const matching = holders().filter((holder) => timingSafeEqual(holder.digest, digest));
    if (matching[0] === undefined) {
      throw new GatewayError('invalid_api_key', 'Authorization: the bearer key is not one of this gateway');
    }
    return matching[0].name;
  };
}

export function digestOfKey(key: string): Buffer {
  return createHash('sha256').update(key).digest();
}
