// What a pod means for the set of engines. A pod that is ready and not being deleted takes requests; any other that has
// an address takes no new ones; one that is gone leaves the set.

import type { V1Pod } from '@kubernetes/client-node';
import { enginePort, labels } from '../crds/names.ts';
import type { EndpointSpec, Endpoints } from './endpoints.ts';

export type PodView =
  | { spec: EndpointSpec; isTaking: true }
  | { spec: EndpointSpec; isTaking: false; reason: string };

/** Null for a pod without an address: there is nothing to ask yet. */
export function readPod({ metadata, spec, status }: V1Pod): PodView | null {
  const address = status?.podIP;
  const baseModel = metadata?.labels?.[labels.baseModel];
  if (!address || baseModel === undefined) return null;
  const port = spec?.containers
    .flatMap(({ ports = [] }) => ports)
    .find(({ name }) => name === enginePort.name)?.containerPort;
  const host = address.includes(':') ? `[${address}]` : address;
  const endpoint: EndpointSpec = {
    id: metadata!.uid!,
    name: metadata!.name!,
    url: `http://${host}:${port ?? enginePort.number}`,
    baseModel,
  };
  if (metadata!.deletionTimestamp !== undefined)
    return { spec: endpoint, isTaking: false, reason: 'its pod is being deleted' };
  const isReady = status?.conditions?.some(({ type, status: state }) => type === 'Ready' && state === 'True');
  return isReady
    ? { spec: endpoint, isTaking: true }
    : { spec: endpoint, isTaking: false, reason: 'its pod is not ready' };
}

/** Carries a change of a pod over to the set of engines. */
export function followPod(endpoints: Endpoints, now: V1Pod | undefined, before: V1Pod | undefined): void {
  const uid = now?.metadata?.uid;
  // Also a pod of the same name that was made anew.
  if (before !== undefined && before.metadata!.uid !== uid) endpoints.remove(before.metadata!.uid!);
  if (now === undefined) return;
  const view = readPod(now);
  if (view === null) endpoints.remove(uid!);
  else if (view.isTaking) endpoints.offer(view.spec);
  else endpoints.withdraw(view.spec.id, view.reason);
}

/** Of a pod only this is kept. */
export function trimPod({ metadata, spec, status }: V1Pod): V1Pod {
  const { name, uid, resourceVersion, deletionTimestamp } = metadata!;
  const baseModel = metadata!.labels?.[labels.baseModel];
  return {
    metadata: {
      name: name!,
      uid: uid!,
      resourceVersion: resourceVersion!,
      ...(deletionTimestamp !== undefined && { deletionTimestamp }),
      ...(baseModel !== undefined && { labels: { [labels.baseModel]: baseModel } }),
    },
    spec: { containers: (spec?.containers ?? []).map(({ name, ports = [] }) => ({ name, ports })) },
    status: {
      ...(status?.podIP !== undefined && { podIP: status.podIP }),
      conditions: (status?.conditions ?? []).filter(({ type }) => type === 'Ready'),
    },
  };
}
