// Finds jobs that have not ended and nobody runs, and runs them, a few at a time; removes what is older than files are kept.

import { randomUUID } from 'node:crypto';
import { hostname } from 'node:os';
import { setTimeout as sleep } from 'node:timers/promises';
import type { Logger } from 'pino';
import { Lease, type Sighting } from './lease.ts';
import { timeOfId } from './objects.ts';
import { type JobParts, runJob } from './run-job.ts';

export type RunnerLimits = {
  /** Jobs that this process runs at a time. */
  maxJobs: number;
  /** After this time without a sign of life a job's owner is taken for dead. */
  leaseMs: number;
  /** Between two looks for jobs. */
  scanMs: number;
  /** How long an ended batch can be asked for. */
  keepSeconds: number;
};

/** Between two removals of what has expired. */
const sweepMs = 6 * 3_600_000;

export class BatchRunner {
  readonly #parts: JobParts;
  readonly #limits: RunnerLimits;
  readonly #log: Logger;
  readonly #owner = `${hostname()} ${process.pid} ${randomUUID().slice(0, 8)}`;
  readonly #stop = new AbortController();
  readonly #cutOff = new AbortController();
  readonly #sightings = new Map<string, Sighting>();
  /** By folder; the tenant's folder is a part of it. */
  readonly #running = new Map<string, Promise<void>>();
  readonly #loop: Promise<void>;
  #active: readonly string[] = [];
  #wake = Promise.withResolvers<void>();

  constructor(parts: JobParts, limits: RunnerLimits, log: Logger) {
    this.#parts = parts;
    this.#limits = limits;
    this.#log = log;
    this.#loop = this.#run();
  }

  /** Jobs that have not ended, whoever runs them, and those that this process runs; as of the last look. */
  get numActive(): number {
    return this.#active.length;
  }

  get numRunning(): number {
    return this.#running.size;
  }

  /** For how long the oldest job that has not ended has waited for its end. */
  oldestSeconds(nowMs: number): number {
    const oldest = this.#active[0];
    return oldest === undefined ? 0 : Math.max(0, (nowMs - timeOfId(oldest.slice(0, -1))) / 1000);
  }

  /** There may be something new. */
  poke(): void {
    this.#wake.resolve();
  }

  /** Sends no more lines, gives those in flight `timeoutMs`, and leaves the jobs to other gateways. */
  async close(timeoutMs: number): Promise<void> {
    this.#stop.abort();
    this.#wake.resolve();
    const timer = setTimeout(() => this.#cutOff.abort(), timeoutMs);
    await this.#loop;
    await Promise.all(this.#running.values());
    clearTimeout(timer);
  }

  async #run(): Promise<void> {
    let sweptMs = Number.NEGATIVE_INFINITY;
    while (!this.#stop.signal.aborted) {
      this.#wake = Promise.withResolvers<void>();
      try {
        await this.#scan();
        if (performance.now() - sweptMs > sweepMs) {
          sweptMs = performance.now();
          await this.#sweep();
        }
      } catch (error) {
        this.#log.warn({ cause: (error as Error).message }, 'batches cannot be looked for');
      }
      const over = new AbortController();
      const pause = sleep(this.#limits.scanMs, undefined, { signal: over.signal });
      await Promise.race([this.#wake.promise, pause.catch(() => undefined)]);
      over.abort();
    }
  }

  async #scan(): Promise<void> {
    this.#active = await this.#parts.jobs.active();
    for (const prefix of this.#sightings.keys()) {
      if (!this.#active.some((folder) => `${folder}owners/` === prefix)) this.#sightings.delete(prefix);
    }
    for (const folder of inTurns(this.#active, [...this.#running.keys()])) {
      if (this.#stop.signal.aborted || this.#running.size >= this.#limits.maxJobs) return;
      await this.#tryBegin(folder);
    }
  }

  async #tryBegin(folder: string): Promise<void> {
    const { store, jobs } = this.#parts;
    const lease = await Lease.claim(
      store,
      `${folder}owners/`,
      { owner: this.#owner, leaseMs: this.#limits.leaseMs },
      this.#sightings,
    );
    if (lease === null) return;
    // Read after the claim: until then somebody else may have ended it.
    const parts = await jobs.read(folder).catch(async (error: unknown) => {
      await lease.release();
      throw error;
    });
    if (parts === null || parts.final !== null) {
      await lease.end();
      if (parts === null) await jobs.forgetAbandoned(folder);
      else await jobs.tidy(parts.record);
      return;
    }
    const { record } = parts;
    const running = this.#runOne(folder, lease, record).finally(() => {
      this.#running.delete(folder);
      this.poke();
    });
    this.#running.set(folder, running);
  }

  async #runOne(folder: string, lease: Lease, record: Parameters<typeof runJob>[0]): Promise<void> {
    const { id: batch, tenant } = record;
    const about = { batch, ...(tenant !== null && { tenant }) };
    this.#log.info({ ...about, owner: lease.number }, 'batch begins');
    try {
      const signals = { stop: this.#stop.signal, cutOff: this.#cutOff.signal };
      const status = await runJob(record, lease, this.#parts, signals);
      const counts = status && (await this.#parts.jobs.read(folder))?.final?.request_counts;
      this.#log.info({ ...about, status: status ?? 'left', ...counts }, 'batch ends');
      if (status === null) await lease.release();
      else await lease.end();
    } catch (error) {
      // It is begun again, by whoever looks next; the lease is let go only after its time, so that it is not at once.
      this.#log.error({ ...about, cause: (error as Error).stack }, 'batch failed here');
      await lease.end();
    }
  }

  async #sweep(): Promise<void> {
    const { files, jobs, nowMs } = this.#parts;
    const numBatches = await jobs.removeOlder(nowMs() - this.#limits.keepSeconds * 1000);
    const numFiles = await files.removeExpired();
    if (numBatches + numFiles > 0) this.#log.info({ numBatches, numFiles }, 'expired batches are removed');
  }
}

/** Those that do not run, so that tenants take turns: first of those with the fewest that run, then by age. */
export function inTurns(active: readonly string[], running: readonly string[]): string[] {
  const tenantOf = (folder: string) => folder.split('/')[1]!;
  const numTaken = new Map<string, number>();
  const take = (folder: string) => {
    const turn = numTaken.get(tenantOf(folder)) ?? 0;
    numTaken.set(tenantOf(folder), turn + 1);
    return turn;
  };
  for (const folder of running) take(folder);
  return active
    .filter((folder) => !running.includes(folder))
    .map((folder, age) => ({ folder, age, turn: take(folder) }))
    .sort((a, b) => a.turn - b.turn || a.age - b.age)
    .map(({ folder }) => folder);
}
