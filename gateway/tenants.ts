// Which keys of which tenants are accepted, as pure functions of the Tenants and of what their Secrets hold. A key is
// only ever kept as its digest.

import { type Condition, conditionTypes, tenantReasons } from '../crds/names.ts';
import type { Tenant, TenantSpec, TenantStatus } from '../crds/types.ts';
import type { Holder } from './auth.ts';
import type { KeyState } from './identity/keys.ts';
import type { OidcSettings } from './identity/oidc.ts';
import { ambiguousTenants, ruleOf, type TokenRule, type TokenRules } from './identity/tokens.ts';
import { byAge } from './models.ts';

/** What a condition says. */
export type Problem = { reason: string; message: string };

/** What came of the keys that one tenant names. */
export type Verdict = {
  tenant: Tenant;
  holders: Holder[];
  problems: Problem[];
  /** Some Secret could not be read so far, so that this is not the last word. */
  isUnread: boolean;
};

/** Which tokens are whose. @param own  the gateway's own issuer */
export function tokenRulesOf(tenants: readonly Tenant[], own: OidcSettings | null): TokenRules {
  const byTenant = tenants.flatMap(
    ({ metadata, spec }) => ruleOf(metadata.name!, spec.oidc ?? {}, own) ?? [],
  );
  return { own, byTenant };
}

/** One verdict for each tenant, the oldest first: it keeps a key that two have. */
export function judgeTenants(
  tenants: readonly Tenant[],
  stateOf: (secret: string, entry: string) => KeyState,
  { byTenant }: TokenRules = { own: null, byTenant: [] },
): Verdict[] {
  const ownerOfKey = new Map<string, Tenant>();
  const ofTokens = tokenProblems(
    tenants.map(({ metadata, spec: { oidc } }) => ({ name: metadata.name!, ...(oidc && { oidc }) })),
    byTenant ?? [],
  );
  return [...tenants].sort(byAge).map((tenant) => {
    const verdict: Verdict = { tenant, holders: [], problems: [], isUnread: false };
    for (const { secretRef, limits } of tenant.spec.keys) {
      const state = stateOf(secretRef.name, secretRef.key);
      if (state.kind === 'unread') verdict.isUnread = true;
      else if (state.kind !== 'key') verdict.problems.push(problemOf(state, secretRef));
      else {
        const owner = ownerOfKey.get(state.digest) ?? tenant;
        ownerOfKey.set(state.digest, owner);
        if (owner === tenant)
          verdict.holders.push({
            name: tenant.metadata.name!,
            digest: state.digest,
            ...(limits && { limits }),
          });
        else verdict.problems.push(taken(secretRef, owner));
      }
    }
    verdict.problems.push(...(ofTokens.get(tenant.metadata.name!) ?? []));
    return verdict;
  });
}

/** What is wrong with the tokens of tenants, by name. @param rules  that came of these tenants */
export function tokenProblems(
  tenants: readonly { name: string; oidc?: TenantSpec['oidc'] }[],
  rules: readonly TokenRule[],
): Map<string, Problem[]> {
  const withTokens = new Set(rules.map(({ tenant }) => tenant));
  const othersOf = ambiguousTenants(rules);
  return new Map(
    tenants.map(({ name, oidc }) => {
      const other = othersOf.get(name);
      const isMissing = oidc !== undefined && !withTokens.has(name);
      return [name, [...(isMissing ? [issuerMissing] : []), ...(other ? [ambiguous(other)] : [])]];
    }),
  );
}

/**
 * What the tenant's status should say. The time of the last transition is kept while the condition holds.
 *
 * @param numModels  served names that the tenant may use
 */
export function statusOf({ tenant, holders, problems }: Verdict, numModels: number, now: Date): TenantStatus {
  const { spec, metadata, status: before } = tenant;
  const [first] = problems;
  const ready: Omit<Condition, 'lastTransitionTime'> = {
    type: conditionTypes.ready,
    status: first === undefined ? 'True' : 'False',
    ...(first === undefined
      ? accepted(spec)
      : { reason: first.reason, message: problems.map(({ message }) => message).join('; ') }),
    observedGeneration: metadata.generation!,
  };
  const last = before?.conditions?.find(({ type }) => type === ready.type);
  const lastTransitionTime =
    last?.status === ready.status ? last.lastTransitionTime : now.toISOString().replace(/\.\d+Z$/, 'Z');
  return {
    observedGeneration: metadata.generation!,
    keys: `${holders.length}/${spec.keys.length}`,
    models: numModels,
    conditions: [{ ...ready, lastTransitionTime }],
  };
}

function accepted({ keys, oidc }: Tenant['spec']): Problem {
  return keys.length > 0
    ? {
        reason: tenantReasons.keysAccepted,
        message: `every key that is named is accepted${oidc === undefined ? '' : ', and tokens by spec.oidc are'}`,
      }
    : { reason: tenantReasons.tokensAccepted, message: 'tokens by spec.oidc are accepted' };
}

const issuerMissing: Problem = {
  reason: tenantReasons.issuerMissing,
  message:
    'spec.oidc: no issuer is trusted; name one with its audience there, or give the gateway --oidc-issuer',
};

function ambiguous(other: string): Problem {
  return {
    reason: tenantReasons.tokensAmbiguous,
    message: `every token of this tenant is also one of the Tenant ${other}, and is refused; ask other claims in spec.oidc`,
  };
}

type SecretRef = Tenant['spec']['keys'][number]['secretRef'];

function problemOf(state: Exclude<KeyState, { kind: 'unread' | 'key' }>, { name, key }: SecretRef): Problem {
  switch (state.kind) {
    case 'no_secret':
      return { reason: tenantReasons.secretNotFound, message: `there is no Secret ${name}; create it` };
    case 'no_entry':
      return {
        reason: tenantReasons.secretNotFound,
        message: `the Secret ${name} has no entry ${key}; add it, or name another in secretRef.key`,
      };
    case 'forbidden':
      return {
        reason: tenantReasons.secretNotFound,
        message: `the gateway may not read the Secret ${name}; let its ServiceAccount get it`,
      };
    case 'invalid':
      return {
        reason: tenantReasons.keyInvalid,
        message: `the entry ${key} of the Secret ${name}: ${state.problem}`,
      };
  }
}

function taken({ name, key }: SecretRef, owner: Tenant): Problem {
  return {
    reason: tenantReasons.keyTaken,
    message: `the entry ${key} of the Secret ${name} is also a key of the older Tenant ${owner.metadata.name}, which keeps it`,
  };
}
