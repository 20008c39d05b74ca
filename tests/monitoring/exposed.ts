/** What each process answers at /metrics. Engine and gateway run; the operator's metrics are asked of their registry. */
import { join } from 'node:path';
import { onTestFinished } from 'vitest';
import { createMetrics, watchState } from '../../operator/metrics.ts';
import { type RunningProcess, startGatewayOver, startProcess } from '../fixtures/processes.ts';

const tiny = join(import.meta.dirname, '../goldens/tiny/llama3');

export interface EngineAndGateway {
  engine: RunningProcess;
  gateway: RunningProcess;
}

/** An engine with the native core and the adapter `a` on the tiny model `base`, a gateway before it. They end with the test. */
export async function startEngineAndGateway(): Promise<EngineAndGateway> {
  const engine = await startProcess('engine', [
    ...['--model', tiny, '--served-name', 'base', '--adapter', `a=${join(tiny, 'adapter')}`],
    ...['--device-memory', '32MiB', '--port', '0'],
  ]);
  onTestFinished(() => void engine.stop());
  const gateway = await startGatewayOver([engine.url]);
  onTestFinished(() => void gateway.stop());
  return { engine, gateway };
}

export async function metricsOf({ url }: RunningProcess): Promise<string> {
  return (await fetch(`${url}/metrics`)).text();
}

/** Every metric with its type; those with labels have no series before something happens. */
export async function operatorMetrics(): Promise<string> {
  const metrics = createMetrics();
  watchState(metrics.registry, {
    isLeader: () => true,
    queueDepths: () => ({ 'base-model': 0 }),
    staleSinceMs: () => ({ basemodels: null }),
  });
  return metrics.registry.metrics();
}

/** Names of the series that a query can ask for: of a histogram those of its buckets, sum and count. */
export function exposedNames(text: string): string[] {
  return [...text.matchAll(/^# TYPE (\S+) (\S+)$/gm)].flatMap(([, name, type]) =>
    type === 'histogram' ? [`${name}_bucket`, `${name}_sum`, `${name}_count`] : [name!],
  );
}
