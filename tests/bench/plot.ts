/**
 * Draws tables of numbers as an SVG: panels below each other, each with axes, units, lines and a legend. Pure. It follows the
 * reader's colours, light or dark, and tells series apart by their markers too. A library would bring a browser's DOM along.
 */

export interface Axis {
  /** With its unit. */
  label: string;
  /** log: every value is above 0. */
  scale: 'linear' | 'log';
}

export interface Point {
  x: number;
  y: number;
  /** Of the runs whose median y is: a line from the lowest to the highest. */
  low?: number;
  high?: number;
}

export interface Series {
  name: string;
  points: readonly Point[];
}

export interface Panel {
  title: string;
  x: Axis;
  y: Axis;
  series: readonly Series[];
  /** Upright lines, such as where a tier is full. */
  marks?: readonly { x: number; label: string }[];
}

const width = 760;
const height = 340;
const left = 76;
const right = 30;
const top = 46;
const bottom = 52;
const legendLine = 18;
const minPixelsBetweenLabels = 34;

interface Colours {
  ground: string;
  ink: string;
  faint: string;
  series: readonly string[];
}
/** Series after Okabe and Ito (2008), which people tell apart who do not see all colours. */
const light: Colours = {
  ground: '#ffffff',
  ink: '#1f2328',
  faint: '#d0d7de',
  series: ['#0072b2', '#d55e00', '#009e73', '#cc79a7', '#8a6d00', '#56606b'],
};
const dark: Colours = {
  ground: '#0d1117',
  ink: '#e6edf3',
  faint: '#3d444d',
  series: ['#56b4e9', '#ff8c42', '#2ecc9b', '#e79ac8', '#f0e442', '#a9b4c0'],
};
const numColours = light.series.length;

/** Written out, since not every viewer knows variables. */
function rulesOf({ ground, ink, faint, series }: Colours): string {
  return [
    `text { fill: ${ink}; } .ground { fill: ${ground}; } .grid { stroke: ${faint}; } .axis, .mark { stroke: ${ink}; }`,
    ...series.map((colour, i) => `.s${i} { stroke: ${colour}; } .s${i}:not(polyline) { fill: ${colour}; }`),
  ].join('\n  ');
}

const style = `<style>
  svg { font: 13px system-ui, sans-serif; }
  .title { font-weight: 600; font-size: 15px; } .mark { stroke-dasharray: 4 4; }
  polyline { fill: none; stroke-width: 2; }
  ${rulesOf(light)}
  @media (prefers-color-scheme: dark) {
  ${rulesOf(dark)}
  }
</style>`;

/** @returns the SVG's text.  @throws RangeError when a value cannot be drawn on its axis */
export function renderSvg(panels: readonly Panel[]): string {
  const heights = panels.map(({ series }) => height + legendLine * Math.ceil(series.length / 2));
  const total = heights.reduce((sum, one) => sum + one, 0);
  let y = 0;
  const drawn = panels.map((panel, i) => {
    const group = `<g transform="translate(0 ${y})">\n${renderPanel(panel)}\n</g>`;
    y += heights[i]!;
    return group;
  });
  const titles = panels.map(({ title }) => escapeText(title)).join('; ');
  return `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${width} ${total}" width="${width}" height="${total}" role="img" aria-label="${titles}">
${style}
<rect class="ground" width="${width}" height="${total}"/>
${drawn.join('\n')}
</svg>
`;
}

function renderPanel({ title, x, y, series, marks = [] }: Panel): string {
  const points = series.flatMap((one) => one.points);
  if (points.length === 0) throw new RangeError(`${title}: expected at least one point, got none`);
  const values = points.flatMap(({ y, low = y, high = y }) => [y, low, high]);
  const across = scaleOf(
    x,
    [...points.map((point) => point.x), ...marks.map((mark) => mark.x)],
    [left, width - right],
  );
  // Amounts on a linear axis are compared by their heights, so it begins at 0.
  const upright = scaleOf(y, y.scale === 'linear' ? [0, ...values] : values, [height - bottom, top]);
  const text = (at: string, content: string) => `<text ${at}>${escapeText(content)}</text>`;
  return [
    text(`class="title" x="${left}" y="22"`, title),
    ...upright.ticks.map(({ at, label }) =>
      [
        `<line class="grid" x1="${left}" x2="${width - right}" y1="${at}" y2="${at}"/>`,
        text(`x="${left - 8}" y="${at + 4}" text-anchor="end"`, label),
      ].join(''),
    ),
    ...across.ticks.map(({ at, label }) =>
      [
        `<line class="axis" x1="${at}" x2="${at}" y1="${height - bottom}" y2="${height - bottom + 5}"/>`,
        text(`x="${at}" y="${height - bottom + 20}" text-anchor="middle"`, label),
      ].join(''),
    ),
    `<line class="axis" x1="${left}" x2="${width - right}" y1="${height - bottom}" y2="${height - bottom}"/>`,
    text(`x="${(left + width - right) / 2}" y="${height - 12}" text-anchor="middle"`, x.label),
    text(
      `x="16" y="${(top + height - bottom) / 2}" text-anchor="middle" transform="rotate(-90 16 ${(top + height - bottom) / 2})"`,
      y.label,
    ),
    ...marks.map(({ x, label }) => {
      const at = across.at(x);
      const isFarRight = at > width - 150;
      return [
        `<line class="mark" x1="${at}" x2="${at}" y1="${top}" y2="${height - bottom}"/>`,
        text(
          `x="${at + (isFarRight ? -6 : 6)}" y="${top + 10}" text-anchor="${isFarRight ? 'end' : 'start'}"`,
          label,
        ),
      ].join('');
    }),
    ...series.map((one, i) => renderSeries(one, i, across.at, upright.at)),
    ...series.map(({ name }, i) => {
      const [lx, ly] = [left + (i % 2) * 330, height + 4 + legendLine * (i >> 1)];
      return `${marker(i, lx, ly)}${text(`x="${lx + 12}" y="${ly + 4}"`, name)}`;
    }),
  ].join('\n');
}

function renderSeries(
  { points }: Series,
  index: number,
  atX: (value: number) => number,
  atY: (value: number) => number,
): string {
  const colour = `s${index % numColours}`;
  const line = points.map(({ x, y }) => `${atX(x)},${atY(y)}`).join(' ');
  const spreads = points.flatMap(({ x, low, high }) =>
    low === undefined || high === undefined
      ? []
      : [`<line class="${colour}" x1="${atX(x)}" x2="${atX(x)}" y1="${atY(low)}" y2="${atY(high)}"/>`],
  );
  const markers = points.map(({ x, y }) => marker(index, atX(x), atY(y)));
  return `<polyline class="${colour}" points="${line}"/>${spreads.join('')}${markers.join('')}`;
}

function marker(index: number, x: number, y: number): string {
  const colour = `s${index % numColours}`;
  const shapes = [
    `<circle class="${colour}" cx="${x}" cy="${y}" r="4"/>`,
    `<rect class="${colour}" x="${x - 4}" y="${y - 4}" width="8" height="8"/>`,
    `<path class="${colour}" d="M${x} ${y - 5}l5 9h-10z"/>`,
    `<path class="${colour}" d="M${x} ${y - 5}l5 5l-5 5l-5 -5z"/>`,
  ];
  return shapes[index % shapes.length]!;
}

interface Scale {
  at(value: number): number;
  ticks: { at: number; label: string }[];
}

/** @param ends in pixels, of the least and of the greatest value */
function scaleOf({ label, scale }: Axis, values: readonly number[], ends: [number, number]): Scale {
  const wrong = values.find((value) => !Number.isFinite(value) || (scale === 'log' && value <= 0));
  if (wrong !== undefined) {
    throw new RangeError(
      `${label}: expected ${scale === 'log' ? 'numbers above 0' : 'numbers'}, got ${wrong}`,
    );
  }
  const [least, most] = [Math.min(...values), Math.max(...values)];
  const ticks = scale === 'log' ? logTicks(least, most) : linearTicks(least, most);
  const turn = scale === 'log' ? Math.log : (value: number) => value;
  const [low, high] = [turn(Math.min(least, ticks[0]!)), turn(Math.max(most, ticks.at(-1)!))];
  const at = (value: number) => {
    const share = high === low ? 0.5 : (turn(value) - low) / (high - low);
    return Math.round(10 * (ends[0] + share * (ends[1] - ends[0]))) / 10;
  };
  const shown: Scale['ticks'] = [];
  for (const value of ticks) {
    const last = shown.at(-1);
    // On a log axis ticks crowd.
    if (last !== undefined && Math.abs(at(value) - last.at) < minPixelsBetweenLabels) continue;
    shown.push({ at: at(value), label: tickLabel(value) });
  }
  return { at, ticks: shown };
}

/** Multiples of 1, 2 or 5 times a power of ten that enclose the values, five or so. */
function linearTicks(least: number, most: number): number[] {
  const span = most - least || Math.abs(most) || 1;
  const power = 10 ** Math.floor(Math.log10(span / 5));
  const step = power * ([1, 2, 5, 10].find((factor) => span / (power * factor) <= 6) ?? 10);
  const ticks: number[] = [];
  for (let k = Math.floor(least / step); k <= Math.ceil(most / step); k++) ticks.push(k * step);
  return ticks;
}

/** 1, 2 and 5 times powers of ten that enclose the values. */
function logTicks(least: number, most: number): number[] {
  const all: number[] = [];
  for (let power = Math.floor(Math.log10(least)); power <= Math.ceil(Math.log10(most)); power++) {
    for (const factor of [1, 2, 5]) all.push(factor * 10 ** power);
  }
  const first = all.findLastIndex((tick) => tick <= least * (1 + 1e-9));
  const last = all.findIndex((tick) => tick >= most * (1 - 1e-9));
  return all.slice(Math.max(0, first), last + 1);
}

function tickLabel(value: number): string {
  const rounded = Number(value.toPrecision(12));
  return Math.abs(rounded) >= 1000 ? rounded.toLocaleString('en-US') : String(rounded);
}

function escapeText(text: string): string {
  return text
    .replaceAll('&', '&amp;')
    .replaceAll('<', '&lt;')
    .replaceAll('>', '&gt;')
    .replaceAll('"', '&quot;');
}
