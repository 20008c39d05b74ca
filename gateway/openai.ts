// The public API's bodies as far as the gateway reads them: it needs the model's name and a field or two. The body
// goes to the engine byte for byte, so a field that only the engine knows needs no change here.

import { fieldOf, type MergeRule, readComposed, type WeightedName } from '../engine/protocol.ts';
import { GatewayError } from './errors.ts';
import { isNestedDeeper } from './protocols/nesting.ts';

/** A longer name is cut in messages, so that an error is not a way to make the gateway repeat a whole body. */
const shownNameLength = 200;
/** Arrays and objects within each other; JSON schemas of tools are the deepest that clients have cause to send. */
const maxNesting = 128;

const utf8 = new TextDecoder('utf-8', { fatal: true });

export function parseContentType(value: string | undefined): void {
  if (value === 'application/json') return;
  const type = value?.split(';')[0]?.trim().toLowerCase();
  if (type !== 'application/json') {
    throw new GatewayError(
      'invalid_content_type',
      `Content-Type: expected application/json, got ${value === undefined ? 'none' : JSON.stringify(shown(value))}`,
    );
  }
}

/** What the gateway reads of a request body. Everything else is the engine's to judge. */
export type Asked = {
  model: string;
  /** Those that answer together in place of the model. Default none. */
  adapters?: readonly WeightedName[];
  /** How those are merged. Default: they are a sum. */
  merge?: MergeRule;
  /** Who the client says asks; null when it does not say. */
  user: string | null;
  isStream: boolean;
  /** Most tokens of one answer; null when it does not say. */
  maxTokens: number | null;
  /** Answers that it asks for. */
  numChoices: number;
};

export function parseAsked(body: Uint8Array): Asked {
  const value = parseJsonObject(body);
  const together = togetherIn(value);
  if (together.adapters) value.model ??= together.adapters.map(({ name }) => name).join('+');
  if (!('model' in value)) {
    throw new GatewayError('missing_required_parameter', 'model: expected the name of a model, got nothing', {
      param: 'model',
    });
  }
  const { model } = value;
  if (typeof model !== 'string') {
    throw new GatewayError('invalid_type', `model: expected a string, got ${typeName(model)}`, {
      param: 'model',
    });
  }
  if (model === '') {
    throw new GatewayError('invalid_type', 'model: expected the name of a model, got an empty string', {
      param: 'model',
    });
  }
  const { user, stream, n, max_tokens, max_completion_tokens } = value;
  return {
    model,
    ...together,
    user: typeof user === 'string' && user !== '' ? user : null,
    isStream: stream === true,
    maxTokens: positiveInteger(max_completion_tokens) ?? positiveInteger(max_tokens),
    numChoices: positiveInteger(n) ?? 1,
  };
}

/** An engine would take them from the body: what a body says of them is never passed over. */
function togetherIn(body: Record<string, unknown>): Pick<Asked, 'adapters' | 'merge'> {
  const read = readComposed(body);
  if (read === null) return {};
  if ('adapters' in read)
    return { adapters: read.adapters, ...(read.merge !== null && { merge: read.merge }) };
  const { at, expected, got } = read;
  throw new GatewayError('invalid_value', `${at}: expected ${expected}, got ${got}`, {
    param: fieldOf(read),
  });
}

/** Null for what is none: that is the engine's to refuse. */
function positiveInteger(value: unknown): number | null {
  return Number.isSafeInteger(value) && (value as number) > 0 ? (value as number) : null;
}

export function parseJsonObject(body: Uint8Array): Record<string, unknown> {
  const value = parseJson(body);
  if (value === null || typeof value !== 'object' || Array.isArray(value)) {
    throw new GatewayError('invalid_type', `request body: expected a JSON object, got ${typeName(value)}`);
  }
  return value as Record<string, unknown>;
}

export function modelNotFound(model: string, param = 'model'): GatewayError {
  return new GatewayError('model_not_found', `The model \`${shown(model)}\` does not exist.`, { param });
}

export function noEngineReady(): GatewayError {
  return new GatewayError('no_engine_ready', 'no engine has answered so far');
}

function parseJson(body: Uint8Array): unknown {
  let text: string;
  try {
    text = utf8.decode(body);
  } catch (cause) {
    throw new GatewayError('invalid_utf8', 'request body: expected UTF-8, got other bytes', { cause });
  }
  if (isNestedDeeper(body, maxNesting)) {
    throw new GatewayError(
      'invalid_json',
      `request body: expected at most ${maxNesting} arrays and objects within each other, got more`,
    );
  }
  try {
    return JSON.parse(text);
  } catch (cause) {
    // V8's message quotes the text around the fault. It goes back to the one who sent it, and not into the log.
    throw new GatewayError('invalid_json', `request body: expected JSON; ${(cause as Error).message}`);
  }
}

function shown(name: string): string {
  return name.length > shownNameLength ? `${name.slice(0, shownNameLength)}…` : name;
}

function typeName(value: unknown): string {
  if (value === null) return 'null';
  return Array.isArray(value) ? 'an array' : `a ${typeof value}`.replace(/^a (?=[aeiou])/, 'an ');
}
