/**
 * Asks an engine what it holds and tells it what to load and unload. An engine is told apart by its pod's address; it
 * knows the operator by the token of its ServiceAccount, which is read again as the kubelet renews it.
 *
 * What goes wrong is one error class: the engine refused (its words, and what they mean for a LoraAdapter), or there was
 * no answer to be understood.
 */
import { readFile } from 'node:fs/promises';
import { isIPv6 } from 'node:net';
import { Agent, request } from 'undici';
import { z } from 'zod';
import { adapterRoot, enginePort, loraAdapterReasons } from '../crds/names.ts';
import { enginePaths, type LoadAdapterBody } from '../engine/protocol.ts';
import type { Metrics } from './metrics.ts';

/** What the operator reads of `GET /v1/adapters` (engine/protocol.ts has all of it). */
const adapterListSchema = z.object({
  arena: z.object({ totalBytes: z.number().nonnegative(), adapterBytes: z.number().nonnegative() }),
  /** Engines without one hold no more adapters than the device arena. */
  hostArena: z.object({ totalBytes: z.number().nonnegative() }).default({ totalBytes: 0 }),
  data: z.array(
    z.object({
      digest: z.string(),
      names: z.array(z.string()),
      tier: z.enum(['device', 'host', 'disk']),
      /** Not there: the engine knows no pins. */
      pinned: z.boolean().optional(),
      rank: z.number(),
      modules: z.array(z.string()),
      kind: z.string(),
      bytes: z.number().nonnegative(),
      /** Unix seconds. */
      since: z.number().nonnegative(),
      /** Engines that do not count have no hot adapters. */
      requests: z.number().nonnegative().default(0),
    }),
  ),
});

export type EngineAdapters = z.infer<typeof adapterListSchema>;
export type EngineAdapter = EngineAdapters['data'][number];

export type RefusalReason =
  | typeof loraAdapterReasons.refused
  | typeof loraAdapterReasons.sourceUnavailable
  | typeof loraAdapterReasons.digestMismatch
  | typeof loraAdapterReasons.noRoom;

/** A call failed. The message is for a person: the engine's own where it gave one. */
export class EngineCallError extends Error {
  override name = 'EngineCallError';
  /** The engine's code for it; null when there was no answer to be understood. */
  readonly code: string | null;
  /** What it means for the adapter; null when it says nothing about it and the same call may succeed soon. */
  readonly reason: RefusalReason | null;
  /** Nobody listens at the address. */
  readonly isRefusedConnection: boolean;

  constructor(
    message: string,
    code: string | null = null,
    options: { cause?: unknown; status?: number } = {},
  ) {
    super(message, { cause: options.cause });
    this.code = code;
    this.reason = code === null ? null : reasonOf(code, options.status ?? 500);
    this.isRefusedConnection = (options.cause as { code?: string } | undefined)?.code === 'ECONNREFUSED';
  }
}

const { refused, sourceUnavailable, digestMismatch, noRoom } = loraAdapterReasons;

/** An engine's code -> what it says about the adapter. Others with 4xx refuse the adapter, those with 5xx pass. */
const reasonOfCode: Record<string, RefusalReason | null> = {
  adapter_digest_mismatch: digestMismatch,
  source_unavailable: sourceUnavailable,
  adapter_file_not_found: sourceUnavailable,
  arena_full: noRoom,
  adapter_invalid: refused,
  adapter_rank_too_large: refused,
  adapter_path_refused: refused,
  // About the operator or the engine, not about the adapter.
  unauthorized: null,
  overloaded: null,
};

function reasonOf(code: string, status: number): RefusalReason | null {
  if (Object.hasOwn(reasonOfCode, code)) return reasonOfCode[code]!;
  return status >= 400 && status < 500 && status !== 401 && status !== 403 ? refused : null;
}

/** A list takes milliseconds; an engine may share its cores with its own arithmetic. */
const listTimeoutMs = 5_000;
/** The engine has to fetch, read and hash the source and may wait for pages; a longer load is asked for again. */
const loadTimeoutMs = 600_000;
const unloadTimeoutMs = 10_000;
const connectTimeoutMs = 3_000;
/** Ten thousand adapters take about 5 MB. */
const maxAnswerBytes = 32 << 20;
/** Beside the loads of an engine there is room for its list and an unload. */
const connectionsPerEngine = 8;
/** The kubelet renews a token long before it ends, so a copy this old is still good. */
const tokenAgeMs = 10_000;

export interface EngineClientOptions {
  /** Path; null when engines want no token. */
  tokenFile: string | null;
  metrics: Pick<Metrics, 'engineCalls'>;
}

export class EngineClient {
  readonly #options: EngineClientOptions;
  readonly #agent = new Agent({
    connections: connectionsPerEngine,
    connect: { timeout: connectTimeoutMs },
    // Each call has a timeout of its own.
    headersTimeout: 0,
    bodyTimeout: 0,
    maxResponseSize: maxAnswerBytes,
  });
  #token: { readAtMs: number; header: Promise<Record<string, string>> } | null = null;

  constructor(options: EngineClientOptions) {
    this.#options = options;
  }

  /**
   * What the engine at the pod's address holds.
   * @throws EngineCallError
   */
  list(podIp: string): Promise<EngineAdapters> {
    return this.#counted('list', async () =>
      parseAdapters(await this.#call(podIp, 'GET', enginePaths.adapters, listTimeoutMs)),
    );
  }

  /**
   * Loads what is at `uri` (spec.source.uri of a LoraAdapter) under the name; content that the name has now is replaced
   * and ends with its last request. Resolves when it is resident.
   * @param digest what it must be; undefined takes what is there
   * @param isPinned whether it stays on the device; undefined: as it was, or as what it replaces
   * @throws EngineCallError
   */
  load(podIp: string, name: string, uri: string, digest?: string, isPinned?: boolean): Promise<void> {
    const body: LoadAdapterBody = {
      lora_name: name,
      lora_path: loraPathOf(uri),
      load_inplace: true,
      ...(digest === undefined ? {} : { digest }),
      ...(isPinned === undefined ? {} : { pinned: isPinned }),
    };
    return this.#counted('load', async () => {
      await this.#call(podIp, 'POST', enginePaths.loadAdapter, loadTimeoutMs, body);
    });
  }

  /**
   * Takes the name from the engine; a name that is not there is a success.
   * @throws EngineCallError
   */
  unload(podIp: string, name: string): Promise<void> {
    return this.#counted('unload', async () => {
      try {
        await this.#call(podIp, 'POST', enginePaths.unloadAdapter, unloadTimeoutMs, { lora_name: name });
      } catch (error) {
        if ((error as EngineCallError).code !== 'adapter_not_loaded') throw error;
      }
    });
  }

  /** Ends the calls under way. */
  async close(): Promise<void> {
    await this.#agent.destroy();
  }

  async #counted<T>(call: string, run: () => Promise<T>): Promise<T> {
    const { engineCalls } = this.#options.metrics;
    try {
      const answer = await run();
      engineCalls.inc({ call, result: 'ok' });
      return answer;
    } catch (error) {
      const isRefusal = error instanceof EngineCallError && error.code !== null;
      engineCalls.inc({ call, result: isRefusal ? 'refused' : 'unreachable' });
      throw error;
    }
  }

  /** @returns the body of a 2xx answer */
  async #call(
    podIp: string,
    method: 'GET' | 'POST',
    path: string,
    timeoutMs: number,
    body?: object,
  ): Promise<string> {
    const host = isIPv6(podIp) ? `[${podIp}]` : podIp;
    const what = `${method} ${path} at ${host}`;
    let status: number;
    let text: string;
    try {
      const answer = await request(`http://${host}:${enginePort.number}${path}`, {
        method,
        headers: {
          ...(await this.#authorization()),
          ...(body ? { 'content-type': 'application/json' } : {}),
        },
        ...(body ? { body: JSON.stringify(body) } : {}),
        dispatcher: this.#agent,
        signal: AbortSignal.timeout(timeoutMs),
      });
      status = answer.statusCode;
      text = await answer.body.text();
    } catch (cause) {
      throw new EngineCallError(`${what}: ${sayWhy(cause, timeoutMs)}`, null, { cause });
    }
    if (status >= 200 && status < 300) return text;
    throw toCallError(what, status, text);
  }

  #authorization(): Promise<Record<string, string>> {
    const { tokenFile } = this.#options;
    if (tokenFile === null) return Promise.resolve({});
    const nowMs = performance.now();
    if (this.#token === null || nowMs - this.#token.readAtMs > tokenAgeMs) {
      const header = readFile(tokenFile, 'utf8').then((token) => ({
        authorization: `Bearer ${token.trim()}`,
      }));
      this.#token = { readAtMs: nowMs, header };
      // A file that could not be read is tried again by the next call.
      header.catch(() => {
        if (this.#token?.header === header) this.#token = null;
      });
    }
    return this.#token.header;
  }
}

/** `lora_path` for spec.source.uri: claims are mounted below one folder, what is remote is fetched by the engine itself. */
export function loraPathOf(uri: string): string {
  if (uri.startsWith('pvc://')) return `${adapterRoot}/${uri.slice('pvc://'.length)}`;
  if (uri.startsWith('file://')) return uri.slice('file://'.length);
  return uri;
}

/** The claim of a `pvc://CLAIM/PATH`; null for other sources. */
export function claimOf(uri: string): string | null {
  return /^pvc:\/\/([^/]+)\//.exec(uri)?.[1] ?? null;
}

/** @throws EngineCallError naming the field */
export function parseAdapters(text: string): EngineAdapters {
  let json: unknown;
  try {
    json = JSON.parse(text);
  } catch (cause) {
    throw new EngineCallError(
      `GET ${enginePaths.adapters}: expected JSON, got ${JSON.stringify(text.slice(0, 80))}`,
      null,
      {
        cause,
      },
    );
  }
  const { data, error } = adapterListSchema.safeParse(json);
  if (data) return data;
  const [issue] = error.issues;
  throw new EngineCallError(
    `GET ${enginePaths.adapters}: ${issue!.path.join('.')}: ${issue!.message}`,
    null,
    {
      cause: error,
    },
  );
}

/** The engine's `{error: {message, code}}`, or what else came. */
function toCallError(what: string, status: number, text: string): EngineCallError {
  try {
    const { error } = JSON.parse(text) as { error?: { message?: unknown; code?: unknown } };
    if (typeof error?.message === 'string' && typeof error.code === 'string') {
      return new EngineCallError(error.message, error.code, { status });
    }
  } catch {
    // Not the engine's own answer; what came is said as it is.
  }
  return new EngineCallError(`${what} answered ${status} ${JSON.stringify(text.slice(0, 200))}`);
}

function sayWhy(cause: unknown, timeoutMs: number): string {
  if ((cause as Error).name === 'TimeoutError') return `no answer within ${timeoutMs / 1000} s`;
  return (cause as Error).message || String((cause as { code?: string }).code ?? cause);
}
