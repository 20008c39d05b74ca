/**
 * What the disk tier does with files. They are people's prompts: folders and files are their owner's alone, links are not
 * followed, and what is no plain file is not opened for long.
 */
import {
  chmod,
  constants,
  lstat,
  mkdir,
  open,
  readdir,
  rename,
  rm,
  rmdir,
  statfs,
  utimes,
} from 'node:fs/promises';
import { join } from 'node:path';

export interface Listed {
  name: string;
  isFolder: boolean;
  /** Of a file. */
  sizeBytes: number;
  /** Last time of change, in wall clock milliseconds. */
  changedMs: number;
}

/** The operations, each off the main thread; tests put a slow or broken disk in its place. */
export interface DiskFiles {
  /** With those above it. */
  makeFolder(path: string): Promise<void>;
  /** Plain files and folders in it; a folder that is not there has none. */
  list(folder: string): Promise<Listed[]>;
  /** Writes a file that was not there. */
  write(path: string, parts: readonly Uint8Array[]): Promise<void>;
  /** @returns all of it; null: it is not a plain file of that size */
  read(path: string, sizeBytes: number): Promise<Buffer<ArrayBuffer> | null>;
  rename(from: string, to: string): Promise<void>;
  /** Whatever is there; what is not there is removed. */
  remove(path: string): Promise<void>;
  /** If it is empty and can be removed. */
  removeFolder(path: string): Promise<void>;
  setChanged(path: string, ms: number): Promise<void>;
  /** What the disk has for us; 0 when it takes no more files. */
  freeBytes(path: string): Promise<number>;
}

/** Looked at side by side. */
const maxLooks = 64;

export const diskFiles: DiskFiles = {
  async makeFolder(path) {
    await mkdir(path, { recursive: true, mode: 0o700 });
    // One that was there already may be open to others; that it cannot be closed is no reason to do without it.
    await chmod(path, 0o700).catch(() => {});
  },

  async list(folder) {
    const entries = await readdir(folder, { withFileTypes: true }).catch(nothingWhenGone);
    const listed: Listed[] = [];
    for (let i = 0; i < (entries?.length ?? 0); i += maxLooks) {
      const some = entries!.slice(i, i + maxLooks).filter((entry) => entry.isFile() || entry.isDirectory());
      const found = some.map(async (entry) => {
        const isFolder = entry.isDirectory();
        const info = isFolder ? null : await lstat(join(folder, entry.name)).catch(nothingWhenGone);
        if (!isFolder && info === null) return [];
        return [{ name: entry.name, isFolder, sizeBytes: info?.size ?? 0, changedMs: info?.mtimeMs ?? 0 }];
      });
      listed.push(...(await Promise.all(found)).flat());
    }
    return listed;
  },

  async write(path, parts) {
    const file = await open(path, 'wx', 0o600);
    try {
      for (const part of parts) await file.writeFile(part);
    } finally {
      await file.close();
    }
  },

  async read(path, sizeBytes) {
    const { O_RDONLY, O_NOFOLLOW, O_NONBLOCK } = constants;
    const file = await open(path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK).catch((error) => {
      if (error.code === 'ELOOP') return null;
      throw error;
    });
    if (file === null) return null;
    try {
      const info = await file.stat();
      if (!info.isFile() || info.size !== sizeBytes) return null;
      const bytes = Buffer.allocUnsafeSlow(sizeBytes);
      for (let done = 0; done < sizeBytes; ) {
        const { bytesRead } = await file.read(bytes, done, sizeBytes - done, done);
        if (bytesRead === 0) return null;
        done += bytesRead;
      }
      return bytes;
    } finally {
      await file.close();
    }
  },

  rename,

  remove: (path) => rm(path, { recursive: true, force: true }),

  async removeFolder(path) {
    await rmdir(path).catch(() => {});
  },

  async setChanged(path, ms) {
    await utimes(path, ms / 1000, ms / 1000);
  },

  async freeBytes(path) {
    const { bavail, bsize, files, ffree } = await statfs(path);
    // Some file systems do not count files.
    return files > 0 && ffree === 0 ? 0 : bavail * bsize;
  },
};

function nothingWhenGone(error: NodeJS.ErrnoException): null {
  if (error.code === 'ENOENT' || error.code === 'ENOTDIR') return null;
  throw error;
}
