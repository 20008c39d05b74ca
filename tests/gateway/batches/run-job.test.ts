// Jobs on a folder with engines that are a function: what a kill, another owner, a clock and a full store do to them.

import { pino } from 'pino';
import { expect, onTestFinished, test } from 'vitest';
import { Files } from '../../../gateway/batches/files.ts';
import { FolderStore } from '../../../gateway/batches/folder-store.ts';
import { Gate } from '../../../gateway/batches/gate.ts';
import { folderOf, Jobs } from '../../../gateway/batches/jobs.ts';
import type { FinalRecord, OutputLine } from '../../../gateway/batches/objects.ts';
import { readResults } from '../../../gateway/batches/results.ts';
import type { AnswerLine, JobParts } from '../../../gateway/batches/run-job.ts';
import { BatchRunner, inTurns } from '../../../gateway/batches/runner.ts';
import type { Store } from '../../../gateway/batches/store.ts';
import { GatewayError } from '../../../gateway/errors.ts';
import { until } from '../start-gateway.ts';
import { endpoint, jsonl, line, tempFolder } from './batches-setup.ts';

const ok: AnswerLine = async ({ body }) => ({
  status: 200,
  body: Buffer.from(JSON.stringify({ echo: JSON.parse(body.toString()).messages[0].content })),
});

async function setup(more: Partial<JobParts> = {}) {
  const store: Store = more.store ?? (await FolderStore.open(tempFolder()));
  const nowMs = more.nowMs ?? Date.now;
  const files = new Files(store, { maxFileBytes: 1 << 20, maxTenantBytes: 1 << 20 }, nowMs);
  const jobs = new Jobs(store, nowMs);
  const gate = new Gate(() => ({ maxInFlight: 4, numEngines: 1 }));
  const parts: JobParts = {
    ...{ store, files, jobs, gate, nowMs, answer: ok, maxLineBytes: 1000, maxResultBytes: 1 << 20 },
    ...{ recordGapMs: 1, lookMs: 10, onLine: () => {} },
    ...more,
  };
  const run = (changes: Partial<JobParts> = {}) => {
    const limits = { maxJobs: 4, leaseMs: 300, scanMs: 20, keepSeconds: 86_400 };
    const runner = new BatchRunner({ ...parts, ...changes }, limits, pino({ level: 'silent' }));
    onTestFinished(() => runner.close(0));
    return runner;
  };
  const begin = async (lines: unknown[], windowSeconds = 3600) => {
    async function* content() {
      yield Buffer.from(jsonl(lines));
    }
    const file = { filename: 'f', purpose: 'batch', keepSeconds: 86_400 } as const;
    const { id: input_file_id } = await files.upload('a', content(), () => file);
    const asked = {
      endpoint,
      input_file_id,
      completion_window: '1h',
      metadata: null,
      output_seconds: 86_400,
    };
    return (await jobs.create('a', { ...asked, windowSeconds })).record;
  };
  const final = (id: string): Promise<FinalRecord> =>
    until(
      async () => (await jobs.get('a', id)).final,
      (record) => record !== null,
    ) as Promise<FinalRecord>;
  const linesOf = async (fileId: string | null): Promise<OutputLine[]> => {
    if (fileId === null) return [];
    const bytes = Buffer.concat(await Array.fromAsync(await files.content('a', fileId)));
    return bytes
      .toString()
      .trimEnd()
      .split('\n')
      .map((text) => JSON.parse(text));
  };
  return { store, files, jobs, run, begin, final, linesOf };
}

const numbered = (count: number) => Array.from({ length: count }, (_, i) => line(`${i}`));
const ids = (lines: OutputLine[]) => lines.map(({ custom_id }) => Number(custom_id)).sort((a, b) => a - b);
const all = (count: number) => Array.from({ length: count }, (_, i) => i);

test('what is left when the window ends is told line by line', async () => {
  let nowMs = Date.now();
  const { run, begin, final, linesOf } = await setup({ nowMs: () => nowMs });
  let numAsked = 0;
  run({
    answer: async (ask) => {
      numAsked += 1;
      if (numAsked <= 3) return ok(ask);
      return new Promise((_, reject) =>
        ask.signal.addEventListener('abort', () => reject(ask.signal.reason)),
      );
    },
  });
  const { id } = await begin(numbered(10), 60);
  await until(
    () => numAsked,
    (count) => count === 7,
  );
  nowMs += 61_000;
  const ended = await final(id);
  expect(ended).toMatchObject({ status: 'expired', request_counts: { total: 10, completed: 3, failed: 7 } });
  const errors = await linesOf(ended.error_file_id);
  expect(ids([...errors, ...(await linesOf(ended.output_file_id))])).toEqual(all(10));
  for (const { error, response } of errors) {
    expect(response).toBeNull();
    expect(error!.code).toBe('batch_expired');
  }
});

test('a job that nobody ran before its window ended says so of every line', async () => {
  let nowMs = Date.now();
  const { run, begin, final, linesOf } = await setup({ nowMs: () => nowMs });
  const { id } = await begin(numbered(7), 60);
  nowMs += 61_000;
  run();
  const ended = await final(id);
  expect(ended).toMatchObject({ status: 'expired', request_counts: { total: 7, completed: 0, failed: 7 } });
  expect(ids(await linesOf(ended.error_file_id))).toEqual(all(7));
});

test('a gateway that is stopped leaves the job, and the next asks only what is not recorded', async () => {
  const { run, begin, final, linesOf } = await setup();
  const numAsked = new Map<string, number>();
  const answer: AnswerLine = async (ask) => {
    numAsked.set(ask.requestId, (numAsked.get(ask.requestId) ?? 0) + 1);
    await new Promise((resolve) => setTimeout(resolve, 2));
    return ok(ask);
  };
  const { id } = await begin(numbered(60));
  for (let i = 0; i < 3; i++) {
    const before = numAsked.size;
    const runner = run({ answer });
    await until(
      () => numAsked.size,
      (count) => count > before + 5 || count === 60,
    );
    await runner.close(10_000);
  }
  run({ answer });
  const ended = await final(id);
  expect(ended.request_counts).toEqual({ total: 60, completed: 60, failed: 0 });
  expect(ids(await linesOf(ended.output_file_id))).toEqual(all(60));
  // Lines in flight were let end, so none was asked twice.
  expect([...numAsked.values()].every((count) => count === 1)).toBe(true);
});

/** A store's methods, to be replaced one by one. */
function methodsOf(store: Store): Store {
  return {
    name: store.name,
    read: (...args) => store.read(...args),
    put: (...args) => store.put(...args),
    create: (...args) => store.create(...args),
    appender: (...args) => store.appender(...args),
    readLog: (...args) => store.readLog(...args),
    list: (...args) => store.list(...args),
    remove: (...args) => store.remove(...args),
    removeAll: (...args) => store.removeAll(...args),
    close: () => store.close(),
  };
}

/** The same store for a process that can be stopped, as by SIGSTOP, and let go on. */
function stoppable(store: Store) {
  let stopped = Promise.withResolvers<void>();
  stopped.resolve();
  const slowed = <A extends unknown[], T>(act: (...args: A) => Promise<T>) => {
    return async (...args: A) => {
      await stopped.promise;
      const result = await act(...args);
      await stopped.promise;
      return result;
    };
  };
  const methods = methodsOf(store);
  const slow: Store = {
    ...methods,
    read: slowed(methods.read),
    put: slowed(methods.put),
    create: slowed(methods.create),
    list: slowed(methods.list),
    remove: slowed(methods.remove),
    removeAll: slowed(methods.removeAll),
    async *readLog(key: string) {
      await stopped.promise;
      yield* store.readLog(key);
    },
    appender(key: string) {
      const appender = store.appender(key);
      return { append: slowed(appender.append), close: () => appender.close() };
    },
  };
  return {
    store: slow,
    stop() {
      stopped = Promise.withResolvers();
    },
    goOn: () => stopped.resolve(),
  };
}

test('an owner that was stopped is followed by another, and changes nothing when it goes on', async () => {
  const { run, begin, final, linesOf, store, jobs } = await setup();
  const first = stoppable(store);
  onTestFinished(first.goOn);
  let numAnswered = 0;
  const record = await begin(numbered(60));
  run({
    store: first.store,
    jobs: new Jobs(first.store),
    gate: new Gate(() => ({ maxInFlight: 4, numEngines: 1 })),
    files: new Files(first.store, { maxFileBytes: 1 << 20, maxTenantBytes: 1 << 20 }),
    async answer(ask) {
      numAnswered += 1;
      if (numAnswered === 20) first.stop();
      return ok(ask);
    },
  });
  await until(
    () => numAnswered,
    (count) => count >= 20,
  );
  run();
  const ended = await final(record.id);
  expect(ended.request_counts).toEqual({ total: 60, completed: 60, failed: 0 });
  const output = await linesOf(ended.output_file_id);
  expect(ids(output)).toEqual(all(60));
  first.goOn();
  await new Promise((resolve) => setTimeout(resolve, 200));
  expect((await jobs.get('a', record.id)).final).toEqual(ended);
  expect(ids(await linesOf(ended.output_file_id))).toEqual(all(60));
});

test('answers that are more than may be kept end the rest', async () => {
  const { run, begin, final, linesOf } = await setup({ maxResultBytes: 2000 });
  run();
  const ended = await final((await begin(numbered(40))).id);
  expect(ended.request_counts.completed).toBeLessThan(20);
  const errors = await linesOf(ended.error_file_id);
  expect(errors[0]!.error!.code).toBe('batch_output_too_large');
  expect(ids([...errors, ...(await linesOf(ended.output_file_id))])).toEqual(all(40));
});

test('a store that fails for a while loses nothing', async () => {
  let isBroken = false;
  const folder = await FolderStore.open(tempFolder());
  const store: Store = {
    ...methodsOf(folder),
    appender(key: string) {
      const appender = folder.appender(key);
      return {
        append: (bytes: Buffer) =>
          isBroken ? Promise.reject(new Error('no space left')) : appender.append(bytes),
        close: () => appender.close(),
      };
    },
  };
  const { run, begin, final, linesOf } = await setup({ store });
  let numAsked = 0;
  run({
    answer: async (ask) => {
      numAsked += 1;
      isBroken = numAsked > 10 && numAsked < 20;
      return ok(ask);
    },
  });
  const ended = await final((await begin(numbered(40))).id);
  expect(ids(await linesOf(ended.output_file_id))).toEqual(all(40));
});

test('a right that is lost while a job runs fails the lines that come after', async () => {
  const { run, begin, final } = await setup();
  let numAsked = 0;
  run({
    answer: async (ask) => {
      numAsked += 1;
      if (numAsked > 10) throw new GatewayError('model_not_found', 'not any more', { param: 'model' });
      return ok(ask);
    },
  });
  const ended = await final((await begin(numbered(25))).id);
  expect(ended.request_counts).toEqual({ total: 25, completed: 10, failed: 15 });
});

test('what is left over of a job that has ended is tidied away', async () => {
  const { run, begin, final, store, jobs } = await setup();
  const record = await begin(numbered(5));
  const runner = run();
  await final(record.id);
  await until(
    () => store.list('active/'),
    (found) => found.length === 0,
  );
  await runner.close(0);
  const folder = folderOf('a', record.id);
  expect((await store.list(folder)).map(({ key }) => key.slice(folder.length))).toEqual([
    'batch.json',
    'final.json',
    'state.json',
  ]);
  expect(await Array.fromAsync(readResults(store, folder))).toEqual([]);
  expect(await jobs.removeOlder(Date.now() + 1)).toBe(1);
  expect(await store.list(folder)).toEqual([]);
});

test('files that have expired are gone at once, and removed in time', async () => {
  let nowMs = Date.now();
  const { files, store, begin } = await setup({ nowMs: () => nowMs });
  const { input_file_id } = await begin(numbered(1));
  expect(await files.removeExpired()).toBe(0);
  nowMs += 86_401_000;
  expect(await files.find('a', input_file_id)).toBeNull();
  expect(await files.removeExpired()).toBe(1);
  expect(await store.list('files/')).toEqual([]);
});

test('a tenant has a bounded number of jobs', async () => {
  const { begin, jobs } = await setup();
  const record = await begin([line('1')]);
  const { id: _, created_at: _c, expires_at: _e, tenant: _t, ...asked } = record;
  for (let i = 1; i < 100; i++) await jobs.create('a', { ...asked, windowSeconds: 60 });
  await expect(jobs.create('a', { ...asked, windowSeconds: 60 })).rejects.toMatchObject({
    code: 'too_many_batches',
  });
  await jobs.create('b', { ...asked, windowSeconds: 60 });
});

test('tenants take turns', () => {
  const active = ['batches/a/1/', 'batches/a/2/', 'batches/a/3/', 'batches/b/4/'];
  expect(inTurns(active, [])).toEqual(['batches/a/1/', 'batches/b/4/', 'batches/a/2/', 'batches/a/3/']);
  expect(inTurns(active, ['batches/a/1/'])).toEqual(['batches/b/4/', 'batches/a/2/', 'batches/a/3/']);
});
