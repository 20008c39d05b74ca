/**
 * What does a batch gain over the same requests asked online, and does each line stay answered once when the gateway is killed
 * while it runs? Engine and gateway are processes of their own.
 *
 *   node tests/bench/batch-job.ts                                5,000 lines, 6 adapters, 5 kills
 *   node tests/bench/batch-job.ts --lines 600 --documents 30 --rounds 3
 *   node tests/bench/batch-job.ts --model tiny --rounds 0 --online 0    kills alone, with a model of two layers
 *
 * A line is a system prompt, its adapter's own, then a document that some other lines of the adapter share, then a question of its
 * own. Online, clients in a closed loop ask the lines in the order of the file, as many at a time as the job has in flight: what a
 * tenant would do without batches. The file is in a random order (--order shuffled) or document by document (--order grouped), when there is
 * little left for a batch to order. Both go through the same gateway to the same engine, in turns, with texts of their own in each
 * turn, so that nothing of one is in the cache for another. `--documents` with `--kv-tokens` says how much of the
 * documents the device holds: when it holds all of them, order gains nothing from the cache.
 */
import { once } from 'node:events';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import OpenAI, { toFile } from 'openai';
import { readAdapterFile } from '../../engine/adapters/adapter-file.ts';
import { cpuInfo } from '../../native/index.ts';
import { open, prepare, smollm2Path } from '../fixtures/models.ts';
import { type RunningProcess, startGatewayOver, startProcess } from '../fixtures/processes.ts';
import { seededRandom } from '../fixtures/seeded-random.ts';
import { countsOf } from './count-option.ts';
import { percentile, ratios, showSpread, spread } from './peers/spread.ts';
import { allLinear, writeRandomAdapter } from './random-adapter.ts';

const { values: options } = parseArgs({
  options: {
    model: { type: 'string', default: 'smollm2' },
    lines: { type: 'string', default: '5000' },
    adapters: { type: 'string', default: '6' },
    documents: { type: 'string', default: '240' },
    'system-words': { type: 'string', default: '24' },
    'document-words': { type: 'string', default: '48' },
    'kv-tokens': { type: 'string', default: '8192' },
    order: { type: 'string', default: 'shuffled' },
    'output-tokens': { type: 'string', default: '8' },
    'in-flight': { type: 'string', default: '48' },
    rounds: { type: 'string', default: '1' },
    kills: { type: 'string', default: '5' },
    online: { type: 'string', default: '20' },
    clients: { type: 'string', default: '1' },
  },
});
const countOf = countsOf(options);
const numLines = countOf('lines', 1);
const numAdapters = countOf('adapters', 1);
const numDocuments = countOf('documents', 1);
const systemWords = countOf('system-words', 1);
const documentWords = countOf('document-words', 1);
const outputTokens = countOf('output-tokens', 1);
const kvTokens = countOf('kv-tokens', 1024);
const numInFlight = countOf('in-flight', 1);
const numRounds = countOf('rounds', 0);
const numKills = countOf('kills', 0);
const numOnline = countOf('online', 0);
/** Who ask them at the same time. */
const numClients = countOf('clients', 1);
/** Of the engine, beside those that lines take. */
const numSpareSeats = 16;
const endpoint = '/v1/chat/completions' as const;

const { order } = options;
if (order !== 'shuffled' && order !== 'grouped') {
  throw new RangeError(`--order: expected shuffled or grouped, got ${order}`);
}
const paths = { smollm2: smollm2Path, tiny: join(import.meta.dirname, '../goldens/tiny/llama3') };
const modelPath = paths[options.model as keyof typeof paths];
if (modelPath === undefined) throw new RangeError(`--model: expected smollm2 or tiny, got ${options.model}`);

type Body = OpenAI.ChatCompletionCreateParamsNonStreaming;

const vocabulary =
  'river garden winter letter window market bridge doctor summer village paper silver morning teacher forest music'.split(
    ' ',
  );

/** The lines of a turn, in the order of the file. */
function makeLines(seed: number): Body[] {
  const random = seededRandom(seed);
  const text = (numWords: number) =>
    Array.from({ length: numWords }, () => vocabulary[random.below(vocabulary.length)]).join(' ');
  const systems = Array.from({ length: numAdapters }, () => text(systemWords));
  const documents = Array.from({ length: numDocuments }, () => text(documentWords));
  const bodies = Array.from({ length: numLines }, (_, i): Body => {
    const document = order === 'grouped' ? Math.floor((i * numDocuments) / numLines) : i % numDocuments;
    const adapter = document % numAdapters;
    return {
      model: `adapter-${adapter}`,
      messages: [
        { role: 'system', content: systems[adapter]! },
        { role: 'user', content: `${documents[document]}\n\nQuestion ${i}: ${text(8)}?` },
      ],
      ...{ max_tokens: outputTokens, temperature: 0 },
    };
  });
  if (order === 'grouped') return bodies;
  for (let i = bodies.length - 1; i > 0; i--) {
    const j = random.below(i + 1);
    [bodies[i], bodies[j]] = [bodies[j]!, bodies[i]!];
  }
  return bodies;
}

interface Turn {
  linesPerSecond: number;
  promptTokens: number;
  cachedTokens: number;
}

let toldMs = 0;

/** On the way, every ten seconds. */
function tell(what: string, numDone: number, beganMs: number): void {
  if (performance.now() - toldMs < 10_000) return;
  toldMs = performance.now();
  const seconds = (toldMs - beganMs) / 1000;
  process.stderr.write(`${what}: ${numDone} of ${numLines} lines in ${seconds.toFixed(0)} s\n`);
}

const clientOf = ({ url }: RunningProcess) =>
  new OpenAI({ baseURL: `${url}/v1`, apiKey: 'none', maxRetries: 0, timeout: 600_000 });

async function askOnline(gateway: RunningProcess, bodies: Body[]): Promise<Turn> {
  const client = clientOf(gateway);
  const turn: Turn = { linesPerSecond: 0, promptTokens: 0, cachedTokens: 0 };
  const left = bodies.toReversed();
  const beginMs = performance.now();
  const ask = async () => {
    for (let body = left.pop(); body !== undefined; body = left.pop()) {
      const { usage } = await client.chat.completions.create(body);
      tell('online', bodies.length - left.length, beginMs);
      turn.promptTokens += usage!.prompt_tokens;
      turn.cachedTokens += usage!.prompt_tokens_details?.cached_tokens ?? 0;
    }
  };
  await Promise.all(Array.from({ length: numInFlight }, ask));
  turn.linesPerSecond = bodies.length / ((performance.now() - beginMs) / 1000);
  return turn;
}

async function beginBatch(gateway: RunningProcess, bodies: Body[]): Promise<string> {
  const client = clientOf(gateway);
  const lines = bodies.map((body, i) =>
    JSON.stringify({ custom_id: `${i}`, method: 'POST', url: endpoint, body }),
  );
  const file = await client.files.create({
    purpose: 'batch',
    file: await toFile(Buffer.from(lines.join('\n')), 'lines.jsonl'),
  });
  const batch = { input_file_id: file.id, endpoint, completion_window: '24h' } as const;
  return (await client.batches.create(batch)).id;
}

async function ended(gateway: RunningProcess, id: string): Promise<OpenAI.Batch> {
  const beganMs = performance.now();
  for (;;) {
    const batch = await clientOf(gateway).batches.retrieve(id);
    if (batch.completed_at) return batch;
    if (batch.status !== 'validating' && batch.status !== 'in_progress' && batch.status !== 'finalizing') {
      throw new Error(`the batch is ${batch.status}: ${JSON.stringify(batch.errors)}`);
    }
    tell('batch', batch.request_counts?.completed ?? 0, beganMs);
    await new Promise((resolve) => setTimeout(resolve, 200));
  }
}

/** @throws when a line of the input is not in the output exactly once */
async function checkOutput(gateway: RunningProcess, batch: OpenAI.Batch): Promise<void> {
  const text = await (await clientOf(gateway).files.content(batch.output_file_id!)).text();
  const ids = text
    .trimEnd()
    .split('\n')
    .map((line) => JSON.parse(line).custom_id as string);
  const isWhole = ids.length === numLines && new Set(ids).size === numLines && !batch.error_file_id;
  if (!isWhole) {
    throw new Error(`expected ${numLines} lines answered once, got ${ids.length} of ${new Set(ids).size}`);
  }
}

/** From the upload's end to the batch's: validation and the writing of files are in it. */
async function runBatch(gateway: RunningProcess, bodies: Body[]): Promise<Turn> {
  const id = await beginBatch(gateway, bodies);
  const beginMs = performance.now();
  const batch = await ended(gateway, id);
  const linesPerSecond = bodies.length / ((performance.now() - beginMs) / 1000);
  await checkOutput(gateway, batch);
  const { input_tokens, input_tokens_details } = batch.usage!;
  return { linesPerSecond, promptTokens: input_tokens, cachedTokens: input_tokens_details.cached_tokens };
}

async function compare(gateway: RunningProcess): Promise<void> {
  const turns: Record<'online' | 'batch', Turn[]> = { online: [], batch: [] };
  for (let round = 0; round < numRounds; round++) {
    turns.online.push(await askOnline(gateway, makeLines(2 * round + 1)));
    process.stderr.write(
      `round ${round + 1}, online: ${turns.online.at(-1)!.linesPerSecond.toFixed(1)} lines/s\n`,
    );
    turns.batch.push(await runBatch(gateway, makeLines(2 * round + 2)));
    process.stderr.write(
      `round ${round + 1}, batch: ${turns.batch.at(-1)!.linesPerSecond.toFixed(1)} lines/s\n`,
    );
  }
  const rates = (way: 'online' | 'batch') => turns[way].map(({ linesPerSecond }) => linesPerSecond);
  const cached = (way: 'online' | 'batch') =>
    showSpread(spread(turns[way].map((turn) => (100 * turn.cachedTokens) / turn.promptTokens)));
  const promptTokens = turns.batch[0]!.promptTokens / numLines;
  console.log(
    `Prompts of ${promptTokens.toFixed(0)} tokens on average, ${outputTokens} tokens of output at most.\n`,
  );
  console.log('| | online | batch | batch / online |');
  console.log('|---|---|---|---|');
  const gain = showSpread(ratios(rates('batch'), rates('online')));
  console.log(
    `| lines per second | ${showSpread(spread(rates('online')))} | ${showSpread(spread(rates('batch')))} | ${gain} |`,
  );
  console.log(`| of the prompts' tokens cached, % | ${cached('online')} | ${cached('batch')} | |`);
  console.log(`\nMedians of ${numRounds} rounds (lowest–highest); ratios round by round.\n`);
}

/** Seconds of online requests for one token, of each client one after the other; and of all of them. */
async function askForOne(gateway: RunningProcess, bodies: Body[]) {
  const client = clientOf(gateway);
  const seconds: number[] = [];
  const left = bodies.toReversed();
  const ask = async () => {
    for (let body = left.pop(); body !== undefined; body = left.pop()) {
      const beginMs = performance.now();
      await client.chat.completions.create({ ...body, max_tokens: 1 });
      seconds.push((performance.now() - beginMs) / 1000);
    }
  };
  const beginMs = performance.now();
  await Promise.all(Array.from({ length: numClients }, ask));
  return { seconds, allSeconds: (performance.now() - beginMs) / 1000, linesPerSecond: 0 };
}

/** What an online request sees of a job that runs beside it. */
async function compareOnline(gateway: RunningProcess): Promise<void> {
  const bodies = makeLines(2001).slice(0, 2 * numOnline);
  const alone = await askForOne(gateway, bodies.slice(0, numOnline));
  const id = await beginBatch(gateway, makeLines(2002));
  const client = clientOf(gateway);
  while ((await client.batches.retrieve(id)).request_counts!.completed < numInFlight) {
    await new Promise((resolve) => setTimeout(resolve, 100));
  }
  const numDone = async () => (await client.batches.retrieve(id)).request_counts!.completed;
  const before = await numDone();
  const beside = await askForOne(gateway, bodies.slice(numOnline));
  beside.linesPerSecond = ((await numDone()) - before) / beside.allSeconds;
  if ((await client.batches.retrieve(id)).status !== 'in_progress') {
    throw new Error('the job ended before the online requests did; take more lines');
  }
  await client.batches.cancel(id);
  console.log(
    `| first token of an online request, s (${numClients} clients) | median | p95 | online/s | lines/s |`,
  );
  console.log('|---|---|---|---|---|');
  for (const [name, { seconds, allSeconds, linesPerSecond }] of [
    ['alone', alone],
    ['beside a batch', beside],
  ] as const) {
    const shown = [percentile(seconds, 50), percentile(seconds, 95), numOnline / allSeconds, linesPerSecond];
    console.log(`| ${name} | ${shown.map((number) => number.toFixed(2)).join(' | ')} |`);
  }
  console.log();
}

/** One job, and a gateway that is killed at even distances through it. */
async function killOften(engineUrl: string, settings: string[]): Promise<void> {
  const killed = ['--batch-lease-ms', '1000', ...settings];
  let gateway = await startGatewayOver([engineUrl], killed);
  const id = await beginBatch(gateway, makeLines(999));
  const beginMs = performance.now();
  for (let kill = 1; kill <= numKills; kill++) {
    const due = (kill * numLines) / (numKills + 1);
    for (;;) {
      const { request_counts, status } = await clientOf(gateway).batches.retrieve(id);
      if (status === 'completed') throw new Error(`the job ended before kill ${kill}; take more lines`);
      if (request_counts!.completed >= due) break;
      await new Promise((resolve) => setTimeout(resolve, 50));
    }
    process.stderr.write(`kill ${kill} of ${numKills}, after ${Math.ceil(due)} lines\n`);
    gateway.child.kill('SIGKILL');
    await once(gateway.child, 'close');
    gateway = await startGatewayOver([engineUrl], killed);
  }
  const batch = await ended(gateway, id);
  await checkOutput(gateway, batch);
  const seconds = (performance.now() - beginMs) / 1000;
  console.log(
    `${numLines} lines, the gateway killed and started again ${numKills} times: each line answered exactly once, ${seconds.toFixed(0)} s.`,
  );
  await gateway.stop();
}

const folder = await mkdtemp(join(tmpdir(), 'motet-batch-job-'));
const children: RunningProcess[] = [];
try {
  const model = await prepare(modelPath);
  const { dims } = model;
  const probe = await open(model, { deviceMemoryBytes: 64 << 20 });
  let numPages = Math.ceil(kvTokens / probe.blockTokens);
  const adapters: string[] = [];
  for (let i = 0; i < numAdapters; i++) {
    await writeRandomAdapter(join(folder, `${i}`), dims, 16, allLinear, i);
    adapters.push('--adapter', `adapter-${i}=${join(folder, `${i}`)}`);
    const { modules } = await readAdapterFile(join(folder, `${i}`), dims, { maxRank: 16 });
    numPages += probe.adapterPages(modules);
  }
  const deviceBytes = numPages * probe.pageBytes;
  probe.close();
  const engine = await startProcess('engine', [
    ...['--model', modelPath, '--served-name', 'base', '--port', '0', '--host-memory', '0'],
    ...['--device-memory', String(deviceBytes), '--max-sequences', String(numInFlight + numSpareSeats)],
    ...adapters,
  ]);
  children.push(engine);
  const settings = ['--batch-store', join(folder, 'store'), '--batch-lines-per-engine', String(numInFlight)];
  const gateway = await startGatewayOver([engine.url], settings);
  children.push(gateway);
  console.log(
    `${options.model}; ${numLines} lines over ${numAdapters} adapters and ${numDocuments} documents, ${numInFlight} in flight, ` +
      `file ${order}, KV for ${kvTokens} tokens; ${cpuInfo().isa}\n`,
  );
  if (numRounds > 0) await compare(gateway);
  if (numOnline > 0) await compareOnline(gateway);
  await gateway.stop();
  if (numKills > 0) await killOften(engine.url, settings);
} finally {
  for (const { child } of children) child.kill('SIGKILL');
  await rm(folder, { recursive: true, force: true });
}
