/**
 * One prompt and its growing output inside the engine: tokens, counters, block table, adapters. Derived numbers are
 * properties of the few counters; only the engine changes them.
 *
 * The counters are those after the steps in flight, so that the next step can be planned before they are over. A token
 * that such a step draws is counted already, and a reference stands in its place until it is known.
 */
import type { BlockHash } from './ladder/block-hash.ts';
import type { LongState } from './ladder/long-context.ts';
import { lowestPriority, type Standing } from './protocol.ts';
import type { SamplingParams } from './sampling.ts';
import type { FinishReason } from './stop.ts';
import type { Accounts } from './turns.ts';

/** An adapter as a step names it. Several with weights are a composition. */
export interface AdapterUse {
  handle: number;
  weight: number;
}

/** Positions, whole blocks, whose KV is in the table, or will be, and was not computed for this sequence. */
export interface ReadyRange {
  /** Tokens. */
  begin: number;
  end: number;
  /** Copies that still bring blocks of it. */
  numArriving: number;
}

/** Nobody's, with no claim before others. */
export const defaultStanding: Standing = { tenant: '', weight: 1, priority: 0 };

/** After so often it keeps its place, whoever waits. */
export const maxYields = 2;
const maxStepsPassedOver = 256;

export type SequenceStatus = 'waiting' | 'running' | 'finished';

export class Sequence {
  readonly id: number;
  readonly params: SamplingParams;
  /** Those that are on the device while it runs. */
  adapters: readonly AdapterUse[];
  /**
   * Says which voice this is: the adapter's digest, '' for the base; of a composition all digests with their weights, since
   * sequences of one voice share KV.
   */
  readonly adapterKey: string;
  readonly numPromptTokens: number;
  /** Prompt and the most output it may get. */
  readonly maxTotalTokens: number;

  /** [≥ numTokens] prompt, then output; the last numUnknownTokens are references, as StepBatch.tokenIds has them. */
  tokens: Int32Array;
  numTokens: number;
  numUnknownTokens = 0;
  /** Leading positions whose KV is in the block table. */
  numComputedTokens = 0;
  /** Behind those, ascending: what need not be computed. */
  ready: ReadyRange[] = [];
  /** Steps and copies that write into its blocks. */
  numStepsInFlight = 0;
  numCopiesInFlight = 0;
  /** [≥ numBlocks] page ids, in order of position, as StepBatch.blockIds has them. */
  blocks = new Int32Array(4);
  numBlocks = 0;
  /** Of its leading full blocks, as far as they were wanted yet; none when there is no prefix cache. */
  blockHashes: BlockHash[] = [];
  /** Leading blocks that are shared or were offered to the prefix cache. */
  numKeptBlocks = 0;
  /** It has more KV than the device arena has room for, and runs with a part of it in the host arena; null: it has not. */
  long: LongState | null = null;
  /** The runtime's matcher that its output follows, from when it first runs; −1: none. It goes on with each draw, on the native side. */
  matcher = -1;
  /** Rows of its prompt whose final hidden states are wanted. With all of them none may come from the prefix cache. */
  readonly hiddenRows: 'none' | 'last' | 'all';
  /** Prompt tokens that the prefix cache had, in whatever tier, when it first ran. */
  numCachedTokens = 0;

  status: SequenceStatus = 'waiting';
  finishReason: FinishReason | null = null;
  wasPreempted = false;
  /** Whose it is, and where it is counted since it came. */
  readonly standing: Standing;
  accounts: Accounts | null = null;
  /** Its place in line among those of its priority, in its tenant's tokens by weight, as it came. */
  lineTag = 0;
  /** While it waited: how often one of its priority that came later was admitted before it. */
  numPassedOver = 0;
  /** While it ran: how often it gave its place to another, and in how many steps its prompt waited for those of others. */
  numYields = 0;
  numStepsPassedOver = 0;

  constructor(fields: {
    id: number;
    promptTokens: ArrayLike<number>;
    maxTotalTokens: number;
    params: SamplingParams;
    adapters?: readonly AdapterUse[];
    adapterKey?: string;
    hiddenRows?: 'none' | 'last' | 'all';
    standing?: Standing;
  }) {
    this.id = fields.id;
    this.params = fields.params;
    this.adapters = fields.adapters ?? [];
    this.adapterKey = fields.adapterKey ?? '';
    this.hiddenRows = fields.hiddenRows ?? 'none';
    this.standing = fields.standing ?? defaultStanding;
    this.numPromptTokens = fields.promptTokens.length;
    this.maxTotalTokens = fields.maxTotalTokens;
    this.numTokens = this.numPromptTokens;
    this.tokens = new Int32Array(Math.min(this.maxTotalTokens, this.numPromptTokens + 64));
    this.tokens.set(fields.promptTokens);
  }

  /** Those that are known. */
  get numOutputTokens(): number {
    return this.numTokens - this.numUnknownTokens - this.numPromptTokens;
  }

  /** Of the tokens it has, prompt and output. */
  get numKnownTokens(): number {
    return this.numTokens - this.numUnknownTokens;
  }

  /** It has all it may get: nothing is left to draw. */
  get isFull(): boolean {
    return this.numTokens >= this.maxTotalTokens;
  }

  /** Tokens that must run before the next one can be drawn: 1 while decoding. */
  get numPendingTokens(): number {
    return this.numTokens - this.numComputedTokens;
  }

  /** Of those, the next ones that may run: up to what is ready behind them, or on its way. */
  get numRunnableTokens(): number {
    return (this.ready[0]?.begin ?? this.numTokens) - this.numComputedTokens;
  }

  /** Something writes into its blocks. */
  get isInFlight(): boolean {
    return this.numStepsInFlight > 0 || this.numCopiesInFlight > 0;
  }

  /** Goes over what is ready at the end of what is computed. */
  skipReady(): void {
    for (let next = this.ready[0]; next; next = this.ready[0]) {
      if (next.begin > this.numComputedTokens || next.numArriving > 0) return;
      this.numComputedTokens = next.end;
      this.ready.shift();
    }
  }

  /** Another may have its place. Not for ever, so that it comes to an end; nor while copies have blocks of it, which cannot be given back yet. */
  get mayYield(): boolean {
    return this.numYields < maxYields && this.long === null && this.numCopiesInFlight === 0;
  }

  /** While it runs, others go before it. Not for ever either. */
  get givesWay(): boolean {
    return (
      this.standing.priority === lowestPriority &&
      this.numYields < maxYields &&
      this.numStepsPassedOver < maxStepsPassedOver
    );
  }

  get isFinished(): boolean {
    return this.status === 'finished';
  }

  get outputTokens(): Int32Array {
    return this.tokens.subarray(this.numPromptTokens, this.numPromptTokens + this.numOutputTokens);
  }

  /** One more token, which the step that is given next draws as its sample `sample`. */
  expectToken(sample: number): void {
    this.#append(-1 - sample);
    this.numUnknownTokens++;
  }

  /** The first of the unknown tokens is `token`. */
  learnToken(token: number): void {
    this.tokens[this.numTokens - this.numUnknownTokens--] = token;
  }

  #append(token: number): void {
    if (this.numTokens === this.tokens.length) {
      const grown = new Int32Array(Math.min(this.maxTotalTokens, this.tokens.length * 2));
      grown.set(this.tokens);
      this.tokens = grown;
    }
    this.tokens[this.numTokens++] = token;
  }

  /** Makes room for `count` more blocks. @returns the table, to be written from numBlocks on. */
  roomForBlocks(count: number): Int32Array {
    if (this.numBlocks + count > this.blocks.length) {
      const grown = new Int32Array(Math.max(this.blocks.length * 2, this.numBlocks + count));
      grown.set(this.blocks);
      this.blocks = grown;
    }
    return this.blocks;
  }
}

/** Blocks that hold `numTokens` positions. */
export function blocksFor(numTokens: number, blockSizeTokens: number): number {
  return Math.ceil(numTokens / blockSizeTokens);
}
