/**
 * Adapters that requests have merged, by TIES, DARE or magnitude. A merge is made once, by a thread of its own beside the steps
 * (merge-worker.ts), one at a time, and is then an adapter like others: with pages and KV of its own, in the tiers. What it is follows
 * from its adapters, their weights and the rule alone, so all engines make the same. The least recently used leave when they are too
 * many or too large; and a merge goes with any adapter that it was made of.
 */
import { createHash } from 'node:crypto';
import { existsSync } from 'node:fs';
import { mkdir } from 'node:fs/promises';
import { join } from 'node:path';
import { Worker } from 'node:worker_threads';
import type { Logger } from 'pino';
import { EngineError, type ErrorCode } from '../errors.ts';
import { formatMerge, type MergeRule } from '../protocol.ts';
import { Slots } from '../slots.ts';
import { removeTemporary, sweepTemporaries, temporaryPath } from '../temporary-files.ts';
import { type Adapter, type AdapterTiers, folderSource, type LocalFolder } from './adapter-tiers.ts';
import { type Composition, has, voiceOf } from './composition.ts';
import type { MadeAdapter, MergeMember } from './merge-folders.ts';

/** What the thread that makes a merge is told. */
export interface MergeWork {
  members: MergeMember[];
  rule: MergeRule;
  /** A folder that it makes. */
  out: string;
  maxBytes: number;
}

/** What it answers. */
export type MergeOutcome = { made: MadeAdapter } | { code: ErrorCode; message: string };

export interface MergesOptions {
  tiers: AdapterTiers;
  folder: string;
  /** Of the files of all merges that are kept, and of one. */
  maxBytes: number;
  maxMerges?: number;
  /** Merges that wait for the one that is being made. */
  maxQueued?: number;
  /** How long a request waits for a merge; and how long making it may take. */
  waitMs?: number;
  makeMs?: number;
  /** Instead of a thread. */
  make?: (work: MergeWork, signal: AbortSignal) => Promise<MadeAdapter>;
  log: Logger;
  /** Milliseconds, never going back. */
  now: () => number;
}

/** Until it is let go, a merge is kept. */
export interface Hold {
  adapter: Adapter;
  letGo(): void;
}

/** What became of a request for a merge: it was there, it was waited for, or it was not to be had. */
export type MergeResult = 'kept' | 'made' | 'refused';

interface Kept {
  adapter: Adapter;
  sizeBytes: number;
  numHolds: number;
}

interface Making {
  members: Composition;
  done: Promise<Kept>;
  numWaiting: number;
  abort: AbortController;
}

export class Merges {
  readonly #options: Required<MergesOptions>;
  /** By key; the least recently used first. */
  readonly #kept = new Map<string, Kept>();
  readonly #making = new Map<string, Making>();
  /** Of each adapter, those that go when it is gone. */
  readonly #folders = new Map<Adapter, string[]>();
  readonly #removing = new Set<Promise<void>>();
  readonly #slots: Slots;
  onRequest: (result: MergeResult) => void = () => {};
  /** Called with the seconds that making one took. */
  onMade: (seconds: number) => void = () => {};

  private constructor(options: MergesOptions) {
    this.#options = {
      ...{ maxMerges: 64, maxQueued: 16, waitMs: 60_000, makeMs: 10 * 60_000, make: makeInThread },
      ...options,
    };
    this.#slots = new Slots(1, this.#options.maxQueued, 'merges');
    options.tiers.onGone = (adapter) => this.#forget(adapter);
  }

  /** Removes what engines that died have left in the folder. */
  static async open(options: MergesOptions): Promise<Merges> {
    if (existsSync(options.folder)) await sweepTemporaries(options.folder);
    return new Merges(options);
  }

  get numKept(): number {
    return this.#kept.size;
  }

  get numBytes(): number {
    return [...this.#kept.values()].reduce((sum, { sizeBytes }) => sum + sizeBytes, 0);
  }

  /** The merge, if it is kept. */
  find(members: Composition, rule: MergeRule): Adapter | undefined {
    return this.#kept.get(keyOf(members, rule))?.adapter;
  }

  /**
   * Waits for the merge, which is made if need be.
   * @param members  at least two
   * @param signal  aborted: this one does not want it any more; what nobody wants is not made
   * @throws EngineError merge_not_ready, too_many_loads, adapter_invalid, or what fetching an adapter throws
   */
  async hold(members: Composition, rule: MergeRule, signal: AbortSignal): Promise<Hold> {
    const key = keyOf(members, rule);
    const known = this.#kept.get(key);
    if (known) {
      this.onRequest('kept');
      return this.#hold(key, known);
    }
    try {
      const kept = await this.#wait(this.#making.get(key) ?? this.#begin(key, members, rule), signal);
      // It may have gone with one of its adapters a moment ago.
      if (this.#kept.get(key) !== kept) throw gone();
      this.onRequest('made');
      return this.#hold(key, kept);
    } catch (error) {
      this.onRequest('refused');
      throw error;
    }
  }

  /** Waits until the files of merges that are gone are removed. */
  async settle(): Promise<void> {
    await Promise.all(this.#removing);
  }

  /** Ends what is being made, and removes all files. */
  async close(): Promise<void> {
    const ending = [...this.#making.values()];
    for (const { abort } of ending) abort.abort(new EngineError('draining', 'the engine is shutting down'));
    await Promise.allSettled(ending.map(({ done }) => done));
    for (const adapter of [...this.#folders.keys()]) this.#removeFolders(adapter);
    await this.settle();
  }

  #hold(key: string, kept: Kept): Hold {
    this.#kept.delete(key);
    this.#kept.set(key, kept);
    kept.numHolds++;
    let isHeld = true;
    return {
      adapter: kept.adapter,
      letGo: () => {
        if (!isHeld) return;
        isHeld = false;
        kept.numHolds--;
        this.#shrink();
      },
    };
  }

  async #wait(making: Making, signal: AbortSignal): Promise<Kept> {
    const { promise: ended, reject } = Promise.withResolvers<never>();
    const hangUp = () => {
      if (making.numWaiting === 1) making.abort.abort(nobodyWaits());
      reject(nobodyWaits());
    };
    const timer = setTimeout(() => reject(notReady()), this.#options.waitMs);
    making.numWaiting++;
    signal.addEventListener('abort', hangUp, { once: true });
    if (signal.aborted) hangUp();
    try {
      return await Promise.race([making.done, ended]);
    } finally {
      making.numWaiting--;
      clearTimeout(timer);
      signal.removeEventListener('abort', hangUp);
    }
  }

  #begin(key: string, members: Composition, rule: MergeRule): Making {
    const abort = new AbortController();
    const forget = () => {
      if (this.#making.get(key) === making) this.#making.delete(key);
    };
    const done = this.#slots.run(() => this.#make(key, members, rule, abort.signal)).finally(forget);
    done.catch(() => {}); // those who wait hear of it
    const making = { members, done, numWaiting: 0, abort };
    this.#making.set(key, making);
    // Who comes from now on has it begun anew.
    abort.signal.addEventListener('abort', forget, { once: true });
    return making;
  }

  async #make(key: string, members: Composition, rule: MergeRule, signal: AbortSignal): Promise<Kept> {
    signal.throwIfAborted();
    const { folder: parent, make, makeMs, maxBytes, tiers, log, now } = this.#options;
    const merge = {
      rule: formatMerge(rule),
      members: members.map(({ adapter, weight }) => ({ digest: adapter.digest, weight })),
    };
    const beginMs = now();
    log.info(merge, 'merge begins');
    const folder = temporaryPath(parent, createHash('sha256').update(key).digest('hex'));
    const sources: LocalFolder[] = [];
    try {
      await mkdir(folder, { recursive: true });
      for (const { adapter } of members) sources.push(await adapter.source.fetch());
      const work = {
        members: merge.members.map((member, i) => ({ ...member, folder: sources[i]!.path })),
        rule,
        out: join(folder, 'adapter'),
        maxBytes,
      };
      const made = await make(work, AbortSignal.any([signal, AbortSignal.timeout(makeMs)]));
      const source = folderSource(work.out, `merge:${merge.rule}`, made.digest);
      const adapter = await tiers.keep(source, merge);
      this.#folders.set(adapter, [...(this.#folders.get(adapter) ?? []), folder]);
      const kept = { adapter, sizeBytes: made.sizeBytes, numHolds: 0 };
      this.#kept.set(key, kept);
      if (
        signal.aborted ||
        members.some((member) => tiers.withDigest(member.adapter.digest) !== member.adapter)
      ) {
        this.#drop(key);
        throw signal.aborted ? signal.reason : gone();
      }
      const seconds = (now() - beginMs) / 1000;
      this.onMade(seconds);
      log.info({ ...merge, digest: made.digest, bytes: made.sizeBytes, seconds }, 'merge made');
      this.#shrink(key);
      return kept;
    } catch (thrown) {
      if (!this.#folders.values().some((folders) => folders.includes(folder))) await removeTemporary(folder);
      const error = errorOf(thrown, signal);
      log.warn({ ...merge, err: error }, 'merge not made');
      throw error;
    } finally {
      for (const source of sources) source.release();
    }
  }

  /** @param newest  stays, though nobody holds it yet */
  #shrink(newest: string | null = null): void {
    const { maxBytes, maxMerges } = this.#options;
    for (const [key, { numHolds }] of this.#kept) {
      if (this.#kept.size <= maxMerges && this.numBytes <= maxBytes) return;
      if (numHolds === 0 && key !== newest) this.#drop(key);
    }
  }

  #drop(key: string): void {
    const { adapter } = this.#kept.get(key)!;
    this.#kept.delete(key);
    // Two rules may make the same adapter.
    if (this.#kept.values().every((other) => other.adapter !== adapter)) this.#options.tiers.unkeep(adapter);
  }

  /** An adapter is gone: a merge, or one that merges were made of. */
  #forget(adapter: Adapter): void {
    this.#removeFolders(adapter);
    for (const [key, kept] of this.#kept) if (kept.adapter === adapter) this.#kept.delete(key);
    for (const [key, { adapter: made }] of this.#kept)
      if (made.merge?.members.some(({ digest }) => digest === adapter.digest)) this.#drop(key);
    for (const { members, abort } of this.#making.values()) if (has(members, adapter)) abort.abort(gone());
  }

  #removeFolders(adapter: Adapter): void {
    const folders = this.#folders.get(adapter) ?? [];
    this.#folders.delete(adapter);
    for (const folder of folders) {
      const removing = removeTemporary(folder).finally(() => this.#removing.delete(removing));
      this.#removing.add(removing);
    }
  }
}

/** What keeps these adapters from being merged, in a few words; null: nothing that is known of them. */
export function mergeProblem(
  members: readonly { name: string; adapter: Pick<Adapter, 'file'> }[],
): string | null {
  const ranks = new Map<string, { name: string; rank: number }>();
  for (const { name, adapter } of members) {
    const { kind, modules } = adapter.file;
    if (kind === 'dora') return `expected adapters of kind lora or rslora, but ${name} is of kind dora`;
    if (modules.some(({ biasOffsetBytes }) => biasOffsetBytes >= 0))
      return `expected adapters without trained biases, but ${name} has some`;
    for (const { layer, target, rank } of modules) {
      const module = `${target} of layer ${layer}`;
      const first = ranks.get(module);
      if (first === undefined) ranks.set(module, { name, rank });
      else if (first.rank !== rank)
        return `expected adapters of one rank, but ${first.name} has ${first.rank} and ${name} ${rank} in ${module}`;
    }
  }
  return null;
}

function keyOf(members: Composition, rule: MergeRule): string {
  return `${voiceOf(members)}\n${formatMerge(rule)}`;
}

/** A thread of its own, whose memory goes with it. */
async function makeInThread(work: MergeWork, signal: AbortSignal): Promise<MadeAdapter> {
  signal.throwIfAborted();
  const worker = new Worker(new URL('./merge-worker.ts', import.meta.url), { workerData: work });
  const { promise, resolve, reject } = Promise.withResolvers<MergeOutcome>();
  worker.once('message', resolve);
  worker.once('error', reject);
  worker.once('exit', (code) => reject(new Error(`the thread that merges ended with ${code}`)));
  const onAbort = () => reject(signal.reason);
  signal.addEventListener('abort', onAbort, { once: true });
  try {
    const outcome = await promise;
    if ('made' in outcome) return outcome.made;
    throw new EngineError(outcome.code, outcome.message);
  } finally {
    signal.removeEventListener('abort', onAbort);
    await worker.terminate();
  }
}

/** As those who asked for the merge are told: its fields are theirs, and not those of a load. */
function errorOf(thrown: unknown, signal: AbortSignal): unknown {
  if (signal.aborted) return signal.reason;
  if (thrown instanceof DOMException && thrown.name === 'TimeoutError') return notReady();
  if (!(thrown instanceof EngineError) || thrown.status >= 500) return thrown;
  return new EngineError(thrown.code, thrown.message, { param: 'adapters_merge', cause: thrown });
}

function notReady(): EngineError {
  return new EngineError('merge_not_ready', 'the adapters are still being merged; retry in a moment', {
    param: 'adapters_merge',
    retryAfterSeconds: 10,
  });
}

function nobodyWaits(): EngineError {
  return new EngineError('merge_not_ready', 'nobody waits for the merge any more');
}

function gone(): EngineError {
  return new EngineError('adapter_not_loaded', 'an adapter of the merge was removed or replaced', {
    param: 'adapters',
  });
}
