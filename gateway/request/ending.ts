// Whether an answer is still wanted. It stands in for an AbortSignal on the way of every request, since it is cheaper to make, to
// listen to and to let go of.

import { Bag } from '../bag.ts';
import type { GatewayError } from '../errors.ts';

export class Ending {
  #reason: GatewayError | null = null;
  #listeners: ((reason: GatewayError) => void)[] = [];

  /** Ends when the signal says so; its reason is a GatewayError. */
  static of(signal: AbortSignal): Ending {
    const ending = new Ending();
    if (signal.aborted) ending.end(signal.reason);
    else signal.addEventListener('abort', () => ending.end(signal.reason), { once: true });
    return ending;
  }

  /** Why it is not wanted any more; null while it is. */
  get reason(): GatewayError | null {
    return this.#reason;
  }

  end(reason: GatewayError): void {
    if (this.#reason !== null) return;
    this.#reason = reason;
    for (const listener of this.#listeners.splice(0)) listener(reason);
  }

  /** Called once when it ends. @returns lets go of it */
  listen(listener: (reason: GatewayError) => void): () => void {
    this.#listeners.push(listener);
    return () => {
      const index = this.#listeners.indexOf(listener);
      if (index >= 0) this.#listeners.splice(index, 1);
    };
  }
}

/** Listeners of signals that very many requests listen to. */
const listenersOf = new WeakMap<AbortSignal, Bag<() => void>>();

/**
 * Calls back when the signal is aborted. The signal itself has one listener: it would search all of them for each that comes or goes.
 *
 * @returns lets go of it
 */
export function onceAborted(signal: AbortSignal, listener: () => void): () => void {
  let listeners = listenersOf.get(signal);
  if (listeners === undefined) {
    const all = new Bag<() => void>();
    signal.addEventListener('abort', () => {
      for (const each of all.values()) each();
    });
    listenersOf.set(signal, all);
    listeners = all;
  }
  return listeners.add(listener);
}
