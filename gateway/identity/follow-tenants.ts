// The tenants file as it is now: read at the start, and again when it or a file with a key changes, be it replaced or written in
// place. A file that is wrong, gone or half written changes nothing: what was read last goes on, and the log says why, once. A file
// with a key that is gone takes its key along, as a Secret does.

import { stat } from 'node:fs/promises';
import { resolve } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { Worker } from 'node:worker_threads';
import { type Caller, callersByDigest } from '../auth.ts';
import { ConfigError } from '../config.ts';
import { tokenProblems } from '../tenants.ts';
import type { OidcSettings } from './oidc.ts';
import type { Reading } from './read-tenants.ts';
import type { FileTenant, ReadFile } from './tenants-file.ts';
import { ruleOf, type TokenRules } from './tokens.ts';

/** What the file says, as requests ask for it. Another object after each change. */
export type Known = {
  file: ReadFile;
  tenants: ReadonlyMap<string, FileTenant>;
  /** By the digest of their keys. */
  callers: ReadonlyMap<string, Caller>;
  tokenRules: TokenRules;
};

type Parts = { path: string; own: OidcSettings | null; log: Log; reader: Reader };

type Taken = Exclude<Reading, { problem: string }>;

type Log = { info(fields: object, message: string): void; warn(fields: object, message: string): void };

/** A change is read when two looks in a row saw the same, so not in the middle of a write. */
const lookEveryMs = 100;
/** A file that is written all the time is read as it is then. */
const maxUnsettledMs = 500;
const readTimeoutMs = 10_000;
/** What may pass is tried again after this, and after twice as long each time again. */
const retryAfterMs = 5_000;
const maxRetryAfterMs = 300_000;
/** A file of the largest size that says something needs less. */
const maxHeapMb = 512;
/** Problems with keys that the log has one by one. */
const maxLoggedProblems = 20;

export class FollowedTenants {
  readonly #path: string;
  readonly #own: OidcSettings | null;
  readonly #log: Log;
  readonly #reader: Reader;
  readonly #closing = new AbortController();
  #files: readonly string[] = [];
  /** What the looks at the files said when they were read. */
  #seen: string;
  #known: Known;
  #digest: string;
  #problems = '';
  /** Why the file as it is now cannot be taken over, since when, and when it is tried again though it has not changed. */
  #stale: { problem: string; sinceMs: number; retryMs: number; numTries: number } | null = null;
  readonly #following: Promise<void>;

  /**
   * @param path  of the file
   * @param own   the gateway's own issuer of tokens
   * @throws ConfigError when the file cannot be used
   */
  static async open(path: string, own: OidcSettings | null, log: Log): Promise<FollowedTenants> {
    const absolute = resolve(path);
    const seen = await look([absolute]);
    const reader = new Reader();
    const reading = await reader.read(absolute);
    if ('problem' in reading) {
      await reader.close();
      throw new ConfigError(`--tenants-file ${path}: ${reading.problem}`);
    }
    return new FollowedTenants({ path: absolute, own, log, reader }, seen, reading);
  }

  private constructor({ path, own, log, reader }: Parts, seen: string, reading: Taken) {
    this.#path = path;
    this.#reader = reader;
    this.#own = own;
    this.#log = log;
    this.#seen = seen;
    this.#lookAt(reading.files);
    this.#digest = reading.digest;
    this.#known = this.#take(reading.file);
    this.#following = this.#follow();
  }

  get known(): Known {
    return this.#known;
  }

  get staleSeconds(): number {
    return this.#stale === null ? 0 : (performance.now() - this.#stale.sinceMs) / 1000;
  }

  async close(): Promise<void> {
    this.#closing.abort();
    await this.#following;
    await this.#reader.close();
  }

  async #follow(): Promise<void> {
    const { signal } = this.#closing;
    let last = '';
    let unsettledMs = 0;
    for (;;) {
      await sleep(lookEveryMs, null, { signal, ref: false }).catch(() => {});
      if (signal.aborted) return;
      const now = await look([this.#path, ...this.#files]);
      unsettledMs = now === last || now === this.#seen ? 0 : unsettledMs + lookEveryMs;
      const isSettled = now === last || unsettledMs >= maxUnsettledMs;
      last = now;
      const isDue = performance.now() >= (this.#stale?.retryMs ?? Number.POSITIVE_INFINITY);
      if ((now === this.#seen && !isDue) || !isSettled) continue;
      unsettledMs = 0;
      this.#seen = now;
      const reading = await this.#reader.read(this.#path, signal);
      if (!signal.aborted) this.#note(reading);
    }
  }

  #note(reading: Reading): void {
    this.#lookAt(reading.files);
    if ('problem' in reading) {
      const { problem, mayPass } = reading;
      const nowMs = performance.now();
      const before = this.#stale;
      const numTries = mayPass ? (before?.numTries ?? 0) + 1 : 0;
      const waitMs = Math.min(retryAfterMs * 2 ** (numTries - 1), maxRetryAfterMs);
      const retryMs = mayPass ? nowMs + waitMs : Number.POSITIVE_INFINITY;
      this.#stale = { problem, sinceMs: before?.sinceMs ?? nowMs, retryMs, numTries };
      if (before?.problem === problem) return;
      this.#log.warn(
        { file: this.#path, problem },
        'the tenants file cannot be taken over; going on with what it said before',
      );
      return;
    }
    if (this.#stale !== null) this.#log.info({ file: this.#path }, 'the tenants file is well again');
    this.#stale = null;
    if (reading.digest === this.#digest) return;
    this.#digest = reading.digest;
    this.#known = this.#take(reading.file);
  }

  #lookAt(files: readonly string[] | null): void {
    if (files === null) return;
    // One that was not looked at so far may have changed between being read and the first look.
    if (files.some((file) => !this.#files.includes(file))) this.#seen = '';
    this.#files = files;
  }

  #take(file: ReadFile): Known {
    const rules = file.tenants.flatMap(({ name, oidc }) => ruleOf(name, oidc ?? {}, this.#own) ?? []);
    const ofTokens = tokenProblems(file.tenants, rules);
    const problems = [
      ...file.problems,
      ...file.tenants.flatMap(({ name }) =>
        (ofTokens.get(name) ?? []).map(({ message }) => `tenants.${name}: ${message}`),
      ),
    ];
    this.#logProblems(problems);
    this.#log.info(
      { file: this.#path, tenants: file.tenants.length, keys: file.holders.length },
      'the tenants file was taken over',
    );
    return {
      file,
      tenants: new Map(file.tenants.map((tenant) => [tenant.name, tenant])),
      callers: callersByDigest(file.holders),
      tokenRules: { own: this.#own, byTenant: rules },
    };
  }

  /** Those of last time are known. */
  #logProblems(problems: readonly string[]): void {
    const all = problems.join('\n');
    if (all === this.#problems) return;
    this.#problems = all;
    for (const problem of problems.slice(0, maxLoggedProblems))
      this.#log.warn({ problem }, 'a key or token of a tenant is not accepted');
    if (problems.length > maxLoggedProblems)
      this.#log.warn({ numProblems: problems.length }, 'more keys and tokens are not accepted');
  }
}

/** What changes whenever one of the files does. */
async function look(paths: readonly string[]): Promise<string> {
  const looks: string[] = [];
  for (const path of paths) {
    try {
      const { dev, ino, size, mtimeNs, ctimeNs } = await stat(path, { bigint: true });
      looks.push([dev, ino, size, mtimeNs, ctimeNs].join());
    } catch (error) {
      looks.push((error as NodeJS.ErrnoException).code ?? 'error');
    }
  }
  return looks.join(' ');
}

/** Reads the file in a thread, which stays for the next time. */
class Reader {
  #thread: Worker | null = null;

  /** Never fails, and takes a bounded time. @param signal  ends the wait */
  async read(path: string, signal?: AbortSignal): Promise<Reading> {
    const thread = this.#thread ?? this.#start();
    const { promise, resolve: settle } = Promise.withResolvers<Reading | string>();
    const timer = setTimeout(() => settle(`not within ${readTimeoutMs} ms`), readTimeoutMs);
    const onError = (error: NodeJS.ErrnoException) => settle(error.code ?? error.name);
    const onExit = () => settle('its thread ended');
    const onAbort = () => settle('the gateway ends');
    thread.once('message', settle).once('error', onError).once('exit', onExit);
    signal?.addEventListener('abort', onAbort);
    thread.postMessage(path);
    const reading = await promise;
    clearTimeout(timer);
    signal?.removeEventListener('abort', onAbort);
    thread.off('message', settle).off('error', onError).off('exit', onExit);
    if (typeof reading !== 'string') return reading;
    await this.close();
    return { files: null, problem: `it cannot be read (${reading})`, mayPass: true };
  }

  async close(): Promise<void> {
    const thread = this.#thread;
    this.#thread = null;
    await thread?.terminate();
  }

  #start(): Worker {
    const thread = new Worker(new URL('./read-tenants.ts', import.meta.url), {
      env: {},
      execArgv: [],
      resourceLimits: { maxOldGenerationSizeMb: maxHeapMb },
    });
    // Whoever waits for it hears of it.
    thread.on('error', () => {});
    thread.once('exit', () => {
      if (this.#thread === thread) this.#thread = null;
    });
    thread.unref();
    this.#thread = thread;
    return thread;
  }
}
