/**
 * Writes GGUF version 3: header, metadata, tensor table, then each tensor's bytes at multiples of 32, as ggml's gguf.md
 * describes it. Tensors come as streams, so a file of gigabytes needs a few megabytes of memory.
 */
import { type FileHandle, open, rename } from 'node:fs/promises';

/** ggml's number, and how many bytes hold how many elements. */
export const ggmlTypes = {
  f32: { id: 0, elements: 1, bytes: 4 },
  f16: { id: 1, elements: 1, bytes: 2 },
  q4_0: { id: 2, elements: 32, bytes: 18 },
  q5_0: { id: 6, elements: 32, bytes: 22 },
  q8_0: { id: 8, elements: 32, bytes: 34 },
  q4_k: { id: 12, elements: 256, bytes: 144 },
  q6_k: { id: 14, elements: 256, bytes: 210 },
} as const;
export type GgmlType = keyof typeof ggmlTypes;

export type MetadataValue =
  | { u32: number }
  | { f32: number }
  | { text: string }
  | { flag: boolean }
  | { texts: string[] }
  | { i32s: number[] };

export interface GgufTensorSource {
  name: string;
  type: GgmlType;
  /** As PyTorch counts them, outermost first: [outFeatures, inFeatures]. */
  shape: number[];
  /** The tensor's bytes in order; as many as `tensorBytes` says. */
  content: () => Iterable<Uint8Array>;
}

const alignment = 32;

export function tensorBytes(type: GgmlType, shape: readonly number[]): number {
  const { elements, bytes } = ggmlTypes[type];
  const inFeatures = shape.at(-1)!;
  if (inFeatures % elements !== 0)
    throw new RangeError(`${type}: expected rows of a multiple of ${elements}, got ${inFeatures}`);
  return (shape.reduce((product, size) => product * size, 1) / elements) * bytes;
}

/** Writes the file under a temporary name first, so that a file of that name is always whole. */
export async function writeGguf(
  path: string,
  metadata: Record<string, MetadataValue>,
  tensors: readonly GgufTensorSource[],
): Promise<void> {
  const temporary = `${path}.part`;
  const file = await open(temporary, 'w');
  try {
    const header = encodeHeader(metadata, tensors);
    await file.write(header);
    let written = header.length;
    for (const { name, type, shape, content } of tensors) {
      const begin = written;
      for (const chunk of content()) {
        await file.write(chunk);
        written += chunk.length;
      }
      const expected = tensorBytes(type, shape);
      if (written - begin !== expected)
        throw new RangeError(`tensor '${name}': expected ${expected} bytes, got ${written - begin}`);
      written += await pad(file, written);
    }
  } finally {
    await file.close();
  }
  await rename(temporary, path);
}

async function pad(file: FileHandle, written: number): Promise<number> {
  const padding = Buffer.alloc(alignUp(written) - written);
  await file.write(padding);
  return padding.length;
}

const alignUp = (value: number) => Math.ceil(value / alignment) * alignment;

function encodeHeader(metadata: Record<string, MetadataValue>, tensors: readonly GgufTensorSource[]): Buffer {
  const parts: Buffer[] = [
    Buffer.from('GGUF'),
    u32(3),
    u64(tensors.length),
    u64(Object.keys(metadata).length),
  ];
  for (const [key, value] of Object.entries(metadata)) parts.push(text(key), encodeValue(value));
  let offset = 0;
  for (const { name, type, shape } of tensors) {
    parts.push(text(name), u32(shape.length));
    // GGUF counts dimensions innermost first.
    for (const size of shape.toReversed()) parts.push(u64(size));
    parts.push(u32(ggmlTypes[type].id), u64(offset));
    offset = alignUp(offset + tensorBytes(type, shape));
  }
  const header = Buffer.concat(parts);
  return Buffer.concat([header, Buffer.alloc(alignUp(header.length) - header.length)]);
}

const valueTypes = { u32: 4, i32: 5, f32: 6, flag: 7, text: 8, list: 9 };

function encodeValue(value: MetadataValue): Buffer {
  if ('u32' in value) return Buffer.concat([u32(valueTypes.u32), u32(value.u32)]);
  if ('f32' in value) return Buffer.concat([u32(valueTypes.f32), f32(value.f32)]);
  if ('flag' in value) return Buffer.concat([u32(valueTypes.flag), Buffer.from([value.flag ? 1 : 0])]);
  if ('text' in value) return Buffer.concat([u32(valueTypes.text), text(value.text)]);
  const list = (type: number, items: number, content: Buffer) =>
    Buffer.concat([u32(valueTypes.list), u32(type), u64(items), content]);
  if ('texts' in value)
    return list(valueTypes.text, value.texts.length, Buffer.concat(value.texts.map(text)));
  return list(valueTypes.i32, value.i32s.length, Buffer.from(Int32Array.from(value.i32s).buffer));
}

function u32(value: number): Buffer {
  const buffer = Buffer.alloc(4);
  buffer.writeUInt32LE(value);
  return buffer;
}

function u64(value: number): Buffer {
  const buffer = Buffer.alloc(8);
  buffer.writeBigUInt64LE(BigInt(value));
  return buffer;
}

function f32(value: number): Buffer {
  const buffer = Buffer.alloc(4);
  buffer.writeFloatLE(value);
  return buffer;
}

function text(value: string): Buffer {
  const bytes = Buffer.from(value);
  return Buffer.concat([u64(bytes.length), bytes]);
}
