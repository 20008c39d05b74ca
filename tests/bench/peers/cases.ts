/** The cases: how each is measured, and how its record is shown. README.md beside this file says the same in words. */

import type { Panel } from '../plot.ts';
import type { Bench } from './bench.ts';
import { measureClients, showClients } from './clients.ts';
import { growthPanels, measureGrowth, plotGrowth, showGrowth } from './growth.ts';
import type { CaseName, CaseRecord } from './record.ts';
import { markdown, type Table } from './report.ts';
import type { ShapeName } from './shapes.ts';
import { measureDecode, measurePrefill, showDecode, showPrefill } from './speed.ts';
import { measureTax, showTax } from './tax.ts';

interface Case {
  measure: (bench: Bench, shape: ShapeName) => Promise<CaseRecord>;
  tables: (record: CaseRecord) => Table[];
  plots?: (record: CaseRecord) => string[];
  /** For --svg. */
  panels?: (record: CaseRecord) => Panel[];
}

export const cases: Record<CaseName, Case> = {
  decode: { measure: measureDecode, tables: showDecode },
  prefill: { measure: measurePrefill, tables: showPrefill },
  clients: { measure: measureClients, tables: showClients },
  tax: { measure: measureTax, tables: showTax },
  growth: { measure: measureGrowth, tables: showGrowth, plots: plotGrowth, panels: growthPanels },
};

/** A record as Markdown. */
export function show(record: CaseRecord): string {
  const { tables, plots } = cases[record.case];
  return [...tables(record).map(markdown), ...(plots?.(record) ?? [])].join('\n');
}
