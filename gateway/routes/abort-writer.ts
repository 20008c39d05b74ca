// Tells the other gateways, and people, that a target of a route was aborted: it is written into the route's status, which
// every gateway reads. The list has one writer, this process' kind; two of them that write at once are kept apart by the
// object's version, and the one that came second tries again when it has heard of the first.

import { setTimeout as sleep } from 'node:timers/promises';
import type { KubeConfig } from '@kubernetes/client-node';
import { ApiError, callApi, motetPath } from '../../crds/api.ts';
import { type AdapterRoute, apiVersion } from '../../crds/types.ts';

export type Aborted = NonNullable<NonNullable<AdapterRoute['status']>['aborted']>[number];

const fieldManager = 'motet-gateway';
const retryMs = 1_000;
const timeoutMs = 5_000;

export class AbortWriter {
  readonly #kubeConfig: KubeConfig;
  readonly #namespace: string;
  readonly #current: (route: string) => AdapterRoute | undefined;
  readonly #onError: (error: Error) => void;
  readonly #closing = new AbortController();
  readonly #writing = new Set<Promise<void>>();

  /** @param current  the newest that is known of a route */
  constructor(
    kubeConfig: KubeConfig,
    namespace: string,
    current: (route: string) => AdapterRoute | undefined,
    onError: (error: Error) => void,
  ) {
    this.#kubeConfig = kubeConfig;
    this.#namespace = namespace;
    this.#current = current;
    this.#onError = onError;
  }

  /** Writes it, again and again until it is written, the route has another spec, or the gateway ends. */
  write(route: string, aborted: Aborted): void {
    const done = this.#writeUntilDone(route, aborted).finally(() => this.#writing.delete(done));
    this.#writing.add(done);
  }

  async close(): Promise<void> {
    this.#closing.abort();
    await Promise.all(this.#writing);
  }

  async #writeUntilDone(route: string, aborted: Aborted): Promise<void> {
    const { signal } = this.#closing;
    while (!signal.aborted) {
      try {
        return await this.#tryWrite(route, aborted, signal);
      } catch (error) {
        if (signal.aborted || (error instanceof ApiError && error.status === 404)) return;
        // Somebody else wrote in between.
        if (!(error instanceof ApiError && error.status === 409)) this.#onError(error as Error);
        await sleep(retryMs * (0.5 + Math.random()), undefined, { signal }).catch(() => undefined);
      }
    }
  }

  async #tryWrite(name: string, aborted: Aborted, signal: AbortSignal): Promise<void> {
    const { metadata, status } = this.#current(name) ?? {};
    if (metadata?.generation !== aborted.generation) return;
    // What an earlier spec was aborted for is over.
    const others = status?.aborted?.filter(({ generation }) => generation === aborted.generation) ?? [];
    if (others.some(({ target }) => target === aborted.target)) return;
    await callApi(this.#kubeConfig, {
      signal,
      timeoutMs,
      method: 'PATCH',
      path: motetPath('AdapterRoute', this.#namespace, name, 'status'),
      query: { fieldManager, force: 'true' },
      contentType: 'application/apply-patch+yaml',
      body: {
        apiVersion,
        kind: 'AdapterRoute',
        metadata: { name, uid: metadata.uid, resourceVersion: metadata.resourceVersion },
        status: { aborted: [...others, aborted] },
      },
    });
  }
}
