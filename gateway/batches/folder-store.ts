// A store in a folder, which several gateways may share when its file system knows link(2) and rename(2), as NFS does.
// A content is written beside its place, flushed, and moved there, so that a kill leaves a file without a name in `tmp`.

import { randomUUID } from 'node:crypto';
import { createReadStream } from 'node:fs';
import { type FileHandle, link, mkdir, open, readdir, rename, rm, stat } from 'node:fs/promises';
import { dirname, join, resolve } from 'node:path';
import type { Appender, Range, Store, Stored } from './store.ts';

/** What a process that was killed has left in `tmp` for so long is nobody's. An upload takes minutes at most. */
const leftoverMs = 24 * 3_600_000;

export class FolderStore implements Store {
  readonly name: string;

  private constructor(folder: string) {
    this.name = folder;
  }

  /** @throws when the folder cannot be made or written to */
  static async open(folder: string): Promise<FolderStore> {
    const store = new FolderStore(resolve(folder));
    const tmp = join(store.name, 'tmp');
    await mkdir(tmp, { recursive: true });
    for (const name of await readdir(tmp)) {
      const { mtimeMs } = await stat(join(tmp, name)).catch(() => ({ mtimeMs: Number.POSITIVE_INFINITY }));
      if (Date.now() - mtimeMs > leftoverMs) await rm(join(tmp, name), { force: true });
    }
    const probe = await store.#write(Buffer.from('probe'));
    await rm(probe.path);
    return store;
  }

  async read(key: string, range?: Range): Promise<AsyncIterable<Buffer> | null> {
    try {
      const file = await open(this.#pathOf(key), 'r');
      if (range === undefined) return createReadStream('', { fd: file });
      const bytes = Buffer.alloc(range.length);
      try {
        const { bytesRead } = await file.read(bytes, 0, range.length, range.offset);
        return oneOf(bytes.subarray(0, bytesRead));
      } finally {
        await file.close();
      }
    } catch (error) {
      if (isAbsent(error)) return null;
      throw error;
    }
  }

  async put(key: string, content: Buffer | AsyncIterable<Buffer>): Promise<number> {
    const { path, sizeBytes } = await this.#write(content);
    await this.#place(path, key, rename);
    return sizeBytes;
  }

  async create(key: string, content: Buffer): Promise<boolean> {
    const { path } = await this.#write(content);
    try {
      await this.#place(path, key, link);
      return true;
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code === 'EEXIST') return false;
      throw error;
    } finally {
      await rm(path, { force: true });
    }
  }

  appender(key: string): Appender {
    const path = this.#pathOf(key);
    let file: FileHandle | null = null;
    return {
      async append(bytes) {
        if (file === null) {
          await mkdir(dirname(path), { recursive: true });
          file = await open(path, 'ax');
          await syncFolder(dirname(path));
        }
        await file.appendFile(bytes);
        await file.datasync();
      },
      async close() {
        await file?.close();
      },
    };
  }

  async *readLog(key: string): AsyncIterable<Buffer> {
    const content = await this.read(key);
    if (content !== null) yield* content;
  }

  async list(prefix: string): Promise<Stored[]> {
    const found: Stored[] = [];
    const walk = async (folder: string) => {
      const entries = await readdir(this.#pathOf(folder), { withFileTypes: true }).catch(noneIfAbsent);
      for (const entry of entries) {
        const key = `${folder}${entry.name}`;
        if (entry.isDirectory()) await walk(`${key}/`);
        else {
          const { size } = await stat(this.#pathOf(key)).catch(() => ({ size: null }));
          if (size !== null) found.push({ key, sizeBytes: size });
        }
      }
    };
    await walk(prefix);
    return found.sort((a, b) => (a.key < b.key ? -1 : 1));
  }

  async remove(key: string): Promise<void> {
    await rm(this.#pathOf(key), { force: true });
  }

  async removeAll(prefix: string): Promise<void> {
    await rm(this.#pathOf(prefix), { recursive: true, force: true });
  }

  async close(): Promise<void> {}

  #pathOf(key: string): string {
    return join(this.name, key);
  }

  async #write(content: Buffer | AsyncIterable<Buffer>): Promise<{ path: string; sizeBytes: number }> {
    const path = join(this.name, 'tmp', randomUUID());
    const file = await open(path, 'wx', 0o600);
    try {
      let sizeBytes = 0;
      for await (const bytes of Buffer.isBuffer(content) ? oneOf(content) : content) {
        await file.appendFile(bytes);
        sizeBytes += bytes.length;
      }
      await file.sync();
      return { path, sizeBytes };
    } catch (error) {
      await rm(path, { force: true });
      throw error;
    } finally {
      await file.close();
    }
  }

  async #place(path: string, key: string, move: (from: string, to: string) => Promise<void>): Promise<void> {
    const target = this.#pathOf(key);
    await mkdir(dirname(target), { recursive: true });
    await move(path, target);
    await syncFolder(dirname(target));
  }
}

/** So that a new name outlives a power cut. */
async function syncFolder(path: string): Promise<void> {
  const folder = await open(path, 'r');
  try {
    await folder.sync();
  } finally {
    await folder.close();
  }
}

async function* oneOf(bytes: Buffer): AsyncIterable<Buffer> {
  yield bytes;
}

function isAbsent(error: unknown): boolean {
  return ['ENOENT', 'ENOTDIR'].includes((error as NodeJS.ErrnoException).code ?? '');
}

function noneIfAbsent(error: unknown): [] {
  if (isAbsent(error)) return [];
  throw error;
}
