/** A thread that makes one merge (merges.ts) and ends. It gives way to whoever computes steps. */
import { setPriority } from 'node:os';
import { parentPort, workerData } from 'node:worker_threads';
import { EngineError } from '../errors.ts';
import { mergeFolders } from './merge-folders.ts';
import type { MergeOutcome, MergeWork } from './merges.ts';

const lowest = 19;

async function merge({ members, rule, out, maxBytes }: MergeWork): Promise<MergeOutcome> {
  try {
    return { made: await mergeFolders(members, rule, out, maxBytes) };
  } catch (error) {
    // Its class would be lost on the way.
    if (error instanceof EngineError) return { code: error.code, message: error.message };
    throw error;
  }
}

// On Linux this is of the thread alone.
if (process.platform === 'linux') setPriority(lowest);
parentPort!.postMessage(await merge(workerData as MergeWork));
