/**
 * A live copy of the objects of one kind in one namespace: list, then watch from there, then watch again from the last
 * version seen; list again when the API server no longer knows that version (410). While the API server is away the copy
 * stays as it was last seen, and the wait between tries is bounded.
 *
 * A watch on which nothing changes is silent, and so is one whose other side is gone. Each is therefore asked to end after
 * a while; the server sends a bookmark 2 s before, which moves the version on, and silence beyond that is a failure.
 *
 * The library's own informer asks for no bookmarks and waits up to 30 s to watch again after a quiet watch ended; here
 * a new object must be seen within a second. The library's watch opens a connection of its own each time and loses what a
 * callback throws. The protocol: Kubernetes API Concepts, "Efficient detection of changes".
 */
import { setTimeout as sleep } from 'node:timers/promises';
import type { KubeConfig, KubernetesObject } from '@kubernetes/client-node';
import { ApiError, callApi, watchApi } from './api.ts';

export interface WatchOptions<T extends KubernetesObject> {
  kubeConfig: KubeConfig;
  /** Of the collection, e.g. `/apis/motet.dev/v1alpha1/namespaces/default/tenants`. */
  path: string;
  labelSelector?: string;
  /**
   * An object appeared, changed or went; `before` and `now` are never both undefined, and have different uids when it was
   * deleted and made again unseen. The copy has the change already. What it throws goes to `onError`, and is not tried again.
   */
  onChange: (now: T | undefined, before: T | undefined) => void;
  /** A try failed; the copy may be stale. For one line of log: the same message again only after a minute. */
  onError: (error: Error) => void;
  /** Keeps less of each object; what it drops can never be read. Default, all but managedFields. */
  trim?: (object: T) => T;
  /** Asks for the metadata of the objects alone: what else is in them never leaves the API server. */
  metadataOnly?: boolean;
  /** Silence after which the API server is taken for gone. The server ends each watch after 3/4 of it. Default 40 s. */
  maxSilenceMs?: number;
  /** Objects asked for at a time when listing: bounds what one answer costs both sides. Default 500. */
  pageSize?: number;
}

/** First and longest wait between two tries. */
const backoffMs = { first: 200, most: 2_000 };
/** A try to list that takes longer has failed. */
const listTimeoutMs = 30_000;
/** A watch that ended sooner was no success, so that one that ends at once, again and again, is no busy loop. */
const minWatchMs = 1_000;
/** The same trouble is told again after this time. */
const repeatErrorMs = 60_000;

const metadataForm = {
  list: 'application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1',
  watch: 'application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1',
};

type Status = { code?: number; reason?: string; message?: string };
type Page = { metadata?: { resourceVersion?: string; continue?: string }; items?: KubernetesObject[] };

export class ObjectWatch<T extends KubernetesObject> {
  readonly #options: WatchOptions<T>;
  readonly #maxSilenceMs: number;
  readonly #closing = new AbortController();
  readonly #objects = new Map<string, T>();
  readonly #synced = Promise.withResolvers<void>();
  readonly #loop: Promise<void>;
  #version: string | null = null;
  /** When the API server was last heard (milliseconds, Unix). */
  #heardMs = Date.now();
  #staleSinceMs: number | null = null;
  #told = { message: '', atMs: 0 };

  constructor(options: WatchOptions<T>) {
    this.#options = options;
    this.#maxSilenceMs = options.maxSilenceMs ?? 40_000;
    this.#loop = this.#run();
  }

  /** Resolves when the first list is in. Never rejects: the API server may come back. */
  get synced(): Promise<void> {
    return this.#synced.promise;
  }

  /** When the API server was last heard (milliseconds, Unix), if the last try to hear it failed; null otherwise. */
  get staleSinceMs(): number | null {
    return this.#staleSinceMs;
  }

  get(name: string): T | undefined {
    return this.#objects.get(name);
  }

  list(): T[] {
    return [...this.#objects.values()];
  }

  /** No change is told from now on; resolves when the connection is given up. */
  async close(): Promise<void> {
    this.#closing.abort();
    await this.#loop;
  }

  async #run(): Promise<void> {
    let waitMs = backoffMs.first;
    while (!this.#closing.signal.aborted) {
      const startedMs = performance.now();
      let hasFailed = false;
      try {
        if (this.#version === null) await this.#list();
        await this.#watch(this.#version!);
      } catch (error) {
        if (this.#closing.signal.aborted) return;
        hasFailed = true;
        if (error instanceof ApiError && error.status === 410) {
          this.#version = null;
        } else {
          this.#staleSinceMs ??= this.#heardMs;
          this.#tell(error as Error);
        }
      }
      const isShort = performance.now() - startedMs < minWatchMs;
      if (!isShort) waitMs = backoffMs.first;
      if (!isShort && !hasFailed) continue;
      await this.#pause(waitMs * (0.75 + Math.random() / 2));
      waitMs = Math.min(waitMs * 2, backoffMs.most);
    }
  }

  async #list(): Promise<void> {
    const found = new Map<string, T>();
    let token = '';
    let version = '';
    do {
      const page = await this.#page(token);
      for (const object of page.items ?? []) found.set(object.metadata!.name!, this.#trim(object));
      version = page.metadata?.resourceVersion ?? '';
      token = page.metadata?.continue ?? '';
    } while (token !== '');

    for (const [name, before] of [...this.#objects]) if (!found.has(name)) this.#set(name, undefined, before);
    for (const [name, now] of found) this.#set(name, now, this.#objects.get(name));
    this.#version = version;
    this.#hear();
    this.#synced.resolve();
  }

  #page(token: string): Promise<Page> {
    const { kubeConfig, path, pageSize = 500 } = this.#options;
    const query: Record<string, string> = { ...this.#selector(), limit: String(pageSize) };
    if (token) query.continue = token;
    return callApi<Page>(kubeConfig, {
      path,
      query,
      ...this.#form('list'),
      signal: this.#closing.signal,
      timeoutMs: listTimeoutMs,
    });
  }

  /** Resolves when the server ends the watch. */
  async #watch(fromVersion: string): Promise<void> {
    const { kubeConfig, path } = this.#options;
    const events = await watchApi<KubernetesObject & Status>(kubeConfig, {
      path,
      query: {
        ...this.#selector(),
        resourceVersion: fromVersion,
        allowWatchBookmarks: 'true',
        timeoutSeconds: String(Math.max(1, Math.floor((this.#maxSilenceMs / 1000) * 0.75))),
      },
      ...this.#form('watch'),
      signal: this.#closing.signal,
      maxSilenceMs: this.#maxSilenceMs,
    });
    this.#hear();
    for await (const { type, object } of events) {
      if (type === 'ERROR') {
        const { code = 500, reason = 'Unknown', message = 'the watch failed' } = object;
        throw new ApiError(code, reason, message);
      }
      this.#hear();
      this.#version = object.metadata!.resourceVersion!;
      if (type === 'BOOKMARK') continue;
      const name = object.metadata!.name!;
      this.#set(name, type === 'DELETED' ? undefined : this.#trim(object), this.#objects.get(name));
    }
    this.#hear();
  }

  #selector(): Record<string, string> {
    const { labelSelector } = this.#options;
    return labelSelector ? { labelSelector } : {};
  }

  #form(of: keyof typeof metadataForm): { accept?: string } {
    return this.#options.metadataOnly === true ? { accept: metadataForm[of] } : {};
  }

  #hear(): void {
    this.#heardMs = Date.now();
    this.#staleSinceMs = null;
    this.#told = { message: '', atMs: 0 };
  }

  #set(name: string, now: T | undefined, before: T | undefined): void {
    if (this.#closing.signal.aborted) return;
    if (now === undefined) this.#objects.delete(name);
    else this.#objects.set(name, now);
    const isSame =
      now?.metadata?.resourceVersion === before?.metadata?.resourceVersion &&
      now?.metadata?.uid === before?.metadata?.uid;
    if (isSame) return;
    try {
      this.#options.onChange(now, before);
    } catch (error) {
      this.#options.onError(error as Error);
    }
  }

  #tell(error: Error): void {
    const isRepeated = error.message === this.#told.message && Date.now() - this.#told.atMs < repeatErrorMs;
    if (isRepeated) return;
    this.#told = { message: error.message, atMs: Date.now() };
    this.#options.onError(error);
  }

  #trim(object: KubernetesObject): T {
    delete object.metadata?.managedFields;
    return this.#options.trim?.(object as T) ?? (object as T);
  }

  async #pause(ms: number): Promise<void> {
    await sleep(ms, undefined, { signal: this.#closing.signal }).catch(() => undefined);
  }
}
