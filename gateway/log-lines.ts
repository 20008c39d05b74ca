// Lines of the log on their way to standard output. They are gathered and written many at a time, since a write for each costs more than the
// line, and beside the event loop, so that a slow reader of the log holds no request up. They are gathered here and not in
// sonic-boom, which measures all that it has gathered for each line that comes.

import { setTimeout as sleep } from 'node:timers/promises';
import { promisify } from 'node:util';
import { destination } from 'pino';

const gatheredChars = 8 << 10;
/** So late a line may be in the log. */
const gatherMs = 50;
/** So long the last lines are waited for. */
const endMs = 1_000;

export class LogLines {
  readonly #output: ReturnType<typeof destination>;
  #text = '';
  #timer: NodeJS.Timeout | null = null;

  /** @param descriptor  of an open file */
  constructor(descriptor: number) {
    this.#output = destination({ dest: descriptor, sync: false, minLength: 0 });
    // Before sonic-boom's own listener, which writes what it has.
    process.prependListener('exit', () => this.#pass());
  }

  /** For pino. */
  write(line: string): void {
    this.#text += line;
    if (this.#text.length >= gatheredChars) this.#pass();
    else this.#timer ??= setTimeout(() => this.#pass(), gatherMs).unref();
  }

  /** Writes all that is left. At exit it would be written by a loop that has no end where nobody reads the log any more. */
  async end(): Promise<void> {
    this.#pass();
    const flushed = promisify(this.#output.flush.bind(this.#output))();
    await Promise.race([flushed, sleep(endMs, null, { ref: false })]).catch(() => {});
  }

  #pass(): void {
    if (this.#timer !== null) clearTimeout(this.#timer);
    this.#timer = null;
    if (this.#text === '') return;
    const text = this.#text;
    this.#text = '';
    this.#output.write(text);
  }
}
