// What the gateway remembers in order to route: which prompts went where, what each engine has yet to do, how well it does, and how
// good the guesses were. It turns that and what engines say of themselves into plain numbers for pick-endpoint.ts, and keeps it true
// as requests begin and end. All of it may be lost: a gateway that starts anew guesses worse for a while.

import { EventEmitter } from 'node:events';
import type { AdapterStatus, PendingWork, TokenUsage } from '../../engine/protocol.ts';
import type { Endpoint } from '../endpoints.ts';
import { afterAnswer, type EjectionRule, type Health, healthy } from './health.ts';
import type { HedgeResult } from './hedge.ts';
import { type Candidate, type PickReason, type PickSettings, pickEndpoint } from './pick-endpoint.ts';
import { homeOf, type Prefix, PrefixMap, prefixOf } from './prefix.ts';
import { CopyBudget, RetryBudget } from './retry-budget.ts';

export type RouterSettings = Omit<PickSettings, 'maxInFlight'> &
  EjectionRule & {
    /** An engine that was away gets less than its share for so long; 0 for none of that. */
    slowStartMs: number;
    /** Retries, over requests. */
    maxRetryShare: number;
    /** A stream that has not begun for so long is asked of a second engine too; 0: none is. */
    hedgeAfterMs: number;
    /** Of such copies, over streams. */
    maxHedgeShare: number;
  };

/** What routing wants to know of a request. */
export type RouteAsk = {
  /** Who answers, as engines know it. */
  readonly name: string;
  /** The base or adapter itself; of a composition, which adapters have to be on the device together. */
  readonly members: readonly string[];
  readonly prefix: Prefix;
  /** Of its answer, by a guess. */
  readonly outputTokens: number;
};

/** Tokens of an answer of which nothing is known. */
const outputTokensUnknown = 128;

/** @param name  who answers; of a composition a name that says its members and weights, since these share KV with no other */
export function routeAsk(
  name: string,
  body: Buffer,
  {
    session,
    outputTokens = outputTokensUnknown,
    members = [name],
  }: { session?: string | null; outputTokens?: number; members?: readonly string[] | undefined } = {},
): RouteAsk {
  return { name, members, prefix: prefixOf(name, body, session), outputTokens };
}

export type Pick = {
  readonly endpoint: Endpoint;
  readonly reason: PickReason;
  /** Of the prompt, those that the engine got before. */
  readonly knownTokens: number;
  /** What the engine has more to do: before the first byte of the answer, and until its end. */
  promptWorkTokens: number;
  readonly outputWorkTokens: number;
};

type Considered = Candidate & { endpoint: Endpoint; knownTokens: number };

/** What is remembered of one engine. */
type Memory = {
  workTokens: number;
  health: Health;
  lastTurn: number;
  /** Of tokens that were said to be cached, those that were; a mean that follows the last fifty requests or so. */
  trust: number;
  /** Name of an adapter -> when a request for it was sent last, of those since the engine was last looked at. */
  sent: Map<string, number>;
  /** Tokens of KV that it was sent since it was looked at at `lookedMs`. */
  newTokens: number;
  lookedMs: number | null;
};

/** About 16 MB when full: the prefixes of 32 MB of prompts. */
const maxPrefixes = 1 << 17;
/** Bytes of a prompt in JSON that make a token, about. */
const bytesPerToken = 4;
/** A step carries many sequences and takes little longer for one more; a prompt takes all of what an engine can compute. */
const outputWeight = 0.25;
/** What is yet to come of a sequence that another gateway sent: half an answer of which nothing is known. */
const othersOutputTokens = outputTokensUnknown / 2;
/** Seconds that an adapter takes to the device where nobody has measured it. */
const loadSecondsUnknown = { host: 0.01, disk: 0.1, absent: 0.1 };
/** What it pushes out has to come back too. */
const loadFactor = 2;
/**
 * A load where the name is at home costs half, so that what fits nowhere for long comes back to the same engine, whichever gateway
 * asks.
 */
const homeShare = 0.5;
/** Tokens per second that a loading engine could have computed, until some were counted. */
const speedUnknown = 1_000;
/** What a caller's word that requests belong together is worth where prompts say nothing. */
const sessionTokens = 64;
/** Names that are remembered of one engine as sent to it. */
const maxSent = 64;
/** Tokens are guessed by bytes, and engines keep whole blocks: so much of a guess counts as all of it. */
const surelyShare = 0.8;
const leastWeight = 0.1;
/** The guesses of an engine are never given up on: it may be told that its arena grew. */
const leastTrust = 0.1;
const noWork: PendingWork = { running: 0, waiting: 0, promptTokens: 0 };
const trustPace = 0.05;
const speedPace = 0.1;

/**
 * Emits what happens: `picked`; `ejected`; `retried` with whether the budget allowed it; `hedged` with what came
 * of it; `predicted` with the tokens that were
 * expected to be cached and those of them that were.
 */
export class Router extends EventEmitter<{
  picked: [Pick];
  ejected: [Endpoint];
  retried: [boolean];
  hedged: [HedgeResult];
  predicted: [{ expectedTokens: number; cachedTokens: number }];
}> {
  readonly #settings: RouterSettings;
  readonly #prefixes = new PrefixMap(maxPrefixes);
  readonly #budget: RetryBudget;
  readonly #copies: CopyBudget;
  readonly #memories = new WeakMap<Endpoint, Memory>();
  #numPicks = 0;
  /** Tokens per second of a busy engine. */
  #speed = speedUnknown;

  constructor(settings: RouterSettings) {
    super();
    this.#settings = settings;
    this.#budget = new RetryBudget(settings.maxRetryShare);
    this.#copies = new CopyBudget(settings.maxHedgeShare);
  }

  /**
   * The engine to use, of those that hold the model; null when all of them are full. Nothing is remembered before `begin`.
   */
  pick(ask: RouteAsk, endpoints: readonly Endpoint[], maxInFlight: number, nowMs: number): Pick | null {
    // Whoever waits asks again whenever a request ends: most get this answer.
    if (endpoints.every(({ inFlight }) => inFlight >= maxInFlight)) return null;
    const promptTokens = Math.ceil(ask.prefix.promptBytes / bytesPerToken);
    const candidates = this.#candidates(ask, promptTokens, endpoints, nowMs);
    const settings = { ...this.#settings, maxInFlight };
    const found = pickEndpoint(promptTokens, candidates, settings, nowMs);
    if (found === null) return null;
    const { endpoint, cachedTokens, knownTokens } = found.picked;
    return {
      endpoint,
      reason: found.reason,
      knownTokens,
      promptWorkTokens: Math.max(0, promptTokens - cachedTokens),
      outputWorkTokens: outputWeight * ask.outputTokens,
    };
  }

  /** The request goes there. Returns what is to be called when it has ended. */
  begin(ask: RouteAsk, pick: Pick, nowMs: number): () => void {
    const memory = this.#memoryOf(pick.endpoint);
    memory.lastTurn = ++this.#numPicks;
    memory.workTokens += pick.promptWorkTokens + pick.outputWorkTokens;
    if (memory.lookedMs !== pick.endpoint.lastSeenMs) {
      memory.newTokens = 0;
      memory.lookedMs = pick.endpoint.lastSeenMs;
    }
    memory.newTokens += pick.promptWorkTokens + ask.outputTokens;
    for (const name of ask.members) {
      memory.sent.delete(name);
      memory.sent.set(name, nowMs);
      if (memory.sent.size > maxSent) memory.sent.delete(memory.sent.keys().next().value!);
    }
    this.#prefixes.note(ask.prefix, pick.endpoint.id);
    this.emit('picked', pick);
    return () => {
      memory.workTokens -= pick.promptWorkTokens + pick.outputWorkTokens;
    };
  }

  /** The prompt is computed. */
  noteFirstByte(pick: Pick): void {
    this.#memoryOf(pick.endpoint).workTokens -= pick.promptWorkTokens;
    pick.promptWorkTokens = 0;
  }

  /** A request came, which adds to what may be asked again. */
  noteRequest(): void {
    this.#budget.noteRequest();
  }

  /** Whether one more request may be asked of another engine; it counts as asked then. */
  takeRetry(nowMs: number): boolean {
    const isAllowed = this.#budget.take(nowMs);
    this.emit('retried', isAllowed);
    return isAllowed;
  }

  /** A stream came. How long its first engine is waited for alone; 0: for as long as it takes. */
  hedgeAfterMs(): number {
    this.#copies.noteRequest();
    return this.#settings.hedgeAfterMs;
  }

  /** Whether one more stream may be asked of a second engine; it counts as asked then. */
  takeHedge(): boolean {
    return this.#copies.take();
  }

  noteHedge(result: HedgeResult): void {
    this.emit('hedged', result);
  }

  /** The engine answered, or failed to. */
  noteAnswer(endpoint: Endpoint, hasFailed: boolean, nowMs: number): void {
    const memory = this.#memoryOf(endpoint);
    const before = memory.health;
    memory.health = afterAnswer(before, hasFailed, nowMs, this.#settings);
    if (memory.health.ejectedUntilMs !== before.ejectedUntilMs) this.emit('ejected', endpoint);
  }

  isEjected(endpoint: Endpoint, nowMs: number): boolean {
    return (this.#memories.get(endpoint)?.health.ejectedUntilMs ?? 0) > nowMs;
  }

  /** What an answer cost, by the engine's own word: was the guess right, and how fast was it? */
  noteUsage(pick: Pick, { promptTokens, cachedTokens, completionTokens }: TokenUsage, seconds: number): void {
    const { endpoint, knownTokens } = pick;
    // Others than our engines may leave out what was cached.
    if (endpoint.adapterList !== null && knownTokens > 0 && promptTokens > 0) {
      const expectedTokens = Math.min(knownTokens, promptTokens);
      const rightShare = Math.min(1, cachedTokens / (surelyShare * expectedTokens));
      const memory = this.#memoryOf(endpoint);
      memory.trust = Math.max(leastTrust, memory.trust + trustPace * (rightShare - memory.trust));
      this.emit('predicted', { expectedTokens, cachedTokens: Math.min(cachedTokens, expectedTokens) });
    }
    if (seconds <= 0) return;
    const tokens = promptTokens - cachedTokens + outputWeight * completionTokens;
    // Others were computed in the same time.
    const speed = (tokens * Math.max(1, endpoint.inFlight)) / seconds;
    this.#speed += speedPace * (speed - this.#speed);
  }

  #candidates(
    ask: RouteAsk,
    promptTokens: number,
    endpoints: readonly Endpoint[],
    nowMs: number,
  ): Considered[] {
    const found = this.#prefixes.find(ask.prefix);
    const session = this.#prefixes.ofSession(ask.prefix);
    const loads = this.#loadTokens(ask.members, endpoints);
    return endpoints.map((endpoint, index) => {
      const { id, inFlight, readySinceMs } = endpoint;
      const { workTokens, health, lastTurn, trust } = this.#memoryOf(endpoint);
      const knownTokens = (found.get(id) ?? 0) / bytesPerToken;
      const cachedTokens = trust * Math.max(knownTokens, id === session ? sessionTokens : 0);
      const others = othersOf(endpoint);
      const wantedTokens = Math.max(0, promptTokens - cachedTokens) + ask.outputTokens;
      return {
        endpoint,
        knownTokens,
        inFlight,
        othersInFlight: others.inFlight,
        workTokens: workTokens + others.workTokens,
        lackTokens: Math.max(0, wantedTokens - this.#freeTokens(endpoint)),
        cachedTokens,
        loadTokens: loads[index]!,
        weight: rampOf(readySinceMs, nowMs, this.#settings.slowStartMs),
        ejectedUntilMs: health.ejectedUntilMs,
        lastTurn,
      };
    });
  }

  /** What each engine could compute until all of these are on its device: one is copied after another. */
  #loadTokens(members: readonly string[], endpoints: readonly Endpoint[]): number[] {
    const sums = endpoints.map(() => 0);
    for (const name of members) {
      const seconds = endpoints.map((endpoint) => this.#loadSeconds(name, endpoint));
      if (seconds.every((one) => one === 0)) continue;
      const home = homeOf(
        name,
        endpoints.map(({ id }) => id),
      );
      for (const [index, { id }] of endpoints.entries())
        sums[index]! += seconds[index]! * this.#speed * loadFactor * (id === home ? homeShare : 1);
    }
    return sums;
  }

  /** Until the adapter is on the device of the engine; 0 for a base model, and for what is there or already on its way for another. */
  #loadSeconds(name: string, endpoint: Endpoint): number {
    if (endpoint.cards.get(name)?.parent === null) return 0;
    const { sent } = this.#memoryOf(endpoint);
    const sentMs = sent.get(name);
    // An engine without a list is believed to keep what it was sent.
    if (sentMs !== undefined && (endpoint.adapterList === null || sentMs >= (endpoint.lastSeenMs ?? 0)))
      return 0;
    if (endpoint.adapterList === null) return loadSecondsUnknown.absent;
    const status = endpoint.adapters.get(name);
    return status === undefined ? loadSecondsUnknown.absent : secondsToDevice(status);
  }

  /** Tokens of KV that it has room for: as it said, less what it was sent since; Infinity where it does not say. */
  #freeTokens(endpoint: Endpoint): number {
    const free = endpoint.adapterList?.load?.freeTokens ?? Number.POSITIVE_INFINITY;
    const { newTokens, lookedMs } = this.#memoryOf(endpoint);
    return lookedMs === endpoint.lastSeenMs ? Math.max(0, free - newTokens) : free;
  }

  #memoryOf(endpoint: Endpoint): Memory {
    let memory = this.#memories.get(endpoint);
    if (memory === undefined) {
      memory = {
        workTokens: 0,
        health: healthy,
        lastTurn: 0,
        trust: 1,
        sent: new Map(),
        newTokens: 0,
        lookedMs: null,
      };
      this.#memories.set(endpoint, memory);
    }
    return memory;
  }
}

/** What the engine has to do that other gateways sent, when it was last looked at. This gateway's own is known better here. */
export function othersOf({ adapterList }: Endpoint): { inFlight: number; workTokens: number } {
  const { running, waiting, promptTokens } = adapterList?.load?.others ?? noWork;
  const inFlight = running + waiting;
  return { inFlight, workTokens: promptTokens + outputWeight * othersOutputTokens * inFlight };
}

function secondsToDevice({ tier, inFlight, loadSeconds }: AdapterStatus): number {
  // Somebody waits for it: it is on its way.
  if (tier === 'device' || inFlight > 0) return 0;
  const { pages = 0, host = 0, device } = loadSeconds;
  const copy = tier === 'host' ? host : device;
  return (copy > 0 ? copy : loadSecondsUnknown[tier]) + pages;
}

/** Grows evenly from a tenth to 1 in the time given. */
function rampOf(readySinceMs: number | null, nowMs: number, slowStartMs: number): number {
  if (readySinceMs === null || slowStartMs === 0) return 1;
  return Math.min(1, Math.max(leastWeight, (nowMs - readySinceMs) / slowStartMs));
}
