/**
 * What a run measured, as numbers and as a page for a terminal: pure. Latencies are those of requests that were answered;
 * goodput is judged over all that were measured, so a request that failed has kept no promise. Requests that were cancelled
 * by Ctrl-C are in neither.
 */
import type { Slo } from './options.ts';
import type { Sample } from './run.ts';

/** Milliseconds. */
export interface Distribution {
  count: number;
  mean: number;
  p50: number;
  p90: number;
  p95: number;
  p99: number;
  max: number;
}

/** One adapter, or the base. */
export interface Voice {
  /** null: the base. */
  adapter: string | null;
  numRequests: number;
  outputTokens: number;
  meanTtftMs: number;
}

/** Some of the turns of all conversations. */
export interface TurnSummary {
  numRequests: number;
  meanPromptTokens: number;
  /** Of the prompt tokens, those that the server had from before; null: it does not say. */
  cachedShare: number | null;
  ttftMs: Distribution;
  e2eMs: Distribution;
}

export interface ConversationsSummary {
  /** Every turn was answered. */
  numComplete: number;
  /** A turn failed, and later ones were not sent. */
  numFailed: number;
  /** The run ended before their last turn. */
  numCut: number;
  /** Turns that a failed one had after it. */
  numTurnsNotSent: number;
  /** null: none was answered. */
  firstTurn: TurnSummary | null;
  laterTurns: TurnSummary | null;
  /** By number: the first is 1. */
  turns: ({ turn: number } & TurnSummary)[];
}

export interface Summary {
  numDone: number;
  numFailed: number;
  numCancelled: number;
  /** By code, with what the first of them said. */
  failures: Record<string, { count: number; firstMessage: string }>;
  /** From the first request until the last answer ended. */
  durationSeconds: number;
  requestsPerSecond: number;
  promptTokens: number;
  outputTokens: number;
  /** Of the prompt tokens, those that the server had from before; null: it does not say. */
  cachedShare: number | null;
  promptTokensPerSecond: number;
  outputTokensPerSecond: number;
  /** Mean over the run of requests that were due and not yet answered. */
  meanConcurrency: number;
  /** Answers whose server reported no usage: their tokens are in no sum. */
  numWithoutUsage: number;
  /** Answers of fewer or more tokens than asked. */
  numOtherLength: number;
  /** How long after they were due requests were sent. */
  sendDelayMs: Distribution | null;
  ttftMs: Distribution | null;
  /** Between two pieces of text of an answer. */
  itlMs: Distribution | null;
  tpotMs: Distribution | null;
  e2eMs: Distribution | null;
  goodput: { slo: Slo; requestsPerSecond: number; share: number; keptBy: Record<string, number> } | null;
  /** null: single requests. */
  conversations: ConversationsSummary | null;
  /** Those that were answered, busiest first. */
  voices: Voice[];
}

/** Exact up to its capacity; beyond it a sample in which each value is as likely as any other. */
export class Reservoir {
  readonly values: number[] = [];
  numSeen = 0;
  readonly #capacity: number;
  readonly #unit: () => number;

  /** @param unit random numbers from 0 to just below 1 */
  constructor(capacity: number, unit: () => number) {
    this.#capacity = capacity;
    this.#unit = unit;
  }

  add(value: number): void {
    this.numSeen++;
    if (this.values.length < this.#capacity) this.values.push(value);
    else {
      const place = Math.floor(this.#unit() * this.numSeen);
      if (place < this.#capacity) this.values[place] = value;
    }
  }
}

/** Voices with fewer requests say little about fairness. */
const minRequestsOfVoice = 3;
const numVoicesShown = 3;
const maxTurnsShown = 8;

export function summarise(
  samples: readonly Sample[],
  gapsMs: readonly number[],
  adapters: readonly string[],
  slo: Slo,
): Summary {
  const done = samples.filter(({ code }) => code === 'ok');
  const cancelled = samples.filter(({ code }) => code === 'cancelled');
  const failed = samples.filter(({ code }) => code !== 'ok' && code !== 'cancelled');
  const failures: Summary['failures'] = {};
  for (const { code, message } of failed) {
    failures[code] ??= { count: 0, firstMessage: message };
    failures[code].count++;
  }
  const measured = [...done, ...failed];
  const begin = measured.reduce((first, { dueMs }) => Math.min(first, dueMs), Infinity);
  const end = measured.reduce((last, { endMs }) => Math.max(last, endMs), 0);
  const durationSeconds = measured.length === 0 ? 0 : (end - begin) / 1000;
  const perSecond = (count: number) => (durationSeconds > 0 ? count / durationSeconds : 0);
  const promptTokens = sum(done.map((sample) => sample.promptTokens ?? 0));
  const outputTokens = sum(done.map((sample) => sample.outputTokens ?? 0));
  return {
    numDone: done.length,
    numFailed: failed.length,
    numCancelled: cancelled.length,
    failures,
    durationSeconds,
    requestsPerSecond: perSecond(done.length),
    promptTokens,
    outputTokens,
    cachedShare: cachedShareOf(done),
    promptTokensPerSecond: perSecond(promptTokens),
    outputTokensPerSecond: perSecond(outputTokens),
    meanConcurrency: perSecond(sum(measured.map(e2eMs)) / 1000),
    numWithoutUsage: done.filter((sample) => sample.outputTokens === null).length,
    numOtherLength: done.filter(
      ({ outputTokens, wantedTokens }) => outputTokens !== null && outputTokens !== wantedTokens,
    ).length,
    sendDelayMs: distribution(done.map(({ sentMs, dueMs }) => sentMs - dueMs)),
    ttftMs: distribution(done.map(ttftMs)),
    itlMs: distribution(gapsMs),
    tpotMs: distribution(done.map(tpotMs).filter((value) => value !== null)),
    e2eMs: distribution(done.map(e2eMs)),
    goodput: goodputOf(done, measured.length, slo, perSecond),
    conversations: conversationsOf(samples),
    voices: voicesOf(done, adapters),
  };
}

const sum = (values: readonly number[]) => values.reduce((total, value) => total + value, 0);

/** Over the answers that say how many were cached. */
function cachedShareOf(done: readonly Sample[]): number | null {
  const told = done.filter(
    ({ cachedTokens, promptTokens }) => cachedTokens !== null && promptTokens !== null,
  );
  if (told.length === 0) return null;
  const prompt = sum(told.map(({ promptTokens }) => promptTokens!));
  return prompt === 0 ? 0 : sum(told.map(({ cachedTokens }) => cachedTokens!)) / prompt;
}

/** A sample's turn is its conversation's last as long as no later one came. */
function conversationsOf(samples: readonly Sample[]): ConversationsSummary | null {
  if (!samples.some(({ numTurns }) => numTurns > 1)) return null;
  const last = new Map<number, Sample>();
  for (const sample of samples) {
    if (sample.turn >= (last.get(sample.index)?.turn ?? 0)) last.set(sample.index, sample);
  }
  const ends = [...last.values()];
  const failed = ends.filter(({ code }) => code !== 'ok' && code !== 'cancelled');
  const numComplete = ends.filter(
    ({ code, turn, numTurns }) => code === 'ok' && turn === numTurns - 1,
  ).length;
  const byTurn = Map.groupBy(
    samples.filter(({ code }) => code === 'ok'),
    ({ turn }) => turn,
  );
  const turns = [...byTurn].toSorted(([a], [b]) => a - b);
  const later = turns.filter(([turn]) => turn > 0).flatMap(([, done]) => done);
  return {
    numComplete,
    numFailed: failed.length,
    numCut: ends.length - numComplete - failed.length,
    numTurnsNotSent: sum(failed.map(({ turn, numTurns }) => numTurns - 1 - turn)),
    firstTurn: turnsOf(byTurn.get(0) ?? []),
    laterTurns: turnsOf(later),
    turns: turns.map(([turn, done]) => ({ turn: turn + 1, ...turnsOf(done)! })),
  };
}

function turnsOf(done: readonly Sample[]): TurnSummary | null {
  if (done.length === 0) return null;
  return {
    numRequests: done.length,
    meanPromptTokens: sum(done.map(({ promptTokens }) => promptTokens ?? 0)) / done.length,
    cachedShare: cachedShareOf(done),
    ttftMs: distribution(done.map(ttftMs))!,
    e2eMs: distribution(done.map(e2eMs))!,
  };
}

export const ttftMs = ({ firstMs, dueMs }: Sample) => firstMs! - dueMs;
export const e2eMs = ({ endMs, dueMs }: Sample) => endMs - dueMs;
/** Mean per output token after the first; null: there is none. */
export function tpotMs({ firstMs, lastMs, outputTokens }: Sample): number | null {
  return outputTokens !== null && outputTokens > 1 ? (lastMs! - firstMs!) / (outputTokens - 1) : null;
}

/** @returns null of nothing */
export function distribution(values: readonly number[]): Distribution | null {
  if (values.length === 0) return null;
  const sorted = Float64Array.from(values).sort();
  return {
    count: sorted.length,
    mean: sorted.reduce((sum, value) => sum + value, 0) / sorted.length,
    p50: percentile(sorted, 50),
    p90: percentile(sorted, 90),
    p95: percentile(sorted, 95),
    p99: percentile(sorted, 99),
    max: sorted.at(-1)!,
  };
}

/** @param sorted ascending, not empty  @returns between two values, the point on the line that joins them */
export function percentile(sorted: ArrayLike<number>, percent: number): number {
  const place = (percent / 100) * (sorted.length - 1);
  const below = Math.floor(place);
  const low = sorted[below]!;
  const high = sorted[Math.min(below + 1, sorted.length - 1)]!;
  return low + (high - low) * (place - below);
}

/** A request is good that keeps every limit. `keptBy`: how many keep each limit, whatever they do to the others. */
function goodputOf(
  done: Sample[],
  numMeasured: number,
  slo: Slo,
  perSecond: (count: number) => number,
): Summary['goodput'] {
  const limits = Object.entries(slo) as [keyof Slo, number][];
  if (limits.length === 0) return null;
  const measures = {
    ttft: ttftMs,
    itl: ({ longestGapMs }: Sample) => longestGapMs,
    tpot: (sample: Sample) => tpotMs(sample) ?? 0,
    e2e: e2eMs,
  };
  const keeps = (sample: Sample, [name, limit]: [keyof Slo, number]) => measures[name](sample) <= limit;
  const numGood = done.filter((sample) => limits.every((limit) => keeps(sample, limit))).length;
  return {
    slo,
    requestsPerSecond: perSecond(numGood),
    share: numMeasured === 0 ? 0 : numGood / numMeasured,
    keptBy: Object.fromEntries(
      limits.map((limit) => [limit[0], done.filter((sample) => keeps(sample, limit)).length]),
    ),
  };
}

function voicesOf(done: Sample[], adapters: readonly string[]): Voice[] {
  const voices = new Map<number | null, Voice & { sumTtftMs: number }>();
  for (const sample of done) {
    const { adapter } = sample;
    let voice = voices.get(adapter);
    if (voice === undefined) {
      const name = adapter === null ? null : adapters[adapter]!;
      voice = { adapter: name, numRequests: 0, outputTokens: 0, meanTtftMs: 0, sumTtftMs: 0 };
      voices.set(adapter, voice);
    }
    voice.numRequests++;
    voice.outputTokens += sample.outputTokens ?? 0;
    voice.sumTtftMs += ttftMs(sample);
  }
  return [...voices.values()]
    .map(({ sumTtftMs, ...voice }) => ({ ...voice, meanTtftMs: sumTtftMs / voice.numRequests }))
    .sort((a, b) => b.numRequests - a.numRequests);
}

export interface PageOptions {
  /** Columns of the terminal. */
  columns: number;
  /** Not a terminal: bars of letters that every log shows. */
  isPlain: boolean;
}

/** @param head lines that say what was run */
export function renderPage(
  summary: Summary,
  values: { ttftMs: readonly number[]; itlMs: readonly number[] },
  head: readonly string[],
  options: PageOptions,
): string {
  const { numDone, numFailed, numCancelled, goodput } = summary;
  const row = (name: string, text: string) => `  ${name.padEnd(12)}${text}`;
  const lines = [...head, ''];
  const cancelled = numCancelled > 0 ? `, ${numCancelled} cancelled` : '';
  lines.push(
    row(
      'requests',
      `${numDone} done, ${numFailed} failed${cancelled}, in ${figure(summary.durationSeconds)} s`,
    ),
  );
  if (summary.conversations !== null) lines.push(row('', conversationsLine(summary.conversations)));
  for (const [code, { count, firstMessage }] of Object.entries(summary.failures)) {
    lines.push(row('', `${count} × ${code}${firstMessage && `: ${firstMessage}`}`));
  }
  if (numDone > 0) {
    lines.push(
      row(
        'throughput',
        `${figure(summary.requestsPerSecond)} requests/s, ${figure(summary.outputTokensPerSecond)} output tokens/s, ${figure(summary.promptTokensPerSecond)} prompt tokens/s`,
      ),
      row('tokens', tokensLine(summary)),
      row('in flight', `${figure(summary.meanConcurrency)} in the mean`),
    );
    if (summary.numWithoutUsage > 0) {
      lines.push(row('', `answers without usage, whose tokens are not counted: ${summary.numWithoutUsage}`));
    }
    if (summary.numOtherLength > 0) {
      lines.push(row('', `answers of another length than asked: ${summary.numOtherLength}`));
    }
  }
  if (goodput !== null) {
    const limits = Object.entries(goodput.slo).map(
      ([name, limit]) => `${name} ≤ ${limit} ms by ${goodput.keptBy[name]}`,
    );
    const share = `${(goodput.share * 100).toFixed(1)} % of requests`;
    lines.push(
      row('goodput', `${figure(goodput.requestsPerSecond)} requests/s, ${share} (${limits.join(', ')})`),
    );
  }
  lines.push(...latencyTable(summary), ...turnTable(summary.conversations), ...fairness(summary.voices));
  for (const [name, sample] of [
    ['TTFT', values.ttftMs],
    ['ITL', values.itlMs],
  ] as const) {
    if (sample.length > 1)
      lines.push('', `  ${name}, ms`, ...histogram(sample, options).map((line) => `  ${line}`));
  }
  return `${lines.map((line) => line.trimEnd()).join('\n')}\n`;
}

function latencyTable(summary: Summary): string[] {
  const rows: [string, Distribution | null][] = [
    ['TTFT', summary.ttftMs],
    ['ITL', summary.itlMs],
    ['TPOT', summary.tpotMs],
    ['E2E', summary.e2eMs],
    // Of interest only when it is not nothing.
    ['send delay', (summary.sendDelayMs?.max ?? 0) > 1 ? summary.sendDelayMs : null],
  ];
  const shown = rows.filter(([, values]) => values !== null) as [string, Distribution][];
  if (shown.length === 0) return [];
  const columns = ['mean', 'p50', 'p90', 'p95', 'p99', 'max'] as const;
  const line = (name: string, cells: readonly string[]) =>
    `  ${name.padEnd(12)}${cells.map((cell) => cell.padStart(9)).join('')}`;
  return [
    '',
    line('ms', columns),
    ...shown.map(([name, values]) =>
      line(
        name,
        columns.map((column) => figure(values[column])),
      ),
    ),
  ];
}

const percent = (share: number | null) => (share === null ? '?' : `${(100 * share).toFixed(0)} %`);

function tokensLine({ promptTokens, cachedShare, outputTokens }: Summary): string {
  const cached = cachedShare === null ? '' : ` (${percent(cachedShare)} cached)`;
  return `${promptTokens} prompt${cached}, ${outputTokens} output, by the server's usage`;
}

function conversationsLine({
  numComplete,
  numFailed,
  numCut,
  numTurnsNotSent,
}: ConversationsSummary): string {
  const failed = numFailed > 0 ? `, ${numFailed} ended by a failure (${numTurnsNotSent} turns not sent)` : '';
  const cut = numCut > 0 ? `, ${numCut} cut by the end of the run` : '';
  return `of conversations: ${numComplete} complete${failed}${cut}`;
}

/** Latencies by turn: what the history before it costs. Of many turns the first and the last ones are shown. */
function turnTable(conversations: ConversationsSummary | null): string[] {
  if (conversations === null || conversations.firstTurn === null) return [];
  const { firstTurn, laterTurns, turns } = conversations;
  const left = turns.length - maxTurnsShown;
  const shown = left <= 0 ? turns : [...turns.slice(0, maxTurnsShown - 2), ...turns.slice(-2)];
  const line = (name: string, cells: readonly string[]) =>
    `  ${name.padEnd(12)}${cells.map((cell) => cell.padStart(9)).join('')}`;
  const columns = ['p50', 'p95', 'p99'] as const;
  const cells = ({ numRequests, meanPromptTokens, cachedShare, ttftMs, e2eMs }: TurnSummary) => [
    ...columns.map((column) => figure(ttftMs[column])),
    ...columns.map((column) => figure(e2eMs[column])),
    figure(meanPromptTokens),
    percent(cachedShare),
    String(numRequests),
  ];
  return [
    '',
    `  ${'ms'.padEnd(12)}${'TTFT'.padStart(9)}${' '.repeat(18)}${'E2E'.padStart(9)}`,
    line('', [...columns, ...columns, 'prompt', 'cached', 'answers']),
    line('first turn', cells(firstTurn)),
    ...(laterTurns === null ? [] : [line('later turns', cells(laterTurns))]),
    ...shown.map((turn) => line(`turn ${turn.turn}`, cells(turn))),
    ...(left <= 0 ? [] : [`  of ${turns.length} turns; --json has all`]),
  ];
}

/** How alike the voices were served, and which were the busiest. */
function fairness(voices: readonly Voice[]): string[] {
  if (voices.length < 2) return [];
  const nameOf = ({ adapter }: Voice) => adapter ?? 'the base';
  const busiest = voices.slice(0, numVoicesShown).map((voice) => `${nameOf(voice)} (${voice.numRequests})`);
  const lines = ['', `  ${voices.length} voices; busiest, with their requests: ${busiest.join(', ')}`];
  const judged = voices
    .filter(({ numRequests }) => numRequests >= minRequestsOfVoice)
    .toSorted((a, b) => a.meanTtftMs - b.meanTtftMs);
  if (judged.length < 2) return lines;
  const show = (voice: Voice) => `${figure(voice.meanTtftMs)} ms of ${nameOf(voice)}`;
  const which = `of the ${judged.length} with at least ${minRequestsOfVoice} requests`;
  lines.push(`  mean TTFT ${which}: from ${show(judged[0]!)} to ${show(judged.at(-1)!)}`);
  return lines;
}

const numBins = 8;
const maxBarColumns = 50;
/** From one eighth of a column to seven. */
const eighths = ['▏', '▎', '▍', '▌', '▋', '▊', '▉'];

/**
 * One line a bin: its range, a bar as long as its share of the fullest, its count. Bins are equally wide, or, when values
 * are more than 20 times apart, each is wider than the one before by one factor.
 * @param values at least one
 */
export function histogram(values: readonly number[], { columns, isPlain }: PageOptions): string[] {
  const low = values.reduce((a, b) => Math.min(a, b), Infinity);
  const high = values.reduce((a, b) => Math.max(a, b), -Infinity);
  if (low === high) return [`all ${figure(low)}`];
  // A gap of 0 is two events at once; a bin of a thousandth of the largest holds those.
  const floor = Math.max(low, high / 1000);
  const isLogarithmic = high / floor > 20;
  const edge = (bin: number) => {
    if (bin === 0) return low;
    if (isLogarithmic) return floor * (high / floor) ** (bin / numBins);
    return low + ((high - low) * bin) / numBins;
  };
  const edges = Array.from({ length: numBins + 1 }, (_, bin) => edge(bin));
  const counts = new Array<number>(numBins).fill(0);
  for (const value of values) {
    const bin = edges.findIndex((end, i) => i > 0 && value < end);
    counts[bin < 0 ? numBins - 1 : bin - 1]!++;
  }
  const most = Math.max(...counts);
  const labels = counts.map((_, bin) => `${figure(edges[bin]!)} to ${figure(edges[bin + 1]!)}`);
  const labelColumns = Math.max(...labels.map(({ length }) => length));
  const countColumns = String(most).length;
  const barColumns = Math.max(1, Math.min(maxBarColumns, columns - labelColumns - countColumns - 6));
  return counts.map((count, bin) => {
    const bar = barOf((count / most) * barColumns, isPlain).padEnd(barColumns);
    return `${labels[bin]!.padStart(labelColumns)}  ${bar} ${String(count).padStart(countColumns)}`;
  });
}

/** What is not nothing shows. */
function barOf(length: number, isPlain: boolean): string {
  if (length === 0) return '';
  if (isPlain) return '#'.repeat(Math.max(1, Math.round(length)));
  const numEighths = Math.max(1, Math.round(length * 8));
  return '█'.repeat(numEighths >> 3) + (numEighths % 8 === 0 ? '' : eighths[(numEighths % 8) - 1]!);
}

/** Three digits that count; whole numbers from 100 on. */
export function figure(value: number): string {
  if (value === 0) return '0';
  if (Math.abs(value) >= 99.95) return value.toFixed(0);
  return Math.abs(value) >= 9.995 ? value.toFixed(1) : value.toFixed(2);
}
