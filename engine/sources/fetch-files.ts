/**
 * Brings the files of a model or an adapter into a folder of ours: one after another, each in pieces over several connections,
 * each checked against the hash that its source names. What is there already is gone on with.
 */
import { createHash } from 'node:crypto';
import { mkdir, open, readdir, rename, rm, utimes } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import { checkFreeSpace, type Downloaded, download, type RequestOptions, unavailable } from '../download.ts';
import { hashFile, hashRange } from '../temporary-files.ts';
import { chooseFiles, isWanted, type RemoteFile, type RemoteFiles, type SourceKind } from './remote-files.ts';
import { unpackLayer } from './tar-layer.ts';

export interface FetchOptions {
  kind: SourceKind;
  /** The URI, for messages. */
  where: string;
  request: RequestOptions;
  /** Of the file of that name. */
  maxBytes: (name: string) => number;
  /** Before more is written: so many bytes the folder will have, in all. Makes room, or throws. */
  onSize?: (sizeBytes: number) => Promise<void>;
  /** null: the source does not say how many there are. */
  onProgress?: (doneBytes: number, sizeBytes: number | null) => void;
}

export interface FetchedFile {
  name: string;
  sizeBytes: number;
  /** Hex. */
  sha256: string;
}

/** Connections for one file. All but one of them hold up to 8 MiB in memory. */
const maxConnections = 4;
/** Others take a folder that has not been touched for ten minutes for abandoned. */
const touchMs = 60_000;
const layersName = '.layers';

/**
 * @param folder it exists, and has nothing else in it in the end
 * @throws EngineError source_unavailable, adapter_invalid when a file is too large, or what onSize throws
 */
export async function fetchFiles(
  remote: RemoteFiles,
  folder: string,
  options: FetchOptions,
): Promise<FetchedFile[]> {
  const hasLayers = remote.files.some(({ form }) => form !== 'file');
  const root = hasLayers ? join(folder, layersName) : folder;
  const sizes = remote.files.map(({ sizeBytes }) => sizeBytes);
  const totalBytes = sizes.includes(null) ? null : sizes.reduce<number>((sum, size) => sum + size!, 0);
  const fetched: FetchedFile[] = [];
  let doneBytes = 0;
  let unpackedBytes = 0;
  let touchedMs = performance.now();
  const touch = () => {
    const now = performance.now();
    if (now - touchedMs < touchMs) return;
    touchedMs = now;
    const date = new Date();
    utimes(folder, date, date).catch(() => {}); // at worst another start begins anew
  };
  // What an earlier try unpacked may be of other layers.
  if (hasLayers) await rm(root, { recursive: true, force: true });
  for (const file of remote.files) {
    const before = doneBytes + unpackedBytes;
    const path = file.form === 'file' ? join(root, file.name) : join(folder, `.blob-${file.name}`);
    await mkdir(dirname(path), { recursive: true });
    const { sizeBytes, sha256 } = await fetchFile(file, path, remote, {
      ...options,
      onSize: async (bytes) => options.onSize?.(before + bytes),
      onProgress(bytes, ofFile) {
        touch();
        options.onProgress?.(doneBytes + bytes, totalBytes ?? (remote.files.length === 1 ? ofFile : null));
      },
    });
    doneBytes += sizeBytes;
    if (file.form === 'file') {
      fetched.push({ name: file.name, sizeBytes, sha256 });
      continue;
    }
    await unpackLayer(path, root, {
      form: file.form,
      isWanted: (name) => isWanted(options.kind, name),
      async onFile(bytes) {
        touch();
        unpackedBytes += bytes;
        const limit = options.maxBytes(file.name);
        if (unpackedBytes > limit)
          throw unavailable(`${options.where}: expected at most ${limit} bytes in its layers, got more`);
        await options.onSize?.(doneBytes + unpackedBytes);
        await checkFreeSpace(folder, bytes);
      },
      signal: options.request.signal,
      where: options.where,
    });
    await rm(path);
  }
  const files = hasLayers ? await chooseUnpacked(root, folder, options) : fetched;
  const names = new Set(files.map(({ name }) => name));
  for (const entry of await readdir(folder)) {
    if (!names.has(entry)) await rm(join(folder, entry), { recursive: true });
  }
  return files;
}

/** What is wanted of the unpacked layers, moved to the top of the folder. */
async function chooseUnpacked(root: string, folder: string, options: FetchOptions): Promise<FetchedFile[]> {
  const entries = await readdir(root, { recursive: true, withFileTypes: true }).catch(() => []);
  const all = entries
    .filter((entry) => entry.isFile())
    .map((entry) => join(entry.parentPath, entry.name).slice(root.length + 1));
  const { folder: chosen, names } = chooseFiles(options.kind, all, options.where);
  const files: FetchedFile[] = [];
  for (const name of names) {
    const path = join(folder, name);
    await rename(join(root, chosen, name), path);
    const file = await open(path, 'r+');
    try {
      await file.sync();
      files.push({ name, sizeBytes: (await file.stat()).size, sha256: (await hashFile(path))! });
    } finally {
      await file.close();
    }
  }
  return files;
}

/** One file to `path`, going on with what is there unless that turns out not to fit. */
export async function fetchFile(
  file: RemoteFile,
  path: string,
  remote: RemoteFiles,
  options: FetchOptions,
): Promise<Downloaded> {
  const { where, request, onSize, onProgress } = options;
  const { authorize, explain } = remote;
  const handle = await open(path, 'a+').then(async (made) => {
    await made.close();
    return open(path, 'r+'); // appending would ignore positions
  });
  try {
    for (let isSecondTry = false; ; isSecondTry = true) {
      const hadBytes = (await handle.stat()).size;
      const fetched = await download(file.url, handle, {
        ...request,
        ...(authorize && { authorize }),
        ...(explain && { explain }),
        maxBytes: options.maxBytes(file.name),
        sizeBytes: file.sizeBytes,
        maxConnections,
        async onSize(sizeBytes, missingBytes) {
          await onSize?.(sizeBytes);
          await checkFreeSpace(path, missingBytes);
        },
        ...(onProgress && { onProgress }),
      });
      if (file.hash === null) return fetched;
      const actual =
        file.hash.algorithm === 'sha256' ? fetched.sha256 : await gitHash(handle, fetched.sizeBytes);
      if (actual === file.hash.hex) return fetched;
      await handle.truncate(0);
      if (hadBytes > 0 && !isSecondTry) continue;
      throw unavailable(
        `${where}: ${file.name}: expected ${file.hash.algorithm} ${file.hash.hex}, as its source says, got ${actual}`,
      );
    }
  } finally {
    await handle.close();
  }
}

/** As git names the content of a file. */
async function gitHash(handle: Parameters<typeof hashRange>[1], sizeBytes: number): Promise<string> {
  const hash = createHash('sha1').update(`blob ${sizeBytes}\0`);
  await hashRange(hash, handle, 0, sizeBytes);
  return hash.digest('hex');
}
