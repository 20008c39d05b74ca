// Requests that end before their time. Each costs up to 0.1 ms: a connection is closed, a place is given to another, a log line written.
// When thousands do so in one moment, since the proxy before us or an engine has died, they are dealt with over many turns of the
// event loop, so that whoever stays does not wait for all of them.

/** So many in one turn, which takes 1 to 5 ms then. */
const perTurn = 32;

export class Turns {
  readonly #perTurn: number;
  #waiting: (() => void)[] = [];
  #leftThisTurn: number;
  #isScheduled = false;

  constructor(numPerTurn = perTurn) {
    this.#perTurn = numPerTurn;
    this.#leftThisTurn = numPerTurn;
  }

  /** Calls `end` at once, or when its turn comes, in the order in which they came. */
  take(end: () => void): void {
    if (this.#leftThisTurn > 0) {
      this.#leftThisTurn -= 1;
      this.#schedule();
      end();
    } else {
      this.#waiting.push(end);
    }
  }

  /** Calls all that wait. */
  flush(): void {
    for (const end of this.#waiting.splice(0)) end();
  }

  #schedule(): void {
    if (this.#isScheduled) return;
    this.#isScheduled = true;
    setImmediate(() => {
      this.#isScheduled = false;
      const now = this.#waiting.splice(0, this.#perTurn);
      this.#leftThisTurn = this.#perTurn - now.length;
      // Once more after the last, so that the next turn has all its places.
      if (now.length > 0) this.#schedule();
      for (const end of now) end();
    });
  }
}
