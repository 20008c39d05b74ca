// The lines of an input file: where each is, and whether it is a request that can be sent. Nothing of a line is kept but
// where it is and what it is ordered by, so that a file of any size is read in little memory.

import { fieldOf, type MergeRule, readComposed, type WeightedName } from '../../engine/protocol.ts';
import { GatewayError } from '../errors.ts';
import { voiceOf } from '../groups/composition.ts';
import { isNestedDeeper } from '../protocols/nesting.ts';
import type { Files } from './files.ts';
import type { BatchRecord, LineError } from './objects.ts';
import { type PlannedLine, prefixKey } from './order.ts';

/** A line of the file as it is found: `bytes` is null when it is longer than allowed. */
export type RawLine = { number: number; offset: number; length: number; bytes: Buffer | null };

/** A request of the file. */
export type ParsedLine = {
  customId: string;
  model: string;
  /** Those that answer together in place of the model. Default none. */
  adapters?: readonly WeightedName[];
  /** How those are merged. Default: they are a sum. */
  merge?: MergeRule;
  body: Record<string, unknown>;
};

export type LineProblem = Pick<LineError, 'code' | 'message' | 'param'>;

/** As OpenAI has it. */
export const maxLines = 50_000;
/** Of what is wrong with a file as many are told. */
const maxErrors = 100;
const maxCustomIdLength = 512;
/** What a request may have, and the line around it. */
const maxNesting = 129;

/**
 * All lines of a job's input file, or what is wrong with some.
 *
 * @param isLeft  nobody wants to know any more
 */
export async function readInput(
  files: Files,
  { tenant, input_file_id, endpoint }: BatchRecord,
  maxLineBytes: number,
  isLeft: () => boolean,
): Promise<{ lines: PlannedLine[]; errors: LineError[] }> {
  const lines: PlannedLine[] = [];
  const errors: LineError[] = [];
  const customIds = new Set<string>();
  const add = (code: string, line: number | null, message: string, param: string | null = null) =>
    errors.push({ code, line, message, param });
  const content = await files.content(tenant, input_file_id).catch((error: unknown) => {
    if (!(error instanceof GatewayError) || error.code !== 'file_not_found') throw error;
    add('file_not_found', null, 'the input file is gone', 'input_file_id');
    return null;
  });
  if (content === null) return { lines, errors };
  for await (const { number, offset, length, bytes } of splitLines(content, maxLineBytes)) {
    if (isLeft() || errors.length >= maxErrors) break;
    if (lines.length === maxLines) {
      add('too_many_lines', number, `expected at most ${maxLines} lines, got more`);
      break;
    }
    if (bytes === null) {
      add('line_too_large', number, `expected at most ${maxLineBytes} bytes, got ${length}`);
      continue;
    }
    const line = parseLine(bytes, endpoint);
    if (isProblem(line)) add(line.code, number, line.message, line.param);
    else if (customIds.has(line.customId)) {
      add('duplicate_custom_id', number, 'custom_id: expected another one in each line', 'custom_id');
    } else {
      customIds.add(line.customId);
      const index = lines.length;
      const prefix = prefixKey(line.body);
      lines.push({ index, offset, length, voice: voiceOfLine(line), prefix, numFailed: 0 });
    }
  }
  if (lines.length === 0 && errors.length === 0 && !isLeft()) {
    add('empty_file', null, 'expected at least one line, got none');
  }
  return { lines, errors };
}

/** The request of a line that was read before. */
export async function readLine(
  files: Files,
  { id, tenant, input_file_id, endpoint }: BatchRecord,
  { index, offset, length }: PlannedLine,
): Promise<ParsedLine> {
  const content = await files.content(tenant, input_file_id, { offset, length });
  const line = parseLine(Buffer.concat(await Array.fromAsync(content)), endpoint);
  if (isProblem(line)) throw new Error(`${id}: line ${index} of the input file has changed`);
  return line;
}

/** Splits at line feeds; lines of white space alone are left out. `number` counts from 1. */
export async function* splitLines(
  content: AsyncIterable<Buffer>,
  maxLineBytes: number,
): AsyncGenerator<RawLine> {
  let number = 0;
  let offset = 0;
  let parts: Buffer[] = [];
  let length = 0;
  const take = (): RawLine | null => {
    number += 1;
    const line: RawLine = { number, offset, length, bytes: null };
    if (length <= maxLineBytes) line.bytes = Buffer.concat(parts);
    parts = [];
    offset += length + 1;
    length = 0;
    return line.bytes?.every((byte) => byte <= 0x20) ? null : line;
  };
  for await (const chunk of content) {
    let begin = 0;
    for (let end = chunk.indexOf(10); end !== -1; end = chunk.indexOf(10, begin)) {
      length += end - begin;
      if (length <= maxLineBytes) parts.push(chunk.subarray(begin, end));
      begin = end + 1;
      const line = take();
      if (line !== null) yield line;
    }
    length += chunk.length - begin;
    // What is too long already is only counted.
    if (length <= maxLineBytes) parts.push(chunk.subarray(begin));
    else parts = [];
  }
  if (length === 0) return;
  const line = take();
  if (line !== null) yield line;
}

/** The request of a line, or what is wrong with it. */
export function parseLine(bytes: Buffer, endpoint: string): ParsedLine | LineProblem {
  if (isNestedDeeper(bytes, maxNesting)) {
    const expected = `expected at most ${maxNesting} arrays and objects within each other, got more`;
    return problem('invalid_json_line', expected, null);
  }
  let value: unknown;
  try {
    value = JSON.parse(new TextDecoder('utf-8', { fatal: true }).decode(bytes));
  } catch {
    // V8's message would quote the line.
    return problem('invalid_json_line', 'expected a line of JSON in UTF-8, got something else', null);
  }
  if (!isObject(value)) return problem('invalid_json_line', 'expected a JSON object', null);
  const { custom_id, method, url, body } = value;
  if (typeof custom_id !== 'string' || custom_id === '' || custom_id.length > maxCustomIdLength) {
    const expected = `custom_id: expected a string of 1 to ${maxCustomIdLength} characters`;
    return problem('invalid_custom_id', expected, 'custom_id');
  }
  if (method !== 'POST') return problem('invalid_method', 'method: expected POST', 'method');
  if (url !== endpoint) {
    return problem('mismatched_url', `url: expected ${endpoint}, the endpoint of the batch`, 'url');
  }
  if (!isObject(body)) return problem('invalid_body', 'body: expected a JSON object', 'body');
  const together = readComposed(body);
  if (together !== null && !('adapters' in together)) {
    const { at, expected, got } = together;
    const message = `body.${at}: expected ${expected}, got ${got}`;
    return problem('invalid_adapters', message, `body.${fieldOf(together)}`);
  }
  const model = body.model ?? together?.adapters.map(({ name }) => name).join('+');
  if (typeof model !== 'string' || model === '') {
    return problem('missing_model', 'body.model: expected the name of a model', 'body.model');
  }
  if (body.stream !== undefined && body.stream !== null && body.stream !== false) {
    return problem('stream_not_supported', 'body.stream: expected false in a batch', 'body.stream');
  }
  return {
    customId: custom_id,
    model,
    ...(together !== null && { adapters: together.adapters }),
    ...(together?.merge && { merge: together.merge }),
    body,
  };
}

function voiceOfLine({ model, adapters, merge }: ParsedLine): string {
  const members = adapters && [...adapters].sort((a, b) => (a.name < b.name ? -1 : 1));
  return voiceOf(model, members, merge);
}

export function isProblem(line: ParsedLine | LineProblem): line is LineProblem {
  return 'code' in line;
}

function problem(code: string, message: string, param: string | null): LineProblem {
  return { code, message, param };
}

function isObject(value: unknown): value is Record<string, unknown> {
  return value !== null && typeof value === 'object' && !Array.isArray(value);
}
