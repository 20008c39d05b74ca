/**
 * Messages to prompt text by the model's own Jinja template, with what transformers gives templates: messages, tools,
 * add_generation_prompt, the begin and end tokens, raise_exception, strftime_now. A template is code from a file, run on
 * text from a caller, so its time and its ranges are bounded.
 */
import vm from 'node:vm';
import { Environment, Interpreter, Template } from '@huggingface/jinja';
import { EngineError } from '../errors.ts';
import type { ChatMessage } from '../openai.ts';

export interface RenderOptions {
  tools: unknown[] | null;
  addGenerationPrompt: boolean;
  /** The caller's own variables (chat_template_kwargs); those above win. */
  variables: Record<string, unknown>;
}

/** Longer than any template known (some 30 kB) by far. */
const maxTemplateLength = 1 << 20;
/** Jinja's own sandbox has the same bound. */
const maxRange = 100_000;
/** Rendering takes about a millisecond per 100 messages. */
const maxRenderMs = 2000;

export class ChatTemplate {
  readonly #program: Template['parsed'];
  readonly #tokens: { bos_token: string; eos_token: string };
  readonly #wantsParts: boolean;
  /** A call inside a context can be stopped after a time, wherever the functions it calls are from. */
  readonly #context = vm.createContext({ run: null as (() => string) | null });

  /** @throws Error when the text is no Jinja template */
  constructor(source: string, tokens: { bosToken: string | null; eosToken: string | null }) {
    if (source.length > maxTemplateLength) {
      throw new Error(
        `chat template: expected at most ${maxTemplateLength} characters, got ${source.length}`,
      );
    }
    this.#program = new Template(source).parsed;
    this.#tokens = { bos_token: tokens.bosToken ?? '', eos_token: tokens.eosToken ?? '' };
    this.#wantsParts = wantsParts(source);
  }

  /** @throws EngineError invalid_value when the template refuses the messages or fails on them */
  render(messages: readonly ChatMessage[], { tools, addGenerationPrompt, variables }: RenderOptions): string {
    const environment = new Environment();
    const values = {
      ...variables,
      ...this.#tokens,
      ...globals,
      messages: messages.map((message) => toTemplateMessage(message, this.#wantsParts)),
      tools,
      add_generation_prompt: addGenerationPrompt,
    };
    try {
      for (const [name, value] of Object.entries(values)) environment.set(name, value);
      this.#context.run = () => String(new Interpreter(environment).run(this.#program).value);
      return callRun.runInContext(this.#context, { timeout: maxRenderMs }) as string;
    } catch (cause) {
      throw new EngineError(
        'invalid_value',
        `messages: the model's chat template refuses them: ${messageOf(cause)}`,
        {
          param: 'messages',
          cause,
        },
      );
    } finally {
      this.#context.run = null;
    }
  }
}

const callRun = new vm.Script('run()');

/** One line, not too long: it goes into a reply. */
const messageOf = (thrown: unknown) =>
  String((thrown as Error)?.message ?? thrown)
    .replace(/\s+/g, ' ')
    .slice(0, 300);

const globals = {
  true: true,
  True: true,
  false: false,
  False: false,
  none: null,
  None: null,
  raise_exception: (message: string) => {
    throw new Error(message);
  },
  range: (first: number, second?: number, step = 1) => {
    const [start, stop] = second === undefined ? [0, first] : [first, second];
    const length = Math.ceil((stop - start) / step);
    if (!(length <= maxRange)) throw new Error(`range: expected at most ${maxRange} numbers, got ${length}`);
    return Array.from({ length: Math.max(0, length) }, (_, i) => start + i * step);
  },
  strftime_now: (format: string) => strftime(new Date(), format),
};

/** The directives that chat templates use; others stand as they are. */
export function strftime(date: Date, format: string): string {
  const two = (value: number) => String(value).padStart(2, '0');
  const name = (options: Intl.DateTimeFormatOptions) =>
    new Intl.DateTimeFormat('en-US', options).format(date);
  const values: Record<string, () => string> = {
    a: () => name({ weekday: 'short' }),
    A: () => name({ weekday: 'long' }),
    b: () => name({ month: 'short' }),
    B: () => name({ month: 'long' }),
    d: () => two(date.getDate()),
    H: () => two(date.getHours()),
    I: () => two(date.getHours() % 12 || 12),
    m: () => two(date.getMonth() + 1),
    M: () => two(date.getMinutes()),
    p: () => (date.getHours() < 12 ? 'AM' : 'PM'),
    S: () => two(date.getSeconds()),
    y: () => two(date.getFullYear() % 100),
    Y: () => String(date.getFullYear()),
    '%': () => '%',
  };
  return format.replace(/%(.)/g, (all, letter: string) => values[letter]?.() ?? all);
}

/** Whether the template goes over a message's content as a list and has no way for a string. */
const wantsParts = (source: string) =>
  /\bin\s+message(?:\.content|\[['"]content['"]\])/.test(source) && !/is\s+(?:not\s+)?string/.test(source);

function toTemplateMessage(message: ChatMessage, asParts: boolean): Record<string, unknown> {
  const content = message.content as unknown;
  const text = Array.isArray(content) ? content.map((part) => part?.text ?? '').join('\n') : content;
  const parts = Array.isArray(content) ? content : [{ type: 'text', text: content }];
  return {
    ...message,
    content: asParts && content !== null ? parts : text,
    ...(Array.isArray(message.tool_calls) ? { tool_calls: message.tool_calls.map(withParsedArguments) } : {}),
  };
}

/** OpenAI sends a call's arguments as JSON text; templates expect the object. */
function withParsedArguments(call: unknown): unknown {
  const { function: called } = (call ?? {}) as { function?: { arguments?: unknown } };
  if (typeof called?.arguments !== 'string') return call;
  try {
    return { ...(call as object), function: { ...called, arguments: JSON.parse(called.arguments) } };
  } catch {
    return call; // text that is no JSON stays text
  }
}
