/**
 * Loads, pins and unloads on the engines of a base model: what is under way, and what came of it. They run beside the passes, so
 * a slow source holds up nothing but itself. At a time there is one call for a name on an engine, a few for an engine, and
 * a bound on all; what finds no place is not begun, since the next pass plans it again. What failed waits for its time:
 * the wait doubles up to a bound, and what an engine refused waits long, for a change of its spec or of the engine.
 */
import type { Logger } from 'pino';
import { loraAdapterReasons } from '../crds/names.ts';
import type { Step } from './adapter-plan.ts';
import type { Clock } from './clock.ts';
import { EngineCallError, type EngineClient, type RefusalReason } from './engine-client.ts';

/** An engine in one of its lives: a container that is started again has lost what was loaded. */
export interface EngineLife {
  pod: string;
  ip: string;
  /** Uid of the pod and count of restarts. */
  life: string;
}

/** What to load, for a LoraAdapter in a generation of its spec. */
export interface LoadSource {
  adapterUid: string;
  generation: number;
  uri: string;
  digest: string | undefined;
}

export interface Failure {
  pod: string;
  name: string;
  /** What failed. */
  call: Step['do'];
  /** Null: it says nothing about the adapter. */
  reason: RefusalReason | null;
  message: string;
  retryAtMs: number;
}

/** What became of a step: it began; its name is busy; it failed and has to wait; there are calls enough. */
export type Start = 'begun' | 'busy' | 'waits' | 'full';

/** Calls at a time: of an engine, and of the operator. */
export const limits = { ofEngine: 4, ofAll: 64 };
export const backoffMs = { first: 1_000, most: 5 * 60_000, refused: 10 * 60_000 };

export interface AdapterLoadsOptions {
  client: Pick<EngineClient, 'load' | 'unload'>;
  clock: Clock;
  log: Logger;
  /** From 0 up to 1. */
  random: () => number;
  /** Calls under way, those for other base models included; counted here. */
  total: { running: number };
  /** A call ended: there is something new to see. */
  onEnd: () => void;
}

/** A name on an engine. */
interface Slot {
  engine: EngineLife;
  name: string;
  /** The load under way; null: an unload; undefined: nothing. */
  running?: LoadSource | null | undefined;
  /** What an engine said before is out of date. */
  endedAtMs: number;
  /** The last load that succeeded. */
  loaded?: { source: LoadSource; atMs: number } | undefined;
  /** Since the last success. */
  failure?: Failed | undefined;
}

interface Failed {
  source: LoadSource | null;
  count: number;
  seen: Failure;
}

const said = {
  load: { done: 'adapter loaded', failed: 'an adapter could not be loaded' },
  pin: { done: 'adapter pinned as wanted', failed: 'an adapter could not be pinned as wanted' },
  unload: { done: 'adapter unloaded', failed: 'an adapter could not be unloaded' },
} as const;

export class AdapterLoads {
  readonly #options: AdapterLoadsOptions;
  readonly #slots = new Map<string, Slot>();
  /** Life of an engine -> calls under way. */
  readonly #numRunning = new Map<string, number>();

  constructor(options: AdapterLoadsOptions) {
    this.#options = options;
  }

  /**
   * Begins the step, unless its time has not come.
   * @param source null for an unload
   * @param askedAtMs when the engine was asked for what the step was planned from
   */
  start(engine: EngineLife, step: Step, source: LoadSource | null, askedAtMs: number): Start {
    const { clock, total } = this.#options;
    const slot = this.#slot(engine, step.name);
    if (slot.running !== undefined || slot.endedAtMs >= askedAtMs) return 'busy';
    const { failure } = slot;
    if (failure && isSame(failure, step, source) && failure.seen.retryAtMs > clock.nowMs()) return 'waits';
    const numRunning = this.#numRunning.get(engine.life) ?? 0;
    if (total.running >= limits.ofAll || numRunning >= limits.ofEngine) return 'full';
    slot.running = source;
    this.#count(engine, 1);
    void this.#run(slot, step, source);
    return 'begun';
  }

  /** Pods that hold the adapter soon, or would if it had not failed there: where its places are. */
  podsInvolved(source: LoadSource): string[] {
    return [...this.#slots.values()]
      .filter(({ running, failure }) => {
        if (running?.adapterUid === source.adapterUid) return true;
        return failure !== undefined && isOf(failure.source, source) && !isWithoutRoom(failure.seen);
      })
      .map(({ engine }) => engine.pod);
  }

  /** Pods that had no room and are not asked again yet. */
  podsWithoutRoom(source: LoadSource): Set<string> {
    const nowMs = this.#options.clock.nowMs();
    const failures = this.failuresOf(source).filter(isWithoutRoom);
    return new Set(failures.filter(({ retryAtMs }) => retryAtMs > nowMs).map(({ pod }) => pod));
  }

  /** When the first of the failures may be tried again; null: none has. */
  nextRetryAtMs(): number | null {
    const nowMs = this.#options.clock.nowMs();
    const times = [...this.#slots.values()]
      .map(({ failure }) => failure?.seen.retryAtMs ?? 0)
      .filter((atMs) => atMs > nowMs);
    return times.length === 0 ? null : Math.min(...times);
  }

  /** Failures of this generation that no success followed. */
  failuresOf(source: LoadSource): Failure[] {
    return [...this.#slots.values()]
      .filter(({ failure }) => failure !== undefined && isOf(failure.source, source))
      .map(({ failure }) => failure!.seen);
  }

  /** The last load that succeeded for the name on the engine. */
  lastLoad(engine: EngineLife, name: string): { source: LoadSource; atMs: number } | undefined {
    return this.#slots.get(keyOf(engine, name))?.loaded;
  }

  /** A load succeeded and brought what it should not have: it counts as failed. */
  reject(engine: EngineLife, name: string, source: LoadSource, message: string): void {
    const slot = this.#slot(engine, name);
    slot.loaded = undefined;
    this.#fail(slot, { do: 'load' }, source, loraAdapterReasons.digestMismatch, message);
  }

  /** Forgets engines whose life is over, and failures of adapters that are gone. */
  retain(lives: ReadonlySet<string>, adapterUids: ReadonlySet<string>): void {
    for (const [key, slot] of this.#slots) {
      if (!lives.has(slot.engine.life) && slot.running === undefined) this.#slots.delete(key);
      const owner = slot.failure?.source;
      if (owner && !adapterUids.has(owner.adapterUid)) slot.failure = undefined;
    }
  }

  async #run(slot: Slot, step: Step, source: LoadSource | null): Promise<void> {
    const { client, clock, log, onEnd } = this.#options;
    const { engine, name } = slot;
    const begunAtMs = clock.nowMs();
    const fields = { pod: engine.pod, name, reason: step.reason };
    try {
      if (source === null) await client.unload(engine.ip, name);
      else if (step.do === 'pin') {
        // What it holds already is named by its digest, so nothing is fetched, and nothing is learned about the source.
        await client.load(engine.ip, name, source.uri, step.digest, step.isPinned);
      } else await client.load(engine.ip, name, source.uri, source.digest);
      slot.failure = undefined;
      if (step.do !== 'pin') slot.loaded = source === null ? undefined : { source, atMs: clock.nowMs() };
      log.info({ ...fields, ms: Math.round(clock.nowMs() - begunAtMs) }, said[step.do].done);
    } catch (error) {
      const { reason, code, message } = error as EngineCallError;
      log.warn({ ...fields, code, error: message }, said[step.do].failed);
      this.#fail(slot, step, source, error instanceof EngineCallError ? reason : null, message);
    }
    slot.running = undefined;
    slot.endedAtMs = clock.nowMs();
    this.#count(engine, -1);
    onEnd();
  }

  #fail(
    slot: Slot,
    step: Pick<Step, 'do'>,
    source: LoadSource | null,
    reason: RefusalReason | null,
    message: string,
  ): void {
    const { clock, random } = this.#options;
    const before = slot.failure && isSame(slot.failure, step, source) ? slot.failure.count : 0;
    const doubledMs = Math.min(backoffMs.first * 2 ** before, backoffMs.most);
    const waitMs = reason === loraAdapterReasons.refused ? backoffMs.refused : doubledMs;
    // Adapters that failed together, of one source perhaps, do not come back together.
    const retryAtMs = clock.nowMs() + waitMs * (0.75 + random() / 4);
    const seen = { pod: slot.engine.pod, name: slot.name, call: step.do, reason, message, retryAtMs };
    slot.failure = { source, count: before + 1, seen };
  }

  #slot(engine: EngineLife, name: string): Slot {
    const key = keyOf(engine, name);
    const slot = this.#slots.get(key) ?? { engine, name, endedAtMs: Number.NEGATIVE_INFINITY };
    this.#slots.set(key, slot);
    return slot;
  }

  /** @param change 1 or -1 */
  #count({ life }: EngineLife, change: number): void {
    const running = (this.#numRunning.get(life) ?? 0) + change;
    if (running === 0) this.#numRunning.delete(life);
    else this.#numRunning.set(life, running);
    this.#options.total.running += change;
  }
}

/** The same call, for the same. */
function isSame(failed: Failed, step: Pick<Step, 'do'>, source: LoadSource | null): boolean {
  return failed.seen.call === step.do && isOf(failed.source, source);
}

/** Of one adapter and one generation of its spec; null stands for unloads. */
function isOf(a: LoadSource | null, b: LoadSource | null): boolean {
  if (a === null || b === null) return a === b;
  return a.adapterUid === b.adapterUid && a.generation === b.generation;
}

/** It has no place there. One that cannot be pinned has. */
function isWithoutRoom({ call, reason }: Failure): boolean {
  return call === 'load' && reason === loraAdapterReasons.noRoom;
}

function keyOf({ life }: EngineLife, name: string): string {
  return `${life}\n${name}`;
}
