/**
 * Which content a source's version stands for, remembered beside the cache: a commit or a manifest's digest names its bytes for
 * ever, so what was fetched for it once is found again by its own digest. One small file each, in `versions/` of the cache
 * folder; the oldest go.
 */
import { createHash, randomBytes } from 'node:crypto';
import { mkdir, readdir, readFile, rename, rm, stat, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { isDigest } from '../source-uri.ts';
import type { SourceKind } from './remote-files.ts';

/** A version as a file name, 64 hex digits. */
export const versionKey = (kind: SourceKind, version: string) =>
  createHash('sha256').update(`${kind}\n${version}`).digest('hex');

export class Versions {
  readonly #folder: string;
  readonly #maxFiles: number;

  constructor(folder: string, maxFiles = 10_000) {
    this.#folder = folder;
    this.#maxFiles = maxFiles;
  }

  /** @returns the digest of its content, `sha256:<hex>`; null: not known */
  async find(kind: SourceKind, version: string | null): Promise<string | null> {
    if (version === null) return null;
    const text = await readFile(join(this.#folder, versionKey(kind, version)), 'utf8').catch(() => '');
    return isDigest(text) ? text : null;
  }

  /** Best effort: what is not remembered is fetched again. */
  async remember(kind: SourceKind, version: string | null, digest: string): Promise<void> {
    if (version === null) return;
    const temporary = join(this.#folder, `.${randomBytes(8).toString('hex')}.tmp`);
    try {
      await mkdir(this.#folder, { recursive: true });
      await writeFile(temporary, digest);
      await rename(temporary, join(this.#folder, versionKey(kind, version)));
      await this.#forgetOldest();
    } catch {
      await rm(temporary, { force: true }).catch(() => {});
    }
  }

  async #forgetOldest(): Promise<void> {
    const names = await readdir(this.#folder);
    if (names.length <= this.#maxFiles) return;
    const ages = await Promise.all(
      names.map(async (name) => ({ name, ms: (await stat(join(this.#folder, name))).mtimeMs })),
    );
    // A tenth at a time, so that the next ones find room.
    const oldest = ages.sort((a, b) => a.ms - b.ms).slice(0, names.length - this.#maxFiles * 0.9);
    await Promise.all(oldest.map(({ name }) => rm(join(this.#folder, name), { force: true })));
  }
}
