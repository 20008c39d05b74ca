/** The servers of the clients' case, each started with one base model and the same adapters, on a free port of this machine. */
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, readFileSync } from 'node:fs';
import { basename, join } from 'node:path';
import { freePort } from '../../fixtures/free-port.ts';
import { cacheFolder } from '../../fixtures/models.ts';
import { startProcess } from '../../fixtures/processes.ts';
import type { Bench } from './bench.ts';
import type { Completion } from './closed-loop.ts';
import { type LlamaCpp, llamaProgram } from './llama-cpp.ts';
import {
  type AdapterPlan,
  adapterFolders,
  adapterGgufs,
  type FileKind,
  modelFolder,
  modelGguf,
  pythonFolder,
  versions,
} from './peer-files.ts';
import type { ShapeName } from './shapes.ts';

export interface PeerServer {
  url: string;
  pid: number;
  completion(prompt: number[], client: number, outputTokens: number): Completion;
  stop(): Promise<void>;
}

export interface ServerPlan {
  shape: ShapeName;
  kind: FileKind;
  adapters: AdapterPlan;
  numAdapters: number;
  maxClients: number;
  threads: number;
  formats: Bench['formats'];
}

const openAiBody = (model: string, prompt: number[], outputTokens: number): Completion => ({
  path: '/v1/completions',
  body: {
    ...{
      model,
      prompt,
      max_tokens: outputTokens,
      min_tokens: outputTokens,
      ignore_eos: true,
      temperature: 0,
    },
    ...{ stream: true, stream_options: { include_usage: true } },
  },
});

export async function startMotet(plan: ServerPlan): Promise<PeerServer> {
  const folders = await adapterFolders(plan.shape, plan.adapters, plan.numAdapters);
  const server = await startProcess('engine', [
    ...['--model', await modelGguf(plan.shape, plan.kind), '--served-name', 'base', '--cache', cacheFolder],
    ...['--port', '0', '--device-memory', '3GiB', '--threads', `${plan.threads}`],
    ...['--adapter-quantization', plan.formats.adapterQuantization, '--kv-cache-dtype', plan.formats.kvType],
    // As with the others: a prompt that comes again is computed again.
    ...['--prefix-cache', 'off'],
    ...folders.flatMap((folder) => ['--adapter', `${basename(folder)}=${folder}`]),
  ]);
  return {
    url: server.url,
    pid: server.pid,
    completion: (prompt, client, outputTokens) =>
      openAiBody(basename(folders[client % folders.length]!), prompt, outputTokens),
    async stop() {
      await server.stop();
    },
  };
}

export async function startLlamaServer(build: LlamaCpp, plan: ServerPlan): Promise<PeerServer> {
  const adapters = await adapterGgufs(plan.shape, plan.adapters, plan.numAdapters);
  const port = await freePort();
  const server = await startChild(
    llamaProgram('llama-server'),
    [
      ...['-m', await modelGguf(plan.shape, plan.kind), '--host', '127.0.0.1', '--port', `${port}`],
      ...['-t', `${plan.threads}`, '-tb', `${plan.threads}`, '-np', `${plan.maxClients}`],
      ...['-c', `${plan.maxClients * 256}`, '-b', '2048', '-ub', '512', '--cache-ram', '0', '--no-warmup'],
      ...['--lora-init-without-apply', '--lora', adapters.join(',')],
    ],
    build.env,
    `http://127.0.0.1:${port}`,
  );
  return {
    ...server,
    completion: (prompt, client, outputTokens) => ({
      path: '/completion',
      body: {
        ...{
          prompt,
          n_predict: outputTokens,
          ignore_eos: true,
          temperature: 0,
          stream: true,
          cache_prompt: false,
        },
        lora: [{ id: client % adapters.length, scale: 1 }],
      },
    }),
  };
}

/** @returns why vLLM cannot run here, or null */
export function missingVllm(): string | null {
  const program = join(pythonFolder, 'bin/vllm');
  if (!existsSync(program))
    return `${program} is not there; tests/bench/peers/setup.sh --with vllm installs it`;
  return null;
}

/** vLLM's CPU build in bf16, with the libraries preloaded that its guide asks for, where they are. Without adapters it compiles. */
export async function startVllm(
  plan: Omit<ServerPlan, 'kind'>,
  cpus: readonly number[],
): Promise<PeerServer> {
  const folders =
    plan.numAdapters === 0 ? [] : await adapterFolders(plan.shape, plan.adapters, plan.numAdapters);
  const lora = [
    ...['--enable-lora', '--max-loras', `${Math.min(16, plan.numAdapters)}`],
    ...[
      '--max-lora-rank',
      `${plan.adapters.rank}`,
      '--max-cpu-loras',
      `${plan.numAdapters}`,
      '--lora-modules',
    ],
    ...folders.map((folder) => `${basename(folder)}=${folder}`),
  ];
  const port = await freePort();
  const preload = [
    '/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4',
    join(pythonFolder, 'lib/libiomp5.so'),
  ].filter((path) => existsSync(path));
  const server = await startChild(
    join(pythonFolder, 'bin/vllm'),
    [
      ...['serve', await modelFolder(plan.shape), '--served-model-name', 'base', '--host', '127.0.0.1'],
      ...['--port', `${port}`, '--dtype', 'bfloat16', '--max-model-len', '1024'],
      ...['--max-num-seqs', `${plan.maxClients}`, '--no-enable-prefix-caching'],
      ...(plan.numAdapters === 0 ? [] : lora),
    ],
    {
      ...process.env,
      LD_PRELOAD: preload.join(':'),
      VLLM_CPU_KVCACHE_SPACE: '2',
      VLLM_CPU_OMP_THREADS_BIND: cpus.join(','),
      HF_HUB_OFFLINE: '1',
      VLLM_NO_USAGE_STATS: '1',
      DO_NOT_TRACK: '1',
    },
    `http://127.0.0.1:${port}`,
  );
  return {
    ...server,
    completion: (prompt, client, outputTokens) =>
      openAiBody(
        folders.length === 0 ? 'base' : basename(folders[client % folders.length]!),
        prompt,
        outputTokens,
      ),
  };
}

/** Most that a server may take until it is healthy: vLLM compiles on its first start. */
const readyTimeoutMs = 300_000;

async function startChild(
  program: string,
  args: string[],
  env: NodeJS.ProcessEnv,
  url: string,
): Promise<Pick<PeerServer, 'url' | 'pid' | 'stop'>> {
  // A group of its own, so that what it starts ends with it.
  const child = spawn(program, args, { env, detached: true, stdio: ['ignore', 'pipe', 'pipe'] });
  let tail = '';
  const keepTail = (bytes: Buffer) => {
    tail = (tail + bytes).slice(-2000);
  };
  child.stdout!.on('data', keepTail);
  child.stderr!.on('data', keepTail);
  const stop = () => stopGroup(child);
  const atExit = () => signalGroup(child, 'SIGKILL');
  process.once('exit', atExit);
  child.once('close', () => process.off('exit', atExit));
  const deadline = performance.now() + readyTimeoutMs;
  while (!(await isHealthy(url))) {
    const hasEnded = child.exitCode !== null || child.signalCode !== null;
    if (hasEnded || performance.now() > deadline) {
      await stop();
      const how = hasEnded ? `ended (${child.signalCode ?? child.exitCode})` : 'took too long';
      throw new Error(`${basename(program)} ${how} before it was ready: ${tail}`);
    }
    await new Promise((resolve) => setTimeout(resolve, 200));
  }
  return { url, pid: child.pid!, stop };
}

async function isHealthy(url: string): Promise<boolean> {
  try {
    return (await fetch(`${url}/health`, { signal: AbortSignal.timeout(2000) })).ok;
  } catch {
    return false;
  }
}

async function stopGroup(child: ChildProcess): Promise<void> {
  if (child.exitCode !== null || child.signalCode !== null) return;
  const closed = once(child, 'close');
  signalGroup(child, 'SIGTERM');
  const timer = setTimeout(() => signalGroup(child, 'SIGKILL'), 10_000);
  await closed;
  clearTimeout(timer);
}

function signalGroup(child: ChildProcess, signal: NodeJS.Signals): void {
  try {
    process.kill(-child.pid!, signal);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ESRCH') throw error;
  }
}

/** Resident bytes of a process and all it started. */
export function residentBytes(pid: number): number {
  const kilobytes = /^Rss:\s+(\d+) kB/m.exec(readFileSync(`/proc/${pid}/smaps_rollup`, 'utf8'))?.[1] ?? '0';
  const children = readFileSync(`/proc/${pid}/task/${pid}/children`, 'utf8')
    .trim()
    .split(' ')
    .filter(Boolean);
  return Number(kilobytes) * 1024 + children.reduce((sum, child) => sum + residentBytes(Number(child)), 0);
}

export const vllmName = `vLLM ${versions.vllm_version} bf16`;
