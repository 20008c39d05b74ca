// Whose a token is. Each tenant has a rule: an issuer, an audience and claims that a token must have. By default the issuer and
// audience are the gateway's, and the claim is the one that names tenants. A token that two rules match is refused by name: to
// choose would give one tenant the rights of another.

import type { Caller } from '../auth.ts';
import { GatewayError } from '../errors.ts';
import { digestOfKey } from './keys.ts';
import {
  claimedIssuer,
  type Identity,
  Issuer,
  type IssuerOptions,
  type OidcSettings,
  refused,
} from './oidc.ts';

/** What a tenant says of its tokens; nothing: they name it in the gateway's claim. */
export type OidcMatch = { issuer?: string; audience?: string; claims?: Readonly<Record<string, string>> };

export type TokenRule = {
  tenant: string;
  issuer: string;
  audience: string;
  /** All of them, by this text or a list with it. */
  claims: Readonly<Record<string, string>>;
  /** The claim names the tenant: a list of names is none. */
  isByName: boolean;
};

/** `byTenant`: null where no list of tenants is kept, and whatever the gateway's claim says is one. */
export type TokenRules = { own: OidcSettings | null; byTenant: readonly TokenRule[] | null };

/** Null: no issuer is named, by the tenant or for the gateway. */
export function ruleOf(tenant: string, match: OidcMatch, own: OidcSettings | null): TokenRule | null {
  const issuer = match.issuer ?? own?.issuer;
  const audience = match.audience ?? own?.audience;
  if (issuer === undefined || audience === undefined) return null;
  if (match.claims !== undefined) return { tenant, issuer, audience, claims: match.claims, isByName: false };
  return own && { tenant, issuer, audience, claims: { [own.tenantClaim]: tenant }, isByName: true };
}

/** The tenant of a token that was checked. @throws invalid_token, ambiguous_token */
export function tenantOf(identity: Identity, { own, byTenant }: TokenRules): string {
  const { issuer, claims } = identity;
  const audiences = new Set([claims.aud ?? []].flat());
  const isForUs = (rule: { issuer: string; audience: string }) =>
    rule.issuer === issuer && audiences.has(rule.audience);
  const rules = byTenant === null ? (own === null ? [] : [own]) : byTenant;
  if (!rules.some(isForUs)) throw refused('expected another aud, or one at all');
  if (byTenant === null) return nameIn(claims, own!.tenantClaim);

  const found = byTenant.filter((rule) => isForUs(rule) && hasClaims(claims, rule));
  if (found.length === 1) return found[0]!.tenant;
  if (found.length > 1) {
    const [first, second] = found.map(({ tenant }) => tenant).sort();
    throw new GatewayError(
      'ambiguous_token',
      `Authorization: the bearer token is of two tenants, ${first} and ${second}; expected claims of one`,
    );
  }
  throw refused('expected one of a tenant of this gateway, got claims of none');
}

function hasClaims(claims: Identity['claims'], rule: TokenRule): boolean {
  return Object.entries(rule.claims).every(([name, text]) => {
    const value = Object.hasOwn(claims, name) ? claims[name] : undefined;
    return value === text || (!rule.isByName && Array.isArray(value) && value.includes(text));
  });
}

function nameIn(claims: Identity['claims'], claim: string): string {
  const name = Object.hasOwn(claims, claim) ? claims[claim] : undefined;
  if (typeof name === 'string' && /^[A-Za-z0-9][\w.@:-]{0,127}$/.test(name)) return name;
  throw refused(`expected the name of a tenant in its claim ${claim}, got something else`);
}

/**
 * Tenants every token of whom is also another's: tenant -> the other. So it is where the other's claims are among its own.
 * What two tenants share beyond that shows at the door alone.
 */
export function ambiguousTenants(rules: readonly TokenRule[]): Map<string, string> {
  const keyOf = ({ issuer, audience }: TokenRule, claims: [string, string][]) =>
    JSON.stringify([issuer, audience, claims.sort(([a], [b]) => (a < b ? -1 : 1))]);
  const byClaims = Map.groupBy(rules, (rule) => keyOf(rule, Object.entries(rule.claims)));
  const found = new Map<string, string>();
  for (const rule of rules) {
    const claims = Object.entries(rule.claims);
    for (let subset = 1; subset < 1 << claims.length && !found.has(rule.tenant); subset += 1) {
      const some = claims.filter((_, index) => (subset >> index) & 1);
      const other = byClaims.get(keyOf(rule, some))?.find(({ tenant }) => tenant !== rule.tenant);
      if (other !== undefined) found.set(rule.tenant, other.tenant);
    }
  }
  return found;
}

export type TokensOptions = {
  /** As of now; another object when something changed. */
  rules: () => TokenRules;
} & Omit<IssuerOptions, 'issuer'>;

/** The tokens of all issuers that are trusted now. */
export class Tokens {
  readonly #options: TokensOptions;
  readonly #issuers = new Map<string, Issuer>();
  /** What came of the rules for tokens that were checked. */
  #found: { rules: TokenRules; callers: WeakMap<Identity, Caller> } | null = null;

  constructor(options: TokensOptions) {
    this.#options = options;
  }

  /** Somebody may show a token. */
  get isOn(): boolean {
    this.#follow();
    return this.#issuers.size > 0;
  }

  /** @throws invalid_token, ambiguous_token, issuer_unavailable */
  async callerOf(token: string): Promise<Caller> {
    this.#follow();
    const issuer = this.#issuers.get(claimedIssuer(token) ?? '');
    if (issuer === undefined) throw refused('expected one of an issuer that is trusted here');
    const identity = await issuer.identityOf(token);
    const { rules, callers } = this.#follow();
    let caller = callers.get(identity);
    if (caller === undefined) {
      const keyId = `jwt:${digestOfKey(identity.claims.sub!).slice(0, 12)}`;
      caller = { tenant: tenantOf(identity, rules), keyId };
      callers.set(identity, caller);
    }
    return caller;
  }

  /** Takes over rules that changed: who is not trusted any more is forgotten, with its keys. */
  #follow() {
    const rules = this.#options.rules();
    if (this.#found?.rules === rules) return this.#found;
    const trusted = new Set([rules.own, ...(rules.byTenant ?? [])].flatMap((one) => one?.issuer ?? []));
    for (const issuer of [...this.#issuers.keys()]) if (!trusted.has(issuer)) this.#issuers.delete(issuer);
    for (const issuer of trusted) {
      if (!this.#issuers.has(issuer)) this.#issuers.set(issuer, new Issuer({ ...this.#options, issuer }));
    }
    this.#found = { rules, callers: new WeakMap() };
    return this.#found;
  }
}
