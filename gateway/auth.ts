// Who comes: the holder of a bearer key, or of a token (identity/tokens.ts). Keys come from a file (config.ts), a
// tenants file (identity/tenants-file.ts) or Tenants (tenants.ts); where they come from none, everybody may enter, and config.ts sees to
// it that this was meant.

import { GatewayError } from './errors.ts';
import { digestOfKey } from './identity/keys.ts';
import { isTokenShaped } from './identity/oidc.ts';
import type { Tokens } from './identity/tokens.ts';
import type { Limits } from './quota/limits.ts';

export type Caller = {
  tenant: string;
  /** Tells the keys of a tenant apart and says nothing of them. */
  keyId: string;
  /** Of the key, beside those of its tenant. */
  limits?: Limits;
};

/** Returns who shows an Authorization header, null where nobody needs a key, or throws a 401. */
export type Authenticate = (authorization: string | undefined) => Caller | null | Promise<Caller | null>;

/** @param digest  of the key, as digestOfKey makes it */
export type Holder = { name: string; digest: string; limits?: Limits };

/**
 * Callers by the digest of their key; of two holders of one key the first has it.
 *
 * A look-up takes a time that depends on the digests, as comparing them would not. It tells nothing of a key: who could
 * learn a digest that way would have to find what SHA-256 makes it of, and keys have 16 characters at least.
 */
export function callersByDigest(holders: Iterable<Holder>): Map<string, Caller> {
  const callers = new Map<string, Caller>();
  for (const { name, digest, limits } of holders) {
    if (callers.has(digest)) continue;
    callers.set(digest, { tenant: name, keyId: `key:${digest.slice(0, 12)}`, ...(limits && { limits }) });
  }
  return callers;
}

/**
 * @param callers  as of now
 * @param tokens   where no issuer is trusted, bearers of tokens are strangers
 */
export function createAuthenticate(
  callers: () => ReadonlyMap<string, Caller>,
  tokens: Tokens,
): (authorization?: string) => Caller | Promise<Caller> {
  return (authorization) => {
    const given = bearerOf(authorization);
    const caller = callers().get(digestOfKey(given));
    if (caller !== undefined) return caller;
    if (isTokenShaped(given) && tokens.isOn) return tokens.callerOf(given);
    throw new GatewayError('invalid_api_key', 'Authorization: the bearer key is not one of this gateway');
  };
}

/** @throws GatewayError missing_api_key */
export function bearerOf(authorization: string | undefined): string {
  const given = /^Bearer +(\S+) *$/i.exec(authorization ?? '')?.[1];
  if (given === undefined) {
    throw new GatewayError('missing_api_key', 'Authorization: expected `Bearer KEY`, got no bearer key');
  }
  return given;
}
