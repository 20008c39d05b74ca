// A second engine for a request whose first one is slow to begin (Dean & Barroso, The Tail at Scale, 2013): who has a good answer first
// is believed, and the other is let go of. A pure decider over two promises; forward.ts begins the tries and ends them.

export type Try<A> = {
  /** May reject. */
  readonly answer: Promise<A>;
};

/** What became of a wish for a second engine. */
export const hedgeResults = ['won', 'lost', 'too_many', 'no_room'] as const;
export type HedgeResult = (typeof hedgeResults)[number];

/**
 * The try whose answer counts: the first that has a good one. A try that fails, or whose answer is not good, loses to the other as long as
 * that is under way; of two that fail the last.
 *
 * @param beginOther  called when the first has no answer after `afterMs`; null: there is no other
 * @param isGood      false of an answer that another engine's would be better than
 */
export async function winnerOf<A, T extends Try<A>>(
  first: T,
  beginOther: () => T | null,
  afterMs: number,
  isGood: (answer: A) => boolean,
): Promise<T> {
  const endOf = (one: T) => one.answer.then(isGood, () => false);
  const firstEnd = endOf(first);
  if (await isWithin(firstEnd, afterMs)) return first;
  const other = beginOther();
  if (other === null) return first;
  const ends = [
    firstEnd.then((wasGood) => ({ one: first, rest: other, wasGood })),
    endOf(other).then((wasGood) => ({ one: other, rest: first, wasGood })),
  ];
  const { one, rest, wasGood } = await Promise.race(ends);
  return wasGood ? one : rest;
}

async function isWithin(end: Promise<unknown>, ms: number): Promise<boolean> {
  const { promise, resolve } = Promise.withResolvers<boolean>();
  const timer = setTimeout(resolve, ms, false);
  void end.then(() => resolve(true));
  const isIn = await promise;
  clearTimeout(timer);
  return isIn;
}
