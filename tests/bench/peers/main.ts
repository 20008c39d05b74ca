/**
 * Peers and us, side by side in one run: npm run bench:peers [-- options]. README.md beside this file says what each case is.
 * Tables go to standard output as Markdown, progress to standard error.
 */
import { readFileSync } from 'node:fs';
import { writeFile } from 'node:fs/promises';
import { totalmem } from 'node:os';
import { parseArgs } from 'node:util';
import { cpuInfo } from '../../../native/index.ts';
import {
  type Bench,
  type CaseName,
  type CaseResult,
  caseNames,
  cases,
  type PeerName,
  peerNames,
} from './cases.ts';
import { versions } from './peer-files.ts';
import { markdown } from './report.ts';
import { quantizations, type ShapeName, shapes } from './shapes.ts';

const usage = `npm run bench:peers -- [options]
  --only CASES       ${caseNames.join(',')}                    default: all
  --shapes SHAPES    ${Object.keys(shapes).join(',')}                              default: all
  --peers PEERS      ${peerNames.join(',')}               default: all that are installed
  --quants KINDS     ${quantizations.join(',')}                  files for llama.cpp; default: q4_0,q4_0_all
  --clients COUNTS   1 to 32                                               default: 8,16,32
  --rounds N         samples of each contestant, 1 to 100                  default: 5
  --threads N        default: one per usable CPU
  --max-others P     percent of the machine that others may take in a sample; above it is taken again  default: 6
  --json FILE        every sample
  --markdown FILE    the tables, as they are printed
`;

const options = parse(process.argv.slice(2));
const skipped = new Map<string, string>();
const bench: Bench = {
  ...options,
  rounds: { rounds: options.rounds, maxOthersShare: options.maxOthers / 100, maxTries: 3 },
  onProgress: showProgress,
  skip: (peer, reason) => {
    if (skipped.has(peer)) return;
    skipped.set(peer, reason);
    print(`${peer}: skipped, ${reason}`);
  },
};
const printed: string[] = [];
const results: CaseResult[] = [];

print(describeMachine());
for (const shape of options.shapes) {
  for (const name of options.only) {
    const result = await cases[name](bench, shape);
    results.push(result);
    showProgress('');
    for (const table of result.tables) print(markdown(table));
    for (const plot of result.plots) print(plot);
    // After each case, so that a run that is stopped leaves what it has.
    if (options.json)
      await writeFile(options.json, JSON.stringify({ machine: machine(), versions, results }, null, 1));
    if (options.markdown) await writeFile(options.markdown, printed.join('\n'));
  }
}

function print(text: string): void {
  showProgress('');
  printed.push(text);
  console.log(text);
}

/** One line that is written over on a terminal; a line each time elsewhere. */
function showProgress(text: string): void {
  if (process.stderr.isTTY) process.stderr.write(`\r\x1b[K${text.slice(0, process.stderr.columns - 1)}`);
  else if (text !== '') process.stderr.write(`  ${text}\n`);
}

function machine() {
  const model = /^model name\s*: (.*)$/m.exec(readFileSync('/proc/cpuinfo', 'utf8'))?.[1] ?? 'unknown CPU';
  const [family, number] = ['cpu family', 'model'].map(
    (key) => new RegExp(`^${key}\\s*: (\\d+)$`, 'm').exec(readFileSync('/proc/cpuinfo', 'utf8'))?.[1],
  );
  return { model, family, number, numCpus: options.cpus.length, memoryBytes: totalmem(), isa: cpuInfo().isa };
}

function describeMachine(): string {
  const { model, family, number, numCpus, memoryBytes, isa } = machine();
  const memory = `${(memoryBytes / 2 ** 30).toFixed(0)} GiB`;
  return (
    `${model} (family ${family}, model ${number}), ${numCpus} CPUs, ${memory}; our kernels: ${isa}; ` +
    `llama.cpp ${versions.llama_version}, vLLM ${versions.vllm_version}, ${new Date().toISOString().slice(0, 10)}\n`
  );
}

function parse(args: string[]) {
  const text = { type: 'string' as const };
  const flags = {
    ...{ only: text, shapes: text, peers: text, quants: text, clients: text, rounds: text, threads: text },
    ...{ 'max-others': text, json: text, markdown: text, help: { type: 'boolean' as const } },
  };
  try {
    const { values } = parseArgs({ args, options: flags });
    if (values.help) {
      console.log(usage);
      process.exit(0);
    }
    const list = <T extends string>(
      flag: string,
      given: string | undefined,
      choices: readonly T[],
      fallback: readonly T[],
    ) => (given === undefined ? [...fallback] : given.split(',').map((one) => oneOf(flag, one, choices)));
    const cpus = usableCpus();
    return {
      only: list<CaseName>('only', values.only, caseNames, caseNames),
      shapes: list(
        'shapes',
        values.shapes,
        Object.keys(shapes) as ShapeName[],
        Object.keys(shapes) as ShapeName[],
      ),
      peers: new Set(list<PeerName>('peers', values.peers, peerNames, peerNames)),
      kinds: list('quants', values.quants, quantizations, ['q4_0', 'q4_0_all']),
      clients: (values.clients ?? '8,16,32').split(',').map((one) => integer('clients', one, 1, 32)),
      rounds: integer('rounds', values.rounds ?? '5', 1, 100),
      threads: integer('threads', values.threads ?? `${cpus.length}`, 1, cpus.length),
      maxOthers: integer('max-others', values['max-others'] ?? '6', 0, 100),
      json: values.json,
      markdown: values.markdown,
      cpus,
    };
  } catch (error) {
    console.error(`bench:peers: ${(error as Error).message}\n\n${usage}`);
    process.exit(2);
  }
}

function oneOf<T extends string>(flag: string, given: string, choices: readonly T[]): T {
  const choice = choices.find((one) => one === given);
  if (choice === undefined)
    throw new RangeError(`--${flag}: expected some of ${choices.join(',')}, got ${given}`);
  return choice;
}

function integer(flag: string, given: string, min: number, max: number): number {
  const number = Number(given);
  if (!/^\d+$/.test(given) || number < min || number > max)
    throw new RangeError(`--${flag}: expected an integer from ${min} to ${max}, got ${given}`);
  return number;
}

/** The CPUs that this process may run on, by number. */
function usableCpus(): number[] {
  const list = /^Cpus_allowed_list:\s*(\S+)$/m.exec(readFileSync('/proc/self/status', 'utf8'))![1]!;
  const all = list.split(',').flatMap((range) => {
    const [first, last] = range.split('-').map(Number);
    return Array.from({ length: (last ?? first!) - first! + 1 }, (_, i) => first! + i);
  });
  // A container's quota may be less than its CPUs.
  return all.slice(0, cpuInfo().numCpus);
}
