/**
 * What a full KV block is: SHA-256 over who computed it and every token up to its end, as a chain.
 *
 *   hash of block i = SHA-256(hash of block i − 1 ‖ its tokens, int32 little endian);  block −1 is the voice
 *
 * A voice is the digest of an adapter, `baseVoice` for the base: new weights under an old name are another voice. Two blocks are
 * taken for the same when their 256 bits are the same; nobody can make two that are not.
 */

import { hash } from 'node:crypto';
import { endianness } from 'node:os';

/** 32 bytes, one a character (latin1): as short as a key of a map can be. */
export type BlockHash = string;

/** The voice of the base model without an adapter. */
export const baseVoice = '';

const hashBytes = 32;
if (endianness() !== 'LE') throw new Error('block hashes expect a little endian machine');

/** Where the chain of a voice begins. */
export function voiceHash(voice: string): BlockHash {
  return hash('sha256', `motet kv ${voice}`, 'binary');
}

/** Makes hashes of blocks of one size, without making objects. */
export class BlockHasher {
  readonly #blockTokens: number;
  readonly #input: Buffer;
  /** The part of #input that holds tokens. */
  readonly #tokens: Int32Array;

  constructor(blockTokens: number) {
    this.#blockTokens = blockTokens;
    const bytes = new ArrayBuffer(hashBytes + blockTokens * 4);
    this.#input = Buffer.from(bytes);
    this.#tokens = new Int32Array(bytes, hashBytes);
  }

  /** @param tokens  with a whole block from `begin` on */
  next(before: BlockHash, tokens: Int32Array, begin: number): BlockHash {
    this.#input.write(before, 0, 'latin1');
    for (let i = 0; i < this.#blockTokens; i++) this.#tokens[i] = tokens[begin + i]!;
    return hash('sha256', this.#input, 'binary');
  }
}
