// How many lines of batches are in flight at a time, over all jobs: what online traffic leaves of the engines. Jobs that want
// to send a line take turns. Which of what was sent goes first is decided elsewhere: in the gateway's queue and in the engine's batch, where
// lines have the lowest priority and give way.

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
  readonly #room: (numInFlight: number) => Room;
  readonly #waiters = new Set<Waiter>();
  #numInFlight = 0;
  #timer: NodeJS.Timeout | null = null;

  /** @param room  as of now, given how many lines are in flight */
  constructor(room: (numInFlight: number) => Room) {
    this.#room = room;
  }

  get numInFlight(): number {
    return this.#numInFlight;
  }

  get room(): Room {
    return this.#room(this.#numInFlight);
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

/**
 * What online traffic leaves, and one line in any case: it waits in the queue behind whoever may go before it, and a job gets on.
 *
 * @param linesPerEngine  requests that an idle engine is sent at a time
 * @param numOnline  online requests in flight
 */
export function roomFor({
  linesPerEngine,
  numEngines,
  numOnline,
}: {
  linesPerEngine: number;
  numEngines: number;
  numOnline: number;
}): Room {
  if (numEngines === 0) return { numEngines, maxInFlight: 0 };
  return { numEngines, maxInFlight: Math.max(1, linesPerEngine * numEngines - numOnline) };
}
