import { describe, expect, test } from 'vitest';
import { LongState } from '../../engine/ladder/long-context.ts';
import { defaultSampling } from '../../engine/sampling.ts';
import { type FoundBlock, maxPassedOver, type ScheduleInput, schedule } from '../../engine/scheduler.ts';
import { Sequence } from '../../engine/sequence.ts';

let nextId = 0;

/** A sequence as it stands between steps: its blocks hold exactly what is computed. */
function sequence(fields: {
  numTokens: number;
  numComputed?: number;
  adapterKey?: string;
  wasPreempted?: boolean;
  maxTotalTokens?: number;
}) {
  const made = new Sequence({
    id: nextId++,
    promptTokens: new Int32Array(fields.numTokens),
    maxTotalTokens: fields.maxTotalTokens ?? 10_000,
    params: defaultSampling(),
    adapterKey: fields.adapterKey ?? '',
  });
  made.numComputedTokens = fields.numComputed ?? 0;
  made.numBlocks = Math.ceil(made.numComputedTokens / 16);
  made.wasPreempted = fields.wasPreempted ?? false;
  return made;
}
/** One token is pending, and the blocks are full: the next step needs a page. */
const decoding = (numTokens = 17) => sequence({ numTokens, numComputed: numTokens - 1 });

function plan(input: Partial<ScheduleInput>) {
  return schedule({
    waiting: [],
    running: [],
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
  test('admits in order of arrival, up to the seats', () => {
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

  test('lets an adapter that has no seat pass a flood for another', () => {
    const running = [0, 1, 2, 3].map(() => sequence({ numTokens: 18, numComputed: 17, adapterKey: 'flood' }));
    const flood = sequence({ numTokens: 2, adapterKey: 'flood' });
    const starving = sequence({ numTokens: 2, adapterKey: 'quiet' });
    const made = plan({ running, waiting: [flood, starving], maxSequences: 5 });
    expect(admitted(made)).toEqual([starving]);
    expect(made.passedOver).toEqual([flood]);
  });

  test('keeps the order while the flood is within its share', () => {
    const running = [sequence({ numTokens: 18, numComputed: 17, adapterKey: 'flood' })];
    const flood = sequence({ numTokens: 2, adapterKey: 'flood' });
    const quiet = sequence({ numTokens: 2, adapterKey: 'quiet' });
    expect(admitted(plan({ running, waiting: [flood, quiet], maxSequences: 4 }))).toEqual([flood, quiet]);
  });

  test('admits the head once it was passed over often enough', () => {
    const running = [0, 1, 2, 3].map(() => sequence({ numTokens: 18, numComputed: 17, adapterKey: 'flood' }));
    const head = sequence({ numTokens: 2, adapterKey: 'flood' });
    head.numPassedOver = maxPassedOver;
    const waiting = [head, sequence({ numTokens: 2, adapterKey: 'quiet' })];
    expect(admitted(plan({ running, waiting, maxSequences: 5 }))).toEqual([head]);
  });

  test('lets nobody pass a sequence that was preempted', () => {
    const running = [0, 1, 2, 3].map(() => sequence({ numTokens: 18, numComputed: 17, adapterKey: 'flood' }));
    const head = sequence({ numTokens: 2, adapterKey: 'flood', wasPreempted: true });
    const waiting = [head, sequence({ numTokens: 2, adapterKey: 'quiet' })];
    expect(admitted(plan({ running, waiting, maxSequences: 5 }))).toEqual([head]);
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
