// Who may enter: the holder of a configured bearer key. Without configured keys everybody; config.ts then refuses
// to listen on anything but loopback.

import { createHash, timingSafeEqual } from 'node:crypto';
import { GatewayError } from './errors.ts';

/** Returns the name of the key's holder for an Authorization header, or throws a 401. */
export type Authenticate = (authorization: string | undefined) => string | null;

export function createAuthenticate(apiKeys: Map<string, string> | null): Authenticate {
  if (apiKeys === null) return () => null;
  const holders = [...apiKeys].map(([name, key]) => ({ name, digest: sha256(key) }));

  return (authorization) => {
    const given = /^Bearer +(\S+) *$/i.exec(authorization ?? '')?.[1];
    if (given === undefined) {
      throw new GatewayError('missing_api_key', 'Authorization: expected `Bearer KEY`, got no bearer key');
    }
    const digest = sha256(given);
    // Digests are of one length, and every key is compared, so the time taken tells nothing about a key.
    const matching = holders.filter((holder) => timingSafeEqual(holder.digest, digest));
    if (matching[0] === undefined) {
      throw new GatewayError('invalid_api_key', 'Authorization: the bearer key is not one of this gateway');
    }
    return matching[0].name;
  };
}

function sha256(text: string): Buffer {
  return createHash('sha256').update(text).digest();
}
