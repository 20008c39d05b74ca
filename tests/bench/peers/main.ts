/**
 * Peers and us, side by side in one run: npm run bench:peers [-- options]. README.md beside this file says what each case is.
 * Tables go to standard output as Markdown, progress to standard error.
 */
import { readFileSync } from 'node:fs';
import { readFile, writeFile } from 'node:fs/promises';
import { totalmem } from 'node:os';
import { parseArgs } from 'node:util';
import { cpuInfo } from '../../../native/index.ts';
import { renderSvg } from '../plot.ts';
import { type Bench, type PeerName, peerNames } from './bench.ts';
import { cases, show } from './cases.ts';
import { versions } from './peer-files.ts';
import { addRounds, type CaseRecord, caseNames } from './record.ts';
import { quantizations, type ShapeName, shapes } from './shapes.ts';

const usage = `npm run bench:peers -- [options]
  --only CASES       ${caseNames.join(',')}; default: all
  --shapes SHAPES    ${Object.keys(shapes).join(',')}; default: all
  --peers PEERS      ${peerNames.join(',')}; default: all, and those not installed are skipped
  --quants KINDS     files for llama.cpp: ${quantizations.join(',')}; default: q4_0,q4_0_all
  --batches SIZES    of decode and tax, 1 to 64; default: 1,8,32
  --clients COUNTS   1 to 32; default: 8,16,32
  --rounds N         samples of each contestant, 1 to 100; default: 5
  --threads N        default: one per usable CPU
  --adapter-quantization keep|int8   how we keep adapters; default: keep, bf16
  --kv-cache-dtype auto|int8         how we keep KV; default: auto, f16
  --max-others P     percent of the machine that others may take in a sample; above it is taken again; default: 6
  --max-wait S       seconds to wait for a quiet machine before each try, 0 to 600; default: 20
  --json FILE        every sample, written after each case
  --add              keep what FILE has and add rounds to it: a long run in pieces
  --svg FILE         a picture of growth, of what was measured or of --show
  --show FILE        print the tables of such a file and measure nothing
`;

interface Report {
  machine: string;
  versions: typeof versions;
  date: string;
  records: CaseRecord[];
}

const options = parse(process.argv.slice(2));
// What was started ends with us.
for (const signal of ['SIGINT', 'SIGTERM'] as const) process.once(signal, () => process.exit(1));
try {
  if (options.show !== undefined) await print(await readReport(options.show));
  else await measure();
} catch (error) {
  showProgress('');
  console.error(`bench:peers: ${(error as Error).message}`);
  process.exitCode = 1;
}

async function measure(): Promise<void> {
  const { json, add } = options;
  const earlier = json !== undefined && add ? await readReport(json) : null;
  const machine = describeMachine();
  if (earlier !== null && earlier.machine !== machine)
    throw new Error(`--add: expected a file of '${machine}', got '${earlier.machine}'`);
  const report: Report = {
    machine,
    versions,
    date: new Date().toISOString().slice(0, 10),
    records: earlier?.records ?? [],
  };
  const bench: Bench = {
    ...options,
    rounds: {
      rounds: options.rounds,
      maxOthersShare: options.maxOthers / 100,
      maxTries: 3,
      maxWaitMs: options.maxWait * 1000,
      watchMs: 500,
    },
    onProgress: showProgress,
    skip: tellOnce(),
  };
  console.log(heading(report));
  for (const shape of options.shapes) {
    for (const name of options.only) {
      const record = await cases[name].measure(bench, shape);
      const index = report.records.findIndex((one) => one.case === name && one.shape === shape);
      const whole = index < 0 ? record : addRounds(report.records[index]!, record);
      if (index < 0) report.records.push(whole);
      else report.records[index] = whole;
      showProgress('');
      console.log(show(whole));
      if (json !== undefined) await writeFile(json, JSON.stringify(report, null, 1));
    }
  }
  await draw(report);
}

async function print(report: Report): Promise<void> {
  console.log(heading(report));
  for (const record of report.records) console.log(show(record));
  await draw(report);
}

async function draw({ records }: Report): Promise<void> {
  if (options.svg === undefined) return;
  const panels = records.flatMap((record) => cases[record.case].panels?.(record) ?? []);
  if (panels.length === 0) throw new Error('--svg: expected the case growth among the records, got none');
  await writeFile(options.svg, renderSvg(panels));
}

function heading({ machine, date }: Report): string {
  const { llama_version, vllm_version, peft_version } = versions;
  return `${machine}; llama.cpp ${llama_version}, vLLM ${vllm_version}, PEFT ${peft_version}; ${date}\n`;
}

async function readReport(path: string): Promise<Report> {
  const report = JSON.parse(await readFile(path, 'utf8')) as Partial<Report>;
  if (!Array.isArray(report.records))
    throw new Error(`${path}: expected a file that --json wrote, got another`);
  return report as Report;
}

function tellOnce(): Bench['skip'] {
  const told = new Set<string>();
  return (peer, reason) => {
    if (told.has(peer)) return;
    told.add(peer);
    showProgress('');
    console.log(`${peer}: skipped, ${reason}\n`);
  };
}

/** One line that is written over on a terminal; a line each time elsewhere. */
function showProgress(text: string): void {
  if (process.stderr.isTTY) process.stderr.write(`\r\x1b[K${text.slice(0, process.stderr.columns - 1)}`);
  else if (text !== '') process.stderr.write(`  ${text}\n`);
}

function describeMachine(): string {
  const text = readFileSync('/proc/cpuinfo', 'utf8');
  const field = (key: string) => new RegExp(`^${key}\\s*: (.*)$`, 'm').exec(text)?.[1] ?? 'unknown';
  const extensions = ['avx512_vnni', 'avx_vnni', 'avx512_bf16', 'amx_int8'].filter((one) =>
    field('flags').split(' ').includes(one),
  );
  const cpu = `${field('model name')}, family ${field('cpu family')}, model ${field('model')} (${extensions.join(', ')})`;
  const memory = `${(totalmem() / 2 ** 30).toFixed(0)} GiB`;
  return `${cpu}, ${options.cpus.length} CPUs, ${memory}; our kernels ${cpuInfo().isa}, ${options.threads} threads`;
}

function parse(args: string[]) {
  const text = { type: 'string' as const };
  const flag = { type: 'boolean' as const };
  const flags = {
    ...{ only: text, shapes: text, peers: text, quants: text, batches: text, clients: text, rounds: text },
    ...{
      threads: text,
      'max-others': text,
      'max-wait': text,
      'adapter-quantization': text,
      'kv-cache-dtype': text,
      json: text,
      add: flag,
      show: text,
      svg: text,
      help: flag,
    },
  };
  try {
    const { values } = parseArgs({ args, options: flags });
    if (values.help) {
      console.log(usage);
      process.exit(0);
    }
    if (values.add && values.json === undefined)
      throw new RangeError('--add: expected --json FILE with it, got none');
    if (
      values.svg !== undefined &&
      values.show === undefined &&
      !(values.only ?? 'growth').includes('growth')
    )
      throw new RangeError('--svg: expected the case growth among --only, got none');
    const names = Object.keys(shapes) as ShapeName[];
    const cpus = usableCpus();
    return {
      only: choices('only', values.only, caseNames, caseNames),
      shapes: choices('shapes', values.shapes, names, names),
      peers: new Set<PeerName>(choices('peers', values.peers, peerNames, peerNames)),
      kinds: choices('quants', values.quants, quantizations, ['q4_0', 'q4_0_all']),
      batches: integers('batches', values.batches ?? '1,8,32', 1, 64),
      clients: integers('clients', values.clients ?? '8,16,32', 1, 32),
      rounds: integer('rounds', values.rounds ?? '5', 1, 100),
      threads: integer('threads', values.threads ?? `${cpus.length}`, 1, cpus.length),
      maxOthers: integer('max-others', values['max-others'] ?? '6', 0, 100),
      maxWait: integer('max-wait', values['max-wait'] ?? '20', 0, 600),
      formats: {
        adapterQuantization: choice('adapter-quantization', values['adapter-quantization'] ?? 'keep', [
          'keep',
          'int8',
        ]),
        kvType: choice('kv-cache-dtype', values['kv-cache-dtype'] ?? 'auto', ['auto', 'int8']),
      },
      json: values.json,
      add: values.add ?? false,
      show: values.show,
      svg: values.svg,
      cpus,
    };
  } catch (error) {
    console.error(`bench:peers: ${(error as Error).message}\n\n${usage}`);
    process.exit(2);
  }
}

function choices<T extends string>(
  flag: string,
  given: string | undefined,
  known: readonly T[],
  fallback: readonly T[],
): T[] {
  return given === undefined ? [...fallback] : given.split(',').map((one) => choice(flag, one, known));
}

function choice<const T extends string>(flag: string, given: string, known: readonly T[]): T {
  const found = known.find((name) => name === given);
  if (found === undefined)
    throw new RangeError(`--${flag}: expected some of ${known.join(',')}, got ${given}`);
  return found;
}

function integers(flag: string, given: string, min: number, max: number): number[] {
  return given.split(',').map((one) => integer(flag, one, min, max));
}

function integer(flag: string, given: string, min: number, max: number): number {
  const number = Number(given);
  if (!/^\d+$/.test(given) || number < min || number > max)
    throw new RangeError(`--${flag}: expected an integer from ${min} to ${max}, got ${given}`);
  return number;
}

/** The CPUs that this process may run on, by number: no more of them than a container's quota allows. */
function usableCpus(): number[] {
  const list = /^Cpus_allowed_list:\s*(\S+)$/m.exec(readFileSync('/proc/self/status', 'utf8'))![1]!;
  const all = list.split(',').flatMap((range) => {
    const [first, last] = range.split('-').map(Number);
    return Array.from({ length: (last ?? first!) - first! + 1 }, (_, i) => first! + i);
  });
  return all.slice(0, cpuInfo().numCpus);
}
