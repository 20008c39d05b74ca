/**
 * Clients that each send one request after another and wait for its last token: what a server gives `clients` users at once.
 * Times are the client's own. It shares the machine's CPUs with the server, so it only looks for line ends and the last event.
 */
import { Agent, request } from 'node:http';
import type { Figures } from './rounds.ts';
import { percentile } from './spread.ts';

export interface Load {
  clients: number;
  requestsPerClient: number;
  promptTokens: number;
  outputTokens: number;
  vocabSize: number;
  /** Prompts differ between seeds, so that no cache of prefixes helps. */
  seed: number;
  timeoutMs: number;
}

export interface Completion {
  path: string;
  body: object;
}

/** Milliseconds since the request was sent. */
export interface Answer {
  firstMs: number;
  lastMs: number;
  numTokens: number;
}

/**
 * @param completion the request of one client: its adapter is the client's number
 * @returns tokensPerSecond over the wall time with prefill, and of the requests ttftP50Ms, ttftP95Ms, tpotP50Ms
 */
export async function runClosedLoop(
  url: string,
  completion: (prompt: number[], client: number) => Completion,
  load: Load,
): Promise<Figures> {
  // A connection each time: llama-server closes them after some requests, and one that is about to be closed loses a request.
  const agent = new Agent({ keepAlive: false, maxSockets: load.clients });
  const answers: Answer[] = [];
  const random = prompts(load);
  const begin = performance.now();
  const abort = AbortSignal.timeout(load.timeoutMs);
  try {
    await Promise.all(
      Array.from({ length: load.clients }, async (_, client) => {
        for (let i = 0; i < load.requestsPerClient; i++)
          answers.push(await ask(agent, url, completion(random(), client), abort));
      }),
    );
  } finally {
    agent.destroy();
  }
  const wallMs = performance.now() - begin;
  const short = answers.find(({ numTokens }) => numTokens !== load.outputTokens);
  if (short) throw new Error(`answer: expected ${load.outputTokens} tokens, got ${short.numTokens}`);
  return summarize(answers, wallMs);
}

export function summarize(answers: readonly Answer[], wallMs: number): Figures {
  const ttft = answers.map(({ firstMs }) => firstMs);
  const tpot = answers.map(
    ({ firstMs, lastMs, numTokens }) => (lastMs - firstMs) / Math.max(1, numTokens - 1),
  );
  const numTokens = answers.reduce((sum, answer) => sum + answer.numTokens, 0);
  return {
    tokensPerSecond: (numTokens * 1000) / wallMs,
    ttftP50Ms: percentile(ttft, 50),
    ttftP95Ms: percentile(ttft, 95),
    tpotP50Ms: percentile(tpot, 50),
  };
}

/** Random ids from 300 on: past special tokens and single bytes. */
export function prompts({ promptTokens, vocabSize, seed }: Load): () => number[] {
  let state = (seed + 1) >>> 0;
  return () =>
    Array.from({ length: promptTokens }, () => {
      state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
      return 300 + ((state >>> 8) % (vocabSize - 300));
    });
}

async function ask(
  agent: Agent,
  url: string,
  { path, body }: Completion,
  signal: AbortSignal,
): Promise<Answer> {
  const json = JSON.stringify(body);
  const headers = { 'content-type': 'application/json', 'content-length': Buffer.byteLength(json) };
  const sent = performance.now();
  return new Promise((resolve, reject) => {
    const outgoing = request(`${url}${path}`, { method: 'POST', agent, headers, signal }, (response) => {
      if (response.statusCode !== 200) {
        let text = '';
        response.on('data', (bytes) => {
          text += bytes;
        });
        response.on('end', () =>
          reject(new Error(`POST ${path}: expected 200, got ${response.statusCode} ${text.slice(0, 300)}`)),
        );
        return;
      }
      const reader = new StreamReader(sent);
      response.on('data', (bytes: Buffer) => reader.read(bytes.toString('latin1'), performance.now()));
      response.on('error', reject);
      response.on('end', () => resolve(reader.answer()));
    });
    outgoing.on('error', reject);
    outgoing.end(json);
  });
}

/** Server-sent events as they come: the times of the first and the last with a token, and the count that the last states. */
export class StreamReader {
  #rest = '';
  readonly #sent: number;
  #first: number | null = null;
  #last = 0;
  #numTokens: number | null = null;

  constructor(sentMs: number) {
    this.#sent = sentMs;
  }

  read(text: string, atMs: number): void {
    const lines = (this.#rest + text).split('\n');
    this.#rest = lines.pop()!;
    for (const line of lines) {
      if (!line.startsWith('data: {')) continue;
      // llama-server closes with "timings", OpenAI's way is an event with "usage" and no choice.
      const isSummary = line.includes('"timings":{') || /"usage": ?\{/.test(line);
      if (isSummary) {
        const event = JSON.parse(line.slice(6));
        this.#numTokens = event.timings?.predicted_n ?? event.usage.completion_tokens;
        if (this.#first !== null) continue;
      }
      this.#first ??= atMs;
      this.#last = atMs;
    }
  }

  answer(): Answer {
    if (this.#first === null) throw new Error('stream: expected an event with a token, got none');
    if (this.#numTokens === null)
      throw new Error('stream: expected a last event with usage or timings, got none');
    return { firstMs: this.#first - this.#sent, lastMs: this.#last - this.#sent, numTokens: this.#numTokens };
  }
}
