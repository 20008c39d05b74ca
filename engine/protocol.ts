/**
 * What gateway, operator and dashboards exchange with an engine beyond OpenAI's own bodies, and the paths.
 * The engine serves it and owns it. Unknown fields are ignored by readers; missing ones are refused by name.
 */

/** Where an adapter's bytes are. */
export type Tier = 'device' | 'host' | 'disk';

/** One adapter as the engine knows it: `GET /v1/adapters`. */
export interface AdapterStatus {
  /** `sha256:<hex>` over canonical config and weights: what the adapter is. */
  digest: string;
  /** Served names that point at it. Empty: unloading, waiting for its last request, or a merge. */
  names: string[];
  /** Of what requests had merged: by which rule, as `mergeHeader` has it, and of what. Not there in others. */
  merge?: { rule: string; members: { digest: string; weight: number }[] };
  /** The highest that has its bytes: a request for one that is not on the device waits until it is. */
  tier: Tier;
  /** Never leaves the device. Not there in engines that keep all on the device. */
  pinned?: boolean;
  /** Largest rank over its modules. */
  rank: number;
  /** Target modules it changes, sorted, e.g. `["q_proj","v_proj"]`. */
  modules: string[];
  /** LoRA kind: `lora`, `rslora`, `dora`. */
  kind: string;
  /** Bytes that it takes in the device arena or in the host arena, whole pages. */
  bytes: number;
  /** Sequences, waiting or running, that use it. */
  inFlight: number;
  /** Sequences that have used it since it was loaded. Not there in older engines. */
  requests?: number;
  /** Prompt tokens asked of it, and those that the prefix cache had. Not there in older engines. */
  prefixCache?: { promptTokens: number; cachedTokens: number };
  /** Where it was loaded from, as the caller named it; of a URI, without its query. */
  path: string;
  /** Unix seconds of when it became resident in this tier. */
  since: number;
  /** How long each stage of loading took, in seconds. */
  loadSeconds: {
    /** From its source to this machine; 0 when it was here already. Absent from engines that know no sources. */
    fetch?: number;
    verify: number;
    /** Of its last way to the device: the wait for pages. Absent from engines that keep all on the device, as `host` is. */
    pages?: number;
    /** From its files to the device, and from the host arena to the device, the last time; 0: it never went that way. */
    device: number;
    host?: number;
  };
}

/** The base model as a voice beside the adapters: what is counted of them is counted of requests without one. */
export interface BaseStatus {
  /** Its served name. */
  name: string;
  /** Prompt tokens asked of it, and those that the prefix cache had. */
  prefixCache: { promptTokens: number; cachedTokens: number };
  /** Most sequences in one step. Not there in older engines. */
  maxSequences?: number;
}

/** An arena: total and free bytes, and how the others are used. */
export interface ArenaUse {
  totalBytes: number;
  /** With those that hold KV which is only kept in case it is asked for again. */
  freeBytes: number;
  /** Of the free ones, those that hold KV. Not there in older engines. */
  cachedBytes?: number;
  kvBytes: number;
  adapterBytes: number;
}

/** Sequences, and what of their prompts is yet to be computed. */
export interface PendingWork {
  running: number;
  waiting: number;
  /** Without regard to what the prefix cache may have of those that wait. */
  promptTokens: number;
}

/** What an engine has to do, as of its answer. */
export interface EngineLoad extends PendingWork {
  /** The part of it that others sent than who asks, by `senderHeader`; to who does not say who it is, all of it. */
  others: PendingWork;
  /** Tokens of KV that free pages of the device arena hold; pages with KV that is only kept are free. */
  freeTokens: number;
}

export interface AdapterList {
  object: 'list';
  /** Whether requests may have adapters merged (`mergeHeader`). Not there in engines that make none. */
  merges?: boolean;
  /** The device arena. */
  arena: ArenaUse;
  /** Not there when the engine has none. */
  hostArena?: ArenaUse;
  /** Not there in older engines. It is no entry of `data`, whose readers take each for an adapter. */
  base?: BaseStatus;
  data: AdapterStatus[];
  /** Names whose load is under way: waiting, being fetched or copied. Absent from older engines. */
  loading?: string[];
  /** Absent from older engines. */
  load?: EngineLoad;
}

/** One card of `GET /v1/models` (vLLM's shape). */
export interface ModelCard {
  id: string;
  object: 'model';
  created: number;
  owned_by: string;
  /** Path of the artifact. */
  root: string;
  /** The base's id for adapters, null for the base. */
  parent: string | null;
  /** Null: no engine is there that could say. Engines always say. */
  max_model_len: number | null;
  permission: unknown[];
}

export interface ModelList {
  object: 'list';
  data: ModelCard[];
}

/**
 * Body of `POST /v1/load_lora_adapter`: vLLM's fields, `pinned` as SGLang has it, and `digest`. `lora_path` is a folder, or `https://HOST/FOLDER`, below
 * which `adapter_config.json` and `adapter_model.safetensors` are fetched.
 */
export interface LoadAdapterBody {
  lora_name: string;
  lora_path: string;
  load_inplace?: boolean;
  /** Never leaves the device arena; false: may leave it again. Without it: as it was, or as what it replaces. */
  pinned?: boolean;
  /** What the adapter must be, `sha256:<hex>`. Another one is refused with `adapter_digest_mismatch`. */
  digest?: string;
}

/** Answer of `DELETE /v1/adapters/{digest}`, with `?purge=true`: what was removed, in bytes. */
export interface PurgeReport {
  digest: string;
  /** Names that pointed at it. */
  names: string[];
  /** Whole pages of the arenas; `disk`: our copy of its files. A folder that it was loaded from is not ours and stays. */
  adapterBytes: { device: number; host: number; disk: number };
  /** KV that was made with it. */
  kvBytes: { device: number; host: number; disk: number };
}

/** Answer of `DELETE /v1/adapters/{digest}` without: names that are gone; the bytes follow with the last request. */
export interface UnloadReport {
  digest: string;
  names: string[];
}

/**
 * A request header with the served name to use in place of the body's `model`; the answer still carries the body's. A
 * gateway that resolved an alias sets it, so that bodies pass through untouched.
 */
export const modelHeader = 'x-motet-model';

/**
 * A request header: which gateway sends, by a name that no other has. An engine tells by it what of its load is a gateway's own, which
 * that gateway knows better and counts itself.
 */
export const senderHeader = 'x-motet-sender';

/**
 * A request header with several adapters and their weights, in place of the body's `model` and of `modelHeader`:
 * `sql=0.7,tone=-0.3`. The answer is that of the base with the sum of weight × delta over them; their order means nothing.
 * Names are percent-encoded, as encodeURIComponent does; weights are decimals.
 */
export const adaptersHeader = 'x-motet-adapters';

/** One adapter of a composition. In bodies too: `adapters: [{"name": "sql", "weight": 0.7}, …]`. */
export interface WeightedName {
  /** A served name. */
  name: string;
  weight: number;
}

export const maxComposed = 8;
/** Of the header: what HTTP parsers take in any case. */
const maxAdaptersLength = 4096;

const weightedName = /^([^= \t]+)=(-?(?:\d{1,20}(?:\.\d{0,30})?|\.\d{1,30})(?:e-?\d{1,3})?)$/;

/** What is wrong with a value. */
export interface Problem {
  /** Where in it: `[1].weight`; '': all of it. */
  at: string;
  expected: string;
  got: string;
}

export function formatAdapters(adapters: readonly WeightedName[]): string {
  return adapters.map(({ name, weight }) => `${encodeURIComponent(name)}=${weight}`).join(',');
}

/** Reads the header. */
export function parseAdapters(header: string): WeightedName[] | Problem {
  const expected = `name=weight of 1 to ${maxComposed} adapters, with commas between, names percent-encoded`;
  if (header.length > maxAdaptersLength) return { at: '', expected, got: `${header.length} characters` };
  const adapters = header.split(',').map((part) => {
    const found = weightedName.exec(part.trim());
    const name = found && decoded(found[1]!);
    return name && { name, weight: Number(found![2]) };
  });
  const wrong = adapters.findIndex((adapter) => !adapter);
  if (wrong >= 0) return { at: `[${wrong}]`, expected, got: 'something else' };
  return readAdapters(adapters);
}

/** Reads the list of a body. */
export function readAdapters(list: unknown): WeightedName[] | Problem {
  const expected = `a list of 1 to ${maxComposed} adapters, each {"name", "weight"}`;
  if (!Array.isArray(list)) return { at: '', expected, got: list === null ? 'null' : typeof list };
  if (list.length < 1 || list.length > maxComposed) return { at: '', expected, got: `${list.length}` };
  const adapters: WeightedName[] = [];
  for (const [index, item] of list.entries()) {
    const { name, weight } = (item ?? {}) as Record<string, unknown>;
    if (typeof name !== 'string' || name === '' || name.length > 256 || !name.isWellFormed())
      return { at: `[${index}].name`, expected: 'a name of 1 to 256 characters', got: lengthOf(name) };
    if (adapters.some((other) => other.name === name))
      return { at: `[${index}].name`, expected: 'each adapter once', got: 'one twice' };
    // The step reads it in 32 bits.
    if (typeof weight !== 'number' || !(Math.abs(weight) < 10) || Math.fround(weight) === 0)
      return {
        at: `[${index}].weight`,
        expected: 'a number between -10 and 10, not 0',
        got: numberOf(weight),
      };
    adapters.push({ name, weight });
  }
  const { length } = formatAdapters(adapters);
  if (length <= maxAdaptersLength) return adapters;
  return {
    at: '',
    expected: `names of at most ${maxAdaptersLength} characters together, as headers write them`,
    got: `${length}`,
  };
}

/**
 * A request header beside `adaptersHeader`: its adapters do not answer as a sum, but as one adapter that is merged of them,
 * `ties; density=0.5; majority-sign=total`. The engine makes it once and keeps it for a while.
 */
export const mergeHeader = 'x-motet-merge';

export const mergeMethods = ['ties', 'dare_ties', 'dare_linear', 'magnitude_prune'] as const;
export type MergeMethod = (typeof mergeMethods)[number];

/** How the sign of an element is elected: by the sum of the values, or by their number. */
export const majoritySigns = ['total', 'frequency'] as const;

/** How adapters are merged. In bodies: `adapters_merge: {"method", "density", "majority_sign"}`. */
export interface MergeRule {
  method: MergeMethod;
  /** Share of the values of each tensor that stays, above 0 and at most 1. */
  density: number;
  /** Of `ties` and `dare_ties`. */
  majoritySign: (typeof majoritySigns)[number];
}

const defaultDensity = 0.5;
const maxMergeLength = 256;
const mergeParameter =
  /^(?:density=((?:\d{1,20}(?:\.\d{0,30})?|\.\d{1,30})(?:e-?\d{1,3})?)|majority-sign=(\w{1,20}))$/;

export function formatMerge({ method, density, majoritySign }: MergeRule): string {
  const sign = electsSigns(method) ? `; majority-sign=${majoritySign}` : '';
  return `${method}; density=${density}${sign}`;
}

/** Reads the header. */
export function parseMerge(header: string): MergeRule | Problem {
  const expected = 'METHOD; density=NUMBER; majority-sign=total|frequency, the last two if need be';
  if (header.length > maxMergeLength) return { at: '', expected, got: `${header.length} characters` };
  const [method, ...parameters] = header.split(';').map((part) => part.trim());
  const body: Record<string, unknown> = { method };
  for (const parameter of parameters) {
    const [, density, sign] = mergeParameter.exec(parameter) ?? [];
    const field = density !== undefined ? 'density' : 'majority_sign';
    if ((density ?? sign) === undefined || field in body) return { at: '', expected, got: 'something else' };
    body[field] = sign ?? Number(density);
  }
  return readMerge(body) ?? { at: '.method', expected: `one of ${mergeMethods.join(', ')}`, got: 'linear' };
}

/** Reads it from a body. @returns null for `linear`: the sum that adapters are without a rule */
export function readMerge(value: unknown): MergeRule | Problem | null {
  if (typeof value !== 'object' || value === null || Array.isArray(value)) {
    const expected = 'an object {"method", "density", "majority_sign"}';
    return {
      at: '',
      expected,
      got: Array.isArray(value) ? 'a list' : value === null ? 'null' : typeof value,
    };
  }
  const { method, density, majority_sign: sign } = value as Record<string, unknown>;
  const found = mergeMethods.find((one) => one === method);
  if (found === undefined && method !== 'linear') {
    const expected = `one of linear, ${mergeMethods.join(', ')}`;
    return { at: '.method', expected, got: lengthOf(method) };
  }
  if (found === undefined && density != null)
    return { at: '.density', expected: 'none for linear', got: numberOf(density) };
  if (sign != null && !(found !== undefined && electsSigns(found)))
    return { at: '.majority_sign', expected: `none for ${method}`, got: lengthOf(sign) };
  if (found === undefined) return null;
  const share = density ?? defaultDensity;
  if (typeof share !== 'number' || !(share > 0 && share <= 1))
    return { at: '.density', expected: 'a number above 0 and at most 1', got: numberOf(share) };
  const majoritySign = majoritySigns.find((one) => one === (sign ?? 'total'));
  if (majoritySign === undefined)
    return {
      at: '.majority_sign',
      expected: `one of ${majoritySigns.join(', ')}`,
      got: lengthOf(sign),
    };
  return { method: found, density: share, majoritySign };
}

/** Several adapters that answer together. */
export interface Composed {
  adapters: WeightedName[];
  /** null: they are a sum. */
  merge: MergeRule | null;
}

/**
 * Reads `adapters` and `adapters_merge` of a body. `at` of a problem begins with the field.
 * @returns null when it has neither
 */
export function readComposed(body: {
  adapters?: unknown;
  adapters_merge?: unknown;
}): Composed | Problem | null {
  const adapters = body.adapters == null ? null : readAdapters(body.adapters);
  if (adapters !== null && !Array.isArray(adapters)) return { ...adapters, at: `adapters${adapters.at}` };
  const merge = body.adapters_merge == null ? null : readMerge(body.adapters_merge);
  if (merge !== null && 'at' in merge) return { ...merge, at: `adapters_merge${merge.at}` };
  if (adapters !== null) return { adapters, merge };
  if (body.adapters_merge == null) return null;
  return { at: 'adapters_merge', expected: 'adapters beside it', got: 'none' };
}

/** The field of a body where a problem is. */
export function fieldOf({ at }: Problem): string {
  return at.split(/[.[]/, 1)[0]!;
}

export function electsSigns(method: MergeMethod): boolean {
  return method === 'ties' || method === 'dare_ties';
}

function decoded(text: string): string | null {
  try {
    return decodeURIComponent(text);
  } catch {
    return null;
  }
}

const lengthOf = (value: unknown) =>
  typeof value === 'string' ? `one of ${value.length} characters` : typeof value;
const numberOf = (value: unknown) => (typeof value === 'number' ? String(value) : typeof value);

/**
 * Request headers: whose request it is (percent-encoded, as encodeURIComponent does), that tenant's weight against others that wait, and
 * the request's priority. An engine goes by them when more is to be done than it can do at once. Without them: nobody's, 1 and 0.
 */
export const tenantHeader = 'x-motet-tenant';
export const weightHeader = 'x-motet-weight';
export const priorityHeader = 'x-motet-priority';

/** Whose a request is, and its claim against those of others. */
export interface Standing {
  /** '': nobody's. */
  tenant: string;
  weight: number;
  /** Higher goes first. The lowest gives way: what has it may be stopped and go on later, when others need its place. */
  priority: number;
}

export const lowestPriority = -10;
export const highestPriority = 10;
export const maxWeight = 1_000;
const maxTenantLength = 1_024;

export function formatStanding({ tenant, weight, priority }: Standing): Record<string, string> {
  return {
    [tenantHeader]: encodeURIComponent(tenant),
    [weightHeader]: String(weight),
    [priorityHeader]: String(priority),
  };
}

/** Reads the three headers. `at` of a problem is the header's name. */
export function parseStanding(header: (name: string) => string | undefined): Standing | Problem {
  const given = header(tenantHeader) ?? '';
  const tenant = given.length > maxTenantLength ? null : decoded(given);
  if (tenant === null) {
    const expected = `a percent-encoded name of at most ${maxTenantLength} characters`;
    return { at: tenantHeader, expected, got: lengthOf(given) };
  }
  const weight = readDecimal(header(weightHeader) ?? '1');
  if (!(weight > 0 && weight <= maxWeight))
    return { at: weightHeader, expected: `a number above 0 and up to ${maxWeight}`, got: `${weight}` };
  const priority = readDecimal(header(priorityHeader) ?? '0');
  if (!Number.isInteger(priority) || priority < lowestPriority || priority > highestPriority) {
    const expected = `an integer from ${lowestPriority} to ${highestPriority}`;
    return { at: priorityHeader, expected, got: `${priority}` };
  }
  return { tenant, weight, priority };
}

const readDecimal = (text: string) => (/^-?\d{1,9}(?:\.\d{1,9})?$/.test(text) ? Number(text) : Number.NaN);

/**
 * What an answer cost, as `prompt=12, cached=5, completion=34` in tokens; cached ones are among the prompt's. Sent when the
 * request says `te: trailers`: of a whole answer among its headers, of a stream among its trailers, since it is known at
 * the end. A stream that is broken off has none.
 */
export const usageHeader = 'x-motet-usage';

export interface TokenUsage {
  promptTokens: number;
  /** Of the prompt's: those that the prefix cache had. */
  cachedTokens: number;
  completionTokens: number;
}

export function formatUsage({ promptTokens, cachedTokens, completionTokens }: TokenUsage): string {
  return `prompt=${promptTokens}, cached=${cachedTokens}, completion=${completionTokens}`;
}

/** Null for anything else than what `formatUsage` writes; further parts at its end are left out. */
export function parseUsage(value: unknown): TokenUsage | null {
  const found = /^prompt=(\d{1,12}), cached=(\d{1,12}), completion=(\d{1,12})(?:,|$)/.exec(String(value));
  if (found === null) return null;
  const [promptTokens, cachedTokens, completionTokens] = found.slice(1).map(Number) as [
    number,
    number,
    number,
  ];
  return { promptTokens, cachedTokens, completionTokens };
}

export const enginePaths = {
  chat: '/v1/chat/completions',
  completions: '/v1/completions',
  embeddings: '/v1/embeddings',
  models: '/v1/models',
  adapters: '/v1/adapters',
  loadAdapter: '/v1/load_lora_adapter',
  unloadAdapter: '/v1/unload_lora_adapter',
  tokenize: '/tokenize',
  detokenize: '/detokenize',
  metrics: '/metrics',
  livez: '/livez',
  readyz: '/readyz',
} as const;
