// What the console shows to one caller, as a pure function of what the gateway knows: the models that the caller may use,
// the engines that hold them or could, and the caller's own traffic. What it may not use is in none of it.

import type { AdapterStatus, ArenaUse, Tier } from '../../engine/protocol.ts';
import type { Endpoint } from '../endpoints.ts';
import type { Model } from '../models.ts';
import { type RecentTraffic, windowS } from './traffic.ts';

export type VisibleModel = Pick<Model, 'name' | 'kind' | 'parent' | 'targets'>;

export type ConsoleData = {
  /** Whose key it is; null where nobody needs one. */
  tenant: string | null;
  bases: { name: string; mayUse: boolean; engines: EngineView[] }[];
  adapters: AdapterView[];
  routes: { name: string; targets: { name: string; weight: number; isServed: boolean }[] }[];
  /** `members` are those that the caller may use. Null: more than a request composes. */
  groups: { name: string; members: string[] | null; isServed: boolean }[];
  traffic: Omit<RecentTraffic, 'models'> & { windowS: number; models: TrafficView[] };
};

export type EngineView = {
  name: string;
  isReady: boolean;
  /** Requests that this gateway sent it and that have not ended, of all callers. */
  inFlight: number;
  /** Adapters that it has, of all callers. Null: it does not say. */
  numAdapters: number | null;
  arena: ArenaUse | null;
  hostArena: ArenaUse | null;
};

export type AdapterView = {
  name: string;
  base: string | null;
  rank: number | null;
  bytes: number | null;
  /** `tier` is null when the engine does not say. */
  places: { engine: string; tier: Tier | null; inFlight: number; isReady: boolean }[];
};

export type TrafficView = {
  model: string;
  requestsPerS: number;
  errorsPerS: number;
  completionTokensPerS: number;
  /** Mean. Null: nothing came back in this time. */
  ttfbMs: number | null;
};

export function consoleData(
  tenant: string | null,
  models: readonly VisibleModel[],
  endpoints: readonly Endpoint[],
  { models: traffic, ...recent }: RecentTraffic,
): ConsoleData {
  const bases = models.filter(({ kind }) => kind === 'baseModel');
  const adapters = models.filter(({ kind }) => kind === 'adapter');
  return {
    tenant,
    bases: basesOf(bases, models, endpoints),
    adapters: adapters.map((model) => adapterView(model, endpoints)).sort(byName),
    routes: models
      .filter(({ kind }) => kind === 'route')
      .map(({ name, targets }) => ({
        name,
        targets: targets.map((target) => ({
          name: target.name,
          weight: target.weight,
          isServed: holdersOf(target, endpoints).some(({ isReady }) => isReady),
        })),
      }))
      .sort(byName),
    groups: models
      .filter(({ kind }) => kind === 'group')
      .map(({ name, targets: [target] }) => ({
        name,
        members: target?.members?.map((member) => member.name) ?? null,
        isServed: target !== undefined && holdersOf(target, endpoints).some(({ isReady }) => isReady),
      }))
      .sort(byName),
    traffic: {
      ...recent,
      windowS,
      models: [...traffic]
        .map(([model, sums]) => ({
          model,
          requestsPerS: sums.requests / windowS,
          errorsPerS: sums.errors / windowS,
          completionTokensPerS: sums.completionTokens / windowS,
          ttfbMs: sums.timed === 0 ? null : Math.round(sums.ttfbMs / sums.timed),
        }))
        .sort((a, b) => b.requestsPerS - a.requestsPerS || (a.model < b.model ? -1 : 1)),
    },
  };
}

/** The bases that the caller may use, and those of its adapters, with the engines of each. */
function basesOf(
  usable: readonly VisibleModel[],
  models: readonly VisibleModel[],
  endpoints: readonly Endpoint[],
): ConsoleData['bases'] {
  const names = new Set([
    ...usable.map(({ name }) => name),
    ...models.map(({ parent }) => parent).filter((parent) => parent !== null),
  ]);
  const baseModels = new Map(
    models.flatMap(({ kind, name, parent, targets }) =>
      targets.map(({ baseModel }) => [kind === 'baseModel' ? name : parent, baseModel] as const),
    ),
  );
  return [...names].sort().map((name) => {
    const baseModel = baseModels.get(name) ?? null;
    const engines = endpoints.filter((endpoint) =>
      baseModel === null ? endpoint.cards.has(name) : endpoint.baseModel === baseModel,
    );
    return {
      name,
      mayUse: usable.some((model) => model.name === name),
      engines: engines.map(engineView).sort(byName),
    };
  });
}

function engineView({ name, isReady, inFlight, adapterList }: Endpoint): EngineView {
  return {
    name,
    isReady,
    inFlight,
    numAdapters: adapterList?.data.length ?? null,
    arena: adapterList?.arena ?? null,
    hostArena: adapterList?.hostArena ?? null,
  };
}

function adapterView({ name, parent, targets }: VisibleModel, endpoints: readonly Endpoint[]): AdapterView {
  const held = targets
    .flatMap((target) => holdersOf(target, endpoints))
    .map((endpoint) => ({ endpoint, status: statusOf(name, endpoint) }));
  const status = held.find((one) => one.status !== undefined)?.status;
  return {
    name,
    base: parent,
    rank: status?.rank ?? null,
    bytes: status?.bytes ?? null,
    places: held
      .map(({ endpoint, status }) => ({
        engine: endpoint.name,
        tier: status?.tier ?? null,
        inFlight: status?.inFlight ?? 0,
        isReady: endpoint.isReady,
      }))
      .sort((a, b) => (a.engine < b.engine ? -1 : 1)),
  };
}

function holdersOf(target: VisibleModel['targets'][number], endpoints: readonly Endpoint[]): Endpoint[] {
  const { baseModel } = target;
  const members: readonly { name: string }[] = target.members ?? [target];
  return endpoints.filter(
    ({ baseModel: base, cards }) =>
      (baseModel === null || base === baseModel) && members.every((member) => cards.has(member.name)),
  );
}

function statusOf(name: string, { adapterList }: Endpoint): AdapterStatus | undefined {
  return adapterList?.data.find(({ names }) => names?.includes(name));
}

function byName(a: { name: string }, b: { name: string }): number {
  return a.name < b.name ? -1 : Number(a.name > b.name);
}
