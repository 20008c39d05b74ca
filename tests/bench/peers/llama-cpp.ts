/** llama.cpp's own bench programs and server, as setup.sh built them. */
import { execFile } from 'node:child_process';
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { llamaFolder } from './peer-files.ts';

export interface LlamaCpp {
  /** In tables: `llama.cpp`, and `llama.cpp without AMX`. */
  name: string;
  /** What its programs need in their environment. */
  env: NodeJS.ProcessEnv;
}

/** The builds that are here; none: the reason says what to do. */
export function findLlamaCpp(cpus: readonly number[]): LlamaCpp[] | { missing: string } {
  const program = join(llamaFolder, 'build/bin/llama-batched-bench');
  if (!existsSync(program))
    return { missing: `${program} is not there; tests/bench/peers/setup.sh builds it` };
  // One thread on each CPU: its threads wait in spins, so two of them on one CPU would stop each other.
  const env = { ...process.env, GOMP_CPU_AFFINITY: cpus.join(' ') };
  const withoutAmx = join(llamaFolder, 'no-amx');
  const builds: LlamaCpp[] = [{ name: 'llama.cpp', env }];
  if (existsSync(withoutAmx))
    builds.push({ name: 'llama.cpp without AMX', env: { ...env, LD_LIBRARY_PATH: withoutAmx } });
  return builds;
}

export const llamaProgram = (name: string) => join(llamaFolder, 'build/bin', name);

const run = promisify(execFile);

async function runProgram({ env }: LlamaCpp, name: string, args: (string | number)[]): Promise<string> {
  const options = { env, encoding: 'utf8', maxBuffer: 1 << 24, timeout: 600_000 } as const;
  const { stdout } = await run(llamaProgram(name), args.map(String), options);
  return stdout;
}

/** Milliseconds of one step of `batch` sequences after their context. */
export async function llamaDecodeMs(
  build: LlamaCpp,
  model: string,
  threads: number,
  work: { batch: number; contextTokens: number; steps: number },
): Promise<number> {
  const { batch, contextTokens, steps } = work;
  // The context is shared out evenly, in multiples of 256.
  const kvTokens = batch * Math.ceil((contextTokens + steps) / 256) * 256;
  const out = await runProgram(build, 'llama-batched-bench', [
    ...['-m', model, '-t', threads, '-tb', threads, '-c', kvTokens, '-b', 2048, '-ub', 512],
    ...['-npp', contextTokens, '-ntg', steps, '-npl', batch, '--output-format', 'jsonl'],
  ]);
  const line = out.split('\n').find((text) => text.startsWith('{'));
  if (line === undefined)
    throw new Error(`llama-batched-bench: expected a line of JSON, got '${out.slice(0, 200)}'`);
  return (JSON.parse(line).t_tg * 1000) / steps;
}

export async function llamaPrefillMs(
  build: LlamaCpp,
  model: string,
  threads: number,
  numTokens: number,
): Promise<number> {
  const out = await runProgram(build, 'llama-bench', [
    ...['-m', model, '-t', threads, '-p', numTokens, '-n', 0, '-r', 1, '-o', 'json'],
  ]);
  return JSON.parse(out)[0].avg_ns / 1e6;
}
