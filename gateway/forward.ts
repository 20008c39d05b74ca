// One request to one engine and its answer back. The body goes through untouched in both directions.
//
// Until the first byte is sent to the client everything can be taken back: an engine that cannot be reached, breaks
// off, or says it has no room is left and another one is asked. After it nothing can: an engine that breaks off then
// ends the stream with an error event. When the client hangs up, the engine's connection is closed, which stops it.

import type { IncomingHttpHeaders, ServerResponse } from 'node:http';
import type { Dispatcher } from 'undici';
import { formatStanding, modelHeader, usageHeader } from '../engine/protocol.ts';
import type { Admission, Slot } from './admission.ts';
import type { Endpoint, Endpoints } from './endpoints.ts';
import type { EngineHeaders } from './engine-headers.ts';
import { type ErrorCode, errorBody, GatewayError } from './errors.ts';
import { Exchange, type Head } from './exchange.ts';
import { voiceOf } from './groups/composition.ts';
import type { Ask } from './queue/ask.ts';
import type { LengthPredictor } from './queue/length-predictor.ts';
import { noTokens } from './quota/quota.ts';
import { StreamUsage, type Usage, usageOfAnswer } from './quota/usage.ts';
import { type Ending, onceAborted } from './request/ending.ts';
import { mayAppear, type Target } from './resolve-model.ts';
import { type HedgeResult, winnerOf } from './routing/hedge.ts';
import type { PickReason } from './routing/pick-endpoint.ts';
import { type RouteAsk, type Router, routeAsk } from './routing/router.ts';
import { errorEvent, WholeEvents } from './sse.ts';
import type { Turns } from './turns.ts';

export type ForwardLimits = { firstByteTimeoutMs: number; idleTimeoutMs: number };

export type Forward = {
  admission: Admission;
  endpoints: Endpoints;
  router: Router;
  lengths: LengthPredictor;
  dispatcher: Dispatcher;
  /** For those whose engines break off. */
  turns: Turns;
  /** Sent with every request: who the gateway is. */
  engineHeaders: EngineHeaders;
  limits: ForwardLimits;
  /** Called for each engine that failed a request, with the reason's code. */
  onEngineError(engine: string, code: string): void;
  /** Called for each answer that ended by itself: its tokens as they were expected and as they were. */
  onLength(expected: number, actual: number): void;
};

export type ForwardRequest = {
  path: string;
  target: Target;
  headers: Record<string, string>;
  body: Buffer;
  /** The caller's word that requests belong together, made its own by the tenant's name. */
  session?: string | null;
  ask: Ask;
  /** Its answer is a stream, so that its first byte says how its engine fares. */
  isStream?: boolean;
  /** The client hung up, or the gateway's time to drain is over. */
  ending: Ending;
  /** Absent: the answer goes through untouched. */
  translation?: Translation;
};

/** Makes an engine's answer one of another protocol. */
export type Translation = {
  whole(status: number, body: Buffer): { status: number; body: Buffer };
  /** Whole events in, whole events out, as many as there are yet. */
  events(bytes: Buffer): Buffer;
  /** The event that tells of a failure. */
  error(failure: GatewayError): string;
};

/** What became of it, for log and metrics. Filled in as it happens, so that it is true after a failure too. */
export type Outcome = {
  engine?: string;
  /** Why this engine, and how much of the prompt its KV was expected to have. */
  picked?: { reason: PickReason; knownTokens: number };
  attempts: number;
  /** Whether a second engine was asked because the first was slow to begin, and began first. */
  hedge?: HedgeResult;
  /** When the engine was asked. */
  askedMs?: number;
  responseBytes: number;
  /** When the first byte of the answer was sent to the client. */
  firstByteMs?: number;
  /** Of the answer that is being sent, as of now: never of one that was left for another engine's. */
  usage?: () => Usage;
  /** Of the failure that cut it short. */
  errorCode?: ErrorCode;
};

/** An engine's answer: whole, or a stream of events of which the first bytes have come. */
type Answer =
  | { head: Head; body: Buffer; usage: Usage | null; exchange?: undefined }
  | { head: Head; exchange: Exchange; usage: StreamUsage };

/** How long a connection may be silent when its engine is known to be gone: what is under way arrives within it. */
const goneGraceMs = 2_000;
/**
 * "No room" and "I am going": another engine may well have room. 404: the adapter has left since the last look. 401 and
 * 403: it does not accept this gateway, which is not the client's to know.
 */
const statusesToAskAnother = new Set([401, 403, 404, 429, 503]);

/** Answers that say that the engine is broken, and not that it is busy or the request wrong. */
const statusesOfFailing = new Set([500, 502, 504]);

const statusesOfLeaving = new Set([404, 503]);
/** A request that waits for its model to appear asks this many engines at most. */
const maxEnginesTried = 4;

const headersNotPassedOn = new Set([
  ...['connection', 'keep-alive', 'proxy-authenticate', 'te', 'trailer', 'transfer-encoding', 'upgrade'],
  ...['content-length', 'date', 'x-request-id', modelHeader, usageHeader],
]);

/**
 * Sends the request to an engine that holds its target and the engine's answer to `res`.
 *
 * @throws GatewayError when no byte of an answer was sent; afterwards a failure is told inside the stream, and the
 *   error is returned.
 */
export function forward(
  parts: Forward,
  req: ForwardRequest,
  res: ServerResponse,
  outcome: Outcome,
): Promise<GatewayError | null> {
  return tryEngines(parts, req, outcome, async (answer, attempt) => {
    if (!res.headersSent) res.setHeader(modelHeader, req.target.name);
    const failure = await relay(answer, res, attempt, outcome, req.translation);
    // What the client has not read yet is held for it, and not for ever.
    if (res.socket !== null && res.socket.writableLength > 0) res.setTimeout(parts.limits.idleTimeoutMs);
    return failure;
  });
}

/** An answer that nobody waits for on a connection. */
export type WholeAnswer = { status: number; headers: IncomingHttpHeaders; body: Buffer };

/**
 * The same for a request without a client: returns the engine's answer, whole.
 *
 * @throws GatewayError when there is none, or when it is a stream
 */
export async function askWhole(parts: Forward, req: ForwardRequest, outcome: Outcome): Promise<WholeAnswer> {
  const { promise, resolve } = Promise.withResolvers<WholeAnswer>();
  await tryEngines(parts, req, outcome, async (answer) => {
    if (answer.exchange !== undefined)
      throw new GatewayError('engine_failed', 'expected a whole answer, got a stream');
    outcome.responseBytes = answer.body.length;
    resolve({ ...answer.head, body: answer.body });
    return null;
  });
  return promise;
}

/** Asks one engine after another until `deliver` has what can be given to who asked. */
async function tryEngines(
  parts: Forward,
  req: ForwardRequest,
  outcome: Outcome,
  deliver: (answer: Answer, attempt: Attempt) => Promise<GatewayError | null>,
): Promise<GatewayError | null> {
  const { admission, router } = parts;
  const { name, members, merge } = req.target;
  const voice = voiceOf(name, members, merge);
  const route = routeAsk(voice, req.body, {
    ...req,
    outputTokens: req.ask.outputTokens,
    // A merge is one adapter, which its engine may have by now.
    members: merge === undefined ? members?.map((member) => member.name) : [voice],
  });
  router.noteRequest();
  const hedgeAfterMs = req.isStream === true ? router.hedgeAfterMs() : 0;
  const tried = new Set<Endpoint>();
  const report = (failure: GatewayError | null) => {
    if (failure !== null && engineFailures.has(failure.code)) {
      parts.onEngineError(outcome.engine!, failure.code);
    }
    return failure;
  };
  for (;;) {
    const slot = await admission.enter(req.ask, route, req.target, tried, req.ending);
    tried.add(slot.endpoint);
    outcome.attempts += 1;
    let trial = begin(parts, slot, req);
    noteTrial(trial, outcome);
    try {
      if (hedgeAfterMs > 0) trial = await hedged(parts, req, route, trial, hedgeAfterMs, tried, outcome);
      const answer = await trial.answer;
      const { pick } = trial.slot;
      router.noteFirstByte(pick);
      if (statusesToAskAnother.has(answer.head.status) && admission.hasOther(req.target, tried)) continue;
      // The engine was on its way out, or has let go of the model: it is waited for elsewhere.
      if (statusesOfLeaving.has(answer.head.status) && mayAppear(req.target) && tried.size < maxEnginesTried)
        continue;
      assertPassable(answer, req.target);
      noteUsage(answer, outcome);
      const cut = report(await deliver(answer, trial.attempt));
      const isEngines = cut !== null && engineFailures.has(cut.code);
      router.noteAnswer(pick.endpoint, isEngines || statusesOfFailing.has(answer.head.status), Date.now());
      const usage = outcome.usage?.();
      if (usage !== undefined && cut === null) noteLength(parts, req.ask, usage);
      if (usage?.isEstimate === false)
        router.noteUsage(pick, usage, (performance.now() - trial.askedMs) / 1000);
      return cut;
    } catch (error) {
      const failure = asEngineError(error);
      report(failure);
      if (engineFailures.has(failure.code)) router.noteAnswer(trial.slot.endpoint, true, Date.now());
      if (!mayAskAnother(failure)) throw failure;
      const mayWait = mayAppear(req.target) && tried.size < maxEnginesTried;
      if (!mayWait && !admission.hasOther(req.target, tried)) throw failure;
      // One that could not be reached has done nothing: to ask another is no work twice.
      if (failure.code === 'engine_failed' && !router.takeRetry(Date.now())) throw failure;
    } finally {
      trial.attempt.end();
      // What was left for another engine's answer costs nothing. Of a whole answer that nobody waited for the cost is not known.
      trial.slot.release(outcome.usage?.() ?? (req.ending.reason !== null ? null : noTokens));
    }
  }
}

/** One engine that is asked. */
type Trial = { slot: Slot; attempt: Attempt; askedMs: number; answer: Promise<Answer> };

function begin(parts: Forward, slot: Slot, req: ForwardRequest): Trial {
  const { gone, silent } = slot.endpoint;
  const attempt = new Attempt(req.ending, [gone, silent], parts.limits);
  return { slot, attempt, askedMs: performance.now(), answer: ask(parts, slot, req, attempt) };
}

function noteTrial({ slot: { endpoint, pick }, askedMs }: Trial, outcome: Outcome): void {
  outcome.engine = endpoint.name;
  outcome.picked = { reason: pick.reason, knownTokens: pick.knownTokens };
  outcome.askedMs = askedMs;
}

/** The trial that counts: the first, or, where its engine is slow to begin a stream, that of a second. The other one is over then. */
async function hedged(
  parts: Forward,
  req: ForwardRequest,
  route: RouteAsk,
  first: Trial,
  afterMs: number,
  tried: Set<Endpoint>,
  outcome: Outcome,
): Promise<Trial> {
  const { admission, router } = parts;
  const second: Trial[] = [];
  const beginSecond = () => {
    const slot = router.takeHedge()
      ? admission.trySpare(route, req.target, (endpoint) => !tried.has(endpoint))
      : 'too_many';
    if (slot === null || slot === 'too_many') {
      router.noteHedge(slot ?? 'no_room');
      return null;
    }
    tried.add(slot.endpoint);
    outcome.attempts += 1;
    second.push(begin(parts, slot, req));
    return second[0]!;
  };
  const isGood = ({ head: { status } }: Answer) => !statusesToAskAnother.has(status);
  const winner = await winnerOf(first, beginSecond, afterMs, isGood);
  if (second.length === 0) return first;
  outcome.hedge = winner === first ? 'lost' : 'won';
  router.noteHedge(outcome.hedge);
  letGo(parts, winner === first ? second[0]! : first);
  noteTrial(winner, outcome);
  return winner;
}

/** Its engine stops. That it was slower is no failure; that it failed before is. */
function letGo(parts: Forward, { slot, attempt, answer }: Trial): void {
  attempt.end();
  // Its place in the fair order stays as it was guessed: what the other trial cost is that of the same answer.
  slot.release(null);
  answer.catch((error: unknown) => {
    const { code } = asEngineError(error);
    if (!engineFailures.has(code)) return;
    parts.onEngineError(slot.endpoint.name, code);
    parts.router.noteAnswer(slot.endpoint, true, Date.now());
  });
}

function noteLength({ lengths, onLength }: Forward, ask: Ask, { completionTokens }: Usage): void {
  if (completionTokens === 0) return;
  lengths.note(ask.adapter, ask.promptTokens, completionTokens / ask.numChoices);
  onLength(ask.outputTokens, completionTokens);
}

/** Asks one engine. Returns when the answer is complete, or, for a stream, when its first bytes are here. */
async function ask(
  { dispatcher, turns, endpoints, engineHeaders, limits }: Forward,
  { endpoint }: Slot,
  { path, headers, body, ask: asked }: ForwardRequest,
  attempt: Attempt,
): Promise<Answer> {
  attempt.allow(limits.firstByteTimeoutMs);
  const options: Dispatcher.DispatchOptions = {
    ...{ origin: endpoint.url, path, method: 'POST', body },
    headers: headerList(headers, formatStanding(asked), engineHeaders()),
  };
  const send = () => {
    const exchange = new Exchange(turns);
    attempt.watch(exchange);
    exchange.send(dispatcher, options);
    return exchange;
  };
  let exchange = send();
  let head: Head;
  try {
    try {
      head = await exchange.head;
    } catch (error) {
      if (!isClosedWhileIdle(error)) throw error;
      exchange = send();
      head = await exchange.head;
    }
  } catch (error) {
    if (isUnreachable(error)) endpoints.markUnreachable(endpoint);
    throw error;
  }
  if (head.isStream) return { head, exchange, usage: new StreamUsage(body.length) };
  const answer = exchange.take();
  return { head, body: answer, usage: usageOfAnswer(head.headers[usageHeader], answer) };
}

/** In turn, as undici takes them fastest; it would make one object of them otherwise, and read that again. */
function headerList(...all: Record<string, string>[]): string[] {
  const list = ['te', 'trailers'];
  for (const headers of all) for (const name in headers) list.push(name, headers[name]!);
  return list;
}

/** An answer that is about engines and not about the request is not the client's. */
function assertPassable({ head: { status } }: Answer, { baseModel }: Target): void {
  if (status === 401 || status === 403) {
    throw new GatewayError('engine_failed', `the engine does not accept this gateway: it answered ${status}`);
  }
  // A resource says that it exists.
  if (status === 404 && baseModel !== null) {
    throw new GatewayError('model_unavailable', 'the engine does not hold this model any more', {
      param: 'model',
    });
  }
}

function noteUsage({ exchange, usage }: Answer, outcome: Outcome): void {
  if (exchange !== undefined) outcome.usage = () => usage.usage(exchange.trailers[usageHeader]);
  else if (usage !== null) outcome.usage = () => usage;
}

/** Sends an answer to the client. Returns the error that cut a stream short, after telling the client. */
async function relay(
  answer: Answer,
  res: ServerResponse,
  attempt: Attempt,
  outcome: Outcome,
  translation?: Translation,
): Promise<GatewayError | null> {
  const { status, headers } = answer.head;
  if (answer.exchange === undefined) {
    const whole = translation?.whole(status, answer.body) ?? { status, body: answer.body };
    if (res.headersSent) return relayLate(whole.body, res, outcome);
    copyHead(whole.status, headers, res);
    outcome.firstByteMs = performance.now();
    outcome.responseBytes = whole.body.length;
    res.end(whole.body);
    return null;
  }
  if (!res.headersSent) copyHead(status, headers, res);
  outcome.firstByteMs = performance.now();
  return relayStream(answer, res, attempt, outcome, translation);
}

function copyHead(status: number, headers: IncomingHttpHeaders, res: ServerResponse): void {
  res.statusCode = status;
  for (const name in headers) if (!headersNotPassedOn.has(name)) res.setHeader(name, headers[name]!);
}

/** An engine's refusal for a client whose stream was begun while it waited: it can only be an event. */
function relayLate(body: Buffer, res: ServerResponse, outcome: Outcome): null {
  const event = Buffer.from(`data: ${JSON.stringify(JSON.parse(body.toString()))}\n\n`);
  outcome.responseBytes = event.length;
  res.end(event);
  return null;
}

function relayStream(
  { exchange, usage }: Extract<Answer, { exchange: Exchange }>,
  res: ServerResponse,
  attempt: Attempt,
  outcome: Outcome,
  translation?: Translation,
): Promise<GatewayError | null> {
  const events = new WholeEvents();
  const drained = () => {
    attempt.allowIdle();
    exchange.resume();
  };
  const send = (whole: Buffer) => {
    if (whole.length === 0) return;
    usage.push(whole);
    const bytes = translation?.events(whole) ?? whole;
    outcome.responseBytes += bytes.length;
    // A client that does not read holds the engine back, and for no longer than a silent engine may hold us.
    if (res.write(bytes)) return;
    exchange.pause();
    attempt.allowClient();
    res.once('drain', drained);
  };

  return new Promise((resolve) => {
    const fail = (error: unknown) => {
      const failure = asEngineError(error);
      // Before the answer ends: its log line is written then.
      outcome.errorCode = failure.code;
      if (failure.code === 'client_closed_request') res.destroy();
      else res.end(translation?.error(failure) ?? errorEvent(errorBody(failure)));
      resolve(failure);
    };
    exchange.flow({
      data(bytes) {
        attempt.allowIdle();
        try {
          send(events.push(bytes));
        } catch (error) {
          exchange.abort(error as Error);
          return;
        }
        // Whose first event is not whole yet.
        if (!res.headersSent) res.flushHeaders();
      },
      end() {
        try {
          send(events.takeRest());
        } catch (error) {
          fail(error);
          return;
        }
        res.end();
        resolve(null);
      },
      error: fail,
    });
  });
}

const attemptIsOver = new GatewayError('internal_error', 'the attempt is over');

/**
 * One try at one engine, which ends with the client's hang-up, or when a wait has lasted too long. What is too long changes when the
 * engine goes.
 */
class Attempt {
  readonly #letGo: (() => void)[];
  /** Each says that the engine is dead. */
  readonly #deaths: readonly AbortSignal[];
  readonly #idleTimeoutMs: number;
  #exchange: Exchange | null = null;
  #timer: NodeJS.Timeout | undefined;
  #waits: 'first byte' | 'engine' | 'client' = 'first byte';
  #waitsMs = 0;

  constructor(ending: Ending, deaths: readonly AbortSignal[], { idleTimeoutMs }: ForwardLimits) {
    this.#deaths = deaths;
    this.#idleTimeoutMs = idleTimeoutMs;
    this.#letGo = [
      ending.listen((reason) => this.#exchange?.abort(reason)),
      ...deaths.map((death) => onceAborted(death, this.#shorten)),
    ];
  }

  /** From now on this is what the attempt waits for. */
  watch(exchange: Exchange): void {
    this.#exchange = exchange;
  }

  /** From now on the attempt may wait this long for the engine until the next call. */
  allow(ms: number): void {
    this.#wait('first byte', this.#isGone ? Math.min(ms, goneGraceMs) : ms);
  }

  /** The same for the client, whom it does not concern that the engine is gone. */
  allowClient(): void {
    this.#wait('client', this.#idleTimeoutMs);
  }

  /** The same with the idle timeout; called for every piece of a stream, so it reuses its timer. */
  allowIdle(): void {
    if (this.#waits === 'engine') this.#timer!.refresh();
    else
      this.#wait('engine', this.#isGone ? Math.min(this.#idleTimeoutMs, goneGraceMs) : this.#idleTimeoutMs);
  }

  /** Ends the try. What the engine may still be sending is not wanted. */
  end(): void {
    clearTimeout(this.#timer);
    for (const letGo of this.#letGo) letGo();
    this.#exchange?.abort(attemptIsOver);
  }

  get #isGone(): boolean {
    return this.#deaths.some(({ aborted }) => aborted);
  }

  readonly #shorten = () => {
    if (this.#waits === 'client') return;
    this.#wait(this.#waits, Math.min(this.#idleTimeoutMs, goneGraceMs));
  };

  #wait(what: 'first byte' | 'engine' | 'client', ms: number): void {
    clearTimeout(this.#timer);
    this.#waits = what;
    this.#waitsMs = ms;
    this.#timer = setTimeout(this.#giveUp, ms);
  }

  readonly #giveUp = () => {
    const ms = this.#waitsMs;
    this.#exchange?.abort(
      this.#waits === 'client'
        ? new GatewayError('client_closed_request', `the client read nothing for ${ms} ms`)
        : this.#isGone
          ? new GatewayError('engine_failed', 'the engine is gone')
          : new GatewayError('engine_timeout', `the engine sent nothing for ${ms} ms`),
    );
  };
}

const unreachableCodes = new Set([
  ...['ECONNREFUSED', 'EHOSTUNREACH', 'ENETUNREACH', 'ENOTFOUND', 'EAI_AGAIN'],
  'UND_ERR_CONNECT_TIMEOUT',
]);

function isUnreachable(error: unknown): boolean {
  return unreachableCodes.has((error as { code?: string }).code ?? '');
}

/**
 * The engine closed a connection that was kept alive just as the request was sent on it. It was not read, so it is
 * sent once more. A connection that never brought an answer was not idle: what ended it may be the request.
 */
function isClosedWhileIdle(error: unknown): boolean {
  const { code, socket } = error as { code?: string; socket?: { bytesRead?: number } };
  return code === 'EPIPE' || (code === 'UND_ERR_SOCKET' && (socket?.bytesRead ?? 0) > 0);
}

export const engineFailures: ReadonlySet<ErrorCode> = new Set<ErrorCode>([
  'engine_unreachable',
  'engine_failed',
  'engine_timeout',
]);

function asEngineError(error: unknown): GatewayError {
  if (error instanceof GatewayError) return error;
  return isUnreachable(error)
    ? new GatewayError('engine_unreachable', 'the engine could not be reached', { cause: error })
    : new GatewayError('engine_failed', 'the engine broke off its answer', { cause: error });
}

function mayAskAnother({ code }: GatewayError): boolean {
  return code === 'engine_unreachable' || code === 'engine_failed';
}
