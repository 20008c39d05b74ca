import { spawnSync } from 'node:child_process';
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { expect, onTestFinished, test } from 'vitest';

const script = join(import.meta.dirname, '../../scripts/sum-tests.ts');

const ctest = (status: string) =>
  `<testsuite><testcase name="lora_test" classname="x" status="${status}"/></testsuite>`;
const gtest = (...cases: string[]) => `<testsuites><testsuite>${cases.join('\n')}</testsuite></testsuites>`;
const passedCase = '<testcase name="A" status="run" result="completed" time="0" />';
const failedCase = '<testcase name="B" status="run" result="completed">\n<failure message="m"/>\n</testcase>';
const skippedCase = '<testcase name="C" status="run" result="skipped"><skipped message="m"/></testcase>';
const vitest = (...statuses: string[]) => {
  const assertionResults = statuses.map((status, index) => ({ fullName: `test ${index}`, status }));
  return JSON.stringify({ testResults: [{ name: 'a.test.ts', status: 'passed', assertionResults }] });
};

/** Runs the script over a folder with these files; returns the last line and the exit code. */
function sum(files: Record<string, string>, suites = ['ctest', 'vitest']) {
  const folder = mkdtempSync(join(tmpdir(), 'motet-'));
  onTestFinished(() => rmSync(folder, { recursive: true }));
  for (const [name, text] of Object.entries(files)) {
    mkdirSync(dirname(join(folder, name)), { recursive: true });
    writeFileSync(join(folder, name), text);
  }
  const { stdout, status } = spawnSync(process.execPath, [script, folder, ...suites], { encoding: 'utf8' });
  return { line: stdout.trimEnd().split('\n').at(-1), status, stdout };
}

test('adds up the cases of C++ and of TypeScript', () => {
  const { line, status } = sum({
    'ctest.xml': ctest('run'),
    'gtest/lora_test.xml': gtest(passedCase, passedCase),
    'vitest.json': vitest('passed', 'passed', 'passed'),
  });
  expect({ line, status }).toEqual({ line: '5 passed, 0 failed', status: 0 });
});

test('adds up the tests in a cluster when it is asked for them', () => {
  const files = { 'vitest.json': vitest('passed'), 'cluster.json': vitest('passed', 'failed') };
  expect(sum(files, ['vitest', 'cluster'])).toMatchObject({ line: '2 passed, 1 failed', status: 1 });
  expect(sum(files, ['vitest'])).toMatchObject({ line: '1 passed, 0 failed', status: 0 });
});

test('fails when the tests in a cluster did not run', () => {
  const { line, status, stdout } = sum({ 'vitest.json': vitest('passed') }, ['vitest', 'cluster']);
  expect({ line, status }).toEqual({ line: '1 passed, 0 failed', status: 1 });
  expect(stdout).toContain('cluster ran no test');
});

test.each<[string, Record<string, string>, string]>([
  [
    'a C++ case failed',
    {
      'ctest.xml': ctest('fail'),
      'gtest/lora_test.xml': gtest(passedCase, failedCase),
      'vitest.json': vitest('passed'),
    },
    '2 passed, 1 failed',
  ],
  [
    'a C++ program crashed after its cases',
    { 'ctest.xml': ctest('fail'), 'gtest/lora_test.xml': gtest(passedCase), 'vitest.json': vitest('passed') },
    '2 passed, 1 failed',
  ],
  [
    'a C++ program wrote no report',
    { 'ctest.xml': ctest('fail'), 'vitest.json': vitest('passed') },
    '1 passed, 1 failed',
  ],
  [
    'a TypeScript test failed',
    { 'ctest.xml': ctest('run'), 'vitest.json': vitest('failed') },
    '1 passed, 1 failed',
  ],
  [
    'a C++ case was skipped',
    { 'ctest.xml': ctest('run'), 'gtest/lora_test.xml': gtest(skippedCase), 'vitest.json': vitest('passed') },
    '1 passed, 0 failed, 1 skipped',
  ],
  [
    'a TypeScript test was skipped',
    { 'ctest.xml': ctest('run'), 'vitest.json': vitest('passed', 'pending') },
    '2 passed, 0 failed, 1 skipped',
  ],
  ['a suite ran no test', { 'vitest.json': vitest('passed') }, '1 passed, 0 failed'],
])('fails when %s', (_, files, line) => {
  expect(sum(files)).toMatchObject({ line, status: 1 });
});

test('counts a test file that could not be loaded as one failure', () => {
  const report = { testResults: [{ name: 'broken.test.ts', status: 'failed', assertionResults: [] }] };
  expect(sum({ 'ctest.xml': ctest('run'), 'vitest.json': JSON.stringify(report) })).toMatchObject({
    line: '1 passed, 1 failed',
    status: 1,
  });
});
