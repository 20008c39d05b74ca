/** One streamed turn of a conversation with engines without arithmetic, whose tokens are four bytes of text. */
import { type Agent, request } from 'undici';
import type { seededRandom } from '../fixtures/seeded-random.ts';

export interface Turn {
  ttftMs: number;
  promptTokens: number;
  cachedTokens: number;
}

/** Returns the answer's text too. Throws when there is none. */
export async function askTurn(
  agent: Agent,
  url: string,
  model: string,
  messages: object[],
  outputTokens: number,
): Promise<Turn & { text: string }> {
  const beganMs = performance.now();
  const { statusCode, body } = await request(`${url}/v1/chat/completions`, {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify({
      ...{ model, messages, max_tokens: outputTokens, temperature: 0, ignore_eos: true },
      ...{ stream: true, stream_options: { include_usage: true } },
    }),
    dispatcher: agent,
  });
  let ttftMs: number | null = null;
  let all = '';
  for await (const chunk of body) {
    all += chunk;
    // The first event has the role alone.
    if (/"content":"[^"]/.test(all)) ttftMs ??= performance.now() - beganMs;
  }
  if (statusCode !== 200) throw new Error(`status ${statusCode}: ${all}`);
  const events = all
    .split('\n\n')
    .filter((event) => event.startsWith('data: {'))
    .map((event) => JSON.parse(event.slice('data: '.length)));
  const { usage } = events.at(-1);
  if (!usage) throw new Error(`the stream ended without usage: ${all.slice(-200)}`);
  return {
    ttftMs: ttftMs!,
    promptTokens: usage.prompt_tokens,
    cachedTokens: usage.prompt_tokens_details.cached_tokens,
    text: events.map(({ choices }) => choices[0]?.delta?.content ?? '').join(''),
  };
}

/** Text of so many tokens. */
export function textOf(random: ReturnType<typeof seededRandom>, numTokens: number): string {
  return Array.from({ length: numTokens }, () => `${random.from(100, 999)} `).join('');
}
