// Tells the operator that somebody asks for what is there only on demand: the time goes into the resource's status, where
// all gateways and the operator read it. However many ask, it is written once in a while; a herd at one model is one write.

import type { KubeConfig } from '@kubernetes/client-node';
import { callApi, motetPath } from '../../crds/api.ts';
import { apiVersion, type BaseModel, type LoraAdapter } from '../../crds/types.ts';

/** A resource with `spec.onDemand`. */
export type OnDemand = { kind: 'BaseModel' | 'LoraAdapter'; name: string; idleMinutes: number };

export type AskWriterOptions = {
  kubeConfig: KubeConfig;
  namespace: string;
  /** The newest that is known of a resource. */
  current(asked: OnDemand): BaseModel | LoraAdapter | undefined;
  onError(error: Error): void;
};

const fieldManager = 'motet-gateway';
const timeoutMs = 5_000;
const refreshMs = 60_000;
/** Between two tries, while the API server refuses or the watch has not brought what was written. */
const retryMs = 2_000;

/** How old the time that somebody asked may become while somebody does. */
export function refreshAfterMs({ idleMinutes }: OnDemand): number {
  return Math.min(refreshMs, (idleMinutes * 60_000) / 4);
}

export class AskWriter {
  readonly #options: AskWriterOptions;
  readonly #closing = new AbortController();
  readonly #triedMs = new Map<string, number>();
  readonly #writing = new Set<Promise<void>>();

  constructor(options: AskWriterOptions) {
    this.#options = options;
  }

  /** Somebody asks now. Returns at once. */
  ask(asked: OnDemand, nowMs: number): void {
    const known = this.#options.current(asked);
    if (known === undefined) return;
    const { askedAt } = known.status ?? {};
    if (askedAt !== undefined && nowMs - new Date(askedAt).getTime() < refreshAfterMs(asked)) return;
    const key = `${asked.kind}/${asked.name}`;
    if (nowMs - (this.#triedMs.get(key) ?? Number.NEGATIVE_INFINITY) < retryMs) return;
    for (const [one, triedMs] of this.#triedMs) if (nowMs - triedMs >= retryMs) this.#triedMs.delete(one);
    this.#triedMs.set(key, nowMs);
    const done = this.#write(asked, known.metadata.uid, nowMs)
      .catch((error: Error) => {
        if (!this.#closing.signal.aborted) this.#options.onError(error);
      })
      .finally(() => this.#writing.delete(done));
    this.#writing.add(done);
  }

  async close(): Promise<void> {
    this.#closing.abort();
    await Promise.all(this.#writing);
  }

  async #write({ kind, name }: OnDemand, uid: string | undefined, nowMs: number): Promise<void> {
    const { kubeConfig, namespace } = this.#options;
    const askedAt = new Date(nowMs).toISOString().replace(/\.\d+Z$/, 'Z');
    await callApi(kubeConfig, {
      signal: this.#closing.signal,
      timeoutMs,
      method: 'PATCH',
      path: motetPath(kind, namespace, name, 'status'),
      query: { fieldManager, force: 'true' },
      contentType: 'application/apply-patch+yaml',
      body: { apiVersion, kind, metadata: { name, uid }, status: { askedAt } },
    });
  }
}
