/** Time as an argument, so that tests need not sleep. */

export interface Clock {
  /** Milliseconds that only grow; for waits and deadlines. */
  nowMs(): number;
  /** The time of day, for what people read. */
  date(): Date;
  /** Calls back once, in `ms` or a little later. @returns what cancels it */
  after(ms: number, callback: () => void): () => void;
}

export const systemClock: Clock = {
  nowMs: () => performance.now(),
  date: () => new Date(),
  after(ms, callback) {
    const timer = setTimeout(callback, ms);
    return () => clearTimeout(timer);
  },
};

/** Resolves in `ms`, or at once when `signal` is aborted. */
export function pause(clock: Clock, ms: number, signal: AbortSignal): Promise<void> {
  const { promise, resolve } = Promise.withResolvers<void>();
  if (signal.aborted) return Promise.resolve();
  const end = () => {
    cancel();
    signal.removeEventListener('abort', end);
    resolve();
  };
  const cancel = clock.after(ms, end);
  signal.addEventListener('abort', end);
  return promise;
}
