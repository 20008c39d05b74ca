/**
 * Texts to vectors. A text's vector is pooled from the hidden states behind the final norm, which are those that the head would
 * read, with the adapter applied, and has length 1. Pooling is as for vLLM's converted decoders: `last`, the state of the last
 * token, or `mean` over all tokens. For a mean every row is computed here: the prefix cache keeps KV and no hidden states.
 */
import { setImmediate as nextTurn } from 'node:timers/promises';
import type { SequenceHandle, SequenceRequest } from './engine.ts';
import type { EngineError } from './errors.ts';
import { adaptersOf, checkTokens, encode, holdServed, type Served, type ServedModel } from './generate.ts';
import type { EmbeddingsRequest } from './openai.ts';
import { defaultSampling } from './sampling.ts';

export type Pooling = 'last' | 'mean';
export const poolings: readonly Pooling[] = ['last', 'mean'];

export interface Embeddings {
  /** One an input, in order. */
  vectors: Float32Array[];
  numPromptTokens: number;
  numCachedTokens: number;
}

/** Inputs of one request that the engine holds at a time: many of them must not fill its queue. */
const maxAtOnce = 32;

/**
 * @param origin  which gateway asks, and for whom
 * @param signal  aborted: nobody waits for the vectors any more
 * @throws EngineError of the first input that fails; the others are ended
 */
export async function embed(
  model: ServedModel,
  pooling: Pooling,
  { inputs, dimensions }: EmbeddingsRequest,
  served: Served,
  origin: Pick<SequenceRequest, 'sender' | 'standing'>,
  signal: AbortSignal,
): Promise<Embeddings> {
  const letGo = await holdServed(model, served, signal);
  try {
    return await embedAll(model, pooling, { inputs, dimensions }, served, origin, signal);
  } finally {
    letGo();
  }
}

async function embedAll(
  model: ServedModel,
  pooling: Pooling,
  { inputs, dimensions }: Pick<EmbeddingsRequest, 'inputs' | 'dimensions'>,
  served: Served,
  origin: Pick<SequenceRequest, 'sender' | 'standing'>,
  signal: AbortSignal,
): Promise<Embeddings> {
  const prompts: ArrayLike<number>[] = [];
  for (const input of inputs) {
    if (prompts.length > 0) await nextTurn();
    if (typeof input !== 'string') checkTokens(input, model.text.vocabSize, 'input');
    prompts.push(typeof input === 'string' ? encode(model, input, true) : input);
  }
  const vectors: Float32Array[] = [];
  let numPromptTokens = 0;
  let numCachedTokens = 0;
  let next = 0;
  const open = new Set<SequenceHandle>();
  const embedRest = async () => {
    while (next < prompts.length && !signal.aborted) {
      const index = next++;
      const { handle, done } = begin(model, pooling, prompts[index]!, served, origin);
      open.add(handle);
      vectors[index] = normalise(await done, dimensions);
      open.delete(handle);
      numPromptTokens += prompts[index]!.length;
      numCachedTokens += handle.sequence.numCachedTokens;
    }
  };
  const cancel = () => {
    next = prompts.length;
    for (const handle of open) handle.cancel();
  };
  signal.addEventListener('abort', cancel, { once: true });
  try {
    await Promise.all(Array.from({ length: Math.min(maxAtOnce, prompts.length) }, embedRest));
  } catch (error) {
    cancel();
    throw error;
  } finally {
    signal.removeEventListener('abort', cancel);
  }
  return { vectors, numPromptTokens, numCachedTokens };
}

/** One input as a sequence that draws a single token, which nobody reads. */
function begin(
  model: ServedModel,
  pooling: Pooling,
  promptTokens: ArrayLike<number>,
  served: Served,
  origin: Pick<SequenceRequest, 'sender' | 'standing'>,
): { handle: SequenceHandle; done: Promise<Float64Array> } {
  const { promise: done, resolve, reject } = Promise.withResolvers<Float64Array>();
  const pool = new Pool();
  const params = { ...defaultSampling(), temperature: 0, maxTokens: 1 };
  const adapters = adaptersOf(model, served);
  const hidden = {
    rows: pooling === 'mean' ? ('all' as const) : ('last' as const),
    onRows: (position: number, rows: Float32Array, numRows: number) => pool.add(position, rows, numRows),
  };
  const onOutput = ({ finishReason, error }: { finishReason: string | null; error: EngineError | null }) => {
    if (error) reject(error);
    else if (finishReason === 'abort')
      resolve(new Float64Array(1)); // nobody waits for it
    else if (finishReason) resolve(pool.mean());
  };
  const [handle] = model.engine.add([{ promptTokens, params, adapters, ...origin, hidden, onOutput }]);
  return { handle: handle!, done };
}

/** Sums rows in the order of their positions, so that the chunks of a prompt change no bit. */
export class Pool {
  #sum = new Float64Array(0);
  #numRows = 0;

  /** @param rows  [numRows, hiddenSize]. What does not follow what came before begins anew: the sequence was preempted. */
  add(position: number, rows: Float32Array, numRows: number): void {
    const size = rows.length / numRows;
    if (this.#sum.length === 0 || this.#numRows !== position) {
      this.#sum = new Float64Array(size);
      this.#numRows = 0;
    }
    for (let row = 0; row < numRows; row++) {
      for (let i = 0; i < size; i++) this.#sum[i]! += rows[row * size + i]!;
    }
    this.#numRows += numRows;
  }

  mean(): Float64Array {
    return this.#sum.map((sum) => sum / this.#numRows);
  }
}

/** The first `dimensions` of it, at length 1. A vector of zeros stays. */
export function normalise(vector: Float64Array, dimensions: number | null): Float32Array {
  const cut = dimensions === null ? vector : vector.subarray(0, dimensions);
  const length = Math.sqrt(cut.reduce((sum, value) => sum + value * value, 0));
  return Float32Array.from(cut, (value) => (length === 0 ? 0 : value / length));
}
