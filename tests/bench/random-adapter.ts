/** Writes PEFT folders with random weights in bf16: speed depends on shapes only. */
import { mkdir, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import type { ModelDims } from '../../native/index.ts';

/** What an adapter's shapes depend on. */
export type AdapterDims = Pick<
  ModelDims,
  'numLayers' | 'hiddenSize' | 'intermediateSize' | 'numHeads' | 'numKvHeads' | 'headDim'
>;

const shapes = (
  dims: AdapterDims,
): Record<string, [parent: string, outFeatures: number, inFeatures: number]> => {
  const { hiddenSize: hidden, intermediateSize: inter } = dims;
  const q = dims.numHeads * dims.headDim;
  const kv = dims.numKvHeads * dims.headDim;
  return {
    q_proj: ['self_attn', q, hidden],
    k_proj: ['self_attn', kv, hidden],
    v_proj: ['self_attn', kv, hidden],
    o_proj: ['self_attn', hidden, q],
    gate_proj: ['mlp', inter, hidden],
    up_proj: ['mlp', inter, hidden],
    down_proj: ['mlp', hidden, inter],
  };
};

export const allLinear = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj'];

/** @param seed also says which adapter: another seed, another digest */
export async function writeRandomAdapter(
  folder: string,
  dims: AdapterDims,
  rank: number,
  targets: string[],
  seed: number,
): Promise<void> {
  let state = seed + 1;
  const header: Record<string, object> = {};
  const parts: Buffer[] = [];
  let offset = 0;
  const add = (name: string, shape: [number, number]) => {
    const values = new Uint16Array(shape[0] * shape[1]);
    for (let i = 0; i < values.length; i++) {
      state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
      // bf16 of magnitude 2^-7 to 2^-6 with a random sign and mantissa.
      values[i] = ((state >>> 16) & 0x807f) | (120 << 7);
    }
    parts.push(Buffer.from(values.buffer));
    header[name] = { dtype: 'BF16', shape, data_offsets: [offset, offset + values.byteLength] };
    offset += values.byteLength;
  };
  for (let layer = 0; layer < dims.numLayers; layer++) {
    for (const target of targets) {
      const [parent, outFeatures, inFeatures] = shapes(dims)[target]!;
      const name = `base_model.model.model.layers.${layer}.${parent}.${target}`;
      add(`${name}.lora_A.weight`, [rank, inFeatures]);
      add(`${name}.lora_B.weight`, [outFeatures, rank]);
    }
  }
  const json = Buffer.from(JSON.stringify(header));
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(json.length));
  await mkdir(folder, { recursive: true });
  await writeFile(join(folder, 'adapter_model.safetensors'), Buffer.concat([length, json, ...parts]));
  const config = {
    peft_type: 'LORA',
    task_type: 'CAUSAL_LM',
    r: rank,
    lora_alpha: rank,
    target_modules: targets,
    bias: 'none',
  };
  await writeFile(join(folder, 'adapter_config.json'), JSON.stringify(config));
}
