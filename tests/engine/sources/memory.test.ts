import { execFile } from 'node:child_process';
import { createHash } from 'node:crypto';
import { mkdir, open, stat } from 'node:fs/promises';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { expect, onTestFinished, test } from 'vitest';
import { temporaryFolder } from '../../fixtures/source-files.ts';
import { startS3Server } from '../../fixtures/source-servers.ts';

/** MOTET_BIG_SOURCE_MIB=5120 is the file of 5 GiB that the bound is for; it needs as much on the disk of the temporary folder. */
const sizeBytes = Number(process.env.MOTET_BIG_SOURCE_MIB ?? 192) * 2 ** 20;
/** Beside what the process has when it begins. */
const maxMemoryBytes = 200e6;

test('a large file takes no more memory than a small one', { timeout: 600_000 }, async () => {
  const server = await startS3Server(onTestFinished);
  await mkdir(join(server.folder, 'models'));
  const file = await open(join(server.folder, 'models', 'big.gguf'), 'w');
  await file.truncate(sizeBytes);
  await file.close();
  const zeros = Buffer.alloc(2 ** 20);
  const hash = createHash('sha256');
  for (let done = 0; done < sizeBytes; done += zeros.length) hash.update(zeros);
  const digest = `sha256:${hash.digest('hex')}`;

  const child = join(import.meta.dirname, '../../fixtures/fetch-child.ts');
  const args = [child, await temporaryFolder(), 's3://models/big.gguf', digest, server.endpoint];
  const { accessKeyId, secretAccessKey } = server.keys;
  const env = { ...process.env, AWS_ACCESS_KEY_ID: accessKeyId, AWS_SECRET_ACCESS_KEY: secretAccessKey };
  const { stdout } = await promisify(execFile)(process.execPath, args, { env });
  const { path, beforeBytes, peakBytes } = JSON.parse(stdout);
  expect((await stat(path)).size).toBe(sizeBytes);
  expect(peakBytes - beforeBytes).toBeLessThan(maxMemoryBytes);
});
