/**
 * What a case measured, as plain data: it is written to JSON, further rounds are added to it, and tables are made from it.
 */
import type { Series } from './rounds.ts';
import type { ShapeName } from './shapes.ts';

export interface CaseRecord {
  case: CaseName;
  shape: ShapeName;
  series: SettingSeries[];
  /** Single numbers that the tables' notes name, such as a model's bytes. */
  facts: Record<string, number>;
}

/** @field setting what the series of one comparison have in common: `batch 8` */
export interface SettingSeries extends Series {
  setting: string;
}

export const caseNames = ['decode', 'prefill', 'clients', 'tax', 'growth'] as const;
export type CaseName = (typeof caseNames)[number];

/** Adds the rounds of a later run. Both runs have the same contestants in a setting, so rounds stay side by side. */
export function addRounds(earlier: CaseRecord, later: CaseRecord): CaseRecord {
  const series = structuredClone(earlier.series);
  for (const one of later.series) {
    const same = series.find(({ setting, name }) => setting === one.setting && name === one.name);
    if (same === undefined) {
      series.push(one);
      continue;
    }
    for (const [figure, values] of Object.entries(one.figures))
      same.figures[figure] = [...(same.figures[figure] ?? []), ...values];
    same.othersShare = Math.max(same.othersShare, one.othersShare);
    same.numRepeated += one.numRepeated;
    if (one.failure !== undefined) same.failure = one.failure;
  }
  return { ...later, series, facts: { ...earlier.facts, ...later.facts } };
}

/** Settings in the order of their first series, each with its series. */
export function bySetting(record: CaseRecord): [setting: string, series: SettingSeries[]][] {
  return [...Map.groupBy(record.series, ({ setting }) => setting)];
}

export function figuresOf(series: readonly Series[], name: string, figure: string): number[] | undefined {
  return series.find((one) => one.name === name)?.figures[figure];
}

export function numRounds(record: CaseRecord): number {
  return Math.max(
    0,
    ...record.series.flatMap(({ figures }) => Object.values(figures).map(({ length }) => length)),
  );
}
