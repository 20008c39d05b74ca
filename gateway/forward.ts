// One request to one engine and its answer back. The body goes through untouched in both directions.
//
// Until the first byte is sent to the client everything can be taken back: an engine that cannot be reached, breaks
// off, or says it has no room is left and another one is asked. After it nothing can: an engine that breaks off then
// ends the stream with an error event. When the client hangs up, the engine's connection is closed, which stops it.

import { once } from 'node:events';
import type { IncomingHttpHeaders, ServerResponse } from 'node:http';
import { type Dispatcher, request } from 'undici';
import { formatAdapters, formatStanding, modelHeader, usageHeader } from '../engine/protocol.ts';
import type { Admission, Slot } from './admission.ts';
import type { Endpoint, Endpoints } from './endpoints.ts';
import type { EngineHeaders } from './engine-headers.ts';
import { type ErrorCode, errorBody, GatewayError } from './errors.ts';
import type { Ask } from './queue/ask.ts';
import type { LengthPredictor } from './queue/length-predictor.ts';
import { noTokens } from './quota/quota.ts';
import { StreamUsage, type Usage, usageOfAnswer } from './quota/usage.ts';
import { mayAppear, type Target } from './resolve-model.ts';
import { type HedgeResult, winnerOf } from './routing/hedge.ts';
import type { PickReason } from './routing/pick-endpoint.ts';
import { type RouteAsk, type Router, routeAsk } from './routing/router.ts';
import { errorEvent, WholeEvents } from './sse.ts';

export type ForwardLimits = { firstByteTimeoutMs: number; idleTimeoutMs: number };

export type Forward = {
  admission: Admission;
  endpoints: Endpoints;
  router: Router;
  lengths: LengthPredictor;
  dispatcher: Dispatcher;
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
  /** Aborted with a GatewayError: the client hung up, or the gateway's time to drain is over. */
  signal: AbortSignal;
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
};

/** An engine's answer: whole, or a stream of events of which the first bytes have come. */
type Answer = { status: number; headers: IncomingHttpHeaders } & (
  | { kind: 'whole'; body: Buffer; usage: Usage | null }
  | {
      kind: 'stream';
      chunks: AsyncIterator<Buffer>;
      first: Buffer;
      usage: StreamUsage;
      trailers: Record<string, string>;
    }
);

/** A whole answer is held until its end, so that an engine that breaks off can be replaced by another. */
const maxWholeAnswerBytes = 64 << 20;
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
    res.setTimeout(parts.limits.idleTimeoutMs);
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
    if (answer.kind === 'stream')
      throw new GatewayError('engine_failed', 'expected a whole answer, got a stream');
    outcome.responseBytes = answer.body.length;
    resolve(answer);
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
  const { name, members } = req.target;
  const route = routeAsk(members === undefined ? name : formatAdapters(members), req.body, {
    ...req,
    outputTokens: req.ask.outputTokens,
    members: members?.map((member) => member.name),
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
    const slot = await admission.enter(req.ask, route, req.target, tried, req.signal);
    tried.add(slot.endpoint);
    outcome.attempts += 1;
    let trial = begin(parts, slot, req);
    noteTrial(trial, outcome);
    try {
      if (hedgeAfterMs > 0) trial = await hedged(parts, req, route, trial, hedgeAfterMs, tried, outcome);
      const answer = await trial.answer;
      const { pick } = trial.slot;
      router.noteFirstByte(pick);
      if (statusesToAskAnother.has(answer.status) && admission.hasOther(req.target, tried)) continue;
      // The engine was on its way out, or has let go of the model: it is waited for elsewhere.
      if (statusesOfLeaving.has(answer.status) && mayAppear(req.target) && tried.size < maxEnginesTried)
        continue;
      assertPassable(answer, req.target);
      noteUsage(answer, outcome);
      const cut = report(await deliver(answer, trial.attempt));
      const isEngines = cut !== null && engineFailures.has(cut.code);
      router.noteAnswer(pick.endpoint, isEngines || statusesOfFailing.has(answer.status), Date.now());
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
      trial.slot.release(outcome.usage?.() ?? (req.signal.aborted ? null : noTokens));
    }
  }
}

/** One engine that is asked. */
type Trial = { slot: Slot; attempt: Attempt; askedMs: number; answer: Promise<Answer> };

function begin(parts: Forward, slot: Slot, req: ForwardRequest): Trial {
  const { gone, silent } = slot.endpoint;
  const attempt = new Attempt(req.signal, [gone, silent], parts.limits);
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
  const isGood = ({ status }: Answer) => !statusesToAskAnother.has(status);
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
  { dispatcher, endpoints, engineHeaders, limits }: Forward,
  { endpoint }: Slot,
  { path, headers, body, ask: asked }: ForwardRequest,
  attempt: Attempt,
): Promise<Answer> {
  attempt.allow(limits.firstByteTimeoutMs);
  let response: Dispatcher.ResponseData;
  try {
    const send = () =>
      request(endpoint.url + path, {
        method: 'POST',
        headers: { ...headers, ...formatStanding(asked), te: 'trailers', ...engineHeaders() },
        body,
        dispatcher,
        signal: attempt.signal,
      });
    response = await send().catch((error: unknown) => {
      if (!isClosedWhileIdle(error)) throw error;
      return send();
    });
  } catch (error) {
    if (isUnreachable(error)) endpoints.markUnreachable(endpoint);
    throw error;
  }

  const head = { status: response.statusCode, headers: response.headers };
  const chunks = response.body[Symbol.asyncIterator]() as AsyncIterator<Buffer>;
  const isStream = String(response.headers['content-type'] ?? '').startsWith('text/event-stream');
  if (!isStream) {
    const answer = await readAll(chunks);
    return { ...head, kind: 'whole', body: answer, usage: usageOfAnswer(head.headers[usageHeader], answer) };
  }

  const first = await chunks.next();
  if (first.done) throw new Error('the stream ended before its first event');
  return {
    ...head,
    kind: 'stream',
    chunks,
    first: first.value,
    usage: new StreamUsage(body.length),
    trailers: response.trailers,
  };
}

/** An answer that is about engines and not about the request is not the client's. */
function assertPassable({ status }: Answer, { baseModel }: Target): void {
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

function noteUsage(answer: Answer, outcome: Outcome): void {
  if (answer.kind === 'stream') outcome.usage = () => answer.usage.usage(answer.trailers[usageHeader]);
  else if (answer.usage !== null) outcome.usage = () => answer.usage!;
}

async function readAll(chunks: AsyncIterator<Buffer>): Promise<Buffer> {
  const parts: Buffer[] = [];
  let numBytes = 0;
  for (let next = await chunks.next(); !next.done; next = await chunks.next()) {
    numBytes += next.value.length;
    if (numBytes > maxWholeAnswerBytes)
      throw new Error(`the answer is longer than ${maxWholeAnswerBytes} bytes`);
    parts.push(next.value);
  }
  return Buffer.concat(parts, numBytes);
}

/** Sends an answer to the client. Returns the error that cut a stream short, after telling the client. */
async function relay(
  answer: Answer,
  res: ServerResponse,
  attempt: Attempt,
  outcome: Outcome,
  translation?: Translation,
): Promise<GatewayError | null> {
  const whole = answer.kind === 'whole' ? (translation?.whole(answer.status, answer.body) ?? answer) : null;
  if (res.headersSent && whole !== null) return relayLate(whole.body, res, outcome);
  if (!res.headersSent) copyHead(answer, res);
  outcome.firstByteMs = performance.now();
  if (answer.kind === 'whole') {
    const { status, body } = whole!;
    outcome.responseBytes = body.length;
    res.statusCode = status;
    res.end(body);
    return null;
  }
  return relayStream(answer, res, attempt, outcome, translation);
}

function copyHead({ status, headers }: Answer, res: ServerResponse): void {
  res.statusCode = status;
  for (const [name, value] of Object.entries(headers)) {
    if (value !== undefined && !headersNotPassedOn.has(name)) res.setHeader(name, value);
  }
}

/** An engine's refusal for a client whose stream was begun while it waited: it can only be an event. */
function relayLate(body: Buffer, res: ServerResponse, outcome: Outcome): null {
  const event = Buffer.from(`data: ${JSON.stringify(JSON.parse(body.toString()))}\n\n`);
  outcome.responseBytes = event.length;
  res.end(event);
  return null;
}

async function relayStream(
  { chunks, first, usage }: Extract<Answer, { kind: 'stream' }>,
  res: ServerResponse,
  attempt: Attempt,
  outcome: Outcome,
  translation?: Translation,
): Promise<GatewayError | null> {
  const events = new WholeEvents();
  const send = async (events: Buffer) => {
    if (events.length === 0) return;
    usage.push(events);
    const bytes = translation?.events(events) ?? events;
    outcome.responseBytes += bytes.length;
    // A client that does not read holds the engine back, and for no longer than a silent engine may hold us.
    if (res.write(bytes)) return;
    attempt.allowClient();
    await once(res, 'drain', { signal: attempt.signal }).catch(() => {
      throw attempt.signal.reason;
    });
    attempt.allowIdle();
  };

  if (!res.headersSent) res.flushHeaders();
  try {
    attempt.allowIdle();
    await send(events.push(first));
    for (let next = await chunks.next(); !next.done; next = await chunks.next()) {
      attempt.allowIdle();
      await send(events.push(next.value));
    }
    await send(events.takeRest());
    res.end();
    return null;
  } catch (error) {
    const isOurs = error instanceof GatewayError;
    const failure = asEngineError(attempt.signal.aborted && !isOurs ? attempt.signal.reason : error);
    if (failure.code === 'client_closed_request') res.destroy();
    else res.end(translation?.error(failure) ?? errorEvent(errorBody(failure)));
    return failure;
  }
}

const attemptIsOver = new GatewayError('internal_error', 'the attempt is over');

/**
 * One try at one engine: a signal that is aborted with the client's hang-up, or when a wait has lasted too long. What is
 * too long changes when the engine goes.
 */
class Attempt {
  // One controller that listeners abort, and errors that are made when they are needed: composed signals, and stack traces
  // of waits that nearly always end well, cost a sixth of a request.
  readonly #ending = new AbortController();
  readonly #client: AbortSignal;
  /** Each says that the engine is dead. */
  readonly #deaths: readonly AbortSignal[];
  readonly #idleTimeoutMs: number;
  #timer: NodeJS.Timeout | undefined;
  #isIdleTimer = false;
  #waitsForEngine = true;

  constructor(signal: AbortSignal, deaths: readonly AbortSignal[], { idleTimeoutMs }: ForwardLimits) {
    this.#client = signal;
    this.#deaths = deaths;
    this.#idleTimeoutMs = idleTimeoutMs;
    if (signal.aborted) this.#hangUp();
    else signal.addEventListener('abort', this.#hangUp);
    for (const death of deaths) death.addEventListener('abort', this.#shorten);
  }

  get signal(): AbortSignal {
    return this.#ending.signal;
  }

  /** From now on the attempt may wait this long for the engine until the next call. */
  allow(ms: number): void {
    const isGone = this.#deaths.some(({ aborted }) => aborted);
    const allowedMs = isGone ? Math.min(ms, goneGraceMs) : ms;
    this.#wait(allowedMs, () =>
      isGone
        ? new GatewayError('engine_failed', 'the engine is gone')
        : new GatewayError('engine_timeout', `the engine sent nothing for ${ms} ms`),
    );
    this.#waitsForEngine = true;
  }

  /** The same for the client, whom it does not concern that the engine is gone. */
  allowClient(): void {
    const ms = this.#idleTimeoutMs;
    this.#wait(ms, () => new GatewayError('client_closed_request', `the client read nothing for ${ms} ms`));
    this.#waitsForEngine = false;
  }

  /** The same with the idle timeout; called for every piece of a stream, so it reuses its timer. */
  allowIdle(): void {
    if (this.#isIdleTimer) this.#timer?.refresh();
    else this.allow(this.#idleTimeoutMs);
    this.#isIdleTimer = true;
  }

  /** Ends the try. What the engine may still be sending is not wanted. */
  end(): void {
    clearTimeout(this.#timer);
    this.#client.removeEventListener('abort', this.#hangUp);
    for (const death of this.#deaths) death.removeEventListener('abort', this.#shorten);
    this.#ending.abort(attemptIsOver);
  }

  readonly #hangUp = () => this.#ending.abort(this.#client.reason);

  readonly #shorten = () => {
    if (this.#waitsForEngine) this.allow(this.#idleTimeoutMs);
  };

  #wait(ms: number, failure: () => GatewayError): void {
    clearTimeout(this.#timer);
    this.#isIdleTimer = false;
    this.#timer = setTimeout(() => this.#ending.abort(failure()), ms);
  }
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
