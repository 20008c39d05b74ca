/**
 * Runs the peers of one case in turns: round 1 of each, round 2 of each, and so on, so that a slow moment of the machine
 * meets all of them. A sample waits, for a bounded time, until nobody uses the machine: neither others nor a contestant's
 * server, whose threads may wait for more work without sleeping. One during which others took too much of it is taken again, a
 * bounded number of times; the quietest try counts, and the share that others had is reported.
 */
import { busyShare, cpuMoment, othersShare } from './other-load.ts';

export type Figures = Record<string, number>;

export interface Contestant {
  name: string;
  /** One sample: named figures, the same ones each time. */
  measure: () => Promise<Figures>;
  /** Once, before the rounds. */
  warmUp?: () => Promise<void>;
}

export interface Series {
  name: string;
  /** Per figure, one value a round. */
  figures: Record<string, number[]>;
  /** Largest share of the machine that others had during a sample that counts. */
  othersShare: number;
  /** Samples that were taken again. */
  numRepeated: number;
  /** Set when it failed and has no further rounds. */
  failure?: string;
}

export interface RoundOptions {
  rounds: number;
  /** A sample with a larger share for others is taken again. */
  maxOthersShare: number;
  /** Most tries of one sample. */
  maxTries: number;
  onProgress?: (text: string) => void;
  /** Longest wait for a quiet machine before a try. */
  maxWaitMs: number;
  /** How long the machine is watched to find it quiet. */
  watchMs: number;
  /** Moments of CPU use; tests put their own here. */
  moment?: typeof cpuMoment;
}

export async function runRounds(contestants: Contestant[], options: RoundOptions): Promise<Series[]> {
  const series = contestants.map(
    ({ name }): Series => ({ name, figures: {}, othersShare: 0, numRepeated: 0 }),
  );
  const attempt = async (index: number, round: number, run: () => Promise<void>) => {
    const one = series[index]!;
    if (one.failure !== undefined) return;
    options.onProgress?.(`${one.name}, ${round === 0 ? 'warm-up' : `round ${round} of ${options.rounds}`}`);
    await run().catch((error: Error) => {
      one.failure = error.message;
    });
  };
  for (const [index, { warmUp }] of contestants.entries()) {
    if (warmUp) await attempt(index, 0, warmUp);
  }
  for (let round = 1; round <= options.rounds; round++) {
    for (const [index, contestant] of contestants.entries())
      await attempt(index, round, () => takeSample(contestant, series[index]!, options));
  }
  return series;
}

async function takeSample({ measure }: Contestant, series: Series, options: RoundOptions): Promise<void> {
  const { maxOthersShare, maxTries, moment = cpuMoment } = options;
  let best: { figures: Figures; share: number } | null = null;
  for (let tries = 1; tries <= maxTries; tries++) {
    if (tries > 1) series.numRepeated++;
    await waitForQuiet(options);
    const before = moment();
    const figures = await measure();
    const share = othersShare(before, moment());
    if (best === null || share < best.share) best = { figures, share };
    if (share <= maxOthersShare) break;
  }
  const told = Object.entries(best!.figures).map(([name, value]) => `${name} ${value.toPrecision(4)}`);
  options.onProgress?.(`${series.name}: ${told.join(', ')}`);
  for (const [name, value] of Object.entries(best!.figures)) {
    series.figures[name] ??= [];
    series.figures[name].push(value);
  }
  series.othersShare = Math.max(series.othersShare, best!.share);
}

async function waitForQuiet({
  maxOthersShare,
  maxWaitMs,
  watchMs,
  moment = cpuMoment,
}: RoundOptions): Promise<void> {
  for (let waitedMs = 0; waitedMs < maxWaitMs; waitedMs += watchMs) {
    const before = moment();
    await new Promise((resolve) => setTimeout(resolve, watchMs));
    if (busyShare(before, moment()) <= maxOthersShare) return;
  }
}
