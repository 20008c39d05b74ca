// What `helm uninstall` runs before the operator and the definitions go: every BaseModel is deleted, and what the operator
// made for it. Garbage collection does the same, but only for kinds that the collector has heard of, which takes it half a
// minute after a definition is made or the controller manager is started anew. Engines must not outlive their chart by
// such an accident. Nothing here is needed for a BaseModel that a person deletes while its definition stays.

import { readFileSync } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';
import { KubeConfig, type V1PodList } from '@kubernetes/client-node';
import { ApiError, callApi, motetPath } from '../crds/api.ts';
import { labels } from '../crds/names.ts';
import { managedBy } from './desired.ts';

export interface UninstallOptions {
  kubeConfig: KubeConfig;
  namespace: string;
  /** How long to wait for the engines' pods. What drains longer goes on to the end of its own grace period. */
  waitMs: number;
  /** Between two looks. */
  intervalMs: number;
  log: (line: string) => void;
}

/** @returns the number of engine pods that are still draining after `waitMs` */
export async function uninstall({
  kubeConfig,
  namespace,
  waitMs,
  intervalMs,
  log,
}: UninstallOptions): Promise<number> {
  const ours = { labelSelector: `${labels.managedBy}=${managedBy}` };
  const removeAll = async (path: string, query: Record<string, string>) => {
    try {
      await callApi(kubeConfig, {
        method: 'DELETE',
        path,
        query: { ...query, propagationPolicy: 'Background' },
      });
    } catch (error) {
      // The definition may be gone already.
      if (!(error instanceof ApiError && error.status === 404)) throw error;
    }
  };
  const numPods = async () => {
    const path = `/api/v1/namespaces/${namespace}/pods`;
    const query = { labelSelector: labels.baseModel, limit: '500' };
    return (await callApi<V1PodList>(kubeConfig, { path, query })).items.length;
  };

  const endMs = performance.now() + waitMs;
  let left: number;
  do {
    await removeAll(motetPath('BaseModel', namespace), {});
    // Again at each look: the operator may have been in the middle of a reconcile.
    for (const [group, plural] of [
      ['apis/apps/v1', 'deployments'],
      ['api/v1', 'services'],
      ['apis/policy/v1', 'poddisruptionbudgets'],
    ]) {
      await removeAll(`/${group}/namespaces/${namespace}/${plural}`, ours);
    }
    left = await numPods();
    log(`${left} engine pods are left`);
    if (left > 0) await sleep(intervalMs);
  } while (left > 0 && performance.now() < endMs);
  return left;
}

if (import.meta.main) {
  const kubeConfig = new KubeConfig();
  kubeConfig.loadFromCluster();
  const namespaceFile = '/var/run/secrets/kubernetes.io/serviceaccount/namespace';
  await uninstall({
    kubeConfig,
    namespace: readFileSync(namespaceFile, 'utf8').trim(),
    waitMs: 60_000,
    intervalMs: 1_000,
    log: console.log,
  });
  // Connections that are kept alive must not hold it.
  process.exit();
}
