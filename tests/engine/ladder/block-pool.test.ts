import { setImmediate as nextTurn } from 'node:timers/promises';
import { pino } from 'pino';
import { describe, expect, test } from 'vitest';
import { Arena } from '../../../engine/ladder/arena.ts';
import { BlockPool } from '../../../engine/ladder/block-pool.ts';
import { MeasuredCosts } from '../../../engine/ladder/costs.ts';
import type { PageCopier } from '../../../engine/ladder/host-blocks.ts';
import { reclaim } from '../../../engine/ladder/reclaim.ts';
import { defaultSampling } from '../../../engine/sampling.ts';
import { Sequence } from '../../../engine/sequence.ts';
import { seededRandom } from '../../fixtures/seeded-random.ts';

function noHostArena(): never {
  throw new Error('there is no host arena');
}

function pool(numPages = 16, below: { host: unknown[]; copier: PageCopier } | null = null) {
  let nowMs = 0;
  const arena = new Arena(numPages, 1024);
  const hostArena = below && new Arena(below.host.length, 1024);
  const blocks = new BlockPool({
    arena,
    hostArena,
    copier: {
      copyPages: below?.copier.copyPages ?? noHostArena,
      readHostPages: noHostArena,
      writeHostPages: noHostArena,
    },
    disk: null,
    blockTokens: 16,
    isCaching: true,
    rule: 'cost',
    costs: new MeasuredCosts(),
    log: pino({ level: 'silent' }),
    now: () => nowMs++,
    onFailed: fail,
  });
  return { arena, hostArena, blocks };
}

function fail(error: unknown): never {
  throw error;
}

let nextId = 0;
function sequence(promptTokens: ArrayLike<number>, adapterKey = ''): Sequence {
  return new Sequence({
    id: nextId++,
    promptTokens,
    maxTotalTokens: 10_000,
    params: defaultSampling(),
    adapterKey,
  });
}
const ascending = (length: number, first = 0) => Array.from({ length }, (_, i) => first + i);

/** As the engine lets a sequence begin: shares what is there, takes the rest, keeps what is full. @returns blocks shared */
function begin({ arena, blocks }: ReturnType<typeof pool>, made: Sequence): number {
  blocks.hash(made, made.numTokens);
  let numShared = 0;
  made.roomForBlocks(made.blockHashes.length);
  while (numShared < made.blockHashes.length && blocks.share(made, numShared)) numShared++;
  made.numBlocks = made.numKeptBlocks = numShared;
  const numNew = Math.ceil(made.numTokens / 16) - numShared;
  if (!reclaim(arena, numNew, [blocks])) throw new Error('no room');
  blocks.take(made, numNew);
  blocks.keep(made, made.numTokens, null);
  return numShared;
}

describe('kept blocks', () => {
  test('are found by a sequence that begins alike, up to the block that differs', () => {
    const parts = pool();
    expect(begin(parts, sequence(ascending(50)))).toBe(0);
    expect(begin(parts, sequence([...ascending(40), 7, 7, 7, 7, 7, 7, 7, 7, 7]))).toBe(2);
    expect(parts.blocks.numHeldPages).toBe(6);
  });

  test('are found after their sequence has ended, without its partial last block', () => {
    const parts = pool();
    const first = sequence(ascending(50));
    begin(parts, first);
    parts.blocks.release(first);
    expect([parts.blocks.numHeldPages, parts.blocks.numReclaimablePages, parts.arena.numFree]).toEqual([
      0, 3, 13,
    ]);
    expect(begin(parts, sequence(ascending(50)))).toBe(3);
  });

  test.each<[string, string]>([
    ['another adapter', 'sha256:b'],
    ['the base', ''],
  ])('of an adapter are not found by %s', (_, voice) => {
    const parts = pool();
    begin(parts, sequence(ascending(50), 'sha256:a'));
    expect(begin(parts, sequence(ascending(50), voice))).toBe(0);
  });

  test('at another place are not found: a hash stands for all that is before it', () => {
    const parts = pool();
    begin(parts, sequence(ascending(32)));
    expect(begin(parts, sequence(ascending(16, 16)))).toBe(0);
  });

  test('leave from the end of a chain, and only when nobody has them', () => {
    const parts = pool(4);
    const first = sequence(ascending(48));
    begin(parts, first);
    expect(reclaim(parts.arena, 2, [parts.blocks])).toBe(false);
    parts.blocks.release(first);
    expect(reclaim(parts.arena, 3, [parts.blocks])).toBe(true);
    expect(begin(parts, sequence(ascending(48)))).toBe(1);
  });

  test('leave later the more often they were used', () => {
    const parts = pool(4);
    const [often, once] = [ascending(16), ascending(16, 500)];
    for (const tokens of [often, often, often, once]) {
      const made = sequence(tokens);
      begin(parts, made);
      parts.blocks.release(made);
    }
    expect(reclaim(parts.arena, 3, [parts.blocks])).toBe(true);
    expect(begin(parts, sequence(often))).toBe(1);
  });

  test('that are computed twice at once are kept once', () => {
    const parts = pool();
    const [a, b] = [sequence(ascending(32)), sequence(ascending(32))];
    for (const made of [a, b]) parts.blocks.take(made, 2);
    for (const made of [a, b]) parts.blocks.keep(made, 32, null);
    for (const made of [a, b]) parts.blocks.release(made);
    expect([parts.blocks.numReclaimablePages, parts.arena.numFree]).toEqual([2, 14]);
  });

  test('that are forgotten go with their last holder', async () => {
    const parts = pool();
    const [a, b] = [sequence(ascending(32), 'sha256:a'), sequence(ascending(32), 'sha256:a')];
    for (const made of [a, b]) begin(parts, made);
    expect(await parts.blocks.purge('sha256:a')).toMatchObject({ device: 2 * 1024 });
    expect(parts.blocks.holdsForgotten(b)).toBe(true);
    parts.blocks.release(a);
    expect(parts.arena.numFree).toBe(14);
    parts.blocks.release(b);
    expect([parts.blocks.numReclaimablePages, parts.arena.numFree]).toEqual([0, 16]);
  });

  test('that were found stay before those that were only made, and be they older', () => {
    const parts = pool();
    for (let i = 0; i < 2; i++) {
      const made = sequence(ascending(64, 5000));
      expect(begin(parts, made)).toBe(4 * i);
      parts.blocks.release(made);
    }
    for (let i = 0; i < 50; i++) {
      const once = sequence(ascending(80, 100 * i));
      begin(parts, once);
      parts.blocks.release(once);
    }
    expect(parts.blocks.numEvicted).toBeGreaterThan(200);
    expect(begin(parts, sequence(ascending(64, 5000)))).toBe(4);
  });

  test('of other adapters stay when one is purged', async () => {
    const parts = pool();
    for (const voice of ['sha256:a', 'sha256:b', 'sha256:b@0.5+sha256:a@1']) {
      const made = sequence(ascending(32), voice);
      begin(parts, made);
      parts.blocks.release(made);
    }
    expect(await parts.blocks.purge('sha256:a')).toMatchObject({ device: 4 * 1024 });
    expect(begin(parts, sequence(ascending(32), 'sha256:b'))).toBe(2);
    expect(parts.arena.numFree).toBe(14);
  });
});

/** Raised to a million and more for a long proof. */
const numOperations = Number(process.env.MOTET_LADDER_OPERATIONS ?? 20_000);

/**
 * Pages as their contents: the hash of the block that was computed into a page, or what an adapter left. A copy takes what the page
 * holds when it is done, some turns later, in order.
 */
function tiers(numPages: number, numHostPages: number, random: ReturnType<typeof seededRandom>) {
  const device = new Array<string>(numPages).fill('');
  const host = new Array<string>(numHostPages).fill('');
  let last = Promise.resolve();
  const numCopied = { toHost: 0, toDevice: 0 };
  const copyPages = async (direction: 'toHost' | 'toDevice', from: Int32Array, to: Int32Array) => {
    const [source, target] = direction === 'toHost' ? [device, host] : [host, device];
    const copy = last.then(async () => {
      for (let turns = random.below(3); turns > 0; turns--) await nextTurn();
      for (const [i, page] of from.entries()) target[to[i]!] = source[page]!;
      numCopied[direction] += from.length;
    });
    last = copy;
    await copy;
    return { seconds: 1e-6 * from.length };
  };
  return { device, host, numCopied, copier: { copyPages } };
}

test.each([1, 2, 3])(
  'the books of arenas and pool add up over a random run, and blocks hold what they say (seed %i)',
  async (seed) => {
    const random = seededRandom(seed);
    const numPages = random.from(8, 40);
    const contents = tiers(numPages, random.from(4, 60), random);
    const { arena, hostArena, blocks } = pool(numPages, contents);
    const held: Sequence[] = [];
    const adapters: { pages: Int32Array; isOnHost: boolean }[] = [];
    const purges: Promise<unknown>[] = [];
    const counts = { shared: 0, fetched: 0 };

    /** As the engine lets a sequence begin, and computes all that is not there. */
    const run = (made: Sequence): void => {
      blocks.hash(made, made.numTokens);
      const ways = made.blockHashes.map((hash) => {
        const found = blocks.find(hash);
        if (found === null) return 'compute';
        return found === 'host' ? 'fetch' : 'share';
      });
      made.roomForBlocks(ways.length);
      for (const [at, way] of ways.entries()) {
        if (way !== 'compute') counts[way === 'fetch' ? 'fetched' : 'shared']++;
        if (way === 'share') blocks.share(made, at);
      }
      const numOwn = ways.filter((way) => way !== 'share').length;
      const numBehind = Math.ceil(made.numTokens / 16) - ways.length;
      if (!reclaim(arena, numOwn + numBehind, [blocks])) throw new Error('no room');
      blocks.begin(made, ways);
      blocks.startFetching();
      blocks.take(made, numBehind);
      blocks.keep(made, made.numTokens, null);
      for (const [at, way] of ways.entries())
        if (way === 'compute') contents.device[made.blocks[at]!] = made.blockHashes[at]!;
      blocks.computed(made, 0, made.numTokens);
    };

    for (let turn = 0; turn < numOperations / 3; turn++) {
      const action = random.below(10);
      if (action < 4) {
        // Few beginnings, so that many are alike; few enough pages, so that blocks leave.
        const made = sequence(
          ascending(random.from(1, 80), random.below(3) * 100),
          random.pick(['', 'sha256:a']),
        );
        const numNeeded = Math.ceil(made.numTokens / 16);
        if (numNeeded <= arena.numFree + blocks.numReclaimablePages - numNeeded) {
          run(made);
          held.push(made);
        }
      } else if (action < 7 && held.length > 0) {
        const at = random.below(held.length);
        const made = held[at]!;
        if (!made.isInFlight) {
          for (const [depth, hash] of made.blockHashes.entries())
            if (contents.device[made.blocks[depth]!] !== hash)
              throw new Error(`turn ${turn}: wrong block ${depth}`);
          held.splice(at, 1);
          blocks.release(made);
        }
      } else if (action === 7) {
        const isOnHost = random.below(3) === 0;
        const where = isOnHost ? hostArena! : arena;
        const pages = new Int32Array(random.from(1, 4));
        if (
          reclaim(where, pages.length, isOnHost ? [blocks.host!] : [blocks]) &&
          where.take('adapter', pages.length, pages)
        ) {
          for (const page of pages) contents[isOnHost ? 'host' : 'device'][page] = 'adapter';
          adapters.push({ pages, isOnHost });
        }
      } else if (action === 8 && adapters.length > 0) {
        const { pages, isOnHost } = adapters.pop()!;
        (isOnHost ? hostArena! : arena).giveBack('adapter', pages);
      } else if (random.below(20) === 0) {
        purges.push(blocks.purge('sha256:a'));
      }
      if (turn % 3 === 0) await nextTurn();
      // A check reads every page: not after every one of a million operations.
      if (numOperations > 100_000 && turn % 100 > 0) continue;
      arena.check();
      hostArena!.check();
      blocks.check(held);
    }
    await blocks.settled();
    await Promise.all(purges);
    for (const made of held) blocks.release(made);
    for (const { pages, isOnHost } of adapters) (isOnHost ? hostArena! : arena).giveBack('adapter', pages);
    await blocks.close();
    arena.check();
    hostArena!.check();
    blocks.check([]);
    expect([arena.numFree, hostArena!.numFree]).toEqual([arena.numPages, hostArena!.numPages]);
    expect(counts.shared).toBeGreaterThan(0);
    expect(counts.fetched).toBeGreaterThan(0);
    expect(blocks.numEvicted).toBeGreaterThan(0);
    expect(blocks.host!.numEvicted).toBeGreaterThan(0);
  },
  numOperations / 10 + 30_000,
);
