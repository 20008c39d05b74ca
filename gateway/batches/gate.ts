// How many lines of batches are in flight at a time, over all jobs: what online traffic leaves of the engines. Jobs that want
// to send a line take turns. While online requests wait for an engine no line is sent, but one now and then, so that a job gets on.

export type Room = {
  /** Lines that may be in flight now; 0 while no engine is ready. */
  maxInFlight: number;
  /** Engines that are ready. */
  numEngines: number;
};

/** How often somebody who waits is thought of when nothing else happens. */
const lookMs = 25;

type Waiter = { resolve(release: () => void): void };

export class Gate {
  readonly #room: (numInFlight: number, sinceGrantMs: number) => Room;
  readonly #waiters = new Set<Waiter>();
  #numInFlight = 0;
  #lastGrantMs = performance.now();
  #timer: NodeJS.Timeout | null = null;

  /** @param room  as of now, given how many lines are in flight and when the last one was let through */
  constructor(room: (numInFlight: number, sinceGrantMs: number) => Room) {
    this.#room = room;
  }

  get numInFlight(): number {
    return this.#numInFlight;
  }

  get room(): Room {
    return this.#room(this.#numInFlight, performance.now() - this.#lastGrantMs);
  }

  /** Waits for a place, in turn. It is given back by the function that it resolves with, which may be called again. */
  async take(signal: AbortSignal): Promise<() => void> {
    signal.throwIfAborted();
    const { promise, resolve, reject } = Promise.withResolvers<() => void>();
    const waiter = { resolve };
    const onAbort = () => {
      this.#waiters.delete(waiter);
      reject(signal.reason);
    };
    signal.addEventListener('abort', onAbort);
    this.#waiters.add(waiter);
    this.#letIn();
    return promise.finally(() => signal.removeEventListener('abort', onAbort));
  }

  #letIn(): void {
    for (const waiter of this.#waiters) {
      if (this.#numInFlight >= this.room.maxInFlight) break;
      this.#waiters.delete(waiter);
      this.#numInFlight += 1;
      this.#lastGrantMs = performance.now();
      let isHeld = true;
      waiter.resolve(() => {
        if (!isHeld) return;
        isHeld = false;
        this.#numInFlight -= 1;
        this.#letIn();
      });
    }
    if (this.#waiters.size > 0) {
      this.#timer ??= setInterval(() => this.#letIn(), lookMs);
    } else if (this.#timer !== null) {
      clearInterval(this.#timer);
      this.#timer = null;
    }
  }
}

/** While online requests wait, one line is let through this often. */
const trickleMs = 10_000;

/**
 * What online traffic leaves.
 *
 * @param linesPerEngine  requests that an idle engine is sent at a time
 * @param numOnline  online requests in flight
 * @param isOnlineWaiting  an online request waits for an engine with room
 */
export function roomFor({
  linesPerEngine,
  numEngines,
  numOnline,
  isOnlineWaiting,
  sinceGrantMs,
}: {
  linesPerEngine: number;
  numEngines: number;
  numOnline: number;
  isOnlineWaiting: boolean;
  sinceGrantMs: number;
}): Room {
  if (numEngines === 0) return { numEngines, maxInFlight: 0 };
  const left = isOnlineWaiting ? 0 : linesPerEngine * numEngines - numOnline;
  return { numEngines, maxInFlight: Math.max(left, sinceGrantMs >= trickleMs ? 1 : 0) };
}
