import { readFileSync } from 'node:fs';
import { expect, onTestFinished, test } from 'vitest';
import { dashboardJson } from '../../scripts/dashboard.ts';
import {
  dashboardPath,
  dashboardQueries,
  emptyPanels,
  emptyRecords,
  readDashboard,
} from '../fixtures/monitoring.ts';
import { postJson } from '../fixtures/processes.ts';
import { startPrometheus, staticScrape } from '../fixtures/prometheus.ts';
import { startEngineAndGateway } from './exposed.ts';

const panels = readDashboard().panels.filter(({ type }) => type !== 'row');

test('the file is what scripts/dashboard.ts makes', () => {
  expect(readFileSync(dashboardPath, 'utf8')).toBe(dashboardJson());
});

test('every panel has a title of its own, a description, a unit and a query', () => {
  expect(new Set(panels.map(({ title }) => title)).size).toBe(panels.length);
  for (const { title, description, fieldConfig, targets } of panels) {
    expect(description, title).toMatch(/\S/);
    expect(fieldConfig?.defaults.unit, title).toMatch(/\S/);
    expect(targets!.length, title).toBeGreaterThan(0);
  }
});

test('lines of a graph with more than one query can be told apart', () => {
  for (const { title, targets = [] } of panels.filter(({ targets = [] }) => targets.length > 1)) {
    const legends = targets.map(({ legendFormat }) => legendFormat);
    expect(new Set(legends).size, title).toBe(legends.length);
    expect(legends, title).not.toContain('');
  }
});

test('no panel lies over another or outside of the 24 columns', () => {
  const taken = new Map<string, string>();
  for (const { title, gridPos } of readDashboard().panels) {
    for (let x = gridPos.x; x < gridPos.x + gridPos.w; x++) {
      for (let y = gridPos.y; y < gridPos.y + gridPos.h; y++) {
        expect(x, title).toBeLessThan(24);
        expect(taken.get(`${x},${y}`), title).toBeUndefined();
        taken.set(`${x},${y}`, title);
      }
    }
  }
});

test('every rate is taken over the interval that Grafana chooses, so that a day can be looked at', () => {
  for (const { where, expr } of dashboardQueries()) {
    for (const [, range] of expr.matchAll(/\[([^\]]+)\]/g)) expect(range, where).toBe('$__rate_interval');
  }
});

/** Those have nothing to say outside of a cluster; tests/system/kubernetes/dashboard-is-full.test.ts has them. */
const onlyInCluster = /motet_operator_|motet_gateway_watch_stale_seconds|motet_gateway_engines/;

test('after some requests every panel and record of engine and gateway has something to show', async () => {
  const { engine, gateway } = await startEngineAndGateway();
  const labels = { namespace: 'here', base_model: 'base' };
  const prometheus = await startPrometheus([
    staticScrape([
      { url: engine.url, labels: { ...labels, job: 'motet-engine', pod: 'engine-1' } },
      { url: gateway.url, labels: { namespace: 'here', job: 'motet-gateway', pod: 'gateway-1' } },
    ]),
  ]);
  onTestFinished(() => prometheus.stop());
  await prometheus.scraped(2);
  const variables = { namespace: 'here', base_model: '.*' };
  await expect
    .poll(
      async () => {
        // Again and again: a count that begins with its first event has a rate from the second on.
        for (const model of ['base', 'a']) {
          const body = { model, prompt: 'x', max_tokens: 8 };
          expect((await postJson(`${gateway.url}/v1/completions`, body)).status).toBe(200);
        }
        const empty = [
          ...(await emptyPanels(prometheus.url, variables)),
          ...(await emptyRecords(prometheus.url)),
        ];
        return empty.filter((query) => !onlyInCluster.test(query));
      },
      { timeout: 60_000, interval: 1_000 },
    )
    .toEqual([]);
  // Of another namespace nothing but the variable that lists the namespaces has an answer.
  const elsewhere = await emptyPanels(prometheus.url, { ...variables, namespace: 'elsewhere' });
  expect(elsewhere.length).toBe(dashboardQueries().length - 1);
}, 90_000);
