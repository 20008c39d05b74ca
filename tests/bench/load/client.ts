/**
 * One streamed request and when its parts came. Nothing is retried: what fails has a code, and counts as failed. Times are
 * of the piece of network data that an event came with, so two events of one piece came at once.
 */
import type { Dispatcher } from 'undici';
import type { PlannedRequest } from './workload.ts';

/** How a request is written down for one server. */
export interface Wire {
  url: string;
  apiKey: string | null;
  endpoint: 'completions' | 'chat';
  baseModel: string;
  /** Names, or ids of llama-server. */
  adapters: readonly string[];
  adapterField: 'model' | 'llama';
  temperature: number;
  ignoresEos: boolean;
  timeoutMs: number;
}

export interface Answer {
  /**
   * `ok`; `cancelled` by us; else why it failed: `http_429` and the like, `connection`: none, or ended before an answer;
   * `timeout`; `broken_stream`: ended too early; `error_event`: the server said so inside of the stream; `invalid_answer`:
   * no stream of events.
   */
  code: string;
  /** What the server or the socket said about a failure. */
  message: string;
  sentMs: number;
  /** First and last piece of text; null: none came. */
  firstMs: number | null;
  lastMs: number | null;
  endMs: number;
  /** Between pieces of text. */
  gapsMs: number[];
  /** By the server's usage; null: it reported none. */
  promptTokens: number | null;
  outputTokens: number | null;
  /** Of the prompt's, those that the server had from before; null: it reported none. */
  cachedTokens: number | null;
  /** What was said, without reasoning: clients do not send that back. */
  text: string;
}

interface StreamEvent {
  choices?: {
    text?: string;
    delta?: { content?: string | null; reasoning_content?: string | null };
    finish_reason?: string | null;
  }[];
  usage?: {
    prompt_tokens: number;
    completion_tokens: number;
    prompt_tokens_details?: { cached_tokens?: number } | null;
  } | null;
  error?: { message?: string } | string;
}

/** An event, or an answer that is no stream, is read up to this size. */
const maxEventChars = 1 << 20;
const maxMessageChars = 200;

export function requestBody(wire: Wire, request: PlannedRequest): object {
  const adapter = request.adapter === null ? null : wire.adapters[request.adapter]!;
  const { prompt } = request;
  return {
    model: wire.adapterField === 'model' ? (adapter ?? wire.baseModel) : wire.baseModel,
    // llama-server applies every adapter that it has to a request that names none, so the base has to be asked for.
    ...(wire.adapterField === 'llama'
      ? { lora: [{ id: Number(adapter ?? 0), scale: adapter === null ? 0 : 1 }] }
      : {}),
    ...(wire.endpoint === 'completions'
      ? { prompt }
      : { messages: typeof prompt === 'string' ? [{ role: 'user', content: prompt }] : prompt }),
    max_tokens: request.outputTokens,
    temperature: wire.temperature,
    ...(wire.ignoresEos ? { ignore_eos: true } : {}),
    stream: true,
    stream_options: { include_usage: true },
  };
}

/** Sends one request; resolves when its answer has ended, whatever came of it. */
export async function sendStreamed(
  dispatcher: Dispatcher,
  wire: Wire,
  request: PlannedRequest,
  signal: AbortSignal,
): Promise<Answer> {
  const abort = new AbortController();
  const onAbort = () => abort.abort();
  signal.addEventListener('abort', onAbort);
  if (signal.aborted) abort.abort();
  let isLate = false;
  const timer = setTimeout(() => {
    isLate = true;
    abort.abort();
  }, wire.timeoutMs);
  const body = JSON.stringify(requestBody(wire, request));
  const answer: Answer = {
    code: 'ok',
    message: '',
    sentMs: performance.now(),
    firstMs: null,
    lastMs: null,
    endMs: 0,
    gapsMs: [],
    promptTokens: null,
    outputTokens: null,
    cachedTokens: null,
    text: '',
  };
  const fail = (code: string, message: string) => {
    answer.code = code;
    const hidden = wire.apiKey === null ? message : message.replaceAll(wire.apiKey, '***');
    answer.message = hidden.slice(0, maxMessageChars);
  };
  let hasAnswer = false;
  try {
    const url = new URL(wire.url);
    const response = await dispatcher.request({
      origin: url.origin,
      path: `${url.pathname.replace(/\/$/, '')}/v1/${wire.endpoint === 'chat' ? 'chat/completions' : 'completions'}`,
      method: 'POST',
      headers: {
        'content-type': 'application/json',
        accept: 'text/event-stream',
        ...(wire.apiKey === null ? {} : { authorization: `Bearer ${wire.apiKey}` }),
      },
      body,
      signal: abort.signal,
      // There is one limit, on the whole.
      headersTimeout: 0,
      bodyTimeout: 0,
    });
    hasAnswer = true;
    // Who reads it is told of errors; a body that is left unread has nobody to tell.
    response.body.on('error', () => {});
    const type = String(response.headers['content-type'] ?? 'none');
    if (response.statusCode !== 200) {
      fail(`http_${response.statusCode}`, errorText(await readSome(response.body)));
    } else if (!type.startsWith('text/event-stream')) {
      response.body.destroy();
      fail('invalid_answer', `content-type: expected text/event-stream, got ${type}`);
    } else {
      await readEvents(response.body, answer, fail);
    }
  } catch (error) {
    const { code, message } = error as NodeJS.ErrnoException;
    if (isLate) fail('timeout', `expected an answer within ${wire.timeoutMs} ms`);
    else if (signal.aborted) fail('cancelled', '');
    else fail(hasAnswer ? 'broken_stream' : 'connection', [code, message].filter(Boolean).join(': '));
  } finally {
    clearTimeout(timer);
    signal.removeEventListener('abort', onAbort);
  }
  answer.endMs = performance.now();
  return answer;
}

async function readEvents(
  body: AsyncIterable<Buffer>,
  answer: Answer,
  fail: (code: string, message: string) => void,
): Promise<void> {
  const decoder = new TextDecoder();
  let rest = '';
  let hasEnd = false;
  let numPieces = 0;
  for await (const bytes of body) {
    const nowMs = performance.now();
    const lines = (rest + decoder.decode(bytes, { stream: true })).split('\n');
    rest = lines.pop()!;
    if (rest.length > maxEventChars) {
      return fail('invalid_answer', `expected events of at most ${maxEventChars} characters, got more`);
    }
    for (const line of lines) {
      if (!line.startsWith('data:')) continue;
      const data = line.slice(5).trim();
      if (data === '[DONE]') {
        hasEnd = true;
        continue;
      }
      let event: StreamEvent;
      try {
        event = JSON.parse(data);
      } catch {
        return fail('invalid_answer', 'expected events of JSON, got something else');
      }
      if (event.error) return fail('error_event', errorText(data));
      if (event.usage) {
        answer.promptTokens = event.usage.prompt_tokens;
        answer.outputTokens = event.usage.completion_tokens;
        answer.cachedTokens = event.usage.prompt_tokens_details?.cached_tokens ?? null;
      }
      const choice = event.choices?.[0];
      if (choice === undefined) continue;
      answer.text += choice.text ?? choice.delta?.content ?? '';
      const isLast = Boolean(choice.finish_reason);
      hasEnd ||= isLast;
      const hasText = Boolean(choice.text || choice.delta?.content || choice.delta?.reasoning_content);
      // Tokens without text of their own, such as half a letter, come with a later piece; at the latest with the end.
      if (!hasText && !(isLast && numPieces === 0)) continue;
      numPieces++;
      if (answer.lastMs !== null) answer.gapsMs.push(nowMs - answer.lastMs);
      answer.firstMs ??= nowMs;
      answer.lastMs = nowMs;
    }
  }
  if (!hasEnd) fail('broken_stream', `the stream ended after ${numPieces} pieces of text, before its end`);
}

/** The body of a refusal, as far as it is worth reading. */
async function readSome(body: AsyncIterable<Buffer>): Promise<string> {
  const parts: Buffer[] = [];
  let size = 0;
  for await (const part of body) {
    parts.push(part);
    size += part.length;
    if (size > maxEventChars) break;
  }
  return Buffer.concat(parts).toString();
}

/** The message of OpenAI's error body, or the text as it is. */
function errorText(text: string): string {
  try {
    const { error, message } = JSON.parse(text) as {
      error?: { message?: string } | string;
      message?: string;
    };
    const found = typeof error === 'string' ? error : (error?.message ?? message);
    if (typeof found === 'string') return found;
  } catch {
    // Not JSON: a proxy's page, say.
  }
  return text.trim();
}
