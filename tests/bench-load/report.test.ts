import { describe, expect, test } from 'vitest';
import {
  distribution,
  figure,
  histogram,
  percentile,
  Reservoir,
  renderPage,
  summarise,
} from '../bench/load/report.ts';
import type { Sample } from '../bench/load/run.ts';
import { seededRandom } from '../fixtures/seeded-random.ts';

/** A request that was due at 1000 ms: first text after 200 ms, 11 tokens until 1300 ms, its end at 1310 ms. */
function sample(overrides: Partial<Sample> = {}): Sample {
  return {
    index: 0,
    turn: 0,
    numTurns: 1,
    adapter: null,
    dueMs: 1000,
    sentMs: 1000,
    firstMs: 1200,
    lastMs: 1300,
    endMs: 1310,
    longestGapMs: 25,
    promptTokens: 5,
    outputTokens: 11,
    cachedTokens: null,
    wantedTokens: 11,
    code: 'ok',
    message: '',
    ...overrides,
  };
}

const failure = (code: string, message = '') =>
  sample({ code, message, firstMs: null, lastMs: null, promptTokens: null, outputTokens: null });

/** A turn that was due at 0 ms, whose first text came then. */
const turn = (index: number, number: number, firstMs: number, overrides: Partial<Sample> = {}) =>
  sample({ index, turn: number - 1, numTurns: 3, dueMs: 0, sentMs: 0, firstMs, endMs: 400, ...overrides });

describe('percentiles', () => {
  const hundred = Array.from({ length: 101 }, (_, i) => i);

  test.each([
    [0, 0],
    [50, 50],
    [99, 99],
    [100, 100],
  ])('p%i of 0 … 100 is %i', (percent, expected) => {
    expect(percentile(hundred, percent)).toBe(expected);
  });

  test('between two values, on the line that joins them', () => {
    expect(percentile([10, 20], 50)).toBe(15);
    expect(percentile([1, 2, 4, 8], 90)).toBeCloseTo(6.8);
    expect(percentile([7], 99)).toBe(7);
  });

  test('a distribution sorts by number, not by text', () => {
    expect(distribution([100, 9, 20])).toEqual({
      count: 3,
      mean: 43,
      p50: 20,
      p90: 84,
      p95: 92,
      p99: 98.4,
      max: 100,
    });
    expect(distribution([])).toBeNull();
  });
});

describe('a summary', () => {
  test('of one request: time to first token from when it was due, time per token after the first', () => {
    const summary = summarise([sample({ dueMs: 900 })], [10, 25], [], {});
    expect(summary.ttftMs!.mean).toBe(300);
    expect(summary.tpotMs!.mean).toBe(10);
    expect(summary.e2eMs!.mean).toBe(410);
    expect(summary.sendDelayMs!.mean).toBe(100);
    expect(summary.itlMs).toMatchObject({ count: 2, mean: 17.5, max: 25 });
  });

  test('rates are over the time from the first due request to the last end', () => {
    const samples = [sample({ dueMs: 0, endMs: 900 }), sample({ dueMs: 500, endMs: 2000, outputTokens: 9 })];
    expect(summarise(samples, [], [], {})).toMatchObject({
      durationSeconds: 2,
      requestsPerSecond: 1,
      promptTokens: 10,
      outputTokens: 20,
      promptTokensPerSecond: 5,
      outputTokensPerSecond: 10,
      meanConcurrency: 1.2,
      numOtherLength: 1,
    });
  });

  test('a request of one token has no time per further token', () => {
    expect(summarise([sample({ outputTokens: 1 })], [], [], {}).tpotMs).toBeNull();
  });

  test('failures count by code, with what the first said, and are in no latency', () => {
    const samples = [
      sample(),
      failure('http_429', 'queue is full'),
      failure('http_429', 'x'),
      failure('timeout'),
    ];
    const summary = summarise(samples, [], [], {});
    expect(summary).toMatchObject({ numDone: 1, numFailed: 3 });
    expect(summary.failures).toEqual({
      http_429: { count: 2, firstMessage: 'queue is full' },
      timeout: { count: 1, firstMessage: '' },
    });
    expect(summary.ttftMs!.count).toBe(1);
  });

  test('what Ctrl-C cancelled is neither done nor failed, and does not stretch the run', () => {
    const summary = summarise([sample(), { ...failure('cancelled'), endMs: 9000 }], [], [], { e2e: 400 });
    expect(summary).toMatchObject({ numDone: 1, numFailed: 0, numCancelled: 1 });
    expect(summary.durationSeconds).toBeCloseTo(0.31);
    expect(summary.goodput!.share).toBe(1);
  });

  test('of nothing is zeroes', () => {
    expect(summarise([], [], [], { ttft: 1 })).toMatchObject({
      durationSeconds: 0,
      requestsPerSecond: 0,
      ttftMs: null,
      goodput: { requestsPerSecond: 0, share: 0 },
    });
  });
});

describe('cached tokens', () => {
  test('are a share of the prompts whose answers tell it', () => {
    const samples = [
      sample({ promptTokens: 60, cachedTokens: 40 }),
      sample({ promptTokens: 40, cachedTokens: 0 }),
      sample({ promptTokens: 900 }),
      failure('timeout'),
    ];
    expect(summarise(samples, [], [], {}).cachedShare).toBe(0.4);
  });

  test('of a server that does not tell are unknown, not none', () => {
    expect(summarise([sample()], [], [], {}).cachedShare).toBeNull();
  });
});

describe('conversations', () => {
  const three = [
    turn(0, 1, 100, { promptTokens: 10, cachedTokens: 0 }),
    turn(0, 2, 20, { promptTokens: 30, cachedTokens: 15 }),
    turn(0, 3, 40, { promptTokens: 50, cachedTokens: 45 }),
    turn(1, 1, 300, { promptTokens: 10, cachedTokens: 0 }),
    { ...failure('http_400', 'too long'), index: 1, turn: 1, numTurns: 3, dueMs: 0, endMs: 10 },
    turn(2, 1, 200, { promptTokens: 10, cachedTokens: 0 }),
    { ...failure('cancelled'), index: 2, turn: 1, numTurns: 3 },
    turn(3, 1, 200, { promptTokens: 10, cachedTokens: 0 }),
  ];

  test('are complete, ended by a failure with turns that were never sent, or cut by the end of the run', () => {
    expect(summarise(three, [], [], {}).conversations).toMatchObject({
      numComplete: 1,
      numFailed: 1,
      numTurnsNotSent: 1,
      numCut: 2,
    });
  });

  test('have latencies and cached tokens by turn: the first, the later ones, and each by its number', () => {
    const { firstTurn, laterTurns, turns } = summarise(three, [], [], {}).conversations!;
    expect(firstTurn).toMatchObject({ numRequests: 4, meanPromptTokens: 10, cachedShare: 0 });
    expect(firstTurn!.ttftMs).toMatchObject({ mean: 200, max: 300 });
    expect(laterTurns).toMatchObject({ numRequests: 2, meanPromptTokens: 40, cachedShare: 0.75 });
    expect(laterTurns!.ttftMs).toMatchObject({ p50: 30 });
    expect(turns.map((of) => [of.turn, of.numRequests, of.e2eMs.p50])).toEqual([
      [1, 4, 400],
      [2, 1, 400],
      [3, 1, 400],
    ]);
  });

  test('single requests are none', () => {
    expect(summarise([sample()], [], [], {}).conversations).toBeNull();
  });

  const page = (samples: Sample[]) =>
    renderPage(summarise(samples, [], [], {}), { ttftMs: [], itlMs: [] }, [], { columns: 80, isPlain: true });

  test('show on the page how they ended, and a line for each turn', () => {
    const text = page(three);
    expect(text).toContain(
      'of conversations: 1 complete, 1 ended by a failure (1 turns not sent), 2 cut by the end of the run',
    );
    expect(text).toContain('tokens      120 prompt (50 % cached), 66 output');
    expect(text).toContain(`
  ms               TTFT                        E2E
                    p50      p95      p99      p50      p95      p99   prompt   cached  answers
  first turn        200      285      297      400      400      400     10.0      0 %        4
  later turns      30.0     39.0     39.8      400      400      400     40.0     75 %        2
  turn 1            200      285      297      400      400      400     10.0      0 %        4
  turn 2           20.0     20.0     20.0      400      400      400     30.0     50 %        1
  turn 3           40.0     40.0     40.0      400      400      400     50.0     90 %        1
`);
  });

  test('of very many turns show the first and the last, and say so', () => {
    const samples = Array.from({ length: 30 }, (_, i) => turn(0, i + 1, 100, { numTurns: 30 }));
    const shown = [...page(samples).matchAll(/^ {2}turn (\d+) /gm)].map(([, number]) => Number(number));
    expect(shown).toEqual([1, 2, 3, 4, 5, 6, 29, 30]);
    expect(page(samples)).toContain('of 30 turns; --json has all');
  });

  test('without any answer have no table', () => {
    expect(page([{ ...failure('timeout'), numTurns: 3 }])).toContain(
      '1 ended by a failure (2 turns not sent)',
    );
    expect(page([{ ...failure('timeout'), numTurns: 3 }])).not.toContain('first turn');
  });
});

describe('goodput', () => {
  const samples = [
    sample(), // ttft 200, longest pause 25, tpot 10, e2e 310
    sample({ firstMs: 1299 }), // ttft 299
    sample({ longestGapMs: 90 }),
    sample({ endMs: 2000 }), // e2e 1000
    failure('http_503'),
  ];

  test('counts requests that keep every limit, among all that were measured', () => {
    const { goodput, durationSeconds } = summarise(samples, [], [], { ttft: 250, itl: 50, e2e: 500 });
    expect(durationSeconds).toBe(1);
    expect(goodput).toEqual({
      slo: { ttft: 250, itl: 50, e2e: 500 },
      requestsPerSecond: 1,
      share: 0.2,
      keptBy: { ttft: 3, itl: 3, e2e: 3 },
    });
  });

  test('a limit that is just met is kept', () => {
    expect(summarise([sample()], [], [], { ttft: 200, tpot: 10 }).goodput!.share).toBe(1);
    expect(summarise([sample()], [], [], { ttft: 199 }).goodput!.share).toBe(0);
  });

  test('without limits there is none', () => {
    expect(summarise(samples, [], [], {}).goodput).toBeNull();
  });
});

describe('voices', () => {
  test('are told apart, the busiest first, the base among them', () => {
    const samples = [
      sample({ adapter: 1 }),
      sample({ adapter: 1, firstMs: 1100 }),
      sample({ adapter: null }),
      sample({ adapter: 1 }),
      { ...failure('timeout'), adapter: 0 },
    ];
    expect(summarise(samples, [], ['dates', 'sql'], {}).voices).toEqual([
      { adapter: 'sql', numRequests: 3, outputTokens: 33, meanTtftMs: 500 / 3 },
      { adapter: null, numRequests: 1, outputTokens: 11, meanTtftMs: 200 },
    ]);
  });

  test('a page compares those with enough requests', () => {
    const samples = [0, 1, 2].flatMap((adapter) =>
      Array.from({ length: adapter === 2 ? 2 : 3 }, () => sample({ adapter, firstMs: 1100 + 100 * adapter })),
    );
    const page = renderPage(
      summarise(samples, [], ['dates', 'sql', 'triage'], {}),
      { ttftMs: [], itlMs: [] },
      [],
      { columns: 80, isPlain: true },
    );
    expect(page).toContain('3 voices; busiest, with their requests: dates (3), sql (3), triage (2)');
    expect(page).toContain(
      'mean TTFT of the 2 with at least 3 requests: from 100 ms of dates to 200 ms of sql',
    );
  });
});

describe('a page', () => {
  test('says everything once', () => {
    const samples = [
      sample({ dueMs: 0, sentMs: 0, firstMs: 100, lastMs: 200, endMs: 210 }),
      sample({ dueMs: 0, sentMs: 5, firstMs: 300, lastMs: 900, endMs: 1000, outputTokens: 7 }),
      { ...failure('http_429', 'the queue is full'), dueMs: 0, endMs: 10 },
    ];
    const summary = summarise(samples, [10, 20, 600], [], { ttft: 250 });
    const values = { ttftMs: [100, 300], itlMs: [10, 20, 600] };
    expect(renderPage(summary, values, ['motet bench: a head'], { columns: 60, isPlain: true })).toBe(
      `motet bench: a head

  requests    2 done, 1 failed, in 1.00 s
              1 × http_429: the queue is full
  throughput  2.00 requests/s, 18.0 output tokens/s, 10.0 prompt tokens/s
  tokens      10 prompt, 18 output, by the server's usage
  in flight   1.22 in the mean
              answers of another length than asked: 1
  goodput     1.00 requests/s, 33.3 % of requests (ttft ≤ 250 ms by 1)

  ms               mean      p50      p90      p95      p99      max
  TTFT              200      200      280      290      298      300
  ITL               210     20.0      484      542      588      600
  TPOT             55.0     55.0     91.0     95.5     99.1      100
  E2E               605      605      921      961      992     1000
  send delay       2.50     2.50     4.50     4.75     4.95     5.00

  TTFT, ms
  100 to 125  ########################################### 1
  125 to 150                                              0
  150 to 175                                              0
  175 to 200                                              0
  200 to 225                                              0
  225 to 250                                              0
  250 to 275                                              0
  275 to 300  ########################################### 1

  ITL, ms
  10.0 to 16.7  ######################################### 1
  16.7 to 27.8  ######################################### 1
  27.8 to 46.4                                            0
  46.4 to 77.5                                            0
   77.5 to 129                                            0
    129 to 216                                            0
    216 to 360                                            0
    360 to 600  ######################################### 1
`,
    );
  });

  test('of a run without an answer has no table', () => {
    const page = renderPage(summarise([failure('timeout')], [], [], {}), { ttftMs: [], itlMs: [] }, [], {
      columns: 80,
      isPlain: true,
    });
    expect(page).toContain('0 done, 1 failed');
    expect(page).not.toContain('TTFT');
  });
});

describe('a histogram', () => {
  const wide = { columns: 200, isPlain: false };

  test('has every value in one bin, the largest too', () => {
    const values = Array.from({ length: 1000 }, (_, i) => 5 + (i % 37));
    const counts = histogram(values, wide).map((line) => Number(/ (\d+)$/.exec(line)![1]));
    expect(counts).toHaveLength(8);
    expect(counts.reduce((sum, count) => sum + count, 0)).toBe(1000);
    expect(counts[7]).toBeGreaterThan(0);
  });

  test('shows an eighth of a column of the fullest bin, and never nothing for something', () => {
    // 400 in the first bin, 4 in the second, 201 in the last.
    const values = [...Array(400).fill(0), ...Array(4).fill(1), ...Array(201).fill(7.5)];
    const bars = histogram(values, { columns: 200, isPlain: false }).map((line) => line.match(/[█-▏]+/)?.[0]);
    expect(bars[0]).toBe('█'.repeat(50));
    expect(histogram([...values, 0.9], { columns: 0, isPlain: false })[0]).toContain('█');
    expect(bars.at(-1)).toBe(`${'█'.repeat(25)}▏`);
    expect(bars.filter(Boolean)).toHaveLength(3);
  });

  test.each([40, 60, 80, 100, 300])('fits %i columns', (columns) => {
    const values = Array.from({ length: 5000 }, (_, i) => 1.5 ** (i % 20));
    for (const isPlain of [true, false]) {
      for (const line of histogram(values, { columns, isPlain })) {
        expect(line.length + 2).toBeLessThanOrEqual(columns);
      }
    }
  });

  test('has letters only when nobody looks at a terminal', () => {
    const text = histogram([1, 2, 2, 3], { columns: 80, isPlain: true }).join('\n');
    expect(text).toMatch(/^[ -~\n]+$/);
  });

  test('of equal values is a line', () => {
    expect(histogram([4, 4, 4], wide)).toEqual(['all 4.00']);
  });

  test('of values that are far apart has wider and wider bins', () => {
    const lines = histogram([1, 10, 100, 1000], wide);
    expect(lines[0]).toMatch(/1\.00 to 2\.37/);
    expect(lines.at(-1)).toMatch(/422 to 1000/);
  });

  test('has a bin for pauses of nothing', () => {
    const [first] = histogram([0, 0, 0, 5, 60, 100], wide);
    expect(first).toMatch(/^ *0 to .* 3$/);
  });
});

test.each([
  [0, '0'],
  [0.1234, '0.12'],
  [9.99, '9.99'],
  [9.996, '10.0'],
  [99.94, '99.9'],
  [99.96, '100'],
  [1234.5, '1235'],
])('%f is shown as %s', (value, expected) => {
  expect(figure(value)).toBe(expected);
});

describe('a reservoir', () => {
  test('keeps everything that fits', () => {
    const reservoir = new Reservoir(3, () => 0);
    for (const value of [1, 2, 3]) reservoir.add(value);
    expect(reservoir.values).toEqual([1, 2, 3]);
  });

  test('keeps a fair sample of what does not, and counts all', () => {
    const reservoir = new Reservoir(1000, seededRandom(5).unit);
    for (let i = 0; i < 20_000; i++) reservoir.add(i);
    expect(reservoir.numSeen).toBe(20_000);
    expect(reservoir.values).toHaveLength(1000);
    // The mean of 1000 of them: 9999.5 ± 5774 / √1000.
    const mean = reservoir.values.reduce((sum, value) => sum + value, 0) / 1000;
    expect(Math.abs(mean - 9999.5)).toBeLessThan(4 * 183);
  });
});
