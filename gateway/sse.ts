// Server-sent events as they pass through. An event ends at an empty line. Bytes come in pieces that know nothing of
// events; only whole events go out, so when the sender dies in the middle of one the client never sees half of it,
// and an error event can be put after the last whole one.

/** An event longer than this is passed on in parts rather than held: memory for one stream is bounded. */
const maxHeldBytes = 1 << 20;

const lineFeed = 0x0a;
const carriageReturn = 0x0d;

export class WholeEvents {
  #held: Buffer = Buffer.alloc(0);

  /** Adds bytes; returns those that end with a whole event, perhaps none. The rest is held for the next call. */
  push(bytes: Buffer): Buffer {
    const all = this.#held.length === 0 ? bytes : Buffer.concat([this.#held, bytes]);
    const end = all.length > maxHeldBytes ? all.length : endOfLastEvent(all);
    this.#held = all.subarray(end);
    return all.subarray(0, end);
  }

  /** What is held. At a proper end of the stream the sender meant it; after a failure it is half an event. */
  takeRest(): Buffer {
    const rest = this.#held;
    this.#held = Buffer.alloc(0);
    return rest;
  }
}

export function errorEvent(body: object): string {
  return `data: ${JSON.stringify(body)}\n\n`;
}

/** The index after the last empty line, 0 if there is none. A line ends with LF, CR LF, or CR. */
function endOfLastEvent(bytes: Buffer): number {
  for (let end = bytes.length; end >= 2; end -= 1) {
    const last = bytes[end - 1];
    const before = bytes[end - 2];
    if (last === lineFeed && before === lineFeed) return end;
    if (last === carriageReturn && before === carriageReturn) return end;
    // CR LF CR LF: the third from the end is the LF of the line before.
    if (last === lineFeed && before === carriageReturn && bytes[end - 3] === lineFeed) return end;
  }
  return 0;
}
