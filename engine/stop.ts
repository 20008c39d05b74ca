/**
 * Why a sequence ends. Tokens decide first (end token, stop token, length); stop strings are found in the text, which
 * may cross token borders, so text is held back as long as its end could begin a stop string, and no longer.
 */
import type { SamplingParams } from './sampling.ts';

/** OpenAI's words; `abort` is vLLM's for a client that went away, `error` for a failed step. */
export type FinishReason = 'stop' | 'length' | 'abort' | 'error';

export interface TokenStop {
  finishReason: 'stop' | 'length';
  /** The stop token when the client named it (vLLM's stop_reason); null for the model's own end token and for length. */
  stopReason: number | null;
}

/**
 * Whether `token`, just appended as output token number `numOutputTokens`, ends the sequence.
 * A stop token wins over length: both at once report `stop`, as OpenAI does.
 */
export function stopAtToken(
  token: number,
  numOutputTokens: number,
  maxOutputTokens: number,
  params: SamplingParams,
  eosTokenIds: ReadonlySet<number>,
): TokenStop | null {
  if (numOutputTokens > params.minTokens) {
    if (params.stopTokenIds.includes(token)) return { finishReason: 'stop', stopReason: token };
    if (!params.ignoreEos && eosTokenIds.has(token)) return { finishReason: 'stop', stopReason: null };
  }
  if (numOutputTokens >= maxOutputTokens) return { finishReason: 'length', stopReason: null };
  return null;
}

/** Looks for stop strings in text that arrives piece by piece. */
export class StopStrings {
  readonly #strings: readonly string[];
  readonly #includeStop: boolean;
  #held = '';
  /** The stop string that was found, if one was. */
  found: string | null = null;

  constructor(strings: readonly string[], includeStop: boolean) {
    this.#strings = strings;
    this.#includeStop = includeStop;
  }

  /** @returns the text that may go out now; up to the stop string when `found` is set. */
  push(piece: string): string {
    if (this.#strings.length === 0) return piece;
    const text = this.#held + piece;
    const stop = firstOf(this.#strings, text);
    if (stop) {
      this.#held = '';
      this.found = stop.found;
      return text.slice(0, stop.at + (this.#includeStop ? stop.found.length : 0));
    }
    const numHeld = longestBeginning(this.#strings, text);
    this.#held = numHeld === 0 ? '' : text.slice(-numHeld);
    return text.slice(0, text.length - numHeld);
  }

  /** What is still held back; the sequence ended otherwise. */
  flush(): string {
    const text = this.#held;
    this.#held = '';
    return text;
  }
}

/** The stop string that begins first; of two that begin together, the longer. */
function firstOf(strings: readonly string[], text: string): { at: number; found: string } | null {
  let best: { at: number; found: string } | null = null;
  for (const found of strings) {
    const at = text.indexOf(found);
    if (at < 0) continue;
    if (!best || at < best.at || (at === best.at && found.length > best.found.length)) best = { at, found };
  }
  return best;
}

/** Length of the longest end of `text` that begins one of the strings. */
function longestBeginning(strings: readonly string[], text: string): number {
  let longest = 0;
  for (const string of strings) {
    for (let length = Math.min(string.length - 1, text.length); length > longest; length--) {
      if (text.endsWith(string.slice(0, length))) {
        longest = length;
        break;
      }
    }
  }
  return longest;
}
