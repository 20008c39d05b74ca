/**
 * A live copy of the objects of one kind in one namespace: list, then watch from there, then watch again from the last
 * version seen; list again when the API server no longer knows that version (410). Bookmarks keep the version fresh while
 * nothing changes. While the API server is away the copy stays as it was last seen, and the wait between tries is bounded.
 *
 * The library's own informer asks for no bookmarks and waits up to 30 s to watch again after a quiet watch ended; here
 * a new object must be seen within a second. The protocol: Kubernetes API Concepts, "Efficient detection of changes".
 */
import { setTimeout as sleep } from 'node:timers/promises';
import { type KubeConfig, type KubernetesObject, Watch } from '@kubernetes/client-node';
import { callApi } from './api.ts';

export interface WatchOptions<T extends KubernetesObject> {
  kubeConfig: KubeConfig;
  /** Of the collection, e.g. `/apis/motet.dev/v1alpha1/namespaces/default/tenants`. */
  path: string;
  labelSelector?: string;
  /** An object appeared, changed or went; `before` and `now` are never both undefined. */
  onChange: (now: T | undefined, before: T | undefined) => void;
  /** A try failed; the copy may be stale from `sinceMs` on. For one line of log. */
  onError: (error: Error) => void;
  /** Keeps less of each object; what it drops can never be read. Default, all but managedFields. */
  trim?: (object: T) => T;
}

/** First and longest wait between two tries. */
const backoffMs = { first: 200, most: 5_000 };
/** A try that takes longer to connect or to list has failed. */
const listTimeoutMs = 30_000;
/** Objects asked for at a time: bounds what one answer costs both sides. */
const pageSize = 500;

type WatchEvent = { type: string; object: KubernetesObject & { code?: number; message?: string } };
type Page = { metadata?: { resourceVersion?: string; continue?: string }; items?: KubernetesObject[] };

export class ObjectWatch<T extends KubernetesObject> {
  readonly #options: WatchOptions<T>;
  readonly #closing = new AbortController();
  readonly #objects = new Map<string, T>();
  readonly #synced = Promise.withResolvers<void>();
  readonly #loop: Promise<void>;
  #version: string | null = null;
  #staleSinceMs: number | null = null;

  constructor(options: WatchOptions<T>) {
    this.#options = options;
    this.#loop = this.#run();
  }

  /** Resolves when the first list is in. Never rejects: the API server may come back. */
  get synced(): Promise<void> {
    return this.#synced.promise;
  }

  /** Since when (milliseconds, Unix) the API server has not been heard; null while it is. */
  get staleSinceMs(): number | null {
    return this.#staleSinceMs;
  }

  get(name: string): T | undefined {
    return this.#objects.get(name);
  }

  list(): T[] {
    return [...this.#objects.values()];
  }

  async close(): Promise<void> {
    this.#closing.abort();
    await this.#loop;
  }

  async #run(): Promise<void> {
    let waitMs = backoffMs.first;
    while (!this.#closing.signal.aborted) {
      try {
        if (this.#version === null) await this.#list();
        const heard = await this.#watch(this.#version!);
        if (heard) waitMs = backoffMs.first;
        // The server ends watches now and then; one that ends at once, again and again, must not become a busy loop.
        else await this.#pause(waitMs);
      } catch (error) {
        if (this.#closing.signal.aborted) return;
        const { status, statusCode } = error as { status?: number; statusCode?: number };
        if ((status ?? statusCode) === 410) {
          this.#version = null;
          continue;
        }
        this.#staleSinceMs ??= Date.now();
        this.#options.onError(error as Error);
        await this.#pause(waitMs * (0.75 + Math.random() / 2));
        waitMs = Math.min(waitMs * 2, backoffMs.most);
      }
    }
  }

  async #list(): Promise<void> {
    const found = new Map<string, T>();
    let token = '';
    let version = '';
    do {
      const page = await this.#get(token);
      for (const object of page.items ?? []) found.set(object.metadata!.name!, this.#trim(object));
      version = page.metadata?.resourceVersion ?? '';
      token = page.metadata?.continue ?? '';
    } while (token !== '');

    for (const [name, before] of [...this.#objects]) if (!found.has(name)) this.#set(name, undefined, before);
    for (const [name, now] of found) this.#set(name, now, this.#objects.get(name));
    this.#version = version;
    this.#staleSinceMs = null;
    this.#synced.resolve();
  }

  #get(token: string): Promise<Page> {
    const { kubeConfig, path, labelSelector } = this.#options;
    const query: Record<string, string> = { limit: String(pageSize) };
    if (labelSelector) query.labelSelector = labelSelector;
    if (token) query.continue = token;
    return callApi<Page>(kubeConfig, { path, query, signal: this.#closing.signal, timeoutMs: listTimeoutMs });
  }

  /** Resolves when the server ends the watch: true if anything was heard in it. */
  #watch(fromVersion: string): Promise<boolean> {
    const { promise, resolve, reject } = Promise.withResolvers<boolean>();
    let heard = false;
    let failure: Error | null = null;
    const onEvent = (type: string, object: WatchEvent['object']) => {
      if (type === 'ERROR') {
        failure = Object.assign(new Error(object.message ?? 'the watch failed'), { statusCode: object.code });
        return;
      }
      heard = true;
      this.#staleSinceMs = null;
      this.#version = object.metadata!.resourceVersion!;
      if (type === 'BOOKMARK') return;
      const name = object.metadata!.name!;
      this.#set(name, type === 'DELETED' ? undefined : this.#trim(object), this.#objects.get(name));
    };
    const onEnd = (error: unknown) => {
      // The library ends a watch on which nothing came for 30 s, in case the other side is gone without a word.
      if ((error as Error | null)?.name === 'TimeoutError') resolve(true);
      else if (failure ?? error) reject(failure ?? (error as Error));
      else resolve(heard);
    };
    const { kubeConfig, path, labelSelector } = this.#options;
    const query = {
      resourceVersion: fromVersion,
      allowWatchBookmarks: true,
      ...(labelSelector ? { labelSelector } : {}),
    };
    const started = new Watch(kubeConfig).watch(path, query, onEvent, onEnd);
    const abort = () => void started.then((controller) => controller.abort());
    started.then(() => {
      if (this.#closing.signal.aborted) abort();
      else this.#closing.signal.addEventListener('abort', abort);
    }, reject);
    return promise.finally(() => this.#closing.signal.removeEventListener('abort', abort));
  }

  #set(name: string, now: T | undefined, before: T | undefined): void {
    if (now === undefined) this.#objects.delete(name);
    else this.#objects.set(name, now);
    const isSame = now?.metadata?.resourceVersion === before?.metadata?.resourceVersion;
    if (!isSame || now?.metadata?.uid !== before?.metadata?.uid) this.#options.onChange(now, before);
  }

  #trim(object: KubernetesObject): T {
    delete object.metadata?.managedFields;
    return this.#options.trim?.(object as T) ?? (object as T);
  }

  async #pause(ms: number): Promise<void> {
    await sleep(ms, undefined, { signal: this.#closing.signal }).catch(() => undefined);
  }
}
