/**
 * Tool calls in the form that the model's chat template teaches. A grammar holds a call to that form and its arguments to the
 * tool's schema, from where the call begins (`auto`), or makes the model call (`required`, a named tool). So reading the text back needs
 * no repair: `ToolCallReader` follows the same form, piece by piece.
 *
 * | form    | the template has  | a call                                                                        |
 * |---------|-------------------|-------------------------------------------------------------------------------|
 * | hermes  | `<tool_call>`     | `<tool_call>⏎{"name": "f", "arguments": {…}}⏎</tool_call>`, any number of them |
 * | mistral | `[TOOL_CALLS]`    | `[TOOL_CALLS][{"name": "f", "arguments": {…}}, …]`                             |
 * | llama3  | `"parameters"`    | `{"name": "f", "parameters": {…}}` and nothing else                           |
 *
 * A template that does not know tools at all gets Hermes' form, which its first message then explains (`explainTools`).
 */
import { randomBytes } from 'node:crypto';
import { EngineError, invalidValue } from '../errors.ts';
import type { ChatMessage } from '../openai.ts';
import { type GrammarSource, larkString, maxGrammarCharacters, schemaText } from './output-format.ts';

export type ToolForm = 'hermes' | 'mistral' | 'llama3';

interface FormText {
  /** Begins a call, or the list of them. */
  trigger: string;
  /** Stands between the trigger and the first call. */
  open: string;
  /** Between a name and its arguments. */
  argumentsKey: string;
  /** Behind a call. */
  close: string;
  /** Between two calls; null: there is only one. */
  separator: string | null;
  /** Behind the last call. */
  end: string;
}

const forms: Record<ToolForm, FormText> = {
  hermes: {
    trigger: '<tool_call>',
    open: '\n',
    argumentsKey: 'arguments',
    close: '}\n</tool_call>',
    separator: '\n<tool_call>\n',
    end: '',
  },
  mistral: {
    trigger: '[TOOL_CALLS]',
    open: '[',
    argumentsKey: 'arguments',
    close: '}',
    separator: ', ',
    end: ']',
  },
  llama3: { trigger: '', open: '', argumentsKey: 'parameters', close: '}', separator: null, end: '' },
};

/** The form that a chat template teaches. */
export function toolFormOf(template: string): ToolForm {
  if (template.includes('<tool_call>')) return 'hermes';
  if (template.includes('[TOOL_CALLS]')) return 'mistral';
  return template.includes('tools') && /["']parameters["']/.test(template) ? 'llama3' : 'hermes';
}

export interface Tool {
  name: string;
  /** A JSON schema of an object. */
  parameters: Record<string, unknown>;
  /** Where the request has it. */
  field: string;
}

export interface ToolUse {
  tools: Tool[];
  /** `required`: at least one call, and no other text. */
  choice: 'auto' | 'required';
  isParallel: boolean;
}

const maxTools = 128;

/**
 * What a chat request's tools come to; null: none are called.
 * @throws EngineError invalid_value
 */
export function parseToolUse(body: Record<string, unknown>): ToolUse | null {
  const { tools = null, tool_choice: asked = null, parallel_tool_calls: parallel = null } = body;
  if (parallel !== null && typeof parallel !== 'boolean')
    throw invalidValue('parallel_tool_calls', 'expected true or false', parallel);
  const isGood = asked === null || ['none', 'auto', 'required'].includes(asked as string) || isObject(asked);
  if (!isGood)
    throw invalidValue('tool_choice', 'expected none, auto, required, or an object that names a tool', asked);
  if (!Array.isArray(tools) || tools.length === 0) {
    if (asked === null || asked === 'none' || asked === 'auto') return null;
    throw invalidValue('tools', 'expected at least one beside tool_choice', tools);
  }
  if (asked === 'none') return null;
  if (tools.length > maxTools)
    throw invalidValue('tools', `expected at most ${maxTools} that may be called`, tools);
  const known = tools.map(parseTool);
  const twice = known.find(({ name }, i) => known.findIndex((tool) => tool.name === name) < i);
  if (twice) throw invalidValue('tools', 'expected one tool of a name', twice.name);
  if (!isObject(asked))
    return { tools: known, choice: asked === 'required' ? 'required' : 'auto', isParallel: parallel ?? true };
  const name = isObject(asked.function) ? asked.function.name : undefined;
  const chosen = known.find((tool) => tool.name === name);
  if (!chosen) throw invalidValue('tool_choice.function.name', 'expected the name of one of the tools', name);
  return { tools: [chosen], choice: 'required', isParallel: false };
}

function parseTool(tool: unknown, index: number): Tool {
  const field = `tools[${index}]`;
  if (!isObject(tool)) throw invalidValue(field, 'expected an object', tool);
  if (tool.type !== 'function') throw invalidValue(`${field}.type`, 'expected function', tool.type);
  const { function: described } = tool;
  if (!isObject(described)) throw invalidValue(`${field}.function`, 'expected an object', described);
  const { name, parameters = null } = described;
  if (typeof name !== 'string' || !/^[\w.-]{1,64}$/.test(name)) {
    const expected = 'expected 1 to 64 letters, digits, underscores, dots or dashes';
    throw invalidValue(`${field}.function.name`, expected, name);
  }
  const schema = parameters ?? {};
  if (!isObject(schema) || (schema.type ?? 'object') !== 'object') {
    throw invalidValue(`${field}.function.parameters`, 'expected a JSON schema of type object', parameters);
  }
  return { name, parameters: { ...schema, type: 'object' }, field: `${field}.function.parameters` };
}

/**
 * The grammar of an output that may call tools, or must.
 * @param tokenOf  the id of a special token that a text is, or null: such a token is not text to a grammar
 */
export function toolGrammar(
  { tools, choice, isParallel }: ToolUse,
  form: ToolForm,
  tokenOf: (text: string) => number | null,
): GrammarSource {
  const { trigger, open, argumentsKey, close, separator, end } = forms[form];
  const literal = (text: string) => {
    // Special tokens are tokens of their own in the middle of text.
    const parts = text.split(/(<\/?tool_call>|\[TOOL_CALLS\])/).filter((part) => part !== '');
    return parts
      .map((part) => {
        const id = tokenOf(part);
        return id === null ? larkString(part) : `<[${id}]>`;
      })
      .join(' ');
  };
  const lines = tools.map(({ name, parameters, field }, i) => {
    const head = larkString(`{"name": "${name}", "${argumentsKey}": `);
    return `call_${i}: ${head} %json ${schemaText(parameters, field)}`;
  });
  const call = `(${tools.map((_, i) => `call_${i}`).join(' | ')}) ${literal(close)}`;
  const more = isParallel && separator !== null ? `(${literal(separator)} call)*` : '';
  lines.push(`call: ${call}`, `calls: ${literal(open)} call ${more} ${literal(end)}`);
  const triggerToken = trigger === '' ? null : tokenOf(trigger);
  if (choice === 'required') lines.push(`start: ${literal(trigger)} calls`);
  else if (trigger === '') lines.push('start: calls | text', 'text: TEXT', 'TEXT: /([^{](.|\\n)*)?/');
  else {
    lines.push('start: text | begin calls', 'text: TEXT', 'TEXT: /(.|\\n)*/');
    if (triggerToken === null) lines.push(`begin[lazy]: TEXT ${larkString(trigger)}`);
    else lines.push(`begin: TEXT <[${triggerToken}]>`);
  }
  const text = lines.join('\n');
  if (text.length <= maxGrammarCharacters) return { kind: 'lark', text, field: 'tools' };
  const message = `tools: expected at most ${maxGrammarCharacters} characters of schemas, got ${text.length}`;
  throw new EngineError('invalid_value', message, { param: 'tools' });
}

/** A part of what an assistant says: text, the beginning of a call, or more of a call's arguments. */
export type ToolPart =
  | { content: string }
  | { call: number; id: string; name: string }
  | { call: number; arguments: string };

/** Reads text and calls out of an output that follows toolGrammar, as it comes. One a choice. */
export class ToolCallReader {
  readonly #form: FormText;
  readonly #newId: () => string;
  readonly #head: RegExp;
  #state: 'text' | 'head' | 'arguments' | 'between' = 'text';
  /** Came, and is not told: it may be the beginning of something. */
  #held = '';
  #isAtStart = true;
  /** Of the arguments so far. */
  #depth = 0;
  #isInString = false;
  #isEscaped = false;
  numCalls = 0;

  constructor(form: ToolForm) {
    this.#form = forms[form];
    this.#head = new RegExp(`^[\\s[,]*\\{"name": "([^"]*)", "${this.#form.argumentsKey}": `);
    // Mistral's templates take nine letters and digits, no more.
    this.#newId =
      form === 'mistral'
        ? () => randomBytes(8).toString('hex').slice(0, 9)
        : () => `call_${randomBytes(12).toString('hex')}`;
  }

  push(text: string): ToolPart[] {
    this.#held += text;
    const parts: ToolPart[] = [];
    while (this.#step(parts));
    return parts;
  }

  /** What is left when the output has ended. */
  finish(): ToolPart[] {
    const held = this.#held;
    this.#held = '';
    const isText = this.#state === 'text' || (this.#state === 'head' && this.numCalls === 0);
    return isText && held !== '' ? [{ content: held }] : [];
  }

  /** @returns whether there may be more to do */
  #step(parts: ToolPart[]): boolean {
    if (this.#state === 'text') return this.#readText(parts);
    if (this.#state === 'arguments') return this.#readArguments(parts);
    if (this.#state === 'between') return this.#readBetween();
    const head = this.#head.exec(this.#held);
    if (!head) return false;
    this.#held = this.#held.slice(head[0].length);
    parts.push({ call: this.numCalls++, id: this.#newId(), name: head[1]! });
    this.#state = 'arguments';
    return true;
  }

  #readText(parts: ToolPart[]): boolean {
    const { trigger } = this.#form;
    if (this.#held === '') return false;
    if (trigger === '') {
      // A call is all there is, so the first character decides.
      if (this.#isAtStart && this.#held.startsWith('{')) this.#state = 'head';
      else parts.push({ content: this.#held });
      this.#isAtStart = false;
      if (this.#state === 'text') this.#held = '';
      return this.#state === 'head';
    }
    const at = this.#held.indexOf(trigger);
    const end = at >= 0 ? at : this.#held.length - lengthOfBeginning(this.#held, trigger);
    if (end > 0) parts.push({ content: this.#held.slice(0, end) });
    this.#held = this.#held.slice(at >= 0 ? at + trigger.length : end);
    if (at >= 0) this.#state = 'head';
    return at >= 0;
  }

  #readArguments(parts: ToolPart[]): boolean {
    let end = 0;
    while (end < this.#held.length) {
      const character = this.#held[end++]!;
      if (this.#isEscaped) this.#isEscaped = false;
      else if (this.#isInString) {
        if (character === '\\') this.#isEscaped = true;
        else if (character === '"') this.#isInString = false;
      } else if (character === '"') this.#isInString = true;
      else if (character === '{' || character === '[') this.#depth++;
      else if ((character === '}' || character === ']') && --this.#depth === 0) {
        this.#state = 'between';
        break;
      }
    }
    if (end > 0) parts.push({ call: this.numCalls - 1, arguments: this.#held.slice(0, end) });
    this.#held = this.#held.slice(end);
    return this.#state === 'between';
  }

  /** Behind a call comes what separates it from the next one, or nothing. */
  #readBetween(): boolean {
    const { close, separator } = this.#form;
    if (separator === null || !this.#held.startsWith(close + separator)) return false;
    this.#held = this.#held.slice(close.length + separator.length);
    this.#state = 'head';
    return true;
  }
}

/** How many characters at the end of `text` may be the beginning of `word`. */
function lengthOfBeginning(text: string, word: string): number {
  for (let length = Math.min(word.length - 1, text.length); length > 0; length--)
    if (text.endsWith(word.slice(0, length))) return length;
  return 0;
}

/** For a template that does not know tools: Hermes' words in the system message, and calls and results as text. */
export function explainTools(
  messages: readonly ChatMessage[],
  tools: readonly unknown[] | null,
): ChatMessage[] {
  const told = messages.map(toText);
  if (!tools) return told;
  const list = tools.map((tool) => JSON.stringify(tool)).join('\n');
  const words =
    '# Tools\n\nYou may call one or more functions to assist with the user query.\n\n' +
    `You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n${list}\n</tools>\n\n` +
    'For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\n' +
    '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>';
  const [first] = told;
  if (first?.role !== 'system') return [{ role: 'system', content: words }, ...told];
  return [{ ...first, content: `${first.content ?? ''}\n\n${words}` }, ...told.slice(1)];
}

function toText(message: ChatMessage): ChatMessage {
  if (message.role === 'tool') {
    return { role: 'user', content: `<tool_response>\n${message.content ?? ''}\n</tool_response>` };
  }
  if (!Array.isArray(message.tool_calls)) return message;
  const calls = message.tool_calls.map((call) => {
    const { name, arguments: given } =
      (call as { function?: { name?: unknown; arguments?: unknown } })?.function ?? {};
    const text = typeof given === 'string' ? given : JSON.stringify(given ?? {});
    return `<tool_call>\n{"name": ${JSON.stringify(name ?? '')}, "arguments": ${text}}\n</tool_call>`;
  });
  return { role: message.role, content: [message.content, ...calls].filter((part) => part).join('\n') };
}

const isObject = (value: unknown): value is Record<string, unknown> =>
  typeof value === 'object' && value !== null && !Array.isArray(value);
