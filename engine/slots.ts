/** Places for work that runs at once, and a line before them: first come, first served, and both bounded. */
import { EngineError } from './errors.ts';

export class Slots {
  readonly #max: number;
  readonly #maxWaiting: number;
  /** What runs here, for the message: `adapter loads`. */
  readonly #what: string;
  readonly #waiting: (() => void)[] = [];
  #numTaken = 0;

  constructor(max: number, maxWaiting: number, what: string) {
    this.#max = max;
    this.#maxWaiting = maxWaiting;
    this.#what = what;
  }

  /**
   * Runs the work when there is a place for it.
   * @throws EngineError too_many_loads, when the line is full
   */
  async run<T>(work: () => Promise<T>): Promise<T> {
    if (this.#numTaken < this.#max) {
      this.#numTaken++;
    } else if (this.#waiting.length < this.#maxWaiting) {
      await new Promise<void>((resolve) => this.#waiting.push(resolve));
    } else {
      const message = `${this.#waiting.length} ${this.#what} wait already; retry when some are done`;
      throw new EngineError('too_many_loads', message);
    }
    try {
      return await work();
    } finally {
      const next = this.#waiting.shift();
      if (next) next();
      else this.#numTaken--;
    }
  }
}
