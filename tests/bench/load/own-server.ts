/** Starts what `motet bench` loads when it is given no URL: an engine, adapters, and a gateway before it. */
import type { ChildProcess } from 'node:child_process';
import { existsSync, rmSync } from 'node:fs';
import { mkdtemp } from 'node:fs/promises';
import { availableParallelism, tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { request } from 'undici';
import { readBaseModel } from '../../../engine/model/base-model.ts';
import { type AdapterList, enginePaths, type ModelList } from '../../../engine/protocol.ts';
import { cacheFolder, examplesFolder, smollm2Path } from '../../fixtures/models.ts';
import {
  exampleAdapters,
  getJson,
  loadAdapterOver,
  type RunningProcess,
  startProcess,
} from '../../fixtures/processes.ts';
import { writeRandomAdapter } from '../random-adapter.ts';
import { OptionError, type OwnServerOptions } from './options.ts';

/** What of it goes into the report. */
export interface ServerFacts {
  modelPath: string;
  through: 'gateway' | 'engine';
  engineArgs: string[];
  numAdapters: number;
  /** Loading all adapters, and making those that are random. */
  loadSeconds: number;
  adapterBytes: number;
  arenaBytes: number;
}

export interface OwnServer {
  url: string;
  facts: ServerFacts;
  stop(): Promise<void>;
}

interface NewAdapter {
  name: string;
  /** Makes the folder that is loaded. */
  folder: () => Promise<string>;
}

const numLoadsAtOnce = 4;
const sayIntervalMs = 5000;
/** The gateway looks at its engines twice a second. */
const gatewayWaitMs = 30_000;

/**
 * @param signal stops the start
 * @param say tells a person what happens
 */
export async function startOwnServer(
  options: OwnServerOptions,
  signal: AbortSignal,
  say: (text: string) => void,
): Promise<OwnServer> {
  const modelPath = options.modelPath ?? smollm2Path;
  if (!existsSync(modelPath)) {
    const help = options.modelPath === null ? '; run `npm run setup`, or give --serve' : '';
    throw new OptionError(`--serve: expected a model, got nothing at ${modelPath}${help}`);
  }
  const processes: RunningProcess[] = [];
  const children: ChildProcess[] = [];
  const scratch = await mkdtemp(join(tmpdir(), 'motet-bench-'));
  const cleanUp = () => {
    for (const child of children) child.kill('SIGTERM');
    rmSync(scratch, { recursive: true, force: true });
  };
  // Whatever ends this process: nothing of it outlives it.
  process.once('exit', cleanUp);
  const stop = async () => {
    for (const running of processes.splice(0).reverse()) await running.stop();
    cleanUp();
    process.off('exit', cleanUp);
  };

  try {
    const adapters =
      options.numRegistered > 0
        ? await randomAdapters(options, modelPath, scratch)
        : options.modelPath === null
          ? exampleAdapters.map(({ name }) => ({ name, folder: async () => join(examplesFolder, name) }))
          : [];
    const start = async (name: 'engine' | 'gateway', args: string[]) => {
      // Its log says when it is ready, at that level.
      const common = ['--host', '127.0.0.1', '--port', '0', '--log-level', 'info'];
      const running = await startProcess(name, [...common, ...args], (child) => void children.push(child));
      processes.push(running);
      return running;
    };
    const startEngine = (extra: string[]) => {
      const model = ['--model', modelPath, '--served-name', 'base', '--cache', cacheFolder];
      return start('engine', [...model, ...options.engineArgs, ...extra]);
    };

    say(`starting an engine with ${modelPath}`);
    let engine = await startEngine([]);
    let beginMs = performance.now();
    const [first, ...others] = adapters;
    if (first !== undefined) {
      await load(engine.url, first);
      const { arena } = await getJson<AdapterList>(`${engine.url}${enginePaths.adapters}`);
      const isGiven = options.engineArgs.some((argument) => argument.startsWith('--device-memory'));
      const memory =
        options.numRegistered === 0
          ? null
          : arenaFor(arena, adapters.length, isGiven, process.availableMemory());
      if (memory !== null) {
        say(`starting it again with --device-memory ${memory}, which holds ${adapters.length} adapters`);
        await processes.pop()!.stop();
        engine = await startEngine(['--device-memory', String(memory)]);
        beginMs = performance.now();
        await load(engine.url, first);
      }
      let numLoaded = 1;
      let saidMs = performance.now();
      const queue = others.values();
      await Promise.all(
        Array.from({ length: Math.min(numLoadsAtOnce, availableParallelism()) }, async () => {
          for (const adapter of queue) {
            signal.throwIfAborted();
            await load(engine.url, adapter);
            numLoaded++;
            if (performance.now() - saidMs < sayIntervalMs) continue;
            saidMs = performance.now();
            say(`${numLoaded} of ${adapters.length} adapters are loaded`);
          }
        }),
      );
    }
    const loadSeconds = adapters.length === 0 ? 0 : (performance.now() - beginMs) / 1000;
    const { arena } = await getJson<AdapterList>(`${engine.url}${enginePaths.adapters}`);

    let url = engine.url;
    if (options.through === 'gateway') {
      url = (await start('gateway', ['--engine', engine.url])).url;
      await untilServed(url, adapters.length + 1, signal);
    }
    const { through, engineArgs } = options;
    return {
      url,
      facts: {
        modelPath,
        through,
        engineArgs,
        numAdapters: adapters.length,
        loadSeconds,
        adapterBytes: arena.adapterBytes,
        arenaBytes: arena.totalBytes,
      },
      stop,
    };
  } catch (error) {
    await stop();
    throw error;
  }
}

async function randomAdapters(
  { numRegistered, rank, targets }: OwnServerOptions,
  modelPath: string,
  scratch: string,
): Promise<NewAdapter[]> {
  const { dims } = await readBaseModel(modelPath);
  const numDigits = String(numRegistered).length;
  return Array.from({ length: numRegistered }, (_, i) => {
    const name = `random-${String(i + 1).padStart(numDigits, '0')}`;
    const folder = join(scratch, name);
    return {
      name,
      async folder() {
        // It may be there already, from an engine that had too little memory.
        if (!existsSync(folder)) await writeRandomAdapter(folder, dims, rank, targets, i);
        return folder;
      },
    };
  });
}

async function load(engineUrl: string, { name, folder }: NewAdapter): Promise<void> {
  const { status, body } = await loadAdapterOver(engineUrl, name, await folder());
  if (status !== 200) {
    throw new Error(`the engine did not load adapter ${name}: ${status} ${body?.error?.message ?? body}`);
  }
}

/**
 * Bytes that the device arena must have to hold all adapters, which are as large as the first, beside as much for KV as it
 * has now. Adapters may take half of the arena that is there.
 *
 * @param isGiven the user chose its size, which is then not changed
 * @param availableBytes memory that this machine can give beside that arena
 * @returns null: the arena is large enough
 * @throws OptionError when all adapters cannot be held
 */
export function arenaFor(
  { totalBytes, adapterBytes }: { totalBytes: number; adapterBytes: number },
  numAdapters: number,
  isGiven: boolean,
  availableBytes: number,
): number | null {
  const wanted = totalBytes + adapterBytes * numAdapters;
  const what = `${numAdapters} adapters of ${adapterBytes} bytes`;
  if (isGiven) {
    if (adapterBytes * numAdapters < totalBytes) return null;
    throw new OptionError(
      `--device-memory: expected more than ${adapterBytes * numAdapters} bytes for ${what} and KV, got ${totalBytes}`,
    );
  }
  if (adapterBytes * numAdapters <= totalBytes / 2) return null;
  if (wanted > totalBytes + availableBytes) {
    throw new OptionError(
      `--register: expected ${wanted} bytes of memory for ${what} and KV, got ${totalBytes + availableBytes}`,
    );
  }
  return wanted;
}

async function untilServed(url: string, numModels: number, signal: AbortSignal): Promise<void> {
  const beginMs = performance.now();
  for (;;) {
    // A gateway that ends waits for open connections, so none is kept.
    const { statusCode, body } = await request(`${url}${enginePaths.models}`, { reset: true, signal });
    const text = await body.text();
    const numListed = statusCode === 200 ? (JSON.parse(text) as ModelList).data.length : 0;
    if (numListed >= numModels) return;
    if (performance.now() - beginMs > gatewayWaitMs) {
      const waited = `within ${gatewayWaitMs / 1000} s`;
      throw new Error(
        `the gateway: expected ${numModels} models ${waited}, got ${numListed} with status ${statusCode}`,
      );
    }
    await sleep(50, undefined, { signal });
  }
}
