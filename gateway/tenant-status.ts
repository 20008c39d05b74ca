// Writes what the gateway found about each Tenant into its status. Several gateways find the same and write the same:
// each waits a moment of its own and then writes only what differs from what is there.

import { setTimeout as sleep } from 'node:timers/promises';
import type { KubeConfig } from '@kubernetes/client-node';
import { ApiError, callApi, motetPath } from '../crds/api.ts';
import { apiVersion, type Tenant, type TenantStatus } from '../crds/types.ts';

export const fieldManager = 'motet-gateway';

export type StatusWriterOptions = {
  /** Carries one write out; the signal ends it with the writer. */
  write: (tenant: Tenant, status: TenantStatus, signal: AbortSignal) => Promise<void>;
  /** Every tenant with the status that it should have, as of now. */
  wanted: () => { tenant: Tenant; status: TenantStatus }[];
  onError: (error: Error) => void;
};

/** Between a change and its writes: what changes together is written once, and by one gateway. */
const settleMs = { least: 200, most: 1_000 };
/** Between two writes, and after one that failed. */
const gapMs = 50;
const retryMs = 5_000;
/** A status that was written is not written again for this long: the watch may not have brought it yet, or another
 * gateway may see it otherwise for a while. */
const holdMs = 5_000;

export class TenantStatusWriter {
  readonly #options: StatusWriterOptions;
  readonly #closing = new AbortController();
  readonly #written = new Map<string, { text: string; untilMs: number }>();
  readonly #loop: Promise<void>;
  #isDirty = false;
  #wake = new AbortController();

  constructor(options: StatusWriterOptions) {
    this.#options = options;
    this.#loop = this.#run();
  }

  /** Something that a status says may have changed. */
  changed(): void {
    this.#isDirty = true;
    this.#wake.abort();
  }

  async close(): Promise<void> {
    this.#closing.abort();
    await this.#loop;
  }

  async #run(): Promise<void> {
    while (!this.#closing.signal.aborted) {
      if (!this.#isDirty) await this.#pause(60_000, this.#wake.signal);
      this.#wake = new AbortController();
      if (!this.#isDirty) continue;
      await this.#pause(settleMs.least + Math.random() * (settleMs.most - settleMs.least));
      this.#isDirty = false;
      await this.#writeAll();
    }
  }

  async #writeAll(): Promise<void> {
    const uids = new Set<string>();
    let hasFailed = false;
    for (const { tenant, status } of this.#options.wanted()) {
      const uid = tenant.metadata.uid!;
      uids.add(uid);
      const text = canonical(status);
      const held = this.#written.get(uid);
      if (text === canonical(ownPart(tenant.status))) continue;
      if (held?.text === text && Date.now() < held.untilMs) {
        setTimeout(() => this.changed(), holdMs).unref();
        continue;
      }
      if (this.#closing.signal.aborted) return;
      try {
        await this.#options.write(tenant, status, this.#closing.signal);
        this.#written.set(uid, { text, untilMs: Date.now() + holdMs });
        await this.#pause(gapMs);
      } catch (error) {
        // Gone, or made anew under its name.
        if (error instanceof ApiError && (error.status === 404 || error.status === 409)) continue;
        if (this.#closing.signal.aborted) return;
        this.#options.onError(error as Error);
        hasFailed = true;
        // What is refused of one may be accepted of another; who does not answer is not asked again and again.
        if (!(error instanceof ApiError)) break;
      }
    }
    if (hasFailed) {
      this.#isDirty = true;
      return this.#pause(retryMs * (0.75 + Math.random() / 2));
    }
    for (const uid of [...this.#written.keys()]) if (!uids.has(uid)) this.#written.delete(uid);
  }

  async #pause(ms: number, signal?: AbortSignal): Promise<void> {
    const ends = signal ? AbortSignal.any([this.#closing.signal, signal]) : this.#closing.signal;
    await sleep(ms, undefined, { signal: ends }).catch(() => undefined);
  }
}

/** What a change of a Tenant asks for. */
export type TenantChange =
  /** Its spec, or that it came or went: keys and rights are to be judged again. */
  | 'spec'
  /** Of its status what the writer writes: it is to be compared with what it should be. */
  | 'status'
  /** What others write, as its usage each minute. */
  | 'other';

export function changeOf(now: Tenant | undefined, before: Tenant | undefined): TenantChange {
  const isSame =
    now?.metadata.uid === before?.metadata.uid && now?.metadata.generation === before?.metadata.generation;
  if (!isSame) return 'spec';
  return canonical(ownPart(now?.status)) === canonical(ownPart(before?.status)) ? 'other' : 'status';
}

function ownPart(status: TenantStatus = {}): TenantStatus {
  const { usage: _, ...own } = status;
  return own;
}

/** Server-side apply: the fields are ours, whoever wrote them before. */
export async function applyTenantStatus(
  kubeConfig: KubeConfig,
  namespace: string,
  { metadata }: Tenant,
  status: TenantStatus,
  signal: AbortSignal,
): Promise<void> {
  const { name, uid } = metadata;
  await callApi(kubeConfig, {
    signal,
    method: 'PATCH',
    path: motetPath('Tenant', namespace, name!, 'status'),
    query: { fieldManager, force: 'true' },
    contentType: 'application/apply-patch+yaml',
    body: { apiVersion, kind: 'Tenant', metadata: { name, uid }, status },
  });
}

/** The same text for the same content, whatever the order of its fields and the time of the last transition. */
function canonical(value: unknown): string {
  return JSON.stringify(value, (key, part: unknown) => {
    if (key === 'lastTransitionTime') return undefined;
    return part !== null && typeof part === 'object' && !Array.isArray(part)
      ? Object.fromEntries(Object.entries(part).sort(([a], [b]) => (a < b ? -1 : 1)))
      : part;
  });
}
