/** The native runtime's contract as native/index.ts states it: compositions, refusals, life and end. */
import { copyFile, mkdtemp, open as openFile, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setFlagsFromString } from 'node:v8';
import { runInNewContext } from 'node:vm';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { readAdapterFile } from '../../engine/adapters/adapter-file.ts';
import type { PreparedModel } from '../../engine/model/prepare.ts';
import {
  compileGrammar,
  cpuInfo,
  openRuntime,
  openVocabulary,
  packedBytes,
  type Runtime,
  readGguf,
  readIn,
  type StepBatch,
  sourceBytes,
} from '../../native/index.ts';
import { goldensFolder } from '../fixtures/golden.ts';
import { loadAdapter, open, prepare } from '../fixtures/models.ts';
import { pagesFor, sequenceLogits, stepBatch } from '../fixtures/steps.ts';

const deviceMemoryBytes = 64 << 20;
const tokens = Array.from({ length: 40 }, (_, i) => (i * 37 + 5) % 512);

function maxDifference(a: Float32Array, b: Float32Array): number {
  expect(a.length).toBe(b.length);
  let most = 0;
  for (let i = 0; i < a.length; i++) most = Math.max(most, Math.abs(a[i]! - b[i]!));
  return most;
}

/** qwen3's adapter is DoRA, whose gain multiplies the base's projection; mistral's has biases and changes lm_head. */
describe.each(['qwen3', 'mistral'])('compositions of adapters on %s', (name) => {
  let model: PreparedModel;
  let runtime: Runtime;
  let a: number;
  let b: number;
  beforeAll(async () => {
    const folder = join(goldensFolder, 'tiny', name);
    model = await prepare(folder);
    runtime = await open(model, { activations: 'f32', deviceMemoryBytes });
    // The same file twice: two handles, so that two different adapters meet in one row.
    const first = await loadAdapter(runtime, model, join(folder, 'adapter'), 100);
    const second = await loadAdapter(runtime, model, join(folder, 'adapter'), first.nextPage);
    a = first.handle;
    b = second.handle;
  });
  afterAll(() => runtime.close());
  const logits = (adapters: [number, number][]) => sequenceLogits(runtime, tokens, { adapters });

  // The tolerance is f32 rounding: the same sums in another order.
  const rounding = 1e-4;

  test('weights add up: a half and a half make a whole', async () => {
    const halves = await logits([
      [a, 0.5],
      [b, 0.5],
    ]);
    expect(maxDifference(halves, await logits([[a, 1]]))).toBeLessThan(rounding);
  });

  test('an adapter and its opposite leave the base', async () => {
    expect(
      maxDifference(
        await logits([
          [a, 1],
          [b, -1],
        ]),
        await logits([]),
      ),
    ).toBeLessThan(rounding);
  });

  test('weight 0 is the base, and weight 1 is not', async () => {
    expect(maxDifference(await logits([[a, 0]]), await logits([]))).toBe(0);
    expect(maxDifference(await logits([[a, 1]]), await logits([]))).toBeGreaterThan(0.01);
  });

  test('a batch of base, one adapter and compositions gives to the bit what each gives alone', async () => {
    const voices: [number, number][][] = [
      [],
      [[a, 1]],
      [
        [a, 0.3],
        [b, 0.9],
      ],
      [
        [b, -0.5],
        [a, 1.5],
      ],
      [[b, 1]],
    ];
    const alone = [];
    for (const adapters of voices) alone.push(await logits(adapters));
    const parts = voices.map((adapters, i) => ({
      tokens,
      start: 0,
      count: tokens.length,
      blocks: pagesFor(runtime, tokens.length, i * 4),
      adapters,
      sample: 'all' as const,
    }));
    const together = await runtime.step(stepBatch(parts, { wantLogits: true }));
    const each = together.logits!.length / voices.length;
    for (const [i, expected] of alone.entries()) {
      expect(maxDifference(together.logits!.subarray(i * each, (i + 1) * each), expected)).toBe(0);
    }
  });
});

describe('a runtime', () => {
  const folder = join(goldensFolder, 'tiny/llama3');
  let model: PreparedModel;
  let runtime: Runtime;
  beforeAll(async () => {
    model = await prepare(folder);
    runtime = await open(model, { deviceMemoryBytes });
  });
  afterAll(() => runtime.close());
  const good = () => stepBatch([{ tokens, start: 0, count: 20, blocks: [0, 1] }]);

  test('says what it has', () => {
    expect(runtime.blockTokens).toBe(16);
    expect(runtime.numPages).toBe(Math.floor(deviceMemoryBytes / runtime.pageBytes));
    expect(runtime.weightBytes).toBeGreaterThan(10_000);
    expect(cpuInfo().isas).toContain(cpuInfo().isa);
  });

  const ints = (...values: number[]) => Int32Array.from(values);
  test.each<[string, Partial<StepBatch>, RegExp]>([
    ['token ids beyond the vocabulary', { tokenIds: new Int32Array(20).fill(512) }, /tokenIds.*511.*512/],
    [
      'samples that the step before does not have',
      { tokenIds: new Int32Array(20).fill(-2) },
      /tokenIds.*got -2/,
    ],
    [
      'positions that jump',
      { positions: Int32Array.from({ length: 20 }, (_, i) => 2 * i) },
      /positions.*consecutive/,
    ],
    [
      'positions beyond the context',
      { positions: Int32Array.from({ length: 20 }, (_, i) => 1e6 + i) },
      /positions/,
    ],
    ['positions of another length', { positions: ints(0) }, /positions/],
    ['pages that do not exist', { blockIds: ints(0, 1e6) }, /blockIds/],
    ['too few pages', { blockIds: ints(0), blockStarts: ints(0, 1) }, /blockIds.*position 19/],
    ['sequence starts that do not end at the rows', { sequenceStarts: ints(0, 19) }, /sequenceStarts/],
    ['block starts that go down', { blockStarts: ints(0, 3), blockIds: ints(0, 1) }, /blockStarts/],
    ['adapter weights without handles', { adapterWeights: Float32Array.of(1) }, /adapterWeights/],
    [
      'handles that were never given',
      { adapterHandles: ints(77), adapterWeights: Float32Array.of(1), adapterStarts: ints(0, 1) },
      /adapterHandles.*77/,
    ],
    ['sample rows that do not exist', { sampleRows: ints(20) }, /sampleRows/],
    ['hidden rows that do not exist', { hiddenRows: ints(20) }, /hiddenRows/],
    ['hidden rows that do not ascend', { hiddenRows: ints(1, 1) }, /hiddenRows/],
    ['two temperatures for one sample', { temperature: new Float32Array(2) }, /sampling parameters/],
    ['more alternatives than tokens', { numTop: ints(513) }, /numTop/],
    ['a history with an unknown token', { historyIds: ints(9999), historyStarts: ints(0, 1) }, /historyIds/],
    [
      'a history with an unknown sample',
      { historyIds: ints(-(2 ** 31)), historyStarts: ints(0, 1) },
      /historyIds.*got -2147483648/,
    ],
  ])('refuses %s by name, and works on', async (_what, change, names) => {
    const run = async () => runtime.step({ ...good(), ...change });
    // A step before it that has one sample.
    await runtime.step(good());
    await expect(run()).rejects.toThrow(names);
    expect((await runtime.step(good())).tokens).toHaveLength(1);
  });

  test('refuses arrays of another type by name', async () => {
    const batch = { ...good(), tokenIds: [1, 2, 3] as unknown as Int32Array };
    expect(() => runtime.step(batch)).toThrow(/batch\.tokenIds: expected an Int32Array/);
  });

  test('takes a second step while one runs, and refuses a third', async () => {
    const steps = [runtime.step(good()), runtime.step(good())];
    expect(() => runtime.step(good())).toThrow(/third/);
    const [first, second] = await Promise.all(steps);
    expect(second!.tokens).toEqual(first!.tokens);
    expect(second!.beganMs).toBeGreaterThanOrEqual(first!.endedMs);
    const nowMs = Number(process.hrtime.bigint()) / 1e6;
    expect(nowMs - second!.endedMs).toBeLessThan(60_000);
    expect(nowMs).toBeGreaterThanOrEqual(second!.endedMs);
  });

  test('is refused to close while a step waits', async () => {
    const other = await open(model, { deviceMemoryBytes });
    const steps = [other.step(good()), other.step(good())];
    expect(() => other.close()).toThrow(/no step/);
    await steps[0];
    expect(() => other.close()).toThrow(/no step/);
    await steps[1];
    other.close();
  });

  test('writes the arrays of a result again for the second step after it, and not for the next', async () => {
    const first = await runtime.step(good());
    const drawn = Int32Array.from(first.tokens);
    const other = stepBatch([{ tokens, start: 0, count: 7, blocks: [0] }]);
    const second = await runtime.step(other);
    expect(first.tokens).toEqual(drawn);
    const third = await runtime.step(other);
    expect(third.tokens).toBe(first.tokens);
    expect(third.tokens).toEqual(second.tokens);
  });

  test('makes a new array when the last one was transferred away', async () => {
    const first = await runtime.step(good());
    const drawn = Int32Array.from(first.tokens);
    const buffer = first.tokens.buffer as ArrayBuffer;
    structuredClone(buffer, { transfer: [buffer] });
    await runtime.step(good());
    expect((await runtime.step(good())).tokens).toEqual(drawn);
  });

  test('gives the likeliest tokens first, and the drawn one with its logprob', async () => {
    const batch = { ...good(), numTop: ints(5) };
    const { tokens: drawn, logprobs, topIds, topLogprobs } = await runtime.step(batch);
    expect(topIds).toHaveLength(5);
    expect(drawn[0]).toBe(topIds[0]);
    expect(logprobs[0]).toBeCloseTo(topLogprobs[0]!, 5);
    expect([...topLogprobs]).toEqual([...topLogprobs].sort((x, y) => y - x));
  });

  describe('matchers', () => {
    /** Token i is the character i, the last one ends an output, and nothing is behind the first 128. */
    const vocabulary = (vocabSize = 512) => {
      const ends = Int32Array.from({ length: vocabSize }, (_, i) => Math.min(i + 1, 128));
      return openVocabulary(
        Uint8Array.from({ length: 128 }, (_, i) => i),
        ends,
        ints(vocabSize - 1),
      );
    };

    /** What it draws after the batch of `good()`, until it draws the end. */
    async function drawn(matcher: number, fields: Partial<StepBatch> = {}): Promise<string> {
      let text = '';
      for (let i = 0; i < 40; i++) {
        const result = await runtime.step({ ...good(), matchers: ints(matcher), ...fields });
        expect(result.matcherErrors).toEqual([]);
        if (result.tokens[0] === 511) return text;
        text += String.fromCharCode(result.tokens[0]!);
      }
      throw new Error(`no end after ${text}`);
    }

    test('are followed, each from the beginning, greedy and not', async () => {
      const grammar = await compileGrammar(await vocabulary(), 'regex', '[ab]{3}-(one|two)');
      const temperatures = [0, 1, 2].map((t) => ({
        temperature: Float32Array.of(t),
        seeds: BigUint64Array.of(7n),
      }));
      for (const fields of temperatures) {
        const matcher = runtime.openMatcher(grammar);
        expect(await drawn(matcher, fields)).toMatch(/^[ab]{3}-(one|two)$/);
        runtime.closeMatcher(matcher);
      }
    });

    test('are followed when a step is given before the one before has ended', async () => {
      const matcher = runtime.openMatcher(await compileGrammar(await vocabulary(), 'regex', '[a-c]x[d-f]y'));
      const batch = { ...good(), matchers: ints(matcher) };
      let text = '';
      let last = runtime.step(batch);
      for (let i = 1; i < 4; i++) {
        const next = runtime.step(batch);
        text += String.fromCharCode((await last).tokens[0]!);
        last = next;
      }
      expect(text + String.fromCharCode((await last).tokens[0]!)).toMatch(/^[a-c]x[d-f]y$/);
      runtime.closeMatcher(matcher);
    });

    test('leave logprobs as the model has them', async () => {
      const plain = await runtime.step({ ...good(), numTop: ints(3) });
      const [topIds, topLogprobs] = [[...plain.topIds], [...plain.topLogprobs]];
      const matcher = runtime.openMatcher(await compileGrammar(await vocabulary(), 'regex', '[0-9]'));
      const held = await runtime.step({ ...good(), numTop: ints(3), matchers: ints(matcher) });
      expect([...held.topIds]).toEqual(topIds);
      expect([...held.topLogprobs]).toEqual(topLogprobs);
      expect(held.logprobs[0]).toBeLessThanOrEqual(topLogprobs[0]!);
      runtime.closeMatcher(matcher);
    });

    test('that can no longer say what is allowed are named with the reason', async () => {
      // More ways to go on than a matcher may follow at once.
      const ways = Array.from({ length: 2500 }, (_, i) => `x${i}`);
      const text = `start: A (${ways.join(' | ')})\nA: "aa"\n${ways.map((way) => `${way}: "b" "c"`).join('\n')}`;
      const matcher = runtime.openMatcher(await compileGrammar(await vocabulary(), 'lark', text));
      const batch = { ...good(), matchers: ints(matcher) };
      const drawn: string[] = [];
      for (let i = 0; i < 3; i++) {
        const { tokens: ids, matcherErrors } = await runtime.step(batch);
        drawn.push(matcherErrors[0]?.message ?? String.fromCharCode(ids[0]!));
      }
      expect(drawn).toEqual(['a', expect.stringContaining('2501 items'), drawn[1]]);
      runtime.closeMatcher(matcher);
    });

    test('are refused when closed, twice in a step, or for another vocabulary', async () => {
      const grammar = await compileGrammar(await vocabulary(), 'regex', 'a');
      const matcher = runtime.openMatcher(grammar);
      const two = stepBatch([
        { tokens, start: 0, count: 3, blocks: [0] },
        { tokens, start: 0, count: 3, blocks: [1] },
      ]);
      const refusal = /matchers: expected distinct open matchers/;
      await expect(
        (async () => runtime.step({ ...two, matchers: ints(matcher, matcher) }))(),
      ).rejects.toThrow(refusal);
      await expect((async () => runtime.step({ ...good(), matchers: ints() }))()).rejects.toThrow(
        /one per sample/,
      );
      runtime.closeMatcher(matcher);
      await expect((async () => runtime.step({ ...good(), matchers: ints(matcher) }))()).rejects.toThrow(
        refusal,
      );
      expect(() => runtime.closeMatcher(matcher)).toThrow(/handle: expected an open matcher's/);
      const other = await compileGrammar(await vocabulary(300), 'regex', 'a');
      expect(() => runtime.openMatcher(other)).toThrow(/vocabulary of 512 tokens, got 300/);
      const notOne = (await vocabulary()) as never;
      expect(() => runtime.openMatcher(notOne)).toThrow(/grammar: expected one/);
    });

    test.each([
      ['json_schema', '{"not": {}}', /Unimplemented keys: \["not"\]/],
      ['json_schema', '{"type": "object"', /EOF/],
      ['regex', '(', /unclosed|Invalid|parse/i],
      ['lark', 'start: missing', /missing/],
    ] as const)('%s %s is refused', async (kind, text, message) => {
      const compiled = compileGrammar(await vocabulary(), kind, text);
      await expect(compiled).rejects.toMatchObject({
        code: 'grammar_invalid',
        message: expect.stringMatching(message),
      });
    });

    test('a vocabulary without an end token is refused', async () => {
      const opened = openVocabulary(Uint8Array.of(1), ints(1), ints());
      await expect(opened).rejects.toThrow('the model has no token that ends an output');
    });
  });

  test('keeps an adapter until it is released, and refuses the handle after that', async () => {
    const file = await readAdapterFile(join(folder, 'adapter'), model.dims, { maxRank: 64 });
    const numPages = runtime.adapterPages(file.modules);
    expect(runtime.adapterBytes(file.modules)).toBeGreaterThan((numPages - 1) * 0.9 * runtime.pageBytes);
    expect(runtime.adapterBytes(file.modules)).toBeLessThanOrEqual(numPages * runtime.pageBytes);
    const handle = await runtime.loadAdapter(
      file.path,
      file.modules,
      Int32Array.from({ length: numPages }, (_, i) => 50 + i),
    );
    const batch = stepBatch([{ tokens, start: 0, count: 20, blocks: [0, 1], adapters: [[handle, 1]] }]);
    const running = runtime.step(batch);
    const waiting = runtime.step(batch);
    expect(() => runtime.releaseAdapter(handle)).toThrow(/running step/);
    await running;
    expect(() => runtime.releaseAdapter(handle)).toThrow(/waits/);
    await waiting;
    runtime.releaseAdapter(handle);
    expect(() => runtime.releaseAdapter(handle)).toThrow(/handle/);
    expect(() => runtime.step(batch)).toThrow(/adapterHandles/);
  });

  test('refuses too few pages, the same page twice, and a file that ends early', async () => {
    const file = await readAdapterFile(join(folder, 'adapter'), model.dims, { maxRank: 64 });
    const load = (path: string, pages: Int32Array) => runtime.loadAdapter(path, file.modules, pages);
    await expect(load(file.path, ints())).rejects.toMatchObject({
      code: 'adapter_invalid',
      message: expect.stringMatching(/pages/),
    });
    await expect(load(file.path, ints(60, 60))).rejects.toThrow(/distinct/);
    await expect(load(file.path, ints(1e6))).rejects.toThrow(/distinct ids below/);
    const scratch = await mkdtemp(join(tmpdir(), 'motet-native-'));
    const short = join(scratch, 'short.safetensors');
    await copyFile(file.path, short);
    const handle = await openFile(short, 'r+');
    await handle.truncate(2000);
    await handle.close();
    await expect(load(short, ints(60, 61))).rejects.toThrow(/more bytes at offset/);
    await rm(scratch, { recursive: true });
  });

  test('fails with code `closed` after close', async () => {
    const other = await open(model, { deviceMemoryBytes });
    other.close();
    other.close();
    expect(() => other.step(good())).toThrow(expect.objectContaining({ code: 'closed' }));
  });
});

describe('the host arena', () => {
  const folder = join(goldensFolder, 'tiny/llama3');
  let model: PreparedModel;
  let runtime: Runtime;
  beforeAll(async () => {
    model = await prepare(folder);
    runtime = await open(model, { deviceMemoryBytes, hostMemoryBytes: 8 << 20 });
  });
  afterAll(() => runtime.close());
  const ids = (count: number, first: number) => Int32Array.from({ length: count }, (_, i) => first + i);
  const random = (numPages: number, seed: number) =>
    Uint8Array.from({ length: numPages * runtime.pageBytes }, (_, i) => (i * seed) >> 3);

  test('has pages of the size of the device arena', () => {
    expect(runtime.numHostPages).toBe(Math.floor((8 << 20) / runtime.pageBytes));
  });

  test('keeps what is written, and copies it to the device and back while steps run', async () => {
    const bytes = random(3, 77);
    runtime.writeHostPages(ids(3, 2), bytes);
    const steps = [0, 1].map(() =>
      runtime.step(stepBatch([{ tokens, start: 0, count: 20, blocks: [100, 101] }])),
    );
    const { seconds } = await runtime.copyPages('toDevice', ids(3, 2), ids(3, 40));
    expect(seconds).toBeGreaterThan(0);
    runtime.clearPages('host', ids(3, 2));
    expect(runtime.readHostPages(ids(3, 2)).every((byte) => byte === 0)).toBe(true);
    await runtime.copyPages('toHost', Int32Array.of(42, 40, 41), Int32Array.of(9, 7, 8));
    expect(Buffer.compare(runtime.readHostPages(ids(3, 7)), bytes)).toBe(0);
    await Promise.all(steps);
  });

  test('copies in the order in which it was asked, and takes a bounded number of copies', async () => {
    const numPages = 16;
    const page = ids(1, 0);
    const bytes = Array.from({ length: numPages }, (_, i) => random(1, i + 1));
    for (const [i, each] of bytes.entries()) runtime.writeHostPages(Int32Array.of(i), each);
    // Each writes over the device page that the one before wrote; the last one stays.
    const copies = bytes.map((_, i) => runtime.copyPages('toDevice', Int32Array.of(i), page));
    const back = runtime.copyPages('toHost', page, Int32Array.of(20));
    for (let i = numPages + 1; i < 256; i++)
      copies.push(runtime.copyPages('toHost', page, Int32Array.of(21)));
    expect(() => runtime.copyPages('toHost', page, Int32Array.of(21))).toThrow(/at most 256 copies/);
    await back;
    expect(Buffer.compare(runtime.readHostPages(Int32Array.of(20)), bytes[numPages - 1]!)).toBe(0);
    await Promise.all(copies);
    await runtime.copyPages('toHost', page, Int32Array.of(21));
  });

  test('brings an adapter back to other pages, and its logits are the same to the bit', async () => {
    const file = await readAdapterFile(join(folder, 'adapter'), model.dims, { maxRank: 64 });
    const numPages = runtime.adapterPages(file.modules);
    const first = await runtime.loadAdapter(file.path, file.modules, ids(numPages, 50));
    const expected = await sequenceLogits(runtime, tokens, { adapters: [[first, 1]] });
    await runtime.copyPages('toHost', ids(numPages, 50), ids(numPages, 1));
    runtime.releaseAdapter(first);
    runtime.clearPages('device', ids(numPages, 50));
    await runtime.copyPages('toDevice', ids(numPages, 1), ids(numPages, 70));
    const second = runtime.attachAdapter(file.modules, ids(numPages, 70));
    expect(second).not.toBe(first);
    const logits = await sequenceLogits(runtime, tokens, { adapters: [[second, 1]] });
    expect(maxDifference(logits, expected)).toBe(0);
    runtime.releaseAdapter(second);
    expect(() => runtime.attachAdapter(file.modules, ids(0, 0))).toThrow(
      expect.objectContaining({ code: 'adapter_invalid', message: expect.stringMatching(/pages/) }),
    );
  });

  test.each<[string, () => unknown, RegExp]>([
    ['a direction', () => runtime.copyPages('up' as 'toHost', ids(1, 0), ids(1, 0)), /direction.*'up'/],
    ['pages of an array', () => runtime.copyPages('toHost', [1] as never, ids(1, 0)), /from.*Int32Array/],
    ['a page beyond the host arena', () => runtime.copyPages('toHost', ids(1, 0), ids(1, 999)), /to.*999/],
    ['a page twice', () => runtime.copyPages('toDevice', ids(2, 0), Int32Array.of(1, 1)), /to.*1 twice/],
    ['other numbers of pages', () => runtime.copyPages('toHost', ids(2, 0), ids(1, 0)), /to: expected 2/],
    ['a tier', () => runtime.clearPages('disk' as 'host', ids(1, 0)), /tier.*'disk'/],
    ['pages to clear that are not there', () => runtime.clearPages('host', ids(1, -1)), /pages.*-1/],
    ['pages to read that are not there', () => runtime.readHostPages(ids(1, 999)), /pages.*999/],
    ['too few bytes', () => runtime.writeHostPages(ids(1, 0), new Uint8Array(7)), /bytes.*got 7/],
    [
      'bytes of another type',
      () => runtime.writeHostPages(ids(0, 0), [] as never),
      /bytes: expected a Uint8/,
    ],
  ])('refuses %s by name', (_what, call, names) => {
    expect(call).toThrow(names);
  });

  test('is not there when it was given no memory, nor after close', async () => {
    const other = await open(model, { deviceMemoryBytes });
    expect(other.numHostPages).toBe(0);
    expect(() => other.readHostPages(ids(1, 0))).toThrow(/ids below 0/);
    other.close();
    expect(() => other.copyPages('toHost', ids(0, 0), ids(0, 0))).toThrow(
      expect.objectContaining({ code: 'closed' }),
    );
  });

  test('is not closed while a copy is under way', async () => {
    const other = await open(model, { deviceMemoryBytes, hostMemoryBytes: 8 << 20 });
    const copy = other.copyPages('toHost', ids(8, 0), ids(8, 0));
    expect(() => other.close()).toThrow(/no copy/);
    await copy;
    other.close();
  });
});

/** gemma3 has layers with a sliding window and layers without. */
describe.each(['llama3', 'gemma3'])('blocks in the host arena, on %s', (name) => {
  const long = Array.from({ length: 400 }, (_, i) => (i * 31 + 7) % 512);
  const numBlocks = 25;
  const blocks = Array.from({ length: numBlocks }, (_, i) => i);
  let model: PreparedModel;
  let runtime: Runtime;
  let expected: Float32Array;
  const run = async (start: number, count: number, table: number[], stagingPages: number[]) => {
    const result = await runtime.step(
      stepBatch([{ tokens: long, start, count, blocks: table, sample: 'all' }], {
        wantLogits: true,
        stagingPages,
      }),
    );
    return { logits: Float32Array.from(result.logits!), stagedBytes: result.stagedBytes };
  };
  beforeAll(async () => {
    model = await prepare(join(goldensFolder, 'tiny', name));
    runtime = await open(model, { deviceMemoryBytes, hostMemoryBytes: 16 << 20 });
    const { logits, stagedBytes } = await run(0, 400, blocks, []);
    expect(stagedBytes).toBe(0);
    expected = logits;
  });
  afterAll(() => runtime.close());

  test('give the same bits as on the device, for a chunk of a prompt and for a decode row', async () => {
    const staging = Array.from({ length: runtime.minStagingPages }, (_, i) => 60 + i);
    const width = expected.length / 400;
    const onHost = [0, 1, 2, 5, 9, 16, 17];
    const hostPages = onHost.map((_, i) => 3 * i + 1);
    await runtime.copyPages('toHost', Int32Array.from(onHost), Int32Array.from(hostPages));
    runtime.clearPages('device', Int32Array.from(onHost));
    const table = [...blocks];
    for (const [i, block] of onHost.entries()) table[block] = runtime.numPages + hostPages[i]!;
    for (const [start, count] of [
      [300, 100],
      [399, 1],
    ] as const) {
      const { logits, stagedBytes } = await run(start, count, table, staging);
      expect(maxDifference(logits, expected.subarray(start * width, (start + count) * width))).toBe(0);
      expect(stagedBytes).toBeGreaterThan(0);
    }
    await runtime.copyPages('toDevice', Int32Array.from(hostPages), Int32Array.from(onHost));
  });

  test('are refused by name where the step writes, where there is no staging area, and where there is no page', async () => {
    const { numPages, numHostPages } = runtime;
    await expect(run(300, 100, [...blocks.slice(0, 24), numPages], [60])).rejects.toThrow(
      /blockIds: expected a page of the device for block 24 of sequence 0/,
    );
    await expect(run(300, 100, [numPages, ...blocks.slice(1)], [])).rejects.toThrow(
      new RegExp(`stagingPages: expected at least ${runtime.minStagingPages}`),
    );
    await expect(run(300, 100, [numPages + numHostPages, ...blocks.slice(1)], [60])).rejects.toThrow(
      new RegExp(`blockIds: expected 0 to ${numPages + numHostPages - 1}`),
    );
    const batch = stepBatch([{ tokens: long, start: 0, count: 16, blocks: [0] }]);
    expect(() => runtime.step({ ...batch, stagingPages: [60] as never })).toThrow(/batch\.stagingPages/);
  });
});

test('the parts of a step take the time that the step takes', async () => {
  const runtime = await open(await prepare(join(goldensFolder, 'tiny/llama3')), { deviceMemoryBytes });
  expect(Object.values(runtime.stepParts()).every((ms) => ms === 0)).toBe(true);
  const batch = stepBatch([{ tokens: tokens.slice(0, 30), start: 0, count: 30, blocks: [0, 1] }]);
  const { beganMs, endedMs } = await runtime.step(batch);
  const parts = runtime.stepParts();
  for (const part of ['qkv', 'attention', 'out', 'gate_up', 'down', 'head', 'sample'] as const)
    expect(parts[part], part).toBeGreaterThan(0);
  const sum = Object.values(parts).reduce((a, b) => a + b, 0);
  expect(sum).toBeLessThanOrEqual(endedMs - beganMs);
  runtime.close();
  expect(() => runtime.stepParts()).toThrow(expect.objectContaining({ code: 'closed' }));
});

describe('a step that is given while the one before runs', () => {
  const folder = join(goldensFolder, 'tiny/llama3');
  let model: PreparedModel;
  let runtime: Runtime;
  beforeAll(async () => {
    model = await prepare(folder);
    runtime = await open(model, { deviceMemoryBytes });
  });
  afterAll(() => runtime.close());
  const voices = [tokens.slice(0, 20), tokens.slice(5, 38), tokens.slice(0, 1)];
  const blocksOf = (i: number) => [3 * i, 3 * i + 1, 3 * i + 2];
  /** The prompts of `voices`, each of which draws a token. */
  const prompts = () =>
    stepBatch(
      voices.map((voice, i) => ({ tokens: voice, start: 0, count: voice.length, blocks: blocksOf(i) })),
    );
  /** The next row of each voice: `next` follows its prompt. Penalties see all of it. */
  const decode = (next: ArrayLike<number>): StepBatch => {
    const whole = voices.map((voice, i) => [...voice, next[i]!]);
    const batch = stepBatch(
      whole.map((voice, i) => ({ tokens: voice, start: voice.length - 1, count: 1, blocks: blocksOf(i) })),
    );
    return {
      ...batch,
      repetitionPenalty: new Float32Array(3).fill(1.5),
      historyIds: Int32Array.from(whole.flat()),
      historyStarts: Int32Array.from([0, 1, 2, 3], (n) => whole.slice(0, n).flat().length),
      historyPromptCounts: Int32Array.from(voices, ({ length }) => length),
    };
  };
  const references = [-1, -2, -3];

  test('finds what that one drew in place of references, in rows and in histories', async () => {
    const drawn = Int32Array.from((await runtime.step(prompts())).tokens);
    const { tokens: expected, logprobs } = await runtime.step(decode(drawn));
    const [alone, aloneLogprobs] = [Int32Array.from(expected), Float32Array.from(logprobs)];
    const [, ahead] = await Promise.all([runtime.step(prompts()), runtime.step(decode(references))]);
    expect(ahead.tokens).toEqual(alone);
    expect(ahead.logprobs).toEqual(aloneLogprobs);
    // And when that one is over already.
    await runtime.step(prompts());
    expect((await runtime.step(decode(references))).tokens).toEqual(alone);
  });

  test('has token 0 in their place when that one fails, and its other rows are what they are alone', async () => {
    await runtime.step(prompts());
    const expected = Int32Array.from((await runtime.step(decode([0, 0, 0]))).tokens);
    await runtime.step(prompts());
    const failing = runtime.step({ ...prompts(), positions: Int32Array.of(0) });
    const behind = runtime.step(decode(references));
    await expect(failing).rejects.toThrow(/positions/);
    expect((await behind).tokens).toEqual(expected);
  });
});

describe('a running step', () => {
  const folder = join(goldensFolder, 'tiny/llama3');
  const long = Array.from({ length: 500 }, (_, i) => (i * 31 + 7) % 512);
  let model: PreparedModel;
  beforeAll(async () => {
    model = await prepare(folder);
  });
  const openedWith = (numThreads: number) => open(model, { deviceMemoryBytes, numThreads });
  const batchOf = (runtime: Runtime) =>
    stepBatch(
      [{ tokens: long, start: 0, count: long.length, blocks: pagesFor(runtime, long.length), sample: 'all' }],
      {
        wantLogits: true,
      },
    );

  test('gives the same bits on any number of threads', async () => {
    const runtime = await openedWith(1);
    const expected = (await runtime.step(batchOf(runtime))).logits!;
    runtime.close();
    for (const numThreads of [2, 3, 9]) {
      const other = await openedWith(numThreads);
      expect(other.numThreads).toBe(numThreads);
      expect(maxDifference((await other.step(batchOf(other))).logits!, expected)).toBe(0);
      other.close();
    }
  });

  test('does not see what becomes of the arrays it was given', async () => {
    const runtime = await openedWith(1);
    const expected = (await runtime.step(batchOf(runtime))).logits!;
    const batch = batchOf(runtime);
    const resizable = new ArrayBuffer(4 * long.length, { maxByteLength: 4 * long.length });
    const tokenIds = new Int32Array(resizable);
    tokenIds.set(batch.tokenIds);
    const positions = Int32Array.from(batch.positions);
    const result = runtime.step({ ...batch, tokenIds, positions });
    resizable.resize(0);
    structuredClone(positions.buffer, { transfer: [positions.buffer] });
    batch.blockIds.fill(-1);
    batch.sampleRows.fill(1e9);
    expect(maxDifference((await result).logits!, expected)).toBe(0);
    runtime.close();
  });

  test('keeps its runtime, when no one else does', async () => {
    setFlagsFromString('--expose-gc');
    const collect = runInNewContext('gc') as () => void;
    const start = async () => {
      const runtime = await openedWith(1);
      return { result: runtime.step(batchOf(runtime)), runtime: new WeakRef(runtime) };
    };
    const { result, runtime } = await start();
    for (let i = 0; i < 3; i++) {
      await new Promise((resolve) => setImmediate(resolve));
      collect();
    }
    expect((await result).tokens).toHaveLength(long.length);
    for (let i = 0; i < 20 && runtime.deref(); i++) {
      await new Promise((resolve) => setTimeout(resolve, 5));
      collect();
    }
    expect(runtime.deref()).toBeUndefined();
  });

  test('closing unmaps the weights at once, also while an adapter loads', async () => {
    const scratch = await mkdtemp(join(tmpdir(), 'motet-native-'));
    const packedPath = join(scratch, 'packed');
    await copyFile(model.packedPath, packedPath);
    const isMapped = async () => (await readFile('/proc/self/maps', 'utf8')).includes(packedPath);
    const runtime = await open({ ...model, packedPath }, { deviceMemoryBytes });
    expect(await isMapped()).toBe(true);
    await runtime.step(batchOf(runtime));
    const file = await readAdapterFile(join(folder, 'adapter'), model.dims, { maxRank: 64 });
    const pages = Int32Array.from({ length: runtime.adapterPages(file.modules) }, (_, i) => 50 + i);
    const loading = runtime.loadAdapter(file.path, file.modules, pages);
    runtime.close();
    await expect(loading).rejects.toMatchObject({ code: 'closed' });
    expect(await isMapped()).toBe(false);
    await rm(scratch, { recursive: true });
  });
});

describe('opening', () => {
  test('a file that cannot be read in is named', async () => {
    await expect(readIn('/nowhere')).rejects.toMatchObject({
      code: 'io_failed',
      message: expect.stringContaining('/nowhere'),
    });
    expect(() => readIn(7 as never)).toThrow(/path: expected a string/);
  });

  test('refuses a device memory below one page, and tensors that are missing or misplaced, by name', async () => {
    const { packedPath, dims, tensors } = await prepare(join(goldensFolder, 'tiny/llama3'));
    const options = {
      packedPath,
      dims,
      tensors,
      activations: 'int8' as const,
      kvType: 'auto' as const,
      adapterQuantization: 'keep' as const,
      deviceMemoryBytes,
      hostMemoryBytes: 0,
      weightMemoryBytes: 0,
      numThreads: 1,
    };
    await expect(openRuntime({ ...options, deviceMemoryBytes: 1000 })).rejects.toThrow(/device memory.*1000/);
    await expect(openRuntime({ ...options, hostMemoryBytes: 1000 })).rejects.toThrow(/host memory.*1000/);
    expect(() => openRuntime({ ...options, hostMemoryBytes: -1 })).toThrow(/options\.hostMemoryBytes/);
    await expect(openRuntime({ ...options, packedPath: '/nowhere' })).rejects.toThrow(/nowhere/);
    const without = (role: string) => tensors.filter((tensor) => tensor.role !== role);
    await expect(openRuntime({ ...options, tensors: without('down_proj') })).rejects.toThrow(
      /'down_proj' of layer 0: missing/,
    );
    const moved = tensors.map((tensor) => ({ ...tensor, offsetBytes: 2 ** 40 }));
    await expect(openRuntime({ ...options, tensors: moved })).rejects.toThrow(/inside a file of/);
    const wrong = tensors.map((tensor) =>
      tensor.role === 'final_norm' ? { ...tensor, role: 'attention_norm', layer: 0 } : tensor,
    );
    await expect(openRuntime({ ...options, tensors: wrong })).rejects.toThrow(/final_norm/);
    const dimsOf = (change: object) => ({ ...options, dims: { ...dims, ...change } });
    expect(() => openRuntime(dimsOf({ headDim: 24 }))).toThrow(/headDim|multiple/);
    expect(() => openRuntime(dimsOf({ numKvHeads: 3 }))).toThrow(/numHeads/);
    expect(() => openRuntime(dimsOf({ activation: 'relu' }))).toThrow(/activation/);
    expect(() => openRuntime({ ...options, adapterQuantization: 'int4' as 'int8' })).toThrow(
      "adapterQuantization: expected 'keep' or 'int8', got 'int4'",
    );
  });

  test('refuses a KV type that is unknown, or that f32 activations do not have', async () => {
    const model = await prepare(join(goldensFolder, 'tiny/llama3'));
    const kvType = 'int4' as 'int8';
    expect(() => open(model, { kvType })).toThrow(
      "options.kvType: expected 'auto', 'f16' or 'int8', got 'int4'",
    );
    expect(() => open(model, { kvType: 'int8', activations: 'f32' })).toThrow(
      "options.kvType: expected 'auto' beside activations 'f32', which keep KV in f32, got 'int8'",
    );
  });

  test('sizes and files are refused by name', async () => {
    expect(packedBytes('int4', 16, 64)).toBe(2 * 16 * 2 + 16 * 32);
    expect(() => packedBytes('int3' as 'int4', 16, 64)).toThrow(/int3/);
    expect(sourceBytes('q4_k', 256)).toBe(144);
    expect(() => sourceBytes('q4_k', 100)).toThrow(/256/);
    await expect(readGguf('/nowhere.gguf')).rejects.toMatchObject({ code: 'io_failed' });
    await expect(readGguf(join(goldensFolder, 'README.md'))).rejects.toMatchObject({ code: 'gguf_invalid' });
  });
});

test('hidden rows are those that the head reads, whatever chunk they are in', async () => {
  const model = await prepare(join(goldensFolder, 'tiny/qwen2'));
  const runtime = await open(model, { deviceMemoryBytes });
  const { numPages, blockTokens } = runtime;
  const hiddenOf = async (chunks: number[]) => {
    const rows: number[] = [];
    const blocks = pagesFor(runtime, tokens.length);
    let start = 0;
    for (const count of chunks) {
      const part = { tokens, start, count, blocks };
      const hiddenRows = Array.from({ length: count }, (_, i) => i);
      rows.push(...(await runtime.step(stepBatch([part], { hiddenRows }))).hidden!);
      start += count;
    }
    return rows;
  };
  expect(numPages * blockTokens).toBeGreaterThan(tokens.length);
  const whole = await hiddenOf([20]);
  expect(whole).toHaveLength(20 * model.dims.hiddenSize);
  expect(await hiddenOf([1, 7, 12])).toEqual(whole);
  const one = await runtime.step(
    stepBatch([{ tokens, start: 0, count: 20, blocks: pagesFor(runtime, 20) }], { hiddenRows: [3, 19] }),
  );
  const size = model.dims.hiddenSize;
  expect([...one.hidden!]).toEqual([...whole.slice(3 * size, 4 * size), ...whole.slice(19 * size)]);
  const none = await runtime.step(
    stepBatch([{ tokens, start: 0, count: 20, blocks: pagesFor(runtime, 20) }]),
  );
  expect(none.hidden).toBe(null);
  runtime.close();
});
