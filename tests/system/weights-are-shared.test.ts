/** Two engines on one base hold its weights once: the packed file is mapped, and its pages are shared. */
import { expect, test } from 'vitest';
import { prepare, smollm2Path } from '../fixtures/models.ts';
import { memoryOf, postJson, startSmollm2 } from '../fixtures/processes.ts';

test('two engines on one base cost its weights once', async () => {
  const { packedPath } = await prepare(smollm2Path);
  const ask = (url: string) =>
    postJson(`${url}/v1/completions`, { model: 'base', prompt: 'The sea', max_tokens: 4, temperature: 0 });

  const first = await startSmollm2();
  await ask(first.url);
  const alone = memoryOf(first.pid, packedPath);
  const second = await startSmollm2();
  await ask(second.url);
  const [a, b] = [memoryOf(first.pid, packedPath), memoryOf(second.pid, packedPath)];
  console.table({ 'one engine': alone, 'first of two': a, 'second of two': b });
  await Promise.all([first.stop(), second.stop()]);

  // The reader of the checksum and the kernels touch every page, so alone the whole file counts for one engine.
  expect(alone.filePssBytes).toBeGreaterThan(80e6);
  expect(a.filePssBytes + b.filePssBytes).toBeLessThan(1.05 * alone.filePssBytes);
}, 60_000);
