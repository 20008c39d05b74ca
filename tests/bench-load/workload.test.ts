import { describe, expect, test } from 'vitest';
import {
  arrivalsMs,
  createWorkload,
  type Lengths,
  lengthOf,
  type Message,
  type Workload,
  type WorkloadShape,
} from '../bench/load/workload.ts';
import { seededRandom } from '../fixtures/seeded-random.ts';

function shape(overrides: Partial<WorkloadShape> = {}): WorkloadShape {
  return {
    seed: 1,
    endpoint: 'completions',
    promptTokens: { kind: 'fixed', tokens: 4 },
    outputTokens: { kind: 'fixed', tokens: 2 },
    sharedPrefixTokens: 0,
    numPrefixes: 1,
    vocabSize: 8192,
    conversations: null,
    numAdapters: 0,
    popularity: { kind: 'uniform' },
    baseShare: 0,
    ...overrides,
  };
}

const requests = (workload: Workload, count: number) =>
  Array.from({ length: count }, (_, index) => workload.request(index, 0));

const mean = (values: number[]) => values.reduce((sum, value) => sum + value, 0) / values.length;
function variance(values: number[]): number {
  const center = mean(values);
  return mean(values.map((value) => (value - center) ** 2));
}

/** Of the first `count` requests, how many use each adapter; the base comes last. */
function uses(overrides: Partial<WorkloadShape>, count: number): number[] {
  const { numAdapters } = shape(overrides);
  const counts = new Array<number>(numAdapters + 1).fill(0);
  for (const { adapter } of requests(createWorkload(shape(overrides)), count)) {
    counts[adapter ?? numAdapters]!++;
  }
  return counts;
}

/** Counts of independent draws lie within four standard deviations. */
function expectNear(count: number, expected: number): void {
  expect(Math.abs(count - expected)).toBeLessThan(4 * Math.sqrt(expected));
}

describe('a request', () => {
  test('is the same for the same seed, in whatever order it is asked for', () => {
    const wide = shape({ promptTokens: { kind: 'uniform', low: 1, high: 99 }, numAdapters: 7 });
    const forwards = requests(createWorkload(wide), 50);
    const again = createWorkload(wide);
    const backwards = forwards.map((_, i) => again.request(49 - i, 0)).reverse();
    expect(backwards).toEqual(forwards);
  });

  test('is another one for another seed, another index, and in the warm-up', () => {
    const prompt = (workload: Workload, index: number) => workload.request(index, 0).prompt;
    const first = prompt(createWorkload(shape()), 0);
    expect(prompt(createWorkload(shape({ seed: 2 })), 0)).not.toEqual(first);
    expect(prompt(createWorkload(shape()), 1)).not.toEqual(first);
    expect(prompt(createWorkload(shape(), 'warmup'), 0)).not.toEqual(first);
  });

  test('has as many token ids as asked, none of a special token, all of the vocabulary', () => {
    const prompts = requests(createWorkload(shape({ vocabSize: 15 })), 100).map(
      ({ prompt }) => prompt as number[],
    );
    for (const prompt of prompts) expect(prompt).toHaveLength(4);
    expect(new Set(prompts.flat())).toEqual(new Set([10, 11, 12, 13, 14]));
  });

  test('has words for chat', () => {
    const { prompt } = createWorkload(shape({ endpoint: 'chat' })).request(0, 0);
    expect(prompt).toMatch(/^([a-z]+ ){3}[a-z]+$/i);
  });

  test('begins with one of the shared prefixes and goes on by itself', () => {
    const workload = createWorkload(shape({ sharedPrefixTokens: 6, numPrefixes: 3 }));
    const prompts = requests(workload, 60).map(({ prompt }) => prompt as number[]);
    const beginnings = prompts.map((prompt) => prompt.slice(0, 6).join());
    expect(new Set(beginnings).size).toBe(3);
    expect(new Set(prompts.map((prompt) => prompt.slice(6).join())).size).toBe(60);
    for (const prompt of prompts) expect(prompt).toHaveLength(10);
  });

  test('the warm-up warms the prefixes that are measured', () => {
    const prefixed = shape({ sharedPrefixTokens: 6 });
    const begin = (workload: Workload) => (workload.request(0, 0).prompt as number[]).slice(0, 6);
    expect(begin(createWorkload(prefixed, 'warmup'))).toEqual(begin(createWorkload(prefixed)));
  });
});

describe('a conversation', () => {
  const talk = (overrides: Partial<WorkloadShape['conversations'] & object> = {}) =>
    shape({
      endpoint: 'chat',
      conversations: {
        numTurns: 3,
        thinkTime: { kind: 'fixed', meanSeconds: 2 },
        followUpTokens: { kind: 'fixed', tokens: 5 },
        ...overrides,
      },
    });
  const numWords = (text: string) => text.split(' ').length;

  test('goes on with all that was said, the answers that came among it, and a new message', () => {
    const workload = createWorkload({ ...talk(), sharedPrefixTokens: 6 });
    const first = workload.request(7, 0);
    const second = workload.followUp(first, 'an answer')!.request;
    const third = workload.followUp(second, 'another')!.request;
    const messages = third.prompt as Message[];
    expect(messages.slice(0, 4)).toEqual(second.prompt);
    expect(messages.slice(0, 2)).toEqual(first.prompt);
    expect(messages.map(({ role }) => role)).toEqual([
      'system',
      'user',
      'assistant',
      'user',
      'assistant',
      'user',
    ]);
    expect(messages.filter(({ role }) => role === 'assistant').map(({ content }) => content)).toEqual([
      'an answer',
      'another',
    ]);
    expect(
      messages.filter(({ role }) => role !== 'assistant').map(({ content }) => numWords(content)),
    ).toEqual([6, 4, 5, 5]);
    expect([first, second, third].map(({ index, turn, numTurns }) => [index, turn, numTurns])).toEqual([
      [7, 0, 3],
      [7, 1, 3],
      [7, 2, 3],
    ]);
    expect(workload.followUp(third, 'the last')).toBeNull();
  });

  test('is the same for the same seed, whatever other conversations did, and stays with its adapter', () => {
    const with3 = { ...talk(), numAdapters: 3 };
    const play = (indices: number[]) => {
      const workload = createWorkload(with3);
      return indices.map((index) => workload.followUp(workload.request(index, 0), 'x')!);
    };
    const [a, b] = play([4, 9]);
    expect(play([9, 4])).toEqual([b, a]);
    expect(a!.request.prompt).not.toEqual(b!.request.prompt);
    expect(a!.request.adapter).toBe(createWorkload(with3).request(4, 0).adapter);
  });

  test('has no turn that says what another turn, conversation or seed says', () => {
    const long = { ...talk({ followUpTokens: { kind: 'fixed', tokens: 40 } }) };
    const said = [1, 2].flatMap((seed) => {
      const workload = createWorkload({ ...long, seed });
      return [0, 1, 2].flatMap((index) => {
        const second = workload.followUp(workload.request(index, 0), '')!.request;
        const third = workload.followUp(second, '')!.request;
        return [second, third].map(({ prompt }) => (prompt as Message[]).at(-1)!.content);
      });
    });
    expect(new Set(said).size).toBe(12);
  });

  test('think times are always the same, or exponential around their mean', () => {
    const thinkMs = (kind: 'fixed' | 'exponential') => {
      const workload = createWorkload(talk({ thinkTime: { kind, meanSeconds: 2 } }));
      return Array.from({ length: 2000 }, (_, i) => workload.followUp(workload.request(i, 0), '')!.thinkMs);
    };
    expect(new Set(thinkMs('fixed'))).toEqual(new Set([2000]));
    const random = thinkMs('exponential');
    // The deviation of an exponential is its mean, so that of a mean of 2,000 is 2000 / √2000.
    expect(Math.abs(mean(random) - 2000)).toBeLessThan(4 * 45);
    expect(Math.abs(Math.sqrt(variance(random)) - 2000)).toBeLessThan(300);
  });

  test('a single request has no next turn', () => {
    const workload = createWorkload(shape());
    expect(workload.followUp(workload.request(0, 0), 'x')).toBeNull();
  });
});

describe('which adapter', () => {
  test('none when there are none', () => {
    expect(uses({ numAdapters: 0 }, 10)).toEqual([10]);
  });

  test('uniform: each as often as the others', () => {
    for (const count of uses({ numAdapters: 5 }, 20_000).slice(0, 5)) expectNear(count, 4000);
  });

  test.each([0.8, 1, 1.5])('zipf of exponent %f: the k-th in proportion to 1 / k^S', (exponent) => {
    const counts = uses({ numAdapters: 20, popularity: { kind: 'zipf', exponent } }, 20_000);
    const weights = Array.from({ length: 20 }, (_, k) => (k + 1) ** -exponent);
    const sum = weights.reduce((total, weight) => total + weight, 0);
    for (const [k, weight] of weights.entries()) expectNear(counts[k]!, (20_000 * weight) / sum);
  });

  test('zipf of 2,000 adapters reaches the last ones, and half of the requests use the first 45', () => {
    const counts = uses({ numAdapters: 2000, popularity: { kind: 'zipf', exponent: 1 } }, 50_000);
    expect(counts.slice(1900, 2000).some((count) => count > 0)).toBe(true);
    const top = counts.slice(0, 45).reduce((sum, count) => sum + count, 0);
    // H(45) / H(2000) = 4.395 / 8.178
    expectNear(top, 50_000 * 0.5374);
  });

  test('the base has its share, beside adapters that share the rest', () => {
    const counts = uses({ numAdapters: 2, baseShare: 0.25 }, 20_000);
    expectNear(counts[2]!, 5000);
    expectNear(counts[0]!, 7500);
  });

  test('each client its own, round and round', () => {
    const workload = createWorkload(shape({ numAdapters: 3, popularity: { kind: 'each-client-its-own' } }));
    expect([0, 1, 2, 3, 4].map((client) => workload.request(17, client).adapter)).toEqual([0, 1, 2, 0, 1]);
  });

  test('does not change what is asked', () => {
    const prompts = (popularity: WorkloadShape['popularity']) =>
      requests(createWorkload(shape({ numAdapters: 3, popularity })), 20).map(({ prompt }) => prompt);
    expect(prompts({ kind: 'zipf', exponent: 1 })).toEqual(prompts({ kind: 'uniform' }));
  });
});

describe('lengths', () => {
  const draw = (lengths: Lengths) => {
    const random = seededRandom(3);
    return Array.from({ length: 20_000 }, () => lengthOf(lengths, random));
  };

  test('fixed', () => {
    expect(new Set(draw({ kind: 'fixed', tokens: 9 }))).toEqual(new Set([9]));
  });

  test('uniform: both ends belong to it', () => {
    const drawn = draw({ kind: 'uniform', low: 3, high: 6 });
    for (const tokens of [3, 4, 5, 6]) expectNear(drawn.filter((one) => one === tokens).length, 5000);
  });

  test('normal: whole, with that mean and deviation', () => {
    const drawn = draw({ kind: 'normal', mean: 200, deviation: 30 });
    expect(drawn.every(Number.isInteger)).toBe(true);
    expect(mean(drawn)).toBeCloseTo(200, 0);
    expect(Math.abs(Math.sqrt(variance(drawn)) - 30)).toBeLessThan(0.6);
  });

  test('normal: at least one token, at most four deviations above the mean', () => {
    const drawn = draw({ kind: 'normal', mean: 5, deviation: 10 });
    expect(Math.min(...drawn)).toBe(1);
    expect(Math.max(...drawn)).toBeLessThanOrEqual(45);
  });
});

describe('arrivals', () => {
  const gaps = (burstiness: number, seed = 1) => {
    const times = arrivalsMs(seed, 20, burstiness).take(20_000).toArray();
    return times.map((time, i) => time - (times[i - 1] ?? 0));
  };

  // Gaps have mean 1 / rate and variance mean² / shape. Their sample variance of 20,000 spreads most for heavy tails.
  test.each([
    { burstiness: 0.3, tolerance: 0.1 },
    { burstiness: 1, tolerance: 0.05 },
    { burstiness: 4, tolerance: 0.05 },
    { burstiness: 100, tolerance: 0.05 },
  ])('of burstiness $burstiness come at the rate, spread by it', ({ burstiness, tolerance }) => {
    const drawn = gaps(burstiness);
    expect(Math.min(...drawn)).toBeGreaterThanOrEqual(0);
    expect(Math.abs(mean(drawn) / 50 - 1)).toBeLessThan(tolerance);
    expect(Math.abs(variance(drawn) / (50 ** 2 / burstiness) - 1)).toBeLessThan(tolerance);
  });

  test('of burstiness 1 are a Poisson process: as many in a second on average as they vary', () => {
    const counts = new Array<number>(900).fill(0);
    for (const time of arrivalsMs(7, 20, 1).take(20_000)) {
      const second = Math.floor(time / 1000);
      if (second < counts.length) counts[second]!++;
    }
    expect(Math.abs(mean(counts) - 20)).toBeLessThan(0.6);
    expect(Math.abs(variance(counts) / mean(counts) - 1)).toBeLessThan(0.2);
  });

  test('are the same for the same seed', () => {
    expect(gaps(1).slice(0, 9)).toEqual(gaps(1).slice(0, 9));
    expect(gaps(1, 2).slice(0, 9)).not.toEqual(gaps(1).slice(0, 9));
  });
});
