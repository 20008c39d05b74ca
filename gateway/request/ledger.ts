// What requests leave behind when they have ended: a line in the log, and their counts. Nobody waits for either, so they are
// written a little later and many at a time: requests that are alike are counted by one call, and none of it stands between an answer
// and the request that comes after it on the same connection. Whoever reads a metric gets all that has ended, and so does
// whoever reads the log after the gateway has drained.

import type { Logger } from 'pino';
import { countTokens, type Metrics } from '../metrics.ts';
import type { Usage } from '../quota/usage.ts';
import type { Facts } from './arrival.ts';

/** What the log says of a request. */
type Line = {
  [Name in keyof Omit<Required<Facts>, 'route' | 'usage' | 'firstByteMs' | 'askedMs'>]:
    | Facts[Name]
    | undefined;
} & {
  route: string;
  usage: Usage | undefined;
  status: number;
  durationMs: number;
  ttfbMs: number | undefined;
};

type Ended = {
  line: Line;
  level: 'debug' | 'info';
  durationSeconds: number;
  firstByteSeconds: number | null;
};

export type EndedRequest = {
  facts: Facts;
  usage: Usage | undefined;
  status: number;
  durationMs: number;
  /** Until its first byte was sent; undefined: none was. */
  ttfbMs: number | undefined;
  /** In the log of a busy gateway it would bury what matters. */
  isUnimportant: boolean;
};

/** So many are kept at most: some 0.3 ms of work, which a request that comes meanwhile waits for. */
const maxKept = 64;
/** And for so long. */
const keepMs = 10;

export class Ledger {
  readonly #metrics: Metrics;
  readonly #log: Logger;
  #kept: Ended[] = [];
  #timer: NodeJS.Timeout | null = null;

  constructor(metrics: Metrics, log: Logger) {
    this.#metrics = metrics;
    this.#log = log;
    metrics.beforeRead(() => this.write());
  }

  /** Takes it in as it is now. */
  note({ facts, usage, status, durationMs, ttfbMs, isUnimportant }: EndedRequest): void {
    // One by one: the log has them in this order, and a copy of an object of another shape for each request is slow.
    const line: Line = {
      requestId: facts.requestId,
      route: facts.route,
      attempts: facts.attempts,
      requestBytes: facts.requestBytes,
      responseBytes: facts.responseBytes,
      client: facts.client,
      tenant: facts.tenant,
      model: facts.model,
      target: facts.target,
      engine: facts.engine,
      picked: facts.picked,
      hedge: facts.hedge,
      errorCode: facts.errorCode,
      usage,
      status,
      durationMs: Math.round(durationMs),
      ttfbMs: ttfbMs === undefined ? undefined : Math.round(ttfbMs),
    };
    this.#kept.push({
      line,
      level: isUnimportant ? 'debug' : 'info',
      durationSeconds: durationMs / 1000,
      firstByteSeconds: ttfbMs === undefined ? null : ttfbMs / 1000,
    });
    if (this.#kept.length >= maxKept) this.write();
    else this.#timer ??= setTimeout(() => this.write(), keepMs);
  }

  /** Writes what is kept. */
  write(): void {
    if (this.#timer !== null) clearTimeout(this.#timer);
    this.#timer = null;
    if (this.#kept.length === 0) return;
    const all = this.#kept;
    this.#kept = [];
    for (const alike of groupsOf(all).values()) count(this.#metrics, alike);
    for (const { line, level } of all) this.#log[level](line, 'request');
  }
}

/** Those that are counted under the same labels. */
function groupsOf(all: readonly Ended[]): Map<string, Ended[]> {
  const groups = new Map<string, Ended[]>();
  for (const ended of all) {
    const { route, model = '', target = '', tenant = '', status } = ended.line;
    const key = `${route}\n${model}\n${target}\n${tenant}\n${status}`;
    const group = groups.get(key);
    if (group === undefined) groups.set(key, [ended]);
    else group.push(ended);
  }
  return groups;
}

function count(metrics: Metrics, alike: readonly Ended[]): void {
  const { route, model = '', target = '', tenant = '', status } = alike[0]!.line;
  const labels = { route, model };
  metrics.requests.inc({ route, model, target, tenant, status }, alike.length);
  const sum = { promptTokens: 0, cachedTokens: 0, completionTokens: 0 };
  let areTokensKnown = false;
  for (const { line, durationSeconds, firstByteSeconds } of alike) {
    metrics.durationSeconds.observe(labels, durationSeconds);
    if (firstByteSeconds !== null) metrics.firstByteSeconds.observe(labels, firstByteSeconds);
    if (line.usage === undefined) continue;
    areTokensKnown = true;
    sum.promptTokens += line.usage.promptTokens;
    sum.cachedTokens += line.usage.cachedTokens;
    sum.completionTokens += line.usage.completionTokens;
  }
  if (areTokensKnown) countTokens(metrics, { tenant, model }, sum);
}
