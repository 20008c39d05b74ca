/**
 * The forward pass against trusted implementations, teacher forced (tests/goldens/README.md says which and how).
 *
 * Reference mode (f32 activations) must agree to rounding: both sides sum the same f32 products in another order. A sum
 * of n products has a relative error of about √n · 2⁻²⁴; through 30 layers that is 1e-4 of a logit of magnitude 20. The
 * tolerance is 1e-3 absolute. Fast mode (int8 activations) is compared by the divergence of the distributions.
 */
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import type { PreparedModel } from '../../engine/model/prepare.ts';
import type { Runtime } from '../../native/index.ts';
import {
  type Agreement,
  argmax,
  compareLogits,
  type GoldenCase,
  goldensFolder,
  klDivergence,
  noAgreement,
  readGolden,
} from '../fixtures/golden.ts';
import { examplesFolder, gemma3Path, loadAdapter, open, prepare, smollm2Path } from '../fixtures/models.ts';
import { sequenceLogits, stepBatch } from '../fixtures/steps.ts';

const maxLogitError = 1e-3;

/** Handles by adapter name, loaded from the end of the arena so that sequences may use the first pages. */
async function loadAdapters(runtime: Runtime, model: PreparedModel, folders: Record<string, string>) {
  const handles = new Map<string | null, [number, number][]>([[null, []]]);
  let page = runtime.numPages / 2;
  for (const [name, folder] of Object.entries(folders)) {
    const { handle, nextPage } = await loadAdapter(runtime, model, folder, Math.ceil(page));
    page = nextPage;
    handles.set(name, [[handle, 1]]);
  }
  return handles;
}

type Handles = Awaited<ReturnType<typeof loadAdapters>>;

async function agreement(golden: GoldenCase, runtime: Runtime, handles: Handles): Promise<Agreement> {
  const found = noAgreement();
  for (const { ids, adapter } of golden.sequences) {
    const logits = await sequenceLogits(runtime, ids, { adapters: handles.get(adapter)! });
    compareLogits(golden, found.positions, logits, found);
  }
  return found;
}

/** Mean KL and top-1 agreement of the fast mode with the reference mode, over the whole vocabulary. */
async function divergence(
  golden: GoldenCase,
  reference: Runtime,
  fast: Runtime,
  handles: [Handles, Handles],
) {
  let kl = 0;
  let sameTop1 = 0;
  for (const { ids, adapter } of golden.sequences) {
    const p = await sequenceLogits(reference, ids, { adapters: handles[0].get(adapter)! });
    const q = await sequenceLogits(fast, ids, { adapters: handles[1].get(adapter)! });
    for (let i = 0; i < p.length; i += golden.vocabSize) {
      const [a, b] = [p.subarray(i, i + golden.vocabSize), q.subarray(i, i + golden.vocabSize)];
      kl += klDivergence(a, b);
      if (argmax(a) === argmax(b)) sameTop1++;
    }
  }
  return { kl, sameTop1, positions: golden.numPositions };
}

/** How far llama.cpp is from the same reference on the same file: the best of its settings that were tried. */
function llamaCpp(golden: string): { meanKl: number; top1: number } {
  const { results } = JSON.parse(readFileSync(join(goldensFolder, 'llama_cpp.json'), 'utf8'));
  const runs = results.filter((run: { golden: string }) => run.golden === golden);
  expect(runs.length).toBeGreaterThan(0);
  return {
    meanKl: Math.min(...runs.map((run: { meanKl: number }) => run.meanKl)),
    top1: Math.max(...runs.map((run: { top1Agreement: number }) => run.top1Agreement)),
  };
}

function expectAgreesToRounding(found: Agreement): void {
  expect(found.maxTopError).toBeLessThan(maxLogitError);
  expect(found.maxFixedError).toBeLessThan(maxLogitError);
  expect(found.sameTop1 / found.positions).toBeGreaterThanOrEqual(0.999);
}

describe.each(['llama3', 'qwen2', 'qwen3', 'mistral', 'gemma3'])('a random %s checkpoint', (name) => {
  let model: PreparedModel;
  let runtime: Runtime;
  let handles: Handles;
  const folder = join(goldensFolder, 'tiny', name);
  beforeAll(async () => {
    model = await prepare(folder);
    runtime = await open(model, { activations: 'f32', deviceMemoryBytes: 64 << 20 });
    handles = await loadAdapters(runtime, model, { adapter: join(folder, 'adapter') });
  });
  afterAll(() => runtime.close());

  test('gives the reference logits', async () => {
    const golden = readGolden(`tiny/${name}`, 'base');
    const found = await agreement(golden, runtime, handles);
    expect(found.positions).toBe(golden.numPositions);
    expectAgreesToRounding(found);
  });

  test('gives the reference logits under its adapter, which differ from the base', async () => {
    const golden = readGolden(`tiny/${name}`, 'adapter');
    expectAgreesToRounding(await agreement(golden, runtime, handles));
    const withoutAdapter = new Map([['adapter', []]]) as unknown as Handles;
    expect((await agreement(golden, runtime, withoutAdapter)).maxFixedError).toBeGreaterThan(
      100 * maxLogitError,
    );
  });

  test('stays close to the reference when activations are int8', async () => {
    const fast = await open(model, { deviceMemoryBytes: 64 << 20 });
    const fastHandles = await loadAdapters(fast, model, { adapter: join(folder, 'adapter') });
    const golden = readGolden(`tiny/${name}`, 'adapter');
    const { kl, positions } = await divergence(golden, runtime, fast, [handles, fastHandles]);
    expect(kl / positions).toBeLessThan(0.01);
    fast.close();
  });

  test.each(['int8', 'int4'] as const)(
    'answers alike when its weights are quantised to %s',
    async (quantization) => {
      const quantised = await prepare(folder, quantization);
      const other = await open(quantised, { activations: 'f32', deviceMemoryBytes: 64 << 20 });
      const noAdapters = await loadAdapters(other, quantised, {});
      const { kl, positions } = await divergence(readGolden(`tiny/${name}`, 'base'), runtime, other, [
        handles,
        noAdapters,
      ]);
      // Random weights have no structure that quantisation could spare: a bound on gross errors, not a quality figure.
      expect(kl / positions).toBeLessThan(quantization === 'int8' ? 0.001 : 0.2);
      other.close();
    },
  );
});

describe('SmolLM2-135M-Instruct with the example adapters', () => {
  const index = JSON.parse(readFileSync(join(examplesFolder, 'index.json'), 'utf8'));
  const names: string[] = index.adapters.map((adapter: { name: string }) => adapter.name);
  const cases = ['base', ...names, 'mixed'];
  const folders = Object.fromEntries(names.map((name) => [name, join(examplesFolder, name)]));
  let reference: Runtime;
  let fast: Runtime;
  let handles: [Handles, Handles];
  let model: PreparedModel;
  beforeAll(async () => {
    model = await prepare(smollm2Path);
    reference = await open(model, { activations: 'f32', deviceMemoryBytes: 256 << 20 });
    fast = await open(model, { deviceMemoryBytes: 256 << 20 });
    handles = [await loadAdapters(reference, model, folders), await loadAdapters(fast, model, folders)];
  });
  afterAll(() => {
    reference.close();
    fast.close();
  });

  test('has goldens for at least 2,000 positions', () => {
    const positions = cases.map((name) => readGolden('smollm2', name).numPositions);
    expect(positions.reduce((a, b) => a + b)).toBeGreaterThanOrEqual(2000);
  });

  test.each(cases)('gives the reference logits in reference mode: %s', async (name) => {
    expectAgreesToRounding(await agreement(readGolden('smollm2', name), reference, handles[0]));
  });

  test('gives the reference logits when the mixed case is one batch', async () => {
    const golden = readGolden('smollm2', 'mixed');
    let page = 0;
    const parts = golden.sequences.map(({ ids, adapter }) => {
      const numBlocks = Math.ceil(ids.length / reference.blockTokens);
      const blocks = Array.from({ length: numBlocks }, (_, i) => page + i);
      page += numBlocks;
      const adapters = handles[0].get(adapter)!;
      return { tokens: ids, start: 0, count: ids.length, blocks, adapters, sample: 'all' as const };
    });
    const result = await reference.step(stepBatch(parts, { wantLogits: true }));
    const found = noAgreement();
    compareLogits(golden, 0, result.logits!, found);
    expectAgreesToRounding(found);
  });

  test('stays within 0.01 nats and 97 % of top-1 in fast mode, and is no worse than llama.cpp', async () => {
    const total = { kl: 0, sameTop1: 0, positions: 0 };
    const rows: object[] = [];
    for (const name of cases) {
      const one = await divergence(readGolden('smollm2', name), reference, fast, handles);
      rows.push({
        case: name,
        positions: one.positions,
        'mean KL': one.kl / one.positions,
        'top-1': one.sameTop1 / one.positions,
      });
      for (const key of ['kl', 'sameTop1', 'positions'] as const) total[key] += one[key];
      if (name === 'base') {
        const theirs = llamaCpp('smollm2/base');
        expect(one.kl / one.positions).toBeLessThanOrEqual(theirs.meanKl);
        expect(one.sameTop1 / one.positions).toBeGreaterThanOrEqual(theirs.top1);
      }
    }
    console.table(rows);
    expect(total.kl / total.positions).toBeLessThanOrEqual(0.01);
    expect(total.sameTop1 / total.positions).toBeGreaterThanOrEqual(0.97);
  }, 120_000);

  test('int8 KV moves the distributions by less than 0.002 nats and 4 % of top-1, in less memory', async () => {
    const int8 = await open(model, { kvType: 'int8', deviceMemoryBytes: 256 << 20 });
    expect(int8.pageBytes).toBeLessThan(0.55 * fast.pageBytes);
    const int8Handles = await loadAdapters(int8, model, folders);
    const total = { kl: 0, sameTop1: 0, positions: 0 };
    for (const name of ['base', 'mixed']) {
      const one = await divergence(readGolden('smollm2', name), reference, int8, [handles[0], int8Handles]);
      for (const key of ['kl', 'sameTop1', 'positions'] as const) total[key] += one[key];
    }
    int8.close();
    console.table([total]);
    expect(total.kl / total.positions).toBeLessThan(0.002);
    expect(total.sameTop1 / total.positions).toBeGreaterThan(0.96);
  }, 120_000);

  test('adapters rounded to int8 cost at most 0.0001 nats', async () => {
    const rounded = await open(model, {
      activations: 'f32',
      adapterQuantization: 'int8',
      deviceMemoryBytes: 256 << 20,
    });
    const both: [Handles, Handles] = [handles[0], await loadAdapters(rounded, model, folders)];
    const total = { kl: 0, sameTop1: 0, positions: 0 };
    for (const name of names) {
      const one = await divergence(readGolden('smollm2', name), reference, rounded, both);
      for (const key of ['kl', 'sameTop1', 'positions'] as const) total[key] += one[key];
    }
    const [kl, top1] = [total.kl / total.positions, total.sameTop1 / total.positions];
    console.table([{ positions: total.positions, 'mean KL': kl, 'top-1': top1 }]);
    expect(kl).toBeGreaterThan(0);
    expect(kl).toBeLessThanOrEqual(0.0001);
    expect(top1).toBeGreaterThanOrEqual(0.995);
    rounded.close();
  }, 120_000);
});

describe('Gemma 3 270M', () => {
  let reference: Runtime;
  let model: PreparedModel;
  beforeAll(async () => {
    model = await prepare(gemma3Path);
    reference = await open(model, { activations: 'f32' });
  });
  afterAll(() => reference.close());
  const none = new Map([[null, []]]) as unknown as Handles;

  // llama.cpp's own arithmetic is coarser here: it looks GELU up in a table of f16 values (doing the same brings the
  // r.m.s. difference from 0.0040 to 0.0022). The rest is not explained by a test; rope angles by repeated
  // multiplication are a candidate. That the architecture is
  // computed to rounding is what the random gemma3 checkpoint above shows.
  test('gives the logits of llama.cpp in reference mode, to within its approximations', async () => {
    const found = await agreement(readGolden('gemma3-270m', 'base'), reference, none);
    console.table([found]);
    expect(found.sameTop1 / found.positions).toBeGreaterThanOrEqual(0.999);
    expect(found.maxTopError).toBeLessThan(0.03);
    expect(found.maxFixedError).toBeLessThan(0.15);
    expect(found.rmsError).toBeLessThan(0.01);
  }, 120_000);

  test('stays within 0.01 nats and 97 % of top-1 in fast mode, and is no worse than llama.cpp', async () => {
    const fast = await open(model);
    const one = await divergence(readGolden('gemma3-270m', 'base'), reference, fast, [none, none]);
    const theirs = llamaCpp('gemma3-270m/base');
    console.table([
      {
        'mean KL': one.kl / one.positions,
        'top-1': one.sameTop1 / one.positions,
        'llama.cpp KL': theirs.meanKl,
        'llama.cpp top-1': theirs.top1,
      },
    ]);
    expect(one.kl / one.positions).toBeLessThanOrEqual(Math.min(0.01, theirs.meanKl));
    expect(one.sameTop1 / one.positions).toBeGreaterThanOrEqual(Math.max(0.97, theirs.top1));
    fast.close();
  }, 120_000);
});
