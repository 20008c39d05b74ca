/**
 * A real Prometheus scrapes the pods of a running installation as the chart's PodMonitors say: every query of the
 * dashboard and every recording rule has an answer, and no alert fires.
 */
import type { V1Pod } from '@kubernetes/client-node';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { parseAllDocuments } from 'yaml';
import {
  chartFolder,
  type InstalledMotet,
  installMotet,
  loraAdapter,
  namespace,
  serveExamples,
  underLoad,
  untilReady,
} from '../../fixtures/installed-motet.ts';
import { emptyPanels, emptyRecords } from '../../fixtures/monitoring.ts';
import { exampleAdapters } from '../../fixtures/processes.ts';
import { type PodMonitor, type Prometheus, podScrape, startPrometheus } from '../../fixtures/prometheus.ts';

/** Two engines, two gateways, one operator. */
const numPods = 5;
const models = ['smollm2', ...exampleAdapters.map(({ name }) => name)];

let motet: InstalledMotet;
let prometheus: Prometheus;

beforeAll(async () => {
  // Prometheus runs on node 0, beside the cluster and not in it, and node 1 is another machine to it.
  motet = await installMotet(['networkPolicy.prometheusFrom[0].ipBlock.cidr=10.99.0.10/32']);
  await serveExamples(motet);
  const monitors = await podMonitors();
  const pods = await motet.list<V1Pod>('pods');
  prometheus = await startPrometheus(monitors.map((one) => podScrape(one, pods)));
  await prometheus.scraped(numPods);
}, 300_000);
afterAll(async () => {
  await prometheus?.stop();
  await motet?.uninstall();
}, 300_000);

/** The cluster has not the kind, so they are rendered and not applied. */
async function podMonitors(): Promise<PodMonitor[]> {
  const text = await motet.helm([
    ...['template', 'motet', chartFolder, '-n', namespace],
    ...['--set', 'monitoring.podMonitor.enabled=true', '-s', 'templates/monitoring/pod-monitors.yaml'],
  ]);
  return parseAllDocuments(text).map((document) => document.toJS());
}

test('every panel and every recording rule has an answer while requests come in, and no alert fires', async () => {
  const variables = { namespace, base_model: '.*' };
  const load = await underLoad(motet, models, async () => {
    // Work for the operator, so that it has times to tell.
    await motet.apply(loraAdapter('sql', { name: 'sql-again', copies: 'all' }));
    await untilReady(motet, 'loraadapter', 'sql-again');
    await expect
      .poll(
        async () => [
          ...(await emptyPanels(prometheus.url, variables)),
          ...(await emptyRecords(prometheus.url)),
        ],
        { timeout: 120_000, interval: 2_000 },
      )
      .toEqual([]);
  });
  expect(load.failures).toEqual([]);
  const firing = (await prometheus.alerts()).filter(({ state }) => state === 'firing');
  expect(firing.map(({ labels }) => labels.alertname)).toEqual([]);
}, 300_000);

test('the dashboard offers the base model by its name', async () => {
  const only = await emptyPanels(prometheus.url, { namespace, base_model: 'smollm2' });
  expect(only).toEqual([]);
  expect(await emptyPanels(prometheus.url, { namespace, base_model: 'another' })).toContainEqual(
    expect.stringContaining('panel "Engines" A'),
  );
});
