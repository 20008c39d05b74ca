/**
 * Unpacks a layer of an image: the wanted files of a tar archive, plain, gzip or zstd. Nothing leads out of the folder: links
 * and devices are left out, and names that would are refused. What a layer deletes of the layers below it (`.wh.NAME`) goes.
 */
import { createReadStream, createWriteStream } from 'node:fs';
import { mkdir, rm } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import { pipeline } from 'node:stream/promises';
import { createGunzip, createZstdDecompress } from 'node:zlib';
import { extract as tarExtract } from 'tar-stream';
import { unavailable } from '../download.ts';
import { EngineError } from '../errors.ts';
import { type LayerForm, safeName } from './remote-files.ts';

/** Of one archive; a file system of a distribution has about 50,000. */
const maxEntries = 500_000;
const whiteout = '.wh.';
const opaque = '.wh..wh..opq';

export interface UnpackOptions {
  form: LayerForm;
  isWanted: (name: string) => boolean;
  /** Before a file of so many bytes is written: makes room, or throws. */
  onFile: (sizeBytes: number) => Promise<void>;
  signal: AbortSignal;
  /** For messages. */
  where: string;
}

/** @throws EngineError source_unavailable, or what onFile throws */
export async function unpackLayer(path: string, folder: string, options: UnpackOptions): Promise<void> {
  const { form, where, signal } = options;
  const extract = tarExtract();
  const unzip = form === 'tar' ? [] : [form === 'tar+gzip' ? createGunzip() : createZstdDecompress()];
  const feeding = pipeline([createReadStream(path), ...unzip, extract], { signal });
  feeding.catch(() => {}); // awaited below
  try {
    let numEntries = 0;
    for await (const entry of extract) {
      if (++numEntries > maxEntries)
        throw unavailable(`${where}: expected at most ${maxEntries} files in a layer, got more`);
      const { type, name } = entry.header;
      const safe = safeName(name);
      if (safe !== null && (type === 'file' || type === 'contiguous-file')) {
        await unpackFile(entry, safe, entry.header.size ?? 0, folder, options);
      }
      entry.resume();
    }
    await feeding;
  } catch (error) {
    extract.destroy();
    if (signal.aborted)
      throw signal.reason instanceof EngineError ? signal.reason : unavailable(`${where}: it took too long`);
    if (error instanceof EngineError) throw error;
    const { code, message } = error as NodeJS.ErrnoException;
    throw unavailable(`${where}: a layer cannot be unpacked (${code ?? message})`, error);
  } finally {
    await feeding.catch(() => {});
  }
}

async function unpackFile(
  entry: AsyncIterable<unknown>,
  name: string,
  sizeBytes: number,
  folder: string,
  { isWanted, onFile, signal }: UnpackOptions,
): Promise<void> {
  const at = name.lastIndexOf('/') + 1;
  const base = name.slice(at);
  if (base === opaque) {
    await rm(join(folder, name.slice(0, at)), { recursive: true, force: true });
  } else if (base.startsWith(whiteout)) {
    await rm(join(folder, name.slice(0, at), base.slice(whiteout.length)), { recursive: true, force: true });
  } else if (isWanted(name)) {
    await onFile(sizeBytes);
    const path = join(folder, name);
    await mkdir(dirname(path), { recursive: true });
    await pipeline(entry, createWriteStream(path), { signal });
  }
}
