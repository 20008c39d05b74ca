import { describe, expect, test } from 'vitest';
import { type Panel, type Point, renderSvg } from '../bench/plot.ts';

const panel = (overrides: Partial<Panel> = {}): Panel => ({
  title: 'Throughput',
  x: { label: 'adapters', scale: 'linear' },
  y: { label: 'tokens/s', scale: 'linear' },
  series: [
    {
      name: 'uniform',
      points: [
        { x: 0, y: 0 },
        { x: 50, y: 5 },
        { x: 100, y: 10 },
      ],
    },
  ],
  ...overrides,
});
const line = (points: Point[]) => [{ name: 'uniform', points }];
const linePoints = (svg: string) =>
  [...svg.matchAll(/<polyline class="s\d" points="([^"]*)"/g)].map(([, points]) =>
    points!.split(' ').map((point) => point.split(',').map(Number)),
  );
const texts = (svg: string) => [...svg.matchAll(/<text [^>]*>([^<]*)<\/text>/g)].map(([, text]) => text);

test('points lie between the axes in proportion to their values', () => {
  const [points] = linePoints(renderSvg([panel()]));
  const [first, middle, last] = points!;
  expect(middle![0]).toBeCloseTo((first![0]! + last![0]!) / 2);
  expect(middle![1]).toBeCloseTo((first![1]! + last![1]!) / 2);
  expect(first![0]).toBeLessThan(last![0]!);
  // More is higher up.
  expect(first![1]).toBeGreaterThan(last![1]!);
});

test('on a log axis equal factors are equal distances', () => {
  const log = panel({
    x: { label: 'adapters', scale: 'log' },
    series: line([
      { x: 1, y: 1 },
      { x: 10, y: 1 },
      { x: 100, y: 1 },
    ]),
  });
  const [points] = linePoints(renderSvg([log]));
  const [a, b, c] = points!.map(([x]) => x!);
  expect(b! - a!).toBeCloseTo(c! - b!, 0);
});

test('has its title, its axes with units, round ticks around the values, and a legend', () => {
  const shown = texts(
    renderSvg([
      panel({
        series: line([
          { x: 3, y: 7 },
          { x: 97, y: 1234 },
        ]),
      }),
    ]),
  );
  for (const text of ['Throughput', 'adapters', 'tokens/s', 'uniform']) expect(shown).toContain(text);
  expect(shown).toEqual(expect.arrayContaining(['0', '20', '100', '500', '1,000', '1,500']));
});

test('a linear axis of amounts begins at 0', () => {
  expect(
    texts(
      renderSvg([
        panel({
          series: line([
            { x: 1, y: 900 },
            { x: 2, y: 1000 },
          ]),
        }),
      ]),
    ),
  ).toContain('0');
});

test('marks are upright lines with names, and are inside even where no point is', () => {
  const svg = renderSvg([panel({ marks: [{ x: 500, label: 'the host is full' }] })]);
  expect(texts(svg)).toContain('the host is full');
  const [, x1, x2] = /class="mark" x1="([\d.]+)" x2="([\d.]+)"/.exec(svg)!;
  expect(x1).toBe(x2);
  expect(Number(x1)).toBeLessThanOrEqual(760);
});

test('panels lie below each other, in one picture that is as high as all', () => {
  const one = renderSvg([panel()]);
  const two = renderSvg([panel(), panel({ title: 'TTFT' })]);
  const heightOf = (svg: string) => Number(/height="(\d+)" role/.exec(svg)![1]);
  expect(heightOf(two)).toBe(2 * heightOf(one));
  expect(two).toContain(`translate(0 ${heightOf(one)})`);
});

test('has colours of its own for light and dark', () => {
  const [before, inDark] = renderSvg([panel()]).split('@media (prefers-color-scheme: dark)');
  expect(before).toContain('.ground { fill: #ffffff; }');
  expect(inDark).toContain('.ground { fill: #0d1117; }');
});

test('a spread is a line from the lowest to the highest', () => {
  const svg = renderSvg([panel({ series: line([{ x: 1, y: 5, low: 2, high: 10 }]) })]);
  const [, y1, y2] = /<line class="s0" .* y1="([\d.]+)" y2="([\d.]+)"/.exec(svg)!;
  expect(Number(y1)).toBeGreaterThan(Number(y2));
});

test('names are text, never markup', () => {
  const svg = renderSvg([panel({ title: 'a < b & "c"' })]);
  expect(svg).toContain('a &lt; b &amp; &quot;c&quot;');
  expect(svg).not.toContain('a < b');
});

describe('refuses what cannot be drawn', () => {
  test.each<[string, Partial<Panel>, string]>([
    ['nothing', { series: [] }, 'Throughput: expected at least one point, got none'],
    ['no number', { series: line([{ x: 1, y: Number.NaN }]) }, 'tokens/s: expected numbers, got NaN'],
    [
      'nothing on a log axis',
      { x: { label: 'adapters', scale: 'log' } },
      'adapters: expected numbers above 0, got 0',
    ],
  ])('%s', (_name, overrides, message) => {
    expect(() => renderSvg([panel(overrides)])).toThrow(new RangeError(message));
  });
});
