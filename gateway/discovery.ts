// What a pod means for the set of engines. One that has an address is looked at, and its engine says itself whether it
// takes requests; one that is being deleted takes no new ones; one that has ended or is gone leaves the set.
//
// The condition Ready of a pod is not asked: it is the kubelet's older answer to the same question, and after an outage of
// the API server the node controller may set it to False on every node at once, while all engines serve.

import type { V1Pod, V1PodStatus } from '@kubernetes/client-node';
import { enginePort, labels } from '../crds/names.ts';
import type { EndpointSpec, Endpoints } from './endpoints.ts';

export type PodView =
  | { spec: EndpointSpec; isTaking: true }
  | { spec: EndpointSpec; isTaking: false; reason: string };

/** Null for a pod that has no address yet, and for one that has ended: its address may be another's by now. */
export function readPod({ metadata, spec, status }: V1Pod): PodView | null {
  const address = status?.podIP;
  const baseModel = metadata?.labels?.[labels.baseModel];
  if (!address || baseModel === undefined || hasEnded(status)) return null;
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
  return { spec: endpoint, isTaking: true };
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
      ...(status?.phase !== undefined && { phase: status.phase }),
    },
  };
}

function hasEnded({ phase }: V1PodStatus): boolean {
  return phase === 'Succeeded' || phase === 'Failed';
}
