import { mkdir, readdir, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { Versions, versionKey } from '../../../engine/sources/versions.ts';
import { temporaryFolder } from '../../fixtures/source-files.ts';

const digest = `sha256:${'ab'.repeat(32)}`;

test('what a version stands for is known to the next process, of its kind alone', async () => {
  const folder = join(await temporaryFolder(), 'versions');
  await new Versions(folder).remember('model', 'v1', digest);
  const versions = new Versions(folder);
  expect(await versions.find('model', 'v1')).toBe(digest);
  expect(await versions.find('adapter', 'v1')).toBe(null);
  expect(await versions.find('model', 'v2')).toBe(null);
  expect(await versions.find('model', null)).toBe(null);
});

test('what is damaged is not believed', async () => {
  const folder = await temporaryFolder();
  await writeFile(join(folder, versionKey('model', 'v1')), digest.slice(0, 40));
  expect(await new Versions(folder).find('model', 'v1')).toBe(null);
});

test('a folder that cannot be written is no failure', async () => {
  const file = join(await temporaryFolder(), 'file');
  await writeFile(file, '');
  const versions = new Versions(join(file, 'versions'));
  await versions.remember('model', 'v1', digest);
  expect(await versions.find('model', 'v1')).toBe(null);
});

test('the oldest go when there are too many', async () => {
  const folder = await temporaryFolder();
  await mkdir(folder, { recursive: true });
  for (let i = 0; i < 30; i++) await writeFile(join(folder, `${i}`.padStart(64, '0')), digest);
  await new Versions(folder, 20).remember('model', 'new', digest);
  expect((await readdir(folder)).length).toBe(18);
});
