import { type ChildProcessByStdio, spawn } from 'node:child_process';
import { once } from 'node:events';
import { closeSync, mkdtempSync, openSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { Readable, Writable } from 'node:stream';
import { text } from 'node:stream/consumers';
import { expect, onTestFinished, test } from 'vitest';

const source = join(import.meta.dirname, '../../gateway/log-lines.ts');
/** More than a pipe takes in. */
const numLines = 20_000;

test('lines come whole and in order, however slowly they are read', async () => {
  const child = run(`for (let i = 0; i < ${numLines}; i++) lines.write(lineOf(i)); await lines.end();`);
  child.stdout.on('data', () => {
    child.stdout.pause();
    setTimeout(() => child.stdout.resume(), 1);
  });
  const read = text(child.stdout);
  expect(await exitOf(child)).toEqual([0, null]);
  expect(numbersIn(await read)).toEqual([...Array(numLines).keys()]);
});

test('lines come into a file', async () => {
  const folder = mkdtempSync(join(tmpdir(), 'motet-log-'));
  onTestFinished(() => rmSync(folder, { recursive: true }));
  const file = openSync(join(folder, 'log'), 'w');
  const child = run(`for (let i = 0; i < ${numLines}; i++) lines.write(lineOf(i)); await lines.end();`, file);
  closeSync(file);
  expect(await exitOf(child)).toEqual([0, null]);
  expect(numbersIn(readFileSync(join(folder, 'log'), 'utf8'))).toEqual([...Array(numLines).keys()]);
});

test('lines that were not passed on yet are written when the process ends at once', async () => {
  const child = run('lines.write(lineOf(0)); lines.write(lineOf(1)); process.exit(3);');
  const read = text(child.stdout);
  expect(await exitOf(child)).toEqual([3, null]);
  expect(numbersIn(await read)).toEqual([0, 1]);
});

test('a log that is open and not read keeps the process neither from its work nor from its end', async () => {
  const child = run(`
    for (let i = 0; i < ${numLines}; i++) lines.write(lineOf(i));
    await new Promise((resolve) => setTimeout(resolve, 20));
    console.error('works');
    await lines.end();
    lines.write(lineOf(0));
    console.error('ended');`);
  const said = text(child.stderr);
  expect(await exitOf(child)).toEqual([0, null]);
  expect(await said).toBe('works\nended\n');
});

test('a log that was closed keeps the process neither from its work nor from its end', async () => {
  const child = run(`
    await new Promise((resolve) => process.stdin.once('data', resolve));
    for (let i = 0; i < ${numLines}; i++) {
      lines.write(lineOf(i));
      if (i % 1000 === 0) await new Promise((resolve) => setTimeout(resolve, 1));
    }
    await lines.end();
    console.error('ended');
    process.exit();`);
  child.stdout.destroy();
  await once(child.stdout, 'close');
  const said = text(child.stderr);
  child.stdin.write('go\n');
  expect(await exitOf(child)).toEqual([0, null]);
  expect(await said).toBe('ended\n');
});

test('more than is kept for a slow reader is left out, and a line says how much', async () => {
  const child = run(`
    for (let i = 0; i < 40_000; i++) lines.write(lineOf(i, 1_000));
    console.error('written');
    await new Promise((resolve) => process.stdin.once('data', resolve));
    await lines.end();
    process.exit();`);
  await once(child.stderr, 'data');
  const read = text(child.stdout);
  child.stdin.write('go\n');
  expect(await exitOf(child)).toEqual([0, null]);
  const all = (await read)
    .trimEnd()
    .split('\n')
    .map((line) => JSON.parse(line) as { i?: number; lines?: number });
  const kept = all.flatMap(({ i }) => i ?? []);
  const lost = all.reduce((sum, { lines = 0 }) => sum + lines, 0);
  expect(kept).toEqual([...Array(kept.length).keys()]);
  expect(kept.length).toBeGreaterThan(10_000);
  expect(kept.length).toBeLessThan(20_000);
  expect(kept.length + lost).toBe(40_000);
});

type Child = ChildProcessByStdio<Writable, Readable, Readable>;

/** A process that has `lines` on its standard output, and lineOf(number, more characters). */
function run(script: string, output: 'pipe' | number = 'pipe'): Child {
  const whole = `
    import { LogLines } from ${JSON.stringify(source)};
    const lines = new LogLines(1);
    const lineOf = (i, more = 0) => JSON.stringify({ i, more: 'x'.repeat(more) }) + '\\n';
    ${script}`;
  const child = spawn(process.execPath, ['--input-type=module', '-e', whole], {
    stdio: ['pipe', output, 'pipe'],
  });
  onTestFinished(() => void child.kill('SIGKILL'));
  return child as Child;
}

async function exitOf(child: Child): Promise<unknown[]> {
  return await once(child, 'exit');
}

function numbersIn(log: string): number[] {
  return log
    .trimEnd()
    .split('\n')
    .map((line) => (JSON.parse(line) as { i: number }).i);
}
