/**
 * What does a composition cost? A decode step of SmolLM2-135M where every row is composed of 1, 2, 4 or 8 adapters of its own
 * (rank 16 on all linear layers), against the step without any; pair by pair within a round.
 *
 *   node tests/bench/compositions.ts [--rounds 5]
 */
import { parseArgs } from 'node:util';
import { cpuInfo } from '../../native/index.ts';
import { adapterBytes, largeAdapter } from './peers/bench.ts';
import { openMotet } from './peers/motet-steps.ts';
import { adapterFolders, modelGguf } from './peers/peer-files.ts';
import { markdown } from './peers/report.ts';
import { ratios, spread } from './peers/spread.ts';

const contextTokens = 128;
const steps = 48;
const batches = [1, 4];
const counts = [0, 1, 2, 4, 8];

const { values } = parseArgs({ options: { rounds: { type: 'string', default: '5' } } });
const numRounds = Number(values.rounds);
const numAdapters = Math.max(...batches) * Math.max(...counts);
const bytes = numAdapters * adapterBytes('smollm2', largeAdapter);
const room = {
  sequences: Math.max(...batches),
  tokens: contextTokens + steps,
  adapterBytes: bytes,
  numAdapters,
};
const motet = await openMotet(await modelGguf('smollm2', 'real'), room, {});
try {
  const handles: number[] = [];
  for (const folder of await adapterFolders('smollm2', largeAdapter, numAdapters))
    handles.push(await motet.loadAdapter(folder));
  const most = Math.max(...counts);
  const membersOf = (row: number, count: number) =>
    handles.slice(row * most, row * most + count).map((handle): [number, number] => [handle, 1 / count]);
  const rows = [];
  for (const batch of batches) {
    const times = counts.map((): number[] => []);
    // The first round fills the contexts, and is not counted.
    for (let round = 0; round <= numRounds; round++) {
      for (const [i, count] of counts.entries()) {
        const handle = (row: number) => membersOf(row, count);
        const ms = await motet.decodeMs({ batch, contextTokens, steps, handle });
        if (round > 0) times[i]!.push(ms);
      }
    }
    for (const [i, count] of counts.entries())
      rows.push([
        `${batch}`,
        `${count}`,
        spread(times[i]!),
        ratios(times[i]!, times[0]!),
        ratios(times[i]!, times[1]!),
      ]);
  }
  const title = `Compositions, SmolLM2-135M, ${cpuInfo().isa}, ${motet.runtime.numThreads} threads`;
  const note = `Medians of ${numRounds} rounds, with the lowest and the highest.`;
  const columns = ['batch', 'adapters a row', 'step ms', '÷ base', '÷ one adapter'];
  console.log(markdown({ title, note, columns, rows }));
} finally {
  motet.close();
}
