/**
 * One active operator of several, by a Lease. The holder writes the lease every few seconds. Others watch it by their own
 * clock: a lease that did not change for its whole duration has no holder any more, whatever times stand in it. The holder
 * counts from the moment before its last write, and stops by itself after two thirds of the duration: it has stopped
 * before anyone else may start. Two writers at a time are told apart by the resourceVersion.
 * The protocol is that of Kubernetes' own components (client-go, tools/leaderelection).
 */
import type { KubeConfig, V1Lease } from '@kubernetes/client-node';
import type { Logger } from 'pino';
import { ApiError, callApi } from '../crds/api.ts';
import { type Clock, pause } from './clock.ts';
import { OperatorError } from './errors.ts';

export interface LeaderOptions {
  kubeConfig: KubeConfig;
  namespace: string;
  leaseName: string;
  identity: string;
  leaseSeconds: number;
  clock: Clock;
  log: Logger;
}

/** The lease as last read, and when a change in it was last seen, by our own clock. */
export interface Observed {
  lease: V1Lease | null;
  changedAtMs: number;
}

/** What to do about the lease: write it as ours, or look again later. */
export function decideLease(
  { lease, changedAtMs }: Observed,
  identity: string,
  nowMs: number,
): 'create' | 'take' | 'renew' | 'wait' {
  if (lease === null) return 'create';
  const { holderIdentity, leaseDurationSeconds = 0 } = lease.spec ?? {};
  if (holderIdentity === identity) return 'renew';
  // A holder that ended in order leaves no name.
  if (!holderIdentity) return 'take';
  return nowMs - changedAtMs >= leaseDurationSeconds * 1000 ? 'take' : 'wait';
}

export class Leader {
  readonly #options: LeaderOptions;
  readonly #path: string;
  #observed: Observed = { lease: null, changedAtMs: Number.NEGATIVE_INFINITY };
  /** Until when this process may act; null while another leads. */
  #deadlineMs: number | null = null;

  constructor(options: LeaderOptions) {
    this.#options = options;
    this.#path = `/apis/coordination.k8s.io/v1/namespaces/${options.namespace}/leases`;
  }

  /** True while no other process can have the lease. */
  get isLeader(): boolean {
    return this.#deadlineMs !== null && this.#options.clock.nowMs() < this.#deadlineMs;
  }

  /** @throws OperatorError not_leader */
  assertLeader(): void {
    if (!this.isLeader) throw new OperatorError('not_leader', 'this operator does not hold the lease');
  }

  /** Resolves when the lease is held, or when `signal` ends the wait: then false. */
  async acquire(signal: AbortSignal): Promise<boolean> {
    while (!signal.aborted) {
      await this.#try();
      if (this.isLeader) return true;
      await pause(this.#options.clock, this.#retryMs, signal);
    }
    return false;
  }

  /**
   * Renews until `signal` ends it.
   * @throws OperatorError lease_lost when it could not be renewed in time, or somebody else has it
   */
  async hold(signal: AbortSignal): Promise<void> {
    while (!signal.aborted) {
      await pause(this.#options.clock, this.#retryMs, signal);
      if (signal.aborted) return;
      // What was lost is not taken again: this process does not know what happened meanwhile.
      if (this.isLeader) await this.#try();
      if (!this.isLeader) {
        const holder = this.#observed.lease?.spec?.holderIdentity;
        throw new OperatorError(
          'lease_lost',
          `the lease was not renewed in time, or is another's; its holder was ${holder || 'nobody'} last`,
        );
      }
    }
  }

  /** Leaves the lease to the next one at once. For the end of the process: nothing may be written after it. */
  async release(): Promise<void> {
    const { lease } = this.#observed;
    if (!this.isLeader || lease === null) return;
    this.#deadlineMs = null;
    const spec = { ...lease.spec, holderIdentity: '', leaseDurationSeconds: 1, renewTime: this.#now() };
    try {
      await this.#write('PUT', { ...lease, spec: spec as never });
    } catch (error) {
      this.#options.log.warn(
        { error: (error as Error).message },
        'the lease could not be released; it runs out',
      );
    }
  }

  get #retryMs(): number {
    return (this.#options.leaseSeconds * 1000) / 7.5;
  }

  /** Reads the lease and writes it if it can be ours. Failures are logged: the deadline decides what they mean. */
  async #try(): Promise<void> {
    const { clock, identity, log } = this.#options;
    try {
      if (!this.isLeader) await this.#read();
      const decision = decideLease(this.#observed, identity, clock.nowMs());
      if (decision === 'wait') return;
      const startedMs = clock.nowMs();
      await this.#write(decision === 'create' ? 'POST' : 'PUT', this.#leaseOfOurs(decision));
      this.#deadlineMs = startedMs + (this.#options.leaseSeconds * 1000 * 2) / 3;
    } catch (error) {
      // Another one was faster, or somebody changed or deleted the lease: what is there now decides, at the next try.
      const isStale = error instanceof ApiError && (error.status === 409 || error.status === 404);
      if (!isStale) log.warn({ error: (error as Error).message }, 'the lease could not be read or written');
      else if (this.isLeader) await this.#read().catch(() => undefined);
      const holder = this.#observed.lease?.spec?.holderIdentity;
      if (holder !== undefined && holder !== identity) this.#deadlineMs = null;
    }
  }

  #leaseOfOurs(decision: 'create' | 'take' | 'renew'): object {
    const { identity, leaseSeconds, namespace, leaseName } = this.#options;
    const { lease } = this.#observed;
    const now = this.#now();
    const isRenewed = decision === 'renew';
    return {
      apiVersion: 'coordination.k8s.io/v1',
      kind: 'Lease',
      metadata: lease?.metadata ?? { namespace, name: leaseName },
      spec: {
        holderIdentity: identity,
        leaseDurationSeconds: leaseSeconds,
        acquireTime: isRenewed ? lease!.spec!.acquireTime : now,
        renewTime: now,
        leaseTransitions: (lease?.spec?.leaseTransitions ?? 0) + (isRenewed || lease === null ? 0 : 1),
      },
    };
  }

  async #read(): Promise<void> {
    const { kubeConfig, leaseName } = this.#options;
    try {
      this.#observe(
        await callApi<V1Lease>(kubeConfig, { path: `${this.#path}/${leaseName}`, timeoutMs: this.#retryMs }),
      );
    } catch (error) {
      if (!(error instanceof ApiError && error.status === 404)) throw error;
      this.#observe(null);
    }
  }

  async #write(method: 'POST' | 'PUT', body: object): Promise<void> {
    const { kubeConfig, leaseName } = this.#options;
    const path = method === 'POST' ? this.#path : `${this.#path}/${leaseName}`;
    this.#observe(await callApi<V1Lease>(kubeConfig, { method, path, body, timeoutMs: this.#retryMs * 2 }));
  }

  #observe(lease: V1Lease | null): void {
    const before = this.#observed.lease?.metadata?.resourceVersion;
    const isSame = lease !== null && lease.metadata!.resourceVersion === before;
    const changedAtMs = isSame ? this.#observed.changedAtMs : this.#options.clock.nowMs();
    this.#observed = { lease, changedAtMs };
  }

  /** MicroTime, with six digits. */
  #now(): string {
    return this.#options.clock.date().toISOString().replace('Z', '000Z');
  }
}
