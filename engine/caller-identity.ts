/**
 * Who calls, by Kubernetes ServiceAccount: a bearer token is a JWT that the API server signed for the audience
 * `motet-engine`. It is checked here, against the API server's public keys (JWKS), so that no request waits for the API
 * server, and known keys go on working while it is away. A token with a key that is not known asks for the keys again,
 * at a bounded rate.
 */
import { createHash } from 'node:crypto';
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { createLocalJWKSet, errors, type JSONWebKeySet, type JWTVerifyGetKey, jwtVerify } from 'jose';
import type { Logger } from 'pino';
import { Agent, request } from 'undici';
import { EngineError } from './errors.ts';

/** Whom tokens are for. */
export const engineAudience = 'motet-engine';

export interface CallerIdentityOptions {
  /** Accepted ServiceAccounts, as `namespace/name`. */
  trusted: readonly string[];
  /** Of the API server. */
  apiUrl: string;
  /** With `token` and `ca.crt`, as Kubernetes mounts them into a pod. Read anew each time, since both are rotated. */
  serviceAccountDir: string;
  log: Logger;
  /** Unix milliseconds. */
  wallClock: () => number;
  /** Between two questions for the keys. */
  minRefreshMs?: number;
}

const algorithms = ['RS256', 'RS384', 'RS512', 'ES256', 'ES384', 'ES512', 'EdDSA'];
const clockSkewSeconds = 10;
const requestMs = 5000;
/** Keys this old are asked for again beside the work, so that one that was withdrawn does not stay for ever. */
const maxKeyAgeMs = 3600_000;
const maxTokenBytes = 16 * 1024;
/** A token that was checked is known for so long; it spares an RSA check a request. */
const maxKnownMs = 300_000;
const maxKnown = 1024;

interface Keys {
  issuer: string;
  find: JWTVerifyGetKey;
  atMs: number;
}

export class CallerIdentity {
  readonly #options: Required<CallerIdentityOptions>;
  readonly #trusted: ReadonlySet<string>;
  /** Hash of a good token to when it must be checked again; oldest first. */
  readonly #known = new Map<string, number>();
  #keys: Keys | null = null;
  #askedMs = Number.NEGATIVE_INFINITY;
  /** Whether the last question for the keys had an answer. */
  #wasAnswered = true;
  #refreshing: Promise<void> | null = null;

  constructor(options: CallerIdentityOptions) {
    this.#options = { minRefreshMs: 5000, ...options };
    this.#trusted = new Set(
      options.trusted.map((account) => `system:serviceaccount:${account.replace('/', ':')}`),
    );
  }

  /**
   * @throws EngineError unauthorized for a token that is not good; forbidden for one of another ServiceAccount; not_ready
   *         when the keys that it takes to know are not to be had
   */
  async check(token: string): Promise<void> {
    const nowMs = this.#options.wallClock();
    const id = createHash('sha256').update(token).digest('base64');
    const knownUntilMs = this.#known.get(id);
    if (knownUntilMs !== undefined && nowMs < knownUntilMs) return;
    this.#known.delete(id);

    const { sub, exp } = await this.#verify(token);
    if (!this.#trusted.has(sub)) {
      throw new EngineError('forbidden', `${sub} is not among those who may call this engine`);
    }
    if (this.#known.size >= maxKnown) this.#known.delete(this.#known.keys().next().value!);
    this.#known.set(id, Math.min(exp * 1000, nowMs + maxKnownMs));
  }

  /** Asks for the keys now, so that the first caller need not wait. */
  async warmUp(): Promise<void> {
    await this.#refresh();
  }

  async #verify(token: string): Promise<{ sub: string; exp: number }> {
    if (token.length > maxTokenBytes || !/^[\w-]+\.[\w-]+\.[\w-]+$/.test(token)) {
      throw refused('expected a ServiceAccount token, got something else');
    }
    const age = this.#options.wallClock() - (this.#keys?.atMs ?? 0);
    if (this.#keys === null) await this.#refresh();
    else if (age > maxKeyAgeMs) void this.#refresh();
    try {
      return await this.#verifyByKeys(token);
    } catch (error) {
      if (!(error instanceof errors.JWKSNoMatchingKey)) throw refusal(error);
    }
    // Perhaps the API server has new keys.
    await this.#refresh();
    try {
      return await this.#verifyByKeys(token);
    } catch (error) {
      if (!(error instanceof errors.JWKSNoMatchingKey) || this.#wasAnswered) throw refusal(error);
      throw new EngineError('not_ready', 'the API server is away, and with it the key of this token', {
        cause: error,
      });
    }
  }

  async #verifyByKeys(token: string): Promise<{ sub: string; exp: number }> {
    if (this.#keys === null) {
      throw new EngineError('not_ready', 'the API server has not said yet whose tokens are good');
    }
    const { payload } = await jwtVerify(token, this.#keys.find, {
      issuer: this.#keys.issuer,
      audience: engineAudience,
      algorithms,
      clockTolerance: clockSkewSeconds,
      currentDate: new Date(this.#options.wallClock()),
      requiredClaims: ['sub', 'exp'],
    });
    return { sub: payload.sub!, exp: payload.exp! };
  }

  /** Asks for the keys, unless that was just done. Keeps those it has when there is no answer. */
  #refresh(): Promise<void> {
    const { log, minRefreshMs, wallClock } = this.#options;
    if (this.#refreshing) return this.#refreshing;
    if (wallClock() - this.#askedMs < minRefreshMs) return Promise.resolve();
    this.#askedMs = wallClock();
    this.#refreshing = this.#askKeys()
      .then(
        (keys) => {
          this.#keys = keys;
          this.#wasAnswered = true;
        },
        (error) => {
          this.#wasAnswered = false;
          log.warn({ reason: error.code ?? error.message }, 'the API server did not give its token keys');
        },
      )
      .finally(() => {
        this.#refreshing = null;
      });
    return this.#refreshing;
  }

  async #askKeys(): Promise<Keys> {
    const { apiUrl, serviceAccountDir, wallClock } = this.#options;
    const token = (await readFile(join(serviceAccountDir, 'token'), 'utf8')).trim();
    const ca = await readFile(join(serviceAccountDir, 'ca.crt'), 'utf8');
    const agent = new Agent({ allowH2: false, connect: { ca, timeout: requestMs } });
    const get = async (path: string) => {
      const { statusCode, body } = await request(new URL(path, apiUrl), {
        dispatcher: agent,
        headers: { authorization: `Bearer ${token}`, accept: 'application/json, application/jwk-set+json' },
        headersTimeout: requestMs,
        bodyTimeout: requestMs,
        signal: AbortSignal.timeout(2 * requestMs),
      });
      if (statusCode !== 200) {
        body.on('error', () => {}).destroy();
        throw new Error(`${path}: the API server answered ${statusCode}`);
      }
      return (await body.json()) as Record<string, unknown>;
    };
    try {
      const { issuer } = await get('/.well-known/openid-configuration');
      if (typeof issuer !== 'string') throw new Error('openid-configuration: expected an issuer');
      const jwks = (await get('/openid/v1/jwks')) as unknown as JSONWebKeySet;
      return { issuer, find: createLocalJWKSet(jwks), atMs: wallClock() };
    } finally {
      await agent.destroy();
    }
  }
}

const refused = (message: string) => new EngineError('unauthorized', message);

/** What jose found, in a sentence that says nothing of the token. */
function refusal(error: unknown): EngineError {
  if (error instanceof EngineError) return error;
  if (error instanceof errors.JWTExpired) return refused('the ServiceAccount token has expired');
  if (error instanceof errors.JWTClaimValidationFailed) {
    return refused(`the ServiceAccount token: expected another ${error.claim}`);
  }
  if (error instanceof errors.JOSEError)
    return refused('the ServiceAccount token is not signed by this cluster');
  throw error;
}
