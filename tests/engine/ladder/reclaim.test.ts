import { expect, test } from 'vitest';
import { Arena, type PageOwner } from '../../../engine/ladder/arena.ts';
import { type Reclaimable, reclaim } from '../../../engine/ladder/reclaim.ts';

/** Holds one thing per rank, `numPages` each; the ranks may come in any order. */
function holder(arena: Arena, kind: PageOwner, ranks: readonly number[], numPages: number) {
  const held = ranks.map((rank) => {
    const pages = new Int32Array(numPages);
    arena.take(kind, numPages, pages);
    return { rank, pages };
  });
  held.sort((a, b) => a.rank - b.rank);
  return {
    kind,
    ranks: () => held.map(({ rank }) => rank),
    get numReclaimablePages() {
      return held.length * numPages;
    },
    next: () => held[0] && { rank: held[0].rank, evict: () => arena.giveBack(kind, held.shift()!.pages) },
  } as Reclaimable & { ranks(): number[] };
}

test('the least valuable leaves first, whoever holds it', () => {
  const arena = new Arena(10, 1024);
  const blocks = holder(arena, 'kv', [5, 1, 9], 1);
  const adapters = holder(arena, 'adapter', [7, 3], 3);
  expect(reclaim(arena, 5, [blocks, adapters])).toBe(true);
  expect([blocks.ranks(), adapters.ranks()]).toEqual([[5, 9], [7]]);
  expect(arena.numFree).toBe(5);
});

test('nothing leaves when enough is free', () => {
  const arena = new Arena(2, 1024);
  const blocks = holder(arena, 'kv', [1], 1);
  expect(reclaim(arena, 1, [blocks])).toBe(true);
  expect(blocks.ranks()).toEqual([1]);
});

test('nothing leaves when all of it would not be enough', () => {
  const arena = new Arena(4, 1024);
  arena.take('kv', 2, new Int32Array(2));
  const blocks = holder(arena, 'kv', [1], 1);
  expect(reclaim(arena, 3, [blocks])).toBe(false);
  expect(blocks.ranks()).toEqual([1]);
});
