// In which order the lines of a job run. Lines of one voice (an adapter, mostly) stand together in a lane, and in a lane
// those whose prompts begin alike stand together: sorted by prefix, a lane is the prefix tree of its prompts walked depth
// first. Whatever the cache of an engine holds, no other order finds more of it again. Idea: global prefixes first, then
// request by request below each, as in BatchLLM (Zheng et al., 2024).

import { setImmediate } from 'node:timers/promises';

/** A line that is to be run: where it is in the file, and what it is ordered by. */
export type PlannedLine = {
  /** Of the lines that are not empty, from 0: by this a result knows its line. */
  index: number;
  offset: number;
  length: number;
  /** Who answers: lines of one share KV. */
  voice: string;
  /** By prefixKey. */
  prefix: string;
  /** Tries that an engine failed. */
  numFailed: number;
};

export type Lane = {
  voice: string;
  /** Still to be run; the next is the last. */
  lines: PlannedLine[];
  numInFlight: number;
  /** No line is taken before: an engine had no room for the last one, or nobody holds the adapter. */
  pausedUntilMs: number;
  pauseMs: number;
};

/** About a block of an engine's KV cache, so that what an engine can share is what the order sees. */
const charsPerBlock = 64;

/**
 * What a prompt begins with, as a text that is a prefix of another's exactly when all blocks of the one prompt are the other's first:
 * two UTF-16 units a block, of a hash of all up to there. 32 bits: a collision costs a hit, nothing else.
 */
export function prefixKey({ tools, messages, prompt, input }: Record<string, unknown>): string {
  // A chat template puts tools before the first message.
  const text = `${tools === undefined ? '' : JSON.stringify(tools)}${JSON.stringify(messages ?? prompt ?? input ?? '')}`;
  const units = new Uint16Array(2 * Math.floor(text.length / charsPerBlock));
  let hash = 0x811c9dc5;
  for (let i = 0; i < units.length / 2; i++) {
    const end = (i + 1) * charsPerBlock;
    // FNV-1a over UTF-16 units.
    for (let j = end - charsPerBlock; j < end; j++) hash = Math.imul(hash ^ text.charCodeAt(j), 0x01000193);
    units[2 * i] = hash >>> 16;
    units[2 * i + 1] = hash;
  }
  return Buffer.from(units.buffer).toString('utf16le');
}

/**
 * The lanes of a job, the one with the most bytes first: with several engines the short ones fill the end. A large job is sorted
 * in small parts: requests of others are not to wait for it.
 */
export async function planLanes(lines: readonly PlannedLine[]): Promise<Lane[]> {
  const lanes: { lane: Lane; bytes: number }[] = [];
  for (const [voice, ofVoice] of Map.groupBy(lines, ({ voice }) => voice)) {
    // The next is taken from the end.
    const sorted = (await sortInParts(ofVoice)).reverse();
    const bytes = ofVoice.reduce((sum, { length }) => sum + length, 0);
    lanes.push({ lane: { voice, lines: sorted, numInFlight: 0, pausedUntilMs: 0, pauseMs: 0 }, bytes });
  }
  return lanes.sort((a, b) => b.bytes - a.bytes).map(({ lane }) => lane);
}

/** Lines sorted at a time: some milliseconds. */
const linesPerPart = 1024;

function byPrefix(a: PlannedLine, b: PlannedLine): number {
  if (a.prefix === b.prefix) return a.index - b.index;
  return a.prefix < b.prefix ? -1 : 1;
}

async function sortInParts(lines: readonly PlannedLine[]): Promise<PlannedLine[]> {
  let parts: PlannedLine[][] = [];
  for (let begin = 0; begin < lines.length; begin += linesPerPart) {
    parts.push(lines.slice(begin, begin + linesPerPart).sort(byPrefix));
    await setImmediate();
  }
  while (parts.length > 1) {
    const merged: PlannedLine[][] = [];
    for (let i = 0; i < parts.length; i += 2) {
      merged.push(merge(parts[i]!, parts[i + 1] ?? []));
      await setImmediate();
    }
    parts = merged;
  }
  return parts[0] ?? [];
}

function merge(a: readonly PlannedLine[], b: readonly PlannedLine[]): PlannedLine[] {
  const merged: PlannedLine[] = [];
  let [i, j] = [0, 0];
  while (i < a.length && j < b.length) merged.push(byPrefix(a[i]!, b[j]!) < 0 ? a[i++]! : b[j++]!);
  return merged.concat(a.slice(i), b.slice(j));
}

/**
 * The lane that gives the next line: the first that has one and is within its share of what may be in flight. The share is
 * an engine's worth, so that as many lanes run at a time as there are engines; when fewer are left they share all.
 *
 * @param maxInFlight  of all lanes
 */
export function nextLane(
  lanes: readonly Lane[],
  maxInFlight: number,
  numEngines: number,
  nowMs: number,
): Lane | null {
  const left = lanes.filter(({ lines, pausedUntilMs }) => lines.length > 0 && pausedUntilMs <= nowMs);
  const share = Math.ceil(maxInFlight / Math.max(1, Math.min(numEngines, left.length)));
  return left.find(({ numInFlight }) => numInFlight < share) ?? left[0] ?? null;
}

const firstPauseMs = 250;
const maxPauseMs = 30_000;

/** The lane waits, longer each time in a row. What was in flight when it began to says nothing new. */
export function pause(lane: Lane, nowMs: number): void {
  if (nowMs < lane.pausedUntilMs) return;
  lane.pauseMs = Math.min(maxPauseMs, lane.pauseMs === 0 ? firstPauseMs : 2 * lane.pauseMs);
  lane.pausedUntilMs = nowMs + lane.pauseMs;
}
