/** Things that may leave, the one that leaves first at the front: a binary heap that lets any of them step out. */

export interface Leaving {
  /** As policy.ts ranks it; does not change while it is queued. */
  rank: number;
  /** Of equal rank the one with the higher depth leaves first: the end of a chain before its beginning. */
  depth: number;
  /** Where it is in the heap; −1: not queued. Only the queue writes it. */
  queueIndex: number;
}

export class LeavingQueue<T extends Leaving> {
  readonly #heap: T[] = [];

  get size(): number {
    return this.#heap.length;
  }

  first(): T | null {
    return this.#heap[0] ?? null;
  }

  /** The first `count`, in the order in which they would leave. */
  firstOnes(count: number): T[] {
    if (count >= this.#heap.length) return [...this.#heap].sort((a, b) => (leavesBefore(a, b) ? -1 : 1));
    const ones: T[] = [];
    // Below what was found: the next one is among them.
    const open = this.#heap.slice(0, 1);
    while (ones.length < count && open.length > 0) {
      let least = 0;
      for (let i = 1; i < open.length; i++) if (leavesBefore(open[i]!, open[least]!)) least = i;
      const one = open[least]!;
      ones.push(one);
      const at = one.queueIndex;
      open.splice(least, 1, ...this.#heap.slice(2 * at + 1, 2 * at + 3));
    }
    return ones;
  }

  add(item: T): void {
    item.queueIndex = this.#heap.length;
    this.#heap.push(item);
    this.#rise(item);
  }

  remove(item: T): void {
    const at = item.queueIndex;
    const last = this.#heap.pop()!;
    item.queueIndex = -1;
    if (last === item) return;
    this.#place(last, at);
    this.#rise(last);
    this.#sink(last);
  }

  #place(item: T, at: number): void {
    this.#heap[at] = item;
    item.queueIndex = at;
  }

  #rise(item: T): void {
    while (item.queueIndex > 0) {
      const above = this.#heap[(item.queueIndex - 1) >> 1]!;
      if (!leavesBefore(item, above)) return;
      const at = above.queueIndex;
      this.#place(above, item.queueIndex);
      this.#place(item, at);
    }
  }

  #sink(item: T): void {
    while (true) {
      const left = this.#heap[2 * item.queueIndex + 1];
      const right = this.#heap[2 * item.queueIndex + 2];
      const below = left && right && leavesBefore(right, left) ? right : left;
      if (!below || !leavesBefore(below, item)) return;
      const at = below.queueIndex;
      this.#place(below, item.queueIndex);
      this.#place(item, at);
    }
  }
}

function leavesBefore(a: Leaving, b: Leaving): boolean {
  return a.rank < b.rank || (a.rank === b.rank && a.depth > b.depth);
}
