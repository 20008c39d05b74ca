/** What the machine can do at most, measured by the C++ programs beside this folder in the same rounds as what is compared. */
import { execFile } from 'node:child_process';
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { promisify } from 'node:util';

const run = promisify(execFile);
const buildFolder = join(import.meta.dirname, '../../../native/build');

export interface Roof {
  /** Reading an array as large as what a step reads. */
  gigabytesPerSecond: number;
  /** int8 multiplies and adds, 10^9 a second, by vpdpbusd; 0: the CPU has none. */
  vnniGops: number;
  /** The same by AMX; 0: the CPU has none. */
  amxGops: number;
}

async function ask(program: string, args: (string | number)[]): Promise<Record<string, number | null>> {
  const path = join(buildFolder, program);
  if (!existsSync(path)) throw new Error(`${path}: expected the program here; npm run bench:peers builds it`);
  const { stdout } = await run(path, args.map(String), { encoding: 'utf8' });
  return JSON.parse(stdout);
}

export async function readGigabytesPerSecond(bytes: number, threads: number): Promise<number> {
  const mebibytes = Math.max(16, Math.round(bytes / 2 ** 20));
  return (await ask('read_bandwidth_bench', [mebibytes, threads, 3])).gigabytesPerSecond!;
}

export async function measureRoof(bytes: number, threads: number): Promise<Roof> {
  const gigabytesPerSecond = await readGigabytesPerSecond(bytes, threads);
  const peaks = await ask('int8_peak_bench', [threads, 3]);
  return {
    gigabytesPerSecond,
    vnniGops: Math.max(peaks.vnni512 ?? 0, peaks.vnni256 ?? 0),
    amxGops: peaks.amx ?? 0,
  };
}
