/**
 * What a series of runs says: the median, and how far apart the runs lie. Ratios are made round by round, because the
 * runs of one round see the same moment of the machine; the ratio of two medians would mix moments.
 */
export interface Spread {
  median: number;
  low: number;
  high: number;
  count: number;
}

/** @param values at least one; the median of an even count is the mean of its middle two */
export function spread(values: readonly number[]): Spread {
  if (values.length === 0) throw new RangeError('values: expected at least one, got none');
  const sorted = values.toSorted((a, b) => a - b);
  const middle = sorted.length >> 1;
  const median = sorted.length % 2 === 1 ? sorted[middle]! : (sorted[middle - 1]! + sorted[middle]!) / 2;
  return { median, low: sorted[0]!, high: sorted.at(-1)!, count: sorted.length };
}

/** Spread of numerators[i] / denominators[i], over the rounds that both have. */
export function ratios(numerators: readonly number[], denominators: readonly number[]): Spread {
  const count = Math.min(numerators.length, denominators.length);
  return spread(Array.from({ length: count }, (_, i) => numerators[i]! / denominators[i]!));
}

/** The value below which `percent` of the values lie, by nearest rank. */
export function percentile(values: readonly number[], percent: number): number {
  if (values.length === 0) throw new RangeError('values: expected at least one, got none');
  const sorted = values.toSorted((a, b) => a - b);
  return sorted[Math.max(0, Math.ceil((percent / 100) * sorted.length) - 1)]!;
}

/** Three significant digits, and whole numbers from 100 on. */
export function shortNumber(value: number): string {
  if (!Number.isFinite(value)) return String(value);
  const size = Math.abs(value);
  return value.toFixed(size >= 100 ? 0 : size >= 10 ? 1 : 2);
}

export const showSpread = ({ median, low, high }: Spread) =>
  `${shortNumber(median)} (${shortNumber(low)}–${shortNumber(high)})`;
