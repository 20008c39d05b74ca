// A thread of its own that reads the tenants file each time that it is told its path: a large file takes a second to parse, and a
// gateway answers requests meanwhile. Nothing that is in the file can harm more than this thread.

import { hash } from 'node:crypto';
import { closeSync, constants, fstatSync, openSync, readSync } from 'node:fs';
import { dirname, resolve } from 'node:path';
import { parentPort } from 'node:worker_threads';
import { SpecError } from '../../crds/check-spec.ts';
import { holdersOf, maxFileBytes, parseTenantsFile, type ReadFile } from './tenants-file.ts';

/** What the thread says of it. `files`: those with keys, if so much is known. */
export type Reading = { files: string[] | null } & (
  | {
      file: ReadFile;
      /** Of all that was read. */
      digest: string;
    }
  | {
      problem: string;
      /** It may read well another time, though nothing in the file changes. */
      mayPass: boolean;
    }
);

const maxKeyFileBytes = 4 << 10;

/** @param path  absolute */
function readTenants(path: string): Reading {
  let files: string[] | null = null;
  try {
    const { keys, ...parsed } = parseTenantsFile(textOf(readBounded(path, maxFileBytes)));
    const at = (file: string) => resolve(dirname(path), file);
    files = [...new Set(keys.flatMap(({ file }) => (file === undefined ? [] : [at(file)])))];
    const content = (file: string) => {
      try {
        return readBounded(at(file), maxKeyFileBytes);
      } catch (error) {
        if (error instanceof SpecError || isMissing(error)) return null;
        throw error;
      }
    };
    const file = { ...parsed, ...holdersOf(keys, content) };
    return { files, file, digest: hash('sha256', JSON.stringify(file)) };
  } catch (error) {
    // Of an error that nobody wrote for a person, the message could have a piece of the file.
    const { code = (error as Error).name } = error as NodeJS.ErrnoException;
    if (error instanceof SpecError) return { files, problem: error.message, mayPass: false };
    return { files, problem: `it cannot be read (${code})`, mayPass: true };
  }
}

/** A key that is no more there to be read is taken away; one that this process has no room to read is not. */
function isMissing(error: unknown): boolean {
  const { code = '' } = error as NodeJS.ErrnoException;
  return ['ENOENT', 'ENOTDIR', 'ELOOP', 'EACCES', 'EPERM', 'ENXIO'].includes(code);
}

/** @throws SpecError when it is no file, or too large */
function readBounded(path: string, maxBytes: number): Buffer {
  // A pipe would be waited for.
  const file = openSync(path, constants.O_RDONLY | constants.O_NONBLOCK);
  try {
    if (!fstatSync(file).isFile()) throw new SpecError('', 'expected a file, got something else');
    const buffer = Buffer.alloc(maxBytes + 1);
    let length = 0;
    for (;;) {
      const numRead = readSync(file, buffer, length, buffer.length - length, null);
      length += numRead;
      if (length > maxBytes) throw new SpecError('', `expected at most ${maxBytes} bytes, got more`);
      if (numRead === 0) return buffer.subarray(0, length);
    }
  } finally {
    closeSync(file);
  }
}

function textOf(content: Buffer): string {
  try {
    return new TextDecoder('utf-8', { fatal: true }).decode(content);
  } catch {
    throw new SpecError('', 'expected UTF-8, got other bytes');
  }
}

parentPort!.on('message', (path: string) => parentPort!.postMessage(readTenants(path)));
