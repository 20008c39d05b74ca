/** The small files of a Hugging Face folder, as text or as a JSON object; null for one that is not there. */
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { InputError, ioError, shown } from '../input-error.ts';

export type Json = Record<string, unknown>;

/** @throws InputError model_invalid naming the file; io_failed */
export async function readJson(folder: string, name: string): Promise<Json | null> {
  const text = await readText(folder, name);
  if (text === null) return null;
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (error) {
    throw new InputError('model_invalid', `${join(folder, name)}: expected JSON, got something else`, {
      cause: error,
    });
  }
  if (typeof value !== 'object' || value === null || Array.isArray(value))
    throw new InputError('model_invalid', `${join(folder, name)}: expected an object, got ${shown(value)}`);
  return value as Json;
}

/** @throws InputError io_failed */
export async function readText(folder: string, name: string): Promise<string | null> {
  const path = join(folder, name);
  try {
    return await readFile(path, 'utf8');
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return null;
    throw ioError(`read ${path}`, error);
  }
}
