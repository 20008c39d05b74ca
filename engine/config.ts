/**
 * Every setting of the engine, parsed once: flag, environment variable, unit, default, range. A flag wins over its
 * variable (MOTET_ and the flag's name in upper snake case). Nothing else in the engine reads the environment.
 */
import { readFileSync } from 'node:fs';
import { isIP } from 'node:net';
import { homedir } from 'node:os';
import { join } from 'node:path';
import { type Pooling, poolings } from './embeddings.ts';
import { type EvictionRule, evictionRules } from './ladder/policy.ts';
import { isDigest, isFetched, needsDigest, uriProblem } from './source-uri.ts';
import { type SourceAccess, sourceAccess } from './sources/access.ts';

export class ConfigError extends Error {
  override name = 'ConfigError';
}

interface Setting<T> {
  /** What --help shows for the value; '' for a switch. */
  value: string;
  help: string;
  /** Turns the text of a flag or variable into its value; throws what it expected. */
  parse: (text: string) => T;
  default: T | undefined;
  /** May be given several times; each adds to a list. */
  isRepeatable?: boolean;
}

const text = (value: string, help: string, fallback?: string): Setting<string | null> => ({
  value,
  help,
  parse: (given) => given,
  default: fallback ?? null,
});

const uri = (value: string, help: string): Setting<string | null> => ({
  ...text(value, help),
  parse(given) {
    const problem = uriProblem(given);
    if (problem !== null) throw new ConfigError(problem.expected);
    return given;
  },
});

const endpoint = (help: string): Setting<string | null> => ({
  ...text('URL', help),
  parse(given) {
    const url = URL.canParse(given) ? new URL(given) : null;
    if (
      url === null ||
      !/^https?:$/.test(url.protocol) ||
      url.username !== '' ||
      url.search + url.hash !== ''
    ) {
      throw new ConfigError('https://HOST[:PORT][/PATH], or http:// for one without TLS');
    }
    return given;
  },
});

const oneOf = <const T extends string>(choices: readonly T[], help: string, fallback: T): Setting<T> => ({
  value: choices.join('|'),
  help,
  parse(given) {
    const choice = choices.find((one) => one === given);
    if (choice === undefined) throw new ConfigError(`one of ${choices.join(', ')}`);
    return choice;
  },
  default: fallback,
});

const integer = <T extends number | null>(
  value: string,
  help: string,
  range: [number, number],
  fallback: T,
): Setting<number | T> => ({
  value,
  help,
  parse(given) {
    const number = Number(given);
    if (!/^\d+$/.test(given) || number < range[0] || number > range[1]) {
      throw new ConfigError(`an integer from ${range[0]} to ${range[1]}`);
    }
    return number;
  },
  default: fallback,
});

const unitBytes: Record<string, number> = {
  '': 1,
  KiB: 2 ** 10,
  MiB: 2 ** 20,
  GiB: 2 ** 30,
  kB: 1e3,
  MB: 1e6,
  GB: 1e9,
};

const bytes = (help: string, range: [number, number], fallback: number): Setting<number> => ({
  value: 'BYTES',
  help,
  parse(given) {
    const [, number, unit] = /^(\d+(?:\.\d+)?) ?([A-Za-z]*)$/.exec(given) ?? [];
    const size = Math.floor(Number(number) * (unitBytes[unit ?? '-'] ?? Number.NaN));
    if (!(size >= range[0] && size <= range[1])) {
      throw new ConfigError(
        `bytes from ${range[0]} to ${range[1]}, as a number or with KiB, MiB, GiB, kB, MB, GB`,
      );
    }
    return size;
  },
  default: fallback,
});

const toggle = (help: string): Setting<boolean> => ({
  value: '',
  help,
  parse(given) {
    if (given === '' || given === 'true' || given === '1') return true;
    if (given === 'false' || given === '0') return false;
    throw new ConfigError('true or false');
  },
  default: false,
});

const settings = {
  model: uri(
    'SOURCE',
    'base model (required), a GGUF file or a folder of safetensors: a path, or a URI with file, pvc, https, s3, hf or oci; docs/sources.md has each',
  ),
  'model-digest': {
    value: 'DIGEST',
    help: 'digest of a model that is fetched, as sha256:HEX: required for https and s3, checked for hf and oci',
    parse(given: string) {
      if (!isDigest(given)) throw new ConfigError('sha256: and 64 hex digits');
      return given;
    },
    default: null,
  } satisfies Setting<string | null>,
  'served-name': text('NAME', "the base model's name in the API; default: the file's or folder's name"),
  host: text('ADDRESS', 'address to listen on', '127.0.0.1'),
  port: integer('PORT', 'port to listen on; 0 takes a free one', [0, 65_535], 8000),
  cache: text(
    'DIR',
    'where fetched files and prepared weights are kept; default: motet under $XDG_CACHE_HOME or ~/.cache',
  ),
  'source-cache': bytes(
    'fetched adapters kept on disk, in all; the least recently used leave',
    [2 ** 20, 2 ** 50],
    10 * 2 ** 30,
  ),
  'merge-cache': bytes(
    'files of adapters that requests had merged (adapters_merge), below --cache, in all and of one; the least recently used leave; 0: such requests are refused',
    [0, 2 ** 50],
    2 ** 30,
  ),
  'source-bandwidth': bytes(
    'bytes a second that all downloads together may take; 0: no cap',
    [0, 2 ** 40],
    0,
  ),
  'source-ca': text('PATH', "PEM file of certificates that sources may be signed by, beside the system's"),
  'hf-endpoint': endpoint('of hf:// sources; default: $HF_ENDPOINT or https://huggingface.co'),
  's3-endpoint': endpoint('of s3:// sources, asked path style; default: $AWS_ENDPOINT_URL_S3, or AWS'),
  's3-region': text('REGION', 'of s3:// sources; default: $AWS_REGION or us-east-1'),
  'oci-plain-http': {
    value: 'HOST:PORT,...',
    help: 'registries of oci:// sources that are spoken to without TLS',
    parse(given: string) {
      const hosts = given.split(',').map((host) => host.trim());
      if (!hosts.every((host) => /^[a-z0-9.-]+(:\d+)?$/i.test(host))) {
        throw new ConfigError('HOST or HOST:PORT, and commas between several');
      }
      return hosts;
    },
    default: null,
  } satisfies Setting<string[] | null>,
  'claim-root': text('DIR', 'where claims are mounted: pvc://CLAIM/PATH is DIR/CLAIM/PATH'),
  device: oneOf(['cpu', 'nvidia'], 'what computes', 'cpu'),
  'device-memory': bytes('device arena for KV and adapters', [2 ** 20, 2 ** 46], 2 ** 30),
  'host-memory': bytes(
    'host arena for what the device arena has no room for; taken as it fills; 0: none',
    [0, 2 ** 46],
    2 ** 30,
  ),
  'weight-memory': bytes(
    "most memory for the model's weights: layers beyond it are read from the prepared file for each step; 0: all stay mapped",
    [0, 2 ** 46],
    0,
  ),
  'kv-disk': bytes(
    'KV that the host arena has no room for, on disk below --cache, in all; it survives a restart; 0: none',
    [0, 2 ** 50],
    0,
  ),
  'prefix-cache': oneOf(
    ['on', 'off'],
    'keep the KV of prompts and answers while there is room, and share it with requests that begin alike',
    'on',
  ),
  pooling: oneOf(
    poolings,
    'how /v1/embeddings makes one vector of a text: the hidden state of its last token, or the mean over its tokens',
    'last',
  ),
  eviction: oneOf(
    evictionRules,
    'what leaves a full arena: cost, what is worth least by cost, use and size; lru, what was not used for longest',
    'cost',
  ),
  quantization: oneOf(['keep', 'int4', 'int8'], 'weights: as the file has them, or quantised', 'keep'),
  activations: oneOf(['int8', 'f32'], 'arithmetic: int8 is fast; f32 is for reference', 'int8'),
  'kv-cache-dtype': oneOf(
    ['auto', 'f16', 'int8'],
    'KV: auto is f16 (f32 beside f32 activations); int8 holds twice the tokens',
    'auto',
  ),
  'adapter-quantization': oneOf(
    ['keep', 'int8'],
    'adapters: as their files have them, or rounded to int8, half the bytes of 16 bits',
    'keep',
  ),
  'max-model-len': integer(
    'TOKENS',
    "prompt and output of one sequence; default: the model's, if the arenas hold it",
    [16, 2 ** 24],
    null,
  ),
  'max-batch-tokens': integer(
    'TOKENS',
    'tokens in one step: bounds how long a step delays the next token',
    [1, 65_536],
    256,
  ),
  'max-sequences': integer('COUNT', 'sequences in one step', [1, 4096], 64),
  'max-waiting': integer('COUNT', 'sequences that may wait; more get 429', [0, 65_536], 256),
  'max-lora-rank': integer('RANK', 'largest rank of an adapter', [1, 4096], 256),
  threads: integer('COUNT', 'threads of the native core; 0 is one per usable CPU', [0, 1024], 0),
  adapter: {
    value: 'NAME=PATH',
    help: 'an adapter to load at start (repeatable; the variable holds a comma list)',
    parse(given: string) {
      const at = given.indexOf('=');
      if (at < 1 || at === given.length - 1) throw new ConfigError('NAME=PATH');
      const path = given.slice(at + 1);
      const problem = uriProblem(path);
      if (problem !== null || needsDigest(path)) {
        throw new ConfigError(
          'NAME=PATH, or NAME=URI with a scheme that needs no digest: file, pvc, hf or oci',
        );
      }
      return { name: given.slice(0, at), path };
    },
    default: undefined,
    isRepeatable: true,
  } satisfies Setting<{ name: string; path: string }>,
  'adapter-root': text(
    'DIR',
    'adapters may be loaded from under this folder only; default on loopback: anywhere',
  ),
  'api-key-file': text('PATH', 'file of accepted bearer keys, one a line'),
  'trusted-service-accounts': {
    value: 'NS/NAME,...',
    help: 'Kubernetes ServiceAccounts whose tokens, for the audience motet-engine, are accepted beside the keys',
    parse(given: string) {
      const accounts = given.split(',').map((account) => account.trim());
      if (!accounts.every((account) => /^[a-z0-9][a-z0-9-]*\/[a-z0-9][a-z0-9.-]*$/.test(account))) {
        throw new ConfigError('NAMESPACE/NAME, and commas between several');
      }
      return accounts;
    },
    default: null,
  } satisfies Setting<string[] | null>,
  'kubernetes-api-url': {
    value: 'URL',
    help: 'API server whose tokens are accepted; default: the one of this pod',
    parse(given: string) {
      const url = URL.canParse(given) ? new URL(given) : null;
      if (url?.protocol !== 'https:' || url.username !== '') throw new ConfigError('https://HOST:PORT');
      return url.origin;
    },
    default: null,
  } satisfies Setting<string | null>,
  'service-account-dir': text(
    'DIR',
    "the engine's own token and ca.crt, for asking the API server for its keys",
    '/var/run/secrets/kubernetes.io/serviceaccount',
  ),
  insecure: toggle('serve without keys on an address that others reach'),
  'drain-seconds': integer('SECONDS', 'how long running requests may go on after SIGTERM', [0, 3600], 30),
  'log-level': oneOf(['fatal', 'error', 'warn', 'info', 'debug'], 'least severe line to log', 'info'),
} satisfies Record<string, Setting<unknown>>;

type Settings = typeof settings;
type Flag = keyof Settings;

export interface Config {
  /** Path or URI. */
  model: string;
  /** `sha256:<hex>`, of a model that is fetched. */
  modelDigest: string | null;
  servedName: string | null;
  host: string;
  port: number;
  cacheDir: string;
  sourceCacheBytes: number;
  /** 0: requests cannot have adapters merged. */
  mergeCacheBytes: number;
  /** How remote sources are reached. */
  access: SourceAccess;
  /** Where claims are mounted. */
  claimRoot: string | null;
  device: 'cpu' | 'nvidia';
  deviceMemoryBytes: number;
  hostMemoryBytes: number;
  /** 0: no bound. */
  weightMemoryBytes: number;
  /** 0: no KV on disk. */
  kvDiskBytes: number;
  prefixCache: boolean;
  pooling: Pooling;
  evictionRule: EvictionRule;
  quantization: 'keep' | 'int4' | 'int8';
  activations: 'int8' | 'f32';
  kvCacheDtype: 'auto' | 'f16' | 'int8';
  adapterQuantization: 'keep' | 'int8';
  maxModelLen: number | null;
  maxBatchTokens: number;
  maxSequences: number;
  maxWaiting: number;
  maxLoraRank: number;
  numThreads: number;
  adapters: { name: string; path: string }[];
  adapterRoot: string | null;
  apiKeys: string[] | null;
  /** Whose tokens are accepted, and who signs them; null: no tokens. */
  callers: { trusted: string[]; apiUrl: string; serviceAccountDir: string } | null;
  drainSeconds: number;
  logLevel: string;
}

/** @returns the configuration, or what --help prints.  @throws ConfigError with one line that says what to change */
export function parseConfig(
  args: readonly string[],
  env: Record<string, string | undefined>,
): Config | { help: string } {
  if (args.includes('--help')) return { help: helpText() };
  const given = readFlags(args);
  const all = <F extends Flag>(flag: F): ReturnType<Settings[F]['parse']>[] => {
    const { parse, isRepeatable } = settings[flag] as Setting<unknown>;
    const name = variableOf(flag);
    const fromEnv = env[name];
    const texts =
      given.get(flag) ?? (fromEnv === undefined ? [] : isRepeatable ? fromEnv.split(',') : [fromEnv]);
    const source = given.has(flag) ? `--${flag}` : name;
    return texts.map((value) => {
      try {
        return parse(value) as ReturnType<Settings[F]['parse']>;
      } catch (error) {
        throw new ConfigError(
          `${source}: expected ${(error as Error).message}, got ${JSON.stringify(value)}`,
        );
      }
    });
  };
  const one = <F extends Flag>(flag: F) =>
    (all(flag).at(-1) ?? settings[flag].default) as ReturnType<Settings[F]['parse']>;

  const model = one('model');
  if (model === null) throw new ConfigError('--model: expected the path of a base model, got nothing');
  const modelDigest = one('model-digest');
  if (needsDigest(model) && modelDigest === null) {
    throw new ConfigError(
      '--model-digest: expected the digest of the model beside an https or s3 source, got nothing',
    );
  }
  if (!isFetched(model) && modelDigest !== null) {
    throw new ConfigError(
      '--model-digest: expected only beside a model that is fetched; other files are not',
    );
  }
  const activations = one('activations');
  const kvCacheDtype = one('kv-cache-dtype');
  if (activations === 'f32' && kvCacheDtype !== 'auto') {
    throw new ConfigError(
      `--kv-cache-dtype: expected auto beside --activations f32, which keeps KV in f32 too, got ${kvCacheDtype}`,
    );
  }
  if (one('kv-disk') > 0 && (one('host-memory') === 0 || one('prefix-cache') === 'off')) {
    throw new ConfigError(
      '--kv-disk: expected --prefix-cache on and --host-memory beside it, since what is kept goes through the host arena, ' +
        `got ${one('prefix-cache')} and ${one('host-memory')}`,
    );
  }
  const maxBatchTokens = one('max-batch-tokens');
  const maxSequences = Math.min(one('max-sequences'), maxBatchTokens);
  if (given.has('max-sequences') && maxSequences < one('max-sequences')) {
    throw new ConfigError(
      `--max-sequences: expected at most --max-batch-tokens, which is ${maxBatchTokens}, got ${one('max-sequences')}`,
    );
  }

  const host = one('host')!;
  const isLoopback = host === 'localhost' || host === '::1' || (isIP(host) === 4 && host.startsWith('127.'));
  const apiKeyFile = one('api-key-file');
  const isInsecure = one('insecure');
  const trusted = one('trusted-service-accounts');
  if (!isLoopback && apiKeyFile === null && trusted === null && !isInsecure) {
    throw new ConfigError(
      `--host ${host}: expected --api-key-file or --trusted-service-accounts (or --insecure) beside an address that others reach`,
    );
  }
  const adapterRoot = one('adapter-root');
  if (!isLoopback && adapterRoot === null) {
    throw new ConfigError(`--host ${host}: expected --adapter-root beside an address that others reach`);
  }

  const sourceCa = one('source-ca');

  return {
    model,
    modelDigest,
    servedName: one('served-name'),
    host,
    port: one('port'),
    cacheDir: one('cache') ?? join(env.XDG_CACHE_HOME || join(homedir(), '.cache'), 'motet'),
    sourceCacheBytes: one('source-cache'),
    mergeCacheBytes: one('merge-cache'),
    access: sourceAccess(env, {
      bytesPerSecond: one('source-bandwidth') || null,
      ca: sourceCa === null ? null : readPem(sourceCa),
      hfEndpoint: one('hf-endpoint'),
      s3Endpoint: one('s3-endpoint'),
      s3Region: one('s3-region'),
      ociPlainHttp: one('oci-plain-http'),
    }),
    claimRoot: one('claim-root') ?? adapterRoot,
    device: one('device'),
    deviceMemoryBytes: one('device-memory'),
    hostMemoryBytes: one('host-memory'),
    weightMemoryBytes: one('weight-memory'),
    kvDiskBytes: one('kv-disk'),
    prefixCache: one('prefix-cache') === 'on',
    pooling: one('pooling'),
    evictionRule: one('eviction'),
    quantization: one('quantization'),
    activations,
    kvCacheDtype,
    adapterQuantization: one('adapter-quantization'),
    maxModelLen: one('max-model-len') as number | null,
    maxBatchTokens,
    maxSequences,
    maxWaiting: one('max-waiting'),
    maxLoraRank: one('max-lora-rank'),
    numThreads: one('threads'),
    adapters: all('adapter'),
    adapterRoot,
    apiKeys: apiKeyFile === null ? null : readKeys(apiKeyFile),
    callers: trusted && {
      trusted,
      apiUrl: one('kubernetes-api-url') ?? podApiUrl(env),
      serviceAccountDir: one('service-account-dir')!,
    },
    drainSeconds: one('drain-seconds'),
    logLevel: one('log-level'),
  };
}

/** Where Kubernetes says that its API server is. */
function podApiUrl({
  KUBERNETES_SERVICE_HOST: host,
  KUBERNETES_SERVICE_PORT: port,
}: Record<string, string | undefined>): string {
  if (host && port) return `https://${isIP(host) === 6 ? `[${host}]` : host}:${port}`;
  throw new ConfigError(
    '--trusted-service-accounts: expected --kubernetes-api-url beside it outside of a pod, got nothing',
  );
}

/** Flags as given, `--flag value` or `--flag=value`; a switch takes its value only with `=`. */
function readFlags(args: readonly string[]): Map<Flag, string[]> {
  const given = new Map<Flag, string[]>();
  for (let i = 0; i < args.length; i++) {
    const [, name, inline] = /^--([^=]+)(?:=(.*))?$/s.exec(args[i]!) ?? [];
    if (name === undefined)
      throw new ConfigError(`expected a flag, got ${JSON.stringify(args[i])}; --help lists them`);
    if (!Object.hasOwn(settings, name)) {
      throw new ConfigError(`--${name}: unknown flag; did you mean --${nearestFlag(name)}? --help lists all`);
    }
    const flag = name as Flag;
    const { value, isRepeatable } = settings[flag] as Setting<unknown>;
    const text = inline ?? (value === '' ? '' : args[++i]);
    if (text === undefined) throw new ConfigError(`--${flag}: expected ${value}, got nothing`);
    if (given.has(flag) && !isRepeatable) throw new ConfigError(`--${flag}: expected once, got it twice`);
    given.set(flag, [...(given.get(flag) ?? []), text]);
  }
  return given;
}

function readPem(path: string): string {
  let content: string;
  try {
    content = readFileSync(path, 'utf8');
  } catch (error) {
    throw new ConfigError(
      `--source-ca: expected a readable file, got ${(error as NodeJS.ErrnoException).code}`,
    );
  }
  if (!content.includes('-----BEGIN CERTIFICATE-----')) {
    throw new ConfigError('--source-ca: expected certificates in PEM, got a file without any');
  }
  return content;
}

function readKeys(path: string): string[] {
  let content: string;
  try {
    content = readFileSync(path, 'utf8');
  } catch (error) {
    throw new ConfigError(
      `--api-key-file: expected a readable file, got ${(error as NodeJS.ErrnoException).code}`,
    );
  }
  const keys = content
    .split('\n')
    .map((line) => line.trim())
    .filter((line) => line !== '');
  if (keys.length === 0)
    throw new ConfigError('--api-key-file: expected at least one key, got an empty file');
  return keys;
}

function variableOf(flag: string): string {
  return `MOTET_${flag.toUpperCase().replaceAll('-', '_')}`;
}

function helpText(): string {
  const lines = Object.entries(settings as Record<string, Setting<unknown>>).map(([flag, setting]) => {
    const { value, help, default: fallback } = setting;
    const left = `  --${flag}${value && ` ${value}`}`;
    const note =
      fallback === undefined || fallback === null || fallback === false ? '' : ` (default ${fallback})`;
    return `${left.padEnd(36)} ${help}${note}`;
  });
  return `Serves one base model and any number of LoRA adapters over OpenAI's API.\n\n${lines.join('\n')}\n
Each setting may also be given as a variable: --max-waiting is ${variableOf('max-waiting')}. A flag wins.\n`;
}

function nearestFlag(name: string): string {
  const flags = [...Object.keys(settings), 'help'];
  return flags.reduce((best, flag) => (editDistance(name, flag) < editDistance(name, best) ? flag : best));
}

/** Levenshtein: letters to insert, delete or replace. */
function editDistance(a: string, b: string): number {
  let row = Array.from({ length: b.length + 1 }, (_, j) => j);
  for (let i = 1; i <= a.length; i++) {
    const next = [i];
    for (let j = 1; j <= b.length; j++) {
      next.push(Math.min(row[j]! + 1, next[j - 1]! + 1, row[j - 1]! + (a[i - 1] === b[j - 1] ? 0 : 1)));
    }
    row = next;
  }
  return row[b.length]!;
}
