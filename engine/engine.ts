/**
 * The step loop: take in what a step drew, reap what ended, plan and hand in the next step, emit. Step n + 1 is planned
 * and handed in while step n runs, so the native side goes from one to the next without a pause; the tokens that n
 * draws are in it as references. Lengths are known ahead. Any other end (end token, stop string, cancel, failure) is
 * seen one step late: the sequence has a row in a step that runs already, whose result is thrown away.
 *
 * A sequence that ends while steps have it keeps its blocks until they are over. Preemption takes blocks back, so a plan
 * that preempts waits for the step that runs, and is made anew then. Sequences enter only when they fit into the arena
 * alone beside their adapters and the pins, and everything else can leave, so the oldest sequence can always go on and
 * preemption never loops.
 *
 * A sequence whose adapters are not on the device waits for them alone: the queue is shown to the tiers, which bring up what it
 * needs in the order of its turns, and the scheduler sees the sequences whose adapters are all there.
 *
 * Full blocks of a prompt are in the prefix cache from when a step has them: steps run in order, so a sequence that shares
 * them in the same step or the next reads what was written. When the step fails, they and whoever has them are lost with it.
 * Blocks that the host arena has are copied beside the steps; a sequence runs up to them and waits for them alone. What only the
 * disk has is read while it waits, before it is shown to the scheduler.
 *
 * Nothing is made for a token but its text: loops over a batch count, since an iterator makes an object a turn, and what
 * a sequence says is written over what it said before.
 */
import type { Logger } from 'pino';
import type { Grammar, Runtime, StepResult } from '../native/index.ts';
import type { Adapter, AdapterTiers } from './adapters/adapter-tiers.ts';
import { type Composition, has, numPagesOf, voiceOf } from './adapters/composition.ts';
import { BatchLayout, numHiddenRows } from './batch.ts';
import { EngineError, InvariantError } from './errors.ts';
import type { Arena } from './ladder/arena.ts';
import { type BlockHash, baseVoice } from './ladder/block-hash.ts';
import type { BlockPool, CachedTokens, MadeBlock } from './ladder/block-pool.ts';
import type { MeasuredCosts } from './ladder/costs.ts';
import { LongContexts, type LongLimits, LongState, longShape, maxLongTokens } from './ladder/long-context.ts';
import { type Reclaimable, reclaim } from './ladder/reclaim.ts';
import type { EngineMetrics } from './metrics.ts';
import type { EngineLoad, Standing } from './protocol.ts';
import type { SamplingParams } from './sampling.ts';
import { type Chunk, type SchedulePlan, schedule, type Yield } from './scheduler.ts';
import { blocksFor, Sequence } from './sequence.ts';
import { type Claims, claimsOf, numSeatsToGive } from './shares.ts';
import { type FinishReason, StopStrings, stopAtToken } from './stop.ts';
import { outputWeight, Turns } from './turns.ts';

/** Ids to text, piece by piece; a piece never ends inside a character. */
export interface Detokenizer {
  push(tokenId: number): string;
  flush(): string;
}

export interface EngineLimits {
  /** Prompt and output of one sequence. */
  maxModelLen: number;
  maxBatchTokens: number;
  maxSequences: number;
  /** Sequences that wait beyond those that have a seat. */
  maxWaiting: number;
}

export interface EngineOptions {
  runtime: Runtime;
  arena: Arena;
  /** null: a sequence has what the device arena has room for. */
  hostArena: Arena | null;
  blocks: BlockPool;
  costs: MeasuredCosts;
  limits: EngineLimits;
  eosTokenIds: ReadonlySet<number>;
  createDetokenizer: (options: { skipSpecialTokens: boolean }) => Detokenizer;
  metrics: EngineMetrics;
  log: Logger;
  /** Milliseconds, never going back. */
  now: () => number;
  /** Our own books are broken: the process must end. */
  onFatal: (error: unknown) => void;
  /** 2 when absent. 1: a step is planned when the one before is over, to compare with. */
  maxStepsInFlight?: 1 | 2;
  /** For traces: what the loop did when, in milliseconds of `now`. */
  onSpan?: (name: 'plan' | 'emit', beginMs: number, endMs: number) => void;
}

/** One drawn token with its alternatives, when logprobs were asked for. */
export interface TokenLogprobs {
  tokenId: number;
  logprob: number;
  topIds: Int32Array;
  topLogprobs: Float32Array;
}

/** What a sequence has to say after a step. The last one carries finishReason. Until then the next one is written over it. */
export interface SequenceOutput {
  /** May be empty: text is held back inside a character or a possible stop string. */
  text: string;
  logprobs: TokenLogprobs | null;
  finishReason: FinishReason | null;
  /** The stop string or the client's stop token that ended it; null otherwise. */
  stopReason: string | number | null;
  /** Set when finishReason is `error`. */
  error: EngineError | null;
}

export interface SequenceRequest {
  promptTokens: ArrayLike<number>;
  params: SamplingParams;
  /** Empty: the base model alone. Requests that are added together share one list when it is the same. */
  adapters: Composition;
  /** Which gateway sent it; null, or absent: nobody said. */
  sender?: string | null;
  /** Whose it is; absent: nobody's, with no claim before others. */
  standing?: Standing;
  /** What its output follows; null, or absent: nothing. */
  grammar?: Grammar | null;
  /**
   * Final hidden states of its prompt that are wanted, and who gets them: [numRows, hiddenSize] of positions from `position` on. A
   * sequence that was preempted begins again. The token that it draws is not counted.
   */
  hidden?: {
    rows: 'last' | 'all';
    onRows(position: number, rows: Float32Array, numRows: number): void;
  };
  /** Called once per token, and once at the end; never after that. Must not throw. */
  onOutput: (output: SequenceOutput) => void;
}

/** A sequence that the engine holds, and what only the engine needs to know of it. */
interface Live {
  sequence: Sequence;
  request: SequenceRequest;
  /** The client named no maximum: it ends by `length` when the arena has no more for it. */
  isOpenEnded: boolean;
  /** It runs, so its adapters stay on the device. */
  holdsAdapters: boolean;
  /** The last word was said. */
  isTold: boolean;
  /** One object for all its tokens. */
  output: SequenceOutput;
  detokenizer: Detokenizer;
  stopStrings: StopStrings;
  /** Decided by tokens; told once the text is out. */
  tokenStop: { finishReason: FinishReason; stopReason: number | null } | null;
  arrivedMs: number;
  scheduledMs: number | null;
  firstTokenMs: number | null;
  /** arrivedMs until there is one. */
  lastTokenMs: number;
  sumLogprobs: number;
}

/** A step that was handed in and not yet taken in. */
interface StepInFlight {
  chunks: readonly Chunk[];
  /** Whose token each sample is. */
  sampled: Live[];
  /** Blocks that are kept since it was planned. */
  made: readonly MadeBlock[];
  /** null: it is not over. */
  outcome: { result: StepResult } | { error: unknown } | null;
}

export interface SequenceHandle {
  readonly sequence: Sequence;
  /** Mean logprob of its output tokens; 0 without any. */
  readonly meanLogprob: number;
  /** Ends it with `abort`; its blocks are back when the steps in flight are over. Does nothing when it has ended. */
  cancel(): void;
}

const noClaims: Claims = new Map();

export class Engine {
  readonly #options: EngineOptions;
  readonly #layout: BatchLayout;
  readonly #live = new Map<Sequence, Live>();
  /** In the order they came. */
  readonly #waiting: Sequence[] = [];
  readonly #turns = new Turns();
  /** Those of them whose blocks are being read from the disk. */
  readonly #reading = new Set<Sequence>();
  readonly #running: Sequence[] = [];
  readonly #sampled: Sequence[] = [];
  /** Of the sequence that was added last. */
  #lastPromptHashes: BlockHash[] = [];
  /** In the order they run; at most maxStepsInFlight. */
  readonly #steps: StepInFlight[] = [];
  /** When the last step ended, on the native clock; null: there was nothing to do since. */
  #lastEndedMs: number | null = null;
  /** When sequences ended, the latest last; for the pace. */
  readonly #finishedMs: number[] = [];
  #tiers: AdapterTiers | null = null;
  readonly #long: LongContexts;
  /** The long sequence for which copies to the host arena were waited for. */
  #waitsForHost: Sequence | null = null;
  /** Who keeps things in the arena that the engine could do without; and in the host arena. */
  #holders: readonly Reclaimable[] = [];
  #hostHolders: readonly Reclaimable[] = [];
  #nextId = 1;
  #isWoken = false;
  #onWake: (() => void) | null = null;
  #onIdle: (() => void) | null = null;
  #isDraining = false;
  #isClosed = false;
  #loop: Promise<void> | null = null;

  constructor(options: EngineOptions) {
    this.#options = options;
    this.#layout = new BatchLayout(options.limits, options.eosTokenIds, options.runtime.blockTokens);
    this.#long = new LongContexts({
      arena: options.arena,
      hostArena: options.hostArena,
      copier: options.runtime,
      numDevicePages: options.runtime.numPages,
      blockTokens: options.runtime.blockTokens,
      onMoved: () => this.wake(),
      onFailed: options.onFatal,
    });
  }

  /** The tiers need the engine (pages to keep) and the engine the tiers (pages wanted): this closes the circle. */
  start(tiers: AdapterTiers): void {
    this.#tiers = tiers;
    const { blocks } = this.#options;
    this.#holders = [blocks, tiers.residency.idle];
    this.#hostHolders = blocks.host
      ? [blocks.host, tiers.residency.hostCopies]
      : [tiers.residency.hostCopies];
    blocks.host?.shareWith([tiers.residency.hostCopies]);
    blocks.onArrived = () => this.wake();
    tiers.onFailed = (adapter, error) => this.#failWaiting(adapter, error);
    this.#loop = this.#run().catch((error) => this.#options.onFatal(error));
  }

  get numRunning(): number {
    return this.#running.length;
  }

  get numWaiting(): number {
    return this.#waiting.length;
  }

  /** What there is to do, and what of it others sent than `sender`. */
  load(sender: string | null): EngineLoad {
    const { arena, blocks, runtime } = this.#options;
    const all = { running: 0, waiting: 0, promptTokens: 0 };
    const others = { ...all };
    for (const [{ status, numPendingTokens }, { request }] of this.#live) {
      if (status === 'finished') continue;
      // One token is a decoding sequence's next.
      const promptTokens = status === 'running' && numPendingTokens === 1 ? 0 : numPendingTokens;
      const isOthers = sender === null || request.sender !== sender;
      for (const work of isOthers ? [all, others] : [all]) {
        work[status] += 1;
        work.promptTokens += promptTokens;
      }
    }
    const numFreePages = arena.numFree + blocks.numReclaimablePages;
    return { ...all, others, freeTokens: numFreePages * runtime.blockTokens };
  }

  get maxSequences(): number {
    return this.#options.limits.maxSequences;
  }

  get maxModelLen(): number {
    return this.#options.limits.maxModelLen;
  }

  get isDraining(): boolean {
    return this.#isDraining;
  }

  /** Those that waiting sequences use. */
  get waitingAdapters(): Set<Adapter> {
    const adapters = new Set<Adapter>();
    for (const sequence of this.#waiting)
      for (const { adapter } of this.#adaptersOf(sequence)) adapters.add(adapter);
    return adapters;
  }

  #adaptersOf(sequence: Sequence): Composition {
    return this.#live.get(sequence)!.request.adapters;
  }

  /**
   * Most tokens, prompt and output, that one sequence may have beside its adapters and the pins: on the device, or with a part of
   * its KV in the host arena.
   */
  maxTokensOfOne(adapters: Composition): number {
    const most = Math.max(this.#maxTokensOnDevice(adapters), maxLongTokens(this.#longLimits(adapters)));
    return Math.max(0, Math.min(this.#options.limits.maxModelLen, most));
  }

  #maxTokensOnDevice(adapters: Composition): number {
    return this.#numPagesFor(adapters) * this.#options.runtime.blockTokens;
  }

  #numPagesFor(adapters: Composition): number {
    const members = adapters.map(({ adapter }) => adapter);
    return this.#options.arena.numPages - this.#tiers!.residency.numPagesBeside(members);
  }

  #longLimits(adapters: Composition): LongLimits {
    const { runtime, hostArena, limits } = this.#options;
    return {
      numPages: this.#numPagesFor(adapters),
      numHostPages: hostArena?.numPages ?? 0,
      minStagingPages: runtime.minStagingPages,
      blockTokens: runtime.blockTokens,
      maxBatchTokens: limits.maxBatchTokens,
    };
  }

  /** Pages of the device that a sequence may come to need. */
  #numPagesOf({ sequence, isOpenEnded }: Live): number {
    if (sequence.long) return sequence.long.shape.numDevicePages;
    const numTokens = isOpenEnded ? sequence.numTokens + 1 : sequence.maxTotalTokens;
    return blocksFor(numTokens, this.#options.runtime.blockTokens);
  }

  /** Positions in blocks of running sequences that hold no token yet. */
  get numUnusedPositions(): number {
    const { blockTokens } = this.#options.runtime;
    let count = 0;
    for (const { numBlocks, numTokens } of this.#running)
      count += Math.max(0, numBlocks * blockTokens - numTokens);
    return count;
  }

  /**
   * Pages that the largest running sequence may come to need, or the one that begins next: what adapters that come up leave
   * for them. Otherwise they could take turns on the device, and no sequence ever find room to begin.
   */
  numPagesKept(): number {
    let most = 0;
    const keepFor = (sequence: Sequence | undefined) => {
      if (sequence) most = Math.max(most, this.#numPagesOf(this.#live.get(sequence)!));
    };
    for (const sequence of this.#running) keepFor(sequence);
    keepFor(this.#turns.line(this.#waiting)[0]);
    keepFor(this.#turns.order(this.#startable(), 1)[0]);
    return most;
  }

  /** Pages that the largest sequence, waiting or running, may come to need beside pins, its adapters' included. */
  numPagesPromised(): number {
    let most = 0;
    for (const live of this.#live.values())
      most = Math.max(most, this.#numPagesOf(live) + numPagesOf(live.request.adapters));
    return most;
  }

  /**
   * Takes in sequences that belong together (the choices of one request): all or none.
   * @throws EngineError context_length_exceeded, arena_full, overloaded, draining
   */
  add(requests: readonly SequenceRequest[]): SequenceHandle[] {
    const { limits, now } = this.#options;
    if (this.#isDraining || this.#isClosed) {
      throw new EngineError('draining', 'the engine is draining; another replica takes new requests', {
        retryAfterSeconds: 5,
      });
    }
    const totals = requests.map((request) => this.#totalTokens(request));
    const numSeats = limits.maxWaiting + limits.maxSequences - this.#running.length;
    if (this.#waiting.length + requests.length > numSeats) {
      this.#options.metrics.rejected.inc();
      throw new EngineError(
        'overloaded',
        `${this.#waiting.length} sequences wait already, and the queue holds ${limits.maxWaiting}; retry later`,
        { retryAfterSeconds: this.#retryAfterSeconds() },
      );
    }
    const arrivedMs = now();
    const handles = requests.map((request, index) => {
      const sequence = new Sequence({
        id: this.#nextId++,
        promptTokens: request.promptTokens,
        maxTotalTokens: totals[index]!.numTokens,
        params: request.params,
        adapterKey: voiceOf(request.adapters),
        ...(request.hidden && { hiddenRows: request.hidden.rows }),
        ...(request.standing && { standing: request.standing }),
      });
      if (totals[index]!.isLong)
        sequence.long = new LongState(longShape(sequence.maxTotalTokens, this.#longLimits(request.adapters)));
      else if (sequence.hiddenRows !== 'all') this.#hashPrompt(sequence, request, requests[index - 1]);
      for (const { adapter } of request.adapters) this.#tiers!.acquire(adapter);
      const live: Live = {
        sequence,
        request,
        isOpenEnded: request.params.maxTokens === null,
        holdsAdapters: false,
        isTold: false,
        output: { text: '', logprobs: null, finishReason: null, stopReason: null, error: null },
        detokenizer: this.#options.createDetokenizer(request.params),
        stopStrings: new StopStrings(request.params.stopStrings, request.params.includeStop),
        tokenStop: null,
        arrivedMs,
        scheduledMs: null,
        firstTokenMs: null,
        lastTokenMs: arrivedMs,
        sumLogprobs: 0,
      };
      this.#live.set(sequence, live);
      this.#waiting.push(sequence);
      this.#turns.wait(sequence);
      this.#readAhead(sequence);
      return {
        sequence,
        get meanLogprob() {
          return live.sumLogprobs / Math.max(1, sequence.numOutputTokens);
        },
        cancel: () => this.#cutOff(live, 'abort'),
      };
    });
    // Now, and not when the next step is planned: what is not on the device may come while steps run.
    this.#showQueue();
    this.wake();
    return handles;
  }

  /** Names its prompt's blocks. Choices of one request have one prompt, and it is hashed once. */
  #hashPrompt(sequence: Sequence, request: SequenceRequest, before: SequenceRequest | undefined): void {
    const { blocks } = this.#options;
    if (!blocks.isCaching) return;
    const isSame = before?.promptTokens === request.promptTokens && before.adapters === request.adapters;
    if (isSame) sequence.blockHashes = this.#lastPromptHashes.slice();
    else blocks.hash(sequence, sequence.numPromptTokens);
    this.#lastPromptHashes = sequence.blockHashes.slice();
  }

  /** Has its blocks brought from the disk, if there are any; until then it cannot start. */
  #readAhead(sequence: Sequence): void {
    const { blocks, metrics, now, onFatal } = this.#options;
    const read = blocks.readAhead(sequence);
    if (!read) return;
    const beginMs = now();
    this.#reading.add(sequence);
    read.catch(onFatal).finally(() => {
      this.#reading.delete(sequence);
      metrics.kvDiskWaitSeconds.observe((now() - beginMs) / 1000);
      this.wake();
    });
  }

  /** Looks for work again: something changed. */
  wake(): void {
    this.#isWoken = true;
    this.#onWake?.();
  }

  /** Refuses new sequences, waits for those it has, and ends what is left after timeoutMs. */
  async drain(timeoutMs: number): Promise<void> {
    this.#isDraining = true;
    if (this.#live.size === 0) return;
    await new Promise<void>((resolve) => {
      const timer = setTimeout(resolve, timeoutMs);
      this.#onIdle = () => {
        clearTimeout(timer);
        resolve();
      };
    });
    const error = new EngineError('draining', 'the engine stopped before this request was done');
    for (const live of [...this.#live.values()]) this.#cutOff(live, 'error', error);
  }

  /** Ends everything; resolves when no step is in flight any more. The runtime may be closed after that. */
  async close(): Promise<void> {
    this.#isClosed = true;
    this.#isDraining = true;
    for (const live of [...this.#live.values()]) this.#cutOff(live, 'abort');
    this.wake();
    await this.#loop;
  }

  async #run(): Promise<void> {
    while (!this.#isClosed || this.#steps.length > 0) {
      const step = this.#steps[0]?.outcome ? this.#steps.shift()! : null;
      if (step) this.#takeIn(step);
      const plan = this.#planAhead();
      // After the next step was handed in: telling takes longer than planning.
      if (step) this.#emit(step);
      else if (this.#steps.length === 0) this.#rest(plan);
      if (!step || (this.#steps.length > 0 && !this.#steps[0]!.outcome)) await this.#untilWoken();
    }
    // What was on its way to a sequence has arrived when the pool is closed, and the sequence may go.
    await Promise.all([this.#options.blocks.settled(), this.#long.settled()]);
    this.#reap();
    await this.#options.blocks.close();
  }

  /** Hands in steps until as many are in flight as may be. @returns the plan that could not be carried out, if one */
  #planAhead(): SchedulePlan | null {
    const { maxStepsInFlight = 2, now, onSpan } = this.#options;
    while (!this.#isClosed && this.#steps.length < maxStepsInFlight) {
      const beginMs = now();
      this.#reap();
      const plan = this.#plan();
      if (plan.yielded.length > 0) {
        if (this.#steps.length > 0) return plan;
        for (const { sequence, reason } of plan.yielded) this.#yield(sequence, reason);
        continue;
      }
      if (plan.chunks.length === 0 && plan.admitted.length === 0) return plan;
      const isHeld = this.#steps.length > 0 || plan.preempted.some((sequence) => sequence.isInFlight);
      if (plan.preempted.length > 0 && isHeld) return plan;
      const made = this.#carryOut(plan);
      if (plan.chunks.length > 0) this.#handIn(plan.chunks, made);
      onSpan?.('plan', beginMs, now());
    }
    return null;
  }

  /** No step is in flight, and the plan has none: says why. null: the engine is closed. */
  #rest(plan: SchedulePlan | null): void {
    this.#lastEndedMs = null;
    // Those end in a wake.
    const { blocks } = this.#options;
    if (plan === null || blocks.isFetching || this.#long.isCopying) return;
    const tiers = this.#tiers!;
    if (plan.preempted.length > 0 || this.#waiting.length > 0) {
      const [first] = this.#turns.order(this.#startable(), 1);
      if (first?.long && plan.preempted.length === 0 && !this.#hasHostPagesFor(first.long)) {
        if (!tiers.residency.isCopying) this.#waitForHost(first);
        return;
      }
      const isShort = plan.preempted.length > 0 || first !== undefined;
      // Who runs goes before who waits.
      const next = plan.preempted[0] ?? first;
      const kept = next ? this.#adaptersOf(next).map(({ adapter }) => adapter) : [];
      // Whatever else ends in a wake: pages that come back, an adapter that arrives.
      if (isShort && tiers.residency.evictWaiting(kept)) this.wake();
      else if (isShort ? tiers.residency.isCopying : tiers.isBringing || this.#reading.size > 0) return;
      else if (plan.preempted.length > 0) this.#endAtArenaLimit(plan.preempted);
      else throw new InvariantError('a sequence waits that does not fit into the arena alone');
    }
    if (this.#live.size === 0) this.#onIdle?.();
  }

  /** Nothing runs, and the host arena has no room for a long sequence: once copies to it are over it has, or will never have. */
  #waitForHost(sequence: Sequence): void {
    if (this.#waitsForHost !== sequence) {
      this.#waitsForHost = sequence;
      void this.#options.blocks.settled().then(() => this.wake());
      return;
    }
    const { shape } = sequence.long!;
    const error = new EngineError(
      'arena_full',
      `the request needs ${shape.numHostPages} pages of the host arena, and ${this.#numFreeHostPages()} can be had; ` +
        'unpin an adapter, or give the engine more --host-memory',
    );
    this.#cutOff(this.#live.get(sequence)!, 'error', error);
  }

  #hasHostPagesFor({ shape }: LongState): boolean {
    return shape.numHostPages <= this.#numFreeHostPages();
  }

  /** With those that hold what may leave. */
  #numFreeHostPages(): number {
    let count = this.#options.hostArena?.numFree ?? 0;
    for (const holder of this.#hostHolders) count += holder.numReclaimablePages;
    return count;
  }

  async #untilWoken(): Promise<void> {
    if (!this.#isWoken) {
      await new Promise<void>((resolve) => {
        this.#onWake = resolve;
      });
      this.#onWake = null;
    }
    this.#isWoken = false;
  }

  #handIn(chunks: readonly Chunk[], made: readonly MadeBlock[]): void {
    const step: StepInFlight = { chunks, sampled: [], made, outcome: null };
    const end = (outcome: StepInFlight['outcome']) => {
      step.outcome = outcome;
      this.wake();
    };
    try {
      const batch = this.#layout.lay(chunks, this.#sampled);
      this.#options.runtime.step(batch).then(
        (result) => end({ result }),
        (error) => end({ error }),
      );
    } catch (error) {
      this.#failStep(step, error);
      return;
    }
    this.#steps.push(step);
    for (let i = 0; i < chunks.length; i++) {
      const { sequence, numTokens } = chunks[i]!;
      sequence.numComputedTokens += numTokens;
      sequence.skipReady();
      sequence.numStepsInFlight++;
      if (sequence.long) sequence.long.numSteps++;
    }
    for (let i = 0; i < this.#sampled.length; i++) {
      const sequence = this.#sampled[i]!;
      sequence.expectToken(i);
      step.sampled.push(this.#live.get(sequence)!);
    }
  }

  /** A step is over: its tokens are learnt, and those that end a sequence end it. */
  #takeIn(step: StepInFlight): void {
    const { chunks, sampled, outcome } = step;
    let numTokens = 0;
    let numPrefillTokens = 0;
    let sumPositions = 0;
    for (let i = 0; i < chunks.length; i++) {
      const chunk = chunks[i]!;
      chunk.sequence.numStepsInFlight--;
      if (chunk.sequence.long) {
        chunk.sequence.long.numOverTokens = chunk.endTokens;
        this.#long.move(chunk.sequence);
      }
      numTokens += chunk.numTokens;
      sumPositions += chunk.numTokens * (chunk.endTokens - chunk.numTokens / 2);
      if (chunk.numTokens > 1) numPrefillTokens += chunk.numTokens;
    }
    if ('error' in outcome!) {
      this.#lastEndedMs = null;
      this.#failStep(step, outcome.error);
      return;
    }
    const { blocks, costs, metrics, eosTokenIds, now } = this.#options;
    // The tokens at these positions are known: the step before drew the last of them.
    for (let i = 0; i < chunks.length; i++) {
      const { sequence, numTokens, endTokens } = chunks[i]!;
      if (!sequence.isFinished) blocks.keep(sequence, endTokens, null);
      blocks.computed(sequence, endTokens - numTokens, endTokens);
    }
    const { tokens, logprobs, hidden, matcherErrors, beganMs, endedMs, stagedBytes } = outcome!.result;
    for (const { sample, message } of matcherErrors) {
      const error = new EngineError('grammar_failed', `the output's grammar cannot go on: ${message}`);
      this.#cutOff(sampled[sample]!, 'error', error);
    }
    if (hidden) this.#tellHidden(chunks, hidden);
    const nowMs = now();
    let numDrawn = 0;
    for (let i = 0; i < sampled.length; i++) {
      const live = sampled[i]!;
      const { sequence } = live;
      if (sequence.isFinished) continue;
      const tokenId = tokens[i]!;
      sequence.learnToken(tokenId);
      live.sumLogprobs += logprobs[i]!;
      live.tokenStop = stopAtToken(
        tokenId,
        sequence.numOutputTokens,
        sequence.maxTotalTokens - sequence.numPromptTokens,
        sequence.params,
        eosTokenIds,
      );
      // Out of the next plan; #emit tells the last text and the reason.
      if (live.tokenStop) sequence.status = 'finished';

      if (live.firstTokenMs === null) {
        live.firstTokenMs = nowMs;
        metrics.timeToFirstToken.observe((nowMs - live.arrivedMs) / 1000);
      } else {
        metrics.interTokenLatency.observe((nowMs - live.lastTokenMs) / 1000);
      }
      live.lastTokenMs = nowMs;
      if (sequence.hiddenRows !== 'none') continue;
      numDrawn++;
      this.#turns.charge(sequence, outputWeight);
    }
    metrics.generationTokens.inc(numDrawn);
    const gapSeconds = this.#lastEndedMs === null ? null : (beganMs - this.#lastEndedMs) / 1000;
    const seconds = (endedMs - beganMs) / 1000;
    metrics.observeStep(seconds, gapSeconds, chunks.length, numTokens);
    metrics.kvStreamedBytes.inc(stagedBytes);
    // What is read from the host says nothing about a prompt that lies on the device.
    if (2 * numPrefillTokens > numTokens && stagedBytes === 0)
      costs.observePrefill(seconds, numTokens, sumPositions / numTokens);
    this.#lastEndedMs = endedMs;
  }

  /** @param hidden  [rows, hiddenSize] of the chunks, as the batch asked for them */
  #tellHidden(chunks: readonly Chunk[], hidden: Float32Array): void {
    const size = hidden.length / chunks.reduce((sum, chunk) => sum + numHiddenRows(chunk), 0);
    let begin = 0;
    for (const chunk of chunks) {
      const numRows = numHiddenRows(chunk);
      if (numRows === 0) continue;
      const rows = hidden.subarray(begin, begin + numRows * size);
      begin += rows.length;
      if (chunk.sequence.isFinished) continue;
      this.#live.get(chunk.sequence)!.request.hidden!.onRows(chunk.endTokens - numRows, rows, numRows);
    }
  }

  /** Gives back the blocks of sequences that ended and that no step has. */
  #reap(): void {
    let numLeft = 0;
    for (let i = 0; i < this.#running.length; i++) {
      const sequence = this.#running[i]!;
      if (sequence.isFinished && !sequence.isInFlight) this.#dispose(sequence);
      else this.#running[numLeft++] = sequence;
    }
    if (numLeft === this.#running.length) return;
    this.#running.length = numLeft;
    this.#tiers!.residency.servePageWaiters();
  }

  #plan(): SchedulePlan {
    const { arena, blocks, runtime, limits } = this.#options;
    const { residency } = this.#tiers!;
    this.#showQueue();
    let numFreePages = arena.numFree;
    for (let i = 0; i < this.#holders.length; i++) numFreePages += this.#holders[i]!.numReclaimablePages;
    const isLongWaiting = this.#waiting.some((sequence) => sequence.long);
    const startable = this.#startable();
    const claims = startable.length === 0 ? noClaims : claimsOf(this.#running, startable);
    const { maxSequences } = limits;
    const recentWeight = claims.size < 2 ? 0 : this.#turns.recentWeight;
    const numToBeHad =
      maxSequences - this.#numKeepingSeats() + numSeatsToGive(claims, maxSequences, recentWeight);
    return schedule({
      waiting: this.#turns.order(startable, numToBeHad),
      running: this.#running,
      claims,
      recentWeight,
      numFreePages,
      numFreeHostPages: isLongWaiting ? this.#numFreeHostPages() : 0,
      prefixCache: blocks,
      numWantedPages: residency.numWantedPages,
      blockSizeTokens: runtime.blockTokens,
      maxBatchTokens: limits.maxBatchTokens,
      maxSequences: limits.maxSequences,
    });
  }

  /** Tells the tiers which adapters the queue waits for, in the order of its turns. */
  #showQueue(): void {
    this.#tiers!.showQueue(
      this.#turns
        .line(this.#waiting)
        .map((sequence) => this.#adaptersOf(sequence).map(({ adapter }) => adapter)),
    );
  }

  /** Running sequences that have more to do and do not give way. */
  #numKeepingSeats(): number {
    let count = 0;
    for (let i = 0; i < this.#running.length; i++) {
      const { isFinished, isFull, givesWay } = this.#running[i]!;
      if (!isFinished && !isFull && !givesWay) count++;
    }
    return count;
  }

  #startable(): readonly Sequence[] {
    return this.#waiting.filter((sequence) => this.#isStartable(sequence));
  }

  /** Whether its adapters are there, and its blocks need not be waited for. */
  #isStartable(sequence: Sequence): boolean {
    if (this.#reading.has(sequence)) return false;
    return this.#adaptersOf(sequence).every(({ adapter }) => this.#tiers!.residency.isReady(adapter));
  }

  /** The adapter that they wait for cannot be brought up. */
  #failWaiting(adapter: Adapter, error: EngineError): void {
    const { digest } = adapter;
    this.#options.metrics.observeAdapterFailure(error.code);
    this.#options.log.warn(
      { err: error, digest, waiting: adapter.numInFlight },
      'adapter cannot be brought up',
    );
    for (const live of [...this.#live.values()]) {
      if (has(live.request.adapters, adapter) && live.sequence.status === 'waiting')
        this.#cutOff(live, 'error', error);
    }
  }

  /** Ends all that waits for the adapter or runs on it. They have let go of it when the steps in flight are over. */
  endSequences(adapter: Adapter, error: EngineError): void {
    for (const live of [...this.#live.values()]) {
      if (has(live.request.adapters, adapter)) this.#cutOff(live, 'error', error);
    }
    this.wake();
  }

  /** @returns the blocks that are kept since */
  #carryOut(plan: SchedulePlan): MadeBlock[] {
    const { arena, blocks } = this.#options;
    for (const sequence of plan.preempted) {
      // One that gives way does so here too: it goes on in its turn.
      if (sequence.givesWay) sequence.numYields++;
      else sequence.wasPreempted = true;
      this.#preempt(sequence);
      this.#options.metrics.preemptions.inc();
    }
    for (const sequence of plan.passedOver) sequence.numStepsPassedOver++;
    for (const { sequence } of plan.admitted) {
      this.#turns.begin(sequence, this.#waiting);
      this.#waiting.splice(this.#waiting.indexOf(sequence), 1);
      this.#running.push(sequence);
      sequence.status = 'running';
      this.#holdAdapters(this.#live.get(sequence)!);
    }
    // What is shared is held before room is made for others, or it might leave.
    for (const { sequence, ways } of plan.admitted) {
      sequence.roomForBlocks(ways.length);
      for (let at = 0; at < ways.length; at++) if (ways[at] === 'share') blocks.share(sequence, at);
    }
    for (const { sequence } of plan.admitted) if (sequence.long) this.#beginLong(sequence, sequence.long);
    for (const { sequence, ways } of plan.admitted) {
      reclaim(arena, ways.filter((way) => way !== 'share').length, this.#holders);
      this.#beginToRun(this.#live.get(sequence)!, blocks.begin(sequence, ways));
    }
    blocks.startFetching();
    const made: MadeBlock[] = [];
    for (let i = 0; i < plan.chunks.length; i++) {
      const { sequence, endTokens, numNewBlocks } = plan.chunks[i]!;
      if (sequence.long) {
        this.#long.take(sequence, numNewBlocks);
      } else if (numNewBlocks > 0) {
        reclaim(arena, numNewBlocks, this.#holders);
        blocks.take(sequence, numNewBlocks);
      }
      if (endTokens <= sequence.numKnownTokens) blocks.keep(sequence, endTokens, made);
    }
    for (const { sequence } of plan.admitted) blocks.shareMade(sequence);
    return made;
  }

  #yield(sequence: Sequence, reason: Yield['reason']): void {
    sequence.numYields++;
    this.#preempt(sequence);
    this.#options.metrics.yields.inc({ reason });
  }

  /** It waits again: before those that came after it, and behind those that came before it and still wait for their adapters. No step has it. */
  #preempt(sequence: Sequence): void {
    this.#giveBackBlocks(sequence);
    this.#letGoOfAdapters(this.#live.get(sequence)!);
    sequence.status = 'waiting';
    this.#running.splice(this.#running.indexOf(sequence), 1);
    const after = this.#waiting.findIndex(({ id }) => id > sequence.id);
    this.#waiting.splice(after < 0 ? this.#waiting.length : after, 0, sequence);
    this.#turns.wait(sequence);
  }

  #beginLong(sequence: Sequence, { shape }: LongState): void {
    const { arena, hostArena, log } = this.#options;
    reclaim(arena, shape.numDevicePages, this.#holders);
    reclaim(hostArena!, shape.numHostPages, this.#hostHolders);
    this.#long.begin(sequence);
    this.#waitsForHost = null;
    const { id, numTokens, maxTotalTokens } = sequence;
    log.info(
      { sequence: id, numTokens, maxTotalTokens, ...shape },
      'a sequence runs with KV in the host arena',
    );
  }

  #beginToRun(live: Live, cached: CachedTokens): void {
    if (live.scheduledMs !== null) return;
    const { blocks, metrics, now, runtime } = this.#options;
    const { sequence } = live;
    live.scheduledMs = now();
    if (live.request.grammar) sequence.matcher = runtime.openMatcher(live.request.grammar);
    if (blocks.isCaching) sequence.numCachedTokens = cached.device + cached.host + cached.disk;
    this.#turns.charge(sequence, sequence.numPromptTokens - sequence.numCachedTokens);
    if (!blocks.isCaching) return;
    const { adapters } = live.request;
    const voices = adapters.length === 0 ? [baseVoice] : adapters.map(({ adapter }) => adapter.digest);
    for (const voice of voices) blocks.count(voice, sequence.numPromptTokens, sequence.numCachedTokens);
    metrics.prefixCacheQueries.inc(sequence.numPromptTokens);
    metrics.prefixCacheHits.inc(sequence.numCachedTokens);
    metrics.observeCached(cached);
  }

  #holdAdapters(live: Live): void {
    const { adapters } = live.request;
    for (const { adapter } of adapters) this.#tiers!.hold(adapter);
    live.holdsAdapters = true;
    // Each time they come to the device they have other handles.
    live.sequence.adapters = adapters.map(({ adapter, weight }) => ({
      handle: adapter.device!.handle,
      weight,
    }));
  }

  #letGoOfAdapters(live: Live): void {
    if (!live.holdsAdapters) return;
    live.holdsAdapters = false;
    for (const { adapter } of live.request.adapters) this.#tiers!.letGo(adapter);
  }

  /** Tells what a step drew: text, stop strings, ends. */
  #emit({ sampled, outcome }: StepInFlight): void {
    if ('error' in outcome!) return;
    const { now, onSpan } = this.#options;
    const beginMs = now();
    const { result } = outcome!;
    for (let i = 0; i < sampled.length; i++) {
      const live = sampled[i]!;
      // It had ended before this step was over.
      if (live.isTold) continue;
      const { sequence, tokenStop } = live;
      const tokenId = result.tokens[i]!;
      const logprobs = logprobsOf(sequence, result, i, sampled.length);
      const isEndToken = tokenStop?.finishReason === 'stop';
      let piece = isEndToken && !sequence.params.includeStop ? '' : live.detokenizer.push(tokenId);
      if (tokenStop) piece += live.detokenizer.flush();
      const maySearch = sequence.numOutputTokens > sequence.params.minTokens;
      const { stopStrings, output } = live;
      output.text = maySearch ? stopStrings.push(piece) : piece;
      output.logprobs = logprobs;
      if (stopStrings.found !== null) {
        this.#finish(live, 'stop', stopStrings.found);
      } else if (tokenStop) {
        output.text += stopStrings.flush();
        this.#finish(live, tokenStop.finishReason, tokenStop.stopReason);
      } else {
        this.#say(live);
      }
    }
    onSpan?.('emit', beginMs, now());
  }

  /** Native refused the step: its sequences fail, and those that share what it was to compute. The engine goes on. */
  #failStep(step: StepInFlight, cause: unknown): void {
    if (isClosedError(cause)) throw cause;
    const { blocks, log } = this.#options;
    const lost = new Set(step.chunks.map(({ sequence }) => sequence));
    for (const { made } of [step, ...this.#steps]) {
      for (const { block, maker } of made) if (lost.has(maker)) blocks.forget(block);
      for (const sequence of this.#running) if (blocks.holdsForgotten(sequence)) lost.add(sequence);
    }
    log.error({ err: cause, numSequences: lost.size }, 'step failed');
    const error = new EngineError('step_failed', 'the step that computed this request failed', { cause });
    for (const sequence of lost) this.#cutOff(this.#live.get(sequence)!, 'error', error);
  }

  /** The one running sequence has the whole arena and needs more. Only an open-ended one may come here. */
  #endAtArenaLimit(preempted: readonly Sequence[]): void {
    const live = this.#live.get(preempted[0]!)!;
    if (preempted.length > 1 || this.#running.length > 1 || !live.isOpenEnded) {
      throw new InvariantError('every running sequence was preempted, and none can run');
    }
    live.output.text = live.stopStrings.push(live.detokenizer.flush()) + live.stopStrings.flush();
    live.output.logprobs = null;
    this.#finish(live, 'length');
  }

  /** Says the last word of a sequence, with what is in its output. A waiting one is let go at once, a running one when no step has it. */
  #finish(live: Live, finishReason: FinishReason, stopReason: string | number | null = null): void {
    live.isTold = true;
    const { sequence, output } = live;
    const wasWaiting = sequence.status === 'waiting';
    sequence.status = 'finished';
    sequence.finishReason = finishReason;
    if (wasWaiting) {
      this.#waiting.splice(this.#waiting.indexOf(sequence), 1);
      this.#dispose(sequence, true);
    }
    this.#observeEnd(live, finishReason);
    output.finishReason = finishReason;
    output.stopReason = stopReason;
    this.#say(live);
    this.wake();
  }

  /** Ends a sequence in the middle, if it has not ended. */
  #cutOff(live: Live, finishReason: 'abort' | 'error', error: EngineError | null = null): void {
    if (live.isTold) return;
    // A last word of its own: this may be called while a listener reads the one before.
    live.output = { text: '', logprobs: null, finishReason: null, stopReason: null, error };
    this.#finish(live, finishReason);
  }

  /** A listener that throws ends its own sequence. The step that runs now must not hear of it. */
  #say(live: Live): void {
    try {
      live.request.onOutput(live.output);
    } catch (error) {
      this.#options.log.error({ err: error, sequence: live.sequence.id }, 'output listener threw');
      live.isTold = true;
      live.sequence.status = 'finished';
    }
  }

  /** Blocks and adapter go back. Once per sequence, and never while a step has it. @param wasWaiting  it did not run when it ended */
  #dispose(sequence: Sequence, wasWaiting = false): void {
    const live = this.#live.get(sequence);
    if (!live) throw new InvariantError(`sequence ${sequence.id} let go twice`);
    this.#live.delete(sequence);
    this.#turns.end(sequence, wasWaiting);
    this.#giveBackBlocks(sequence);
    this.#letGoOfAdapters(live);
    for (const { adapter } of live.request.adapters) this.#tiers!.release(adapter);
    if (sequence.matcher >= 0) this.#options.runtime.closeMatcher(sequence.matcher);
  }

  #giveBackBlocks(sequence: Sequence): void {
    if (sequence.long) this.#long.release(sequence);
    else this.#options.blocks.release(sequence);
    sequence.numComputedTokens = 0;
    sequence.ready = [];
  }

  /** Prompt and most output tokens of a request, checked against the context and the arenas, and whether it is too long for the device. */
  #totalTokens({ promptTokens, params, adapters }: SequenceRequest): { numTokens: number; isLong: boolean } {
    const { hostArena, limits } = this.#options;
    const { maxModelLen } = limits;
    const numPrompt = promptTokens.length;
    if (numPrompt === 0) {
      throw new EngineError('invalid_value', 'prompt: expected at least one token, got none', {
        param: 'prompt',
      });
    }
    const numWanted = numPrompt + (params.maxTokens ?? 1);
    if (numWanted > maxModelLen) {
      const isPromptAlone = numPrompt >= maxModelLen;
      const output = isPromptAlone ? '' : ` and max_tokens asks for ${params.maxTokens} more`;
      throw new EngineError(
        'context_length_exceeded',
        `This model's maximum context length is ${maxModelLen} tokens, but the prompt has ${numPrompt} tokens${output}.`,
        { param: isPromptAlone ? 'prompt' : 'max_tokens' },
      );
    }
    const numMost = this.maxTokensOfOne(adapters);
    if (numWanted > numMost) {
      throw new EngineError(
        'arena_full',
        `the request needs room for ${numWanted} tokens, and ${hostArena ? 'the arenas have' : 'the device arena has'} room for ` +
          `${numMost} beside its adapters and the pinned ones; ask for less, or give the engine more ` +
          (hostArena ? '--device-memory or --host-memory' : '--device-memory'),
      );
    }
    const isLong = numWanted > this.#maxTokensOnDevice(adapters);
    const numTokens = params.maxTokens !== null ? numWanted : isLong ? numMost : maxModelLen;
    return { numTokens, isLong };
  }

  /** How long the queue takes at the pace of the last sequences that ended, in whole seconds from 1 to 60. */
  #retryAfterSeconds(): number {
    const ended = this.#finishedMs;
    if (ended.length < 2) return 1;
    const msPerSequence = (this.#options.now() - ended[0]!) / ended.length;
    return Math.min(60, Math.max(1, Math.ceil((this.#waiting.length * msPerSequence) / 1000)));
  }

  #observeEnd(live: Live, finishReason: FinishReason): void {
    const { metrics, now } = this.#options;
    const { sequence, arrivedMs, scheduledMs, firstTokenMs, lastTokenMs } = live;
    const nowMs = now();
    this.#finishedMs.push(nowMs);
    if (this.#finishedMs.length > 32) this.#finishedMs.shift();
    metrics.observeSequence({
      finishReason,
      numPromptTokens: sequence.numPromptTokens,
      numOutputTokens: sequence.hiddenRows === 'none' ? sequence.numOutputTokens : 0,
      queueSeconds: scheduledMs === null ? null : (scheduledMs - arrivedMs) / 1000,
      prefillSeconds: firstTokenMs === null ? null : (firstTokenMs - scheduledMs!) / 1000,
      decodeSeconds: firstTokenMs === null ? null : (lastTokenMs - firstTokenMs) / 1000,
      totalSeconds: (nowMs - arrivedMs) / 1000,
    });
  }
}

/** Copied: the result's arrays are written again. */
function logprobsOf(
  sequence: Sequence,
  { tokens, logprobs, topIds, topLogprobs }: StepResult,
  sample: number,
  numSamples: number,
): TokenLogprobs | null {
  const { numLogprobs } = sequence.params;
  if (numLogprobs === null) return null;
  const begin = sample * (topIds.length / numSamples);
  return {
    tokenId: tokens[sample]!,
    logprob: logprobs[sample]!,
    topIds: topIds.slice(begin, begin + numLogprobs),
    topLogprobs: topLogprobs.slice(begin, begin + numLogprobs),
  };
}

function isClosedError(error: unknown): boolean {
  return error instanceof Error && (error as { code?: unknown }).code === 'closed';
}
