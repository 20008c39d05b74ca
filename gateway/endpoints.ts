// The engines and what is where: a set that grows and shrinks. Looks at each engine every half second, at once when it
// is new, and at once when somebody asks for a model that no engine is known to have. What an engine said last is kept
// while it is away (resolve-model.ts). Who is in the set is said from outside: the list of the settings, or discovery.ts.

import { EventEmitter, setMaxListeners } from 'node:events';
import { setTimeout as sleep } from 'node:timers/promises';
import { Agent, request } from 'undici';
import {
  type AdapterList,
  type AdapterStatus,
  enginePaths,
  type ModelCard,
  type ModelList,
} from '../engine/protocol.ts';
import type { EngineHeaders } from './engine-headers.ts';

/** Where an engine is and whose it is. */
export type EndpointSpec = {
  /** What it is as long as it lives: the uid of a pod, since addresses and names come back; otherwise its URL. */
  readonly id: string;
  /** What logs and metrics call it: the name of the pod, or the URL. */
  readonly name: string;
  readonly url: string;
  /** Name of the BaseModel that it is an engine of; null outside of a cluster. */
  readonly baseModel: string | null;
};

/** One engine as the gateway sees it. */
export type Endpoint = EndpointSpec & {
  /** The cluster wants it to get requests. */
  isOffered: boolean;
  /** It is offered, and said when it was last looked at that it takes requests. */
  isReady: boolean;
  /** When it last became ready; null: it is not. */
  readySinceMs: number | null;
  /** When it last answered that it is ready; null: never. */
  lastSeenMs: number | null;
  /** Model id -> its card, as of `lastSeenMs`. */
  cards: ReadonlyMap<string, ModelCard>;
  /** Served name -> the adapter in `adapterList`. */
  adapters: ReadonlyMap<string, AdapterStatus>;
  /** Its adapters and arenas, as of `lastSeenMs`; null when the engine has no such list, as one that is not ours. */
  adapterList: AdapterList | null;
  /** Requests sent to it and not ended. */
  inFlight: number;
  /** Requests sent to it, ever. */
  numSent: number;
  /** Aborted when it is known to be gone for good: nobody waits for a connection to it that is silent. */
  readonly gone: AbortSignal;
  /** Aborted when it has not answered for so long that it is taken for dead; another one when it is back. */
  silent: AbortSignal;
};

type Log = { info(fields: object, message: string): void; warn(fields: object, message: string): void };

/** What is kept of one engine to look at it and to let it go. */
type Watched = {
  endpoint: Endpoint;
  look: () => Promise<void>;
  goes: AbortController;
  /** Of `endpoint.silent`. */
  falls: AbortController;
  /** When it was heard last, whatever it said; at first, when it was added. */
  heardMs: number;
  loop: Promise<void>;
};

/** A look that takes longer counts as failed. Generous: an engine may share its cores with its own arithmetic. */
const lookTimeoutMs = 5_000;
/** A longer list counts as a failed look. Ten thousand cards are a few million bytes. */
const maxLookBytes = 64 << 20;
/** Looks asked for by requests start at least this far apart, however many unknown names come in. */
const lookGapMs = 100;
/** A request for an unknown name waits this long for the looks; one engine that hangs must not hold it up. */
const refreshTimeoutMs = 1_000;

/** Emits `change` after every look and when an engine is found gone, `removed` when one has left the set. */
export class Endpoints extends EventEmitter<{ change: []; removed: [Endpoint] }> {
  readonly #log: Log;
  readonly #headers: EngineHeaders;
  readonly #pollIntervalMs: number;
  readonly #silentAfterMs: number;
  readonly #closing = new AbortController();
  readonly #agent = new Agent({ connections: 2, maxResponseSize: maxLookBytes });
  readonly #watched = new Map<string, Watched>();
  #all: readonly Endpoint[] = [];

  /**
   * @param headers        sent with every look: who the gateway is
   * @param silentAfterMs  an engine that has answered no look for so long is taken for dead
   */
  constructor(headers: EngineHeaders, pollIntervalMs: number, silentAfterMs: number, log: Log) {
    super();
    setMaxListeners(0, this.#closing.signal);
    this.#log = log;
    this.#headers = headers;
    this.#pollIntervalMs = pollIntervalMs;
    this.#silentAfterMs = silentAfterMs;
  }

  get all(): readonly Endpoint[] {
    return this.#all;
  }

  /** It may get requests: looks at it at once, and again and again. One that is offered already stays as it is. */
  offer(spec: EndpointSpec): void {
    const known = this.#watched.get(spec.id)?.endpoint;
    // A pod that got another address is the same pod and another engine.
    if (known !== undefined && (known.url !== spec.url || known.baseModel !== spec.baseModel)) {
      this.remove(spec.id);
    }
    const watched = this.#watched.get(spec.id) ?? this.#add(spec);
    if (watched.endpoint.isOffered) return;
    watched.endpoint.isOffered = true;
    void watched.look();
  }

  /** It gets no new requests. Those that it has go on. */
  withdraw(id: string, reason: string): void {
    const endpoint = this.#watched.get(id)?.endpoint;
    if (!endpoint?.isOffered) return;
    endpoint.isOffered = false;
    this.#setReady(endpoint, false, reason);
    this.emit('change');
  }

  /** It is gone. What still comes from it is passed on; silence is not waited for. */
  remove(id: string): void {
    const watched = this.#watched.get(id);
    if (watched === undefined) return;
    this.withdraw(id, 'it is gone');
    this.#watched.delete(id);
    this.#all = this.#all.filter((endpoint) => endpoint.id !== id);
    watched.goes.abort();
    this.emit('removed', watched.endpoint);
    this.emit('change');
  }

  /**
   * Looks at every engine, or at those of some BaseModels; all who ask while a look is pending share it. Never fails,
   * never takes long.
   */
  async refresh(baseModels: ReadonlySet<string | null> | null = null): Promise<void> {
    const asked = [...this.#watched.values()].filter(
      ({ endpoint }) => endpoint.isOffered && (baseModels === null || baseModels.has(endpoint.baseModel)),
    );
    const timeout = new AbortController();
    await Promise.race([
      Promise.all(asked.map(({ look }) => look())),
      pause(refreshTimeoutMs, timeout.signal),
    ]);
    timeout.abort();
  }

  /** A request could not reach it: it gets no more of them until a look finds it ready. */
  markUnreachable(endpoint: Endpoint): void {
    this.#setReady(endpoint, false, 'it refused a connection');
    this.emit('change');
    void this.#watched.get(endpoint.id)?.look();
  }

  async close(): Promise<void> {
    this.#closing.abort();
    await Promise.all([...this.#watched.values()].map(({ loop }) => loop));
    await this.#agent.destroy();
  }

  #add(spec: EndpointSpec): Watched {
    const goes = new AbortController();
    const falls = new AbortController();
    const endpoint = newEndpoint(spec, goes.signal, falls.signal);
    const look = singleFlight(() => this.#look(watched), lookGapMs);
    const loop = this.#watch(endpoint, look);
    const watched: Watched = { endpoint, look, goes, falls, heardMs: Date.now(), loop };
    this.#watched.set(spec.id, watched);
    this.#all = [...this.#all, endpoint];
    return watched;
  }

  async #watch(endpoint: Endpoint, look: () => Promise<void>): Promise<void> {
    const ends = AbortSignal.any([this.#closing.signal, endpoint.gone]);
    // The first look is the one of `offer`.
    await pause(this.#pollIntervalMs, ends);
    while (!ends.aborted) {
      if (endpoint.isOffered) await look();
      await pause(this.#pollIntervalMs, ends);
    }
  }

  async #look(watched: Watched): Promise<void> {
    const { endpoint } = watched;
    const ends = AbortSignal.any([this.#closing.signal, endpoint.gone]);
    if (ends.aborted) return;
    try {
      const signal = AbortSignal.any([ends, AbortSignal.timeout(lookTimeoutMs)]);
      const [, models, adapters] = await Promise.all([
        this.#get(watched, enginePaths.readyz, signal),
        this.#get(watched, enginePaths.models, signal),
        // Only our own engine has this; without it no adapter is known to be on the device, which is no error.
        this.#get(watched, enginePaths.adapters, signal).catch(() => null),
      ]);
      // It may have been withdrawn while it was asked.
      if (ends.aborted || !endpoint.isOffered) return;
      endpoint.cards = parseCards(models);
      endpoint.adapterList = adapters === null ? null : parseAdapterList(adapters);
      endpoint.adapters = byName(endpoint.adapterList);
      endpoint.lastSeenMs = Date.now();
      this.#setReady(endpoint, true, 'it answered');
    } catch (error) {
      if (ends.aborted) return;
      this.#setReady(endpoint, false, (error as Error).message);
      if (Date.now() - watched.heardMs >= this.#silentAfterMs) watched.falls.abort();
    }
    this.emit('change');
  }

  async #get(watched: Watched, path: string, signal: AbortSignal): Promise<string> {
    const { endpoint } = watched;
    const { statusCode, body } = await request(endpoint.url + path, {
      headers: this.#headers(),
      dispatcher: this.#agent,
      signal,
    });
    const text = await body.text();
    watched.heardMs = Date.now();
    if (watched.falls.signal.aborted) {
      watched.falls = new AbortController();
      endpoint.silent = forMany(watched.falls.signal);
    }
    if (statusCode !== 200) throw new Error(`GET ${path} answered ${statusCode}`);
    return text;
  }

  #setReady(endpoint: Endpoint, isReady: boolean, reason: string): void {
    if (endpoint.isReady === isReady) return;
    endpoint.isReady = isReady;
    endpoint.readySinceMs = isReady ? Date.now() : null;
    const { name: engine, cards } = endpoint;
    if (isReady) this.#log.info({ engine, models: cards.size, reason }, 'engine is ready');
    else this.#log.warn({ engine, models: cards.size, reason }, 'engine is away');
  }
}

/** An engine from the list of the settings. */
export function listedEngine(url: string): EndpointSpec {
  return { id: url, name: url, url, baseModel: null };
}

export function newEndpoint(
  spec: EndpointSpec,
  gone = new AbortController().signal,
  silent = new AbortController().signal,
): Endpoint {
  return {
    ...spec,
    isOffered: false,
    isReady: false,
    readySinceMs: null,
    lastSeenMs: null,
    cards: new Map(),
    adapters: new Map(),
    adapterList: null,
    inFlight: 0,
    numSent: 0,
    gone: forMany(gone),
    silent: forMany(silent),
  };
}

/** Every request in flight listens. */
function forMany(signal: AbortSignal): AbortSignal {
  setMaxListeners(0, signal);
  return signal;
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

function parseAdapterList(text: string): AdapterList {
  const list = JSON.parse(text) as AdapterList;
  if (!Array.isArray(list?.data)) {
    throw new Error(`GET ${enginePaths.adapters}: expected data to be an array`);
  }
  return list;
}

function byName(list: AdapterList | null): Map<string, AdapterStatus> {
  return new Map(
    (list?.data ?? []).flatMap((adapter) => (adapter.names ?? []).map((name) => [name, adapter])),
  );
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
