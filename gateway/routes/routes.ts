// The routes at work: which target answers a request, what became of it, and what follows from that. Decisions are in
// route.ts, choose-target.ts and outcome-window.ts; here is what has to be remembered between requests, per route of the
// cluster, and the requests that the gateway makes itself: copies for targets that only listen, and one token for a target
// that has to come into memory. Those go when an engine has room and nobody waits, and never hold up a client.

import type { Logger } from 'pino';
import { type Dispatcher, request } from 'undici';
import { enginePaths, formatStanding, lowestPriority, modelHeader } from '../../engine/protocol.ts';
import type { Admission } from '../admission.ts';
import type { WeightedTarget } from '../choose-target.ts';
import type { Endpoint, Endpoints } from '../endpoints.ts';
import type { EngineHeaders } from '../engine-headers.ts';
import type { ErrorCode } from '../errors.ts';
import { engineFailures, type Outcome } from '../forward.ts';
import { routeAsk } from '../routing/router.ts';
import type { Aborted } from './abort-writer.ts';
import { type Judged, OutcomeWindow, whyAbort } from './outcome-window.ts';
import { isInMemory, type RouteRules, sharesNow, warmthOf } from './route.ts';

export type ShadowResult = 'ok' | 'error' | 'skipped';

export type RoutesOptions = {
  admission: Pick<Admission, 'trySpare'>;
  endpoints: Pick<Endpoints, 'all'>;
  dispatcher: Dispatcher;
  engineHeaders: EngineHeaders;
  /** Longest time for one such request. */
  timeoutMs: number;
  /** Aborted when the gateway takes no more requests: what it makes itself is not waited for. */
  draining: AbortSignal;
  /** Writes an abort into the route's status. */
  writeAbort(route: string, aborted: Aborted): void;
  onShadow(route: string, target: string, result: ShadowResult): void;
  onAbort(route: string, target: string): void;
  log: Logger;
};

/** A request that a target answered, as far as a copy of it needs it. */
export type Copied = { path: string; headers: Record<string, string>; body: Buffer };

/** Copies and warm-ups are nobody's, and give way to whatever is somebody's. */
const ownStanding = { tenant: '', weight: 1, priority: lowestPriority };
/** Copies and warm-ups under way; more are left out. */
const maxOwnRequests = 32;
const warmUpEveryMs = 5_000;
/** A route that was deleted is forgotten when so many others came after it. */
const maxRoutes = 10_000;

/** What an engine says about itself and not about a request. */
const statusesOfEngines: ReadonlySet<number> = new Set([401, 403, 404, 429, 503]);

type RouteState = {
  /** Targets, by name, that were warm once and are still held. */
  isIn: Set<string>;
  /** Under one generation of the spec: what became of requests, and what this gateway found too bad. */
  generation: number;
  windows: Map<string, OutcomeWindow>;
  aborted: Set<string>;
};

export class Routes {
  readonly #options: RoutesOptions;
  readonly #states = new Map<string, RouteState>();
  readonly #warmedUpMs = new Map<string, number>();
  #numOwnRequests = 0;

  constructor(options: RoutesOptions) {
    this.#options = options;
  }

  /** The targets with the weights that they have now. One that is held and cold begins to be warmed up. */
  sharesOf(rules: RouteRules, targets: readonly WeightedTarget[], nowMs: number): WeightedTarget[] {
    const state = this.#stateOf(rules);
    const { all } = this.#options.endpoints;
    const isAborted = ({ resource }: WeightedTarget) =>
      rules.aborted.has(resource!) || state.aborted.has(resource!);
    for (const target of targets) {
      const warmth = warmthOf(target, rules.warmCopies, all);
      if (warmth === 'warm') state.isIn.add(target.name);
      if (warmth === 'absent') state.isIn.delete(target.name);
      if (warmth === 'cold' && target.weight > 0 && !isAborted(target)) this.#warmUp(target, nowMs);
    }
    return sharesNow(targets, isAborted, ({ name }) => state.isIn.has(name));
  }

  /** Takes in what became of a request that an engine was asked as this target. */
  note(rules: RouteRules, target: WeightedTarget, outcome: Judged, nowMs: number): void {
    const { abort } = rules;
    if (abort === null || target.isStable === true) return;
    const state = this.#stateOf(rules);
    const resource = target.resource!;
    if (state.generation !== rules.generation) return;
    if (state.aborted.has(resource) || rules.aborted.has(resource)) return;
    const window = state.windows.get(resource) ?? new OutcomeWindow(abort.windowSeconds);
    state.windows.set(resource, window);
    window.note(outcome, nowMs);
    const message = whyAbort(window, abort, nowMs);
    if (message === null) return;

    state.aborted.add(resource);
    const { name: route, generation } = rules;
    const at = new Date(nowMs).toISOString().replace(/\.\d+Z$/, 'Z');
    this.#options.log.warn({ route, target: resource, reason: message }, 'a target of a route is aborted');
    this.#options.onAbort(route, resource);
    this.#options.writeAbort(route, { target: resource, generation, message, at });
  }

  /** Asks the targets that listen to this route, but for the one that answers. Returns at once. */
  shadow(
    rules: RouteRules,
    targets: readonly WeightedTarget[],
    answering: WeightedTarget,
    copied: Copied,
    random: () => number,
  ): void {
    const state = this.#stateOf(rules);
    for (const target of targets) {
      const { shadowPercent = 0, resource = '' } = target;
      if (target.name === answering.name || random() * 100 >= shadowPercent) continue;
      if (rules.aborted.has(resource) || state.aborted.has(resource)) continue;
      void this.#shadowOne(rules, target, copied);
    }
  }

  async #shadowOne(
    rules: RouteRules,
    target: WeightedTarget,
    { path, headers, body }: Copied,
  ): Promise<void> {
    const tell = (result: ShadowResult) => this.#options.onShadow(rules.name, target.resource!, result);
    const isAnswered = await this.#ask(
      target,
      () => true,
      path,
      { ...headers, [modelHeader]: target.name },
      body,
    );
    if (isAnswered === null) return tell('skipped');
    tell(isAnswered ? 'ok' : 'error');
    // It goes last everywhere, so its time to the first token says nothing.
    this.note(rules, target, { isError: !isAnswered, ttftMs: null }, Date.now());
  }

  /** A token from an engine that has it on disk alone brings it into memory. */
  #warmUp(target: WeightedTarget, nowMs: number): void {
    const lastMs = this.#warmedUpMs.get(target.name) ?? Number.NEGATIVE_INFINITY;
    if (nowMs - lastMs < warmUpEveryMs) return;
    this.#warmedUpMs.delete(target.name);
    this.#warmedUpMs.set(target.name, nowMs);
    dropOldest(this.#warmedUpMs, maxRoutes);
    const isCold = (endpoint: Endpoint) => !isInMemory(target.name, endpoint);
    const body = Buffer.from(JSON.stringify({ model: target.name, prompt: '.', max_tokens: 1 }));
    void this.#ask(target, isCold, enginePaths.completions, { 'content-type': 'application/json' }, body);
  }

  /** @returns whether an engine answered to the end and without an error of its own; null: none had room to spare */
  async #ask(
    target: WeightedTarget,
    where: (endpoint: Endpoint) => boolean,
    path: string,
    headers: Record<string, string>,
    body: Buffer,
  ): Promise<boolean | null> {
    const { admission, dispatcher, engineHeaders, timeoutMs, draining } = this.#options;
    if (draining.aborted || this.#numOwnRequests >= maxOwnRequests) return null;
    const slot = admission.trySpare(routeAsk(target.name, body), target, where);
    if (slot === null) return null;
    this.#numOwnRequests += 1;
    try {
      const signal = AbortSignal.any([draining, slot.endpoint.gone, AbortSignal.timeout(timeoutMs)]);
      const answer = await request(slot.endpoint.url + path, {
        method: 'POST',
        headers: { ...headers, ...formatStanding(ownStanding), ...engineHeaders() },
        body,
        dispatcher,
        signal,
      });
      let tail = '';
      for await (const chunk of answer.body as AsyncIterable<Buffer>) {
        tail = (tail + chunk.toString('latin1')).slice(-256);
      }
      // It is going, has no room, or has let go of the model: nothing about the target.
      if (statusesOfEngines.has(answer.statusCode)) return null;
      const isStream = String(answer.headers['content-type'] ?? '').startsWith('text/event-stream');
      return answer.statusCode < 500 && (!isStream || tail.trimEnd().endsWith('data: [DONE]'));
    } catch {
      return draining.aborted || slot.endpoint.gone.aborted ? null : false;
    } finally {
      this.#numOwnRequests -= 1;
      slot.release();
    }
  }

  #stateOf({ uid, generation }: RouteRules): RouteState {
    const known = this.#states.get(uid);
    // A request may end when its route has another spec already.
    if (known !== undefined && known.generation >= generation) return known;
    const isIn = known?.isIn ?? new Set<string>();
    const state: RouteState = { isIn, generation, windows: new Map(), aborted: new Set() };
    this.#states.set(uid, state);
    dropOldest(this.#states, maxRoutes);
    return state;
  }
}

/**
 * What a request says about its target; null when it says nothing: no engine was asked, or the client or this gateway ended
 * it.
 */
export function judgedOf(
  {
    engine,
    errorCode,
    askedMs,
    firstByteMs,
  }: Pick<Outcome, 'engine' | 'askedMs' | 'firstByteMs'> & { errorCode?: ErrorCode },
  status: number,
  isStream: boolean,
): Judged | null {
  if (engine === undefined || askedMs === undefined) return null;
  if (errorCode !== undefined) return engineFailures.has(errorCode) ? { isError: true, ttftMs: null } : null;
  const ttftMs = isStream && firstByteMs !== undefined ? firstByteMs - askedMs : null;
  return { isError: status >= 500, ttftMs };
}

function dropOldest(map: Map<string, unknown>, max: number): void {
  if (map.size > max) map.delete(map.keys().next().value!);
}
