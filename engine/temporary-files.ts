/**
 * Files that appear under their name only when they are whole. They are written under a temporary name that says who
 * writes, so that several engines may share a cache folder: none touches what another is writing, and what a dead one
 * left is swept up, or gone on with.
 */
import { createHash, randomBytes } from 'node:crypto';
import { type FileHandle, link, open, readdir, rename, rm, stat, statfs } from 'node:fs/promises';
import { hostname } from 'node:os';
import { join } from 'node:path';

/** Temporary files and folders that this process is writing. */
const active = new Set<string>();
const sweepAgeMs = 24 * 3600 * 1000;
/** Who has not written for so long has given up: every wait of a download is far shorter. */
const adoptAgeMs = 10 * 60 * 1000;

/** A path for what will become `key` in `folder`. End with `removeTemporary`, whatever has become of it. */
export function temporaryPath(folder: string, key: string): string {
  const suffix = randomBytes(6).toString('hex');
  const name = `.${key}.${encodeURIComponent(hostname())}.${process.pid}.${suffix}.tmp`;
  active.add(name);
  return join(folder, name);
}

/** Removes it, if it is still there. */
export async function removeTemporary(path: string): Promise<void> {
  await rm(path, { recursive: true, force: true }).catch(() => {});
  active.delete(path.slice(path.lastIndexOf('/') + 1));
}

interface Temporary {
  path: string;
  key: string;
  isDead: boolean;
  sizeBytes: number;
  idleMs: number;
}

/**
 * What lies there and is not ours. A process is known dead on its own host only; in a container that starts again, ours
 * has the id of the one that died.
 */
async function listTemporaries(folder: string): Promise<Temporary[]> {
  const found: Temporary[] = [];
  for (const name of await readdir(folder)) {
    const [, key, host, pid] = /^\.([0-9a-f]+)\.(.+)\.(\d+)\.[0-9a-f]+\.tmp$/.exec(name) ?? [];
    if (key === undefined || active.has(name)) continue;
    const path = join(folder, name);
    const info = await stat(path).catch(() => null);
    if (info === null) continue;
    const isHere = host === encodeURIComponent(hostname());
    const isDead = isHere && (Number(pid) === process.pid || !isAlive(Number(pid)));
    found.push({ path, key, isDead, sizeBytes: info.size, idleMs: Date.now() - info.mtimeMs });
  }
  return found;
}

function isAlive(pid: number): boolean {
  try {
    process.kill(pid, 0);
    return true;
  } catch (error) {
    return (error as NodeJS.ErrnoException).code === 'EPERM';
  }
}

/** Removes what dead processes left; what other hosts left goes after `maxIdleMs`, else a day. */
export async function sweepTemporaries(folder: string, maxIdleMs = sweepAgeMs): Promise<void> {
  for (const { path, isDead, idleMs } of await listTemporaries(folder)) {
    if (isDead || idleMs > maxIdleMs) await rm(path, { recursive: true, force: true }).catch(() => {});
  }
}

/** The most that somebody who is gone left of `key`, under a temporary name of ours; null: nothing. */
export async function adoptTemporary(folder: string, key: string): Promise<string | null> {
  const left = (await listTemporaries(folder)).filter(
    (file) => file.key === key && file.sizeBytes > 0 && (file.isDead || file.idleMs > adoptAgeMs),
  );
  for (const { path } of left.sort((a, b) => b.sizeBytes - a.sizeBytes)) {
    const own = temporaryPath(folder, key);
    try {
      await rename(path, own); // of several who try, one succeeds
      return own;
    } catch {
      await removeTemporary(own);
    }
  }
  return null;
}

/**
 * Puts a finished file under its name and makes that survive a power cut. When another process was faster, its file
 * stays if it is whole, since engines may have mapped it by now.
 */
export async function publishFile(
  temporary: string,
  path: string,
  isWhole: () => Promise<boolean>,
): Promise<void> {
  const isLinked = await link(temporary, path).then(
    () => true,
    () => false,
  );
  if (!isLinked && !(await isWhole())) await rename(temporary, path);
  await syncFolder(join(path, '..'));
}

export async function syncFolder(path: string): Promise<void> {
  const folder = await open(path);
  try {
    await folder.sync();
  } finally {
    await folder.close();
  }
}

/** Bytes that the disk of `path` has for us. */
export async function freeBytesAt(path: string): Promise<number> {
  const { bavail, bsize } = await statfs(path);
  return bavail * bsize;
}

/** Adds `sizeBytes` of a file from `begin` on, or what there is of them, to the hash. @returns how many there were */
export async function hashRange(
  hash: ReturnType<typeof createHash>,
  file: FileHandle,
  begin: number,
  sizeBytes: number,
): Promise<number> {
  const buffer = Buffer.alloc(4 * 2 ** 20);
  let done = 0;
  while (done < sizeBytes) {
    const { bytesRead } = await file.read(buffer, 0, Math.min(buffer.length, sizeBytes - done), begin + done);
    if (bytesRead === 0) break;
    hash.update(buffer.subarray(0, bytesRead));
    done += bytesRead;
  }
  return done;
}

/** sha256 of a whole file, hex; null when there is none. */
export async function hashFile(path: string): Promise<string | null> {
  const file = await open(path).catch((error) => {
    if (error.code === 'ENOENT') return null;
    throw error;
  });
  if (file === null) return null;
  try {
    const hash = createHash('sha256');
    await hashRange(hash, file, 0, Number.POSITIVE_INFINITY);
    return hash.digest('hex');
  } finally {
    await file.close();
  }
}
