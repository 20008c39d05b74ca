// One issuer of OpenID Connect, and what it says in a token: a bearer token is a JWT that it signed. It is checked here by the
// issuer's public keys (JWKS), so no request waits for the issuer, and known keys go on while it is away, for a day. Only
// signatures by a private key count: a token signed with a public key as if that were a shared secret (HS256), or with none,
// is refused by its algorithm. For whom a token is, and whose, is said in tokens.ts.

import {
  createLocalJWKSet,
  decodeJwt,
  errors,
  type JSONWebKeySet,
  type JWTPayload,
  type JWTVerifyGetKey,
  jwtVerify,
} from 'jose';
import { Agent, request } from 'undici';
import { GatewayError } from '../errors.ts';
import { digestOfKey } from './keys.ts';

/** What a token that was checked says, for as long as it is good. */
export type Identity = { readonly issuer: string; readonly claims: Readonly<JWTPayload> };

export type OidcSettings = {
  /** As tokens have it in `iss`; its configuration is at `/.well-known/openid-configuration` below. */
  issuer: string;
  /** What tokens must have in `aud`. */
  audience: string;
  /** Which claim names the tenant. */
  tenantClaim: string;
};

export type IssuerOptions = {
  issuer: string;
  log: { warn(fields: object, message: string): void };
  /** Milliseconds, Unix. */
  now?: () => number;
};

const algorithms = ['RS256', 'RS384', 'RS512', 'PS256', 'PS384', 'PS512', 'ES256', 'ES384', 'ES512', 'EdDSA'];
const clockSkewSeconds = 30;
/** Keys this old are asked for again beside the work, so that one that was withdrawn leaves. */
const maxKeyAgeMs = 600_000;
/** The longest that keys are trusted while the issuer does not answer. */
const maxAwayMs = 86_400_000;
/** Between two questions for the keys, however many tokens come with a key id that nobody knows. */
const minRefreshMs = 10_000;
const requestMs = 5_000;
const maxAnswerBytes = 1 << 20;
/** A token that was checked is known for so long; it spares a signature a request. */
const maxKnownMs = 60_000;
const maxKnown = 4_096;

type Keys = { find: JWTVerifyGetKey; text: string; atMs: number };

/** Whether a bearer key may be a token: three parts, the first of them a JSON object. */
export function isTokenShaped(given: string): boolean {
  return /^eyJ[\w-]*\.[\w-]+\.[\w-]*$/.test(given);
}

/** Who says that it signed a token, which is nothing yet. Null: nobody. */
export function claimedIssuer(token: string): string | null {
  try {
    return decodeJwt(token).iss ?? null;
  } catch {
    return null;
  }
}

export class Issuer {
  readonly #options: IssuerOptions;
  readonly #now: () => number;
  /** By the token's digest; oldest first. */
  readonly #known = new Map<string, { identity: Identity; untilMs: number }>();
  #keys: Keys | null = null;
  #askedMs = Number.NEGATIVE_INFINITY;
  #refreshing: Promise<void> | null = null;

  constructor(options: IssuerOptions) {
    this.#options = options;
    this.#now = options.now ?? Date.now;
  }

  /** @throws GatewayError invalid_token; issuer_unavailable when the keys that it takes to know are not to be had */
  async identityOf(token: string): Promise<Identity> {
    const id = digestOfKey(token);
    const known = this.#known.get(id);
    if (known !== undefined && this.#now() < known.untilMs) return known.identity;
    this.#known.delete(id);

    const claims = await this.#verify(token);
    const identity = { issuer: this.#options.issuer, claims };
    if (this.#known.size >= maxKnown) this.#known.delete(this.#known.keys().next().value!);
    const endMs = (claims.exp! + clockSkewSeconds) * 1000;
    this.#known.set(id, { identity, untilMs: Math.min(endMs, this.#now() + maxKnownMs) });
    return identity;
  }

  async #verify(token: string): Promise<JWTPayload> {
    const ageMs = this.#keyAgeMs();
    if (ageMs > maxAwayMs) await this.#refresh();
    else if (ageMs > maxKeyAgeMs) void this.#refresh();
    try {
      return await this.#verifyByKeys(token);
    } catch (error) {
      if (!(error instanceof errors.JWKSNoMatchingKey)) throw refusal(error);
    }
    // Perhaps the issuer has new keys.
    await this.#refresh();
    return this.#verifyByKeys(token).catch((error) => Promise.reject(refusal(error)));
  }

  async #verifyByKeys(token: string): Promise<JWTPayload> {
    if (this.#keys === null || this.#keyAgeMs() > maxAwayMs) {
      throw new GatewayError(
        'issuer_unavailable',
        'the issuer of tokens does not say by which keys they are good',
      );
    }
    const { payload } = await jwtVerify(token, this.#keys.find, {
      issuer: this.#options.issuer,
      algorithms,
      clockTolerance: clockSkewSeconds,
      currentDate: new Date(this.#now()),
      requiredClaims: ['sub', 'exp'],
    });
    return payload;
  }

  #keyAgeMs(): number {
    return this.#now() - (this.#keys?.atMs ?? Number.NEGATIVE_INFINITY);
  }

  /** Asks for the keys, unless that was just done. Keeps those it has when there is no answer. */
  #refresh(): Promise<void> {
    if (this.#refreshing !== null) return this.#refreshing;
    if (this.#now() - this.#askedMs < minRefreshMs) return Promise.resolve();
    this.#askedMs = this.#now();
    this.#refreshing = this.#askKeys()
      .then((keys) => {
        // A key that was withdrawn takes along what it signed.
        if (keys.text !== this.#keys?.text) this.#known.clear();
        this.#keys = keys;
      })
      .catch((error: Error & { code?: string }) => {
        this.#options.log.warn(
          { issuer: this.#options.issuer, reason: error.code ?? error.message },
          'the issuer of tokens did not give its keys',
        );
      })
      .finally(() => {
        this.#refreshing = null;
      });
    return this.#refreshing;
  }

  async #askKeys(): Promise<Keys> {
    const { issuer } = this.#options;
    const agent = new Agent({ allowH2: false, connect: { timeout: requestMs } });
    try {
      const configuration = JSON.parse(
        await getText(`${issuer.replace(/\/$/, '')}/.well-known/openid-configuration`, agent),
      ) as { issuer?: unknown; jwks_uri?: unknown };
      if (configuration.issuer !== issuer) throw new Error('openid-configuration: expected the same issuer');
      const { jwks_uri: keysUrl } = configuration;
      if (typeof keysUrl !== 'string' || !isSafeUrl(keysUrl))
        throw new Error('openid-configuration: expected an https URL in jwks_uri');
      const text = await getText(keysUrl, agent);
      return { find: createLocalJWKSet(JSON.parse(text) as JSONWebKeySet), text, atMs: this.#now() };
    } finally {
      await agent.destroy();
    }
  }
}

/** https, or the machine itself. */
export function isSafeUrl(text: string): boolean {
  if (!URL.canParse(text)) return false;
  const { protocol, hostname } = new URL(text);
  return (
    protocol === 'https:' || (protocol === 'http:' && /^(localhost|127\.[\d.]+|\[::1\])$/.test(hostname))
  );
}

async function getText(url: string, dispatcher: Agent): Promise<string> {
  const { statusCode, body } = await request(url, {
    dispatcher,
    headers: { accept: 'application/json, application/jwk-set+json' },
    headersTimeout: requestMs,
    bodyTimeout: requestMs,
    signal: AbortSignal.timeout(2 * requestMs),
  });
  // Read in any case; an error of it is thrown from here.
  const parts: Buffer[] = [];
  let sizeBytes = 0;
  for await (const part of body as AsyncIterable<Buffer>) {
    sizeBytes += part.length;
    if (sizeBytes > maxAnswerBytes) throw new Error(`expected at most ${maxAnswerBytes} bytes, got more`);
    parts.push(part);
  }
  if (statusCode !== 200) throw new Error(`expected status 200, got ${statusCode}`);
  return Buffer.concat(parts).toString('utf8');
}

export function refused(problem: string): GatewayError {
  return new GatewayError('invalid_token', `Authorization: the bearer token: ${problem}`);
}

/** What jose found, in a sentence that says nothing of the token. */
function refusal(error: unknown): unknown {
  if (error instanceof errors.JWTExpired) return refused('expected one that has not expired');
  if (error instanceof errors.JWTClaimValidationFailed)
    return refused(`expected another ${error.claim}, or one at all`);
  if (error instanceof errors.JOSEError) return refused('expected one that its issuer signed');
  // jose says so of a key that does not fit the algorithm.
  if (error instanceof TypeError) return refused('expected one that its issuer signed');
  return error;
}
