import { expect, test, vi } from 'vitest';
import { show } from '../bench/peers/cases.ts';
import { StreamReader, summarize } from '../bench/peers/closed-loop.ts';
import { growthPanels, zipfPicks } from '../bench/peers/growth.ts';
import { othersShare, parseBusySeconds, parseProcess, treeSeconds } from '../bench/peers/other-load.ts';
import { addRounds, type CaseRecord } from '../bench/peers/record.ts';
import { bars, markdown } from '../bench/peers/report.ts';
import { runRounds } from '../bench/peers/rounds.ts';
import { percentile, ratios, shortNumber, showSpread, spread } from '../bench/peers/spread.ts';

test('a spread is the median with the lowest and the highest', () => {
  expect(spread([3, 1, 2])).toEqual({ median: 2, low: 1, high: 3, count: 3 });
  expect(spread([4, 1, 2, 3]).median).toBe(2.5);
  expect(() => spread([])).toThrow(/at least one/);
});

test('ratios are made round by round', () => {
  // The machine was half as fast in the second round; the ratio was 2 all along.
  expect(ratios([100, 50, 100], [50, 25, 50])).toEqual({ median: 2, low: 2, high: 2, count: 3 });
  expect(ratios([100, 50], [50]).count).toBe(1);
});

test('percentiles are values that were seen', () => {
  const values = Array.from({ length: 20 }, (_, i) => i + 1);
  expect([50, 95, 100, 0].map((p) => percentile(values, p))).toEqual([10, 19, 20, 1]);
});

test('numbers have three digits', () => {
  expect([1.234, 12.34, 123.4, 1234.5].map(shortNumber)).toEqual(['1.23', '12.3', '123', '1235']);
  expect(showSpread(spread([1, 2, 3]))).toBe('2.00 (1.00–3.00)');
});

test('busy time is all but idle and waiting for disks', () => {
  expect(parseBusySeconds('cpu  100 20 30 5000 700 1 2 3 9 9\ncpu0 1 2 3 4 5 6 7 8\n')).toBeCloseTo(1.56);
});

test("a process' times include the children it waited for, whatever its name", () => {
  const stat = `42 (a) b (c) S 7 ${'0 '.repeat(9)}100 50 20 30 20 0 1`;
  expect(parseProcess(stat)).toEqual({ pid: 42, parent: 7, seconds: 2 });
});

test('our time is that of the whole tree, the rest is others', () => {
  const processes = [
    { pid: 1, parent: 0, seconds: 100 },
    { pid: 2, parent: 1, seconds: 1 },
    { pid: 3, parent: 2, seconds: 4 },
    { pid: 4, parent: 1, seconds: 50 },
  ];
  expect(treeSeconds(2, processes)).toBe(5);
  const before = { atSeconds: 0, busySeconds: 1000, ownSeconds: 5 };
  const after = { atSeconds: 10, busySeconds: 1020, ownSeconds: 23 };
  expect(othersShare(before, after, 2)).toBeCloseTo(0.1);
  expect(othersShare(before, before, 2)).toBe(0);
});

/** Moments for one sample each: others take this share of one CPU-second. */
function moments(...shares: number[]) {
  let asked = 0;
  return () => {
    const share = asked % 2 === 1 ? (shares[asked >> 1] ?? 0) : 0;
    return { atSeconds: asked++ % 2, busySeconds: share * 1000, ownSeconds: 0 };
  };
}
// One CPU's worth of shares would depend on the machine: 0 and 1000 do not.
const quiet = { maxOthersShare: 0.5, maxTries: 2, maxWaitMs: 0, watchMs: 1 };

test('contestants take turns, and a warm-up does not count', async () => {
  const order: string[] = [];
  const contestant = (name: string) => ({
    name,
    measure: async () => {
      order.push(name);
      return { ms: order.length };
    },
    warmUp: async () => {
      order.push(`warm ${name}`);
    },
  });
  const series = await runRounds([contestant('a'), contestant('b')], {
    ...quiet,
    rounds: 2,
    moment: moments(),
  });
  expect(order).toEqual(['warm a', 'warm b', 'a', 'b', 'a', 'b']);
  expect(series.map(({ figures }) => figures)).toEqual([{ ms: [3, 5] }, { ms: [4, 6] }]);
});

test('a disturbed sample is taken again', async () => {
  let value = 0;
  const measure = async () => ({ ms: ++value });
  const [series] = await runRounds([{ name: 'a', measure }], { ...quiet, rounds: 1, moment: moments(1, 0) });
  expect(series).toMatchObject({ figures: { ms: [2] }, numRepeated: 1, othersShare: 0 });
});

test('a machine that stays busy ends the tries, and the share is told', async () => {
  let value = 0;
  const measure = async () => ({ ms: ++value });
  const [series] = await runRounds([{ name: 'a', measure }], {
    ...quiet,
    rounds: 1,
    moment: moments(1, 1, 0),
  });
  expect(series).toMatchObject({ figures: { ms: [1] }, numRepeated: 1, othersShare: 1 });
});

test('a sample waits for a quiet machine, and no longer than it may', async () => {
  let value = 0;
  const measure = async () => ({ ms: ++value });
  const run = async (...shares: number[]) => {
    const moment = vi.fn(moments(...shares));
    await runRounds([{ name: 'a', measure }], { ...quiet, maxWaitMs: 3, rounds: 1, moment });
    return moment.mock.calls.length / 2;
  };
  // Watched until it is quiet, then the sample itself.
  expect(await run(1, 1, 0, 0)).toBe(4);
  expect(await run(1, 1, 1, 0)).toBe(4);
  expect(await run(0, 0)).toBe(2);
});

test('a sample waits for what its own processes still do', async () => {
  // Busy by a contestant's server: no others, but no quiet machine either.
  let asked = 0;
  const moment = () => {
    const seconds = asked < 4 ? 1000 * asked : 3000;
    return { atSeconds: asked++, busySeconds: seconds, ownSeconds: seconds };
  };
  await runRounds([{ name: 'a', measure: async () => ({ ms: 1 }) }], {
    ...quiet,
    maxWaitMs: 9,
    rounds: 1,
    moment,
  });
  expect(asked / 2).toBe(4);
});

test('one that fails is left out of the rounds that follow; the others go on', async () => {
  let calls = 0;
  const failing = {
    name: 'failing',
    measure: async () => {
      calls++;
      throw new Error('no such program');
    },
  };
  const working = { name: 'working', measure: async () => ({ ms: 1 }) };
  const series = await runRounds([failing, working], { ...quiet, rounds: 3, moment: moments() });
  expect(calls).toBe(1);
  expect(series[0]!.failure).toBe('no such program');
  expect(series[1]!.figures.ms).toEqual([1, 1, 1]);
});

test.each([
  [
    'llama-server',
    'data: {"content":"a"}\n\n',
    'data: {"content":"","stop":true,"timings":{"predicted_n":3}}\n\n',
  ],
  [
    'OpenAI',
    'data: {"choices":[{"text":"a"}]}\n\n',
    'data: {"choices":[],"usage":{"completion_tokens":3}}\n\ndata: [DONE]\n\n',
  ],
])('a stream of %s: first and last token, and the count that the end states', (_, event, end) => {
  const reader = new StreamReader(1000);
  reader.read(event.slice(0, 9), 1010);
  reader.read(event.slice(9), 1020);
  reader.read(event, 1030);
  reader.read(event + end, 1050);
  expect(reader.answer()).toEqual({ firstMs: 20, lastMs: 50, numTokens: 3 });
});

test('a stream that ends early is an error', () => {
  const reader = new StreamReader(0);
  expect(() => reader.answer()).toThrow(/expected an event with a token/);
  reader.read('data: {"content":"a"}\n', 1);
  expect(() => reader.answer()).toThrow(/expected a last event/);
});

test('throughput is over the wall time; pace leaves the first token out', () => {
  const answer = { firstMs: 100, lastMs: 400, numTokens: 4 };
  expect(summarize([answer, answer], 1000)).toEqual({
    tokensPerSecond: 8,
    ttftP50Ms: 100,
    ttftP95Ms: 100,
    tpotP50Ms: 100,
  });
});

test('Zipf draws the first most, and every adapter can come', () => {
  const picks = zipfPicks(5, 5000);
  const counts = [0, 1, 2, 3, 4].map((one) => picks.filter((pick) => pick === one).length);
  expect(counts).toEqual(counts.toSorted((a, b) => b - a));
  expect(counts[0]! / counts[1]!).toBeCloseTo(2, 0);
  expect(Math.min(...counts)).toBeGreaterThan(0);
  expect(new Set(zipfPicks(1, 10))).toEqual(new Set([0]));
});

test('a table is Markdown with aligned columns', () => {
  const text = markdown({
    title: 'T',
    note: 'N',
    columns: ['a', 'b'],
    rows: [['x', spread([1, 2, 3])], ['long cell']],
  });
  expect(text.split('\n')).toEqual([
    '### T',
    '',
    'N',
    '',
    '| a         | b                |',
    '|-----------|------------------|',
    '| x         | 2.00 (1.00–3.00) |',
    '| long cell |                  |',
    '',
  ]);
});

test('bars are to one scale', () => {
  const lines = bars('t', 'ms', [
    { label: '1', value: 5 },
    { label: '10', value: 10 },
  ]).split('\n');
  const widths = lines
    .filter((line) => line.includes('█'))
    .map((line) => [...line].filter((c) => c === '█').length);
  expect(widths).toEqual([25, 50]);
});

const series = (setting: string, name: string, figures: Record<string, number[]>) => ({
  ...{ setting, name, figures, othersShare: 0.01, numRepeated: 0 },
});

test('rounds of a later run are added to those of the same contestant and setting', () => {
  const record = (values: number[], failure?: string): CaseRecord => ({
    case: 'prefill',
    shape: 'qwen05b',
    series: [
      { ...series('512', 'motet q4_0_all', { tokensPerSecond: values }), ...(failure ? { failure } : {}) },
    ],
    facts: { [`from ${values[0]}`]: 1 },
  });
  const whole = addRounds(record([1, 2]), record([3]));
  expect(whole.series).toHaveLength(1);
  expect(whole.series[0]!.figures.tokensPerSecond).toEqual([1, 2, 3]);
  expect(whole.facts).toEqual({ 'from 1': 1, 'from 3': 1 });
  expect(addRounds(record([1]), record([2], 'ended')).series[0]!.failure).toBe('ended');
});

test('decode is shown with ratios, shares of its roofs, and who failed', () => {
  const rates = (value: number) => ({ tokensPerSecond: [value, value], memoryGigabytesPerSecond: [32, 32] });
  const text = show({
    case: 'decode',
    shape: 'qwen05b',
    series: [
      series('1', 'motet q4_0_all', rates(100)),
      series('1', 'llama.cpp q4_0', rates(50)),
      { ...series('1', 'llama.cpp q8_0', {}), failure: 'no such file' },
      series('1', 'roof', { gigabytesPerSecond: [40, 40], vnniGops: [988, 988], amxGops: [0, 0] }),
    ],
    facts: { 'weights of motet q4_0_all': 278_000_000 },
  });
  // 278 MB and 160 positions of 12 KiB, 100 times a second, of 40 GB/s and of 32; 2 × 494 M operations of 988 G.
  expect(text).toMatch(
    /motet q4_0_all +\| 100 \(100–100\) +\| +\| 70 % \(70–70\) +\| 87 % \(87–87\) +\| 10 % \(10–10\)/,
  );
  expect(text).toMatch(/llama.cpp q4_0 +\| 50.0 \(50.0–50.0\) +\| 2.00 \(2.00–2.00\)/);
  expect(text).toContain('failed: no such file');
  expect(text).toContain('roof: read 40.0 GB/s, vpdpbusd 988 GOP/s');
});

test('the tax is what a step takes longer, against reading the adapters', () => {
  const text = show({
    case: 'tax',
    shape: 'qwen05b',
    series: [
      series('8', 'no adapter', { stepMs: [10, 20] }),
      series('8', 'rank 8 on q, v', { stepMs: [11, 22] }),
      series('8', 'roof', { gigabytesPerSecond: [8.650752, 8.650752] }),
    ],
    facts: { 'load ms of rank 8 on q, v': 3 },
  });
  // 8 adapters of 24 layers × 8 × (896 + 896 + 896 + 128) × 2 bytes: 1 ms at that rate.
  expect(text).toMatch(
    /rank 8 on q, v +\| 16.5 \(11.0–22.0\) +\| 10 % \(10–10\) +\| 1.50 \(1.00–2.00\) +\| 1.00 \(1.00–1.00\) +\| 1.50/,
  );
  expect(text).toContain('rank 16 on all linear');
});

test('growth is shown as a table and as bars', () => {
  const setting = 'batch, context 128';
  const text = show({
    case: 'growth',
    shape: 'smollm2',
    series: [series(setting, '1', { stepMs: [5] }), series(setting, '8', { stepMs: [10] })],
    facts: {},
  });
  expect(text).toMatch(/\| 8 +\| 10.0 \(10.0–10.0\) +\| 800 \(800–800\) +\|/);
  expect(text).toContain('10.0 ms');
});

test('growth is drawn with its spread; what failed or was not measured is left out', () => {
  const setting = 'batch, context 128';
  const [panel, ...others] = growthPanels({
    case: 'growth',
    shape: 'smollm2',
    series: [
      series(setting, '1', { stepMs: [5, 6, 4] }),
      { ...series(setting, '8', {}), failure: 'too big' },
      series('context, batch 1', '128', {}),
    ],
    facts: {},
  });
  expect(others).toEqual([]);
  expect(panel).toMatchObject({ title: 'Decode step by batch, context 128', x: { label: 'batch' } });
  expect(panel!.series[0]!.points).toEqual([{ x: 1, y: 5, low: 4, high: 6 }]);
});
