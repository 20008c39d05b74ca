// Where files and batches are kept: a folder, or a prefix of an S3 bucket. Both give the same few promises, and all that
// batches need of a storage is in them:
//
//   put      replaces whole: who reads sees the content before or after, never a part; it is durable when it resolves
//   create   the same, for the first who comes alone: this is how replicas agree on who owns a job and how it ended
//   append   adds to a log that one process writes; what it resolved for is there after a kill or a power cut
//
// Keys are relative paths of letters, digits and -_. with / between; they are made here, never taken from a client.

export type Stored = { key: string; sizeBytes: number };

/** A part of an object. */
export type Range = { offset: number; length: number };

export interface Store {
  /** What it is called in logs. */
  readonly name: string;
  /** The content, or null when there is none. Read it to its end or destroy it. */
  read(key: string, range?: Range): Promise<AsyncIterable<Buffer> | null>;
  /** @returns how many bytes it has */
  put(key: string, content: Buffer | AsyncIterable<Buffer>): Promise<number>;
  /** @returns false: it exists, and is as it was */
  create(key: string, content: Buffer): Promise<boolean>;
  /** The log is begun with the first append. A key has one appender, ever. */
  appender(key: string): Appender;
  /** All that was appended, in order; empty when nothing was. After a kill the end may be a part of an append. */
  readLog(key: string): AsyncIterable<Buffer>;
  /** Objects and logs (with the bytes of all appends, perhaps as several entries) below a prefix, which ends with `/`. */
  list(prefix: string): Promise<Stored[]>;
  /** Removes an object or log. What is not there is removed already. */
  remove(key: string): Promise<void>;
  /** Removes all below a prefix, which ends with `/`. */
  removeAll(prefix: string): Promise<void>;
  close(): Promise<void>;
}

export interface Appender {
  append(bytes: Buffer): Promise<void>;
  close(): Promise<void>;
}

export async function readAll(store: Store, key: string): Promise<Buffer | null> {
  const content = await store.read(key);
  return content === null ? null : Buffer.concat(await Array.fromAsync(content));
}

export async function readJson<T>(store: Store, key: string): Promise<T | null> {
  const bytes = await readAll(store, key);
  return bytes === null ? null : (JSON.parse(bytes.toString()) as T);
}

export function jsonBytes(value: unknown): Buffer {
  return Buffer.from(`${JSON.stringify(value)}\n`);
}
