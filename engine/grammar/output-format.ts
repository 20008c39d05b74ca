/**
 * What an output must look like, as clients ask for it: OpenAI's `response_format`, and vLLM's `structured_outputs` and
 * `guided_…`. All become one source text for a grammar. Whether the library can follow it shows when it is compiled; nothing that it
 * cannot follow is passed over.
 */
import type { GrammarKind } from '../../native/index.ts';
import { EngineError, invalidValue } from '../errors.ts';
import { lowerSchema } from './lower-schema.ts';

/** A grammar to be compiled, and the field of the request that asked for it. */
export interface GrammarSource {
  kind: GrammarKind;
  text: string;
  field: string;
}

/** Of a schema, an expression, a grammar, or all tools of a request. */
export const maxGrammarCharacters = 256 * 1024;
const maxChoices = 1024;

/** Fields of a body that ask for a form, as vLLM names them; response_format is read apart. */
const vllmFields = ['guided_json', 'guided_regex', 'guided_choice', 'guided_grammar', 'structured_outputs'];

/** The form that a body asks for; null: any text.  @throws EngineError invalid_value, unsupported_parameter */
export function parseOutputFormat(body: Record<string, unknown>): GrammarSource | null {
  const sources = [
    parseResponseFormat(body.response_format ?? null),
    ...vllmFields.map((field) => parseVllm(field, body[field] ?? null)),
  ].filter((source) => source !== null);
  if (sources.length <= 1) return sources[0] ?? null;
  throw new EngineError('invalid_value', `${sources[1]!.field}: expected none beside ${sources[0]!.field}`, {
    param: sources[1]!.field,
  });
}

function parseResponseFormat(format: unknown): GrammarSource | null {
  if (format === null) return null;
  if (!isObject(format)) throw invalidValue('response_format', 'expected an object', format);
  const { type } = format;
  if (type === 'text') return null;
  if (type === 'json_object') return jsonSource({ type: 'object' }, 'response_format');
  if (type !== 'json_schema') {
    throw invalidValue('response_format.type', 'expected text, json_object or json_schema', type);
  }
  const field = 'response_format.json_schema';
  const { json_schema: named } = format;
  if (!isObject(named)) throw invalidValue(field, 'expected an object', named);
  if (typeof named.name !== 'string' || !/^[\w-]{1,64}$/.test(named.name)) {
    throw invalidValue(
      `${field}.name`,
      'expected 1 to 64 letters, digits, underscores or dashes',
      named.name,
    );
  }
  return jsonSource(named.schema, `${field}.schema`);
}

function parseVllm(field: string, value: unknown): GrammarSource | null {
  if (value === null) return null;
  if (field === 'guided_json') return jsonSource(value, field);
  if (field === 'guided_regex') return textSource('regex', value, field);
  if (field === 'guided_choice') return choiceSource(value, field);
  if (field === 'guided_grammar') return textSource('lark', value, field);
  if (!isObject(value)) throw invalidValue(field, 'expected an object', value);
  const asked = Object.entries(value).filter(([, part]) => part !== null && part !== false);
  const [first] = asked;
  if (asked.length !== 1 || !first) {
    const expected = 'expected exactly one of json, regex, choice, grammar, json_object';
    throw invalidValue(field, expected, asked.map(([key]) => key).join(', ') || undefined);
  }
  const [key, part] = first;
  if (key === 'json_object') return jsonSource({ type: 'object' }, `${field}.json_object`);
  if (!['json', 'regex', 'choice', 'grammar'].includes(key)) {
    const message = `${field}.${key}: only json, regex, choice, grammar and json_object are supported`;
    throw new EngineError('unsupported_parameter', message, { param: field });
  }
  return { ...parseVllm(`guided_${key}`, part)!, field: `${field}.${key}` };
}

/** @param schema  an object, a boolean, or either as text */
function jsonSource(schema: unknown, field: string): GrammarSource {
  return { kind: 'json_schema', text: bounded(schemaText(schema, field), field), field };
}

/**
 * A schema as the library is to compile it. White space is bounded, or a model that found no end could write it for ever.
 * @throws EngineError invalid_value naming `field`
 */
export function schemaText(schema: unknown, field: string): string {
  let value = schema;
  if (typeof value === 'string') {
    try {
      value = JSON.parse(value);
    } catch {
      throw invalidValue(field, 'expected a JSON schema', schema);
    }
  }
  if (typeof value === 'boolean') value = { anyOf: [value] };
  if (!isObject(value)) throw invalidValue(field, 'expected a JSON schema: an object, true or false', schema);
  // Ours, whatever the caller's says: it could make the library pass over what it cannot follow.
  return JSON.stringify({ ...lowerSchema(value), 'x-guidance': jsonOptions });
}

const jsonOptions = { whitespace_pattern: '[ \\n]{1,24}' };

function textSource(kind: 'regex' | 'lark', text: unknown, field: string): GrammarSource {
  if (typeof text !== 'string' || text === '') throw invalidValue(field, 'expected a string', text);
  return { kind, text: bounded(text, field), field };
}

function choiceSource(choices: unknown, field: string): GrammarSource {
  const isGood =
    Array.isArray(choices) &&
    choices.length > 0 &&
    choices.length <= maxChoices &&
    choices.every((choice) => typeof choice === 'string' && choice !== '');
  if (!isGood) throw invalidValue(field, `expected 1 to ${maxChoices} strings, none empty`, choices);
  const text = `start: ${choices.map((choice) => larkString(choice)).join(' | ')}`;
  return { kind: 'lark', text: bounded(text, field), field };
}

/** A string of a grammar in Lark. */
export const larkString = (text: string) => JSON.stringify(text);

function bounded(text: string, field: string): string {
  if (text.length <= maxGrammarCharacters) return text;
  const got = `${text.length}`;
  throw new EngineError(
    'invalid_value',
    `${field}: expected at most ${maxGrammarCharacters} characters, got ${got}`,
    { param: field },
  );
}

const isObject = (value: unknown): value is Record<string, unknown> =>
  typeof value === 'object' && value !== null && !Array.isArray(value);
