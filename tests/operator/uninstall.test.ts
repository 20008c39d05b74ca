import { KubeConfig } from '@kubernetes/client-node';
import { expect, test } from 'vitest';
import { uninstall } from '../../operator/uninstall.ts';
import { installCrds } from '../crds/install-crds.ts';
import { createNamespace, kubectl, sharedControlPlane } from '../fixtures/control-plane.ts';

test('what the operator made goes with the base models, also when nobody collects garbage; the rest stays', async () => {
  const plane = await sharedControlPlane();
  await installCrds(plane);
  const namespace = await createNamespace(plane);
  const apply = (...items: object[]) =>
    kubectl(
      plane,
      ['-n', namespace, 'apply', '-f', '-'],
      JSON.stringify({ apiVersion: 'v1', kind: 'List', items }),
    );
  const names = async () =>
    (
      await kubectl(plane, ['-n', namespace, 'get', 'basemodel,deployment,service,pdb,pod', '-o', 'name'])
    ).trim();
  // No owner references: this stands for a collector that has not heard of the kind.
  await apply(baseModel, ...objectsOf('smollm2', 'motet-operator'), ...objectsOf('another', 'somebody'));

  const kubeConfig = new KubeConfig();
  kubeConfig.loadFromFile(plane.kubeconfig);
  const lines: string[] = [];
  const left = await uninstall({
    kubeConfig,
    namespace,
    waitMs: 30_000,
    intervalMs: 100,
    log: (line) => void lines.push(line),
  });
  expect(left).toBe(0);
  expect(lines.at(-1)).toBe('0 engine pods are left');
  await expect
    .poll(names, { timeout: 30_000 })
    .toMatch(
      /^deployment.apps\/another\nservice\/another\npoddisruptionbudget.policy\/another(\npod\/another\S+)?$/,
    );
}, 90_000);

const baseModel = {
  apiVersion: 'motet.dev/v1alpha1',
  kind: 'BaseModel',
  metadata: { name: 'smollm2' },
  spec: { source: { uri: 'file:///model.gguf' } },
};

function objectsOf(name: string, manager: string): object[] {
  const labels = { 'app.kubernetes.io/managed-by': manager };
  const selector = { matchLabels: { app: name } };
  const podLabels =
    manager === 'motet-operator' ? { app: name, 'motet.dev/base-model': name } : { app: name };
  const spec = { containers: [{ name: 'x', image: 'x' }], terminationGracePeriodSeconds: 0 };
  return [
    {
      apiVersion: 'apps/v1',
      kind: 'Deployment',
      metadata: { name, labels },
      spec: { selector, template: { metadata: { labels: podLabels }, spec } },
    },
    {
      apiVersion: 'v1',
      kind: 'Service',
      metadata: { name, labels },
      spec: { ports: [{ port: 80 }], selector: { app: name } },
    },
    {
      apiVersion: 'policy/v1',
      kind: 'PodDisruptionBudget',
      metadata: { name, labels },
      spec: { selector, maxUnavailable: 1 },
    },
  ];
}
