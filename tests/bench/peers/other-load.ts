/**
 * How much of the machine others took while something was measured: all busy time in /proc/stat, stolen time too, without
 * that of this process and those it started. A figure is worth what its quiet is worth, so each sample carries this share.
 */
import { readdirSync, readFileSync } from 'node:fs';
import { availableParallelism } from 'node:os';

/** Linux counts CPU time in 1/100 s for every process to see. */
const ticksPerSecond = 100;

export interface CpuMoment {
  atSeconds: number;
  /** Since boot, all CPUs. */
  busySeconds: number;
  /** Of this process, its descendants, and those of them that have ended. */
  ownSeconds: number;
}

export function cpuMoment(): CpuMoment {
  return {
    atSeconds: performance.now() / 1000,
    busySeconds: parseBusySeconds(readFileSync('/proc/stat', 'utf8')),
    ownSeconds: treeSeconds(process.pid, readProcesses()),
  };
}

/** Share of the machine that others took between two moments, 0 to 1. */
export function othersShare(before: CpuMoment, after: CpuMoment, numCpus = availableParallelism()): number {
  return busyShare(
    { ...before, busySeconds: before.busySeconds - before.ownSeconds },
    { ...after, busySeconds: after.busySeconds - after.ownSeconds },
    numCpus,
  );
}

/** Share of the machine that anybody took, 0 to 1. */
export function busyShare(before: CpuMoment, after: CpuMoment, numCpus = availableParallelism()): number {
  const available = (after.atSeconds - before.atSeconds) * numCpus;
  return available > 0 ? Math.min(1, Math.max(0, (after.busySeconds - before.busySeconds) / available)) : 0;
}

/** From the first line of /proc/stat: user, nice, system, irq, softirq and steal; not idle, not waiting for disks. */
export function parseBusySeconds(stat: string): number {
  const [user, nice, system, , , irq, softirq, steal] = stat
    .split('\n')[0]!
    .split(/\s+/)
    .slice(1)
    .map(Number);
  return (user! + nice! + system! + irq! + softirq! + steal!) / ticksPerSecond;
}

export interface ProcessTimes {
  pid: number;
  parent: number;
  /** Its own, and that of children it has waited for. */
  seconds: number;
}

/** One line of /proc/<pid>/stat. The command, in parentheses, may itself hold blanks and parentheses. */
export function parseProcess(stat: string): ProcessTimes {
  const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ');
  const ticks = fields.slice(11, 15).reduce((sum, field) => sum + Number(field), 0);
  return { pid: Number.parseInt(stat, 10), parent: Number(fields[1]), seconds: ticks / ticksPerSecond };
}

export function treeSeconds(root: number, processes: readonly ProcessTimes[]): number {
  const children = Map.groupBy(processes, ({ parent }) => parent);
  const secondsBelow = (pid: number): number =>
    (children.get(pid) ?? []).reduce((sum, child) => sum + child.seconds + secondsBelow(child.pid), 0);
  return (processes.find(({ pid }) => pid === root)?.seconds ?? 0) + secondsBelow(root);
}

function readProcesses(): ProcessTimes[] {
  return readdirSync('/proc').flatMap((name) => {
    if (!/^\d+$/.test(name)) return [];
    try {
      return [parseProcess(readFileSync(`/proc/${name}/stat`, 'utf8'))];
    } catch {
      return []; // it has ended meanwhile
    }
  });
}
