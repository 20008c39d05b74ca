/**
 * Which folders a load request may name. With --adapter-root, only what lies under it once links are followed;
 * without, any absolute path, which config.ts allows on loopback binds only.
 */
import { realpath } from 'node:fs/promises';
import { isAbsolute, relative, resolve } from 'node:path';
import { EngineError } from '../errors.ts';

/** @returns the real path of the folder */
export async function resolveAdapterPath(path: string, root: string | null): Promise<string> {
  if (path.includes('\0')) throw refused('a path without NUL characters');
  if (!root && !isAbsolute(path)) throw refused('an absolute path, since no --adapter-root is set');
  const found = await realpathOrRefuse(root ? resolve(root, path) : path, path);
  if (root) {
    const inside = relative(await realpathOrRefuse(root, root), found);
    if (inside.startsWith('..') || isAbsolute(inside)) throw refused('a path under --adapter-root');
  }
  return found;
}

async function realpathOrRefuse(path: string, asked: string): Promise<string> {
  try {
    return await realpath(path);
  } catch (cause) {
    throw new EngineError('adapter_file_not_found', `lora_path: No adapter found for '${asked}'`, {
      param: 'lora_path',
      cause,
    });
  }
}

function refused(expected: string): EngineError {
  return new EngineError('adapter_path_refused', `lora_path: expected ${expected}`, { param: 'lora_path' });
}
