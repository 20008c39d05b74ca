/**
 * What is asked, by whom and when, as pure functions of a seed. Request i is the same whatever ran before it, so a run can
 * be repeated and no prompt has to be kept; a later turn of a conversation has what the server said before in it, too. No two requests of a run draw the same random numbers.
 */
import { type SeededRandom, seededRandom } from '../../fixtures/seeded-random.ts';

/** How many tokens: always that many, any number of a range, or around a mean. */
export type Lengths =
  | { kind: 'fixed'; tokens: number }
  | { kind: 'uniform'; low: number; high: number }
  | { kind: 'normal'; mean: number; deviation: number };

/** Which adapter a request uses, of a list. zipf: the k-th, counted from 1, with probability ∝ 1 / k^exponent. */
export type Popularity =
  | { kind: 'uniform' }
  | { kind: 'zipf'; exponent: number }
  | { kind: 'each-client-its-own' };

/** How long a user reads, thinks and types before the next turn: always as long, or exponentially distributed. */
export interface ThinkTime {
  kind: 'fixed' | 'exponential';
  meanSeconds: number;
}

/** Conversations by the chat endpoint, in place of single requests. */
export interface ConversationShape {
  /** User messages of a conversation, each with its answer. */
  numTurns: number;
  thinkTime: ThinkTime;
  /** Of the user's messages after the first; the first has `promptTokens`. */
  followUpTokens: Lengths;
}

export interface WorkloadShape {
  seed: number;
  endpoint: 'completions' | 'chat';
  promptTokens: Lengths;
  outputTokens: Lengths;
  /** null: single requests. */
  conversations: ConversationShape | null;
  sharedPrefixTokens: number;
  numPrefixes: number;
  vocabSize: number;
  numAdapters: number;
  popularity: Popularity;
  /** Part of the requests that use no adapter, 0 to 1. */
  baseShare: number;
}

export interface Message {
  role: 'system' | 'user' | 'assistant';
  content: string;
}

export interface PlannedRequest {
  /** Place in the run, from 0; that of the conversation, of which this is a turn. */
  index: number;
  /** From 0; a single request is the first and last turn. */
  turn: number;
  numTurns: number;
  /** Place in the list of adapters; null: the base. */
  adapter: number | null;
  /** Token ids; for chat, words; of a conversation, all messages so far. */
  prompt: number[] | string | Message[];
  outputTokens: number;
}

export interface Workload {
  /** @param client who sends it, from 0: says the adapter under each-client-its-own */
  request(index: number, client: number): PlannedRequest;
  /**
   * The next turn of a conversation: all that was said, what the server answered last, and a new message.
   * @returns null: the conversation is over
   */
  followUp(last: PlannedRequest, answer: string): { request: PlannedRequest; thinkMs: number } | null;
}

/** Independent sequences of random numbers under one seed. */
const streams = { measured: 1, warmup: 2, prefix: 3, arrivals: 4, followUps: 5 };

/** So that each turn of each conversation of a run has a seed of its own. */
export const maxTurns = 1000;

/** Ids below are special tokens in most vocabularies. */
const firstTokenId = 10;

export function createWorkload(shape: WorkloadShape, stream: 'measured' | 'warmup' = 'measured'): Workload {
  const { seed, numAdapters, popularity, baseShare, conversations } = shape;
  const pickAdapter =
    popularity.kind === 'zipf'
      ? zipf(numAdapters, popularity.exponent)
      : (random: SeededRandom) => random.below(numAdapters);
  return {
    request(index, client) {
      const random = seededRandom(seedOf(seed, streams[stream], index));
      // Every number is drawn whether it is needed or not, so that one option does not change what another decides.
      const isBase = random.unit() < baseShare || numAdapters === 0;
      const picked = pickAdapter(random);
      const prefixIndex = random.below(shape.numPrefixes);
      const numPromptTokens = lengthOf(shape.promptTokens, random);
      const outputTokens = lengthOf(shape.outputTokens, random);
      const prefixRandom = seededRandom(seedOf(seed, streams.prefix, prefixIndex));
      const prefix = tokensOf(shape, shape.sharedPrefixTokens, prefixRandom);
      const tokens = tokensOf(shape, numPromptTokens, random);
      const own = popularity.kind === 'each-client-its-own' ? client % numAdapters : picked;
      return {
        index,
        turn: 0,
        numTurns: conversations?.numTurns ?? 1,
        adapter: isBase ? null : own,
        prompt:
          conversations !== null
            ? firstMessages(textOf(prefix), textOf(tokens))
            : shape.endpoint === 'chat'
              ? textOf([...prefix, ...tokens])
              : [...prefix, ...tokens],
        outputTokens,
      };
    },
    followUp(last, answer) {
      const turn = last.turn + 1;
      if (conversations === null || turn >= last.numTurns) return null;
      const random = seededRandom(seedOf(seed, streams.followUps, last.index * maxTurns + turn));
      const thinkMs = 1000 * thinkSeconds(conversations.thinkTime, random);
      const numTokens = lengthOf(conversations.followUpTokens, random);
      const outputTokens = lengthOf(shape.outputTokens, random);
      const prompt: Message[] = [
        ...(last.prompt as Message[]),
        { role: 'assistant', content: answer },
        { role: 'user', content: textOf(tokensOf(shape, numTokens, random)) },
      ];
      return { request: { ...last, turn, prompt, outputTokens }, thinkMs };
    },
  };
}

/** What all conversations share is what their system says. */
function firstMessages(system: string, message: string): Message[] {
  return [
    ...(system === '' ? [] : [{ role: 'system' as const, content: system }]),
    { role: 'user', content: message },
  ];
}

function thinkSeconds({ kind, meanSeconds }: ThinkTime, random: SeededRandom): number {
  const uniform = random.unit();
  return kind === 'fixed' ? meanSeconds : -meanSeconds * Math.log(1 - uniform);
}

/**
 * When requests arrive, in milliseconds after the start: gaps are gamma distributed with mean 1 / rate. Shape 1 is a
 * Poisson process; the variance of a gap is its mean² / shape.
 */
export function* arrivalsMs(seed: number, ratePerSecond: number, burstiness: number): Generator<number> {
  const random = seededRandom(seedOf(seed, streams.arrivals, 0));
  for (let atMs = 0; ; ) {
    atMs += (gamma(burstiness, random) / burstiness) * (1000 / ratePerSecond);
    yield atMs;
  }
}

export function lengthOf(lengths: Lengths, random: SeededRandom): number {
  const uniform = random.unit();
  if (lengths.kind === 'fixed') return lengths.tokens;
  if (lengths.kind === 'uniform') {
    return lengths.low + Math.floor(uniform * (lengths.high - lengths.low + 1));
  }
  const { mean, deviation } = lengths;
  return Math.min(Math.max(1, Math.round(mean + deviation * normal(random))), mean + 4 * deviation);
}

/** Draws 0 … count − 1, the k-th with probability ∝ 1 / (k + 1)^exponent, by the inverse of the cumulated sum. */
function zipf(count: number, exponent: number): (random: SeededRandom) => number {
  const sums = new Float64Array(count);
  let sum = 0;
  for (let k = 0; k < count; k++) {
    sum += (k + 1) ** -exponent;
    sums[k] = sum;
  }
  return (random) => {
    const wanted = random.unit() * sum;
    let low = 0;
    let high = count - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (sums[middle]! > wanted) high = middle;
      else low = middle + 1;
    }
    return Math.max(0, low);
  };
}

function tokensOf({ endpoint, vocabSize }: WorkloadShape, count: number, random: SeededRandom): number[] {
  const [first, end] = endpoint === 'chat' ? [0, words.length] : [firstTokenId, vocabSize];
  return Array.from({ length: count }, () => first + random.below(end - first));
}

const textOf = (ids: readonly number[]) => ids.map((id) => words[id]!).join(' ');

/** Standard normal, by Box and Muller. */
function normal(random: SeededRandom): number {
  return Math.sqrt(-2 * Math.log(1 - random.unit())) * Math.cos(2 * Math.PI * random.unit());
}

/** Gamma of that shape and scale 1, by Marsaglia and Tsang (2000); below shape 1 by their boost. */
function gamma(shape: number, random: SeededRandom): number {
  if (shape === 1) return -Math.log(1 - random.unit());
  if (shape < 1) return gamma(shape + 1, random) * (1 - random.unit()) ** (1 / shape);
  const d = shape - 1 / 3;
  const c = 1 / Math.sqrt(9 * d);
  for (;;) {
    const x = normal(random);
    const v = (1 + c * x) ** 3;
    if (v <= 0) continue;
    if (Math.log(1 - random.unit()) < 0.5 * x * x + d * (1 - v + Math.log(v))) return d * v;
  }
}

/** A seed for one index of one stream; different indices of a stream never get the same one. */
function seedOf(seed: number, stream: number, index: number): number {
  return mix(mix(mix(seed) ^ stream) ^ index);
}

/** A bijection of 32-bit integers in which every bit moves about half of the others: murmur3's finaliser. */
function mix(value: number): number {
  let h = value | 0;
  h = Math.imul(h ^ (h >>> 16), 0x85ebca6b);
  h = Math.imul(h ^ (h >>> 13), 0xc2b2ae35);
  return (h ^ (h >>> 16)) >>> 0;
}

/** Short and common, so that most vocabularies have each as one token. */
const words = (
  'the of and to in is you that it he was for on are as with his they at be this have from or one had by word but not ' +
  'what all were we when your can said there use an each which she do how their if will up other about out many then'
).split(' ');
