/** What each process answers at /metrics. */
import { join } from 'node:path';
import { onTestFinished } from 'vitest';
import { createNamespace, sharedControlPlane } from '../fixtures/control-plane.ts';
import { type RunningProcess, startGatewayOver, startProcess } from '../fixtures/processes.ts';
import { temporaryFolder } from '../fixtures/source-files.ts';
import {
  applyCrds,
  baseModelOf,
  namespaceOf,
  startTestOperator,
  untilReason,
} from '../operator/start-operator.ts';

const tiny = join(import.meta.dirname, '../goldens/tiny/llama3');

export interface EngineAndGateway {
  engine: RunningProcess;
  gateway: RunningProcess;
}

/** An engine with all tiers and the adapter `a` on the tiny model `base`, a gateway before it that keeps batches. They end with the test. */
export async function startEngineAndGateway(): Promise<EngineAndGateway> {
  const cache = await temporaryFolder();
  const engine = await startProcess('engine', [
    ...['--model', tiny, '--served-name', 'base', '--adapter', `a=${join(tiny, 'adapter')}`],
    ...['--device-memory', '32MiB', '--host-memory', '32MiB', '--kv-disk', '64MiB', '--cache', cache],
    ...['--port', '0'],
  ]);
  onTestFinished(async () => void (await engine.stop()));
  const gateway = await startGatewayOver([engine.url], ['--batch-store', await temporaryFolder()]);
  onTestFinished(() => void gateway.stop());
  return { engine, gateway };
}

export async function metricsOf({ url }: RunningProcess): Promise<string> {
  return (await fetch(`${url}/metrics`)).text();
}

/** Of an operator that leads and has made the engines of a BaseModel. */
export async function operatorMetrics(): Promise<string> {
  const plane = await sharedControlPlane();
  await applyCrds(plane);
  const namespace = namespaceOf(plane, await createNamespace(plane));
  await namespace.kubectl(['apply', '-f', '-'], baseModelOf('base'));
  const { port } = await startTestOperator(plane, namespace.name);
  await untilReason(namespace, 'base', 'PodsPending');
  return (await fetch(`http://127.0.0.1:${port}/metrics`)).text();
}

/** Names of the series that a query can ask for: of a histogram those of its buckets, sum and count. */
export function exposedNames(text: string): string[] {
  return [...text.matchAll(/^# TYPE (\S+) (\S+)$/gm)].flatMap(([, name, type]) =>
    type === 'histogram' ? [`${name}_bucket`, `${name}_sum`, `${name}_count`] : [name!],
  );
}
