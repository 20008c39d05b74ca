import { describe, expect, test } from 'vitest';
import { Arena, type PageOwner, pageOwners } from '../../../engine/ladder/arena.ts';
import { seededRandom } from '../../fixtures/seeded-random.ts';

describe('arena', () => {
  test('gives each page to one owner until it comes back', () => {
    const arena = new Arena(4, 1024);
    const kv = new Int32Array(3);
    const adapter = new Int32Array(1);
    expect(arena.take('kv', 3, kv)).toBe(true);
    expect(arena.take('adapter', 1, adapter)).toBe(true);
    expect(new Set([...kv, ...adapter])).toEqual(new Set([0, 1, 2, 3]));
    expect([arena.numFree, arena.numUsed('kv'), arena.numUsed('adapter')]).toEqual([0, 3, 1]);
  });

  test('takes nothing when fewer pages are free than asked', () => {
    const arena = new Arena(4, 1024);
    expect(arena.take('kv', 5, new Int32Array(5))).toBe(false);
    expect(arena.numFree).toBe(4);
    arena.check();
  });

  test('writes pages from the place it is told', () => {
    const table = Int32Array.of(-1, -1, -1);
    new Arena(4, 1024).take('kv', 2, table, 1);
    expect([...table]).toEqual([-1, 0, 1]);
  });

  test('refuses a page that is given back twice', () => {
    const arena = new Arena(4, 1024);
    const pages = new Int32Array(1);
    arena.take('kv', 1, pages);
    arena.giveBack('kv', pages);
    expect(() => arena.giveBack('kv', pages)).toThrow('given back by kv, which does not own it');
  });

  test('refuses a page that its owner did not give back', () => {
    const arena = new Arena(4, 1024);
    const pages = new Int32Array(1);
    arena.take('adapter', 1, pages);
    expect(() => arena.giveBack('kv', pages)).toThrow('given back by kv');
  });

  test.each([1, 2, 3, 4, 5])('keeps its books over a random run (seed %i)', (seed) => {
    const random = seededRandom(seed);
    const arena = new Arena(1 + random.below(100), 1024);
    const held: { owner: PageOwner; pages: Int32Array }[] = [];
    for (let turn = 0; turn < 2000; turn++) {
      if (random.below(2) === 0) {
        const pages = new Int32Array(random.below(10));
        const owner = pageOwners[random.below(2)]!;
        const isEnough = pages.length <= arena.numFree;
        expect(arena.take(owner, pages.length, pages)).toBe(isEnough);
        if (isEnough) held.push({ owner, pages });
      } else if (held.length > 0) {
        const [back] = held.splice(random.below(held.length), 1);
        arena.giveBack(back!.owner, back!.pages);
      }
      arena.check();
      const numHeld = held.reduce((sum, { pages }) => sum + pages.length, 0);
      expect(arena.numFree + numHeld).toBe(arena.numPages);
    }
    for (const { owner, pages } of held) arena.giveBack(owner, pages);
    expect(arena.numFree).toBe(arena.numPages);
  });
});

describe('clearing', () => {
  const cleared: number[][] = [];
  const arenaOf = (partlyWritten: PageOwner[]) => {
    cleared.length = 0;
    return new Arena(100, 1024, { clear: (pages) => cleared.push([...pages]), partlyWritten });
  };
  const takeAll = (arena: Arena, owner: PageOwner) => {
    const pages = new Int32Array(arena.numFree);
    arena.take(owner, pages.length, pages);
    return pages;
  };

  test('is done before an owner gets pages that it writes only in part, and only to those that were used', () => {
    const arena = arenaOf(['kv']);
    const first = new Int32Array(3);
    arena.take('adapter', 3, first);
    arena.giveBack('adapter', first);
    const table = new Int32Array(8);
    arena.take('kv', 5, table, 2);
    expect(cleared.map((pages) => pages.sort())).toEqual([[...first].sort()]);
    arena.giveBack('kv', table.subarray(2, 7));
    arena.take('adapter', 5, table);
    expect(cleared).toHaveLength(1);
  });

  test('of free pages leaves those that are used, and is done once', async () => {
    const arena = arenaOf([]);
    const pages = takeAll(arena, 'kv');
    arena.giveBack('kv', pages.subarray(0, 70));
    await arena.clearFree();
    expect(new Set(cleared.flat())).toEqual(new Set(pages.subarray(0, 70)));
    expect(Math.max(...cleared.map(({ length }) => length))).toBeLessThan(70);
    cleared.length = 0;
    await arena.clearFree();
    expect(cleared).toEqual([]);
  });
});
