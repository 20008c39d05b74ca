import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import type { V1Pod } from '@kubernetes/client-node';
import { expect, onTestFinished, test } from 'vitest';
import { parse } from 'yaml';
import { dashboardPath } from '../fixtures/monitoring.ts';
import { type PodMonitor, podScrape, rulesFolder, startPrometheus } from '../fixtures/prometheus.ts';
import { serveFake } from '../fixtures/serve-fake.ts';
import { find, renderObjects } from '../helm/chart.ts';

const on = { enabled: true };
const monitoring = { podMonitor: on, rules: on, dashboard: on, labels: { release: 'prometheus' } };

test('installs nothing for Prometheus or Grafana unless it is asked to', async () => {
  const kinds = (await renderObjects()).map(({ kind }) => kind);
  expect(kinds).not.toContain('PodMonitor');
  expect(kinds).not.toContain('PrometheusRule');
  expect(kinds).not.toContain('ConfigMap');
});

test('the PrometheusRule holds the groups of the rule files as they are', async () => {
  const { spec, metadata } = find(await renderObjects({ monitoring }), 'PrometheusRule', 'motet');
  const byName = (groups: { name: string }[]) => groups.sort((a, b) => a.name.localeCompare(b.name));
  const groups = readdirSync(rulesFolder).flatMap(
    (name) => parse(readFileSync(join(rulesFolder, name), 'utf8')).groups,
  );
  expect(byName(spec.groups)).toEqual(byName(groups));
  expect(metadata.labels.release).toBe('prometheus');
});

test('the ConfigMap holds the dashboard as it is, with the label that Grafana looks for', async () => {
  const { data, metadata } = find(await renderObjects({ monitoring }), 'ConfigMap', 'motet-dashboard');
  expect(data).toEqual({ 'motet.json': readFileSync(dashboardPath, 'utf8') });
  expect(metadata.labels).toMatchObject({ grafana_dashboard: '1', release: 'prometheus' });
});

test('the PodMonitors choose engines, gateways and operators, and give the labels that rules and dashboard go by', async () => {
  const monitors = (await renderObjects({ monitoring })).filter(({ kind }) => kind === 'PodMonitor');
  for (const { metadata } of monitors) expect(metadata.labels.release).toBe('prometheus');
  const { port } = await serveFake();
  const ofRelease = (component: string) => ({
    'app.kubernetes.io/name': 'motet',
    'app.kubernetes.io/instance': 'motet',
    'app.kubernetes.io/component': component,
  });
  const pods = [
    pod({ name: 'base-1', port, labels: { 'motet.dev/base-model': 'base' } }),
    pod({ name: 'gateway-1', port, labels: ofRelease('gateway') }),
    pod({ name: 'operator-1', port, labels: ofRelease('operator') }),
    // None of these.
    pod({ name: 'other-port', port, portName: 'admin', labels: ofRelease('gateway') }),
    pod({
      name: 'other-release',
      port,
      labels: { ...ofRelease('gateway'), 'app.kubernetes.io/instance': 'b' },
    }),
    pod({ name: 'other-namespace', port, namespace: 'b', labels: { 'motet.dev/base-model': 'base' } }),
    pod({ name: 'done', port, phase: 'Succeeded', labels: ofRelease('gateway') }),
  ];
  const prometheus = await startPrometheus(
    monitors.map((one) => podScrape(one as unknown as PodMonitor, pods)),
  );
  onTestFinished(() => prometheus.stop());
  await prometheus.scraped(3);
  const found = (await prometheus.query('up')).map(({ labels: { __name__, instance, ...labels } }) => labels);
  expect(found.sort((a, b) => a.job!.localeCompare(b.job!))).toEqual([
    { job: 'motet-engine', namespace: 'motet', pod: 'base-1', base_model: 'base' },
    { job: 'motet-gateway', namespace: 'motet', pod: 'gateway-1' },
    { job: 'motet-operator', namespace: 'motet', pod: 'operator-1' },
  ]);
});

function pod({
  name,
  port,
  labels,
  portName = 'http',
  namespace = 'motet',
  phase = 'Running',
}: {
  name: string;
  port: number;
  labels: Record<string, string>;
  portName?: string;
  namespace?: string;
  phase?: string;
}): V1Pod {
  return {
    metadata: { name, namespace, labels },
    spec: { containers: [{ name: 'main', ports: [{ name: portName, containerPort: port }] }] },
    status: { phase, podIP: '127.0.0.1' },
  };
}
