// The directory of a gateway with a tenants file: the file says who comes and what they may use, the engines of the list say what there
// is. An adapter has the labels that the file gives it over its base, and one that the file does not name has none. What a tenant may
// not use does not exist for it.

import { servedNameOf } from '../../crds/names.ts';
import type { ModelCard } from '../../engine/protocol.ts';
import { createAuthenticate } from '../auth.ts';
import { basesFirst, cardsOf, type Directory, listedDirectory } from '../directory.ts';
import type { Endpoints } from '../endpoints.ts';
import { type GroupedAdapter, type GroupRules, groupRules } from '../groups/group.ts';
import { type Model, mayUse, seenBy, targetsFor } from '../models.ts';
import { noEngineReady } from '../openai.ts';
import { defaultStanding } from '../queue/ask.ts';
import { rememberMs } from '../resolve-model.ts';
import type { FollowedTenants, Known } from './follow-tenants.ts';
import type { FileTenant } from './tenants-file.ts';
import { Tokens, type TokensOptions } from './tokens.ts';

/** @param followed  is closed with it */
export function fileDirectory(
  endpoints: Endpoints,
  followed: FollowedTenants,
  log: TokensOptions['log'],
): Directory {
  const names = new Names(endpoints, followed);
  const tokens = new Tokens({ rules: () => followed.known.tokenRules, log });
  const tenantOf = (caller: string | null) => followed.known.tenants.get(caller ?? '');
  const modelsOf = (caller: string | null): Model[] => {
    const tenant = tenantOf(caller);
    if (tenant === undefined) return [];
    return names
      .all()
      .flatMap((name) => names.modelFor(tenant, name) ?? [])
      .map((model) => seenBy(model, tenant.access.adapters));
  };
  return {
    ...listedDirectory(endpoints, null, new Map(), tokens),
    authenticate: createAuthenticate(() => followed.known.callers, tokens),
    targetsOf(name, caller) {
      const tenant = tenantOf(caller);
      const model = tenant && names.modelFor(tenant, name);
      return model ? targetsFor(model, tenant.access.adapters) : null;
    },
    // What no engine had may be there since a moment ago, and what it is decides who may use it.
    async autoLoad() {
      await endpoints.refresh();
      if (endpoints.all.every(({ lastSeenMs }) => lastSeenMs === null)) throw noEngineReady();
    },
    cards: (caller) =>
      modelsOf(caller)
        .flatMap((model) => cardsOf(model, endpoints.all))
        .sort(basesFirst),
    models: modelsOf,
    scopesOf(caller) {
      const limits = tenantOf(caller)?.limits;
      return limits === undefined ? [] : [{ of: 'tenant', id: caller!, limits }];
    },
    standingOf(caller) {
      const { weight = defaultStanding.weight, priority = defaultStanding.priority } = tenantOf(caller) ?? {};
      return { weight, priority };
    },
    numTenants: () => new Set(followed.known.file.holders.map(({ name }) => name)).size,
    staleSeconds: () => ({ 'tenants-file': followed.staleSeconds }),
    close: () => followed.close(),
  };
}

type Labels = Readonly<Record<string, string>>;

/** What names stand for, as of the file and of what engines hold now. */
class Names {
  readonly #endpoints: Endpoints;
  readonly #followed: Pick<FollowedTenants, 'known'>;
  #ofFile: { known: Known; labels: Map<string, Labels>; groups: Map<string, Group> } | null = null;
  /** Made anew when the file or what an engine holds has changed. */
  #grouped: { of: readonly unknown[]; adapters: GroupedAdapter[]; rules: Map<string, GroupRules> } | null =
    null;

  constructor(endpoints: Endpoints, followed: Pick<FollowedTenants, 'known'>) {
    this.#endpoints = endpoints;
    this.#followed = followed;
  }

  all(): string[] {
    const held = this.#endpoints.all.flatMap(({ isReady, cards }) => (isReady ? [...cards.keys()] : []));
    return [...new Set([...held, ...this.#file.groups.keys()])];
  }

  /** What the name stands for if the tenant may use it. A group of the file has its name before what engines call so. */
  modelFor({ access }: FileTenant, name: string): Model | null {
    const group = this.#file.groups.get(name);
    const meanings = group === undefined ? this.#heldAs(name) : [this.#modelOfGroup(name, group)];
    return meanings.find((model) => mayUse(access, model)) ?? null;
  }

  get #file() {
    const { known } = this.#followed;
    if (this.#ofFile?.known !== known) {
      const { adapters, baseModels, groups } = known.file;
      const labels = new Map<string, Labels>([
        ...adapters.map(({ name, baseModel, labels }) => [keyOf(name, baseModel), labels] as const),
        ...Object.entries(baseModels).map(([name, labels]) => [keyOf(name, null), labels] as const),
      ]);
      this.#ofFile = { known, labels, groups: new Map(groups.map((group) => [servedNameOf(group), group])) };
    }
    return this.#ofFile;
  }

  /** Mostly one. Engines of two bases may each have an adapter of this name, and the tenant a right to one of them. */
  #heldAs(name: string): Model[] {
    const cards = new Map<string | null, ModelCard>();
    for (const endpoint of this.#endpoints.all) {
      const card = endpoint.cards.get(name);
      if (card !== undefined && !cards.has(card.parent)) cards.set(card.parent, card);
    }
    return [...cards.values()].map(({ parent, created }) => ({
      name,
      kind: parent === null ? 'baseModel' : 'adapter',
      labels: this.#labelsOf(name, parent),
      created,
      parent,
      targets: [{ name, baseModel: null, parent, weight: 1 }],
    }));
  }

  #labelsOf(name: string, parent: string | null): Labels {
    return this.#file.labels.get(keyOf(name, parent)) ?? {};
  }

  #modelOfGroup(name: string, group: Group): Model {
    const { baseModel } = group.spec;
    return {
      name,
      kind: 'group',
      labels: group.metadata.labels ?? {},
      created: 0,
      parent: baseModel,
      targets: [],
      group: this.#rulesOf(name, group),
    };
  }

  #rulesOf(name: string, group: Group): GroupRules {
    const { adapters, rules } = this.#adapters;
    let found = rules.get(name);
    if (found === undefined) {
      const parent = group.spec.baseModel;
      found = groupRules(group, adapters, (adapter) => ({ name: adapter, baseModel: null, parent }));
      rules.set(name, found);
    }
    return found;
  }

  /** Those of the file, be they on an engine or not, since a group is never answered by a part of it; and those of engines. */
  get #adapters() {
    const seenMs = Date.now() - rememberMs;
    const held = this.#endpoints.all.flatMap(({ cards, lastSeenMs }) =>
      (lastSeenMs ?? 0) > seenMs ? [cards] : [],
    );
    const of = [this.#followed.known, ...held];
    const before = this.#grouped?.of;
    if (before?.length !== of.length || of.some((one, index) => one !== before[index])) {
      const ofEngines = held.flatMap((cards) =>
        [...cards.values()].flatMap(({ id, parent }) => (parent === null ? [] : [[id, parent] as const])),
      );
      const named = this.#followed.known.file.adapters.map(
        ({ name, baseModel }) => [name, baseModel] as const,
      );
      const adapters = new Map(
        [...named, ...ofEngines].map(([name, baseModel]) => {
          const metadata = { name, labels: this.#labelsOf(name, baseModel) };
          return [keyOf(name, baseModel), { metadata, spec: { baseModel } }];
        }),
      );
      this.#grouped = { of, adapters: [...adapters.values()], rules: new Map() };
    }
    return this.#grouped!;
  }
}

type Group = Known['file']['groups'][number];

function keyOf(name: string, parent: string | null): string {
  return JSON.stringify([name, parent]);
}
