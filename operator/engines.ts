/**
 * The engines, asked for the truth, and what is remembered about them between passes. All of it may be lost: a new
 * operator asks again. An engine of a ready pod that does not answer for a moment counts as it was last seen, so that a
 * pause does not move its adapters; one that refuses connections is gone at once.
 */
import type { V1Pod } from '@kubernetes/client-node';
import type { Logger } from 'pino';
import { AdapterLoads, type EngineLife } from './adapter-loads.ts';
import { AdapterVersions } from './adapter-versions.ts';
import type { Clock } from './clock.ts';
import { isReady } from './cluster.ts';
import { type EngineAdapter, type EngineAdapters, EngineCallError, EngineClient } from './engine-client.ts';
import { Heat } from './heat.ts';
import type { Metrics } from './metrics.ts';
import { inParallel } from './parallel.ts';

/** An engine of a ready pod, and what it holds. */
export interface Engine extends EngineLife {
  /** When it was asked; what it said is no younger. */
  askedAtMs: number;
  /** False: it did not answer just now, and this is what it said before. */
  isFresh: boolean;
  arena: EngineAdapters['arena'];
  hostArena: EngineAdapters['hostArena'];
  adapters: readonly EngineAdapter[];
  /** Served name -> digest. */
  names: ReadonlyMap<string, string>;
  /** Digest -> whether it stays on the device; empty for engines that know no pins. */
  pins: ReadonlyMap<string, boolean>;
}

export interface Look {
  /** Those that can be counted on, by name. */
  engines: Engine[];
  /** Why one that is ready does not answer; null: all do. */
  silence: string | null;
}

/** What is remembered about the engines of one base model. */
export interface EngineMemory {
  loads: AdapterLoads;
  versions: AdapterVersions;
  heat: Heat;
  /** By life. */
  lastSeen: Map<string, Engine>;
}

/** An engine that has not answered for this long is taken for gone although its pod is ready. */
const graceMs = 30_000;
/** Engines of a base model that are asked at a time. */
const maxAsked = 16;

export interface EnginesOptions {
  /** Path; null when engines want no token. */
  tokenFile: string | null;
  metrics: Metrics;
  clock: Clock;
  log: Logger;
  /** A load or unload for the base model ended. */
  onEnd: (baseModel: string) => void;
}

export class Engines {
  readonly #options: EnginesOptions;
  readonly #client: EngineClient;
  readonly #memories = new Map<string, EngineMemory>();
  readonly #total = { running: 0 };

  constructor(options: EnginesOptions) {
    this.#options = options;
    this.#client = new EngineClient(options);
  }

  memoryOf(baseModel: string): EngineMemory {
    let memory = this.#memories.get(baseModel);
    if (memory === undefined) {
      const { onEnd } = this.#options;
      const loads = new AdapterLoads({
        ...this.#options,
        client: this.#client,
        random: Math.random,
        total: this.#total,
        onEnd: () => onEnd(baseModel),
      });
      memory = { loads, versions: new AdapterVersions(), heat: new Heat(), lastSeen: new Map() };
      this.#memories.set(baseModel, memory);
    }
    return memory;
  }

  /** The base model is gone. */
  forget(baseModel: string): void {
    this.#memories.delete(baseModel);
  }

  /** Asks the engines of all pods that are ready. */
  async look(pods: readonly V1Pod[], { heat, lastSeen }: EngineMemory): Promise<Look> {
    const { clock } = this.#options;
    const engines: Engine[] = [];
    let silence: string | null = null;
    await inParallel(pods.filter(isReady), maxAsked, async (pod) => {
      const engine = await this.#ask(pod, lastSeen);
      if (engine instanceof Error) {
        silence = engine.message;
        return;
      }
      engines.push(engine);
      if (!engine.isFresh) return;
      lastSeen.set(engine.life, engine);
      heat.observe(engine.life, engine.adapters, clock.nowMs());
    });
    const lives = new Set(pods.map(lifeOf));
    for (const life of [...lastSeen.keys()]) if (!lives.has(life)) lastSeen.delete(life);
    return { engines: engines.sort((a, b) => (a.pod < b.pod ? -1 : 1)), silence };
  }

  /** Ends the calls under way. */
  async close(): Promise<void> {
    await this.#client.close();
  }

  /** @returns what is known about it, or why nothing is */
  async #ask(pod: V1Pod, lastSeen: ReadonlyMap<string, Engine>): Promise<Engine | Error> {
    const { clock, log } = this.#options;
    const ip = pod.status?.podIP;
    if (!ip) return new Error(`pod ${pod.metadata!.name} has no address`);
    const life = lifeOf(pod);
    const askedAtMs = clock.nowMs();
    try {
      const { arena, hostArena, data } = await this.#client.list(ip);
      const names = new Map(data.flatMap(({ names, digest }) => names.map((name) => [name, digest])));
      const pins = data.flatMap(({ digest, pinned }) =>
        pinned === undefined ? [] : [[digest, pinned] as const],
      );
      return {
        pod: pod.metadata!.name!,
        life,
        ip,
        askedAtMs,
        isFresh: true,
        arena,
        hostArena,
        adapters: data,
        names,
        pins: new Map(pins),
      };
    } catch (error) {
      if (!(error instanceof EngineCallError)) throw error;
      const last = lastSeen.get(life);
      const isGone = error.isRefusedConnection || last === undefined || askedAtMs - last.askedAtMs > graceMs;
      log.warn({ pod: pod.metadata!.name, error: error.message, isGone }, 'an engine does not answer');
      return isGone ? error : { ...last, isFresh: false };
    }
  }
}

/** Of the container in the pod: a new one has lost what was loaded. */
export function lifeOf({ metadata, status }: V1Pod): string {
  const numRestarts =
    status?.containerStatuses?.reduce((sum, { restartCount }) => sum + restartCount, 0) ?? 0;
  return `${metadata!.uid}/${numRestarts}`;
}
