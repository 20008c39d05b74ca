/** `kill -9` at any moment of preparing and loading: the next start is right, and nothing half-written is left behind. */
import type { ChildProcess } from 'node:child_process';
import { mkdtemp, readdir, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { setTimeout as sleep } from 'node:timers/promises';
import { afterAll, beforeAll, expect, test, vi } from 'vitest';
import type { AdapterList } from '../../engine/protocol.ts';
import { examplesFolder, smollm2Path } from '../fixtures/models.ts';
import {
  collectEnd,
  evalItems,
  exampleAdapters,
  getJson,
  loadAdapterOver,
  postJson,
  spawnProcess,
  startProcess,
} from '../fixtures/processes.ts';
import { seededRandom } from '../fixtures/seeded-random.ts';

let cache: string;
beforeAll(async () => {
  cache = await mkdtemp(join(tmpdir(), 'motet-killed-'));
});
afterAll(() => rm(cache, { recursive: true }));

const engineArgs = () => ['--model', smollm2Path, '--served-name', 'base', '--cache', cache, '--port', '0'];

/** Resolves when the engine has logged that many lines of progress, or has ended. */
async function progressLines(child: ChildProcess, count: number): Promise<void> {
  let seen = 0;
  for await (const line of createInterface(child.stdout!)) {
    if (line.includes('"preparing"') && ++seen === count) return;
  }
}

async function expectSolves(url: string, adapter: string): Promise<void> {
  const { maxTokens } = exampleAdapters.find(({ name }) => name === adapter)!;
  const { messages, answer } = evalItems(adapter)[0]!;
  const request = { model: adapter, messages, max_tokens: maxTokens, temperature: 0 };
  const { body } = await postJson(`${url}/v1/chat/completions`, request);
  expect(body.choices[0].message.content.trim()).toBe(answer);
}

test('a start after 12 kills at random moments of starting and preparing is right', async () => {
  const random = seededRandom(1);
  const name = exampleAdapters[0]!.name;
  const args = [...engineArgs(), '--adapter', `${name}=${join(examplesFolder, name)}`];
  let numHalfDone = 0;
  for (let i = 0; i < 12; i++) {
    const child = spawnProcess('engine', args);
    const ended = collectEnd(child);
    // In turns: at some moment of the start, and right after some progress line of the preparation.
    if (i % 2) await sleep(random.below(1000));
    else await progressLines(child, random.from(1, 8));
    child.kill('SIGKILL');
    await ended;
    const files = await readdir(join(cache, 'packed')).catch(() => []);
    if (files.some((file) => !file.endsWith('.motet'))) numHalfDone++;
    // A packed file that was finished would be reused from here on. What was half-written stays for the next start.
    for (const file of files) if (file.endsWith('.motet')) await rm(join(cache, 'packed', file));
  }
  // At least one kill must have hit the preparation itself, or this test says less than its name.
  expect(numHalfDone).toBeGreaterThan(0);

  const engine = await startProcess('engine', args);
  await expectSolves(engine.url, name);
  expect((await readdir(join(cache, 'packed'))).filter((file) => file.endsWith('.motet'))).toHaveLength(1);
  expect((await readdir(join(cache, 'packed'))).filter((file) => file.includes('tmp'))).toEqual([]);
  expect(await engine.stop()).toBe(0);
}, 120_000);

test('a start after 5 kills while adapters are loading is right', async () => {
  const random = seededRandom(2);
  for (let i = 0; i < 5; i++) {
    const engine = await startProcess('engine', engineArgs());
    const ended = new Promise((resolve) => engine.child.once('close', resolve));
    const loads = exampleAdapters.map(({ name }) =>
      loadAdapterOver(engine.url, name, join(examplesFolder, name)).catch(() => null),
    );
    await sleep(random.below(120));
    engine.child.kill('SIGKILL');
    await Promise.all([ended, ...loads]);
  }
  const engine = await startProcess('engine', engineArgs());
  for (const { name } of exampleAdapters) {
    expect((await loadAdapterOver(engine.url, name, join(examplesFolder, name))).status).toBe(200);
    await expectSolves(engine.url, name);
  }
  // The last answer may be out before the last step is over.
  await vi.waitFor(async () => {
    const { arena } = await getJson<AdapterList>(`${engine.url}/v1/adapters`);
    expect(arena.kvBytes).toBe(0);
  }, 5_000);
  expect(await engine.stop()).toBe(0);
}, 120_000);
