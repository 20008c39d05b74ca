/**
 * Sampling parameters of one sequence: plain data with every default filled in. The draw depends on (seed, position)
 * alone, so a seeded request gives the same tokens in any batch and after a preemption.
 */
import { randomBytes } from 'node:crypto';

export interface SamplingParams {
  /** 0: greedy. */
  temperature: number;
  /** 0: all. */
  topK: number;
  /** 1: off. */
  topP: number;
  /** 0: off. */
  minP: number;
  /** 1: off. */
  repetitionPenalty: number;
  /** 0: off. */
  presencePenalty: number;
  /** 0: off. */
  frequencyPenalty: number;
  seed: bigint;
  /** Pairs of token id and what is added to its logit. */
  biasIds: number[];
  biasValues: number[];
  /** null: none wanted. Otherwise the chosen token's logprob and this many of the likeliest. */
  numLogprobs: number | null;

  /** null: as many as the context and the arena allow. */
  maxTokens: number | null;
  minTokens: number;
  ignoreEos: boolean;
  stopStrings: string[];
  stopTokenIds: number[];
  /** Keep the stop string at the end of the text. */
  includeStop: boolean;
  /** Leave special tokens out of the text. */
  skipSpecialTokens: boolean;
}

/** Most tokens that logprobs may be asked for: OpenAI's bound, and the width of the native result. */
export const maxLogprobs = 20;

export function defaultSampling(): SamplingParams {
  return {
    temperature: 1,
    topK: 0,
    topP: 1,
    minP: 0,
    repetitionPenalty: 1,
    presencePenalty: 0,
    frequencyPenalty: 0,
    seed: 0n,
    biasIds: [],
    biasValues: [],
    numLogprobs: null,
    maxTokens: null,
    minTokens: 0,
    ignoreEos: false,
    stopStrings: [],
    stopTokenIds: [],
    includeStop: false,
    skipSpecialTokens: true,
  };
}

/** Whether the sampler must see the sequence's tokens so far. */
export function needsHistory(params: SamplingParams): boolean {
  return params.repetitionPenalty !== 1 || params.presencePenalty !== 0 || params.frequencyPenalty !== 0;
}

/** A seed for a request that gave none. */
export function randomSeed(): bigint {
  return randomBytes(8).readBigUInt64LE();
}

/** The seed of choice `index` of a request: the first choice has the request's own. */
export function seedOfChoice(seed: bigint, index: number): bigint {
  return BigInt.asUintN(64, seed + BigInt(index));
}
