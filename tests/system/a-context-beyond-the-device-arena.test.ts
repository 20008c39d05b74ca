/** A context that the device arena has no room for gives the tokens that it gives with room for all of it. */
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { goldensFolder } from '../fixtures/golden.ts';
import { open, prepare } from '../fixtures/models.ts';
import { generate, startRealEngine } from '../fixtures/real-engine.ts';

/** gemma3 has layers with a sliding window. */
test.each(['llama3', 'gemma3'])(
  '%s answers a prompt of four times the device, beside others',
  async (name) => {
    const model = await prepare(join(goldensFolder, 'tiny', name));
    const runtime = await open(model, { deviceMemoryBytes: 32 << 20, hostMemoryBytes: 16 << 20 });
    const numPages = 8;
    const prompts = [440, 20, 430, 60].map((length, i) =>
      Int32Array.from({ length }, (_, at) => (at * 37 + 5 + i) % 512),
    );
    const run = async (pages: number) => {
      const parts = startRealEngine(runtime, model, { maxBatchTokens: 64 }, pages);
      const tokens = await Promise.all(
        prompts.map((promptTokens) => generate(parts, { promptTokens, maxTokens: 30 })),
      );
      const streamed = await parts.metrics.registry.getSingleMetric('motet_kv_streamed_bytes_total')!.get();
      await Promise.all([parts.engine.close(), parts.tiers.close()]);
      expect(parts.fatal).toEqual([]);
      expect(parts.arena.numFree).toBe(pages);
      return { tokens, isStreaming: streamed.values[0]!.value > 0 };
    };
    const whole = await run(runtime.numPages);
    expect(whole.isStreaming).toBe(false);
    const small = await run(numPages);
    expect(small.isStreaming).toBe(true);
    expect(small.tokens).toEqual(whole.tokens);
    runtime.close();
  },
);
