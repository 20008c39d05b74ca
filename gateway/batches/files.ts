// A tenant's files. Each is a folder of the store: `files/TENANT/ID/content`, and beside it `meta.json`, which is written
// last: a file without it is not there yet.

import { GatewayError } from '../errors.ts';
import {
  type FileRecord,
  isId,
  newId,
  type Page,
  pageOf,
  tenantFolder,
  timeOfId,
  unixSeconds,
} from './objects.ts';
import { jsonBytes, type Range, readJson, type Store } from './store.ts';

export type FileLimits = {
  /** Of one file, in bytes. */
  maxFileBytes: number;
  /** Of all that a tenant has in the store, in bytes: files and results of batches under way. */
  maxTenantBytes: number;
};

/** Of one tenant. Every list reads all their names. */
const maxFiles = 10_000;
/**
 * A content without `meta.json` for so long is of an upload that was killed. Longer than a batch may take: the ids of its
 * files are as old as it is.
 */
const abandonedMs = 30 * 86_400_000;
/** Files read at a time for a page. */
const pageReads = 16;

export type NewFile = { filename: string; purpose: FileRecord['purpose']; keepSeconds: number };

export class Files {
  readonly #store: Store;
  readonly #limits: FileLimits;
  readonly #nowMs: () => number;

  constructor(store: Store, limits: FileLimits, nowMs: () => number = Date.now) {
    this.#store = store;
    this.#limits = limits;
    this.#nowMs = nowMs;
  }

  /** @throws tenant_storage_full, file_too_large */
  async upload(
    tenant: string | null,
    content: AsyncIterable<Buffer>,
    describe: () => NewFile,
  ): Promise<FileRecord> {
    const { maxFileBytes, maxTenantBytes } = this.#limits;
    const { numBytes, numFiles } = await this.#usage(tenant);
    const isFull = () =>
      new GatewayError(
        'tenant_storage_full',
        `files: expected at most ${maxTenantBytes} bytes in ${maxFiles} files, got more; delete some`,
      );
    if (numFiles >= maxFiles || numBytes >= maxTenantBytes) throw isFull();
    const room = Math.min(maxFileBytes, maxTenantBytes - numBytes);
    const id = newId('file-', this.#nowMs());
    const key = this.#folder(tenant, id);
    try {
      const bytes = await this.#store.put(
        `${key}content`,
        bounded(content, room, () => (room < maxFileBytes ? isFull() : tooLarge(maxFileBytes))),
      );
      const record = await this.#describe(tenant, id, bytes, describe());
      // Others may have filled it meanwhile.
      if ((await this.#usage(tenant)).numBytes > maxTenantBytes) throw isFull();
      return record;
    } catch (error) {
      await this.#store.removeAll(key).catch(() => undefined);
      throw error;
    }
  }

  /** Writes a file under a given id, whole or not at all; again under the same id replaces it. */
  async write(
    tenant: string | null,
    id: string,
    content: AsyncIterable<Buffer>,
    file: NewFile,
  ): Promise<FileRecord> {
    const bytes = await this.#store.put(`${this.#folder(tenant, id)}content`, content);
    return this.#describe(tenant, id, bytes, file);
  }

  /** Null: the tenant has no such file, or not any more. */
  async find(tenant: string | null, id: string): Promise<FileRecord | null> {
    if (!isId('file-', id)) return null;
    const record = await readJson<FileRecord>(this.#store, `${this.#folder(tenant, id)}meta.json`);
    return record === null || record.expires_at <= unixSeconds(this.#nowMs()) ? null : record;
  }

  /** @throws file_not_found */
  async get(tenant: string | null, id: string): Promise<FileRecord> {
    return (await this.find(tenant, id)) ?? throwFileNotFound(id);
  }

  /** @throws file_not_found */
  async content(tenant: string | null, id: string, range?: Range): Promise<AsyncIterable<Buffer>> {
    if (!isId('file-', id)) throwFileNotFound(id);
    const content = await this.#store.read(`${this.#folder(tenant, id)}content`, range);
    return content ?? throwFileNotFound(id);
  }

  async list(
    tenant: string | null,
    page: { after: string | null; limit: number; order: 'asc' | 'desc'; purpose: string | null },
  ): Promise<Page<FileRecord>> {
    const prefix = `files/${tenantFolder(tenant)}/`;
    const ids = (await this.#store.list(prefix))
      .filter(({ key }) => key.endsWith('/meta.json'))
      .map(({ key }) => key.slice(prefix.length, -'/meta.json'.length));
    const sorted = pageOf(ids, { ...page, limit: ids.length }).data;
    const data: FileRecord[] = [];
    for (let i = 0; i < sorted.length && data.length <= page.limit; i += pageReads) {
      const found = await Promise.all(sorted.slice(i, i + pageReads).map((id) => this.find(tenant, id)));
      data.push(
        ...found
          .filter((file) => file !== null)
          .filter(({ purpose }) => (page.purpose ?? purpose) === purpose),
      );
    }
    return { data: data.slice(0, page.limit), hasMore: data.length > page.limit };
  }

  async remove(tenant: string | null, id: string): Promise<void> {
    const key = this.#folder(tenant, id);
    await this.#store.remove(`${key}meta.json`);
    await this.#store.removeAll(key);
  }

  /** Removes what has expired, of all tenants. @returns how many files */
  async removeExpired(): Promise<number> {
    const stored = await this.#store.list('files/');
    const described = new Set(stored.filter(({ key }) => key.endsWith('/meta.json')).map(folderOf));
    let numRemoved = 0;
    for (const folder of new Set(stored.map(folderOf))) {
      const isExpired = described.has(folder)
        ? ((await readJson<FileRecord>(this.#store, `${folder}meta.json`))?.expires_at ?? 0) <=
          unixSeconds(this.#nowMs())
        : timeOfId(folder.slice(0, -1)) < this.#nowMs() - abandonedMs;
      if (!isExpired) continue;
      await this.#store.removeAll(folder);
      numRemoved += 1;
    }
    return numRemoved;
  }

  async #usage(tenant: string | null): Promise<{ numBytes: number; numFiles: number }> {
    const folder = tenantFolder(tenant);
    const [files, batches] = await Promise.all([
      this.#store.list(`files/${folder}/`),
      this.#store.list(`batches/${folder}/`),
    ]);
    const numBytes = [...files, ...batches].reduce((sum, { sizeBytes }) => sum + sizeBytes, 0);
    return { numBytes, numFiles: new Set(files.map(folderOf)).size };
  }

  async #describe(tenant: string | null, id: string, bytes: number, file: NewFile): Promise<FileRecord> {
    const { filename, purpose, keepSeconds } = file;
    const created_at = unixSeconds(this.#nowMs());
    const expires_at = created_at + keepSeconds;
    const record: FileRecord = { id, bytes, created_at, expires_at, filename, purpose };
    await this.#store.put(`${this.#folder(tenant, id)}meta.json`, jsonBytes(record));
    return record;
  }

  #folder(tenant: string | null, id: string): string {
    return `files/${tenantFolder(tenant)}/${id}/`;
  }
}

/** `files/TENANT/ID/` of any key in it. */
function folderOf({ key }: { key: string }): string {
  return `${key.split('/').slice(0, 3).join('/')}/`;
}

async function* bounded(
  content: AsyncIterable<Buffer>,
  maxBytes: number,
  tooMuch: () => GatewayError,
): AsyncIterable<Buffer> {
  let numBytes = 0;
  for await (const bytes of content) {
    numBytes += bytes.length;
    if (numBytes > maxBytes) throw tooMuch();
    yield bytes;
  }
}

export function tooLarge(maxBytes: number): GatewayError {
  return new GatewayError('file_too_large', `file: expected at most ${maxBytes} bytes, got more`, {
    param: 'file',
  });
}

function throwFileNotFound(id: string): never {
  throw new GatewayError('file_not_found', `No such File object: ${id.slice(0, 64)}`, { param: 'id' });
}
