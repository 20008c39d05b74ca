/**
 * Every option of `motet bench`, parsed once: name, unit, default, range. Options that would have no effect together with
 * others are refused by name, so that a report never claims a load that did not run.
 */
import { resolve } from 'node:path';
import { allLinear } from '../random-adapter.ts';
import {
  type ConversationShape,
  type Lengths,
  maxTurns,
  type Popularity,
  type ThinkTime,
} from './workload.ts';

export class OptionError extends Error {
  override name = 'OptionError';
}

/** Which of the server's adapters are used. */
export type AdapterChoice =
  | { kind: 'all' }
  | { kind: 'first'; count: number }
  | { kind: 'named'; names: string[] };

/** Who decides when a request is sent. */
export type Pacing =
  /** A client sends its next request, or begins its next conversation, when the last one has ended. */
  | { kind: 'closed'; concurrency: number }
  /** Requests arrive, or conversations begin, whether or not earlier ones have ended. */
  | { kind: 'open'; ratePerSecond: number; burstiness: number; maxInFlight: number };

/** Most that a request may take to count as good, in milliseconds. */
export interface Slo {
  /** To the first token. */
  ttft?: number;
  /** Longest pause between two pieces of text. */
  itl?: number;
  /** Mean per output token after the first. */
  tpot?: number;
  /** Whole request. */
  e2e?: number;
}

/** The server that is started when no URL is given. */
export interface OwnServerOptions {
  /** GGUF file or folder of safetensors; null: the small model that set-up fetches. */
  modelPath: string | null;
  through: 'gateway' | 'engine';
  /** Random adapters to make and load; 0: the example adapters. */
  numRegistered: number;
  rank: number;
  targets: string[];
  /** Passed to engine/main.ts as they are. */
  engineArgs: string[];
}

export interface LoadOptions {
  /** Where requests go, or what is started for them. */
  server: { url: string; apiKey: string | null } | { own: OwnServerOptions };
  endpoint: 'completions' | 'chat';
  /** Name of the base model; null: what the server lists. */
  model: string | null;
  adapters: AdapterChoice;
  adapterField: 'model' | 'llama';
  popularity: Popularity;
  baseShare: number;
  promptTokens: Lengths;
  outputTokens: Lengths;
  sharedPrefixTokens: number;
  numPrefixes: number;
  /** Prompt token ids are below it. */
  vocabSize: number;
  conversations: ConversationShape | null;
  pacing: Pacing;
  /** Single requests, or conversations. */
  numRequests: number;
  durationSeconds: number | null;
  numWarmup: number;
  seed: number;
  temperature: number;
  ignoresEos: boolean;
  timeoutMs: number;
  slo: Slo;
  jsonPath: string | null;
  hasJsonSamples: boolean;
}

interface Option<T> {
  /** What --help shows for the value; '' for a switch. */
  value: string;
  help: string;
  /** Turns the text into its value; throws what it expected. */
  parse: (text: string) => T;
  default: T;
  /** What --help shows for the default; undefined: the default itself; '': nothing. */
  defaultText?: string;
}

/** Bounds: a report holds every request in memory, and a prompt is made in one piece. */
export const maxRequests = 1_000_000;
const maxTokens = 1_000_000;
const maxThinkSeconds = 86_400;

const text = <T extends string | null>(value: string, help: string, fallback: T): Option<string | T> => ({
  value,
  help,
  default: fallback,
  parse(given) {
    if (given === '') throw new OptionError('a text that is not empty');
    return given;
  },
});

const oneOf = <const T extends string>(choices: readonly T[], help: string, fallback: T): Option<T> => ({
  value: choices.join('|'),
  help,
  default: fallback,
  parse(given) {
    const choice = choices.find((one) => one === given);
    if (choice === undefined) throw new OptionError(`one of ${choices.join(', ')}`);
    return choice;
  },
});

const integer = <T extends number | null>(
  value: string,
  help: string,
  [min, max]: [number, number],
  fallback: T,
  defaultText?: string,
): Option<number | T> => ({
  value,
  help,
  default: fallback,
  ...(defaultText === undefined ? {} : { defaultText }),
  parse: (given) => integerOf(given, min, max),
});

const number = <T extends number | null>(
  value: string,
  help: string,
  [min, max]: [number, number],
  fallback: T,
  defaultText?: string,
): Option<number | T> => ({
  value,
  help,
  default: fallback,
  ...(defaultText === undefined ? {} : { defaultText }),
  parse: (given) => numberOf(given, min, max),
});

const toggle = (help: string, fallback: boolean): Option<boolean> => ({
  value: '',
  help,
  default: fallback,
  defaultText: fallback ? `on; =false switches it off` : '',
  parse(given) {
    if (given === '' || given === 'true') return true;
    if (given === 'false') return false;
    throw new OptionError('true or false');
  },
});

const lengths = (help: string, fallback: number): Option<Lengths> => ({
  value: 'LENGTHS',
  help: `${help}: N, LO:HI (uniform) or MEAN~SD (normal, from 1 to MEAN + 4 SD)`,
  default: { kind: 'fixed', tokens: fallback },
  defaultText: String(fallback),
  parse: parseLengths,
});

const table = {
  url: {
    value: 'URL',
    help: 'an OpenAI-compatible server, with or without /v1; without it an engine and a gateway are started and ended',
    default: null,
    parse: parseUrl,
  } satisfies Option<string | null>,
  'api-key': text(
    'KEY',
    'bearer key for --url; other users of this machine can read it there, so prefer MOTET_API_KEY',
    null,
  ),
  endpoint: oneOf(
    ['completions', 'chat'],
    'completions: prompts are token ids, so lengths are exact; chat: prompts are words, one a token or so',
    'completions',
  ),
  model: text('NAME', 'the base model in the API (default: the first that the server lists)', null),
  'timeout-ms': integer(
    'MS',
    'a request that takes longer is ended and counts as failed',
    [1, 86_400_000],
    300_000,
  ),
  serve: text(
    'PATH',
    'GGUF file or folder of safetensors (default: SmolLM2-135M-Instruct from the cache)',
    null,
  ),
  through: oneOf(['gateway', 'engine'], 'whom requests are sent to', 'gateway'),
  register: integer(
    'COUNT',
    'random adapters to make and load, in place of the examples; the device memory grows with them',
    [1, 100_000],
    null,
    '',
  ),
  'register-rank': integer('RANK', 'their rank', [1, 4096], 8),
  'register-targets': {
    value: 'NAMES',
    help: 'their target modules, with commas, or all-linear',
    default: ['q_proj', 'v_proj'],
    defaultText: 'q_proj,v_proj',
    parse: parseTargets,
  } satisfies Option<string[]>,
  'prompt-tokens': lengths('tokens of a prompt, beside those of a shared prefix', 128),
  'output-tokens': lengths('tokens of an answer', 64),
  'shared-prefix-tokens': integer('COUNT', 'tokens that prompts begin with alike', [0, maxTokens], 0),
  turns: integer(
    'COUNT',
    "conversations of that many user messages: each turn sends all that was said, the server's answers too; prompt tokens are then those of the first message, a shared prefix is the system's message",
    [2, maxTurns],
    null,
    '',
  ),
  'follow-up-tokens': {
    ...lengths("tokens of a user's messages after the first", 1),
    default: null,
    defaultText: 'as --prompt-tokens',
  } satisfies Option<Lengths | null>,
  'think-time': {
    value: 'SECONDS',
    help: 'between an answer and the next turn: S always, or exp:S, exponentially distributed with that mean',
    default: { kind: 'fixed', meanSeconds: 0 },
    defaultText: '0',
    parse: parseThinkTime,
  } satisfies Option<ThinkTime>,
  'num-prefixes': integer('COUNT', 'different shared prefixes; each request takes any', [1, 100_000], 1),
  vocab: integer('COUNT', 'prompt token ids are from 10 to COUNT − 1', [11, 2 ** 24], 8192),
  adapters: {
    value: 'WHICH',
    help: 'all or the first COUNT that the server lists, NAME,NAME or none',
    default: { kind: 'all' },
    defaultText: 'all',
    parse: parseAdapters,
  } satisfies Option<AdapterChoice>,
  'adapter-popularity': {
    value: 'HOW',
    help: 'uniform; zipf:S, the k-th adapter as often as 1/k^S; each-client-its-own, client i uses adapter i of --adapters, round and round',
    default: { kind: 'uniform' },
    defaultText: 'uniform',
    parse: parsePopularity,
  } satisfies Option<Popularity>,
  'adapter-field': oneOf(
    ['model', 'llama'],
    'how a request names its adapter: model; or llama-server\'s "lora": [{"id": …}], where --adapters are ids',
    'model',
  ),
  'base-share': number('FRACTION', 'of requests that use the base without an adapter', [0, 1], null, '0'),
  temperature: number('T', 'of sampling; 0 is greedy', [0, 2], 0),
  'ignore-eos': toggle(
    'answers go on to their asked length; servers that refuse the field want =false',
    true,
  ),
  seed: integer(
    'N',
    'of prompts, lengths, adapters and arrivals; the same seed sends the same prompts, which a prefix cache may still have',
    [0, 2 ** 32 - 1],
    1,
  ),
  concurrency: integer(
    'COUNT',
    'clients, each with one request or conversation at a time (closed loop)',
    [1, 10_000],
    null,
    '8',
  ),
  rate: number(
    'PER-SECOND',
    'arrivals of requests or conversations that do not wait for answers (open loop); times then count from the scheduled arrival, so a late start is in them',
    [0.001, 100_000],
    null,
    '',
  ),
  burstiness: number(
    'SHAPE',
    'of the gamma distribution between arrivals: 1 is Poisson, less comes in bursts, more is even',
    [0.01, 1000],
    null,
    '1',
  ),
  'max-in-flight': integer(
    'COUNT',
    'with --rate: arrivals beyond it wait, and their time counts',
    [1, 100_000],
    null,
    '1024',
  ),
  requests: integer(
    'COUNT',
    'requests to send',
    [1, maxRequests],
    null,
    `64; ${maxRequests} beside --duration`,
  ),
  conversations: integer(
    'COUNT',
    'conversations to hold, in place of --requests',
    [1, maxRequests],
    null,
    'one a client; 64 beside --rate; as many as fit beside --duration',
  ),
  duration: number(
    'SECONDS',
    'stop sending after it; what is in flight may end. With --requests or --conversations, what comes first',
    [0.1, 86_400],
    null,
    '',
  ),
  warmup: integer('COUNT', 'requests before, which are not reported', [0, maxRequests], 8),
  slo: {
    value: 'LIMITS',
    help: 'ms that a good request keeps, e.g. ttft=500,itl=50,tpot=30,e2e=4000; itl is the longest pause, tpot the mean per token',
    default: {},
    defaultText: '',
    parse: parseSlo,
  } satisfies Option<Slo>,
  json: text('FILE', 'write the whole report there', null),
  'json-samples': toggle('with every request in it', false),
} satisfies Record<string, Option<unknown>>;

type Table = typeof table;
type Flag = keyof Table;
type Value<F extends Flag> = Table[F] extends Option<infer T> ? T : never;

/** What --help says before an option. */
const titles: Partial<Record<Flag, string>> = {
  url: 'Where requests go',
  serve: 'The server that is started without --url',
  'prompt-tokens': 'What is asked',
  concurrency: 'When and how much',
  slo: 'What is reported',
};

/** @returns the options, or what --help prints.  @throws OptionError with one line that says what to change */
export function parseOptions(
  args: readonly string[],
  env: Record<string, string | undefined>,
): LoadOptions | { help: string } {
  const split = args.indexOf('--');
  const ours = split < 0 ? args : args.slice(0, split);
  const engineArgs = split < 0 ? [] : args.slice(split + 1);
  if (ours.includes('--help')) return { help: helpText() };
  const given = readFlags(ours);
  const has = (flag: Flag) => given.has(flag);
  const get = <F extends Flag>(flag: F): Value<F> => {
    const option = table[flag] as Option<unknown>;
    const value = given.get(flag);
    if (value === undefined) return option.default as Value<F>;
    try {
      return option.parse(value) as Value<F>;
    } catch (error) {
      // Of a URL, without the password that it may have.
      const got = JSON.stringify(value.replace(/\/\/.*@/, '//***@'));
      throw new OptionError(`--${flag}: expected ${(error as Error).message}, got ${got}`);
    }
  };
  /** Each of the flags makes sense beside that condition only. */
  const onlyWith = (condition: boolean, what: string, ...flags: Flag[]) => {
    const wrong = flags.find((flag) => !condition && has(flag));
    if (wrong !== undefined) throw new OptionError(`--${wrong}: expected only ${what}`);
  };

  const url = get('url');
  onlyWith(
    url === null,
    'without --url',
    'serve',
    'through',
    'register',
    'register-rank',
    'register-targets',
  );
  onlyWith(url !== null, 'beside --url', 'api-key', 'model', 'adapter-field');
  if (url !== null && engineArgs.length > 0) {
    throw new OptionError(`--: expected engine arguments only without --url, got ${engineArgs.join(' ')}`);
  }
  onlyWith(has('register'), 'beside --register', 'register-rank', 'register-targets');
  onlyWith(!has('rate'), 'one of --concurrency and --rate', 'concurrency');
  onlyWith(has('rate'), 'beside --rate', 'burstiness', 'max-in-flight');
  onlyWith(get('shared-prefix-tokens') > 0, 'beside --shared-prefix-tokens', 'num-prefixes');
  onlyWith(has('json'), 'beside --json', 'json-samples');
  const numTurns = get('turns');
  onlyWith(numTurns !== null, 'beside --turns', 'follow-up-tokens', 'think-time', 'conversations');
  onlyWith(numTurns === null, 'without --turns, which has --conversations', 'requests');
  if (numTurns !== null && has('endpoint') && get('endpoint') !== 'chat') {
    throw new OptionError('--endpoint: expected chat beside --turns, got completions');
  }
  const endpoint = numTurns === null ? get('endpoint') : 'chat';
  onlyWith(endpoint === 'completions', 'beside --endpoint completions and without --turns', 'vocab');
  const adapters = get('adapters');
  const hasNone = adapters.kind === 'named' && adapters.names.length === 0;
  onlyWith(!hasNone, 'beside adapters, and --adapters is none', 'adapter-popularity', 'base-share');
  const adapterField = get('adapter-field');
  if (adapterField === 'llama' && adapters.kind === 'named') {
    const wrong = adapters.names.find((name) => !/^\d{1,6}$/.test(name));
    if (wrong !== undefined) {
      throw new OptionError(
        `--adapters: expected ids beside --adapter-field llama, got ${JSON.stringify(wrong)}`,
      );
    }
  }
  const popularity = get('adapter-popularity');
  if (popularity.kind === 'each-client-its-own') {
    onlyWith(!has('rate'), 'uniform or zipf:S beside --rate, which has no clients', 'adapter-popularity');
  }

  const rate = get('rate');
  const duration = get('duration');
  const concurrency = get('concurrency') ?? 8;
  const mostRequests = Math.floor(maxRequests / (numTurns ?? 1));
  const numRequests =
    (numTurns === null ? get('requests') : get('conversations')) ??
    (duration !== null ? mostRequests : numTurns === null || rate !== null ? 64 : concurrency);
  if (numRequests > mostRequests) {
    throw new OptionError(
      `--conversations: expected at most ${mostRequests} of ${numTurns} turns, got ${numRequests}`,
    );
  }
  return {
    server:
      url !== null
        ? { url, apiKey: get('api-key') ?? (env.MOTET_API_KEY || null) }
        : {
            own: {
              modelPath: ownPath(get('serve') ?? (env.MOTET_MODEL || null), env),
              through: get('through'),
              numRegistered: get('register') ?? 0,
              rank: get('register-rank'),
              targets: get('register-targets'),
              engineArgs,
            },
          },
    endpoint,
    model: get('model'),
    adapters,
    adapterField,
    popularity,
    baseShare: get('base-share') ?? 0,
    promptTokens: get('prompt-tokens'),
    outputTokens: get('output-tokens'),
    sharedPrefixTokens: get('shared-prefix-tokens'),
    numPrefixes: get('num-prefixes'),
    vocabSize: get('vocab'),
    conversations:
      numTurns === null
        ? null
        : {
            numTurns,
            thinkTime: get('think-time'),
            followUpTokens: get('follow-up-tokens') ?? get('prompt-tokens'),
          },
    pacing:
      rate === null
        ? { kind: 'closed', concurrency }
        : {
            kind: 'open',
            ratePerSecond: rate,
            burstiness: get('burstiness') ?? 1,
            maxInFlight: get('max-in-flight') ?? 1024,
          },
    numRequests,
    durationSeconds: duration,
    numWarmup: get('warmup'),
    seed: get('seed'),
    temperature: get('temperature'),
    ignoresEos: get('ignore-eos'),
    timeoutMs: get('timeout-ms'),
    slo: get('slo'),
    jsonPath: ownPath(get('json'), env),
    hasJsonSamples: get('json-samples'),
  };
}

/** A path of the user's is meant from where the user is; npm runs scripts from the package's folder. */
function ownPath(path: string | null, env: Record<string, string | undefined>): string | null {
  return path === null ? null : resolve(env.INIT_CWD ?? '.', path);
}

/** Flags as given, `--flag value` or `--flag=value`; a switch takes its value only with `=`. */
function readFlags(args: readonly string[]): Map<Flag, string> {
  const given = new Map<Flag, string>();
  for (let i = 0; i < args.length; i++) {
    const [, name, inline] = /^--([^=]+)(?:=(.*))?$/s.exec(args[i]!) ?? [];
    if (name === undefined) {
      throw new OptionError(`expected an option, got ${JSON.stringify(args[i])}; --help lists them`);
    }
    if (!Object.hasOwn(table, name)) throw new OptionError(`--${name}: unknown option; --help lists all`);
    const flag = name as Flag;
    const { value: shown } = table[flag];
    const value = inline ?? (shown === '' ? '' : args[++i]);
    if (value === undefined) throw new OptionError(`--${flag}: expected ${shown}, got nothing`);
    if (given.has(flag)) throw new OptionError(`--${flag}: expected once, got it twice`);
    given.set(flag, value);
  }
  return given;
}

function integerOf(given: string, min: number, max: number): number {
  const value = Number(given);
  if (!/^\d+$/.test(given) || value < min || value > max) {
    throw new OptionError(`an integer from ${min} to ${max}`);
  }
  return value;
}

function numberOf(given: string, min: number, max: number): number {
  const value = Number(given);
  if (!/^\d+(\.\d+)?$/.test(given) || value < min || value > max) {
    throw new OptionError(`a number from ${min} to ${max}`);
  }
  return value;
}

function parseUrl(given: string): string {
  const url = URL.canParse(given) ? new URL(given) : null;
  if (url === null || !/^https?:$/.test(url.protocol))
    throw new OptionError('http://HOST:PORT or https://HOST');
  if (url.username !== '') throw new OptionError('a URL without credentials, and the key in MOTET_API_KEY');
  return url.origin + url.pathname.replace(/\/+$/, '').replace(/\/v1$/, '');
}

function parseLengths(given: string): Lengths {
  const [, first = '', sign, second = ''] = /^(\d+)(?:([:~])(\d+))?$/.exec(given) ?? [];
  const isToken = (value: string) => Number(value) >= 1 && Number(value) <= maxTokens;
  const a = Number(first);
  const b = Number(second);
  if (isToken(first)) {
    if (sign === undefined) return { kind: 'fixed', tokens: a };
    if (sign === ':' && isToken(second) && a <= b) return { kind: 'uniform', low: a, high: b };
    if (sign === '~' && a + 4 * b <= maxTokens) return { kind: 'normal', mean: a, deviation: b };
  }
  throw new OptionError(`N, LO:HI or MEAN~SD of tokens from 1 to ${maxTokens}`);
}

function parseAdapters(given: string): AdapterChoice {
  if (given === 'all') return { kind: 'all' };
  if (given === 'none') return { kind: 'named', names: [] };
  if (/^[1-9]\d{0,5}$/.test(given)) return { kind: 'first', count: Number(given) };
  const names = given.split(',').map((name) => name.trim());
  if (names.includes('') || new Set(names).size < names.length) {
    throw new OptionError('all, none, a count from 1 to 999999, or different names with commas');
  }
  return { kind: 'named', names };
}

function parsePopularity(given: string): Popularity {
  if (given === 'uniform' || given === 'each-client-its-own') return { kind: given };
  const [, exponent = ''] = /^zipf:(\d+(?:\.\d+)?)$/.exec(given) ?? [];
  if (exponent === '' || Number(exponent) > 10) {
    throw new OptionError('uniform, zipf:S with S from 0 to 10, or each-client-its-own');
  }
  return { kind: 'zipf', exponent: Number(exponent) };
}

function parseThinkTime(given: string): ThinkTime {
  const [, kind, seconds = ''] = /^(exp:)?(\d+(?:\.\d+)?)$/.exec(given) ?? [];
  if (seconds === '' || Number(seconds) > maxThinkSeconds) {
    throw new OptionError(`S or exp:S with S from 0 to ${maxThinkSeconds}`);
  }
  return { kind: kind === undefined ? 'fixed' : 'exponential', meanSeconds: Number(seconds) };
}

function parseTargets(given: string): string[] {
  if (given === 'all-linear') return allLinear;
  const names = given.split(',').map((name) => name.trim());
  if (!names.every((name) => allLinear.includes(name)) || new Set(names).size < names.length) {
    throw new OptionError(`all-linear, or different ones of ${allLinear.join(', ')}`);
  }
  return names;
}

function parseSlo(given: string): Slo {
  const slo: Slo = {};
  for (const part of given.split(',')) {
    const [, name, limit] = /^\s*(ttft|itl|tpot|e2e)=(\d+(?:\.\d+)?)\s*$/.exec(part) ?? [];
    const key = name as keyof Slo | undefined;
    if (key === undefined || slo[key] !== undefined || Number(limit) <= 0) {
      throw new OptionError('ttft=MS, itl=MS, tpot=MS or e2e=MS above 0, each at most once, with commas');
    }
    slo[key] = Number(limit);
  }
  return slo;
}

function helpText(): string {
  const lines: string[] = [];
  const column = 34;
  for (const [flag, option] of Object.entries(table as Record<string, Option<unknown>>)) {
    const title = titles[flag as Flag];
    if (title !== undefined) lines.push('', `${title}:`);
    const { value, help, defaultText } = option;
    const shown = defaultText ?? (option.default === null ? '' : String(option.default));
    const left = `  --${flag}${value && ` ${value}`}`;
    const words = wrap(`${help}${shown && ` (default ${shown})`}`, 110 - column);
    lines.push(left.length < column ? left.padEnd(column) + words.shift() : left);
    lines.push(...words.map((line) => ' '.repeat(column) + line));
  }
  return `Usage: motet bench [option ...] [-- engine option ...]

Loads a server with streamed requests and reports throughput, latencies and what kept its promises.
TTFT: time to first token. ITL: pause between two pieces of text, which need not be single tokens. TPOT: mean time per
output token after the first. E2E: whole request. A request that fails is in none of them, and ends its conversation.
${lines.join('\n')}

What follows -- goes to the engine that is started: -- --device-memory 4GiB --threads 2.
Ctrl-C ends the load and reports what was measured; a second one ends at once.
Exit code: 0; 1 when no request was answered; 2 for a wrong option; 130 after Ctrl-C.
`;
}

function wrap(text: string, width: number): string[] {
  const lines = [''];
  for (const word of text.split(' ')) {
    if (lines.at(-1) !== '' && lines.at(-1)!.length + word.length + 1 > width) lines.push('');
    lines[lines.length - 1] += `${lines.at(-1) === '' ? '' : ' '}${word}`;
  }
  return lines;
}
