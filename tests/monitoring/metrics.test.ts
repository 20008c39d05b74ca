// What the processes expose, as promtool judges it, and that rules and dashboard ask for nothing else.

import { spawn } from 'node:child_process';
import { text } from 'node:stream/consumers';
import { expect, test } from 'vitest';
import { dashboardQueries, metricNamesOf, readRules } from '../fixtures/monitoring.ts';
import { postJson } from '../fixtures/processes.ts';
import { exposedNames, metricsOf, operatorMetrics, startEngineAndGateway } from './exposed.ts';

/** What promtool finds wrong, by line, besides names that are not ours to choose: those of vLLM and of prom-client. */
async function complaints(metrics: string): Promise<string[]> {
  const child = spawn('promtool', ['check', 'metrics']);
  child.stdin.end(metrics);
  const [out, errors] = await Promise.all([text(child.stdout), text(child.stderr)]);
  return `${out}${errors}`.split('\n').filter((line) => line !== '' && !/^(vllm:|nodejs_)\S+ /.test(line));
}

test('promtool accepts what engine, gateway and operator answer', async () => {
  const { engine, gateway } = await startEngineAndGateway();
  const body = { model: 'a', prompt: 'x', max_tokens: 4 };
  expect((await postJson(`${gateway.url}/v1/completions`, body)).status).toBe(200);
  expect(await complaints(await metricsOf(engine))).toEqual([]);
  expect(await complaints(await metricsOf(gateway))).toEqual([]);
  expect(await complaints(await operatorMetrics())).toEqual([]);
});

test('promtool would say so if a metric of ours had a wrong name or no help', async () => {
  const metrics = '# TYPE motet_things_total gauge\nmotet_things_total 1\n';
  expect(await complaints(metrics)).toEqual([
    'motet_things_total no help text',
    'motet_things_total non-counter metrics should not have "_total" suffix',
  ]);
});

test('rules and dashboard ask only for what a process exposes or a rule records', async () => {
  const { engine, gateway } = await startEngineAndGateway();
  const rules = readRules();
  const known = new Set([
    ...exposedNames(await metricsOf(engine)),
    ...exposedNames(await metricsOf(gateway)),
    ...exposedNames(await operatorMetrics()),
    ...rules.flatMap(({ record }) => record ?? []),
    // Prometheus' own, of each scrape.
    'up',
  ]);
  const asked = [...rules, ...dashboardQueries()].flatMap(({ expr }) => [...metricNamesOf(expr)]);
  expect([...new Set(asked)].filter((name) => !known.has(name))).toEqual([]);
});

test('finds the metrics in an expression', () => {
  const expr = `label_replace(0 * sum by (le, pod) (rate(a:b_total{c="d", e=~"f"}[5m])), "g", "h", "", "")
    or min_over_time(i[10m:30s]) > 14.4 * 0.001 unless on (j) k{l="m"}`;
  expect([...metricNamesOf(expr)]).toEqual(['a:b_total', 'i', 'k']);
});
