/** Places for work that runs at once, and a line before them, both bounded: the lowest rank is next, and of equals the first that came. */
import { EngineError } from './errors.ts';

export class Slots {
  readonly #max: number;
  readonly #maxWaiting: number;
  /** What runs here, for the message: `adapter loads`. */
  readonly #what: string;
  readonly #waiting: { resolve: () => void; rank: () => number }[] = [];
  #numTaken = 0;

  constructor(max: number, maxWaiting: number, what: string) {
    this.#max = max;
    this.#maxWaiting = maxWaiting;
    this.#what = what;
  }

  /**
   * Runs the work when there is a place for it.
   * @param rank  asked each time that a place comes free
   * @throws EngineError too_many_loads, when the line is full
   */
  async run<T>(work: (place: Place) => Promise<T>, rank = () => 0): Promise<T> {
    if (this.#waiting.length >= this.#maxWaiting && this.#numTaken >= this.#max) {
      const message = `${this.#waiting.length} ${this.#what} wait already; retry when some are done`;
      throw new EngineError('too_many_loads', message);
    }
    await this.#take((resolve) => this.#waiting.push({ resolve, rank }));
    let isTaken = true;
    const leave = async <U>(wait: () => Promise<U>): Promise<U> => {
      this.#giveBack();
      isTaken = false;
      const result = await wait();
      await this.#take((resolve) => this.#waiting.unshift({ resolve, rank: () => Number.NEGATIVE_INFINITY }));
      isTaken = true;
      return result;
    };
    try {
      return await work({ leave });
    } finally {
      if (isTaken) this.#giveBack();
    }
  }

  async #take(standInLine: (resolve: () => void) => void): Promise<void> {
    if (this.#numTaken < this.#max) this.#numTaken++;
    else await new Promise<void>(standInLine);
  }

  #giveBack(): void {
    if (this.#waiting.length === 0) {
      this.#numTaken--;
      return;
    }
    const ranks = this.#waiting.map(({ rank }) => rank());
    let next = 0;
    for (let i = 1; i < ranks.length; i++) if (ranks[i]! < ranks[next]!) next = i;
    this.#waiting.splice(next, 1)[0]!.resolve();
  }
}

/** A place that is taken. */
export interface Place {
  /** Leaves it to others while it waits, and then takes one again, before all who stand in line. */
  leave<T>(wait: () => Promise<T>): Promise<T>;
}
