// Who may enter, and what a name means to whom. There are three: the settings' (below), where a name is whatever an engine
// of the list says it is, and everybody with a key may use it; that of a tenants file (identity/file-directory.ts); and the cluster's
// (cluster.ts), where resources say what there is.

import type { ModelCard } from '../engine/protocol.ts';
import { type Authenticate, callersByDigest, createAuthenticate } from './auth.ts';
import type { WeightedTarget } from './choose-target.ts';
import type { VisibleModel } from './console/console-data.ts';
import type { Endpoint, Endpoints } from './endpoints.ts';
import { GatewayError } from './errors.ts';
import { digestOfKey } from './identity/keys.ts';
import type { Tokens } from './identity/tokens.ts';
import type { Model } from './models.ts';
import type { OnDemand } from './on-demand/ask-writer.ts';
import { defaultStanding, type Standing } from './queue/ask.ts';
import type { Limits, Scope } from './quota/limits.ts';
import type { TenantUsage } from './quota/tenant-usage.ts';
import { mayAppear, resolveModel } from './resolve-model.ts';
import type { Aborted } from './routes/abort-writer.ts';
import type { RouteRules } from './routes/route.ts';

export interface Directory {
  authenticate: Authenticate;
  /**
   * Who may answer to this name for this caller (the tenant that `authenticate` named), by weight; perhaps nobody yet. Null: the
   * name means nothing to the caller.
   *
   * @throws group_too_large
   */
  targetsOf(name: string, caller: string | null): readonly WeightedTarget[] | null;
  /** What an AdapterRoute of this name says beside its targets; null when the name is none of a route. */
  rulesOf(name: string): RouteRules | null;
  /**
   * Declares an adapter of this name if a BaseModel lets it in for this caller; afterwards `targetsOf` knows it. Does nothing
   * for other names.
   *
   * @throws model_unavailable, queue_full
   */
  autoLoad(name: string, caller: string | null): Promise<void>;
  /** Somebody asks for what is there only on demand. Returns at once. */
  ask(asks: readonly OnDemand[]): void;
  /** A target of a route was found too bad: the other gateways are to know. */
  writeAbort(route: string, aborted: Aborted): void;
  /** The models that the caller may use and that an engine holds now, bases first. */
  cards(caller: string | null): ModelCard[];
  /** The names that the caller may use, whether an engine holds them or not. */
  models(caller: string | null): VisibleModel[];
  /** Why requests cannot be taken; null when they can. */
  notReady(): GatewayError | null;
  /** Whose limits hold for this caller, whichever of its keys it shows. */
  scopesOf(caller: string | null): readonly Scope[];
  /** What the caller is entitled to when requests wait. */
  standingOf(caller: string | null): Standing;
  /** What tenants used in the last minute, for whoever looks at them. Returns at once. */
  noteUsage(usage: ReadonlyMap<string, TenantUsage>): void;
  /** Callers that have a key. */
  numTenants(): number;
  /** BaseModels that exist, with engines or without. */
  baseModelNames(): string[];
  /** For how many seconds the API server has not been heard, by resource; 0 while it is. */
  staleSeconds(): Record<string, number>;
  close(): Promise<void>;
}

/** Every holder of a key may use every model of the listed engines; without keys everybody. */
export function listedDirectory(
  endpoints: Endpoints,
  apiKeys: Map<string, string> | null,
  limits: ReadonlyMap<string, Limits>,
  tokens: Tokens,
): Directory {
  const holders = [...(apiKeys ?? [])].map(([name, key]) => ({ name, digest: digestOfKey(key) }));
  const callers = callersByDigest(holders);
  const scopesOf = (name: string): Scope[] => {
    const own = limits.get(name) ?? limits.get('*');
    return own === undefined ? [] : [{ of: 'tenant', id: name, limits: own }];
  };
  return {
    scopesOf: (caller) => (caller === null ? [] : scopesOf(caller)),
    authenticate: apiKeys === null && !tokens.isOn ? () => null : createAuthenticate(() => callers, tokens),
    standingOf: () => defaultStanding,
    noteUsage: () => {},
    targetsOf: (name) => [{ name, baseModel: null, weight: 1 }],
    rulesOf: () => null,
    autoLoad: async () => {},
    ask: () => {},
    writeAbort: () => {},
    cards: () => listCards(endpoints),
    models: () =>
      listCards(endpoints).map(({ id, parent }) => ({
        name: id,
        kind: parent === null ? 'baseModel' : 'adapter',
        parent,
        targets: [{ name: id, baseModel: null, weight: 1 }],
      })),
    notReady: () =>
      endpoints.all.some(({ isReady }) => isReady)
        ? null
        : new GatewayError('no_engine_ready', 'no engine is ready'),
    numTenants: () => holders.length,
    baseModelNames: () => [],
    staleSeconds: () => ({}),
    close: async () => {},
  };
}

/**
 * The card of an engine that holds the model; for a route or a group one that is made of its targets'. Empty: none holds it, nor would
 * one if somebody asked.
 */
export function cardsOf(
  { name, kind, created, parent, targets }: Model,
  endpoints: readonly Endpoint[],
): ModelCard[] {
  const cards = targets
    .filter(({ weight }) => weight > 0)
    .flatMap((target) => {
      const resolution = resolveModel(target, endpoints, Date.now());
      if (resolution.kind !== 'served') return [];
      const names = target.members ?? [target];
      return names.map(({ name }) => resolution.endpoints[0]!.cards.get(name)!);
    });
  const mayWake = targets.some((target) => target.asks !== undefined && mayAppear(target));
  if (cards.length > 0 ? kind !== 'route' && kind !== 'group' : !mayWake) return cards;
  const lengths = cards.map(({ max_model_len }) => max_model_len).filter((length) => length !== null);
  return [
    {
      id: name,
      object: 'model',
      created,
      owned_by: 'motet',
      root: name,
      parent,
      max_model_len: lengths.length === 0 ? null : Math.min(...lengths),
      permission: [],
    },
  ];
}

/** Every model of the engines that are ready, each once. */
function listCards(endpoints: Endpoints): ModelCard[] {
  const ready = endpoints.all.filter(({ isReady }) => isReady);
  const byId = new Map(ready.flatMap(({ cards }) => [...cards]).reverse());
  return [...byId.values()].sort(basesFirst);
}

export function basesFirst(a: ModelCard, b: ModelCard): number {
  return Number(a.parent !== null) - Number(b.parent !== null) || (a.id < b.id ? -1 : 1);
}
