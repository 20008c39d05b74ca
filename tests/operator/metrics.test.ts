import { KubeConfig } from '@kubernetes/client-node';
import { expect, onTestFinished, test } from 'vitest';
import { callApi } from '../../crds/api.ts';
import { countApiCalls, createMetrics, watchState } from '../../operator/metrics.ts';

const linesOf = async ({ registry }: ReturnType<typeof createMetrics>, name: string) =>
  (await registry.metrics()).split('\n').filter((line) => line.startsWith(name));

test('every metric of the operator says what it is', async () => {
  const metrics = createMetrics();
  watchState(metrics.registry, { isLeader: () => true, queueDepths: () => ({}), staleSinceMs: () => ({}) });
  const ours = (await metrics.registry.getMetricsAsJSON()).filter(({ name }) => name.startsWith('motet_'));
  expect(ours.length).toBeGreaterThanOrEqual(10);
  for (const { name, help } of ours) expect(help, name).toMatch(/^[A-Z0-9].{20,}\.$/s);
});

test('the series of a base model go with it', async () => {
  const metrics = createMetrics();
  for (const base_model of ['a', 'b']) {
    metrics.baseModelEngines.set({ base_model, state: 'ready' }, 1);
    metrics.adapterCopies.set({ base_model, state: 'wanted' }, 1);
    metrics.adapters.set({ base_model, reason: 'Resident' }, 1);
  }
  metrics.forgetBaseModel('a');
  const text = await metrics.registry.metrics();
  expect(text).not.toContain('base_model="a"');
  expect(text.match(/base_model="b"/g)).toHaveLength(3);
});

test('reads leadership, depths and staleness when somebody looks', async () => {
  const metrics = createMetrics();
  let isLeader = false;
  watchState(metrics.registry, {
    isLeader: () => isLeader,
    queueDepths: () => ({ adapters: 3 }),
    staleSinceMs: () => ({ pods: Date.now() - 60_000, services: null }),
  });
  expect(await linesOf(metrics, 'motet_operator_is_leader')).toEqual(['motet_operator_is_leader 0']);
  isLeader = true;
  expect(await linesOf(metrics, 'motet_operator_is_leader')).toEqual(['motet_operator_is_leader 1']);
  expect(await linesOf(metrics, 'motet_operator_queue_depth')).toEqual([
    'motet_operator_queue_depth{kind="adapters"} 3',
  ]);
  const [pods, services] = await linesOf(metrics, 'motet_operator_watch_stale_seconds');
  expect(Number(pods!.split(' ')[1])).toBeGreaterThanOrEqual(60);
  expect(services).toBe('motet_operator_watch_stale_seconds{resource="services"} 0');
});

test('counts requests to the API server, those without an answer too, until it is told not to', async () => {
  const metrics = createMetrics();
  const stop = countApiCalls(metrics);
  onTestFinished(stop);
  const kubeConfig = new KubeConfig();
  // Nothing listens on port 1.
  kubeConfig.loadFromClusterAndUser(
    { name: 'c', server: 'https://127.0.0.1:1', skipTLSVerify: false },
    { name: 'u' },
  );
  const patch = () =>
    callApi(kubeConfig, {
      method: 'PATCH',
      path: '/apis/motet.dev/v1alpha1/namespaces/default/basemodels/tiny/status',
      body: {},
    }).catch(() => undefined);
  await patch();
  const expected =
    'motet_operator_api_requests_total{verb="patch",resource="basemodels/status",code="none"} 1';
  expect(await linesOf(metrics, 'motet_operator_api_requests_total')).toEqual([expected]);
  stop();
  await patch();
  expect(await linesOf(metrics, 'motet_operator_api_requests_total')).toEqual([expected]);
});
