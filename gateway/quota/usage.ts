// What an answer cost in tokens. An engine of ours says so in a header or a trailer; of others the answer's own `usage` is
// read, which OpenAI's shape has at the end of a whole answer and, if the client asked for it, in the last event of a
// stream. A stream that says neither, or that was broken off, is counted by its events, one token each, and its prompt by its
// length: that is an estimate, and says so.

import { parseUsage, type TokenUsage } from '../../engine/protocol.ts';

/** `isEstimate`: counted by events and bytes, since nobody said. */
export type Usage = TokenUsage & { isEstimate: boolean };

/** Bytes of a request body that make one prompt token, about: English text in JSON. */
const bytesPerToken = 4;
/** How many places of an answer are looked at that may be its `usage`: a token's text may be that word too. */
const maxPlaces = 4;
/** A `usage` object is shorter than this. */
const maxUsageBytes = 2_048;

export function estimatePromptTokens(bodyBytes: number): number {
  return Math.ceil(bodyBytes / bytesPerToken);
}

/**
 * Of a whole answer; null when it does not say, as an error does not.
 *
 * @param header  value of `x-motet-usage`
 */
export function usageOfAnswer(header: unknown, body: Buffer): Usage | null {
  const told = parseUsage(header) ?? findUsage(body);
  return told && { ...told, isEstimate: false };
}

/** Follows the events of one stream as they are sent to the client. */
export class StreamUsage {
  readonly #promptBytes: number;
  #numTokens = 0;
  /** The last that the events said. */
  #told: TokenUsage | null = null;

  constructor(bodyBytes: number) {
    this.#promptBytes = bodyBytes;
  }

  /** @param events  bytes of whole events */
  push(events: Buffer): void {
    for (let begin = events.indexOf('data:'); begin >= 0; ) {
      const next = events.indexOf('\ndata:', begin);
      const event = events.subarray(begin, next < 0 ? events.length : next);
      if (hasToken(event)) this.#numTokens += 1;
      if (event.includes('"usage":')) this.#told = findUsage(event) ?? this.#told;
      begin = next < 0 ? -1 : next + 1;
    }
  }

  /** @param trailer  value of `x-motet-usage`, if it came */
  usage(trailer?: unknown): Usage {
    const told = parseUsage(trailer) ?? this.#told;
    if (told !== null) return { ...told, isEstimate: false };
    return {
      promptTokens: estimatePromptTokens(this.#promptBytes),
      cachedTokens: 0,
      completionTokens: this.#numTokens,
      isEstimate: true,
    };
  }
}

/** Events that only open or close a choice, end the stream or tell an error bring no token. */
function hasToken(event: Buffer): boolean {
  if (event.includes('"delta":{}') || event.includes('"content":""') || event.includes('"choices":[]'))
    return false;
  return event.includes('"choices":[');
}

/**
 * The last `usage` object of a JSON text. The text is not parsed, since it may be long. Inside of a JSON string a quote is
 * escaped, so what is found is a key.
 */
function findUsage(json: Buffer): TokenUsage | null {
  let end = json.length;
  for (let place = 0; place < maxPlaces && end > 0; place += 1) {
    const key = json.lastIndexOf('"usage"', end - 1);
    if (key < 0) return null;
    const usage = readUsage(json.toString('latin1', key + '"usage"'.length, key + maxUsageBytes));
    if (usage !== null) return usage;
    end = key;
  }
  return null;
}

/** @param text  what follows the key: a colon and an object of numbers and of objects of numbers */
function readUsage(text: string): TokenUsage | null {
  const begin = /^\s*:\s*\{/.exec(text)?.[0].length;
  if (begin === undefined) return null;
  let depth = 1;
  let end = begin;
  for (; depth > 0 && end < text.length; end += 1) {
    if (text[end] === '{') depth += 1;
    else if (text[end] === '}') depth -= 1;
  }
  try {
    const told = JSON.parse(text.slice(begin - 1, end)) as Record<string, unknown>;
    const details = told.prompt_tokens_details as Record<string, unknown> | null | undefined;
    const promptTokens = told.prompt_tokens;
    const completionTokens = told.completion_tokens ?? 0;
    const cachedTokens = details?.cached_tokens ?? 0;
    return isCount(promptTokens) && isCount(completionTokens) && isCount(cachedTokens)
      ? { promptTokens, cachedTokens, completionTokens }
      : null;
  } catch {
    // Not an object of numbers: another `usage` than the one that is looked for.
    return null;
  }
}

function isCount(value: unknown): value is number {
  return Number.isSafeInteger(value) && (value as number) >= 0;
}
