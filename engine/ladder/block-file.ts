/**
 * A KV block as a file. Integers are little endian; then come the block's bytes.
 *
 *   offset  bytes
 *        0      8  magic MOTETKVB
 *        8      4  format version
 *       12      4  bytes of the block
 *       16     32  SHA-256 of the model key
 *       48     32  the block's hash
 *       80     32  SHA-256 of the block's bytes
 *
 * All of it is known of a block that is right, so a file is right when it begins with just this. One that was cut, changed,
 * swapped for another block's or comes from another model does not.
 */
import { hash, webcrypto } from 'node:crypto';
import type { ModelDims } from '../../native/index.ts';
import type { BlockHash } from './block-hash.ts';

const magic = 'MOTETKVB';
/** Raise it when the layout of the file or of KV in a page changes. */
const formatVersion = 1;
export const headerBytes = 112;

/** All that KV bytes depend on beside the voice and the tokens. Two engines for which it is the same may share blocks. */
export interface KvOrigin {
  /** SHA-256 of the packed weights. */
  weightsSha256: string;
  dims: ModelDims;
  activations: string;
  kvType: string;
  adapterQuantization: string;
  pageBytes: number;
  blockTokens: number;
  /**
   * SHA-256 of the compiled kernels: another build may round in another way. The instruction set is not in here, since all
   * variants of a kernel agree bit for bit (native/README.md).
   */
  kernelsSha256: string;
}

/** 64 hex digits. */
export function modelKeyOf(origin: KvOrigin): string {
  // Typed arrays as lists: as objects they would be as good, and longer.
  const plain = (_: string, value: unknown) =>
    ArrayBuffer.isView(value) ? [...(value as Float32Array)] : value;
  const sorted = Object.entries(origin).sort(([a], [b]) => (a < b ? -1 : 1));
  return hash('sha256', JSON.stringify([formatVersion, sorted], plain));
}

/** Of bytes that nobody changes meanwhile. The work is a thread's of the pool. */
export async function sha256(bytes: Uint8Array<ArrayBuffer>): Promise<Buffer> {
  return Buffer.from(await webcrypto.subtle.digest('SHA-256', bytes));
}

/** @param bytesSha256 of the block's bytes */
export function headerOf(
  modelKey: string,
  block: BlockHash,
  numBytes: number,
  bytesSha256: Buffer,
): Buffer<ArrayBuffer> {
  const header = Buffer.alloc(headerBytes);
  header.write(magic, 0, 'latin1');
  header.writeUInt32LE(formatVersion, 8);
  header.writeUInt32LE(numBytes, 12);
  header.write(modelKey, 16, 'hex');
  header.write(block, 48, 'latin1');
  bytesSha256.copy(header, 80);
  return header;
}

/** @returns the block's bytes; null: the file is not this block of this model */
export async function blockIn(
  file: Buffer<ArrayBuffer>,
  modelKey: string,
  block: BlockHash,
): Promise<Buffer<ArrayBuffer> | null> {
  const bytes = file.subarray(headerBytes);
  const expected = headerOf(modelKey, block, bytes.length, await sha256(bytes));
  return file.subarray(0, headerBytes).equals(expected) ? bytes : null;
}
