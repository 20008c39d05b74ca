/**
 * OpenAI's reply bodies from what sequences said: whole, and as stream events. Chat and completions differ in a few
 * names, so each is a format object. An event's unchanging head is made once a stream, not once a token.
 */
import { randomBytes } from 'node:crypto';
import type { TokenLogprobs } from './engine.ts';
import type { ToolCallReader, ToolPart } from './grammar/tool-calls.ts';
import type { FinishReason } from './stop.ts';

/** What replies need of the tokenizer. */
export interface TokenNames {
  /** The bytes that a token stands for; special tokens as their text. */
  tokenBytes(tokenId: number): Uint8Array;
}

export interface ReplyHead {
  id: string;
  created: number;
  model: string;
}

/** One choice when it has ended. */
export interface Choice {
  index: number;
  text: string;
  numTokens: number;
  logprobs: TokenLogprobs[] | null;
  finishReason: FinishReason;
  stopReason: string | number | null;
}

/** A part of one choice. */
export interface Delta {
  text: string;
  logprobs: TokenLogprobs | null;
  finishReason: FinishReason | null;
  stopReason: string | number | null;
}

export interface Usage {
  prompt_tokens: number;
  completion_tokens: number;
  total_tokens: number;
  /** Prompt tokens that need not be computed, since the prefix cache had them. */
  prompt_tokens_details: { cached_tokens: number };
}

export function usageOf(numPromptTokens: number, numOutputTokens: number, numCachedTokens: number): Usage {
  return {
    prompt_tokens: numPromptTokens,
    completion_tokens: numOutputTokens,
    total_tokens: numPromptTokens + numOutputTokens,
    prompt_tokens_details: { cached_tokens: numCachedTokens },
  };
}

/** @param vectors  one an input. As base64: their bytes, f32, little-endian. */
export function embeddingsReply(
  { isBase64 }: { isBase64: boolean },
  model: string,
  vectors: readonly Float32Array[],
  { prompt_tokens, total_tokens, prompt_tokens_details }: Usage,
) {
  return {
    object: 'list',
    data: vectors.map((vector, index) => ({
      object: 'embedding',
      index,
      embedding: isBase64 ? Buffer.from(vector.buffer).toString('base64') : Array.from(vector),
    })),
    model,
    usage: { prompt_tokens, total_tokens, prompt_tokens_details },
  };
}

/** Chat or completions. */
export interface ReplyFormat {
  newId(): string;
  whole(head: ReplyHead, choices: readonly Choice[], usage: Usage, names: TokenNames): object;
  stream(head: ReplyHead, names: TokenNames, includeUsage: boolean): EventWriter;
}

/** Makes the data of server-sent events; the writing is the server's. */
export interface EventWriter {
  /** Events before the first token: chat names the role. */
  begin(index: number): string;
  delta(index: number, delta: Delta): string;
  usage(usage: Usage): string;
}

const newId = (prefix: string) => `${prefix}-${randomBytes(16).toString('hex')}`;
export const eventOf = (body: string) => `data: ${body}\n\n`;
export const doneEvent = eventOf('[DONE]');

export const chatFormat = chatFormatOf(null);

/** @param newReader  of tool calls, for each choice; null: nothing in the text is one */
export function chatFormatOf(newReader: (() => ToolCallReader) | null): ReplyFormat {
  return {
    newId: () => newId('chatcmpl'),
    whole: (head, choices, usage, names) => ({
      ...head,
      object: 'chat.completion',
      choices: choices.map((choice) => {
        const { message, hasCalls } = messageOf(choice.text, newReader?.() ?? null);
        return {
          index: choice.index,
          message,
          logprobs: choice.logprobs && {
            content: choice.logprobs.map((token) => chatLogprob(token, names)),
            refusal: null,
          },
          finish_reason: reasonOf(choice.finishReason, hasCalls),
          stop_reason: choice.stopReason,
        };
      }),
      usage,
    }),
    stream(head, names, includeUsage) {
      const events = new EventParts({ ...head, object: 'chat.completion.chunk' }, includeUsage);
      const readers: ToolCallReader[] = [];
      return {
        begin: (index) =>
          events.choice(index, '"delta":{"role":"assistant","content":""}', 'null', null, null),
        delta(index, { text, logprobs, finishReason, stopReason }) {
          const content = logprobs
            ? JSON.stringify({ content: [chatLogprob(logprobs, names)], refusal: null })
            : 'null';
          if (newReader === null) {
            const delta =
              text === '' && finishReason ? '"delta":{}' : `"delta":{"content":${JSON.stringify(text)}}`;
            return events.choice(index, delta, content, finishReason, stopReason);
          }
          readers[index] ??= newReader();
          const reader = readers[index];
          const parts = reader.push(text);
          if (finishReason) parts.push(...reader.finish());
          const deltas = parts.map((part) => `"delta":${JSON.stringify(toolDelta(part))}`);
          // The end, and logprobs of text that is held back, have an event of their own.
          if (finishReason || (logprobs && deltas.length === 0)) deltas.push('"delta":{}');
          const last = deltas.length - 1;
          return deltas
            .map((delta, i) => {
              const reason = i === last && finishReason ? reasonOf(finishReason, reader.numCalls > 0) : null;
              return events.choice(
                index,
                delta,
                i === 0 ? content : 'null',
                reason,
                i === last ? stopReason : null,
              );
            })
            .join('');
        },
        usage: (usage) => events.usage(usage),
      };
    },
  };
}

/** OpenAI's word for an output that ended where the model wanted, with calls. */
const reasonOf = (reason: FinishReason, hasCalls: boolean) =>
  reason === 'stop' && hasCalls ? 'tool_calls' : reason;

function messageOf(text: string, reader: ToolCallReader | null) {
  if (reader === null)
    return { message: { role: 'assistant', content: text, refusal: null }, hasCalls: false };
  let content = '';
  const calls: { id: string; type: 'function'; function: { name: string; arguments: string } }[] = [];
  for (const part of [...reader.push(text), ...reader.finish()]) {
    if ('content' in part) content += part.content;
    else if ('id' in part)
      calls.push({ id: part.id, type: 'function', function: { name: part.name, arguments: '' } });
    else calls[part.call]!.function.arguments += part.arguments;
  }
  const hasCalls = calls.length > 0;
  // OpenAI has null for an answer of calls alone.
  const message = { role: 'assistant', content: content === '' && hasCalls ? null : content, refusal: null };
  return { message: hasCalls ? { ...message, tool_calls: calls } : message, hasCalls };
}

function toolDelta(part: ToolPart) {
  if ('content' in part) return part;
  const { call: index } = part;
  const called =
    'id' in part
      ? { id: part.id, type: 'function', function: { name: part.name, arguments: '' } }
      : { function: { arguments: part.arguments } };
  return { tool_calls: [{ index, ...called }] };
}

export const completionFormat: ReplyFormat = {
  newId: () => newId('cmpl'),
  whole: (head, choices, usage, names) => ({
    ...head,
    object: 'text_completion',
    choices: choices.map((choice) => ({
      index: choice.index,
      text: choice.text,
      logprobs: choice.logprobs && completionLogprobs(choice.logprobs, 0, names),
      finish_reason: choice.finishReason,
      stop_reason: choice.stopReason,
    })),
    usage,
  }),
  stream(head, names, includeUsage) {
    const events = new EventParts({ ...head, object: 'text_completion' }, includeUsage);
    const offsets: number[] = [];
    return {
      begin: () => '',
      delta(index, { text, logprobs, finishReason, stopReason }) {
        const offset = offsets[index] ?? 0;
        const body = logprobs ? completionLogprobs([logprobs], offset, names) : null;
        if (body) offsets[index] = offset + body.tokens[0]!.length;
        return events.choice(
          index,
          `"text":${JSON.stringify(text)}`,
          JSON.stringify(body),
          finishReason,
          stopReason,
        );
      },
      usage: (usage) => events.usage(usage),
    };
  },
};

class EventParts {
  readonly #head: string;
  readonly #tail: string;

  constructor(head: object, includeUsage: boolean) {
    this.#head = `data: ${JSON.stringify(head).slice(0, -1)},"choices":[`;
    // With include_usage OpenAI puts `usage: null` on every chunk but the last.
    this.#tail = includeUsage ? '],"usage":null}\n\n' : ']}\n\n';
  }

  choice(
    index: number,
    body: string,
    logprobs: string,
    finishReason: FinishReason | 'tool_calls' | null,
    stopReason: string | number | null,
  ): string {
    const end = finishReason
      ? `"finish_reason":"${finishReason}","stop_reason":${JSON.stringify(stopReason)}`
      : '"finish_reason":null';
    return `${this.#head}{"index":${index},${body},"logprobs":${logprobs},${end}}${this.#tail}`;
  }

  usage(usage: Usage): string {
    return `${this.#head}],"usage":${JSON.stringify(usage)}}\n\n`;
  }
}

interface NamedLogprob {
  token: string;
  logprob: number;
  bytes: number[];
}

function named(tokenId: number, logprob: number, names: TokenNames): NamedLogprob {
  const bytes = names.tokenBytes(tokenId);
  return { token: Buffer.from(bytes).toString('utf8'), logprob: finite(logprob), bytes: [...bytes] };
}

function top({ topIds, topLogprobs }: TokenLogprobs, names: TokenNames): NamedLogprob[] {
  const all: NamedLogprob[] = [];
  for (const [i, id] of topIds.entries()) if (id >= 0) all.push(named(id, topLogprobs[i]!, names));
  return all;
}

function chatLogprob(token: TokenLogprobs, names: TokenNames) {
  return { ...named(token.tokenId, token.logprob, names), top_logprobs: top(token, names) };
}

function completionLogprobs(tokens: readonly TokenLogprobs[], offset: number, names: TokenNames) {
  const chosen = tokens.map(({ tokenId, logprob }) => named(tokenId, logprob, names));
  let next = offset;
  return {
    tokens: chosen.map(({ token }) => token),
    token_logprobs: chosen.map(({ logprob }) => logprob),
    token_ids: tokens.map(({ tokenId }) => tokenId),
    top_logprobs: tokens.map((token) =>
      token.topIds.length === 0
        ? null
        : Object.fromEntries(top(token, names).map(({ token: name, logprob }) => [name, logprob])),
    ),
    text_offset: chosen.map(({ token }) => {
      const begin = next;
      next += token.length;
      return begin;
    }),
  };
}

/** JSON has no infinity; vLLM's floor for an impossible token. */
function finite(logprob: number): number {
  return Number.isFinite(logprob) ? logprob : -9999;
}
