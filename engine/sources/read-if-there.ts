/** A file of credentials, which need not be there. */
import { readFile } from 'node:fs/promises';
import { unavailable } from '../download.ts';

/** @returns null: there is no such file */
export async function readIfThere(path: string): Promise<string | null> {
  try {
    return await readFile(path, 'utf8');
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    if (code === 'ENOENT' || code === 'ENOTDIR') return null;
    throw unavailable(`${path}: expected a readable file of credentials, got ${code}`, error);
  }
}
