// An upload, multipart/form-data as OpenAI's clients send it: the fields `purpose` and perhaps `expires_after[...]`, and one
// part `file`, in any order. The file goes to the store as it comes in; nobody waits for the end of it in memory.

import type { IncomingMessage } from 'node:http';
import { Busboy, type BusboyFileStream, type BusboyHeaders, type BusboyInstance } from '@fastify/busboy';
import { GatewayError } from '../errors.ts';
import type { Files, NewFile } from './files.ts';
import type { FileRecord } from './objects.ts';

/** Of purpose and the two of expires_after; what else a client sends is not looked at. */
const maxFields = 16;
const maxFieldBytes = 1024;
const maxNameLength = 255;
/** OpenAI's bounds of expires_after. */
const minKeepSeconds = 3600;
const maxKeepSeconds = 30 * 86_400;

/**
 * @param keepSeconds  how long a file is kept whose upload does not say it, and at most
 * @throws GatewayError for whatever is wrong with it; nothing is then stored
 */
export async function receiveUpload(
  req: IncomingMessage,
  tenant: string | null,
  files: Files,
  { maxFileBytes, keepSeconds }: { maxFileBytes: number; keepSeconds: number },
): Promise<FileRecord> {
  const form = openForm(req, maxFileBytes);
  const fields = new Map<string, string>();
  const { promise: stored, resolve, reject } = Promise.withResolvers<FileRecord>();
  // It may fail before anybody waits for it.
  stored.catch(() => undefined);
  const ended = Promise.withResolvers<void>();
  ended.promise.catch(() => undefined);
  let file: BusboyFileStream | null = null;
  const fail = (error: Error) => {
    ended.reject(error);
    reject(error);
    // Whoever stores it hears of it.
    file?.destroy(error);
  };

  form.on('field', (name, value, isNameCut, isValueCut) => {
    if (isNameCut || isValueCut) fail(malformed(`expected fields of at most ${maxFieldBytes} bytes`));
    else fields.set(name, value);
  });
  form.on('file', (name, stream, filename) => {
    // It is told by `fail`, or by who reads the stream.
    stream.on('error', () => {});
    if (name !== 'file' || file !== null) {
      stream.resume();
      return fail(malformed('expected one file, in the part `file`'));
    }
    file = stream;
    const content = untilEnd(stream, ended.promise);
    files
      .upload(tenant, content, () => describe(fields, filename, keepSeconds))
      .then(resolve, (error: Error) => {
        stream.resume();
        reject(error);
      });
  });
  for (const limit of ['partsLimit', 'filesLimit', 'fieldsLimit'] as const) {
    form.on(limit, () => fail(malformed('expected one file and a few fields, got more parts')));
  }
  form.on('error', (error) => fail(malformed('expected well-formed multipart/form-data', error as Error)));
  form.on('finish', () => {
    if (file === null) fail(missing('file', 'a part with a file'));
    else ended.resolve();
  });
  const onClose = () => {
    if (!req.complete) fail(new GatewayError('incomplete_body', 'request body: ended before its end'));
  };
  req.once('close', onClose);
  req.pipe(form);
  try {
    return await stored;
  } finally {
    req.off('close', onClose);
    req.unpipe(form);
  }
}

function openForm(req: IncomingMessage, maxFileBytes: number): BusboyInstance {
  const type = req.headers['content-type'];
  if (type === undefined || !/^multipart\/form-data\s*;/i.test(type)) {
    throw new GatewayError('invalid_content_type', 'Content-Type: expected multipart/form-data');
  }
  if (req.headers['content-encoding'] !== undefined) {
    throw new GatewayError('unsupported_content_encoding', 'Content-Encoding: expected none');
  }
  try {
    return new Busboy({
      headers: req.headers as BusboyHeaders,
      limits: {
        fieldNameSize: 100,
        fieldSize: maxFieldBytes,
        fields: maxFields,
        // One more, so that it is seen.
        fileSize: maxFileBytes + 1,
        files: 1,
        parts: maxFields + 1,
        headerPairs: 20,
        headerSize: 8192,
      },
    });
  } catch (cause) {
    throw malformed((cause as Error).message);
  }
}

/** The file's bytes. It ends when the whole form has: what comes after the file may say what it is for. */
async function* untilEnd(stream: BusboyFileStream, ended: Promise<void>): AsyncIterable<Buffer> {
  // A file that is too large is cut by one byte more than allowed, which whoever stores it refuses.
  yield* stream as AsyncIterable<Buffer>;
  await ended;
}

function describe(fields: Map<string, string>, filename: string | undefined, keepSeconds: number): NewFile {
  const purpose = fields.get('purpose');
  if (purpose === undefined) throw missing('purpose', '`batch`');
  if (purpose !== 'batch') {
    throw new GatewayError(
      'invalid_value',
      `purpose: expected \`batch\`, got ${JSON.stringify(purpose.slice(0, 64))}`,
      {
        param: 'purpose',
      },
    );
  }
  const name = (filename ?? '').slice(0, maxNameLength);
  return { filename: name === '' ? 'file' : name, purpose, keepSeconds: parseKeep(fields, keepSeconds) };
}

function parseKeep(fields: Map<string, string>, keepSeconds: number): number {
  const anchor = fields.get('expires_after[anchor]');
  const seconds = fields.get('expires_after[seconds]');
  if (anchor === undefined && seconds === undefined) return keepSeconds;
  return keepFrom({ anchor, seconds: Number(seconds) }, keepSeconds, 'expires_after');
}

/** Seconds that `expires_after` asks for, at most those that files are kept here. */
export function keepFrom(
  { anchor, seconds }: { anchor?: unknown; seconds?: unknown },
  keepSeconds: number,
  param: string,
): number {
  const isInRange =
    Number.isInteger(seconds) &&
    (seconds as number) >= minKeepSeconds &&
    (seconds as number) <= maxKeepSeconds;
  if (anchor !== 'created_at' || !isInRange) {
    const expected = `anchor created_at and seconds from ${minKeepSeconds} to ${maxKeepSeconds}`;
    throw new GatewayError('invalid_value', `${param}: expected ${expected}`, { param });
  }
  return Math.min(seconds as number, keepSeconds);
}

function malformed(message: string, cause?: Error): GatewayError {
  return new GatewayError('invalid_multipart', `request body: ${message}`, { cause });
}

function missing(param: string, expected: string): GatewayError {
  return new GatewayError('missing_required_parameter', `${param}: expected ${expected}, got nothing`, {
    param,
  });
}
