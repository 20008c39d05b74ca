/**
 * What do many adapters cost the operator? A real API server, the operator as a process, engines simulated at their HTTP API:
 * time until everything is ready, processor time and memory of the operator, requests to the API server; then the same for
 * a world in which nothing changes. Arguments: numbers of adapters (default 1000).
 */
import { setTimeout as sleep } from 'node:timers/promises';
import { startControlPlane } from '../fixtures/control-plane.ts';
import { startFleet, untilAllReady } from '../operator/fleet.ts';
import { applyCrds } from '../operator/start-operator.ts';

const numBaseModels = 10;
const loadMs = 20;
const restSeconds = 60;

const sizes = process.argv.slice(2).map(Number);
const plane = await startControlPlane();
try {
  await applyCrds(plane);
  for (const numAdapters of sizes.length > 0 ? sizes : [1000]) await measure(numAdapters);
} finally {
  await plane.stop();
}

async function measure(numAdapters: number): Promise<void> {
  const fleet = await startFleet(plane, {
    numBaseModels,
    numAdapters,
    loadMs,
    args: ['--resync-seconds', '15'],
  });
  try {
    const { operator, engines } = fleet;
    const seconds = await untilAllReady(fleet, 600);
    const settled = await figures();
    const copies = (await fleet.adapters()).reduce((sum, { status }) => sum + status!.readyCopies!, 0);
    console.log(
      `\n${numAdapters} adapters, ${copies} copies, ${numBaseModels} base models, ${engines.length} engines, a load takes ${loadMs} ms`,
    );
    console.log(`ready after ${seconds.toFixed(1)} s, ${(copies / seconds).toFixed(0)} copies a second`);
    tell(settled);

    // Statuses of base models follow a moment later.
    await sleep(10_000);
    const before = await figures();
    await sleep(restSeconds * 1000);
    const after = await figures();
    console.log(`\nat rest, over ${restSeconds} s with ${restSeconds / 15} full resyncs`);
    tell(after, before);

    async function figures() {
      return {
        cpuSeconds: operator.cpuSeconds(),
        ...operator.memory(),
        api: await operator.metric('motet_operator_api_requests_total'),
        engines: await operator.metric('motet_operator_engine_calls_total'),
        reconciles: await operator.metric('motet_operator_reconcile_total'),
      };
    }
  } finally {
    await fleet.stop();
  }
}

type Figures = {
  cpuSeconds: number;
  rss: number;
  peak: number;
  api: Record<string, number>;
  engines: Record<string, number>;
  reconciles: Record<string, number>;
};

function tell(now: Figures, before?: Figures): void {
  const MiB = (bytes: number) => `${(bytes / 2 ** 20).toFixed(0)} MiB`;
  const cpu = now.cpuSeconds - (before?.cpuSeconds ?? 0);
  console.log(
    `operator: ${cpu.toFixed(1)} s of processor time, ${MiB(now.rss)} in memory, ${MiB(now.peak)} at most`,
  );
  for (const kind of ['api', 'engines', 'reconciles'] as const) {
    for (const [labels, value] of Object.entries(now[kind])) {
      const count = value - (before?.[kind][labels] ?? 0);
      if (count > 0) console.log(`  ${kind}: ${labels} ${count}`);
    }
  }
}
