/**
 * A batch gives token for token what its sequences give alone, on the real kernels: whatever else shares the step,
 * however prompts are cut into chunks, and when sequences are preempted and computed again, or their KV goes to the host
 * arena and comes back.
 */
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test, vi } from 'vitest';
import type { PreparedModel } from '../../engine/model/prepare.ts';
import type { Runtime } from '../../native/index.ts';
import { goldensFolder, readGolden } from '../fixtures/golden.ts';
import { examplesFolder, open, prepare, smollm2Path } from '../fixtures/models.ts';
import { type GenerateRequest, generate, startRealEngine } from '../fixtures/real-engine.ts';
import { type SeededRandom, seededRandom } from '../fixtures/seeded-random.ts';
import type { WiredEngine } from '../fixtures/wire-engine.ts';

async function stop({ engine, tiers, arena, hostArena, fatal }: WiredEngine): Promise<void> {
  for (const [name] of [...tiers.names]) tiers.unload(name);
  await engine.close();
  await tiers.close();
  expect(fatal).toEqual([]);
  expect(arena.numFree).toBe(arena.numPages);
  expect(hostArena?.numFree).toBe(hostArena?.numPages);
}

async function numPreempted({ metrics }: WiredEngine): Promise<number> {
  const { values } = await metrics.registry.getSingleMetric('vllm:num_preemptions_total')!.get();
  return values[0]?.value ?? 0;
}

/** Bytes of KV that came from the host arena to the device. */
async function bytesFetched({ metrics }: WiredEngine): Promise<number> {
  const { values } = await metrics.registry.getSingleMetric('motet_kv_move_bytes_total')!.get();
  return values.find(({ labels }) => labels.from === 'host')?.value ?? 0;
}

describe('1,000 random schedules of a small model with a sliding window', () => {
  const numGroups = 5;
  const schedulesPerGroup = 200;
  const folder = join(goldensFolder, 'tiny/mistral');
  const adapterFolder = join(folder, 'adapter');
  const prompts = (random: SeededRandom) =>
    Array.from({ length: 6 }, () => Array.from({ length: random.from(1, 70) }, () => random.below(512)));
  let model: PreparedModel;
  let runtime: Runtime;
  let fetched = 0;
  beforeAll(async () => {
    model = await prepare(folder);
    runtime = await open(model, { deviceMemoryBytes: 64 * 2 ** 18, hostMemoryBytes: 64 * 2 ** 18 });
  });
  afterAll(() => runtime.close());

  test.each(Array.from({ length: numGroups }, (_, i) => i))('group %i of 5', async (group) => {
    // What each request gives alone is computed once per group; the schedules mix the same requests anew.
    const random = seededRandom(group);
    const requests = prompts(random).flatMap((promptTokens, i) =>
      [false, true].map((usesAdapter) => ({
        promptTokens,
        usesAdapter,
        maxTokens: random.from(1, 24),
        temperature: i % 3 === 2 ? 1 : 0,
        repetitionPenalty: i % 2 ? 1.3 : 1,
        seed: BigInt(i),
      })),
    );
    const aloneEngine = startRealEngine(runtime, model);
    const aloneAdapter = await aloneEngine.tiers.load('adapter', adapterFolder, false);
    const alone: number[][] = [];
    for (const { usesAdapter, ...request } of requests) {
      alone.push(await generate(aloneEngine, { ...request, adapter: usesAdapter ? aloneAdapter : null }));
    }
    await stop(aloneEngine);

    let preempted = 0;
    for (let i = 0; i < schedulesPerGroup; i++) {
      const seed = group * schedulesPerGroup + i;
      const counts = await runSchedule(seed, requests, alone);
      preempted += counts.preempted;
      fetched += counts.fetched;
    }
    expect(preempted).toBeGreaterThan(0);
  });

  test('among them are some whose KV came back from the host arena', () => {
    expect(fetched).toBeGreaterThan(0);
  });

  async function runSchedule(
    seed: number,
    requests: (GenerateRequest & { usesAdapter: boolean })[],
    alone: number[][],
  ): Promise<{ preempted: number; fetched: number }> {
    const random = seededRandom(seed);
    const limits = { maxBatchTokens: random.from(8, 96), maxSequences: random.from(1, 8) };
    const parts = startRealEngine(runtime, model, limits, random.from(9, 20));
    // As if computing were dear: with so small a model the copy is not always the cheaper way.
    vi.spyOn(parts.costs, 'prefillSeconds').mockReturnValue(1);
    const adapter = await parts.tiers.load('adapter', adapterFolder, false);
    const runs: Promise<void>[] = [];
    for (let n = random.from(2, 8); n > 0; n--) {
      const index = random.below(requests.length);
      const { usesAdapter, ...request } = requests[index]!;
      const cancelAfter = random.below(5) === 0 ? random.below(8) + 1 : Number.POSITIVE_INFINITY;
      const run = generate(parts, { ...request, adapter: usesAdapter ? adapter : null, cancelAfter });
      const expected = alone[index]!;
      runs.push(
        run.then((tokens) => expect(tokens, `seed ${seed}`).toEqual(expected.slice(0, tokens.length))),
      );
      for (let turns = random.below(4); turns > 0; turns--)
        await new Promise((resolve) => setImmediate(resolve));
    }
    await Promise.all(runs);
    const counts = { preempted: await numPreempted(parts), fetched: await bytesFetched(parts) };
    await stop(parts);
    return counts;
  }
});

test('32 concurrent greedy requests over SmolLM2 and all adapters give what each gives alone', async () => {
  const model = await prepare(smollm2Path);
  const runtime = await open(model, { deviceMemoryBytes: 256 << 20, hostMemoryBytes: 256 << 20 });
  const index = JSON.parse(readFileSync(join(examplesFolder, 'index.json'), 'utf8'));
  const names: string[] = index.adapters.map((adapter: { name: string }) => adapter.name);
  const prompts = readGolden('smollm2', 'base').sequences.map(({ ids }) => ids.slice(0, 120));
  const startWithAdapters = async (limits: object, numPages?: number) => {
    const parts = startRealEngine(runtime, model, limits, numPages);
    const adapters = await Promise.all(
      names.map((name) => parts.tiers.load(name, join(examplesFolder, name), false)),
    );
    return { ...parts, voices: [null, ...adapters] };
  };
  const request = (i: number, voices: (typeof parts)['voices']): GenerateRequest => ({
    promptTokens: prompts[i % prompts.length]!,
    adapter: voices[i % voices.length]!,
    maxTokens: 24 + (i % 9),
  });

  let parts = await startWithAdapters({});
  const numAdapterPages = parts.arena.numUsed('adapter');
  const alone: number[][] = [];
  for (let i = 0; i < 32; i++) alone.push(await generate(parts, request(i, parts.voices)));
  const together = await Promise.all(
    Array.from({ length: 32 }, (_, i) => generate(parts, request(i, parts.voices))),
  );
  expect(together).toEqual(alone);
  await stop(parts);

  // Again with small chunks, and so few pages that sequences are preempted.
  parts = await startWithAdapters({ maxBatchTokens: 40, maxSequences: 16 }, numAdapterPages + 40);
  const squeezed = await Promise.all(
    Array.from({ length: 32 }, (_, i) => generate(parts, request(i, parts.voices))),
  );
  expect(squeezed).toEqual(alone);
  expect(await numPreempted(parts)).toBeGreaterThan(0);
  expect(await bytesFetched(parts)).toBeGreaterThan(0);
  await stop(parts);
  runtime.close();
}, 300_000);
