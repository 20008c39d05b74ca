/**
 * Sequences with more KV than the device arena has room for. One that runs so has a fixed number of device pages: a window for its
 * newest blocks, which steps write, and a staging area through which steps read the others, layer by layer, in the host arena.
 * All that it may come to need, in both arenas, is taken when it begins to run, so it never asks for more, and nobody pays for
 * it later; when it is preempted everything is given back, and it computes anew. Its blocks are its own: the prefix cache neither
 * gives them nor keeps them.
 *
 * Invariant: of its blocks the leading numOnHost are in the host arena, the others in the window. A window page is in the table,
 * free, or leaving: no longer in the table, but steps in flight were given it.
 * Streaming KV from the host is HeadInfer's (Luo et al., 2025).
 */
import { InvariantError } from '../errors.ts';
import type { Sequence } from '../sequence.ts';
import type { Arena } from './arena.ts';
import type { PageCopier } from './host-blocks.ts';

/** What a long sequence takes when it begins to run. */
export interface LongShape {
  /** With those of the staging area. */
  numDevicePages: number;
  numStagingPages: number;
  /** Of the window: kept free for the chunks that come next, by moving blocks to the host. */
  numSparePages: number;
  numHostPages: number;
}

export interface LongLimits {
  /** Of the device, beside its adapter and the pins. */
  numPages: number;
  numHostPages: number;
  minStagingPages: number;
  blockTokens: number;
  maxBatchTokens: number;
}

/** Two blocks may be written, one be copied, and one be free. */
const minWindowPages = 4;
/** Pages of one copy to the host: whoever waits for another copy waits for no more than these. */
const maxPagesOfCopy = 32;

/** Half of the device, so that others go on beside it: an eighth of that is for staging. null: not even the least fits. */
function windowOf(limits: LongLimits): Omit<LongShape, 'numHostPages'> | null {
  const { numPages, minStagingPages, blockTokens, maxBatchTokens } = limits;
  const least = minStagingPages + minWindowPages;
  if (numPages < least) return null;
  const numDevicePages = Math.max(least, Math.floor(numPages / 2));
  const numStagingPages = Math.max(minStagingPages, Math.floor(numDevicePages / 8));
  const numWindowPages = numDevicePages - numStagingPages;
  const numChunkPages = Math.ceil(maxBatchTokens / blockTokens);
  const numSparePages = Math.min(2 * numChunkPages, Math.floor(numWindowPages / 2));
  return { numDevicePages, numStagingPages, numSparePages };
}

/** Most tokens of a long sequence. */
export function maxLongTokens(limits: LongLimits): number {
  const window = windowOf(limits);
  if (!window || limits.numHostPages === 0) return 0;
  return (limits.numHostPages + numResident(window)) * limits.blockTokens;
}

/** For a sequence of at most so many tokens, within maxLongTokens. */
export function longShape(numTokens: number, limits: LongLimits): LongShape {
  const window = windowOf(limits)!;
  const numBlocks = Math.ceil(numTokens / limits.blockTokens);
  return { ...window, numHostPages: Math.max(0, numBlocks - numResident(window)) };
}

/** Blocks that the window has at the end. */
function numResident(shape: Omit<LongShape, 'numHostPages'>): number {
  return shape.numDevicePages - shape.numStagingPages - shape.numSparePages;
}

/** What only a long sequence has. Empty until it begins to run. */
export class LongState {
  readonly shape: LongShape;
  staging = new Int32Array(0);
  /** Of the window. */
  free: number[] = [];
  leaving: { page: number; afterStep: number }[] = [];
  /** Host pages that no block has yet. */
  hostPages: number[] = [];
  numOnHost = 0;
  /** Steps that it was part of, those in flight too. */
  numSteps = 0;
  /** Leading positions that steps have computed which are over. */
  numOverTokens = 0;
  isCopying = false;

  constructor(shape: LongShape) {
    this.shape = shape;
  }

  /** Of the window. */
  get numPages(): number {
    return this.shape.numDevicePages - this.shape.numStagingPages;
  }
}

export interface LongContextsOptions {
  arena: Arena;
  /** null: there are no long sequences. */
  hostArena: Arena | null;
  copier: PageCopier;
  /** The runtime's: a host page in a table is its id and this. */
  numDevicePages: number;
  blockTokens: number;
  /** Blocks have moved: a sequence that waited for pages may go on. */
  onMoved: () => void;
  /** A copy was refused: our own books are broken. */
  onFailed: (error: unknown) => void;
}

export class LongContexts {
  readonly #options: LongContextsOptions;
  readonly #copies = new Set<Promise<void>>();

  constructor(options: LongContextsOptions) {
    this.#options = options;
  }

  /** Whether blocks are on their way to the host. */
  get isCopying(): boolean {
    return this.#copies.size > 0;
  }

  /** Every copy that was begun is over. */
  async settled(): Promise<void> {
    while (this.#copies.size > 0) await Promise.all(this.#copies);
  }

  /** Takes all that a sequence may need; the pages must be free. */
  begin(sequence: Sequence): void {
    const { arena, hostArena } = this.#options;
    const state = sequence.long!;
    const { numDevicePages, numStagingPages, numHostPages } = state.shape;
    const pages = new Int32Array(numDevicePages);
    const hostPages = new Int32Array(numHostPages);
    if (!arena.take('kv', numDevicePages, pages) || !hostArena!.take('kv', numHostPages, hostPages))
      throw new InvariantError(`the plan takes ${numDevicePages} pages and ${numHostPages} of the host`);
    state.staging = pages.slice(0, numStagingPages);
    state.free = [...pages.subarray(numStagingPages)];
    state.hostPages = [...hostPages];
  }

  /** Puts window pages into its table, which must be free. */
  take(sequence: Sequence, count: number): void {
    const { free } = sequence.long!;
    if (count > free.length)
      throw new InvariantError(`the plan takes ${count} pages of a window, ${free.length} are free`);
    const table = sequence.roomForBlocks(count);
    for (let i = 0; i < count; i++) table[sequence.numBlocks++] = free.pop()!;
  }

  /** Steps of it are over, or blocks have moved: pages that no step has are free, and what makes room begins to move. */
  move(sequence: Sequence): void {
    const state = sequence.long!;
    const numStepsOver = state.numSteps - sequence.numStepsInFlight;
    state.leaving = state.leaving.filter(({ page, afterStep }) => {
      if (afterStep > numStepsOver) return true;
      state.free.push(page);
      return false;
    });
    if (state.isCopying || sequence.isFinished) return;
    const { blockTokens } = this.#options;
    const count = Math.min(
      state.shape.numSparePages - state.free.length - state.leaving.length,
      Math.floor(state.numOverTokens / blockTokens) - state.numOnHost,
      state.hostPages.length,
      maxPagesOfCopy,
    );
    if (count > 0) this.#copy(sequence, state, count);
  }

  #copy(sequence: Sequence, state: LongState, count: number): void {
    const { copier, numDevicePages, onMoved, onFailed } = this.#options;
    const begin = state.numOnHost;
    const from = sequence.blocks.slice(begin, begin + count);
    const to = Int32Array.from(state.hostPages.splice(-count));
    state.isCopying = true;
    sequence.numCopiesInFlight++;
    const copy = (async () => {
      await copier.copyPages('toHost', from, to);
      state.isCopying = false;
      sequence.numCopiesInFlight--;
      for (let i = 0; i < count; i++) {
        sequence.blocks[begin + i] = numDevicePages + to[i]!;
        state.leaving.push({ page: from[i]!, afterStep: state.numSteps });
      }
      state.numOnHost += count;
      this.move(sequence);
    })();
    const over = copy.catch(onFailed).finally(() => {
      this.#copies.delete(over);
      onMoved();
    });
    this.#copies.add(over);
  }

  /** Gives everything back. No step and no copy has it. */
  release(sequence: Sequence): void {
    const { arena, hostArena, numDevicePages } = this.#options;
    const state = sequence.long!;
    const pages = [...state.staging, ...state.free, ...state.leaving.map(({ page }) => page)];
    const hostPages = [...state.hostPages];
    for (const page of sequence.blocks.subarray(0, sequence.numBlocks))
      if (page < numDevicePages) pages.push(page);
      else hostPages.push(page - numDevicePages);
    arena.giveBack('kv', Int32Array.from(pages));
    hostArena!.giveBack('kv', Int32Array.from(hostPages));
    sequence.numBlocks = 0;
    sequence.long = new LongState(state.shape);
  }
}
