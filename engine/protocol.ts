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
  /** Served names that point at it. Empty: unloading, waiting for its last request. */
  names: string[];
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

export interface AdapterList {
  object: 'list';
  /** The device arena. */
  arena: ArenaUse;
  /** Not there when the engine has none. */
  hostArena?: ArenaUse;
  /** Not there in older engines. It is no entry of `data`, whose readers take each for an adapter. */
  base?: BaseStatus;
  data: AdapterStatus[];
  /** Names whose load is under way: waiting, being fetched or copied. Absent from older engines. */
  loading?: string[];
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
