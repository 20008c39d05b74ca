/**
 * What a cluster leaves on the machine: nothing, however it ends. Each test brings a small one up beside that of the
 * run, with a folder of its own, and compares the machine before and after.
 */
import { execFile, execFileSync, spawn } from 'node:child_process';
import { createHash } from 'node:crypto';
import { once } from 'node:events';
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { promisify } from 'node:util';
import { expect, onTestFinished, test } from 'vitest';
import { poll, realCluster } from '../fixtures/cluster.ts';

const script = join(import.meta.dirname, 'cluster.sh');
const clustersFolder = dirname(realCluster().folder);

/** The process that holds the first process of a cluster, and its parent: both are outside of the namespaces. */
function supervisorOf(folder: string): { unshare: number; supervisor: number } {
  const unshare = Number(readFileSync(join(folder, 'unshare.pid'), 'utf8'));
  const parent = /^PPid:\s*(\d+)$/m.exec(readFileSync(`/proc/${unshare}/status`, 'utf8'))?.[1];
  return { unshare, supervisor: Number(parent) };
}

/** A process that sees the machine as it is: these tests run on the network of node 0. */
const outside = String(supervisorOf(realCluster().folder).supervisor);

/** A folder for a cluster beside that of the run, on the same disk. */
function newFolder(): { folder: string; env: NodeJS.ProcessEnv } {
  const folder = mkdtempSync(join(clustersFolder, 'teardown-'));
  const env = { ...process.env, MOTET_CLUSTER: folder };
  onTestFinished(async () => {
    await run(env, 'down');
    rmSync(folder, { recursive: true });
  });
  return { folder, env };
}

const run = (env: NodeJS.ProcessEnv, ...args: string[]) => promisify(execFile)(script, args, { env });
const up = ['up', '--nodes', '2', '--without-dns'];

/** What one could find of the cluster in `folder`, on the machine's own network and in all of its processes. */
function traces(folder: string): string[] {
  const found: string[] = [];
  for (const pid of readdirSync('/proc').filter((name) => /^\d+$/.test(name))) {
    try {
      const commandLine = readFileSync(`/proc/${pid}/cmdline`, 'utf8').replaceAll('\0', ' ');
      const environment = readFileSync(`/proc/${pid}/environ`, 'utf8');
      if (`${commandLine} ${environment}`.includes(folder)) found.push(`process ${commandLine}`);
    } catch {
      // It has ended meanwhile.
    }
  }
  const onMachine = (...command: string[]) =>
    execFileSync('nsenter', ['-t', outside, '--net', '--mount', '--', ...command], { encoding: 'utf8' });
  found.push(
    ...onMachine('cat', '/proc/self/mountinfo')
      .split('\n')
      .filter((line) => line.includes(folder)),
  );
  found.push(
    ...onMachine('ip', '-o', 'link')
      .split('\n')
      .filter((line) => /: (node|pods|veth)/.test(line)),
  );
  return found;
}

/** Its cgroups, in all hierarchies; cluster.sh names them by a hash of the folder. */
function cgroups(folder: string): string[] {
  const name = `motet-${createHash('sha256').update(`${folder}\n`).digest('hex').slice(0, 8)}`;
  const roots = [
    '/sys/fs/cgroup',
    ...readdirSync('/sys/fs/cgroup').map((root) => join('/sys/fs/cgroup', root)),
  ];
  return roots.map((root) => join(root, name)).filter((path) => existsSync(path));
}

/** Files that a cluster keeps: its logs, and the lock. */
const filesOf = (folder: string) => readdirSync(folder).sort();

/** Where Kubernetes keeps its things on a machine of its own. */
const foldersOfTheMachine = () =>
  ['/run', '/var/lib', '/var/log', '/etc', '/usr/libexec'].flatMap((path) =>
    existsSync(path) ? readdirSync(path).map((name) => join(path, name)) : [],
  );

test('leaves no process, mount, link, cgroup or file after down', { timeout: 180_000 }, async () => {
  const { folder, env } = newFolder();
  const before = { traces: traces(folder), cgroups: cgroups(folder), folders: foldersOfTheMachine() };
  await run(env, ...up);
  expect(traces(folder).filter((trace) => trace.startsWith('process')).length).toBeGreaterThan(5);
  expect(cgroups(folder).length).toBeGreaterThan(before.cgroups.length);
  await run(env, 'down');
  expect({ traces: traces(folder), cgroups: cgroups(folder), folders: foldersOfTheMachine() }).toEqual(
    before,
  );
  expect(filesOf(folder)).toEqual(['lock', 'log']);
  // Once more is no error.
  await run(env, 'down');
});

test('takes itself down when its first process is killed', { timeout: 180_000 }, async () => {
  const { folder, env } = newFolder();
  const before = { traces: traces(folder), cgroups: cgroups(folder) };
  await run(env, ...up);
  const { unshare } = supervisorOf(folder);
  process.kill(Number(readFileSync(`/proc/${unshare}/task/${unshare}/children`, 'utf8').trim()), 'SIGKILL');
  const isGone = await poll(
    async () => traces(folder).length + filesOf(folder).length,
    (sum) => sum === 2,
  );
  expect(isGone).toBe(2);
  expect({ traces: traces(folder), cgroups: cgroups(folder) }).toEqual(before);
});

test('takes itself down when the command that starts it is killed', { timeout: 180_000 }, async () => {
  const { folder, env } = newFolder();
  const before = { traces: traces(folder), cgroups: cgroups(folder) };
  const starting = spawn(script, up, { env, stdio: 'ignore' });
  const ended = once(starting, 'exit');
  // Half way: the other node is there.
  await poll(
    async () => existsSync(join(folder, 'node1/run/containerd')),
    (exists) => exists,
  );
  starting.kill('SIGKILL');
  await ended;
  const isGone = await poll(
    async () => traces(folder).length + filesOf(folder).length,
    (sum) => sum === 2,
  );
  expect(isGone).toBe(2);
  expect({ traces: traces(folder), cgroups: cgroups(folder) }).toEqual(before);
});

test('ends with its supervisor, and what that leaves the next up removes', { timeout: 180_000 }, async () => {
  const { folder, env } = newFolder();
  const before = { traces: traces(folder), cgroups: cgroups(folder) };
  await run(env, ...up);
  process.kill(supervisorOf(folder).supervisor, 'SIGKILL');
  expect(
    await poll(
      async () => traces(folder),
      (found) => found.length === before.traces.length,
    ),
  ).toEqual(before.traces);
  await run(env, ...up);
  await run(env, 'down');
  expect({ traces: traces(folder), cgroups: cgroups(folder) }).toEqual(before);
  expect(filesOf(folder)).toEqual(['lock', 'log']);
});
