import { describe, expect, test } from 'vitest';
import { LongState } from '../../engine/ladder/long-context.ts';
import { lowestPriority } from '../../engine/protocol.ts';
import { defaultSampling } from '../../engine/sampling.ts';
import { type FoundBlock, type ScheduleInput, schedule } from '../../engine/scheduler.ts';
import { defaultStanding, Sequence } from '../../engine/sequence.ts';
import { claimsOf } from '../../engine/shares.ts';

let nextId = 0;

/** A sequence as it stands between steps: its blocks hold exactly what is computed. */
function sequence(fields: {
  numTokens: number;
  numComputed?: number;
  priority?: number;
  tenant?: string;
  weight?: number;
  maxTotalTokens?: number;
}) {
  const made = new Sequence({
    id: nextId++,
    promptTokens: new Int32Array(fields.numTokens),
    maxTotalTokens: fields.maxTotalTokens ?? 10_000,
    params: defaultSampling(),
    standing: {
      tenant: fields.tenant ?? defaultStanding.tenant,
      weight: fields.weight ?? defaultStanding.weight,
      priority: fields.priority ?? defaultStanding.priority,
    },
  });
  made.numComputedTokens = fields.numComputed ?? 0;
  made.numBlocks = Math.ceil(made.numComputedTokens / 16);
  return made;
}
/** One token is pending, and the blocks are full: the next step needs a page. */
const decoding = (numTokens = 17) => sequence({ numTokens, numComputed: numTokens - 1 });

function plan(input: Partial<ScheduleInput>) {
  return schedule({
    waiting: [],
    running: [],
    claims: claimsOf(input.running ?? [], input.waiting ?? []),
    recentWeight: 0,
    numFreePages: 100,
    numFreeHostPages: 100,
    prefixCache: { find: () => null, numPagesOfItsOwn: ({ numBlocks }) => numBlocks },
    numWantedPages: 0,
    blockSizeTokens: 16,
    maxBatchTokens: 64,
    maxSequences: 8,
    ...input,
  });
}
const chunks = (made: ReturnType<typeof plan>) =>
  made.chunks.map((chunk) => [chunk.sequence, chunk.numTokens]);

const yielded = (made: ReturnType<typeof plan>) => made.yielded.map(({ sequence }) => sequence);

const admitted = (made: ReturnType<typeof plan>) => made.admitted.map((admission) => admission.sequence);

describe('decode', () => {
  test('gives every running sequence its next token before any prompt', () => {
    const [a, prefilling, b] = [decoding(), sequence({ numTokens: 100, numComputed: 32 }), decoding()];
    expect(chunks(plan({ running: [prefilling, a, b] }))).toEqual([
      [a, 1],
      [b, 1],
      [prefilling, 62],
    ]);
  });

  test('takes a block only when the last one is full', () => {
    const made = plan({ running: [decoding(17), decoding(18)] });
    expect(made.chunks.map((chunk) => chunk.numNewBlocks)).toEqual([1, 0]);
  });

  test('preempts the youngest sequence when no page is free', () => {
    const [old, middle, young] = [decoding(), decoding(), decoding()];
    const made = plan({ running: [old, middle, young], numFreePages: 1 });
    expect(made.preempted).toEqual([young]);
    expect(chunks(made)).toEqual([
      [old, 1],
      [middle, 1],
    ]);
  });

  test('preempts itself when it is the youngest', () => {
    const [old, young] = [decoding(18), decoding(17)];
    const made = plan({ running: [old, young], numFreePages: 0 });
    expect(made.preempted).toEqual([young]);
    expect(chunks(made)).toEqual([[old, 1]]);
  });

  test('admits nobody in a step that preempts', () => {
    const made = plan({
      running: [decoding(), decoding()],
      waiting: [sequence({ numTokens: 1 })],
      numFreePages: 1,
    });
    expect(admitted(made)).toEqual([]);
  });
});

describe('while the step before runs', () => {
  test('gives the next row to a token that is not known yet', () => {
    const going = sequence({ numTokens: 20, numComputed: 20 });
    going.expectToken(0);
    expect(chunks(plan({ running: [going] }))).toEqual([[going, 1]]);
  });

  test('has no row and no seat for a sequence that gets its last token there, nor for one that ended', () => {
    const full = sequence({ numTokens: 20, numComputed: 20, maxTotalTokens: 21 });
    full.expectToken(0);
    const ended = decoding();
    ended.status = 'finished';
    const next = sequence({ numTokens: 5 });
    const made = plan({ running: [full, ended], waiting: [next], maxSequences: 1 });
    expect(chunks(made)).toEqual([[next, 5]]);
  });

  test('does not preempt them for their pages, which come back by themselves', () => {
    const [old, full] = [decoding(), sequence({ numTokens: 20, numComputed: 19, maxTotalTokens: 20 })];
    const made = plan({ running: [old, full], numFreePages: 0 });
    expect(made.preempted).toEqual([old]);
    expect(chunks(made)).toEqual([]);
  });
});

describe('prefill', () => {
  test('cuts a prompt at the token budget', () => {
    const long = sequence({ numTokens: 100 });
    expect(chunks(plan({ waiting: [long] }))).toEqual([[long, 64]]);
  });

  test('shares the budget, oldest first', () => {
    const [a, b] = [
      sequence({ numTokens: 100, numComputed: 60 }),
      sequence({ numTokens: 100, numComputed: 16 }),
    ];
    expect(chunks(plan({ running: [a, b] }))).toEqual([
      [a, 40],
      [b, 24],
    ]);
  });

  test('cuts a prompt at the free pages instead of preempting', () => {
    const [prompt, young] = [sequence({ numTokens: 100, numComputed: 32 }), decoding(18)];
    const made = plan({ running: [prompt, young], numFreePages: 1 });
    expect(made.preempted).toEqual([]);
    expect(chunks(made)).toEqual([
      [young, 1],
      [prompt, 16],
    ]);
  });

  test('lets nothing younger take pages before a prompt that is short of them', () => {
    const [old, young] = [
      sequence({ numTokens: 100, numComputed: 16 }),
      sequence({ numTokens: 40, numComputed: 16 }),
    ];
    const made = plan({ running: [old, young], waiting: [sequence({ numTokens: 1 })], numFreePages: 2 });
    expect(chunks(made)).toEqual([[old, 32]]);
    expect(admitted(made)).toEqual([]);
  });

  test('preempts the youngest prompt when no prompt can go on', () => {
    const [old, young] = [
      sequence({ numTokens: 100, numComputed: 16 }),
      sequence({ numTokens: 100, numComputed: 32 }),
    ];
    const made = plan({ running: [old, young], numFreePages: 0 });
    expect(made.preempted).toEqual([young]);
    expect(chunks(made)).toEqual([[old, 32]]);
  });
});

describe('admission', () => {
  test('admits in the order that is given, up to the seats', () => {
    const waiting = Array.from({ length: 5 }, () => sequence({ numTokens: 2 }));
    expect(admitted(plan({ waiting, maxSequences: 3 }))).toEqual(waiting.slice(0, 3));
  });

  test('makes all wait behind a head whose pages are not in sight', () => {
    const waiting = [sequence({ numTokens: 200 }), sequence({ numTokens: 2 })];
    const made = plan({ running: [decoding(18)], waiting, numFreePages: 5 });
    expect(admitted(made)).toEqual([]);
  });

  test('counts the pages that admitted prompts will still take', () => {
    const waiting = [sequence({ numTokens: 160 }), sequence({ numTokens: 160 })];
    expect(admitted(plan({ waiting, numFreePages: 20 }))).toEqual(waiting.slice(0, 1));
  });

  test('leaves the pages that a load waits for', () => {
    const input = { running: [decoding(18)], waiting: [sequence({ numTokens: 16 })], numFreePages: 4 };
    expect(admitted(plan({ ...input, numWantedPages: 2 }))).toEqual(input.waiting);
    expect(admitted(plan({ ...input, numWantedPages: 3 }))).toEqual([]);
  });

  test('admits a sequence when nothing runs, whatever a load waits for', () => {
    const waiting = [sequence({ numTokens: 60 })];
    expect(admitted(plan({ waiting, numFreePages: 4, numWantedPages: 4 }))).toEqual(waiting);
  });
});

describe('sequences of the lowest priority', () => {
  const line = (fields: { numTokens: number; numComputed?: number }) =>
    sequence({ ...fields, priority: lowestPriority });
  const runningLine = () => line({ numTokens: 18, numComputed: 17 });
  const online = (numTokens = 2) => sequence({ numTokens });

  test('yield their seats to as many as wait, the youngest first', () => {
    const running = [runningLine(), decoding(18), runningLine(), runningLine()];
    const made = plan({ running, waiting: [online(), online()], maxSequences: 4 });
    expect(yielded(made)).toEqual([running[3], running[2]]);
    expect([made.chunks, made.admitted]).toEqual([[], []]);
  });

  test('keep their seats while there are free ones, and while their own kind waits first', () => {
    const running = [runningLine(), runningLine()];
    expect(plan({ running, waiting: [online()], maxSequences: 3 }).yielded).toEqual([]);
    expect(plan({ running, waiting: [line({ numTokens: 2 }), online()], maxSequences: 2 }).yielded).toEqual(
      [],
    );
  });

  test('yield the pages that the first who waits lacks, and none when that is not enough', () => {
    // Two pages each, and 5 for the one that waits.
    const running = [decoding(18), runningLine(), runningLine()];
    const numYielded = (numFreePages: number) =>
      plan({ running, waiting: [online(79)], numFreePages }).yielded.length;
    expect([5, 4, 3, 2, 1, 0].map(numYielded)).toEqual([0, 1, 1, 2, 2, 0]);
  });

  test('yield all when nothing else runs, since the first then has the arena alone', () => {
    const running = [runningLine()];
    expect(yielded(plan({ running, waiting: [online(79)], numFreePages: 0 }))).toEqual(running);
  });

  test('yield twice at most', () => {
    const often = Object.assign(runningLine(), { numYields: 2 });
    expect(plan({ running: [often], waiting: [online()], maxSequences: 1 }).yielded).toEqual([]);
  });

  test('yield nothing that copies write into', () => {
    const copied = Object.assign(runningLine(), { numCopiesInFlight: 1 });
    expect(plan({ running: [copied], waiting: [online()], maxSequences: 1 }).yielded).toEqual([]);
  });

  test('are preempted before younger ones, and before the one that needs the page', () => {
    const [first, middle, young] = [line({ numTokens: 17, numComputed: 16 }), decoding(), decoding()];
    const made = plan({ running: [first, middle, young], numFreePages: 1 });
    expect(made.preempted).toEqual([young]);
    const later = plan({ running: [middle, first, young], numFreePages: 1 });
    expect(later.preempted).toEqual([first]);
    expect(chunks(later)).toEqual([
      [middle, 1],
      [young, 1],
    ]);
  });

  test('have their prompts computed behind those of others, and not for ever', () => {
    const [old, young] = [line({ numTokens: 100 }), sequence({ numTokens: 60, numComputed: 10 })];
    const made = plan({ running: [old, young], maxBatchTokens: 50 });
    expect(chunks(made)).toEqual([[young, 50]]);
    expect(made.passedOver).toEqual([old]);
    old.numStepsPassedOver = 256;
    expect(chunks(plan({ running: [old, young], maxBatchTokens: 50 }))).toEqual([[old, 50]]);
  });
});

describe('tenants', () => {
  const of = (tenant: string, fields: Partial<Parameters<typeof sequence>[0]> = {}) =>
    sequence({ numTokens: 18, numComputed: 17, tenant, ...fields });
  const comes = (tenant: string, fields: Partial<Parameters<typeof sequence>[0]> = {}) =>
    of(tenant, { numComputed: 0, ...fields });
  const full = (count: number, tenant: string) => Array.from({ length: count }, () => of(tenant));

  test('over their share yield seats to one that is below its own and next, the youngest first', () => {
    const running = full(4, 'flood');
    const waiting = [comes('quiet'), comes('quiet'), comes('quiet'), comes('flood')];
    const made = plan({ running, waiting, maxSequences: 4 });
    expect(made.yielded).toEqual([
      { sequence: running[3], reason: 'share' },
      { sequence: running[2], reason: 'share' },
    ]);
    expect([made.chunks, made.admitted]).toEqual([[], []]);
  });

  test('have by weight', () => {
    const running = full(8, 'flood');
    const heavy = Array.from({ length: 8 }, () => comes('heavy', { weight: 3 }));
    expect(yielded(plan({ running, waiting: heavy }))).toEqual(running.slice(2).reverse());
  });

  test('keep what others leave of their shares', () => {
    const running = [...full(5, 'flood'), of('quiet'), of('calm')];
    expect(plan({ running, waiting: [comes('flood')], maxSequences: 7 }).yielded).toEqual([]);
    expect(yielded(plan({ running, waiting: [comes('calm')], maxSequences: 7 }))).toEqual([running[4]]);
  });

  test('that are not next, or have their share, get no seat of others', () => {
    const running = full(4, 'flood');
    expect(plan({ running, waiting: [comes('flood'), comes('quiet')], maxSequences: 4 }).yielded).toEqual([]);
    const even = [...full(2, 'flood'), ...full(2, 'quiet')];
    expect(plan({ running: even, waiting: [comes('quiet')], maxSequences: 4 }).yielded).toEqual([]);
    const odd = [...full(2, 'flood'), of('quiet')];
    expect(plan({ running: odd, waiting: [comes('quiet')], maxSequences: 3 }).yielded).toEqual([]);
  });

  test('yield nothing to a lower priority, of one sequence no more than twice, and lines of batches first', () => {
    const running = full(3, 'flood');
    const waiting = [comes('quiet', { priority: -1 })];
    expect(plan({ running, waiting, maxSequences: 3 }).yielded).toEqual([]);
    running[2]!.numYields = 2;
    const quiet = [comes('quiet')];
    expect(yielded(plan({ running, waiting: quiet, maxSequences: 3 }))).toEqual([running[1]]);
    const line = of('flood', { priority: lowestPriority });
    const made = plan({ running: [line, ...running], waiting: quiet, maxSequences: 4 });
    expect(made.yielded).toEqual([{ sequence: line, reason: 'priority' }]);
  });

  test('share the tokens of a step between their prompts, by weight, and have what others leave', () => {
    const prompt = (tenant: string, numTokens: number, weight = 1) => sequence({ numTokens, tenant, weight });
    const flood = [prompt('flood', 200), prompt('flood', 200)];
    const small = prompt('small', 10);
    const others = [prompt('heavy', 200, 2), small];
    expect(chunks(plan({ running: [...flood, ...others], maxBatchTokens: 70 }))).toEqual([
      [flood[0], 20],
      [others[0], 40],
      [small, 10],
    ]);
    expect(chunks(plan({ running: [flood[0]!, small], maxBatchTokens: 70 }))).toEqual([
      [flood[0], 60],
      [small, 10],
    ]);
  });

  test('leave of a step what prompts that may begin need, be it that lines of batches run', () => {
    const comesNow = comes('quiet', { numTokens: 20 });
    const [flood, line] = [0, lowestPriority].map((priority) => of('flood', { numTokens: 300, priority }));
    const waiting = [comesNow];
    for (const old of [flood!, line!])
      expect(chunks(plan({ running: [old], waiting }))).toEqual([
        [old, 44],
        [comesNow, 20],
      ]);
    // No seat, or no pages for it: nothing is kept.
    expect(chunks(plan({ running: [flood!, of('calm')], waiting, maxSequences: 2 }))[1]).toEqual([flood, 63]);
    expect(chunks(plan({ running: [flood!], waiting, numFreePages: 18 }))).toEqual([[flood, 64]]);
  });

  test('over their share yield the pages that another lacks, while they keep their share of what can run', () => {
    const running = full(3, 'flood');
    const numYielded = (numFreePages: number) =>
      plan({ running, waiting: [comes('quiet', { numTokens: 40 })], numFreePages }).yielded.length;
    // Two pages each, and 3 for the one that waits.
    expect([3, 2, 1, 0].map(numYielded)).toEqual([0, 1, 1, 0]);
  });
});

describe('the prefix cache', () => {
  /** Its first blocks have these names. */
  const named = (numTokens: number, ...blockHashes: string[]) =>
    Object.assign(sequence({ numTokens }), { blockHashes });
  const cacheOf = (found: Record<string, FoundBlock>): ScheduleInput['prefixCache'] => ({
    find: (hash) => found[hash] ?? null,
    numPagesOfItsOwn: ({ numBlocks }) => numBlocks,
  });
  /** By sequence: how its blocks come (the first letters of the ways), and its chunk: tokens, where it ends, new blocks. */
  const shape = (made: ReturnType<typeof plan>) =>
    made.admitted.map(({ sequence, ways }) => {
      const chunk = made.chunks.find((one) => one.sequence === sequence);
      const letters = ways.map((way) => way[0]).join('');
      return [letters, ...(chunk ? [chunk.numTokens, chunk.endTokens, chunk.numNewBlocks] : [])];
    });

  test('spares a prompt the blocks that are there, and stops before those behind a gap', () => {
    const prefixCache = cacheOf({ a: 'held', b: 'held', d: 'held' });
    const made = plan({ waiting: [named(70, 'a', 'b', 'c', 'd')], prefixCache });
    expect(shape(made)).toEqual([['sscs', 16, 48, 0]]);
  });

  test('takes pages at once for what must be copied, and runs up to it', () => {
    const prefixCache = cacheOf({ a: 'unheld', c: 'host', d: 'arriving' });
    const waiting = [named(70, 'a', 'b', 'c', 'd')];
    expect(shape(plan({ waiting, prefixCache }))).toEqual([['scfs', 16, 32, 0]]);
    // Blocks 0, 1 and 2 now, and one for the last tokens.
    const numAdmitted = (numFreePages: number) =>
      plan({ running: [decoding(18)], waiting, prefixCache, numFreePages }).admitted.length;
    expect([3, 4].map(numAdmitted)).toEqual([0, 1]);
  });

  test.each(['host', 'arriving'] as const)(
    'lets one begin without a chunk whose first blocks are %s',
    (found) => {
      const made = plan({ waiting: [named(70, 'a', 'b')], prefixCache: cacheOf({ a: found, b: 'held' }) });
      expect(shape(made)).toEqual([[found === 'host' ? 'fs' : 'ss']]);
    },
  );

  test('copies for two sequences once', () => {
    const prefixCache = cacheOf({ a: 'host', b: 'host' });
    const waiting = [named(33, 'a', 'b'), named(33, 'a', 'b')];
    const numAdmitted = (numFreePages: number) =>
      plan({ running: [decoding(18)], waiting, prefixCache, numFreePages }).admitted.length;
    expect([2, 3, 4].map(numAdmitted)).toEqual([0, 1, 2]);
  });

  test('preempts nobody because all wait for their blocks', () => {
    const waits = sequence({ numTokens: 40 });
    waits.numBlocks = 2;
    waits.ready = [{ begin: 0, end: 32, numArriving: 1 }];
    const made = plan({ running: [waits], numFreePages: 0 });
    expect([made.chunks, made.preempted]).toEqual([[], []]);
  });

  test('leaves a prompt its last token to compute', () => {
    const prefixCache = cacheOf({ a: 'held', b: 'held' });
    expect(shape(plan({ waiting: [named(32, 'a', 'b')], prefixCache }))).toEqual([['s', 16, 32, 1]]);
    expect(shape(plan({ waiting: [named(33, 'a', 'b')], prefixCache }))).toEqual([['ss', 1, 33, 1]]);
  });

  test('lets prompts of one step share what the first of them computes', () => {
    const waiting = [named(40, 'a', 'b'), named(40, 'a', 'b'), named(40, 'a', 'c')];
    expect(shape(plan({ waiting }))).toEqual([
      ['', 40, 40, 3],
      ['ss', 8, 40, 1],
      ['s', 16, 32, 1],
    ]);
  });

  test('counts blocks that nobody has among the free pages, once', () => {
    const prefixCache = cacheOf({ a: 'unheld', b: 'unheld' });
    const waiting = [named(40, 'a', 'b'), named(40, 'a', 'b')];
    const running = [decoding(18)];
    const numAdmitted = (numFreePages: number) =>
      plan({ running, waiting, prefixCache, numFreePages }).admitted.length;
    expect([2, 3, 4].map(numAdmitted)).toEqual([0, 1, 2]);
  });

  test('counts a block that nobody has also when somebody computes it again', () => {
    const prefixCache = cacheOf({ a: 'unheld' });
    const again = Object.assign(named(16, 'a'), { numComputedTokens: 0 });
    const input = { running: [again], waiting: [named(17, 'a')], prefixCache };
    // One for the block of the first, one for the block that is shared, and one for the last token.
    expect([2, 3].map((numFreePages) => plan({ ...input, numFreePages }).admitted.length)).toEqual([0, 1]);
  });

  test('counts no page of a preempted sequence that others have too', () => {
    const [old, middle, young] = [decoding(33), decoding(33), decoding(33)];
    const prefixCache = { find: () => null, numPagesOfItsOwn: () => 1 };
    expect(plan({ running: [old, middle, young], prefixCache, numFreePages: 0 }).preempted).toEqual([
      young,
      middle,
    ]);
  });
});

describe('a sequence that is too long for the device', () => {
  /** 12 pages on the device, 10 of them its window, and 50 of the host. */
  const shape = { numDevicePages: 12, numStagingPages: 2, numSparePages: 4, numHostPages: 50 };
  const long = (numTokens: number, numComputed = 0, numFree = 10) => {
    const made = sequence({ numTokens, numComputed });
    made.long = new LongState(shape);
    made.long.free = Array.from({ length: numFree }, (_, i) => i);
    return made;
  };

  test('takes its pages of both arenas when it begins, and is the last that enters in a step', () => {
    const [short, first, second] = [sequence({ numTokens: 20 }), long(1000), long(1000)];
    const made = plan({ waiting: [short, first, second], numFreePages: 100, maxBatchTokens: 200 });
    expect(chunks(made)).toEqual([
      [short, 20],
      [first, 160],
    ]);
    expect(admitted(made)).toEqual([short, first]);
    const waiting = [first];
    expect(admitted(plan({ waiting, numFreePages: 12, numFreeHostPages: 50 }))).toEqual([first]);
    expect(admitted(plan({ waiting, numFreePages: 11 }))).toEqual([]);
    expect(admitted(plan({ waiting, numFreeHostPages: 49 }))).toEqual([]);
    expect(admitted(plan({ waiting, running: [decoding()], numFreePages: 12 }))).toEqual([]);
  });

  test('does not enter in a step in which another one fetches from the host', () => {
    const fetching = sequence({ numTokens: 100 });
    fetching.blockHashes = ['a'] as unknown as typeof fetching.blockHashes;
    const prefixCache = { find: (): FoundBlock => 'host', numPagesOfItsOwn: () => 1 };
    expect(admitted(plan({ waiting: [fetching, long(1000)], prefixCache }))).toEqual([fetching]);
  });

  test('runs within the free pages of its window, and others go on beside it', () => {
    const [a, b] = [long(1000, 480, 1), decoding()];
    const other = sequence({ numTokens: 100 });
    expect(chunks(plan({ running: [a, b, other], numFreePages: 100, maxBatchTokens: 64 }))).toEqual([
      [b, 1],
      [a, 16],
      [other, 47],
    ]);
    expect(chunks(plan({ running: [long(1000, 480, 0), b] }))).toEqual([[b, 1]]);
  });

  test('waits for a page of its window while it decodes, and preempts nobody', () => {
    const [waiting, young] = [long(481, 480, 0), decoding()];
    const made = plan({ running: [waiting, young], numFreePages: 1 });
    expect(chunks(made)).toEqual([[young, 1]]);
    expect(made.preempted).toEqual([]);
    expect(plan({ running: [long(482, 481, 0)], numFreePages: 0 }).chunks).toHaveLength(1);
  });
});
