// sum-tests.ts FOLDER SUITE...
// Adds up the reports in a folder, of ctest (ctest.xml, gtest/*.xml) and of vitest without and with a cluster (vitest.json,
// cluster.json), and prints one line, `N passed, N failed`. Exits 1 when a test failed or was skipped, or when one of the suites
// named ran no test: a test that silently stops running is worse than one that fails. A skip that is meant has its place in
// `expectedSkips`, with its reason.

import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';

type Outcome = 'passed' | 'failed' | 'skipped';
type Result = { name: string; outcome: Outcome };

/** Full name of a test that may be skipped on some machine -> why. */
const expectedSkips = new Map<string, string>();

const readers = {
  ctest: readCtest,
  vitest: () => readVitest('vitest.json'),
  cluster: () => readVitest('cluster.json'),
};
const [folder = '.', ...names] = process.argv.slice(2) as [string, ...(keyof typeof readers)[]];
const suites = names.map((name) => ({ name, found: readers[name]() }));
const results = suites.flatMap(({ found }) => found);
const count = (outcome: Outcome) => results.filter((result) => result.outcome === outcome).length;

let isGood = count('failed') === 0;
for (const { name, found } of suites) {
  if (found.length > 0) continue;
  console.log(`${name} ran no test`);
  isGood = false;
}
for (const { name, outcome } of results) {
  if (outcome !== 'skipped') continue;
  const reason = expectedSkips.get(name);
  console.log(`skipped: ${name} (${reason ?? 'not expected'})`);
  if (reason === undefined) isGood = false;
}
const skipped = count('skipped') > 0 ? `, ${count('skipped')} skipped` : '';
console.log(`${count('passed')} passed, ${count('failed')} failed${skipped}`);
process.exitCode = isGood ? 0 : 1;

/** The cases of every C++ test program. One that wrote no report, or failed although its cases passed, crashed. */
function readCtest(): Result[] {
  // <testcase name="matmul_test" ... status="run|fail|notrun|disabled">
  const programs = read('ctest.xml').matchAll(/<testcase\b[^>]*?\bname="([^"]*)"[^>]*?\bstatus="([^"]*)"/g);
  return [...programs].flatMap(([, name = '', status]) => {
    const cases = readGtest(name);
    if (status === 'run' && cases.length > 0) return cases;
    if (status === 'fail' && cases.some(({ outcome }) => outcome === 'failed')) return cases;
    const outcome = status === 'run' ? 'passed' : status === 'fail' ? 'failed' : 'skipped';
    return [...cases, { name, outcome }];
  });
}

/** <testcase name="AddsUp" ... result="completed|skipped|suppressed" ...> with <failure> inside when it failed. */
function readGtest(program: string): Result[] {
  const cases = read(`gtest/${program}.xml`).matchAll(/<testcase\b([^>]*?)(?:\/>|>([\s\S]*?)<\/testcase>)/g);
  return [...cases].map(([, attributes = '', inside = '']) => {
    const name = `${program} ${/\bname="([^"]*)"/.exec(attributes)?.[1]}`;
    if (inside.includes('<failure')) return { name, outcome: 'failed' };
    return { name, outcome: attributes.includes('result="completed"') ? 'passed' : 'skipped' };
  });
}

/** A file that could not be loaded has a status of its own and no tests; it counts as one failure. */
function readVitest(report: string): Result[] {
  const { testResults } = JSON.parse(read(report) || '{"testResults":[]}') as {
    testResults: { name: string; status: string; assertionResults: { fullName: string; status: string }[] }[];
  };
  return testResults.flatMap(({ name, status, assertionResults }) => {
    const found = assertionResults.map((test): Result => {
      const outcome = test.status === 'passed' || test.status === 'failed' ? test.status : 'skipped';
      return { name: test.fullName, outcome };
    });
    const hasFailedTest = found.some(({ outcome }) => outcome === 'failed');
    return status === 'failed' && !hasFailedTest ? [...found, { name, outcome: 'failed' as const }] : found;
  });
}

/** The text of a report, empty when the suite did not get as far as writing it. */
function read(name: string): string {
  const path = join(folder, name);
  return existsSync(path) ? readFileSync(path, 'utf8') : '';
}
