import { expect, test } from 'vitest';
import { arenaFor } from '../bench/load/own-server.ts';

const arena = { totalBytes: 1000, adapterBytes: 10 };

test.each<[string, number, boolean, number | null]>([
  ['an arena of which adapters take half stays as it is', 50, false, null],
  ['a smaller one grows by what adapters take', 51, false, 1510],
  ['one of the size that the user chose stays, as long as they fit', 99, true, null],
])('%s', (_name, numAdapters, isGiven, expected) => {
  expect(arenaFor(arena, numAdapters, isGiven, 10_000)).toBe(expected);
});

test('adapters that do not fit into what the user chose, or into the machine, are refused with their size', () => {
  expect(() => arenaFor(arena, 100, true, 10_000)).toThrow(
    '--device-memory: expected more than 1000 bytes for 100 adapters of 10 bytes and KV, got 1000',
  );
  expect(() => arenaFor(arena, 2000, false, 10_000)).toThrow(
    '--register: expected 21000 bytes of memory for 2000 adapters of 10 bytes and KV, got 11000',
  );
});
