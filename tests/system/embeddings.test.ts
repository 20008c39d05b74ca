/**
 * Hidden states against transformers + PEFT: through the head they must give the goldens' logits, for the base and with the
 * adapter. A head's rows are taken from the checkpoint, so the sum here is over what `/v1/embeddings` pools.
 */
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { goldensFolder, readGolden } from '../fixtures/golden.ts';
import { loadAdapter, open, prepare } from '../fixtures/models.ts';
import { pagesFor, stepBatch } from '../fixtures/steps.ts';

/** Rows of the head in f32, of a checkpoint in bf16. */
async function readHead(folder: string): Promise<{ row(id: number): Float32Array }> {
  const index = JSON.parse(await readFile(join(folder, 'model.safetensors.index.json'), 'utf8'));
  const bytes = await readFile(join(folder, index.weight_map['lm_head.weight']));
  const numHeaderBytes = Number(bytes.readBigUInt64LE());
  const { dtype, shape, data_offsets } = JSON.parse(bytes.toString('utf8', 8, 8 + numHeaderBytes))[
    'lm_head.weight'
  ];
  expect(dtype).toBe('BF16');
  const begin = 8 + numHeaderBytes + data_offsets[0];
  return {
    row(id) {
      const row = new Float32Array(shape[1]);
      const bits = new Uint32Array(row.buffer);
      for (let i = 0; i < row.length; i++)
        bits[i] = bytes.readUInt16LE(begin + 2 * (id * row.length + i)) << 16;
      return row;
    },
  };
}

test.each(['base', 'adapter'])(
  'hidden states of llama3 with %s are those of transformers and PEFT',
  async (name) => {
    const folder = join(goldensFolder, 'tiny/llama3');
    const golden = readGolden('tiny/llama3', name);
    const model = await prepare(folder);
    const runtime = await open(model, { activations: 'f32', deviceMemoryBytes: 64 << 20 });
    const head = await readHead(folder);
    const { handle } = await loadAdapter(runtime, model, join(folder, 'adapter'), 100);
    const { hiddenSize } = model.dims;
    let position = 0;
    let worst = 0;
    for (const { ids, adapter } of golden.sequences) {
      const part = {
        tokens: ids,
        start: 0,
        count: ids.length,
        blocks: pagesFor(runtime, ids.length),
        adapters: adapter === null ? [] : ([[handle, 1]] as [number, number][]),
      };
      const { hidden } = await runtime.step(stepBatch([part], { hiddenRows: ids.map((_, i) => i) }));
      for (let i = 0; i < ids.length; i++, position++) {
        const row = hidden!.subarray(i * hiddenSize, (i + 1) * hiddenSize);
        const logit = (id: number) => head.row(id).reduce((sum, weight, at) => sum + weight * row[at]!, 0);
        for (let t = 0; t < golden.numTop; t++) {
          const at = position * golden.numTop + t;
          worst = Math.max(worst, Math.abs(logit(golden.topIds[at]!) - golden.topLogits[at]!));
        }
      }
    }
    expect(position).toBe(golden.numPositions);
    expect(worst).toBeLessThan(1e-3);
    console.log(`largest logit error over ${position} positions: ${worst.toExponential(1)}`);
    runtime.close();
  },
);
