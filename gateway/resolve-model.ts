// Which engines can answer as a target, as a pure function of what the engines last said of themselves.
// An engine that left is remembered for a while: its models are then "away" (503, come back), not "unknown" (404).

import type { MergeRule, WeightedName } from '../engine/protocol.ts';
import type { Endpoint } from './endpoints.ts';
import { GatewayError } from './errors.ts';
import type { OnDemand } from './on-demand/ask-writer.ts';
import { modelNotFound, noEngineReady } from './openai.ts';

/** Who answers: a base model or an adapter, as engines know it. */
export type Target = {
  /** The name by which engines know it. */
  name: string;
  /** The BaseModel whose engines may be asked. Null: there are no resources, and a name is what engines say it is. */
  baseModel: string | null;
  /** Without BaseModels: what engines must say is its base, null of a base itself. Default, whatever they say. */
  parent?: string | null;
  /** The operator says that no engine will have it before somebody changes something. Default false. */
  isHopeless?: boolean;
  /** Resources behind it that are there only while somebody asks. Default none. */
  asks?: readonly OnDemand[];
  /** Of a group: the adapters that answer together. An engine has it when it has each of them. */
  members?: readonly WeightedName[];
  /** How those are merged. Default: they are a sum. */
  merge?: MergeRule;
};

export type Resolution =
  /** These engines have the model and are ready. At least one. */
  | { kind: 'served'; endpoints: Endpoint[] }
  /** Only engines that are away had it when they were last seen. */
  | { kind: 'away' }
  /** No engine was seen so far, so nothing can be said about any name. */
  | { kind: 'no_engine' }
  | { kind: 'unknown' };

/** For how long an engine that is away keeps its models from being called unknown. */
export const rememberMs = 10 * 60_000;

export function resolveModel(target: Target, endpoints: readonly Endpoint[], nowMs: number): Resolution {
  const { baseModel, parent } = target;
  const members: readonly { name: string }[] = target.members ?? [target];
  const candidates =
    baseModel === null ? endpoints : endpoints.filter((endpoint) => endpoint.baseModel === baseModel);
  const seen = candidates.filter(({ lastSeenMs }) => lastSeenMs !== null && nowMs - lastSeenMs <= rememberMs);
  const having = seen.filter(
    ({ cards, adapterList }) =>
      members.every(({ name }) => {
        const card = cards.get(name);
        return card !== undefined && (parent === undefined || card.parent === parent);
      }) &&
      // Other servers know no compositions: they would answer as if nothing had been said.
      (target.members === undefined || adapterList !== null) &&
      (target.merge === undefined || adapterList?.merges === true),
  );
  const ready = having.filter(({ isReady }) => isReady);

  if (ready.length > 0) return { kind: 'served', endpoints: ready };
  if (having.length > 0) return { kind: 'away' };
  return seen.length === 0 ? { kind: 'no_engine' } : { kind: 'unknown' };
}

/**
 * Whether an engine may have it in a moment although none has it now: it is declared, and on its way from a pod that went
 * to one that comes. Without resources nobody can say so.
 */
export function mayAppear({ baseModel, isHopeless = false }: Target): boolean {
  return baseModel !== null && !isHopeless;
}

/** An engine that starts, or an adapter that is fetched, takes longer than one that is away for a moment. */
const wakeRetryAfterS = 15;

/**
 * What the client is told when no engine can answer.
 *
 * @param name  as the client asked for it
 */
export function notServed(
  name: string,
  { baseModel, asks, members }: Target,
  kind: Exclude<Resolution['kind'], 'served'>,
) {
  if (asks !== undefined) {
    return new GatewayError('model_unavailable', 'this model is on its way to an engine, since you ask', {
      param: 'model',
      retryAfterS: wakeRetryAfterS,
    });
  }
  if (kind === 'no_engine') return noEngineReady();
  if (kind === 'away') {
    return new GatewayError('model_unavailable', 'the engines that have this model are away', {
      param: 'model',
    });
  }
  // What a resource declares exists; it is on its way to an engine, or its status says why not.
  // Of adapters that answer together each does, if not all on one engine.
  if (baseModel === null && members === undefined) return modelNotFound(name);
  return new GatewayError('model_unavailable', 'this model is not loaded on any engine yet', {
    param: 'model',
  });
}
