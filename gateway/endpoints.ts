// The engines and what is where: looks at each engine every half second, and at once when somebody asks for a
// model that no engine is known to have. What an engine said last is kept while it is away (resolve-model.ts).

import { EventEmitter } from 'node:events';
import { setTimeout as sleep } from 'node:timers/promises';
import { Agent, request } from 'undici';
import { type AdapterList, enginePaths, type ModelCard, type ModelList } from '../engine/protocol.ts';

/** One engine as the gateway sees it. */
export type Endpoint = {
  readonly url: string;
  /** It said so when it was last looked at. */
  isReady: boolean;
  /** When it last answered that it is ready; null: never. */
  lastSeenMs: number | null;
  /** Model id -> its card, as of `lastSeenMs`. */
  cards: ReadonlyMap<string, ModelCard>;
  /** Served names of adapters in the device tier, as of `lastSeenMs`. */
  namesOnDevice: ReadonlySet<string>;
  /** Requests sent to it and not ended. */
  inFlight: number;
  /** Requests sent to it, ever. */
  numSent: number;
};

type Log = { info(fields: object, message: string): void; warn(fields: object, message: string): void };

/** A look that takes longer counts as failed. Generous: an engine may share its cores with its own arithmetic. */
const lookTimeoutMs = 5_000;
/** A longer list counts as a failed look. Ten thousand cards are a few million bytes. */
const maxLookBytes = 64 << 20;
/** Looks asked for by requests start at least this far apart, however many unknown names come in. */
const lookGapMs = 100;
/** A request for an unknown name waits this long for the looks; one engine that hangs must not hold it up. */
const refreshTimeoutMs = 1_000;

/** Emits `change` after every look, and when an engine is found gone. */
export class Endpoints extends EventEmitter<{ change: [] }> {
  readonly all: readonly Endpoint[];
  readonly #log: Log;
  readonly #headers: Record<string, string>;
  readonly #closing = new AbortController();
  readonly #agent = new Agent({ connections: 2, maxResponseSize: maxLookBytes });
  readonly #looks: Map<Endpoint, () => Promise<void>>;
  readonly #loops: Promise<void>[];

  /** @param headers sent with every look: the engines' key */
  constructor(urls: string[], headers: Record<string, string>, pollIntervalMs: number, log: Log) {
    super();
    this.#log = log;
    this.#headers = headers;
    this.all = urls.map(newEndpoint);
    this.#looks = new Map(
      this.all.map((endpoint) => [endpoint, singleFlight(() => this.#look(endpoint), lookGapMs)]),
    );
    this.#loops = this.all.map((endpoint) => this.#watch(endpoint, pollIntervalMs));
  }

  /** Looks at every engine; all who ask while a look is pending share it. Never fails, never takes long. */
  async refresh(): Promise<void> {
    const looks = Promise.all(this.all.map((endpoint) => this.#looks.get(endpoint)!()));
    const timeout = new AbortController();
    await Promise.race([looks, pause(refreshTimeoutMs, timeout.signal)]);
    timeout.abort();
  }

  /** A request could not reach it: it gets no more of them until a look finds it ready. */
  markUnreachable(endpoint: Endpoint): void {
    this.#setReady(endpoint, false, 'it refused a connection');
    this.emit('change');
    void this.#looks.get(endpoint)!();
  }

  /** Every model of the engines that are ready, each once, bases before adapters. */
  cards(): ModelCard[] {
    const ready = this.all.filter(({ isReady }) => isReady);
    const byId = new Map(ready.flatMap(({ cards }) => [...cards]).reverse());
    return [...byId.values()].sort(
      (a, b) => Number(a.parent !== null) - Number(b.parent !== null) || (a.id < b.id ? -1 : 1),
    );
  }

  async close(): Promise<void> {
    this.#closing.abort();
    await Promise.all(this.#loops);
    await this.#agent.destroy();
  }

  async #watch(endpoint: Endpoint, intervalMs: number): Promise<void> {
    while (!this.#closing.signal.aborted) {
      await this.#looks.get(endpoint)!();
      await pause(intervalMs, this.#closing.signal);
    }
  }

  async #look(endpoint: Endpoint): Promise<void> {
    if (this.#closing.signal.aborted) return;
    try {
      const signal = AbortSignal.any([this.#closing.signal, AbortSignal.timeout(lookTimeoutMs)]);
      const [, models, adapters] = await Promise.all([
        this.#get(endpoint, enginePaths.readyz, signal),
        this.#get(endpoint, enginePaths.models, signal),
        // Only our own engine has this; without it no adapter is known to be on the device, which is no error.
        this.#get(endpoint, enginePaths.adapters, signal).catch(() => '{"data":[]}'),
      ]);
      endpoint.cards = parseCards(models);
      endpoint.namesOnDevice = parseNamesOnDevice(adapters);
      endpoint.lastSeenMs = Date.now();
      this.#setReady(endpoint, true, 'it answered');
    } catch (error) {
      if (this.#closing.signal.aborted) return;
      this.#setReady(endpoint, false, (error as Error).message);
    }
    this.emit('change');
  }

  async #get(endpoint: Endpoint, path: string, signal: AbortSignal): Promise<string> {
    const { statusCode, body } = await request(endpoint.url + path, {
      headers: this.#headers,
      dispatcher: this.#agent,
      signal,
    });
    const text = await body.text();
    if (statusCode !== 200) throw new Error(`GET ${path} answered ${statusCode}`);
    return text;
  }

  #setReady(endpoint: Endpoint, isReady: boolean, reason: string): void {
    if (endpoint.isReady === isReady) return;
    endpoint.isReady = isReady;
    const fields = { engine: endpoint.url, models: endpoint.cards.size, reason };
    if (isReady) this.#log.info(fields, 'engine is ready');
    else this.#log.warn(fields, 'engine is away');
  }
}

export function newEndpoint(url: string): Endpoint {
  return {
    url,
    isReady: false,
    lastSeenMs: null,
    cards: new Map(),
    namesOnDevice: new Set(),
    inFlight: 0,
    numSent: 0,
  };
}

function parseCards(text: string): Map<string, ModelCard> {
  const { data } = JSON.parse(text) as Partial<ModelList>;
  if (!Array.isArray(data)) throw new Error(`GET ${enginePaths.models}: expected data to be an array`);
  for (const card of data) {
    if (typeof card?.id !== 'string')
      throw new Error(`GET ${enginePaths.models}: expected every card to have an id`);
  }
  return new Map(data.map((card) => [card.id, { ...card, parent: card.parent ?? null }]));
}

function parseNamesOnDevice(text: string): Set<string> {
  const { data } = JSON.parse(text) as Partial<AdapterList>;
  if (!Array.isArray(data)) throw new Error(`GET ${enginePaths.adapters}: expected data to be an array`);
  return new Set(data.filter(({ tier }) => tier === 'device').flatMap(({ names }) => names ?? []));
}

/**
 * A function that runs `work` so that runs never overlap and start at least `gapMs` apart. All callers between two
 * starts get the same run, and that run starts after they called: what it finds is never older than the question.
 */
function singleFlight(work: () => Promise<void>, gapMs: number): () => Promise<void> {
  let running: Promise<void> = Promise.resolve();
  let startedMs = -gapMs;
  let next: Promise<void> | null = null;

  return () => {
    next ??= (async () => {
      await running;
      const waitMs = startedMs + gapMs - performance.now();
      if (waitMs > 0) await sleep(waitMs);
      next = null;
      startedMs = performance.now();
      running = work();
      await running;
    })();
    return next;
  };
}

async function pause(ms: number, signal: AbortSignal): Promise<void> {
  await sleep(ms, undefined, { signal }).catch(() => undefined);
}
