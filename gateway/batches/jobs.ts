// The batches of all tenants. Each is a folder of the store, `batches/TENANT/ID/`:
//
//   batch.json   what was asked for        cancel.json   somebody wants it to end
//   state.json   how far its owner is      final.json    how it ended; whoever creates it first has said so
//   owners/      whose it is (lease.ts)    results/      a log of answers of each owner (results.ts)
//
// `active/TENANT/ID` is there from before the first until after the last of them, so that what is to be done is found by one list.

import { GatewayError } from '../errors.ts';
import {
  type BatchParts,
  type BatchRecord,
  type BatchState,
  type CancelRecord,
  type FinalRecord,
  isId,
  newId,
  type Page,
  pageOf,
  statusOf,
  tenantFolder,
  timeOfId,
  unixSeconds,
} from './objects.ts';
import { jsonBytes, readJson, type Store } from './store.ts';

/** Of one tenant that have not ended. */
const maxActive = 100;
/** A mark in `active/` without a batch for so long is of a request that was killed. */
const abandonedMs = 3_600_000;

export type NewBatch = Pick<
  BatchRecord,
  'endpoint' | 'input_file_id' | 'completion_window' | 'metadata' | 'output_seconds'
> & { windowSeconds: number };

export class Jobs {
  readonly #store: Store;
  readonly #nowMs: () => number;

  constructor(store: Store, nowMs: () => number = Date.now) {
    this.#store = store;
    this.#nowMs = nowMs;
  }

  /** @throws too_many_batches */
  async create(tenant: string | null, asked: NewBatch): Promise<BatchParts> {
    const active = await this.#store.list(`active/${tenantFolder(tenant)}/`);
    if (active.length >= maxActive) {
      throw new GatewayError(
        'too_many_batches',
        `batches: expected at most ${maxActive} that have not ended, got more`,
      );
    }
    const { windowSeconds, ...rest } = asked;
    const id = newId('batch_', this.#nowMs());
    const created_at = unixSeconds(timeOfId(id));
    const record: BatchRecord = { id, tenant, created_at, expires_at: created_at + windowSeconds, ...rest };
    await this.#store.put(activeKey(tenant, id), Buffer.from('\n'));
    await this.#store.put(`${folderOf(tenant, id)}batch.json`, jsonBytes(record));
    return { record, state: null, cancel: null, final: null };
  }

  async find(tenant: string | null, id: string): Promise<BatchParts | null> {
    return isId('batch_', id) ? this.read(folderOf(tenant, id)) : null;
  }

  /** @throws batch_not_found */
  async get(tenant: string | null, id: string): Promise<BatchParts> {
    const parts = await this.find(tenant, id);
    if (parts !== null) return parts;
    throw new GatewayError('batch_not_found', `No such Batch object: ${id.slice(0, 64)}`, { param: 'id' });
  }

  /** @param folder  of a batch, ends with `/` */
  async read(folder: string): Promise<BatchParts | null> {
    const [record, state, cancel, final] = await Promise.all([
      readJson<BatchRecord>(this.#store, `${folder}batch.json`),
      readJson<BatchState>(this.#store, `${folder}state.json`),
      readJson<CancelRecord>(this.#store, `${folder}cancel.json`),
      readJson<FinalRecord>(this.#store, `${folder}final.json`),
    ]);
    return record === null ? null : { record, state, cancel, final };
  }

  async list(
    tenant: string | null,
    page: { after: string | null; limit: number },
  ): Promise<Page<BatchParts>> {
    const prefix = `batches/${tenantFolder(tenant)}/`;
    const ids = (await this.#store.list(prefix))
      .filter(({ key }) => key.endsWith('/batch.json'))
      .map(({ key }) => key.slice(prefix.length, -'/batch.json'.length));
    const { data, hasMore } = pageOf(ids, page);
    const found = await Promise.all(data.map((id) => this.find(tenant, id)));
    return { data: found.filter((parts) => parts !== null), hasMore };
  }

  /** @throws batch_not_found, batch_not_cancellable */
  async cancel(tenant: string | null, id: string): Promise<BatchParts> {
    const parts = await this.get(tenant, id);
    if (parts.final !== null) {
      throw new GatewayError(
        'batch_not_cancellable',
        `Cannot cancel a batch with status '${statusOf(parts)}'.`,
      );
    }
    const cancel: CancelRecord = { cancelling_at: unixSeconds(this.#nowMs()) };
    await this.#store.create(`${folderOf(tenant, id)}cancel.json`, jsonBytes(cancel));
    return this.get(tenant, id);
  }

  async isCancelled({ tenant, id }: BatchRecord): Promise<boolean> {
    return (await readJson(this.#store, `${folderOf(tenant, id)}cancel.json`)) !== null;
  }

  /** True while a batch that has not ended reads from this file. */
  async isInput(tenant: string | null, fileId: string): Promise<boolean> {
    const active = await this.#store.list(`active/${tenantFolder(tenant)}/`);
    const batches = await Promise.all(active.map(({ key }) => this.read(folderOfActive(key))));
    return batches.some((parts) => parts?.final === null && parts.record.input_file_id === fileId);
  }

  /** Folders of batches that have not ended, oldest first. */
  async active(): Promise<string[]> {
    const marks = await this.#store.list('active/');
    const time = (key: string) => timeOfId(key);
    return marks
      .map(({ key }) => key)
      .sort((a, b) => time(a) - time(b))
      .map(folderOfActive);
  }

  async writeState({ tenant, id }: BatchRecord, state: BatchState): Promise<void> {
    await this.#store.put(`${folderOf(tenant, id)}state.json`, jsonBytes(state));
  }

  /** Says how it ended, unless somebody has said so before, and lets go of what only a running job needs. */
  async end(record: BatchRecord, final: FinalRecord): Promise<void> {
    await this.#store.create(`${folderOf(record.tenant, record.id)}final.json`, jsonBytes(final));
    await this.tidy(record);
  }

  /** Of a batch that has ended. A kill between the end and this leaves it to whoever finds the mark next. */
  async tidy({ tenant, id }: BatchRecord): Promise<void> {
    const folder = folderOf(tenant, id);
    await this.#store.removeAll(`${folder}results/`);
    await this.#store.removeAll(`${folder}owners/`);
    await this.#store.remove(activeKey(tenant, id));
  }

  /** Removes a mark whose batch was never written. */
  async forgetAbandoned(folder: string): Promise<void> {
    const id = folder.split('/')[2]!;
    if (timeOfId(id) > this.#nowMs() - abandonedMs) return;
    await this.#store.remove(folder.replace(/^batches\/(.*)\/$/, 'active/$1'));
  }

  /** Removes batches that were made before and have ended. @returns how many */
  async removeOlder(beforeMs: number): Promise<number> {
    const stored = await this.#store.list('batches/');
    const old = new Set(
      stored
        .map(({ key }) => `${key.split('/').slice(0, 3).join('/')}/`)
        .filter((folder) => timeOfId(folder.slice(0, -1)) < beforeMs),
    );
    let numRemoved = 0;
    for (const folder of old) {
      const parts = await this.read(folder);
      if (parts !== null && parts.final === null) continue;
      await this.#store.removeAll(folder);
      numRemoved += 1;
    }
    return numRemoved;
  }
}

export function folderOf(tenant: string | null, id: string): string {
  return `batches/${tenantFolder(tenant)}/${id}/`;
}

function activeKey(tenant: string | null, id: string): string {
  return `active/${tenantFolder(tenant)}/${id}`;
}

function folderOfActive(key: string): string {
  return `${key.replace(/^active\//, 'batches/')}/`;
}
