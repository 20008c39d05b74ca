// The answers of a job as they come, in a log of each owner: one line of text an answer,
//
//   INDEX KIND JSON      INDEX: of the line, from 0    KIND: ok or error    JSON: the line of the output or error file
//
// Answers that end while others are being written are written together: one flush of the disk, or one object, for all of
// them. The log of an owner that was killed may end within a line; that line was not promised to anybody.
//
// Two owners may have answered the same line: the first in the order of owners counts, for every reader alike.

import { setTimeout as sleep } from 'node:timers/promises';
import { padded } from './lease.ts';
import { splitLines } from './lines.ts';
import type { OutputLine } from './objects.ts';
import type { Appender, Store } from './store.ts';

export type Result = { index: number; isOk: boolean; json: string };

/** Answers that wait to be written. */
const maxWaitingChars = 16 << 20;

type Waiting = { text: string; resolve(): void; reject(error: unknown): void };

export class ResultLog {
  readonly #appender: Appender;
  readonly #gapMs: number;
  #waiting: Waiting[] = [];
  #numWaitingChars = 0;
  #writing: Promise<void> | null = null;

  /** @param gapMs  between two writes: short for a folder, longer where each write is an object */
  constructor(store: Store, folder: string, owner: number, gapMs: number) {
    this.#appender = store.appender(`${folder}results/${padded(owner)}`);
    this.#gapMs = gapMs;
  }

  /** Resolves when there is room for more: a store that is slow holds up the job, not the memory. */
  async room(): Promise<void> {
    if (this.#numWaitingChars > maxWaitingChars) await this.#writing;
  }

  /** Resolves when the answer will be there whatever happens. */
  add(index: number, isOk: boolean, line: OutputLine): Promise<void> {
    const text = `${index} ${isOk ? 'ok' : 'error'} ${JSON.stringify(line)}\n`;
    const { promise, resolve, reject } = Promise.withResolvers<void>();
    this.#waiting.push({ text, resolve, reject });
    this.#numWaitingChars += text.length;
    this.#writing ??= this.#write();
    return promise;
  }

  async close(): Promise<void> {
    await this.#writing;
    await this.#appender.close();
  }

  async #write(): Promise<void> {
    while (this.#waiting.length > 0) {
      // Those that end in the same moment go along.
      await sleep(this.#gapMs);
      const batch = this.#waiting;
      this.#waiting = [];
      this.#numWaitingChars = 0;
      try {
        await this.#appender.append(Buffer.from(batch.map(({ text }) => text).join('')));
        for (const { resolve } of batch) resolve();
      } catch (error) {
        for (const { reject } of [...batch, ...this.#waiting]) reject(error);
        this.#waiting = [];
      }
    }
    this.#writing = null;
  }
}

/** All answers that were recorded, each line once, in the order in which they count. */
export async function* readResults(store: Store, folder: string): AsyncGenerator<Result> {
  const prefix = `${folder}results/`;
  const keys = (await store.list(prefix)).map(({ key }) => key.slice(prefix.length).split('/')[0]!);
  const seen = new Set<number>();
  for (const owner of [...new Set(keys)].sort()) {
    for await (const { bytes } of splitLines(store.readLog(prefix + owner), Number.POSITIVE_INFINITY)) {
      const result = parseResult(bytes!.toString());
      if (result === null || seen.has(result.index)) continue;
      seen.add(result.index);
      yield result;
    }
  }
}

/** Null: not a whole line. */
export function parseResult(text: string): Result | null {
  const [, index, kind, json] = /^(\d+) (ok|error) (\{.*\})$/s.exec(text) ?? [];
  if (json === undefined) return null;
  try {
    JSON.parse(json);
  } catch {
    return null;
  }
  return { index: Number(index), isOk: kind === 'ok', json };
}
