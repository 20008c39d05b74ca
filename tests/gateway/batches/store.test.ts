// What batches need of a storage, of the folder and of a real S3 server alike.

import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { sourceAccess } from '../../../engine/sources/access.ts';
import { openStore } from '../../../gateway/batches/start.ts';
import { readAll, type Store } from '../../../gateway/batches/store.ts';
import { type AtEnd, startS3Server } from '../../fixtures/source-servers.ts';

const undoes: (() => Promise<void> | void)[] = [];
const atEnd: AtEnd = (undo) => undoes.push(undo);
afterAll(async () => {
  for (const undo of undoes.reverse()) await undo();
});

const text = (value: string) => Buffer.from(value);
const textOf = async (content: AsyncIterable<Buffer> | null) =>
  content && Buffer.concat(await Array.fromAsync(content)).toString();

async function openFolder(): Promise<Store> {
  const folder = mkdtempSync(join(tmpdir(), 'motet-store-'));
  atEnd(() => rmSync(folder, { recursive: true, force: true }));
  return openStore(folder, { access: sourceAccess({}) });
}

async function openS3(): Promise<Store> {
  const server = await startS3Server(atEnd);
  server.put('jobs', {});
  const access = sourceAccess({
    AWS_ENDPOINT_URL_S3: server.endpoint,
    AWS_ACCESS_KEY_ID: server.keys.accessKeyId,
    AWS_SECRET_ACCESS_KEY: server.keys.secretAccessKey,
  });
  const store = await openStore('s3://jobs/of/motet', { access });
  atEnd(() => store.close());
  return store;
}

describe.each([
  ['a folder', openFolder],
  ['S3', openS3],
] as const)('%s', (_name, open) => {
  let store: Store;
  beforeAll(async () => {
    store = await open();
  });

  test('what is put is read, whole and in part, and put again it is replaced', async () => {
    expect(await store.put('a/b/c.json', text('first'))).toBe(5);
    expect(await textOf(await store.read('a/b/c.json'))).toBe('first');
    await store.put('a/b/c.json', text('0123456789'));
    expect(await textOf(await store.read('a/b/c.json', { offset: 3, length: 4 }))).toBe('3456');
    expect(await store.read('a/b/d.json')).toBeNull();
    expect(await store.read('a/b/d.json', { offset: 0, length: 1 })).toBeNull();
  });

  test('a content of many pieces is put whole, also one that is larger than a part', async () => {
    const piece = Buffer.alloc(1 << 20, 'x');
    async function* pieces(count: number) {
      for (let i = 0; i < count; i++) yield Buffer.concat([piece, text(String(i))]);
    }
    expect(await store.put('large', pieces(13))).toBe(13 * piece.length + 16);
    const bytes = await readAll(store, 'large');
    expect(bytes!.length).toBe(13 * piece.length + 16);
    expect(bytes!.subarray(-2).toString()).toBe('12');
    expect(await store.put('empty', pieces(0))).toBe(0);
    expect(await textOf(await store.read('empty'))).toBe('');
  });

  test('a content that fails on its way leaves what was there, and nothing of itself', async () => {
    async function* failing(numBytes: number) {
      yield Buffer.alloc(numBytes);
      throw new Error('the client went away');
    }
    await store.put('kept', text('old'));
    await expect(store.put('kept', failing(9 << 20))).rejects.toThrow('the client went away');
    await expect(store.put('never', failing(10))).rejects.toThrow('the client went away');
    expect(await textOf(await store.read('kept'))).toBe('old');
    expect(await store.read('never')).toBeNull();
  });

  test('of many who create one key, one does', async () => {
    const tries = await Promise.all(
      Array.from({ length: 8 }, (_, i) => store.create('owner', text(`number ${i}`))),
    );
    expect(tries.filter(Boolean)).toHaveLength(1);
    const winner = tries.indexOf(true);
    expect(await textOf(await store.read('owner'))).toBe(`number ${winner}`);
    expect(await store.create('owner', text('late'))).toBe(false);
  });

  test('a log has what was appended, in order', async () => {
    expect(await textOf(store.readLog('log/1'))).toBe('');
    const appender = store.appender('log/1');
    for (let i = 0; i < 12; i++) await appender.append(text(`${i};`));
    await appender.close();
    expect(await textOf(store.readLog('log/1'))).toBe('0;1;2;3;4;5;6;7;8;9;10;11;');
  });

  test('lists what is below a prefix, with sizes, and removes it', async () => {
    await store.put('l/1/x', text('x'));
    await store.put('l/2/y', text('yy'));
    await store.put('l2/z', text('z'));
    const keys = async (prefix: string) => (await store.list(prefix)).map(({ key }) => key);
    expect(await store.list('l/')).toEqual([
      { key: 'l/1/x', sizeBytes: 1 },
      { key: 'l/2/y', sizeBytes: 2 },
    ]);
    await store.remove('l/1/x');
    await store.remove('l/1/x');
    expect(await keys('l/')).toEqual(['l/2/y']);
    await store.removeAll('l/');
    expect(await keys('l/')).toEqual([]);
    expect(await keys('l2/')).toEqual(['l2/z']);
    expect(await keys('nowhere/')).toEqual([]);
  });
});

test('a folder that cannot be written to is refused at the start', async () => {
  const folder = mkdtempSync(join(tmpdir(), 'motet-store-'));
  atEnd(() => rmSync(folder, { recursive: true, force: true }));
  writeFileSync(join(folder, 'file'), '');
  await expect(openStore(join(folder, 'file'), { access: sourceAccess({}) })).rejects.toThrow(
    /ENOTDIR|EEXIST/,
  );
});

test('what S3 refuses is said with its own code, and without keys', async () => {
  const server = await startS3Server(atEnd);
  const access = sourceAccess({
    AWS_ENDPOINT_URL_S3: server.endpoint,
    AWS_ACCESS_KEY_ID: server.keys.accessKeyId,
    AWS_SECRET_ACCESS_KEY: 'a wrong secret',
  });
  const store = await openStore('s3://jobs', { access });
  atEnd(() => store.close());
  const failed = store.put('a', text('a'));
  await expect(failed).rejects.toThrow(/PUT s3:\/\/jobs\/\/a: the server answered 403 \(\w+\)/);
  await expect(failed).rejects.not.toThrow('a wrong secret');
});
