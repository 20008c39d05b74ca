/** The head of a report: what was run, in words. Pure. */
import { basename } from 'node:path';
import type { Wire } from './client.ts';
import { type LoadOptions, maxRequests } from './options.ts';
import type { ServerFacts } from './own-server.ts';
import { figure } from './report.ts';
import type { Lengths } from './workload.ts';

export interface Machine {
  cpu: string;
  numCpus: number;
  /** Instruction set that the native core takes here; null: there is no native core. */
  isa: string | null;
}

export function describeLoad(
  options: LoadOptions,
  wire: Wire,
  facts: ServerFacts | null,
  machine: Machine,
  clientCores: number,
): string[] {
  const { pacing, durationSeconds, numRequests, conversations, seed } = options;
  const what = conversations === null ? 'requests' : 'conversations';
  const how =
    pacing.kind === 'closed'
      ? `closed loop, ${pacing.concurrency} clients`
      : `open loop, ${pacing.ratePerSecond} ${what}/s, burstiness ${pacing.burstiness}, times count from the scheduled arrival`;
  const limit = [
    ...(durationSeconds === null ? [] : [`${durationSeconds} s`]),
    ...(numRequests === Math.floor(maxRequests / (conversations?.numTurns ?? 1))
      ? []
      : [`${numRequests} ${what}`]),
  ].join(' or ');
  const row = (name: string, text: string) => `  ${name.padEnd(12)}${text}`;
  const isa = machine.isa === null ? '' : ` (${machine.isa})`;
  return [
    `motet bench: ${how}, ${limit}, seed ${seed}`,
    row('server', describeServer(wire, facts)),
    ...(facts === null || facts.numAdapters === 0 ? [] : [row('', describeLoading(facts))]),
    row('requests', describeRequests(options)),
    row('voices', describeVoices(options, wire)),
    row(
      'client',
      `${machine.cpu}, ${machine.numCpus} CPUs${isa}; took ${figure(clientCores)} of them itself`,
    ),
  ];
}

function describeRequests({
  endpoint,
  promptTokens,
  outputTokens,
  sharedPrefixTokens,
  numPrefixes,
  conversations,
}: LoadOptions): string {
  const unit = endpoint === 'chat' ? 'words' : 'tokens';
  const output = `${describeLengths(outputTokens)} output tokens`;
  if (conversations === null) {
    const prefix =
      sharedPrefixTokens > 0 ? `, after one of ${numPrefixes} prefixes of ${sharedPrefixTokens}` : '';
    return `${endpoint}: ${describeLengths(promptTokens)} prompt ${unit}${prefix}, ${output}`;
  }
  const { numTurns, thinkTime, followUpTokens } = conversations;
  const system =
    sharedPrefixTokens > 0
      ? `one of ${numPrefixes} system messages of ${sharedPrefixTokens} ${unit}, then `
      : '';
  const think = `${thinkTime.kind === 'fixed' ? '' : 'exponential, in the mean '}${thinkTime.meanSeconds} s`;
  return `${endpoint}, ${numTurns} turns: ${system}${describeLengths(promptTokens)} ${unit}, later ${describeLengths(followUpTokens)}; ${output}; think time ${think}`;
}

function describeServer({ url, baseModel }: Wire, facts: ServerFacts | null): string {
  if (facts === null) return `${baseModel} at ${url}`;
  const args = facts.engineArgs.length > 0 ? `, ${facts.engineArgs.join(' ')}` : '';
  return `${basename(facts.modelPath)} on this machine, through the ${facts.through}${args}`;
}

function describeLoading({ numAdapters, loadSeconds, adapterBytes, arenaBytes }: ServerFacts): string {
  const megabytes = (bytes: number) => `${(bytes / 1e6).toFixed(0)} MB`;
  return `${numAdapters} adapters, ready in ${figure(loadSeconds)} s, ${megabytes(adapterBytes)} of an arena of ${megabytes(arenaBytes)}`;
}

function describeVoices({ popularity, baseShare }: LoadOptions, { adapters }: Wire): string {
  if (adapters.length === 0) return 'the base alone';
  const how =
    popularity.kind === 'zipf'
      ? `by Zipf(${popularity.exponent})`
      : popularity.kind === 'uniform'
        ? 'uniformly'
        : 'each client its own';
  const base = baseShare > 0 ? `; ${figure(baseShare * 100)} % of requests use the base` : '';
  return `${adapters.length} adapter${adapters.length === 1 ? '' : 's'}, ${how}${base}`;
}

function describeLengths(lengths: Lengths): string {
  if (lengths.kind === 'fixed') return String(lengths.tokens);
  if (lengths.kind === 'uniform') return `${lengths.low} to ${lengths.high}`;
  return `${lengths.mean} ± ${lengths.deviation}`;
}
