// What is known of a request before it is sent, as far as the queue needs it.

import { lowestPriority, type TokenUsage } from '../../engine/protocol.ts';
import { GatewayError } from '../errors.ts';
import { estimatePromptTokens } from '../quota/usage.ts';
import type { LengthPredictor } from './length-predictor.ts';

export type Ask = {
  /** Whose it is; '' where nobody has a key. */
  tenant: string;
  /** The tenant's share against others' that wait: 2 gets twice what 1 gets. */
  weight: number;
  /** Higher goes first; lowestPriority … highestPriority. */
  priority: number;
  /** Who answers, as engines know it. */
  adapter: string;
  /** By the length of its body. */
  promptTokens: number;
  /** Of all its answers, by a guess. */
  outputTokens: number;
  numChoices: number;
  arrivedMs: number;
  /** When it is worth nothing any more if no engine has it; null: never. On the clock of arrivedMs. */
  deadlineMs: number | null;
};

/** What a tenant is entitled to, beside its limits. */
export type Standing = { weight: number; priority: number };

export const defaultStanding: Standing = { weight: 1, priority: 0 };

/** A token of an answer costs as two of a prompt, as in VTC: it takes a step, and a prompt's share one. */
const outputWeight = 2;

/** What a request is charged, in tokens of a prompt. What the prefix cache had costs nothing. */
export function costOf({ promptTokens, cachedTokens, completionTokens }: TokenUsage): number {
  return Math.max(1, promptTokens - cachedTokens + outputWeight * completionTokens);
}

/** The same before it is known. */
export function expectedCost({ promptTokens, outputTokens }: Ask): number {
  return costOf({ promptTokens, cachedTokens: 0, completionTokens: outputTokens });
}

/** A client's wish in `x-motet-priority`: it may go behind its tenant's other requests, and never before them. @throws invalid_type when it is no integer */
export function lowered(priority: number, wish: string | undefined): number {
  if (wish === undefined) return priority;
  if (!/^-?\d{1,3}$/.test(wish.trim())) throw wrongHeader('x-motet-priority', 'an integer', wish);
  return Math.max(lowestPriority, Math.min(priority, Number(wish)));
}

/** Milliseconds in `x-llm-d-slo-ttft-ms`; null: not said. @throws invalid_type when that is no number of them */
export function parseWaitMs(value: string | undefined): number | null {
  if (value === undefined) return null;
  if (!/^\d{1,8}$/.test(value.trim()))
    throw wrongHeader('x-llm-d-slo-ttft-ms', 'a whole number of milliseconds', value);
  return Math.max(1, Number(value));
}

function wrongHeader(name: string, expected: string, value: string): GatewayError {
  return new GatewayError(
    'invalid_type',
    `${name}: expected ${expected}, got ${JSON.stringify(value.slice(0, 40))}`,
  );
}

/** What the caller says of a request, and what is known of the caller. */
export type AskOptions = {
  tenant: string | null;
  standing: Standing;
  adapter: string;
  bodyBytes: number;
  /** Most tokens of one answer; 0: it gets none, null: it does not say. */
  maxTokens: number | null;
  numChoices: number;
  waitMs: number | null;
};

/** @param nowMs  of performance.now() */
export function askOf(options: AskOptions, lengths: LengthPredictor, nowMs: number): Ask {
  const { tenant, standing, adapter, bodyBytes, maxTokens, numChoices, waitMs } = options;
  const promptTokens = estimatePromptTokens(bodyBytes);
  return {
    tenant: tenant ?? '',
    ...standing,
    adapter,
    promptTokens,
    outputTokens: lengths.predict(adapter, promptTokens, maxTokens, numChoices),
    numChoices,
    arrivedMs: nowMs,
    deadlineMs: waitMs === null ? null : nowMs + waitMs,
  };
}
