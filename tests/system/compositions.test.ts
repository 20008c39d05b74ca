/**
 * Compositions on the real kernels against one adapter that is their sum: its A are the members' A below each other, its B their
 * weighted and scaled B side by side, so that B·A = Σ weight · scaling · Bᵢ·Aᵢ exactly. PEFT's add_weighted_adapter calls that
 * "cat"; its "linear" sums the As and the Bs apart, which is no sum of deltas. Both sides add the same f32 products in another
 * order: less than 1e-4 of a logit, where the adapters change more than 1e-2. tests/native/model_test.cc has the same against double precision.
 */
import { mkdtempSync, rmSync } from 'node:fs';
import { mkdir, readFile, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { pino } from 'pino';
import { afterAll, beforeAll, expect, test, vi } from 'vitest';
import type { Adapter } from '../../engine/adapters/adapter-tiers.ts';
import { alone, compose } from '../../engine/adapters/composition.ts';
import { mergeFolders } from '../../engine/adapters/merge-folders.ts';
import { Merges } from '../../engine/adapters/merges.ts';
import type { PreparedModel } from '../../engine/model/prepare.ts';
import type { MergeRule } from '../../engine/protocol.ts';
import { writeRandomAdapter } from '../bench/random-adapter.ts';
import { goldensFolder } from '../fixtures/golden.ts';
import { loadAdapter, open, prepare } from '../fixtures/models.ts';
import { generate, startRealEngine } from '../fixtures/real-engine.ts';
import { pagesFor, sequenceLogits, stepBatch } from '../fixtures/steps.ts';

interface Tensor {
  shape: [number, number];
  values: Float32Array;
}

const names = ['a', 'b', 'c'];
const ranks = { a: 4, b: 8, c: 3 } as Record<string, number>;
const targets = {
  a: ['q_proj', 'v_proj', 'down_proj'],
  b: ['q_proj', 'o_proj', 'gate_proj'],
  c: ['v_proj'],
} as Record<string, string[]>;
const tokens = Array.from({ length: 45 }, (_, i) => (i * 37 + 11) % 512);

let folder: string;
let model: PreparedModel;
beforeAll(async () => {
  folder = mkdtempSync(join(tmpdir(), 'motet-compositions-'));
  model = await prepare(join(goldensFolder, 'tiny/llama3'));
  for (const [i, name] of names.entries())
    await writeRandomAdapter(join(folder, name), model.dims, ranks[name]!, targets[name]!, 1000 * i);
});
afterAll(() => rmSync(folder, { recursive: true }));

/** Of a file in bf16. */
async function readTensors(path: string): Promise<Map<string, Tensor>> {
  const file = await readFile(path);
  const begin = 8 + Number(file.readBigUInt64LE(0));
  const header = JSON.parse(file.toString('utf8', 8, begin)) as Record<
    string,
    { shape: [number, number]; data_offsets: [number, number] }
  >;
  return new Map(
    Object.entries(header).map(([name, { shape, data_offsets }]) => {
      const bits = new Uint32Array(shape[0] * shape[1]);
      for (let i = 0; i < bits.length; i++)
        bits[i] = file.readUInt16LE(begin + data_offsets[0] + 2 * i) << 16;
      return [name, { shape, values: new Float32Array(bits.buffer) }];
    }),
  );
}

/** An adapter in f32 that is the weighted sum; where a member has no module, its rows are 0. */
async function writeSum(into: string, weights: Record<string, number>): Promise<void> {
  const members = await Promise.all(
    Object.entries(weights).map(async ([name, weight]) => ({
      weight,
      rank: ranks[name]!,
      tensors: await readTensors(join(folder, name, 'adapter_model.safetensors')),
    })),
  );
  const rank = members.reduce((sum, member) => sum + member.rank, 0);
  const shapes = new Map(
    members.flatMap(({ tensors }) => [...tensors].map(([name, { shape }]) => [name, shape] as const)),
  );
  const header: Record<string, object> = {};
  const parts: Buffer[] = [];
  let offset = 0;
  for (const [name, [rows, columns]] of shapes) {
    const isA = name.includes('lora_A');
    const values = new Float32Array(isA ? rank * columns : rows * rank);
    let first = 0;
    for (const { weight, rank: own, tensors } of members) {
      const tensor = tensors.get(name)?.values;
      if (tensor && isA) values.set(tensor, first * columns);
      else if (tensor)
        for (let row = 0; row < rows; row++)
          for (let r = 0; r < own; r++) values[row * rank + first + r] = weight * tensor[row * own + r]!;
      first += own;
    }
    const bytes = Buffer.from(values.buffer);
    parts.push(bytes);
    const shape = isA ? [rank, columns] : [rows, rank];
    header[name] = { dtype: 'F32', shape, data_offsets: [offset, offset + bytes.length] };
    offset += bytes.length;
  }
  const json = Buffer.from(JSON.stringify(header));
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(json.length));
  await mkdir(into, { recursive: true });
  await writeFile(join(into, 'adapter_model.safetensors'), Buffer.concat([length, json, ...parts]));
  const target_modules = [...new Set(Object.keys(weights).flatMap((name) => targets[name]!))];
  const config = {
    peft_type: 'LORA',
    task_type: 'CAUSAL_LM',
    r: rank,
    lora_alpha: rank,
    target_modules,
    bias: 'none',
  };
  await writeFile(join(into, 'adapter_config.json'), JSON.stringify(config));
}

function greatestDifference(a: Float32Array, b: Float32Array): number {
  expect(a.length).toBe(b.length);
  let greatest = 0;
  for (let i = 0; i < a.length; i++) greatest = Math.max(greatest, Math.abs(a[i]! - b[i]!));
  return greatest;
}

test.each([[{ a: 0.7, b: 0.4 }], [{ a: 1, b: -0.5, c: 2 }], [{ b: 0.3 }]])(
  '%j gives the logits of the one adapter that is its sum',
  async (weights: Record<string, number>) => {
    const runtime = await open(model, { activations: 'f32', deviceMemoryBytes: 64 << 20 });
    const sumFolder = join(folder, Object.entries(weights).flat().join('-'));
    await writeSum(sumFolder, weights);
    let page = Math.floor(runtime.numPages / 2);
    const load = async (path: string) => {
      const { handle, nextPage } = await loadAdapter(runtime, model, path, page);
      page = nextPage;
      return handle;
    };
    const members: [number, number][] = [];
    for (const [name, weight] of Object.entries(weights))
      members.push([await load(join(folder, name)), weight]);
    const composed = await sequenceLogits(runtime, tokens, { adapters: members });
    const sum = await sequenceLogits(runtime, tokens, { adapters: [[await load(sumFolder), 1]] });
    expect(greatestDifference(composed, sum)).toBeLessThan(1e-4);
    for (const others of [[], [members[0]!], members.map(([handle]) => [handle, 1] as [number, number])]) {
      if (JSON.stringify(others) === JSON.stringify(members)) continue;
      const logits = await sequenceLogits(runtime, tokens, { adapters: others });
      expect(greatestDifference(composed, logits)).toBeGreaterThan(0.01);
    }
    runtime.close();
  },
);

test('its rows have the same bits alone, in chunks, and beside its members, others and the base', async () => {
  const runtime = await open(model, { deviceMemoryBytes: 64 << 20 });
  const handles: number[] = [];
  let page = Math.floor(runtime.numPages / 2);
  for (const name of names) {
    const { handle, nextPage } = await loadAdapter(runtime, model, join(folder, name), page);
    handles.push(handle);
    page = nextPage;
  }
  const [a, b, c] = handles as [number, number, number];
  const voices: [number, number][][] = [
    [],
    [[a, 1]],
    [
      [a, 0.7],
      [b, 0.4],
    ],
    [[b, 1]],
    [
      [a, 1],
      [b, -0.5],
      [c, 2],
    ],
    [
      [c, 0.25],
      [a, 1],
    ],
    [
      [a, 0.7],
      [b, 0.4],
    ],
  ];
  const counts = [7, 1, 12, 30, 3, 45, 20];
  const alone: Float32Array[] = [];
  for (const [i, adapters] of voices.entries()) {
    const own = tokens.slice(0, counts[i]);
    const logits = await sequenceLogits(runtime, own, { adapters });
    expect(await sequenceLogits(runtime, own, { adapters, chunk: 5 })).toEqual(logits);
    alone.push(logits);
  }
  let firstPage = 0;
  const parts = voices.map((adapters, i) => {
    const blocks = pagesFor(runtime, counts[i]!, firstPage);
    firstPage += blocks.length;
    return { tokens, start: 0, count: counts[i]!, blocks, adapters, sample: 'all' as const };
  });
  const { logits } = await runtime.step(stepBatch(parts, { wantLogits: true }));
  expect(logits).toEqual(Float32Array.from(alone.flatMap((rows) => [...rows])));
  runtime.close();
});

test('the engine gives each of many mixed requests the tokens it gives alone', async () => {
  const runtime = await open(model, { deviceMemoryBytes: 64 << 20, hostMemoryBytes: 16 << 20 });
  const parts = startRealEngine(runtime, model, { maxBatchTokens: 48, maxSequences: 6 });
  const adapters = new Map<string, Adapter>();
  for (const name of names) adapters.set(name, await parts.tiers.load(name, join(folder, name), false));
  const sumOf = (weights: Record<string, number>) =>
    compose(Object.entries(weights).map(([name, weight]) => ({ adapter: adapters.get(name)!, weight })));
  const voices = [
    {},
    { a: 1 },
    { b: 1 },
    { a: 0.7, b: 0.4 },
    { b: 0.4, a: 0.7 },
    { a: 1, b: -0.5, c: 2 },
    { c: 0.5 },
  ];
  const requests = voices.flatMap((weights, i) =>
    [tokens.slice(0, 20 + i), tokens.slice(i, 3 * i + 2)].map((promptTokens) => ({
      promptTokens,
      adapters: sumOf(weights as Record<string, number>),
      maxTokens: 16,
    })),
  );
  const alone: number[][] = [];
  for (const request of requests) alone.push(await generate(parts, request));
  expect(await Promise.all(requests.map((request) => generate(parts, request)))).toEqual(alone);
  expect(new Set(alone.map(String)).size).toBeGreaterThan(voices.length);
  expect(await generate(parts, { ...requests[2]!, adapters: sumOf({ a: 1 }) })).toEqual(
    await generate(parts, {
      promptTokens: requests[2]!.promptTokens,
      maxTokens: 16,
      adapter: adapters.get('a')!,
    }),
  );
  await parts.engine.close();
  await parts.tiers.close();
  expect(parts.fatal).toEqual([]);
});

test('a merge that a request has made is the adapter that is prepared of the same, on every engine', async () => {
  for (const [i, name] of ['x', 'y'].entries())
    await writeRandomAdapter(join(folder, name), model.dims, 4, ['q_proj', 'down_proj'], 7000 + i);
  const rules: MergeRule[] = [
    { method: 'ties', density: 0.6, majoritySign: 'total' },
    { method: 'dare_linear', density: 0.4, majoritySign: 'total' },
    { method: 'dare_ties', density: 0.4, majoritySign: 'frequency' },
  ];
  const outputs = new Set<string>();
  for (const engineName of ['one', 'another']) {
    const runtime = await open(model, { deviceMemoryBytes: 64 << 20, hostMemoryBytes: 16 << 20 });
    const parts = startRealEngine(runtime, model);
    const { tiers } = parts;
    const merges = await Merges.open({
      tiers,
      folder: join(folder, `merges of ${engineName}`),
      maxBytes: 64 << 20,
      log: pino({ level: 'silent' }),
      now: () => performance.now(),
    });
    const [x, y] = await Promise.all(['x', 'y'].map((name) => tiers.load(name, join(folder, name), false)));
    const members = compose([
      { adapter: y!, weight: -0.5 },
      { adapter: x!, weight: 1.5 },
    ]);
    for (const rule of rules) {
      const hold = await merges.hold(members, rule, new AbortController().signal);
      const out = join(folder, `${engineName} ${rule.method}`);
      const given = members.map(({ adapter, weight }) => ({ folder: adapter.source.uri, weight }));
      const prepared = await mergeFolders(given, rule, out);
      expect(prepared.digest).toBe(hold.adapter.digest);
      const request = { promptTokens: tokens, maxTokens: 8 };
      const got = await generate(parts, { ...request, adapters: alone(hold.adapter) });
      // Its bytes are not what the merge left: they are read from the prepared files.
      hold.letGo();
      tiers.unkeep(hold.adapter);
      await vi.waitFor(() => expect(tiers.withDigest(prepared.digest) === undefined).toBe(true));
      const loaded = await tiers.load('prepared', out, true);
      expect(await generate(parts, { ...request, adapter: loaded })).toEqual(got);
      tiers.unload('prepared');
      outputs.add(`${rule.method} ${got}`);
    }
    expect(parts.fatal).toEqual([]);
    await parts.engine.close();
    await merges.close();
    runtime.close();
  }
  expect(outputs.size).toBe(rules.length);
});
