/**
 * Many base models and adapters for one operator, which is a process of its own as in a cluster: how long until everything is
 * ready, what that takes, and what a world that rests costs. Engines are simulated (tests/fixtures/simulated-engines.ts).
 */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { setTimeout as sleep } from 'node:timers/promises';
import { motetPath } from '../../crds/api.ts';
import type { LoraAdapter } from '../../crds/types.ts';
import { inParallel } from '../../operator/parallel.ts';
import type { ControlPlane } from '../fixtures/control-plane.ts';
import { createWorld, type EnginePod, type World } from './simulated-world.ts';

export interface FleetOptions {
  numBaseModels: number;
  numAdapters: number;
  /** Of a load, milliseconds. */
  loadMs: number;
  /** Of the operator. */
  args?: string[];
}

export interface Fleet {
  world: World;
  operator: OperatorProcess;
  engines: EnginePod[];
  adapters: () => Promise<LoraAdapter[]>;
  stop: () => Promise<void>;
}

/** Everything exists, and the operator starts. Base models have two or three engines each, adapters one or two copies. */
export async function startFleet(plane: ControlPlane, options: FleetOptions): Promise<Fleet> {
  const { numBaseModels, numAdapters, loadMs, args = [] } = options;
  const world = await createWorld(plane);
  const indices = (count: number) => Array.from({ length: count }, (_, index) => index);
  const engines: EnginePod[] = [];
  await inParallel(indices(numBaseModels), 8, async (index) => {
    await world.addBaseModel(`base-${index}`);
    for (const number of indices(2 + (index % 2))) {
      engines.push(await world.addEngine(`base-${index}-${number}`, `base-${index}`, { loadMs }));
    }
  });
  await inParallel(indices(numAdapters), 16, async (index) => {
    await world.addAdapter(`adapter-${index}`, `base-${index % numBaseModels}`, { copies: 1 + (index % 2) });
  });
  const operator = await startOperatorProcess(plane, world.namespace, args);
  return {
    world,
    operator,
    engines,
    async adapters() {
      const { items } = await world.api<{ items: LoraAdapter[] }>({
        path: motetPath('LoraAdapter', world.namespace),
        timeoutMs: 60_000,
      });
      return items;
    },
    async stop() {
      await operator.stop();
      await world.stopEngines();
    },
  };
}

export function isReady({ metadata, status }: LoraAdapter): boolean {
  const ready = status?.conditions?.find(({ type }) => type === 'Ready');
  return ready?.status === 'True' && ready.observedGeneration === metadata.generation;
}

/** @returns the seconds it took */
export async function untilAllReady(fleet: Fleet, limitSeconds: number): Promise<number> {
  const begunMs = performance.now();
  for (;;) {
    const waiting = (await fleet.adapters()).filter((adapter) => !isReady(adapter));
    const seconds = (performance.now() - begunMs) / 1000;
    if (waiting.length === 0) return seconds;
    if (seconds > limitSeconds) {
      const [first] = waiting;
      throw new Error(
        `${waiting.length} adapters are not ready, the first: ${JSON.stringify(first!.status)}`,
      );
    }
    await sleep(500);
  }
}

export interface OperatorProcess {
  pid: number;
  /** Series of a metric: its labels as they are written -> its value. */
  metric: (name: string) => Promise<Record<string, number>>;
  /** Bytes in memory now, and at most since it started. */
  memory: () => { rss: number; peak: number };
  /** Seconds of processor time since it started. */
  cpuSeconds: () => number;
  stop: () => Promise<number | null>;
}

export async function startOperatorProcess(
  plane: ControlPlane,
  namespace: string,
  args: string[],
): Promise<OperatorProcess> {
  const main = join(import.meta.dirname, '../../operator/main.ts');
  const all = [
    ...[main, '--kubeconfig', plane.kubeconfig, '--namespace', namespace, '--engine-image', 'none'],
    ...['--trusted-service-accounts', `${namespace}/motet-gateway,${namespace}/motet-operator`],
    ...['--host', '127.0.0.1', '--port', '0', ...args],
  ];
  const child = spawn(process.execPath, all, { stdio: ['ignore', 'pipe', 'inherit'] });
  const exited = once(child, 'exit');
  const started = Promise.withResolvers<number>();
  createInterface(child.stdout).on('line', (line) => {
    const { msg, port } = JSON.parse(line) as { msg: string; port?: number };
    if (msg === 'watches') started.resolve(port!);
  });
  const ended = exited.then(([code]) => {
    throw new Error(`the operator ended with ${code}`);
  });
  const port = await Promise.race([started.promise, ended]);
  ended.catch(() => undefined);
  const proc = (file: string) => readFileSync(`/proc/${child.pid}/${file}`, 'utf8');
  const kilobytes = (field: string) =>
    Number(new RegExp(`${field}:\\s+(\\d+) kB`).exec(proc('status'))![1]) * 1024;
  return {
    pid: child.pid!,
    async metric(name) {
      const text = await (await fetch(`http://127.0.0.1:${port}/metrics`)).text();
      const lines = text.split('\n').filter((line) => line.startsWith(`${name}{`));
      return Object.fromEntries(
        lines.map((line) => {
          const [, labels, value] = /\{(.*)\} (\S+)$/.exec(line)!;
          return [labels!, Number(value)];
        }),
      );
    },
    memory: () => ({ rss: kilobytes('VmRSS'), peak: kilobytes('VmHWM') }),
    cpuSeconds() {
      // utime and stime, in hundredths of a second; the name before them may have spaces in it.
      const fields = proc('stat').split(') ')[1]!.split(' ');
      return (Number(fields[11]) + Number(fields[12])) / 100;
    },
    async stop() {
      if (child.exitCode === null && child.signalCode === null) child.kill('SIGTERM');
      return (await exited)[0] as number | null;
    },
  };
}
