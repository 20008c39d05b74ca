/** A pace that all downloads of the process share: who takes bytes waits until those before them are paid for. */
import { setTimeout as sleep } from 'node:timers/promises';

export class Throttle {
  readonly #bytesPerSecond: number;
  readonly #now: () => number;
  readonly #wait: (ms: number, signal: AbortSignal) => Promise<unknown>;
  /** When all that was taken is paid for, in the clock's milliseconds. */
  #paidMs = 0;

  /** @param now milliseconds, never going back  @param wait rejects when the signal aborts */
  constructor(
    bytesPerSecond: number,
    now = () => performance.now(),
    wait: (ms: number, signal: AbortSignal) => Promise<unknown> = (ms, signal) =>
      sleep(ms, undefined, { signal }),
  ) {
    this.#bytesPerSecond = bytesPerSecond;
    this.#now = now;
    this.#wait = wait;
  }

  /** Counts the bytes, and resolves when the pace allows for them. @throws the reason of the signal */
  async take(numBytes: number, signal: AbortSignal): Promise<void> {
    const now = this.#now();
    this.#paidMs = Math.max(now, this.#paidMs) + (numBytes / this.#bytesPerSecond) * 1000;
    const waitMs = this.#paidMs - now;
    if (waitMs >= 1) await this.#wait(waitMs, signal);
  }
}
