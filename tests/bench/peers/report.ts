/** Tables as Markdown, which reads well in a terminal too, and bars for series that grow. Pure: lines out, nothing printed. */
import { type Spread, shortNumber, showSpread } from './spread.ts';

export interface Table {
  title: string;
  /** One line under the title: what the columns mean. */
  note?: string;
  columns: string[];
  rows: (string | Spread)[][];
}

export function markdown({ title, note, columns, rows }: Table): string {
  const cells = [
    columns,
    ...rows.map((row) => row.map((cell) => (typeof cell === 'string' ? cell : showSpread(cell)))),
  ];
  const widths = columns.map((_, i) => Math.max(3, ...cells.map((row) => row[i]?.length ?? 0)));
  const line = (row: string[]) => `| ${widths.map((width, i) => (row[i] ?? '').padEnd(width)).join(' | ')} |`;
  const rule = `|${widths.map((width) => '-'.repeat(width + 2)).join('|')}|`;
  return [
    `### ${title}`,
    '',
    ...(note ? [note, ''] : []),
    line(cells[0]!),
    rule,
    ...cells.slice(1).map(line),
    '',
  ].join('\n');
}

/** Horizontal bars to one scale, from 0 to the largest. */
export function bars(title: string, unit: string, points: { label: string; value: number }[]): string {
  const width = 50;
  const largest = Math.max(...points.map(({ value }) => value));
  const labelWidth = Math.max(...points.map(({ label }) => label.length));
  const lines = points.map(({ label, value }) => {
    const bar = '█'.repeat(Math.max(1, Math.round((width * value) / largest)));
    return `${label.padStart(labelWidth)} ${bar.padEnd(width)} ${shortNumber(value)} ${unit}`;
  });
  return ['```', title, ...lines, '```', ''].join('\n');
}

export const percent = (share: number) => `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;

export const showPercent = ({ median, low, high }: Spread) =>
  `${(100 * median).toFixed(0)} % (${(100 * low).toFixed(0)}–${(100 * high).toFixed(0)})`;
