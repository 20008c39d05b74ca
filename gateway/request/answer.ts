// How a request is answered by an engine: within its caller's limits, by who answers to the name that it asks for.

import type { IncomingMessage } from 'node:http';
import type { Logger } from 'pino';
import {
  adaptersHeader,
  enginePaths,
  mergeHeader,
  modelHeader,
  type TokenUsage,
} from '../../engine/protocol.ts';
import type { WeightedTarget } from '../choose-target.ts';
import type { Directory } from '../directory.ts';
import { asGatewayError, errorBody, GatewayError } from '../errors.ts';
import { type Forward, forward, type Translation } from '../forward.ts';
import { whoAnswers } from '../groups/group.ts';
import { type HoldLimits, holdStream } from '../on-demand/hold.ts';
import type { Asked } from '../openai.ts';
import { type Ask, askOf, lowered, parseWaitMs } from '../queue/ask.ts';
import { estimateAnswer } from '../quota/estimate.ts';
import type { Scope } from '../quota/limits.ts';
import { noTokens, type Quota } from '../quota/quota.ts';
import { estimatePromptTokens } from '../quota/usage.ts';
import { type Copied, judgedOf } from '../routes/routes.ts';
import { errorEvent } from '../sse.ts';
import { endRequestSpan, startRequestSpan } from '../tracing.ts';
import { type Arrival, type Facts, noteError } from './arrival.ts';
import { Ending, onceAborted } from './ending.ts';
import { findComposition } from './find-composition.ts';
import { type FindParts, findTarget } from './find-target.ts';

export type AnswerParts = FindParts & {
  forward: Forward;
  quota: Quota;
  /** When a stream whose request waits is begun. */
  hold: HoldLimits;
  log: Logger;
  /** Aborted when the time that requests in flight had to end is over. */
  cutOff: AbortSignal;
};

/** What an engine is asked. */
export type Call = {
  /** Of the engine. */
  path: string;
  asked: Asked;
  body: Buffer;
  translation?: Translation;
};

/** Of the client's headers an engine needs these. It never sees keys or cookies, nor a client's word on who answers. */
const headersPassedOn = ['accept', 'content-type', 'traceparent', 'tracestate'] as const;

/** Answers a request within its caller's limits. */
export async function answerWithin(arrival: Arrival, call: Call, parts: AnswerParts): Promise<void> {
  const { res, facts } = arrival;
  const scopes = scopesOf(arrival, parts.directory);
  const tokens = scopes.length === 0 ? 0 : estimateOf(arrival, call, parts);
  const entry = await parts.quota.enter(facts.tenant ?? null, scopes, tokens);
  for (const [name, value] of entry.headers) res.setHeader(name, value);
  if (entry.refusal !== null) throw entry.refusal;
  try {
    await answer(arrival, call, parts);
  } finally {
    entry.settle(costOf(facts));
  }
}

/** Whose limits hold: the tenant's, and those of the key that was shown. */
function scopesOf({ caller }: Arrival, directory: Directory): readonly Scope[] {
  if (caller === null) return [];
  const { tenant, keyId, limits } = caller;
  const ofTenant = directory.scopesOf(tenant);
  return limits === undefined ? ofTenant : [...ofTenant, { of: 'key', id: keyId, limits }];
}

/** Tokens that it will probably cost: its prompt, and answers as long as those before it, but never more than it asks for. */
function estimateOf({ facts }: Arrival, { path, asked, body }: Call, parts: AnswerParts): number {
  const promptTokens = estimatePromptTokens(body.length);
  if (!isGeneration(path)) return promptTokens;
  const { lengths } = parts.forward;
  return promptTokens + estimateAnswer(asked, promptTokens, facts.tenant ?? null, { ...parts, lengths });
}

/** What a request that has ended costs its caller; null when it cannot be told, since the caller did not wait for it. */
function costOf({ usage, attempts, errorCode }: Facts): TokenUsage | null {
  if (usage !== undefined) return usage();
  return attempts > 0 && errorCode === 'client_closed_request' ? null : noTokens;
}

async function answer(arrival: Arrival, call: Call, parts: AnswerParts): Promise<void> {
  const { req, res, facts, ends } = arrival;
  const { path, body, translation } = call;
  const { model, adapters, merge, user, isStream } = call.asked;
  const asker = { tenant: facts.tenant ?? null, user, header: (name: string) => headerOf(req, name) };
  const target = adapters
    ? await findComposition(adapters, merge, facts, parts)
    : await findTarget(model, facts, parts, asker);

  const headers: Record<string, string> = { 'x-request-id': facts.requestId };
  for (const name of headersPassedOn) {
    const value = headerOf(req, name);
    if (value !== undefined) headers[name] = value;
  }
  Object.assign(headers, whoAnswers(model, target));
  for (const name of [adaptersHeader, mergeHeader])
    if (headers[name] !== undefined) res.setHeader(name, headers[name]);
  const span = startRequestSpan(path, model, headers);
  if (span !== null) ends.push(() => endRequestSpan(span, res.statusCode, facts));

  if (!adapters) followRoute(arrival, model, target, { path, headers, body }, parts);
  const ask = askFor(arrival, call, target, parts);
  const ending = endingOf(arrival, parts.cutOff);
  const session = sessionOf(req, facts);
  const asked = {
    path,
    target,
    headers,
    body,
    session,
    ask,
    isStream,
    ending,
    ...(translation && { translation }),
  };
  const isWaiting = () => facts.engine === undefined;
  const endHold = isStream ? holdStream(res, { [modelHeader]: target.name }, isWaiting, parts.hold) : null;
  if (endHold !== null) ends.push(endHold);
  try {
    const failure = await forward(parts.forward, asked, res, facts);
    if (failure !== null) noteError(parts.log, facts, failure);
  } catch (error) {
    if (!res.headersSent) throw error;
    // The client was told to wait, in an answer that has begun.
    const failure = asGatewayError(error);
    noteError(parts.log, facts, failure);
    res.end(translation?.error(failure) ?? errorEvent(errorBody(failure)));
  } finally {
    endHold?.();
  }
}

/** What the queue is to know of it. */
function askFor(
  { req, facts }: Arrival,
  { path, asked, body }: Call,
  target: WeightedTarget,
  { directory, forward }: AnswerParts,
): Ask {
  const tenant = facts.tenant ?? null;
  const standing = directory.standingOf(tenant);
  return askOf(
    {
      tenant,
      standing: { ...standing, priority: lowered(standing.priority, headerOf(req, 'x-motet-priority')) },
      adapter: target.name,
      bodyBytes: body.length,
      maxTokens: isGeneration(path) ? asked.maxTokens : 0,
      numChoices: asked.numChoices,
      waitMs: parseWaitMs(headerOf(req, 'x-llm-d-slo-ttft-ms')),
    },
    forward.lengths,
    performance.now(),
  );
}

/** The client's word that requests belong together. Another tenant's is another. */
function sessionOf(req: IncomingMessage, { tenant = '' }: Facts): string | null {
  const session = headerOf(req, 'x-motet-session');
  return session === undefined ? null : `${tenant}\n${session}`;
}

/** For an AdapterRoute: asks those who listen as well, and judges the target by what becomes of the request. */
function followRoute(
  { res, facts, ends }: Arrival,
  model: string,
  target: WeightedTarget,
  copied: Copied,
  { directory, routes }: AnswerParts,
): void {
  const rules = directory.rulesOf(model);
  const targets = rules && directory.targetsOf(model, facts.tenant ?? null);
  if (rules === null || targets === null) return;
  ends.push(() => {
    const isStream = String(res.getHeader('content-type') ?? '').startsWith('text/event-stream');
    const judged = judgedOf(facts, res.statusCode, isStream);
    if (judged !== null) routes.note(rules, target, judged, Date.now());
    // Now the copies are in nobody's way.
    if (isGeneration(copied.path)) routes.shadow(rules, targets, target, copied, Math.random);
  });
}

/** The answer is wanted until the client goes away before it has all of it, or the time to drain is over. */
function endingOf(arrival: Arrival, cutOff: AbortSignal): Ending {
  const { res, ends } = arrival;
  const ending = new Ending();
  const hangUp = () => {
    if (arrival.isHungUp || !res.writableFinished)
      ending.end(new GatewayError('client_closed_request', 'the client hung up'));
  };
  if (cutOff.aborted) ending.end(cutOff.reason);
  ends.push(
    onceAborted(cutOff, () => ending.end(cutOff.reason)),
    hangUp,
  );
  if (res.destroyed) hangUp();
  return ending;
}

function isGeneration(path: string): boolean {
  return path === enginePaths.chat || path === enginePaths.completions;
}

/** Of those that Node keeps once, or joins. */
function headerOf({ headers }: IncomingMessage, name: string): string | undefined {
  const value = headers[name.toLowerCase()];
  return Array.isArray(value) ? value.join(', ') : value;
}
