// Where the KV of a prompt's beginning is likely to be. A prompt is known by a chain of hashes, one for each block of its
// text and all before it, as engines know theirs by blocks of tokens: two requests that begin alike have the beginning of the chain
// in common, and the next turn of a conversation has all of the last one's. The map says to which engines a prefix was sent last.
// It only guesses: an engine may have let go of it. What engines say of their hits tells how good the guesses are (router.ts).

/** A request as routing knows it. */
export type Prefix = {
  /** Of each whole block of the prompt's text, with the name of who answers and all blocks before. */
  readonly chain: readonly number[];
  /** Of the caller's word that requests belong together; null when there is none. */
  readonly session: number | null;
  /** Of the prompt as it stands in the body. */
  readonly promptBytes: number;
};

/** Bytes of text in a block: some 64 tokens, a few blocks of an engine's. */
export const blockBytes = 256;
/** Longer prompts are told apart by their first 64 KiB. */
const maxBlocks = 256;
/** Engines that are remembered for one prefix: those that got it last. */
const maxHolders = 4;

/**
 * The prompt is found by the name of its field, not parsed: a guess needs no more, and a body that confuses it is answered as
 * well as any other.
 *
 * @param name     who answers: KV of an adapter is of no use to another
 * @param session  the caller's word that requests belong together, made its own by the tenant's name; null for none
 */
export function prefixOf(name: string, body: Buffer, session: string | null = null): Prefix {
  const begin = promptBegin(body);
  const hash = new Hash(name);
  const chain: number[] = [];
  const numBlocks = Math.min(maxBlocks, Math.floor((body.length - begin) / blockBytes));
  for (let i = 0; i < numBlocks; i++) {
    hash.add(body, begin + i * blockBytes, begin + (i + 1) * blockBytes);
    chain.push(hash.value);
  }
  return {
    chain,
    session: session === null ? null : new Hash(`${name}\n${session}`).value,
    promptBytes: body.length - begin,
  };
}

function promptBegin(body: Buffer): number {
  for (const field of ['"messages"', '"prompt"', '"inputs"', '"input"']) {
    const at = body.indexOf(field);
    if (at >= 0) return at;
  }
  return body.length;
}

/** Of text, 53 bits: two of FNV's kind side by side. A caller who makes two prompts collide gets a worse pick, no more. */
class Hash {
  #a = 0x811c9dc5;
  #b = 0x01000193;

  constructor(text: string) {
    const bytes = Buffer.from(text);
    this.add(bytes, 0, bytes.length);
  }

  add(bytes: Uint8Array, begin: number, end: number): void {
    let [a, b] = [this.#a, this.#b];
    for (let i = begin; i < end; i++) {
      const byte = bytes[i]!;
      a = Math.imul(a ^ byte, 0x01000193);
      b = Math.imul(b + byte, 0x85ebca6b) ^ (b >>> 15);
    }
    [this.#a, this.#b] = [a, b];
  }

  get value(): number {
    return (this.#a >>> 0) * 0x200000 + ((this.#b ^ (this.#b >>> 11)) & 0x1fffff);
  }
}

/**
 * Which of some engines a name is at home on, by rendezvous hashing: all gateways agree without a word, and an engine that
 * comes or goes moves only its own.
 */
export function homeOf(name: string, ids: readonly string[]): string | undefined {
  let home: string | undefined;
  let highest = -1;
  for (const id of ids) {
    const weight = new Hash(`${id}\n${name}`).value;
    if (weight > highest) [home, highest] = [id, weight];
  }
  return home;
}

export class PrefixMap {
  /** Hash -> ids of engines, the latest first. The one that was used longest ago stands first and leaves first. */
  readonly #holders = new Map<number, string[]>();
  readonly #maxEntries: number;

  constructor(maxEntries: number) {
    this.#maxEntries = maxEntries;
  }

  get size(): number {
    return this.#holders.size;
  }

  /** Id of an engine -> how many bytes of the prompt it was sent before. Engines that have none are not there. */
  find({ chain }: Prefix): Map<string, number> {
    const found = new Map<string, number>();
    for (const [index, hash] of chain.entries()) {
      const holders = this.#holders.get(hash);
      if (holders === undefined) break;
      for (const id of holders) found.set(id, (index + 1) * blockBytes);
    }
    return found;
  }

  /** The engine that got the session's last request. */
  ofSession({ session }: Prefix): string | undefined {
    return session === null ? undefined : this.#holders.get(session)?.[0];
  }

  /** The engine got it. */
  note({ chain, session }: Prefix, id: string): void {
    // From its end: what begins alike is used by most, so it is to leave last.
    for (const hash of chain.toReversed()) this.#noteOne(hash, id);
    if (session !== null) this.#noteOne(session, id);
    const surplus = this.#holders.size - this.#maxEntries;
    if (surplus > 0) for (const hash of this.#holders.keys().take(surplus)) this.#holders.delete(hash);
  }

  #noteOne(hash: number, id: string): void {
    const holders = this.#holders.get(hash);
    this.#holders.delete(hash);
    const others = holders?.[0] === id ? holders : [id, ...(holders ?? []).filter((other) => other !== id)];
    this.#holders.set(hash, others.slice(0, maxHolders));
  }
}
