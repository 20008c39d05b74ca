// What is left, told to the client: `RateLimit` and `RateLimit-Policy` (draft-ietf-httpapi-ratelimit-headers, as structured
// fields with one item a policy), and the `x-ratelimit-*` headers that OpenAI's clients read.

import { type Limits, type Metered, remainingOf } from './limits.ts';
import { windowUs } from './meter.ts';

export type HeaderPair = [name: string, value: string];

const openaiNames: Partial<Record<keyof Limits, string>> = {
  requestsPerMinute: 'requests',
  tokensPerMinute: 'tokens',
};
const policyNames: Record<keyof Limits, string> = {
  requestsPerMinute: 'requests',
  tokensPerMinute: 'tokens',
  concurrency: 'concurrency',
};
/** Parameters of a policy after its quota: window in seconds, and unit where it is not requests. */
const policyTails: Record<keyof Limits, string> = {
  requestsPerMinute: `;w=${windowUs / 1e6}`,
  tokensPerMinute: `;w=${windowUs / 1e6};qu="tokens"`,
  concurrency: ';qu="concurrent-requests"',
};

/** @param readings  as `take` returned them */
export function rateLimitHeaders(metered: readonly Metered[], readings: readonly number[]): HeaderPair[] {
  if (metered.length === 0) return [];
  const policies: string[] = [];
  const states: string[] = [];
  /** Of tenant and key the one that has less left. */
  const tightest = new Map<string, { limit: number; remaining: number; resetUs: number }>();
  for (const [index, each] of metered.entries()) {
    const { scope, name, limit, take } = each;
    const reading = readings[index]!;
    const remaining = remainingOf(each, reading);
    const policy = `"${scope.of}-${policyNames[name]}"`;
    policies.push(`${policy};q=${limit}${policyTails[name]}`);
    states.push(`${policy};r=${remaining}${take.kind === 'rate' ? `;t=${Math.ceil(reading / 1e6)}` : ''}`);
    const openai = openaiNames[name];
    if (openai === undefined || remaining >= (tightest.get(openai)?.remaining ?? Number.POSITIVE_INFINITY))
      continue;
    tightest.set(openai, { limit, remaining, resetUs: reading });
  }
  const headers: HeaderPair[] = [
    ['RateLimit-Policy', policies.join(', ')],
    ['RateLimit', states.join(', ')],
  ];
  for (const [name, { limit, remaining, resetUs }] of tightest) {
    headers.push(
      [`x-ratelimit-limit-${name}`, String(limit)],
      [`x-ratelimit-remaining-${name}`, String(remaining)],
      [`x-ratelimit-reset-${name}`, duration(resetUs)],
    );
  }
  return headers;
}

/** As OpenAI writes it: `850ms`, `7.5s`, `1m30s`. */
function duration(us: number): string {
  const ms = Math.ceil(us / 1000);
  if (ms < 1000) return `${ms}ms`;
  const seconds = `${(ms % 60_000) / 1000}s`;
  return ms < 60_000 ? seconds : `${Math.floor(ms / 60_000)}m${seconds}`;
}
