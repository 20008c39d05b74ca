/**
 * Chooses the next batch. Pure: sequences and page counts in, a plan out; the engine carries it out.
 *
 * What is planned here may begin while the step before it runs: counters are those after that step, whose draws are not
 * known yet. A sequence that has all its tokens, or has ended, holds its blocks until that step is over, but no seat.
 *
 *   1. Decode rows of all running sequences, oldest first, so that nobody's next token waits for another's prompt.
 *      When no page is free the youngest running sequence is preempted: its blocks go back, and later it fetches or computes them again.
 *   2. Prompts of running sequences, oldest first, in chunks within the token budget. When prompts of several tenants are to be computed,
 *      those that may begin among them, each tenant has its share of the budget; what it leaves is the others'. A prompt never preempts while
 *      something else can run; it waits for pages, and nothing younger takes pages before it.
 *   3. Admission, in the order that turns.ts gives. When the pages for the whole sequence are not in sight, the first one waits and
 *      all behind it wait too. What the prefix cache has of a prompt is not computed again; that includes the
 *      blocks that chunks of this very plan write, since a step writes all KV of a layer before it reads any. Blocks that
 *      must be copied to the device first get their pages now; the sequence runs up to them, and waits for them alone.
 *
 * Sequences of the lowest priority give way (sequence.ts, givesWay): their prompts run behind those of others, they are preempted
 * before others, and when one of a higher priority is first of those that wait and lacks a seat or pages that they have, they yield:
 * a plan then says this and nothing else, and the next one, made at once, has the room. None yields in vain, nor more than twice.
 * So do the youngest of a tenant that has more than its share of the seats (shares.ts), to one that has less, or had lately, and is next.
 *
 * A sequence that is too long for the device takes what it needs of both arenas when it begins (ladder/long-context.ts), and runs
 * within its own window of pages: it waits for these alone, and nobody is preempted for it. In a step it is the last that enters.
 *
 * Loops over all that runs count instead of iterating: an iterator makes an object a turn, for every token.
 *
 * Progress: the engine admits only sequences that fit into the arena alone, so the oldest one can always run.
 * Continuous batching is Orca's (Yu et al., 2022); chunked prefill Sarathi's (Agrawal et al., 2023).
 */
import type { BlockHash } from './ladder/block-hash.ts';
import { lowestPriority } from './protocol.ts';
import { blocksFor, type Sequence } from './sequence.ts';
import { type Claims, claimOf, fairLevel, isBelow, keepsShare, seatsOver } from './shares.ts';
import { hasCredit } from './turns.ts';

export interface ScheduleInput {
  /** Those that may begin, in the order of their turns: as many as seats are free or may be yielded. */
  waiting: readonly Sequence[];
  /** In the order they were admitted; with those that only wait for their last step to be over. */
  running: readonly Sequence[];
  /** What tenants have and want of the seats. */
  claims: Claims;
  /** Weights of all tenants that are here or were lately. */
  recentWeight: number;
  /** With those that hold blocks that are only kept. */
  numFreePages: number;
  /** The same of the host arena. */
  numFreeHostPages: number;
  prefixCache: PrefixCache;
  /** Pages that an adapter load waits for: left alone by admission. */
  numWantedPages: number;
  blockSizeTokens: number;
  maxBatchTokens: number;
  maxSequences: number;
}

/** A kept block: on the device, with or without sequences that have it; on its way there; or below, and worth a copy. */
export type FoundBlock = 'held' | 'unheld' | 'arriving' | 'host';

/** How a block comes into the table of a sequence that begins to run. */
export type BlockWay = 'share' | 'fetch' | 'compute';

/** What the scheduler asks of the pool of KV blocks. */
export interface PrefixCache {
  /** null: it must be computed. */
  find(hash: BlockHash): FoundBlock | null;
  /** Pages that come free if this sequence alone is preempted: at least one. */
  numPagesOfItsOwn(sequence: Sequence): number;
}

/** A run of a sequence's tokens in this step: positions endTokens − numTokens … endTokens − 1. */
export interface Chunk {
  sequence: Sequence;
  numTokens: number;
  /** Positions that are computed after it. */
  endTokens: number;
  /** Blocks to take first; of a long sequence from its window. */
  numNewBlocks: number;
}

/** A sequence that begins to run. */
export interface Admission {
  sequence: Sequence;
  /** Of the leading blocks of its table, up to the last one that is not computed. What is shared may be of chunks before its own. */
  ways: readonly BlockWay[];
}

/** `priority`: it is of the lowest, and who comes is not. `share`: its tenant has too many seats. */
export const yieldReasons = ['priority', 'share'] as const;
export interface Yield {
  sequence: Sequence;
  reason: (typeof yieldReasons)[number];
}

export interface SchedulePlan {
  /** In batch order. */
  chunks: Chunk[];
  /** Youngest first, but for those that give way; none of them has a chunk. */
  preempted: Sequence[];
  /** Members of waiting that begin to run, in order. One whose blocks are on their way may have no chunk yet. */
  admitted: Admission[];
  /** Members of running whose places others need now. The plan has nothing else then. */
  yielded: Yield[];
  /** Members of running that give way and whose prompts had to wait for tokens of the budget. */
  passedOver: Sequence[];
}

export function schedule(input: ScheduleInput): SchedulePlan {
  const { blockSizeTokens, prefixCache } = input;
  const plan: SchedulePlan = { chunks: [], preempted: [], admitted: [], yielded: [], passedOver: [] };
  const running = input.running.filter((sequence) => !sequence.isFinished && !sequence.isFull);
  plan.yielded = whoYields(input, running);
  if (plan.yielded.length > 0) return plan;
  let numFreePages = input.numFreePages;
  let budgetTokens = input.maxBatchTokens;

  const newBlocks = (sequence: Sequence, numTokens: number) =>
    Math.max(0, blocksFor(sequence.numComputedTokens + numTokens, blockSizeTokens) - sequence.numBlocks);

  const addChunk = (sequence: Sequence, numTokens: number) => {
    const numNewBlocks = newBlocks(sequence, numTokens);
    if (!sequence.long) numFreePages -= numNewBlocks;
    budgetTokens -= numTokens;
    const endTokens = sequence.numComputedTokens + numTokens;
    plan.chunks.push({ sequence, numTokens, endTokens, numNewBlocks });
  };

  /** Of those from `begin` on, which have no chunk yet: the last that gives way, or else the last. */
  const preemptYoungest = (begin: number) => {
    let index = running.length - 1;
    while (index > begin && !running[index]!.givesWay) index--;
    if (!running[index]!.givesWay) index = running.length - 1;
    const [victim] = running.splice(index, 1);
    plan.preempted.push(victim!);
    numFreePages += prefixCache.numPagesOfItsOwn(victim!);
    return victim!;
  };

  // 1. Decode. The loop sees `running` shrink behind it; a victim is never older than the one that needs the page, unless that one
  // gives way itself.
  for (let i = 0; i < running.length; i++) {
    const sequence = running[i]!;
    if (sequence.numPendingTokens !== 1) continue;
    if (sequence.long) {
      if (newBlocks(sequence, 1) <= sequence.long.free.length) addChunk(sequence, 1);
      continue;
    }
    let isPreempted = false;
    while (!isPreempted && newBlocks(sequence, 1) > numFreePages)
      isPreempted = preemptYoungest(i) === sequence;
    // Another one has its place in the list.
    if (isPreempted) i--;
    else addChunk(sequence, 1);
  }

  // 2. Prefill. Repeated only after a preemption, which happens only while the plan is empty.
  let isShortOfPages = false;
  do {
    isShortOfPages = false;
    const shares = sharePrompts(input, running, budgetTokens, numFreePages);
    for (let i = 0; i < 2 * running.length; i++) {
      const sequence = running[i % running.length]!;
      if (sequence.givesWay !== i >= running.length) continue;
      const { numRunnableTokens } = sequence;
      if (sequence.numPendingTokens === 1 || numRunnableTokens === 0) continue;
      const { tenant } = sequence.standing;
      const left = sequence.givesWay ? budgetTokens - shares.numReserved : (shares.byTenant.get(tenant) ?? 0);
      const mostTokens = Math.min(budgetTokens, left);
      if (mostTokens <= 0) {
        if (sequence.givesWay) plan.passedOver.push(sequence);
        continue;
      }
      const numPages = sequence.long ? sequence.long.free.length : numFreePages;
      const numTokens = tokensThatFit(sequence, mostTokens, numPages, blockSizeTokens);
      isShortOfPages = !sequence.long && numTokens < Math.min(numRunnableTokens, mostTokens);
      if (numTokens > 0) addChunk(sequence, numTokens);
      if (!sequence.givesWay) shares.byTenant.set(tenant, left - numTokens);
      if (isShortOfPages) break;
    }
    if (plan.chunks.length > 0 || !isShortOfPages) break;
    preemptYoungest(0);
  } while (running.length > 0);

  // 3. Admission.
  if (input.waiting.length === 0 || isShortOfPages || plan.preempted.length > 0) return plan;
  if (running.length >= input.maxSequences || budgetTokens === 0) return plan;
  // Pages that running sequences will still take for the tokens they have.
  let numPromisedPages = numPagesPromised(running, blockSizeTokens);
  const planned: PlannedBlocks = { made: new Set(), shared: new Set() };
  for (const chunk of plan.chunks) {
    if (!chunk.sequence.long) numPromisedPages -= chunk.numNewBlocks;
    addHashes(chunk, blockSizeTokens, planned);
  }

  for (const sequence of input.waiting) {
    if (running.length >= input.maxSequences || budgetTokens === 0) break;
    // The pages for all its tokens and for the next one must be in sight, or it would only be preempted again.
    const numWantedPages = running.length === 0 ? 0 : input.numWantedPages;
    const isAlone = running.length === 0;
    const numPagesInSight = numFreePages - numPromisedPages - numWantedPages;
    // It takes one of its own at least: this spares the look into the cache.
    if (!isAlone && numPagesInSight <= 0) break;
    if (sequence.long) {
      // What it takes of the host may be what others fetch: not in one step.
      if (plan.admitted.some(({ ways }) => ways.includes('fetch'))) break;
      const { shape, numPages } = sequence.long;
      if (shape.numDevicePages > (isAlone ? numFreePages : numPagesInSight)) break;
      if (shape.numHostPages > input.numFreeHostPages) break;
      const numTokens = Math.min(sequence.numTokens, budgetTokens, numPages * blockSizeTokens);
      const numNewBlocks = blocksFor(numTokens, blockSizeTokens);
      plan.admitted.push({ sequence, ways: [] });
      plan.chunks.push({ sequence, numTokens, endTokens: numTokens, numNewBlocks });
      break;
    }
    const found = findWays(sequence, blockSizeTokens, prefixCache, planned);
    const { ways, numTaken } = found;
    const numPages = blocksFor(sequence.numTokens + 1, blockSizeTokens) - ways.length + numTaken;
    if (!isAlone && numPages > numPagesInSight) break;
    if (numTaken > numFreePages) break;
    const begin = found.numReady * blockSizeTokens;
    const chunk: Chunk = { sequence, numTokens: 0, endTokens: begin, numNewBlocks: 0 };
    if (!found.isWaiting) {
      const numPositions = (ways.length + numFreePages - numTaken) * blockSizeTokens;
      chunk.numTokens =
        Math.min(found.nextReady * blockSizeTokens, sequence.numTokens, begin + budgetTokens, numPositions) -
        begin;
      if (chunk.numTokens <= 0) break;
      chunk.endTokens = begin + chunk.numTokens;
      chunk.numNewBlocks = Math.max(0, blocksFor(chunk.endTokens, blockSizeTokens) - ways.length);
      plan.chunks.push(chunk);
    }
    running.push(sequence);
    plan.admitted.push({ sequence, ways });
    for (let i = 0; i < ways.length; i++)
      if (ways[i] !== 'compute') planned.shared.add(sequence.blockHashes[i]!);
    addHashes(chunk, blockSizeTokens, planned);
    numFreePages -= chunk.numNewBlocks + numTaken;
    budgetTokens -= chunk.numTokens;
    numPromisedPages += numPages - numTaken - chunk.numNewBlocks;
  }
  return plan;
}

/** What tenants may have of a step's tokens for prompts. */
interface PromptShares {
  byTenant: Map<string, number>;
  /** Tokens of those for prompts that may begin in this step. */
  numReserved: number;
}

/**
 * Max-min by weights, as seats are shared. Of those that wait count who has a seat and pages in sight; of what the cache has of their
 * prompts nothing is known here, and what is kept for it is left over once.
 */
function sharePrompts(
  { waiting, maxSequences, blockSizeTokens }: ScheduleInput,
  running: readonly Sequence[],
  budgetTokens: number,
  numFreePages: number,
): PromptShares {
  const claims: Claims = new Map();
  let hasPrompts = false;
  for (const { standing, numPendingTokens, numRunnableTokens, givesWay } of running) {
    if (numPendingTokens === 1 || numRunnableTokens === 0) continue;
    hasPrompts = true;
    if (!givesWay) claimOf(claims, standing).numRunning += numRunnableTokens;
  }
  const shares: PromptShares = { byTenant: new Map(), numReserved: 0 };
  if (!hasPrompts) return shares;
  let numPages = numFreePages - numPagesPromised(running, blockSizeTokens);
  for (const { standing, numTokens, givesWay, long } of waiting.slice(
    0,
    Math.max(0, maxSequences - running.length),
  )) {
    numPages -= long ? long.shape.numDevicePages : blocksFor(numTokens + 1, blockSizeTokens);
    if (numPages < 0 || givesWay) break;
    claimOf(claims, standing).numWaiting += numTokens;
  }
  const level = fairLevel(claims, budgetTokens);
  for (const [tenant, { weight, numRunning, numWaiting }] of claims) {
    const share = Math.min(numRunning + numWaiting, Math.max(1, Math.floor(level * weight)));
    shares.byTenant.set(tenant, share);
    shares.numReserved += Math.max(0, share - numRunning);
  }
  return shares;
}

/** Pages that they will still take for the tokens they have. */
function numPagesPromised(running: readonly Sequence[], blockSizeTokens: number): number {
  let count = 0;
  for (const { long, numTokens, numBlocks } of running)
    if (!long) count += blocksFor(numTokens, blockSizeTokens) - numBlocks;
  return count;
}

/**
 * As many as it takes until the first that waits has its pages, and those that wait their seats: the youngest of those that give way;
 * then, for each that is next and whose tenant is below its share, the youngest of the tenant that is most over its own and whose
 * priority is no higher; then of one that got more lately. None when nobody who waits goes before them, or when it would not be enough.
 */
function whoYields(input: ScheduleInput, running: readonly Sequence[]): Yield[] {
  const { waiting, blockSizeTokens, prefixCache, maxSequences } = input;
  const goesBefore = ({ standing }: Sequence) => standing.priority > lowestPriority;
  const first = waiting[0];
  if (first === undefined || !goesBefore(first)) return [];
  const mayYield = running.filter((one) => one.mayYield);
  if (mayYield.length === 0) return [];
  if (first.long && first.long.shape.numHostPages > input.numFreeHostPages) return [];
  const { ways, numTaken } = findWays(first, blockSizeTokens, prefixCache, {
    made: new Set(),
    shared: new Set(),
  });
  const numOwnPages = blocksFor(first.numTokens + 1, blockSizeTokens) - ways.length + numTaken;
  const numPages = first.long ? first.long.shape.numDevicePages : numOwnPages;
  const numPromised = numPagesPromised(running, blockSizeTokens);
  let lackPages = numPages + numPromised + input.numWantedPages - input.numFreePages;
  let numFreeSeats = maxSequences - running.length;
  if (lackPages <= 0 && waiting.length <= numFreeSeats) return [];
  const claims: Claims = new Map();
  for (const [tenant, claim] of input.claims) claims.set(tenant, { ...claim });
  const knownClaim = ({ standing }: Sequence) => claims.get(standing.tenant);
  // Short of pages, no more can run than do.
  const numSeats = lackPages > 0 ? running.length : maxSequences;
  const level = fairLevel(claims, numSeats);
  const isDue = (sequence: Sequence) => isBelow(knownClaim(sequence), level);
  /** Shares that the other's tenant has too much, for this one; a little when it only had more lately; 0: it keeps its seats. */
  const overFor = (sequence: Sequence, isBelowShare: boolean, other: Sequence): number => {
    if (other.standing.priority > sequence.standing.priority) return 0;
    const claim = knownClaim(other);
    if (isBelowShare && !hasCredit(other, sequence)) {
      const over = seatsOver(claim, level);
      if (over > 0) return over;
    }
    if (!hasCredit(sequence, other) || !keepsShare(claim, numSeats, input.recentWeight)) return 0;
    return Number.EPSILON * (claim!.numRunning / claim!.weight);
  };
  const yielded: Yield[] = [];
  const yieldTo = (sequence: Sequence, isBelowShare: boolean, isNext: boolean): boolean => {
    let index = mayYield.findLastIndex((one) => one.givesWay);
    const reason = index >= 0 ? 'priority' : 'share';
    if (index < 0 && isNext) {
      let most = 0;
      for (let i = 0; i < mayYield.length; i++) {
        const over = overFor(sequence, isBelowShare, mayYield[i]!);
        if (over > 0 && over >= most) [index, most] = [i, over];
      }
    }
    if (index < 0) return false;
    const [victim] = mayYield.splice(index, 1);
    if (reason === 'share') knownClaim(victim!)!.numRunning--;
    yielded.push({ sequence: victim!, reason });
    lackPages -= prefixCache.numPagesOfItsOwn(victim!) + numPagesPromised([victim!], blockSizeTokens);
    return true;
  };
  const isFirstDue = isDue(first);
  let isBehindLine = false;
  for (const sequence of waiting) {
    if (!goesBefore(sequence)) {
      isBehindLine = true;
      continue;
    }
    if (numFreeSeats > 0) numFreeSeats--;
    else if (!yieldTo(sequence, isDue(sequence), !isBehindLine)) break;
    const claim = knownClaim(sequence);
    if (claim) claim.numRunning++;
  }
  while (lackPages > 0 && yieldTo(first, isFirstDue, true));
  // Alone it can always begin.
  return lackPages <= 0 || yielded.length === running.length ? yielded : [];
}

/** Blocks that the chunks of a plan make full, and those that come into tables; a block may be both. */
interface PlannedBlocks {
  made: Set<BlockHash>;
  shared: Set<BlockHash>;
}

function addHashes(chunk: Chunk, blockSizeTokens: number, { made }: PlannedBlocks): void {
  const { sequence, endTokens, numTokens } = chunk;
  const begin = Math.floor((endTokens - numTokens) / blockSizeTokens);
  const end = Math.min(Math.floor(endTokens / blockSizeTokens), sequence.blockHashes.length);
  for (let i = begin; i < end; i++) made.add(sequence.blockHashes[i]!);
}

/** How a waiting sequence would come to the blocks that it has tokens for. */
interface FoundWays {
  ways: BlockWay[];
  /** Pages that they take from the free ones: of its own, and those of shared blocks that nobody has. */
  numTaken: number;
  /** Leading blocks that are not computed; whether some of them must arrive first. */
  numReady: number;
  isWaiting: boolean;
  /** The first block that is ready behind what is computed first; Infinity: none. */
  nextReady: number;
}

/** The last token is always computed: what is drawn next comes from its row. */
function findWays(
  sequence: Sequence,
  blockSizeTokens: number,
  prefixCache: PrefixCache,
  { made, shared }: PlannedBlocks,
): FoundWays {
  const hashes = sequence.blockHashes;
  const most = Math.min(hashes.length, Math.floor((sequence.numTokens - 1) / blockSizeTokens));
  const found: FoundWays = {
    ways: [],
    numTaken: 0,
    numReady: 0,
    isWaiting: false,
    nextReady: Number.POSITIVE_INFINITY,
  };
  const { ways } = found;
  for (let i = 0; i < most; i++) {
    const hash = hashes[i]!;
    const state = prefixCache.find(hash);
    if (state === null && !made.has(hash)) continue;
    while (ways.length < i) ways.push('compute');
    ways.push(state === 'host' ? 'fetch' : 'share');
    if ((state === 'host' || state === 'unheld') && !shared.has(hash)) found.numTaken++;
    const isLeading = found.numReady === i;
    if (isLeading) found.numReady++;
    if (isLeading && (state === 'host' || state === 'arriving')) found.isWaiting = true;
    if (!isLeading && i < found.nextReady) found.nextReady = i;
  }
  for (const way of ways) if (way === 'compute') found.numTaken++;
  return found;
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
    Math.min(sequence.numRunnableTokens, budgetTokens, numPositions - sequence.numComputedTokens),
  );
}
