// Names that no resource declares and that a BaseModel lets in by a pattern: which LoraAdapter such a name becomes (pure), and
// its making, once however many ask. Who may use the adapter may ask for it; to all others the name means nothing.

import { createHash } from 'node:crypto';
import type { KubeConfig } from '@kubernetes/client-node';
import { ApiError, callApi, motetPath } from '../../crds/api.ts';
import { labels } from '../../crds/names.ts';
import { apiVersion, type BaseModel, type LoraAdapter } from '../../crds/types.ts';
import { GatewayError } from '../errors.ts';

type Rule = NonNullable<BaseModel['spec']['autoLoad']>[number];

export type AutoLoad =
  /** No pattern lets the name in for this caller. */
  | { kind: 'none' }
  /** One does, and has let in as many as it may. */
  | { kind: 'full'; most: number }
  | { kind: 'load'; adapter: AutoLoaded };

/** A LoraAdapter to be made. */
export type AutoLoaded = Pick<LoraAdapter, 'apiVersion' | 'kind' | 'metadata'> & { spec: object };

/** What `*` may stand for: a part of a path that leads nowhere else. */
const partPattern = /^[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?$/;

/** @param mayUse  whether the caller may use an adapter with these labels */
export function planAutoLoad(
  name: string,
  baseModels: readonly BaseModel[],
  loraAdapters: readonly LoraAdapter[],
  mayUse: (labels: Readonly<Record<string, string>>) => boolean,
): AutoLoad {
  for (const { metadata, spec } of baseModels) {
    for (const rule of spec.autoLoad ?? []) {
      const part = partOf(name, rule);
      if (part === null || !mayUse(rule.labels ?? {})) continue;
      const made = loraAdapters.filter(
        (one) =>
          one.metadata.labels?.[labels.autoLoad] === metadata.name &&
          one.spec.servedNames?.some((served) => partOf(served, rule) !== null),
      );
      if (made.length >= rule.most) return { kind: 'full', most: rule.most };
      return { kind: 'load', adapter: adapterOf(name, part, rule, metadata) };
    }
  }
  return { kind: 'none' };
}

/** What `*` of the pattern stands for; null: the name is another. */
function partOf(name: string, { names }: Rule): string | null {
  const [before = '', after = ''] = names.split('*');
  if (name.length < before.length + after.length || !name.startsWith(before) || !name.endsWith(after))
    return null;
  const part = name.slice(before.length, name.length - after.length);
  return partPattern.test(part) && !part.includes('..') ? part : null;
}

function adapterOf(
  name: string,
  part: string,
  { uri, labels: own, idleMinutes }: Rule,
  base: BaseModel['metadata'],
): AutoLoaded {
  const owner = { apiVersion, kind: 'BaseModel', name: base.name!, uid: base.uid! };
  return {
    apiVersion,
    kind: 'LoraAdapter',
    metadata: {
      // Of one name there is one, whichever gateway makes it.
      name: `auto-${createHash('sha256').update(name).digest('hex').slice(0, 20)}`,
      labels: { ...own, [labels.autoLoad]: base.name! },
      ownerReferences: [owner],
    },
    spec: {
      baseModel: base.name!,
      source: { uri: uri.replaceAll('{name}', part) },
      servedNames: [name],
      onDemand: { idleMinutes },
    },
  };
}

export type AutoLoaderOptions = {
  kubeConfig: KubeConfig;
  namespace: string;
  /** The watch has brought the name. */
  isKnown(name: string): boolean;
  onError(error: Error): void;
};

const timeoutMs = 5_000;
/** Until the watch brings what was made. */
const watchWaitMs = 5_000;
const lookMs = 20;
/** Names that are made at a time; who asks for more is told to come back. */
const maxFlights = 16;

export class AutoLoader {
  readonly #options: AutoLoaderOptions;
  readonly #flights = new Map<string, Promise<void>>();

  constructor(options: AutoLoaderOptions) {
    this.#options = options;
  }

  /**
   * Makes the adapter, or waits for who does already. When it returns the name is known, unless the API server refused.
   *
   * @throws queue_full, model_unavailable
   */
  load(name: string, adapter: AutoLoaded): Promise<void> {
    const known = this.#flights.get(name);
    if (known !== undefined) return known;
    if (this.#flights.size >= maxFlights) {
      throw new GatewayError('queue_full', `${maxFlights} adapters are being declared already`);
    }
    const flight = this.#make(name, adapter).finally(() => this.#flights.delete(name));
    this.#flights.set(name, flight);
    return flight;
  }

  async #make(name: string, adapter: AutoLoaded): Promise<void> {
    const { kubeConfig, namespace, isKnown, onError } = this.#options;
    try {
      const path = motetPath('LoraAdapter', namespace);
      await callApi(kubeConfig, { method: 'POST', path, body: adapter, timeoutMs });
    } catch (error) {
      // 409: another gateway has made it.
      if (!(error instanceof ApiError && error.status === 409)) {
        onError(error as Error);
        if (error instanceof ApiError) return;
        throw new GatewayError('model_unavailable', 'this adapter could not be declared now', {
          param: 'model',
        });
      }
    }
    const endMs = performance.now() + watchWaitMs;
    while (!isKnown(name) && performance.now() < endMs) {
      await new Promise((resolve) => setTimeout(resolve, lookMs));
    }
  }
}
