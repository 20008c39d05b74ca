// When a request may go to an engine: each engine has a bound on requests in flight, and the requests that wait for room stand
// in one bounded queue, in the order of queue/fair-queue.ts. A declared model that no engine holds is waited for in the same
// queue, since it may be on its way from an engine that went to another.
//
// An engine is sent what it says it can run at once and a quarter more, which keeps it busy while answers travel, and beyond that some
// of tenants that have fewer there than others (queue/places.ts). What else would wait in it waits here, where all tenants
// and all engines are seen.

import type { TokenUsage } from '../engine/protocol.ts';
import type { Endpoint, Endpoints } from './endpoints.ts';
import { GatewayError } from './errors.ts';
import { type Ask, costOf, expectedCost } from './queue/ask.ts';
import { type Charge, type Entry, FairQueue } from './queue/fair-queue.ts';
import { Pace } from './queue/pace.ts';
import { type Bounds, type Claimant, mayBeSent, mostPlacesOf, placesOf } from './queue/places.ts';
import type { Ending } from './request/ending.ts';
import { mayAppear, notServed, resolveModel, type Target } from './resolve-model.ts';
import type { Pick, RouteAsk, Router } from './routing/router.ts';

export type AdmissionLimits = {
  maxInFlightPerEngine: number;
  maxQueued: number;
  maxQueuedPerTenant: number;
  /** A priority that waits rises by one for each of these in which it was sent nothing. */
  queueAgeingMs: number;
  queueTimeoutMs: number;
  /** Longest wait for a declared model that no engine holds, and for one that comes only when somebody asks. */
  modelWaitMs: number;
  wakeWaitMs: number;
};

/** A request's place in an engine. It is given back exactly once. */
export type Slot = {
  endpoint: Endpoint;
  pick: Pick;
  /** @param usage  what it cost; null: nobody knows, and the guess at its cost stands */
  release(usage?: TokenUsage | null): void;
};

/** Why a request was not let wait, or not any longer. */
export const shedReasons = ['queue_full', 'tenant_full', 'made_room', 'deadline', 'timeout'] as const;
export type ShedReason = (typeof shedReasons)[number];

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
  readonly #onShed: (tenant: string, reason: ShedReason) => void;
  readonly #queue: FairQueue<Waiter>;
  readonly #pace = new Pace();
  /** Of what each engine was sent, whose it is. */
  readonly #sent = new WeakMap<Endpoint, Map<string, { weight: number; count: number }>>();

  constructor(
    endpoints: Endpoints,
    router: Router,
    limits: AdmissionLimits,
    onShed: (tenant: string, reason: ShedReason) => void = () => {},
  ) {
    this.#endpoints = endpoints;
    this.#router = router;
    this.#limits = limits;
    this.#onShed = onShed;
    this.#queue = new FairQueue(limits.queueAgeingMs);
    endpoints.on('change', () => {
      this.#dismissHopeless();
      this.#admitWaiting();
    });
  }

  get numQueued(): number {
    return this.#queue.size;
  }

  get queue(): { readonly numByTenant: ReadonlyMap<string, number>; readonly lag: number } {
    return this.#queue;
  }

  /**
   * Waits for room in an engine that holds the target, leaving out those already tried.
   *
   * @throws model_not_found, model_unavailable, no_engine_ready at once or when that becomes so while waiting; for a
   *   model that may appear, when it did not within `modelWaitMs`
   * @throws queue_full at once, or when room is made for another; deadline_unmeetable at once; queue_timeout; and why the answer is
   *   not wanted any more
   */
  async enter(
    ask: Ask,
    route: RouteAsk,
    target: Target,
    tried: ReadonlySet<Endpoint>,
    ending: Ending,
  ): Promise<Slot> {
    if (ending.reason !== null) throw ending.reason;
    const pick = this.#tryPick(ask, route, target, tried);
    if (pick !== null) return this.#take(route, pick, this.#queue.charge(ask, performance.now()));
    this.#makeRoom(ask, this.#whyNone(target, tried) === null);
    return this.#wait(ask, route, target, tried, ending);
  }

  /** A place in an engine that has room to spare: nobody waits, and half of it is free. Null when there is none. */
  trySpare(route: RouteAsk, target: Target, where: (endpoint: Endpoint) => boolean): Slot | null {
    if (this.#queue.size > 0) return null;
    const engines = this.#untried(target, new Set()).filter(where);
    const free = engines.filter(
      (endpoint) => endpoint.inFlight < Math.ceil(placesOf(this.#boundsOf(endpoint)) / 2),
    );
    const pick = this.#router.pick(route, free, this.#limits.maxInFlightPerEngine, Date.now());
    return pick === null ? null : this.#take(route, pick, null);
  }

  /** True when another engine than those tried could take the request, now or later. */
  hasOther(target: Target, tried: ReadonlySet<Endpoint>): boolean {
    return this.#whyNone(target, tried) === null;
  }

  /** Lets one more wait, at the cost of another if need be. @param isHeld  an engine has its model, so that the queue's pace is its own */
  #makeRoom(ask: Ask, isHeld: boolean): void {
    const { maxQueued, maxQueuedPerTenant, queueTimeoutMs } = this.#limits;
    const nowMs = performance.now();
    const waitMs = this.#pace.msFor(this.#queue.workAhead(ask));
    const retryAfterS = Math.max(1, Math.ceil(Math.min(waitMs ?? 1_000, 60_000) / 1_000));
    const refuse = (
      reason: ShedReason,
      code: 'queue_full' | 'deadline_unmeetable',
      message: string,
    ): GatewayError => {
      this.#onShed(ask.tenant, reason);
      return new GatewayError(code, message, { retryAfterS });
    };
    if (this.#queue.numOf(ask.tenant) >= maxQueuedPerTenant)
      throw refuse(
        'tenant_full',
        'queue_full',
        `${maxQueuedPerTenant} requests with this key's tenant wait already`,
      );
    const leftMs = Math.min(queueTimeoutMs, (ask.deadlineMs ?? Number.POSITIVE_INFINITY) - nowMs);
    if (isHeld && waitMs !== null && waitMs > leftMs) {
      const [wait, left] = [waitMs, leftMs].map((ms) => Math.max(0, Math.round(ms)));
      throw refuse(
        'deadline',
        'deadline_unmeetable',
        `expected to wait ${wait} ms for an engine, of at most ${left}`,
      );
    }
    if (this.#queue.size < maxQueued) return;
    const victim = this.#queue.victimFor(ask);
    if (victim === null)
      throw refuse('queue_full', 'queue_full', `every engine is busy and ${maxQueued} requests wait already`);
    this.#onShed(victim.ask.tenant, 'made_room');
    victim.waiter.reject(
      new GatewayError(
        'queue_full',
        'every engine is busy, and a request with a better claim took its place',
        {
          retryAfterS,
        },
      ),
    );
  }

  #wait(
    ask: Ask,
    route: RouteAsk,
    target: Target,
    tried: ReadonlySet<Endpoint>,
    ending: Ending,
  ): Promise<Slot> {
    const { queueTimeoutMs, modelWaitMs, wakeWaitMs } = this.#limits;
    const nowMs = performance.now();
    const absentMs = target.asks === undefined ? Math.min(queueTimeoutMs, modelWaitMs) : wakeWaitMs;
    const mostMs = this.#whyNone(target, tried) === null ? queueTimeoutMs : absentMs;
    const timeoutMs = Math.max(0, Math.min(mostMs, (ask.deadlineMs ?? Number.POSITIVE_INFINITY) - nowMs));
    const { promise, resolve, reject } = Promise.withResolvers<Slot>();
    // Leaves the queue before anything else can run: a waiter that is admitted after it gave up would keep its
    // slot for ever.
    const giveUp = (error: GatewayError) => {
      this.#queue.remove(entry);
      reject(error);
    };
    const waiter: Waiter = { route, target, tried, resolve, reject: giveUp };
    const timer = setTimeout(() => {
      const reason = this.#whyNone(target, tried);
      if (reason === null) this.#onShed(ask.tenant, 'timeout');
      const waited = `no engine had room within ${Math.round(timeoutMs)} ms`;
      giveUp(reason ?? new GatewayError('queue_timeout', waited));
    }, timeoutMs);

    if (this.#queue.size === 0) this.#pace.restart(nowMs);
    const entry: Entry<Waiter> = this.#queue.add(ask, waiter, nowMs);
    const letGo = ending.listen(giveUp);
    return promise.finally(() => {
      clearTimeout(timer);
      letGo();
    });
  }

  #admitWaiting(): void {
    if (this.#queue.size === 0) return;
    const nowMs = performance.now();
    // An adapter has room as long as an engine that says it holds it has, be it for some tenants only; each that is sent may take the
    // last place.
    const rooms = new Map<string, boolean>();
    const hasRoom = (adapter: string) => {
      let room = rooms.get(adapter);
      if (room === undefined) {
        room = this.#endpoints.all.some(
          (endpoint) =>
            endpoint.isReady &&
            endpoint.cards.has(adapter) &&
            endpoint.inFlight < mostPlacesOf(this.#boundsOf(endpoint)),
        );
        rooms.set(adapter, room);
      }
      return room;
    };
    for (;;) {
      rooms.clear();
      // Of a tenant's requests for one adapter that were not sent before all can go or none.
      const stuck = new Set<string>();
      let chosen: { waiter: Waiter; pick: Pick } | null = null;
      const charge = this.#queue.sendNext(nowMs, hasRoom, ({ ask, waiter }) => {
        const { route, target, tried } = waiter;
        const kind = tried.size === 0 ? `${ask.tenant}\0${ask.priority}\0${target.name}` : null;
        if (kind !== null && stuck.has(kind)) return false;
        const pick = this.#pickAmong(ask, route, this.#untried(target, tried));
        if (pick !== null) chosen = { waiter, pick };
        else if (kind !== null) stuck.add(kind);
        return pick !== null;
      });
      if (charge === null) return;
      this.#pace.noteSent(expectedCost(charge.ask), nowMs);
      const { waiter, pick } = chosen!;
      waiter.resolve(this.#take(waiter.route, pick, charge));
    }
  }

  /** Tells those that wait for nothing any more. */
  #dismissHopeless(): void {
    for (const { waiter } of this.#queue.entries()) {
      const { target, tried } = waiter;
      const reason = mayAppear(target) ? null : this.#whyNone(target, tried);
      if (reason !== null) waiter.reject(reason);
    }
  }

  /** Where it can go at once; null when that has to be waited for. Throws when there is nothing to wait for. */
  #tryPick(ask: Ask, route: RouteAsk, target: Target, tried: ReadonlySet<Endpoint>): Pick | null {
    const untried = this.#untried(target, tried);
    if (untried.length > 0) return this.#pickAmong(ask, route, untried);
    if (mayAppear(target)) return null;
    throw this.#whyNone(target, tried)!;
  }

  #pickAmong(claimant: Claimant, route: RouteAsk, endpoints: readonly Endpoint[]): Pick | null {
    const free = endpoints.filter((endpoint) => {
      const sent = { inFlight: endpoint.inFlight, byTenant: this.#sentTo(endpoint) };
      return mayBeSent(sent, this.#boundsOf(endpoint), claimant);
    });
    if (free.length === 0) return null;
    return this.#router.pick(route, free, this.#limits.maxInFlightPerEngine, Date.now());
  }

  #boundsOf({ adapterList }: Endpoint): Bounds {
    const { maxInFlightPerEngine } = this.#limits;
    return { maxInFlightPerEngine, maxSequences: adapterList?.base?.maxSequences };
  }

  #sentTo(endpoint: Endpoint): Map<string, { weight: number; count: number }> {
    let sent = this.#sent.get(endpoint);
    if (sent === undefined) {
      sent = new Map();
      this.#sent.set(endpoint, sent);
    }
    return sent;
  }

  #countSent(endpoint: Endpoint, { tenant, weight }: Claimant, by: 1 | -1): void {
    const sent = this.#sentTo(endpoint);
    const count = (sent.get(tenant)?.count ?? 0) + by;
    if (count === 0) sent.delete(tenant);
    else sent.set(tenant, { weight, count });
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

  #take(route: RouteAsk, pick: Pick, charge: Charge | null): Slot {
    const { endpoint } = pick;
    const end = this.#router.begin(route, pick, Date.now());
    endpoint.inFlight += 1;
    endpoint.numSent += 1;
    if (charge !== null) this.#countSent(endpoint, charge.ask, 1);
    let isHeld = true;
    const release = (usage: TokenUsage | null = null) => {
      if (!isHeld) return;
      isHeld = false;
      endpoint.inFlight -= 1;
      end();
      if (charge !== null) this.#countSent(endpoint, charge.ask, -1);
      if (charge !== null) this.#queue.settle(charge, usage && costOf(usage));
      this.#admitWaiting();
    };
    return { endpoint, pick, release };
  }
}
