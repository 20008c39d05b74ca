import { Histogram, Registry } from 'prom-client';
import { expect, test } from 'vitest';
import { EngineMetrics } from '../../engine/metrics.ts';

test('the latency between tokens is exposed as a histogram of prom-client would be', async () => {
  const { interTokenLatency, registry } = new EngineMetrics('base');
  const own = new Registry();
  own.setDefaultLabels({ model_name: 'base', engine: '0' });
  const buckets = [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5];
  const { name } = interTokenLatency;
  const help = 'Between two tokens of a sequence, in seconds.';
  const histogram = new Histogram({ name, help, buckets, registers: [own] });
  // Below, at and between bounds, and above all of them.
  for (const seconds of [0.001, 0.025, 0.03, 0.75, 80]) {
    interTokenLatency.observe(seconds);
    histogram.observe(seconds);
  }
  expect(await registry.getSingleMetricAsString(name)).toBe(await own.getSingleMetricAsString(name));
});
