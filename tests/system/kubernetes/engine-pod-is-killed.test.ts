/** An engine dies in the middle of streams: nobody hangs, nobody gets half an answer for a whole one, and all comes back. */
import type { V1Pod } from '@kubernetes/client-node';
import { afterAll, beforeAll, expect, test } from 'vitest';
import {
  type InstalledMotet,
  installMotet,
  killProcesses,
  readyEngines,
  serveExamples,
  untilConverged,
} from '../../fixtures/installed-motet.ts';
import { exampleAdapters } from '../../fixtures/processes.ts';

let motet: InstalledMotet;
beforeAll(async () => {
  motet = await installMotet();
  await serveExamples(motet);
}, 300_000);
afterAll(() => motet?.uninstall(), 300_000);

const models = ['smollm2', ...exampleAdapters.map(({ name }) => name)];

type Ending = 'finished' | 'error event' | 'refused';

/** One long stream, and how it ended. Rejects if it ended in silence. */
async function streamToItsEnd(model: string): Promise<Ending> {
  let finished = false;
  try {
    const stream = await motet.client.chat.completions.create({
      model,
      messages: [{ role: 'user', content: 'Count to one hundred.' }],
      max_tokens: 1200,
      stream: true,
      // It goes on to max_tokens, so that the pod dies in the middle: its end comes seconds after it is deleted.
      ...{ ignore_eos: true },
    });
    for await (const { choices } of stream) if (choices[0]?.finish_reason) finished = true;
  } catch (error) {
    const { status, code } = error as { status?: number; code?: string };
    if (code === 'engine_failed' || code === 'draining') return 'error event';
    if (status === 503) return 'refused';
    throw error;
  }
  if (!finished) throw new Error('the stream ended without a finish reason and without an error');
  return 'finished';
}

test('streams on a pod that is killed end with an error event, those on the other pod finish', async () => {
  const streams = Promise.all(
    Array.from({ length: 12 }, (_, i) => streamToItsEnd(models[i % models.length]!)),
  );
  await new Promise((resolve) => setTimeout(resolve, 2_000));
  const [victim] = await readyEngines(motet);
  await motet.kubectl(['delete', 'pod', victim!.metadata!.name!, '--grace-period=0', '--force']);

  const endings = await streams;
  const count = (ending: Ending) => endings.filter((one) => one === ending).length;
  expect(count('finished')).toBeGreaterThan(0);
  expect(count('error event')).toBeGreaterThan(0);
  expect(count('refused')).toBe(0);

  await untilConverged(motet);
  const engines = await readyEngines(motet);
  expect(engines).toHaveLength(2);
  expect(engines.map(({ metadata }) => metadata!.name)).not.toContain(victim!.metadata!.name);
}, 300_000);

test('an engine process that is killed comes back in its pod, and its adapters without a hand', async () => {
  const [victim] = await readyEngines(motet);
  const pod = victim!.metadata!.name!;
  const restarts = ({ status }: V1Pod) => status!.containerStatuses![0]!.restartCount;
  const before = restarts(victim!);
  killProcesses(victim!, 'engine/main.ts');

  await expect
    .poll(async () => restarts(await motet.get<V1Pod>('pod', pod)), { timeout: 60_000 })
    .toBe(before + 1);
  await untilConverged(motet);
  expect((await readyEngines(motet)).map(({ metadata }) => metadata!.name)).toContain(pod);
}, 300_000);
