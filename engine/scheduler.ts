/**
 * Chooses the next batch. Pure: sequences and page counts in, a plan out; the engine carries it out.
 *
 * What is planned here may begin while the step before it runs: counters are those after that step, whose draws are not
 * known yet. A sequence that has all its tokens, or has ended, holds its blocks until that step is over, but no seat.
 *
 *   1. Decode rows of all running sequences, oldest first, so that nobody's next token waits for another's prompt.
 *      When no page is free the youngest running sequence is preempted: its blocks go back and it recomputes later.
 *   2. Prompts of running sequences, oldest first, in chunks within the token budget. A prompt never preempts while
 *      something else can run; it waits for pages, and nothing younger takes pages before it.
 *   3. Admission, first come first served. When the pages for the whole sequence are not in sight, the head waits and
 *      all behind it wait too. One exception, so that a flood for one adapter does not starve the others: a sequence
 *      whose adapter has nothing running may pass a head whose adapter already has its share of the seats, at most
 *      maxPassedOver times per head.
 *
 * Loops over all that runs count instead of iterating: an iterator makes an object a turn, for every token.
 *
 * Progress: the engine admits only sequences that fit into the arena alone, so the oldest one can always run.
 * Continuous batching is Orca's (Yu et al., 2022); chunked prefill Sarathi's (Agrawal et al., 2023).
 */
import { blocksFor, type Sequence } from './sequence.ts';

export interface ScheduleInput {
  /** In the order they wait. */
  waiting: readonly Sequence[];
  /** In the order they were admitted; with those that only wait for their last step to be over. */
  running: readonly Sequence[];
  numFreePages: number;
  /** Pages that an adapter load waits for: left alone by admission. */
  numWantedPages: number;
  blockSizeTokens: number;
  maxBatchTokens: number;
  maxSequences: number;
}

/** A run of a sequence's tokens in this step: positions numComputedTokens … + numTokens − 1. */
export interface Chunk {
  sequence: Sequence;
  numTokens: number;
  /** Blocks to take first. */
  numNewBlocks: number;
}

export interface SchedulePlan {
  /** In batch order. */
  chunks: Chunk[];
  /** Youngest first; none of them has a chunk. */
  preempted: Sequence[];
  /** Members of waiting that begin to run, in order. */
  admitted: Sequence[];
  /** Heads of the queue that one behind them passed, once per pass. */
  passedOver: Sequence[];
}

/** After being passed this often the head of the queue is admitted next, whoever else waits. */
export const maxPassedOver = 16;

export function schedule(input: ScheduleInput): SchedulePlan {
  const { blockSizeTokens } = input;
  const plan: SchedulePlan = { chunks: [], preempted: [], admitted: [], passedOver: [] };
  const running = input.running.filter((sequence) => !sequence.isFinished && !sequence.isFull);
  let numFreePages = input.numFreePages;
  let budgetTokens = input.maxBatchTokens;

  const newBlocks = (sequence: Sequence, numTokens: number) =>
    blocksFor(sequence.numComputedTokens + numTokens, blockSizeTokens) - sequence.numBlocks;

  const addChunk = (sequence: Sequence, numTokens: number) => {
    const numNewBlocks = newBlocks(sequence, numTokens);
    numFreePages -= numNewBlocks;
    budgetTokens -= numTokens;
    plan.chunks.push({ sequence, numTokens, numNewBlocks });
  };

  const preemptYoungest = () => {
    const victim = running.pop()!;
    plan.preempted.push(victim);
    numFreePages += victim.numBlocks;
  };

  // 1. Decode. The loop sees `running` shrink from its end; a victim is never older than the one that needs the page.
  for (let i = 0; i < running.length; i++) {
    const sequence = running[i]!;
    if (sequence.numPendingTokens !== 1) continue;
    while (newBlocks(sequence, 1) > numFreePages && i < running.length) preemptYoungest();
    if (i < running.length) addChunk(sequence, 1);
  }

  // 2. Prefill. Repeated only after a preemption, which happens only while the plan is empty.
  let isShortOfPages = false;
  do {
    isShortOfPages = false;
    for (let i = 0; i < running.length; i++) {
      const sequence = running[i]!;
      if (sequence.numPendingTokens === 1) continue;
      if (budgetTokens === 0) break;
      const numTokens = tokensThatFit(sequence, budgetTokens, numFreePages, blockSizeTokens);
      isShortOfPages = numTokens < Math.min(sequence.numPendingTokens, budgetTokens);
      if (numTokens > 0) addChunk(sequence, numTokens);
      if (isShortOfPages) break;
    }
    if (plan.chunks.length > 0 || running.length === 0) break;
    preemptYoungest();
  } while (running.length > 0);

  // 3. Admission.
  if (input.waiting.length === 0 || isShortOfPages || plan.preempted.length > 0) return plan;
  const waiting = [...input.waiting];
  const seats = countSeats(running);
  const numVoices = new Set([...seats.keys(), ...waiting.map((sequence) => sequence.adapterKey)]).size;
  const shareOfSeats = Math.ceil(input.maxSequences / Math.max(1, numVoices));
  // Pages that running sequences will still take for the tokens they have.
  let numPromisedPages = 0;
  for (const sequence of running) {
    numPromisedPages += blocksFor(sequence.numTokens, blockSizeTokens) - sequence.numBlocks;
  }
  for (const chunk of plan.chunks) numPromisedPages -= chunk.numNewBlocks;

  while (waiting.length > 0 && running.length < input.maxSequences && budgetTokens > 0) {
    const next = nextToAdmit(waiting, seats, shareOfSeats);
    const sequence = waiting[next]!;
    // The pages for all its tokens and for the next one must be in sight, or it would only be preempted again.
    const numWantedPages = running.length === 0 ? 0 : input.numWantedPages;
    const numNeededPages = blocksFor(sequence.numTokens + 1, blockSizeTokens);
    const isAlone = running.length === 0;
    if (!isAlone && numNeededPages > numFreePages - numPromisedPages - numWantedPages) break;
    const numTokens = tokensThatFit(sequence, budgetTokens, numFreePages, blockSizeTokens);
    if (numTokens === 0) break;
    if (next > 0) plan.passedOver.push(waiting[0]!);
    waiting.splice(next, 1);
    running.push(sequence);
    seats.set(sequence.adapterKey, (seats.get(sequence.adapterKey) ?? 0) + 1);
    plan.admitted.push(sequence);
    addChunk(sequence, numTokens);
    numPromisedPages += numNeededPages - plan.chunks.at(-1)!.numNewBlocks;
  }
  return plan;
}

/** The longest chunk of a prompt within the token budget and the free pages. */
function tokensThatFit(
  sequence: Sequence,
  budgetTokens: number,
  numFreePages: number,
  blockSizeTokens: number,
): number {
  const numPositions = (sequence.numBlocks + numFreePages) * blockSizeTokens;
  return Math.max(
    0,
    Math.min(sequence.numPendingTokens, budgetTokens, numPositions - sequence.numComputedTokens),
  );
}

/** Running sequences by adapter. */
function countSeats(running: readonly Sequence[]): Map<string, number> {
  const seats = new Map<string, number>();
  for (const { adapterKey } of running) seats.set(adapterKey, (seats.get(adapterKey) ?? 0) + 1);
  return seats;
}

/** Index of the sequence to admit next: the head, or the first of an adapter that has no seat when the head's has its share. */
function nextToAdmit(
  waiting: readonly Sequence[],
  seats: ReadonlyMap<string, number>,
  shareOfSeats: number,
): number {
  const head = waiting[0]!;
  const isOverShare = (seats.get(head.adapterKey) ?? 0) >= shareOfSeats;
  if (!isOverShare || head.wasPreempted || head.numPassedOver >= maxPassedOver) return 0;
  const starving = waiting.findIndex((sequence) => !seats.has(sequence.adapterKey));
  return Math.max(0, starving);
}
