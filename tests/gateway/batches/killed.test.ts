// A gateway that is killed again and again while it runs a job, and two that share the work. Real processes, real SIGKILL.

import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { expect, onTestFinished, test } from 'vitest';
import { FolderStore } from '../../../gateway/batches/folder-store.ts';
import { folderOf } from '../../../gateway/batches/jobs.ts';
import { readResults } from '../../../gateway/batches/results.ts';
import { type Script, startFakeEngine } from '../../fixtures/fake-engine.ts';
import { until } from '../start-gateway.ts';
import { asked, begin, clientOf, echo, ended, line, linesOf, tempFolder } from './batches-setup.ts';

/** tests/bench/batch-job.ts kills a larger job of a real engine. */
const numLines = 100;
const numKills = 2;

const slowEcho: Script = async (received) => {
  await new Promise((resolve) => setTimeout(resolve, 20));
  if (!received.res.destroyed) await echo(received);
};

/** A gateway as a process of its own; resolves when it is ready. */
async function startGateway(engineUrl: string, folder: string, leaseMs = 1000) {
  const settings = [
    '--batch-store',
    folder,
    '--batch-lease-ms',
    String(leaseMs),
    '--batch-lines-per-engine',
    '4',
  ];
  const main = join(import.meta.dirname, '../../../gateway/main.ts');
  const child = spawn(process.execPath, [main, '--engine', engineUrl, '--port', '0', ...settings], {
    stdio: ['ignore', 'pipe', 'inherit'],
  });
  onTestFinished(() => void child.kill('SIGKILL'));
  const lines = createInterface(child.stdout);
  for await (const line of lines) {
    const { msg, port } = JSON.parse(line) as { msg: string; port?: number };
    if (msg !== 'ready') continue;
    // What it logs from now on is not read, and must not fill the pipe.
    child.stdout.resume();
    return { child, url: `http://127.0.0.1:${port}` };
  }
  throw new Error('the gateway ended before it was ready');
}

test('each line is answered once although the gateway is killed, and what is recorded is not asked again', async () => {
  // It answers so many requests, and the others when it may: a fast job would be over before it is killed.
  let numAnswered = 0;
  let more = Promise.withResolvers<void>();
  const engine = await startFakeEngine({
    async script(received) {
      const place = engine.received.length;
      while (place > numAnswered) await more.promise;
      await slowEcho(received);
    },
  });
  const answer = (count: number) => {
    numAnswered = count;
    more.resolve();
    more = Promise.withResolvers<void>();
  };
  const folder = tempFolder();
  let gateway = await startGateway(engine.url, folder);
  const { id } = await begin(
    clientOf(gateway),
    Array.from({ length: numLines }, (_, i) => line(`${i}`, { content: `<${i}>` })),
  );
  const kills: { recorded: Set<string>; numAsked: number }[] = [];
  for (let kill = 0; kill < numKills; kill++) {
    const numBefore = kills.at(-1)?.recorded.size ?? 0;
    answer(engine.received.length + numLines / (numKills + 1));
    await until(
      async () => (await clientOf(gateway).batches.retrieve(id)).request_counts!.completed,
      (count) => count > numBefore,
      30_000,
    );
    gateway.child.kill('SIGKILL');
    await once(gateway.child, 'close');
    const results = await Array.fromAsync(readResults(await FolderStore.open(folder), folderOf(null, id)));
    kills.push({
      recorded: new Set(results.map(({ index }) => `<${index}>`)),
      numAsked: engine.received.length,
    });
    gateway = await startGateway(engine.url, folder);
  }
  answer(Number.POSITIVE_INFINITY);
  const batch = await ended(clientOf(gateway), id);
  expect(batch.request_counts).toEqual({ total: numLines, completed: numLines, failed: 0 });
  const output = await linesOf(clientOf(gateway), batch.output_file_id);
  expect(output).toHaveLength(numLines);
  for (const { custom_id, response } of output) {
    expect(response!.body.choices[0].message.content).toBe(`answer to <${custom_id}>`);
  }
  expect(new Set(output.map(({ custom_id }) => custom_id)).size).toBe(numLines);
  for (const { recorded, numAsked } of kills) {
    expect(recorded.size).toBeGreaterThan(0);
    const askedLater = asked(engine).slice(numAsked);
    expect(askedLater.filter((content) => recorded.has(content))).toEqual([]);
  }
}, 60_000);

test('of two gateways over one folder one runs a job, and the other goes on with it', async () => {
  // The job stands still once it is well begun, until the test has looked.
  const looked = Promise.withResolvers<void>();
  const engine = await startFakeEngine({
    async script(received) {
      if (engine.received.length > 20) await looked.promise;
      await slowEcho(received);
    },
  });
  const folder = tempFolder();
  const gateways = await Promise.all([0, 1].map(() => startGateway(engine.url, folder, 3000)));
  const [first, second] = gateways.map((gateway) => clientOf(gateway));
  const { id } = await begin(
    first!,
    Array.from({ length: 60 }, (_, i) => line(`${i}`, { content: `<${i}>` })),
  );
  await until(
    () => engine.received.length,
    (count) => count > 20,
  );
  expect(new Set(asked(engine)).size).toBe(engine.received.length);
  const running = await Promise.all(
    gateways.map(async ({ url }) => {
      const text = await (await fetch(`${url}/metrics`)).text();
      return Number(/^motet_gateway_batches_running (\d)/m.exec(text)![1]);
    }),
  );
  expect(running.toSorted()).toEqual([0, 1]);
  const owner = running.indexOf(1);
  gateways[owner]!.child.kill('SIGKILL');
  looked.resolve();
  const batch = await ended([first!, second!][1 - owner]!, id);
  const output = await linesOf([first!, second!][1 - owner]!, batch.output_file_id);
  expect(output.map(({ custom_id }) => Number(custom_id)).sort((a, b) => a - b)).toEqual([
    ...Array(60).keys(),
  ]);
}, 60_000);
