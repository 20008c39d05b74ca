// Lines of the log on their way to standard output. They are gathered and written many at a time, since a write for each costs more than the
// line, and never waited for, so that a slow reader of the log holds no request up. A pipe is written without blocking: one that nobody reads
// can keep the process neither from its work nor from its end. Pino's own way, sonic-boom, writes what is left at exit in a loop that only
// success ends, and what a thread writes into a full pipe keeps the process until somebody reads it.

import { fstatSync, write, writeSync } from 'node:fs';
import { Socket } from 'node:net';
import { setTimeout as sleep } from 'node:timers/promises';
import { promisify } from 'node:util';

const gatheredChars = 8 << 10;
/** So late a line may be in the log. */
const gatherMs = 50;
/** So much waits for a reader at most. Lines beyond are left out, and a line of their own says how many. */
const maxChars = 16 << 20;
/** So long the last lines are waited for. */
const endMs = 1_000;

/** Resolves when the text is written; rejects when it cannot be. */
type Output = { write: (text: string) => Promise<void>; close: () => void };

export class LogLines {
  readonly #descriptor: number;
  readonly #output: Output;
  #text = '';
  #numLost = 0;
  #timer: NodeJS.Timeout | null = null;
  /** Ends when all that was gathered is written. */
  #writing: Promise<void> | null = null;
  #isGone = false;

  /** @param descriptor  of an open file */
  constructor(descriptor: number) {
    this.#descriptor = descriptor;
    this.#output = outputTo(descriptor);
    process.on('exit', () => this.#writeLast());
  }

  /** For pino. */
  write(line: string): void {
    if (this.#isGone) return;
    if (this.#text.length + line.length > maxChars) {
      this.#numLost++;
      return;
    }
    this.#text += line;
    if (this.#text.length >= gatheredChars) this.#pass();
    else this.#timer ??= setTimeout(() => this.#pass(), gatherMs).unref();
  }

  /** Writes all that is left. What nobody reads in time is given up. */
  async end(): Promise<void> {
    this.#pass();
    if (this.#writing === null) return;
    const isLate = await Promise.race([this.#writing.then(() => false), sleep(endMs, true, { ref: false })]);
    if (isLate) this.#giveUp();
  }

  #pass(): void {
    if (this.#timer !== null) clearTimeout(this.#timer);
    this.#timer = null;
    // What comes while something is written goes next.
    this.#writing ??= this.#writeAll().finally(() => {
      this.#writing = null;
    });
  }

  async #writeAll(): Promise<void> {
    try {
      while (this.#text !== '') {
        const text = this.#text + lostLine(this.#numLost);
        this.#text = '';
        this.#numLost = 0;
        await this.#output.write(text);
      }
    } catch {
      // Nobody reads it any more, or its disk is full: there is no place left to say so.
      this.#giveUp();
    }
  }

  #giveUp(): void {
    this.#isGone = true;
    this.#text = '';
    this.#output.close();
  }

  /** Where the process ends without `end`. What is on its way already is not written twice. */
  #writeLast(): void {
    if (this.#isGone || this.#text === '') return;
    try {
      writeSync(this.#descriptor, this.#text);
    } catch {
      // As above; and a pipe that is full is not waited for.
    }
  }
}

function lostLine(count: number): string {
  if (count === 0) return '';
  return `${JSON.stringify({ level: 40, time: Date.now(), lines: count, msg: 'lines of the log were left out: it is read too slowly' })}\n`;
}

function outputTo(descriptor: number): Output {
  const kind = fstatSync(descriptor);
  if (kind.isFIFO() || kind.isSocket()) {
    const socket = new Socket({ fd: descriptor, readable: false, writable: true });
    // Each write has its own error as well.
    socket.on('error', () => {});
    socket.unref();
    return {
      write: promisify((text: string, done: (error?: Error | null) => void) => void socket.write(text, done)),
      close: () => socket.destroy(),
    };
  }
  const writePart = promisify(write);
  return {
    write: async (text) => {
      for (let left = Buffer.from(text); left.length > 0; ) {
        const { bytesWritten } = await writePart(descriptor, left);
        left = left.subarray(bytesWritten);
      }
    },
    close: () => {},
  };
}
