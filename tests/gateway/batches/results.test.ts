import { appendFileSync, mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { expect, onTestFinished, test } from 'vitest';
import { FolderStore } from '../../../gateway/batches/folder-store.ts';
import type { OutputLine } from '../../../gateway/batches/objects.ts';
import { parseResult, ResultLog, readResults } from '../../../gateway/batches/results.ts';

const folder = 'batches/t-a/batch_1/';

async function tempStore() {
  const path = mkdtempSync(join(tmpdir(), 'motet-results-'));
  onTestFinished(() => rmSync(path, { recursive: true, force: true }));
  const store = await FolderStore.open(path);
  return { store, logPath: (owner: string) => join(path, folder, 'results', owner) };
}

const output = (text: string): OutputLine => ({
  ...{ id: `batch_req_${text}`, custom_id: text, error: null },
  response: { status_code: 200, request_id: 'r', body: { text } },
});
const found = async (store: FolderStore) =>
  (await Array.fromAsync(readResults(store, folder))).map(({ index, isOk, json }) => [
    ...[index, isOk],
    JSON.parse(json).custom_id,
  ]);

test('what was added is on the disk when it says so', async () => {
  const { store, logPath } = await tempStore();
  const log = new ResultLog(store, folder, 1, 1);
  await log.add(3, true, output('a'));
  expect(readFileSync(logPath('00000001'), 'utf8')).toContain('"custom_id":"a"');
  await Promise.all([log.add(1, false, output('b')), log.add(2, true, output('c'))]);
  await log.close();
  expect(await found(store)).toEqual([
    [3, true, 'a'],
    [1, false, 'b'],
    [2, true, 'c'],
  ]);
});

test('what ends together is written together', async () => {
  const { store } = await tempStore();
  let numAppends = 0;
  store.appender = () => ({
    append: async () => void numAppends++,
    close: async () => {},
  });
  const log = new ResultLog(store, folder, 1, 5);
  await Promise.all(Array.from({ length: 100 }, (_, i) => log.add(i, true, output('x'))));
  expect(numAppends).toBe(1);
});

test('a line that a kill has cut is no result', async () => {
  const { store, logPath } = await tempStore();
  const log = new ResultLog(store, folder, 1, 1);
  await log.add(0, true, output('a'));
  appendFileSync(logPath('00000001'), '1 ok {"id":"batch_req_1","custom_id":"b","resp');
  const next = new ResultLog(store, folder, 2, 1);
  await next.add(1, true, output('b'));
  expect(await found(store)).toEqual([
    [0, true, 'a'],
    [1, true, 'b'],
  ]);
});

test('of two answers to one line the first in the order of owners counts', async () => {
  const { store } = await tempStore();
  const [first, second] = [new ResultLog(store, folder, 1, 1), new ResultLog(store, folder, 2, 1)];
  await second.add(0, false, output('second'));
  await first.add(0, true, output('first'));
  expect(await found(store)).toEqual([[0, true, 'first']]);
});

test('an error of the store reaches all who wait', async () => {
  const { store } = await tempStore();
  store.appender = () => ({
    append: () => Promise.reject(new Error('no space left')),
    close: async () => {},
  });
  const log = new ResultLog(store, folder, 1, 1);
  const added = [log.add(0, true, output('a')), log.add(1, true, output('b'))];
  for (const each of added) await expect(each).rejects.toThrow('no space left');
});

test.each(['', '1 ok', '1 ok {"a":', 'x ok {}', '1 maybe {}', '1 ok {}\n2 ok {}x'])(
  '%j is no result',
  (text) => {
    expect(parseResult(text)).toBeNull();
  },
);
