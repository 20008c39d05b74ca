/**
 * transformers + PEFT as a contestant of the clients' case. It has no server and no queue: all clients' prompts are one static
 * batch, and their next prompts another after it. Only its arithmetic is compared, then, and that in its favour.
 */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { type Answer, type Load, prompts, summarize } from './closed-loop.ts';
import { adapterFolders, modelFolder, pythonFolder, versions } from './peer-files.ts';
import type { Figures } from './rounds.ts';
import type { ServerPlan } from './servers.ts';

export interface PeftProcess {
  pid: number;
  run(load: Load): Promise<Figures>;
  stop(): Promise<void>;
}

export const peftName = `PEFT ${versions.peft_version} bf16, static batches`;

/** @returns why it cannot run here, or null */
export function missingPeft(): string | null {
  const found =
    existsSync(join(pythonFolder, 'bin/python')) && existsSync(join(pythonFolder, '.motet-transformers'));
  return found
    ? null
    : `${pythonFolder} has no PEFT; tests/bench/peers/setup.sh --with transformers installs it`;
}

export async function startPeft(plan: Omit<ServerPlan, 'kind'>): Promise<PeftProcess> {
  const folders = await adapterFolders(plan.shape, plan.adapters, plan.numAdapters);
  const script = join(import.meta.dirname, 'peft_batches.py');
  const child = spawn(
    join(pythonFolder, 'bin/python'),
    [script, await modelFolder(plan.shape), `${plan.threads}`, ...folders],
    { stdio: ['pipe', 'pipe', 'pipe'], env: { ...process.env, HF_HUB_OFFLINE: '1' } },
  );
  let tail = '';
  child.stderr.on('data', (bytes) => {
    tail = (tail + bytes).slice(-2000);
  });
  const atExit = () => child.kill('SIGKILL');
  process.once('exit', atExit);
  child.once('close', () => process.off('exit', atExit));
  const lines = createInterface(child.stdout)[Symbol.asyncIterator]();
  const answer = async () => {
    const { value, done } = await lines.next();
    if (done) throw new Error(`peft_batches.py ended: ${tail}`);
    return JSON.parse(value);
  };
  await answer();
  return {
    pid: child.pid!,
    async run(load) {
      const prompt = prompts(load);
      const adapters = Array.from({ length: load.clients }, (_, client) => client % folders.length);
      const answers: Answer[] = [];
      const begin = performance.now();
      for (let i = 0; i < load.requestsPerClient; i++) {
        const job = { prompts: adapters.map(prompt), adapters, new: load.outputTokens };
        child.stdin.write(`${JSON.stringify(job)}\n`);
        const { first_ms, last_ms } = await answer();
        for (const _ of adapters)
          answers.push({ firstMs: first_ms, lastMs: last_ms, numTokens: load.outputTokens });
      }
      return summarize(answers, performance.now() - begin);
    },
    async stop() {
      if (child.exitCode !== null || child.signalCode !== null) return;
      const closed = once(child, 'close');
      child.kill('SIGKILL');
      await closed;
    },
  };
}
