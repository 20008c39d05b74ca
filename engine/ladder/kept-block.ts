/** A full KV block that is kept under its hash, and where it is. */

import type { ReadyRange, Sequence } from '../sequence.ts';
import type { BlockHash } from './block-hash.ts';
import type { Leaving } from './leaving-queue.ts';

export interface KeptBlock {
  readonly hash: BlockHash;
  readonly voice: string;
  /** Its index in a block table. */
  readonly depth: number;
  /** Where it is; in one of the two at least, until it is forgotten. */
  device: Place | null;
  host: Place | null;
  /** Sequences that have it in their table. */
  numHolders: number;
  /** It came from the disk, and no sequence has had it since. */
  isFromDisk: boolean;
  /** The step that computes it is over. */
  isComputed: boolean;
  /** It stands in line to be copied to the host arena, or is being copied. */
  isWriting: boolean;
  /** The copy that brings it to the device; null: it is not on its way. */
  arrival: Arrival | null;
  /** Not to be found any more: its content is wrong or unwanted, or it is in no arena. */
  isForgotten: boolean;
  /** Some sequence found it that had not made it. */
  wasFound: boolean;
  /** As policy.ts counts them. */
  uses: number;
  lastUsedMs: number;
}

/** A page of one arena that holds a kept block, and its place in the queue of those that may leave. */
export interface Place extends Leaving {
  readonly block: KeptBlock;
  readonly page: number;
}

/** Who waits for the blocks that one copy brings to the device. */
export interface Arrival {
  readonly waits: { sequence: Sequence; range: ReadyRange }[];
}

export function placeOf(block: KeptBlock, page: number): Place {
  return { block, page, depth: block.depth, rank: 0, queueIndex: -1 };
}
