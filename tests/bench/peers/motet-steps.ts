/** Our native core without HTTP: decode and prefill as llama.cpp's bench programs measure theirs. */
import type { PreparedModel } from '../../../engine/model/prepare.ts';
import type { Runtime } from '../../../native/index.ts';
import { loadAdapter, type OpenOptions, open, prepare } from '../../fixtures/models.ts';
import { pagesFor, stepBatch } from '../../fixtures/steps.ts';

export interface DecodeWork {
  batch: number;
  contextTokens: number;
  steps: number;
  /** The adapter of a row in a step, or those that it is composed of, with weights; null, and none at all: the base. */
  handle?: (row: number, step: number) => number | readonly [handle: number, weight: number][] | null;
}

export interface MotetSteps {
  runtime: Runtime;
  model: PreparedModel;
  /** Milliseconds of one step: `batch` sequences decode one token each. */
  decodeMs(work: DecodeWork): Promise<number>;
  prefillMs(numTokens: number, handle?: number): Promise<number>;
  loadAdapter(folder: string): Promise<number>;
  /** Gives the pages of all adapters back. */
  unloadAll(): void;
  close(): void;
}

export interface MotetRoom {
  sequences: number;
  /** Of each sequence. */
  tokens: number;
  adapterBytes: number;
  /** They begin on a page of their own each, so that many small ones leave many pages half empty. */
  numAdapters: number;
}

export async function openMotet(path: string, room: MotetRoom, options: OpenOptions): Promise<MotetSteps> {
  const model = await prepare(path);
  const blockBytes = 16 * kvBytesPerToken(model);
  const kvBytes = room.sequences * (room.tokens * kvBytesPerToken(model) + blockBytes);
  const adapterBytes = Math.ceil(1.1 * room.adapterBytes) + room.numAdapters * blockBytes;
  const runtime = await open(model, {
    deviceMemoryBytes: 2 ** 26 + kvBytes + adapterBytes,
    ...options,
  });
  const pagesEach = Math.ceil(room.tokens / runtime.blockTokens);
  const parts = Array.from({ length: room.sequences }, (_, i) => ({
    tokens: promptTokens(room.tokens, i, model.dims.vocabSize),
    blocks: pagesFor(runtime, room.tokens, i * pagesEach),
    // How many of its tokens have their KV in the pages. Decoding writes the same tokens again, so it stays true.
    numFilled: 0,
  }));
  const firstAdapterPage = room.sequences * pagesEach;
  let nextPage = firstAdapterPage;
  let loaded: number[] = [];

  const partsOf = (batch: number, numTokens: number) => {
    if (batch > room.sequences || numTokens > room.tokens)
      throw new RangeError(
        `room: expected ${batch} sequences of ${numTokens} tokens, got ${room.sequences} of ${room.tokens}`,
      );
    return parts.slice(0, batch);
  };
  async function fill(part: (typeof parts)[number], numTokens: number): Promise<void> {
    while (part.numFilled < numTokens) {
      const count = Math.min(512, numTokens - part.numFilled);
      await runtime.step(stepBatch([{ ...part, start: part.numFilled, count, sample: 'none' }]));
      part.numFilled += count;
    }
  }

  return {
    runtime,
    model,
    async decodeMs({ batch, contextTokens, steps, handle }) {
      const rows = partsOf(batch, contextTokens + steps);
      for (const part of rows) await fill(part, contextTokens);
      // Laid out before the clock starts: the engine plans a step while the one before runs.
      const batches = Array.from({ length: steps }, (_, step) =>
        stepBatch(
          rows.map((part, row) => ({
            ...part,
            start: contextTokens + step,
            count: 1,
            adapters: adaptersOf(handle?.(row, step) ?? null),
          })),
        ),
      );
      const begin = performance.now();
      // As the engine does: the next step is handed in while one runs.
      let running = runtime.step(batches[0]!);
      for (const next of batches.slice(1)) {
        const waiting = runtime.step(next);
        await running;
        running = waiting;
      }
      await running;
      return (performance.now() - begin) / steps;
    },
    async prefillMs(numTokens, handle) {
      const [part] = partsOf(1, numTokens);
      const adapters = adaptersOf(handle ?? null);
      const batch = stepBatch([{ ...part!, start: 0, count: numTokens, adapters }]);
      const begin = performance.now();
      await runtime.step(batch);
      return performance.now() - begin;
    },
    async loadAdapter(folder) {
      const { handle, nextPage: next } = await loadAdapter(runtime, model, folder, nextPage);
      nextPage = next;
      loaded.push(handle);
      return handle;
    },
    unloadAll() {
      for (const handle of loaded) runtime.releaseAdapter(handle);
      loaded = [];
      nextPage = firstAdapterPage;
    },
    close: () => runtime.close(),
  };
}

function adaptersOf(handle: number | readonly [number, number][] | null): [number, number][] {
  if (handle === null) return [];
  return typeof handle === 'number' ? [[handle, 1]] : [...handle];
}

/** Distinct per sequence, the same in every run, none of them special. */
export function promptTokens(length: number, sequence: number, vocabSize: number): number[] {
  const first = 300;
  return Array.from(
    { length },
    (_, i) => first + (((i + 1) * 7919 + (sequence + 1) * 104_729) % (vocabSize - first)),
  );
}

/** Keys and values of one position, in f16. */
function kvBytesPerToken({ dims }: PreparedModel): number {
  return dims.numLayers * dims.numKvHeads * dims.headDim * 2 * 2;
}
