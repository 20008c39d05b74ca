import { expect, test, vi } from 'vitest';
import { type Try, winnerOf } from '../../../gateway/routing/hedge.ts';

type Named = Try<string> & { name: string; end(answer: string): void; fail(): void };

function begun(name: string): Named {
  const { promise, resolve, reject } = Promise.withResolvers<string>();
  return { name, answer: promise, end: resolve, fail: () => reject(new Error(name)) };
}
const isGood = (answer: string) => answer !== 'busy';

/** The second is begun at once; `then` says what becomes of both. */
async function race(then: (first: Named, second: Named) => void): Promise<string> {
  const [first, second] = [begun('first'), begun('second')];
  const won = winnerOf(
    first,
    () => {
      then(first, second);
      return second;
    },
    0,
    isGood,
  );
  return (await won).name;
}

test('a first answer that comes in time needs no second', async () => {
  const first = begun('first');
  const beginOther = vi.fn(() => begun('second'));
  const won = winnerOf(first, beginOther, 60_000, isGood);
  first.end('here');
  expect(await won).toBe(first);
  expect(beginOther).not.toHaveBeenCalled();
});

test('a first that fails, or is refused, in time needs no second: it is tried again', async () => {
  for (const end of [(first: Named) => first.fail(), (first: Named) => first.end('busy')]) {
    const first = begun('first');
    const beginOther = vi.fn(() => begun('second'));
    const won = winnerOf(first, beginOther, 60_000, isGood);
    end(first);
    expect(await won).toBe(first);
    expect(beginOther).not.toHaveBeenCalled();
  }
});

test.each<[string, (first: Named, second: Named) => void, string]>([
  ['the second, when it is there first', (_, second) => second.end('here'), 'second'],
  ['the first, when it is there first after all', (first) => first.end('here'), 'first'],
  [
    'the one that is still under way when the other fails',
    (first, second) => {
      first.fail();
      setTimeout(() => second.end('here'), 5);
    },
    'second',
  ],
  [
    'the one that is still under way when the other is refused',
    (first, second) => {
      second.end('busy');
      setTimeout(() => first.end('here'), 5);
    },
    'first',
  ],
  [
    'the last when both fail',
    (first, second) => {
      second.fail();
      setTimeout(() => first.fail(), 5);
    },
    'first',
  ],
])('whose answer counts: %s', async (_, then, expected) => {
  expect(await race(then)).toBe(expected);
});

test('without a second engine the first is waited for', async () => {
  const first = begun('first');
  const won = winnerOf(first, () => null, 0, isGood);
  expect(await won).toBe(first);
});
