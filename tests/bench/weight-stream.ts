/**
 * What does it cost to read layers from the disk in each step? Decode at batch 1 and 8 and a prompt of 256 with all weights in
 * memory, with half of them (a base twice as large as its budget), and with the least that can be.
 *
 *   node tests/bench/weight-stream.ts [SHAPE [ROUNDS]]     smollm2 (default), qwen05b, llama1b; 7 rounds
 *
 * The variants take turns in each round; ratios are made round by round. The bound is what the disk alone allows: the rows of a step by
 * the time that reading its layers takes at the bandwidth of the same run. Reads go past the page cache where the file system can.
 */
import { cpuInfo } from '../../native/index.ts';
import { prepare } from '../fixtures/models.ts';
import { openMotet } from './peers/motet-steps.ts';
import { modelGguf } from './peers/peer-files.ts';
import { markdown, percent } from './peers/report.ts';
import { type ShapeName, shapes } from './peers/shapes.ts';
import { ratios, showSpread, spread } from './peers/spread.ts';

const contextTokens = 128;
const promptTokens = 256;
const decodeSteps = 16;
const batches = [1, 8];

const [name = 'smollm2', rounds = '7'] = process.argv.slice(2) as [ShapeName?, string?];
const numRounds = Number(rounds);
if (!(name in shapes) || !(numRounds >= 1)) {
  console.error(`weight-stream: expected one of ${Object.keys(shapes).join(', ')} and a number of rounds`);
  process.exit(2);
}

const path = await modelGguf(name, name === 'smollm2' ? 'real' : 'q4_0_all');
const model = await prepare(path);
const room = { sequences: Math.max(...batches), tokens: promptTokens, adapterBytes: 0, numAdapters: 0 };
const openWith = (weightMemoryBytes: number) => openMotet(path, room, { weightMemoryBytes });
const all = await openWith(0);
const { weightBytes } = all.runtime;
const refusal = await openWith(1).catch((error: Error) => error);
const leastBytes = Number(/expected at least (\d+) bytes/.exec((refusal as Error).message)?.[1]);
const variants = [
  all,
  await openWith(Math.max(leastBytes, Math.floor(weightBytes / 2))),
  await openWith(leastBytes),
];

interface Sample {
  tokensPerSecond: number;
  /** Of the disk, in bytes; 0 where nothing is read. */
  bytesPerSecond: number;
  /** Part of the time in which the step waited for weights. */
  waited: number;
}
type Motet = (typeof variants)[number];

async function sample(
  { runtime }: Motet,
  numTokens: number,
  numSteps: number,
  run: () => Promise<number>,
): Promise<Sample> {
  const before = { stream: runtime.weightStream(), waitMs: runtime.stepParts().weights };
  const stepMs = await run();
  const stream = runtime.weightStream();
  return {
    tokensPerSecond: (1000 * numTokens) / stepMs,
    bytesPerSecond: stream
      ? (stream.readBytes - before.stream!.readBytes) / (stream.readSeconds - before.stream!.readSeconds)
      : 0,
    waited: (runtime.stepParts().weights - before.waitMs) / (numSteps * stepMs),
  };
}

const works = [
  ...batches.map((batch) => ({
    title: `Decode, batch ${batch}`,
    numTokens: batch,
    numSteps: decodeSteps,
    run: (motet: Motet) => motet.decodeMs({ batch, contextTokens, steps: decodeSteps }),
  })),
  {
    title: `A prompt of ${promptTokens}`,
    numTokens: promptTokens,
    numSteps: 1,
    run: (motet: Motet) => motet.prefillMs(promptTokens),
  },
];
const found = works.map(() => variants.map((): Sample[] => []));
for (const { run } of works) for (const motet of variants) await run(motet); // fills the contexts
for (let round = 0; round < numRounds; round++) {
  process.stderr.write(`round ${round + 1} of ${numRounds}\n`);
  for (const [w, { numTokens, numSteps, run }] of works.entries())
    for (const [v, motet] of variants.entries())
      found[w]![v]!.push(await sample(motet, numTokens, numSteps, () => run(motet)));
}

console.log(
  `${shapes[name].title}, ${(weightBytes / 1e6).toFixed(0)} MB of weights in ${model.dims.numLayers} layers, ` +
    `${cpuInfo().isa}, ${all.runtime.numThreads} threads; medians (least–most) of ${numRounds} rounds\n`,
);
for (const [w, { title, numTokens }] of works.entries()) {
  console.log(
    markdown({
      title,
      note: 'The bound is that of the disk alone.',
      columns: [
        'in memory',
        'layers that stream',
        'tokens/s',
        'of all in memory',
        'disk, GB/s',
        'bound, tokens/s',
        'waited',
      ],
      rows: variants.map(({ runtime }, v) => {
        const samples = found[w]![v]!;
        const stream = runtime.weightStream();
        const rates = samples.map(({ tokensPerSecond }) => tokensPerSecond);
        const speeds = samples.map(({ bytesPerSecond }) => bytesPerSecond);
        const share = (stream?.memoryBytes ?? weightBytes) / weightBytes;
        if (!stream) return [percent(share), '0', showSpread(spread(rates)), '', '', '', ''];
        return [
          percent(share),
          `${stream.numStreamedLayers} of ${model.dims.numLayers}, ${(stream.stepBytes / 1e6).toFixed(0)} MB`,
          showSpread(spread(rates)),
          showSpread(
            ratios(
              rates,
              found[w]![0]!.map(({ tokensPerSecond }) => tokensPerSecond),
            ),
          ),
          showSpread(spread(speeds.map((speed) => speed / 1e9))),
          showSpread(spread(speeds.map((speed) => (numTokens * speed) / stream.stepBytes))),
          percent(spread(samples.map(({ waited }) => waited)).median),
        ];
      }),
    }),
  );
}
const isDirect = variants[1]!.runtime.weightStream()?.isDirect;
console.log(
  isDirect
    ? 'Reads go past the page cache.'
    : 'The file system has no direct reads: the page cache takes part.',
);
for (const motet of variants) motet.close();
