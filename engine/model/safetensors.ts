/**
 * Reads the header of a safetensors file and finds its tensors; no tensor data is read.
 *
 * The format: 8 bytes of header length (little-endian), that many bytes of JSON, then the data. The JSON maps names to
 * `{dtype, shape, data_offsets: [begin, end]}`, relative to the data; `__metadata__` maps strings to strings. Tensors
 * fill the data without gaps or overlaps. All of that is checked here, since the file may come from anyone.
 * Source: https://github.com/huggingface/safetensors#format
 */
import { open } from 'node:fs/promises';
import { InputError, ioError, shown } from '../input-error.ts';

/** Bits per element. */
const dtypeBits = {
  BOOL: 8,
  U8: 8,
  I8: 8,
  F8_E4M3: 8,
  F8_E5M2: 8,
  U16: 16,
  I16: 16,
  F16: 16,
  BF16: 16,
  U32: 32,
  I32: 32,
  F32: 32,
  U64: 64,
  I64: 64,
  F64: 64,
} as const;
export type SafetensorsDtype = keyof typeof dtypeBits;

export interface SafetensorsTensor {
  name: string;
  dtype: SafetensorsDtype;
  shape: number[];
  /** Absolute in the file. */
  offsetBytes: number;
  sizeBytes: number;
}

export interface SafetensorsFile {
  path: string;
  sizeBytes: number;
  tensors: Map<string, SafetensorsTensor>;
}

/** The reference implementation's own bound. */
const maxHeaderBytes = 100_000_000;

/**
 * @throws InputError safetensors_invalid naming the tensor and the field; io_failed when the file cannot be read
 */
export async function readSafetensors(path: string): Promise<SafetensorsFile> {
  const { header, sizeBytes } = await readHeader(path);
  try {
    return {
      path,
      sizeBytes,
      tensors: parseHeader(header, sizeBytes - 8 - header.length, 8 + header.length),
    };
  } catch (error) {
    if (error instanceof InputError)
      throw new InputError(error.code, `${path}: ${error.message}`, { cause: error.cause });
    throw error;
  }
}

async function readHeader(path: string): Promise<{ header: Buffer; sizeBytes: number }> {
  const file = await open(path).catch((error) => {
    throw ioError(`open ${path}`, error);
  });
  try {
    const { size: sizeBytes } = await file.stat();
    if (sizeBytes < 8) refuse(`${path}: header length`, '8 bytes', `a file of ${sizeBytes}`);
    const length = Buffer.alloc(8);
    await file.read(length, 0, 8, 0);
    const headerBytes = length.readBigUInt64LE();
    if (headerBytes > BigInt(Math.min(maxHeaderBytes, sizeBytes - 8))) {
      const bound =
        sizeBytes - 8 < maxHeaderBytes
          ? `the file's other ${sizeBytes - 8} bytes`
          : `${maxHeaderBytes} bytes`;
      refuse(`${path}: header length`, `at most ${bound}`, `${headerBytes}`);
    }
    const header = Buffer.alloc(Number(headerBytes));
    const { bytesRead } = await file.read(header, 0, header.length, 8);
    if (bytesRead !== header.length) refuse(`${path}: header`, `${header.length} bytes`, `${bytesRead}`);
    return { header, sizeBytes };
  } catch (error) {
    throw error instanceof InputError ? error : ioError(`read ${path}`, error);
  } finally {
    await file.close();
  }
}

/** The tensors of a header, in the order of their data. */
export function parseHeader(
  header: Buffer,
  dataBytes: number,
  dataOffsetBytes: number,
): Map<string, SafetensorsTensor> {
  const text = header.toString('utf8');
  let parsed: unknown;
  try {
    parsed = JSON.parse(text);
  } catch (error) {
    throw new InputError('safetensors_invalid', 'header: expected JSON, got something else', {
      cause: error,
    });
  }
  if (!isRecord(parsed)) refuse('header', 'a JSON object', shown(parsed));
  if (numKeysWritten(text) !== numKeysKept(parsed)) refuse('header', 'each key once', 'a repeated key');

  const metadata = parsed.__metadata__;
  if (
    metadata !== undefined &&
    !(isRecord(metadata) && Object.values(metadata).every((v) => typeof v === 'string'))
  ) {
    refuse('__metadata__', 'an object of strings', shown(metadata));
  }
  const tensors = Object.entries(parsed)
    .filter(([name]) => name !== '__metadata__')
    .map(([name, entry]) => parseTensor(name, entry, dataBytes))
    .sort((a, b) => a.offsetBytes - b.offsetBytes || a.sizeBytes - b.sizeBytes);

  let end = 0;
  for (const tensor of tensors) {
    if (tensor.offsetBytes !== end) {
      const relation = tensor.offsetBytes < end ? 'an overlap' : 'a gap';
      refuse(
        `tensor ${shown(tensor.name)} data_offsets`,
        `to begin at ${end}, where the one before ends`,
        `${relation}`,
      );
    }
    end += tensor.sizeBytes;
  }
  if (end !== dataBytes) refuse('data', `${end} bytes, the sum of all tensors`, `${dataBytes}`);
  for (const tensor of tensors) tensor.offsetBytes += dataOffsetBytes;
  return new Map(tensors.map((tensor) => [tensor.name, tensor]));
}

/** One entry, its extent checked against the data region; its offset is still relative to that. */
function parseTensor(name: string, entry: unknown, dataBytes: number): SafetensorsTensor {
  const field = `tensor ${shown(name)}`;
  if (!isRecord(entry)) refuse(field, 'an object', shown(entry));
  const { dtype, shape, data_offsets: offsets } = entry;
  if (typeof dtype !== 'string' || !Object.hasOwn(dtypeBits, dtype)) {
    refuse(`${field} dtype`, `one of ${Object.keys(dtypeBits).join(', ')}`, shown(dtype));
  }
  if (!Array.isArray(shape) || !shape.every(isCount) || shape.length > 8) {
    refuse(`${field} shape`, 'up to 8 non-negative integers', shown(shape));
  }
  if (!Array.isArray(offsets) || offsets.length !== 2 || !offsets.every(isCount)) {
    refuse(`${field} data_offsets`, '[begin, end] as non-negative integers', shown(offsets));
  }
  const [begin, end] = offsets as [number, number];
  if (begin > end || end > dataBytes) {
    refuse(`${field} data_offsets`, `begin ≤ end ≤ ${dataBytes}, the bytes of data`, shown(offsets));
  }
  const sizeBytes =
    ((shape as number[]).reduce((a, b) => a * b, 1) * dtypeBits[dtype as SafetensorsDtype]) / 8;
  if (sizeBytes !== end - begin) {
    refuse(`${field} data_offsets`, `${sizeBytes} bytes for ${dtype} ${shown(shape)}`, `${end - begin}`);
  }
  return { name, dtype: dtype as SafetensorsDtype, shape: shape as number[], offsetBytes: begin, sizeBytes };
}

/** Keys as they stand in valid JSON text: colons outside strings. JSON.parse keeps only the last of equal keys. */
function numKeysWritten(text: string): number {
  let count = 0;
  for (let i = 0; i < text.length; i++) {
    if (text[i] === ':') count++;
    if (text[i] !== '"') continue;
    for (i++; text[i] !== '"'; i++) if (text[i] === '\\') i++;
  }
  return count;
}

function numKeysKept(value: unknown): number {
  if (Array.isArray(value)) return value.reduce((sum: number, item) => sum + numKeysKept(item), 0);
  if (!isRecord(value)) return 0;
  return Object.values(value).reduce((sum: number, item) => sum + 1 + numKeysKept(item), 0);
}

const isCount = (value: unknown): value is number => Number.isSafeInteger(value) && (value as number) >= 0;

const isRecord = (value: unknown): value is Record<string, unknown> =>
  typeof value === 'object' && value !== null && !Array.isArray(value);

function refuse(field: string, expected: string, got: string): never {
  throw new InputError('safetensors_invalid', `${field}: expected ${expected}, got ${got}`);
}
