// When a request may go to an engine: each engine has a bound on requests in flight, and the requests that wait
// for room stand in one bounded queue, first come first served among those whose engines have room. A declared model that
// no engine holds is waited for in the same queue, since it may be on its way from an engine that went to another.

import type { Endpoint, Endpoints } from './endpoints.ts';
import { GatewayError } from './errors.ts';
import { mayAppear, notServed, resolveModel, type Target } from './resolve-model.ts';
import type { Pick, RouteAsk, Router } from './routing/router.ts';

export type AdmissionLimits = {
  maxInFlightPerEngine: number;
  maxQueued: number;
  queueTimeoutMs: number;
  /** Longest wait for a declared model that no engine holds, and for one that comes only when somebody asks. */
  modelWaitMs: number;
  wakeWaitMs: number;
};

/** A request's place in an engine. It is given back exactly once. */
export type Slot = { endpoint: Endpoint; pick: Pick; release(): void };

type Waiter = {
  route: RouteAsk;
  target: Target;
  tried: ReadonlySet<Endpoint>;
  resolve(slot: Slot): void;
  reject(error: GatewayError): void;
};

export class Admission {
  readonly #endpoints: Endpoints;
  readonly #router: Router;
  readonly #limits: AdmissionLimits;
  readonly #queue = new Set<Waiter>();

  constructor(endpoints: Endpoints, router: Router, limits: AdmissionLimits) {
    this.#endpoints = endpoints;
    this.#router = router;
    this.#limits = limits;
    endpoints.on('change', () => this.#admitWaiting());
  }

  get numQueued(): number {
    return this.#queue.size;
  }

  /**
   * Waits for room in an engine that holds the target, leaving out those already tried.
   *
   * @throws model_not_found, model_unavailable, no_engine_ready at once or when that becomes so while waiting; for a
   *   model that may appear, when it did not within `modelWaitMs`
   * @throws queue_full, queue_timeout, and the signal's reason when it is aborted
   */
  async enter(
    route: RouteAsk,
    target: Target,
    tried: ReadonlySet<Endpoint>,
    signal: AbortSignal,
  ): Promise<Slot> {
    signal.throwIfAborted();
    const slot = this.#tryEnter(route, target, tried);
    if (slot !== null) return slot;
    const { maxQueued } = this.#limits;
    if (this.#queue.size >= maxQueued) {
      throw new GatewayError('queue_full', `every engine is busy and ${maxQueued} requests wait already`);
    }
    return this.#wait(route, target, tried, signal);
  }

  /** A place in an engine that has room to spare: nobody waits, and half of it is free. Null when there is none. */
  trySpare(route: RouteAsk, target: Target, where: (endpoint: Endpoint) => boolean): Slot | null {
    if (this.#queue.size > 0) return null;
    const engines = this.#untried(target, new Set()).filter(where);
    const half = Math.ceil(this.#limits.maxInFlightPerEngine / 2);
    const pick = this.#router.pick(route, engines, half, Date.now());
    return pick === null ? null : this.#take(route, pick);
  }

  /** True when another engine than those tried could take the request, now or later. */
  hasOther(target: Target, tried: ReadonlySet<Endpoint>): boolean {
    return this.#whyNone(target, tried) === null;
  }

  #wait(route: RouteAsk, target: Target, tried: ReadonlySet<Endpoint>, signal: AbortSignal): Promise<Slot> {
    const { queueTimeoutMs, modelWaitMs, wakeWaitMs } = this.#limits;
    const absentMs = target.asks === undefined ? Math.min(queueTimeoutMs, modelWaitMs) : wakeWaitMs;
    const timeoutMs = this.#whyNone(target, tried) === null ? queueTimeoutMs : absentMs;
    const { promise, resolve, reject } = Promise.withResolvers<Slot>();
    // Leaves the queue before anything else can run: a waiter that is admitted after it gave up would keep its
    // slot for ever.
    const giveUp = (error: GatewayError) => {
      this.#queue.delete(waiter);
      reject(error);
    };
    const waiter: Waiter = { route, target, tried, resolve, reject: giveUp };
    const onAbort = () => giveUp(signal.reason as GatewayError);
    const timer = setTimeout(() => {
      const reason = this.#whyNone(target, tried);
      giveUp(reason ?? new GatewayError('queue_timeout', `no engine had room within ${timeoutMs} ms`));
    }, timeoutMs);

    signal.addEventListener('abort', onAbort);
    this.#queue.add(waiter);
    return promise.finally(() => {
      clearTimeout(timer);
      signal.removeEventListener('abort', onAbort);
    });
  }

  #admitWaiting(): void {
    for (const waiter of this.#queue) {
      try {
        const slot = this.#tryEnter(waiter.route, waiter.target, waiter.tried);
        if (slot === null) continue;
        this.#queue.delete(waiter);
        waiter.resolve(slot);
      } catch (error) {
        waiter.reject(error as GatewayError);
      }
    }
  }

  /** A slot, or null when it has to be waited for. Throws when there is nothing to wait for. */
  #tryEnter(route: RouteAsk, target: Target, tried: ReadonlySet<Endpoint>): Slot | null {
    const untried = this.#untried(target, tried);
    if (untried.length === 0) {
      if (mayAppear(target)) return null;
      throw this.#whyNone(target, tried)!;
    }
    const pick = this.#router.pick(route, untried, this.#limits.maxInFlightPerEngine, Date.now());
    return pick === null ? null : this.#take(route, pick);
  }

  /** Engines that hold the target and were not tried. */
  #untried(target: Target, tried: ReadonlySet<Endpoint>): Endpoint[] {
    const resolution = resolveModel(target, this.#endpoints.all, Date.now());
    return resolution.kind === 'served'
      ? resolution.endpoints.filter((endpoint) => !tried.has(endpoint))
      : [];
  }

  /** Why no engine can be asked; null when one can. */
  #whyNone(target: Target, tried: ReadonlySet<Endpoint>): GatewayError | null {
    if (this.#untried(target, tried).length > 0) return null;
    const { kind } = resolveModel(target, this.#endpoints.all, Date.now());
    return notServed(target.name, target, kind === 'served' ? 'away' : kind);
  }

  #take(route: RouteAsk, pick: Pick): Slot {
    const { endpoint } = pick;
    const end = this.#router.begin(route, pick, Date.now());
    endpoint.inFlight += 1;
    endpoint.numSent += 1;
    let isHeld = true;
    const release = () => {
      if (!isHeld) return;
      isHeld = false;
      endpoint.inFlight -= 1;
      end();
      this.#admitWaiting();
    };
    return { endpoint, pick, release };
  }
}
