// Things that come and go with every request, in no order. It stands in for a Set, whose table is made anew every few changes: V8 has
// each old table point to its successor. Once one of them is in the old space, all that come after it stay until the next full
// collection, with every request that was in them, and are copied twice on the way.

export class Bag<T> {
  readonly #entries: Entry<T>[] = [];

  get size(): number {
    return this.#entries.length;
  }

  /** @returns takes it out again; nothing happens the second time */
  add(value: T): () => void {
    const entry: Entry<T> = { value, index: this.#entries.length };
    this.#entries.push(entry);
    return () => this.#remove(entry);
  }

  /** As it is now: what comes or goes meanwhile makes no difference. */
  values(): T[] {
    return this.#entries.map(({ value }) => value);
  }

  #remove(entry: Entry<T>): void {
    if (entry.index < 0) return;
    const last = this.#entries.pop()!;
    if (last !== entry) {
      this.#entries[entry.index] = last;
      last.index = entry.index;
    }
    entry.index = -1;
  }
}

/** @property index  of its place; −1: it was taken out */
type Entry<T> = { readonly value: T; index: number };
