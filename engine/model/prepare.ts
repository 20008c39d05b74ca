/**
 * Turns a base model into one packed file, laid out as the kernels read it, and finds that file again on later starts.
 * All engines of a node map the same file, so its weights are in memory once.
 *
 * The file: magic `MOTETPK1`, u32 format version, u64 header length, sha256 of the header (32 bytes), the header as JSON,
 * zeros up to a multiple of 4096, then the data. Tensors begin at multiples of 64 (large ones at multiples of 4096), with
 * offsets relative to the data. Integers are little-endian. The header holds the sha256 of the data.
 *
 * A file appears under its name only when it is whole: it is written under a temporary name, synced, and then linked.
 * Its name is a hash of what it was made from, so a changed source or setting makes another file.
 */
import { createHash } from 'node:crypto';
import { type FileHandle, mkdir, open, realpath, stat } from 'node:fs/promises';
import { availableParallelism } from 'node:os';
import { join } from 'node:path';
import { type ModelDims, type PackedTensor, packedBytes, packTensor, readIn } from '../../native/index.ts';
import { InputError, ioError } from '../input-error.ts';
import {
  freeBytesAt,
  hashRange,
  publishFile,
  removeTemporary,
  sweepTemporaries,
  temporaryPath,
} from '../temporary-files.ts';
import type { BaseModel, ModelTensor } from './base-model.ts';

const magic = Buffer.from('MOTETPK1');
/** Raise it when the file's layout, the packed formats or a quantiser change: old files are then made again. */
const formatVersion = 1;
const preambleBytes = magic.length + 4 + 8 + 32;
const pageBytes = 4096;
const maxHeaderBytes = 64 * 2 ** 20;

export interface PreparedModel {
  packedPath: string;
  dims: ModelDims;
  /** With offsets in the file. */
  tensors: PackedTensor[];
  /** sha256 of the data, hex. */
  dataSha256: string;
  /** Whether the file was there already. */
  isReused: boolean;
}

export interface PrepareOptions {
  /** The packed file goes to `packed/` in it. */
  cacheFolder: string;
  /** Read an existing file through and compare its sha256: about a second for 2 GB. Default true. */
  verifyData?: boolean;
  /** After each tensor: how much of the data is packed, 0 to 1, and the tensor's name in the source. */
  onProgress?: (fraction: number, name: string) => void;
}

/** What the header's JSON holds. */
interface PackedHeader {
  key: string;
  architecture: string;
  quantization: string;
  dims: SerializedDims;
  /** Offsets relative to the data. */
  tensors: PackedTensor[];
  dataBytes: number;
  dataSha256: string;
}

/**
 * @throws InputError model_invalid when a tensor cannot be packed; io_failed for the disk (full, unreadable)
 */
export async function prepareModel(model: BaseModel, options: PrepareOptions): Promise<PreparedModel> {
  const folder = join(options.cacheFolder, 'packed');
  await mkdir(folder, { recursive: true }).catch((error) => {
    throw ioError(`make folder ${folder}`, error);
  });
  await sweepTemporaries(folder);
  const key = await sourceKey(model);
  const path = join(folder, `${key}.motet`);

  const existing = await openPacked(path, key, options.verifyData ?? true);
  if (existing !== null) return existing;

  const temporary = temporaryPath(folder, key);
  try {
    await writePacked(model, key, temporary, options.onProgress);
    await publishFile(temporary, path, async () => (await openPacked(path, key, true)) !== null);
    const made = await openPacked(path, key, false);
    if (made === null)
      throw new InputError(
        'io_failed',
        `packed file ${path}: expected what was just written, got something else`,
      );
    return { ...made, isReused: false };
  } catch (error) {
    throw error instanceof InputError ? error : ioError(`write packed file ${temporary}`, error);
  } finally {
    await removeTemporary(temporary);
  }
}

/** Names the packed file by all that goes into it. Source bytes are known by path, size and time of change. */
async function sourceKey(model: BaseModel): Promise<string> {
  const hash = createHash('sha256').update(`${formatVersion} ${model.quantization}\n`);
  for (const source of model.sourcePaths) {
    try {
      const path = await realpath(source);
      const { size, mtimeNs } = await stat(path, { bigint: true });
      hash.update(`${JSON.stringify(path)} ${size} ${mtimeNs}\n`);
    } catch (error) {
      throw ioError(`read ${source}`, error);
    }
  }
  // config.json decides too: the plan and the dimensions are all that it becomes.
  hash.update(
    JSON.stringify([model.architecture, serializeDims(model.dims), model.tensors.map(planIdentity)]),
  );
  return hash.digest('hex').slice(0, 32);
}

const planIdentity = ({ role, layer, format, sourceOffsetBytes, sourceType, rows, addend }: ModelTensor) => [
  role,
  layer,
  format,
  sourceOffsetBytes,
  sourceType,
  rows !== null,
  addend,
];

/** Places for all tensors, in the model's order. */
function layOut(tensors: ModelTensor[]): { placed: PackedTensor[]; dataBytes: number } {
  let end = 0;
  const placed = tensors.map(({ role, layer, format, outFeatures, inFeatures }) => {
    const sizeBytes = packedBytes(format, outFeatures, inFeatures);
    const offsetBytes = roundUp(end, sizeBytes >= pageBytes ? pageBytes : 64);
    end = offsetBytes + sizeBytes;
    return { role, layer, format, outFeatures, inFeatures, offsetBytes, sizeBytes };
  });
  return { placed, dataBytes: roundUp(end, pageBytes) };
}

const roundUp = (value: number, multiple: number) => Math.ceil(value / multiple) * multiple;

async function writePacked(
  model: BaseModel,
  key: string,
  path: string,
  onProgress: PrepareOptions['onProgress'],
): Promise<void> {
  const { placed, dataBytes } = layOut(model.tensors);
  const header: PackedHeader = {
    key,
    architecture: model.architecture,
    quantization: model.quantization,
    dims: serializeDims(model.dims),
    tensors: placed,
    dataBytes,
    dataSha256: '0'.repeat(64), // as long as the real one, so that the header's length is known now
  };
  const dataOffset = dataOffsetBytes(Buffer.byteLength(JSON.stringify(header)));

  const file = await open(path, 'wx+');
  try {
    await checkFreeSpace(path, dataOffset + dataBytes);
    await file.truncate(dataOffset + dataBytes);
    await packAll(model.tensors, placed, path, dataOffset, onProgress);
    header.dataSha256 = await hashData(file, path, dataOffset, dataBytes);
    await writeAll(file, encodeHeader(header), 0);
    await file.sync();
  } finally {
    await file.close();
  }
}

async function checkFreeSpace(path: string, neededBytes: number): Promise<void> {
  const freeBytes = await freeBytesAt(path);
  if (freeBytes < neededBytes) {
    throw new InputError(
      'io_failed',
      `disk of ${path}: expected ${neededBytes} bytes free for the packed model, got ${freeBytes}`,
    );
  }
}

/** The largest first, so that none of them is left to run alone at the end. */
async function packAll(
  tensors: ModelTensor[],
  placed: PackedTensor[],
  path: string,
  dataOffset: number,
  onProgress: PrepareOptions['onProgress'],
): Promise<void> {
  const order = placed.map((_, index) => index).sort((a, b) => placed[b]!.sizeBytes - placed[a]!.sizeBytes);
  const totalBytes = placed.reduce((sum, tensor) => sum + tensor.sizeBytes, 0);
  let doneBytes = 0;
  let failed = false;
  const work = async () => {
    for (let index = order.shift(); index !== undefined && !failed; index = order.shift()) {
      const { name, ...tensor } = tensors[index]!;
      try {
        await packTensor({
          sourcePath: tensor.sourcePath,
          sourceOffsetBytes: tensor.sourceOffsetBytes,
          sourceType: tensor.sourceType,
          outFeatures: tensor.outFeatures,
          inFeatures: tensor.inFeatures,
          rows: tensor.rows,
          addend: tensor.addend,
          target: tensor.format,
          outputPath: path,
          outputOffsetBytes: dataOffset + placed[index]!.offsetBytes,
        });
      } catch (error) {
        failed = true;
        const { code, message } = error as NodeJS.ErrnoException;
        const ours = code === 'io_failed' ? 'io_failed' : 'model_invalid';
        throw new InputError(ours, `${tensor.sourcePath}: tensor '${name}': ${message}`, { cause: error });
      }
      doneBytes += placed[index]!.sizeBytes;
      onProgress?.(doneBytes / totalBytes, name);
    }
  };
  // A worker that fails stops the others after their tensor; only then may the file go.
  const workers = Array.from({ length: Math.min(availableParallelism(), 4) }, work);
  const results = await Promise.allSettled(workers);
  const failure = results.find((result) => result.status === 'rejected');
  if (failure !== undefined) throw failure.reason;
}

/** A packed file that is whole and of that key, else null: it is then made again. */
async function openPacked(path: string, key: string, verifyData: boolean): Promise<PreparedModel | null> {
  const file = await open(path).catch((error) => {
    if (error.code === 'ENOENT') return null;
    throw ioError(`open packed file ${path}`, error);
  });
  if (file === null) return null;
  try {
    const preamble = Buffer.alloc(preambleBytes);
    await file.read(preamble, 0, preambleBytes, 0);
    const headerBytes = Number(preamble.readBigUInt64LE(12));
    const isOurs = preamble.subarray(0, 8).equals(magic) && preamble.readUInt32LE(8) === formatVersion;
    if (!isOurs || headerBytes > maxHeaderBytes) return null;

    const json = Buffer.alloc(headerBytes);
    await file.read(json, 0, headerBytes, preambleBytes);
    if (!createHash('sha256').update(json).digest().equals(preamble.subarray(20))) return null;
    const header = JSON.parse(json.toString('utf8')) as PackedHeader;
    const dataOffset = dataOffsetBytes(headerBytes);
    if (header.key !== key || (await file.stat()).size !== dataOffset + header.dataBytes) return null;
    if (verifyData) {
      await readIn(path);
      if ((await hashData(file, path, dataOffset, header.dataBytes)) !== header.dataSha256) return null;
    }
    return {
      packedPath: path,
      dims: parseDims(header.dims),
      tensors: header.tensors.map((tensor) => ({ ...tensor, offsetBytes: dataOffset + tensor.offsetBytes })),
      dataSha256: header.dataSha256,
      isReused: true,
    };
  } catch (error) {
    throw error instanceof InputError ? error : ioError(`read packed file ${path}`, error);
  } finally {
    await file.close();
  }
}

const dataOffsetBytes = (headerBytes: number) => roundUp(preambleBytes + headerBytes, pageBytes);

function encodeHeader(header: PackedHeader): Buffer {
  const json = Buffer.from(JSON.stringify(header));
  const preamble = Buffer.alloc(preambleBytes);
  magic.copy(preamble);
  preamble.writeUInt32LE(formatVersion, 8);
  preamble.writeBigUInt64LE(BigInt(json.length), 12);
  createHash('sha256').update(json).digest().copy(preamble, 20);
  return Buffer.concat([preamble, json]);
}

async function writeAll(file: FileHandle, bytes: Buffer, position: number): Promise<void> {
  for (let done = 0; done < bytes.length; ) {
    done += (await file.write(bytes, done, bytes.length - done, position + done)).bytesWritten;
  }
}

async function hashData(file: FileHandle, path: string, begin: number, sizeBytes: number): Promise<string> {
  const hash = createHash('sha256');
  const done = await hashRange(hash, file, begin, sizeBytes);
  if (done < sizeBytes)
    throw new InputError('io_failed', `${path}: expected ${sizeBytes} bytes of data, got ${done}`);
  return hash.digest('hex');
}

type SerializedDims = Omit<ModelDims, 'slidingWindows' | 'ropeTableIndex' | 'ropeTables'> & {
  slidingWindows: number[];
  ropeTableIndex: number[];
  ropeTables: { inverseFrequencies: number[]; attentionFactor: number }[];
};

const serializeDims = (dims: ModelDims): SerializedDims => ({
  ...dims,
  slidingWindows: [...dims.slidingWindows],
  ropeTableIndex: [...dims.ropeTableIndex],
  ropeTables: dims.ropeTables.map((table) => ({
    ...table,
    inverseFrequencies: [...table.inverseFrequencies],
  })),
});

const parseDims = (dims: SerializedDims): ModelDims => ({
  ...dims,
  slidingWindows: Int32Array.from(dims.slidingWindows),
  ropeTableIndex: Int32Array.from(dims.ropeTableIndex),
  ropeTables: dims.ropeTables.map((table) => ({
    ...table,
    inverseFrequencies: Float64Array.from(table.inverseFrequencies),
  })),
});
