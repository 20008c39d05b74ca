// One request and its answer on a connection of an engine, by undici. What comes is handed on in the call that brought it: between the
// engine's bytes and the client's there is no stream, and no promise but those of the answer's beginning and end.

import type { IncomingHttpHeaders } from 'node:http';
import type { Dispatcher } from 'undici';
import type { Turns } from './turns.ts';

export type Head = { status: number; headers: IncomingHttpHeaders; isStream: boolean };

/** Where a stream goes to. */
export type Sink = {
  data(bytes: Buffer): void;
  end(): void;
  error(error: unknown): void;
};

/** A whole answer is held until its end, so that an engine that breaks off can be replaced by another. */
const maxWholeAnswerBytes = 64 << 20;

export class Exchange implements Dispatcher.DispatchHandler {
  /** Settled when a whole answer is here, or the first bytes of a stream. */
  readonly head: Promise<Head>;
  /** As far as they have come. */
  trailers: IncomingHttpHeaders = {};
  #resolve!: (head: Head) => void;
  #reject!: (error: unknown) => void;
  #controller: Dispatcher.DispatchController | null = null;
  #head: Head | null = null;
  /** What has come and was not handed on. */
  #held: Buffer[] = [];
  #numHeldBytes = 0;
  #sink: Sink | null = null;
  #isOver = false;
  #error: unknown = null;
  readonly #turns: Turns;

  constructor(turns: Turns) {
    this.#turns = turns;
    this.head = new Promise((resolve, reject) => {
      this.#resolve = resolve;
      this.#reject = reject;
    });
  }

  /** Sends it. What goes wrong is told by `head` or the sink. */
  send(dispatcher: Dispatcher, options: Dispatcher.DispatchOptions): void {
    try {
      dispatcher.dispatch(options, this);
    } catch (error) {
      this.#fail(error);
    }
  }

  /** The bytes that have come and were not handed on. */
  take(): Buffer {
    const [first] = this.#held;
    const all = this.#held.length === 1 ? first! : Buffer.concat(this.#held, this.#numHeldBytes);
    this.#held = [];
    return all;
  }

  /** Hands on what has come of a stream, and what comes from now on. */
  flow(sink: Sink): void {
    this.#sink = sink;
    sink.data(this.take());
    if (this.#error !== null) sink.error(this.#error);
    else if (this.#isOver) sink.end();
  }

  pause(): void {
    this.#controller?.pause();
  }

  resume(): void {
    if (!this.#isOver) this.#controller?.resume();
  }

  /** It is not wanted any more: its connection is closed. Nothing happens when it has ended. */
  abort(reason: Error): void {
    if (this.#isOver) return;
    this.#fail(reason);
    this.#controller?.abort(reason);
  }

  onRequestStart(controller: Dispatcher.DispatchController): void {
    this.#controller = controller;
    if (this.#isOver) controller.abort(this.#error as Error);
  }

  onResponseStart(_: Dispatcher.DispatchController, status: number, headers: IncomingHttpHeaders): void {
    if (status < 200) return;
    const isStream = String(headers['content-type'] ?? '').startsWith('text/event-stream');
    this.#head = { status, headers, isStream };
  }

  onResponseData(_: Dispatcher.DispatchController, bytes: Buffer): void {
    if (this.#isOver) return;
    if (this.#sink !== null) {
      this.#sink.data(bytes);
      return;
    }
    this.#held.push(bytes);
    this.#numHeldBytes += bytes.length;
    if (this.#head!.isStream) this.#resolve(this.#head!);
    else if (this.#numHeldBytes > maxWholeAnswerBytes)
      this.abort(new Error(`the answer is longer than ${maxWholeAnswerBytes} bytes`));
  }

  onResponseEnd(_: Dispatcher.DispatchController, trailers: IncomingHttpHeaders): void {
    if (this.#isOver) return;
    if (this.#head!.isStream && this.#sink === null && this.#held.length === 0) {
      this.#fail(new Error('the stream ended before its first event'));
      return;
    }
    this.#isOver = true;
    this.trailers = trailers;
    this.#resolve(this.#head!);
    this.#sink?.end();
  }

  onResponseError(_: Dispatcher.DispatchController | undefined, error: Error): void {
    // There is nothing left to pause or to close.
    this.#controller = null;
    if (this.#isOver) return;
    this.#turns.take(() => {
      if (!this.#isOver) this.#fail(error);
    });
  }

  #fail(error: unknown): void {
    this.#isOver = true;
    this.#error = error;
    this.#reject(error);
    this.#sink?.error(error);
  }
}
