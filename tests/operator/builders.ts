// Small objects with named overrides.

import type { V1ContainerStatus, V1Pod } from '@kubernetes/client-node';
import type { AdapterGroup, AdapterRoute, BaseModel, LoraAdapter } from '../../crds/types.ts';

type Metadata = { name?: string; uid?: string; createdAt?: string; labels?: Record<string, string> };

const metadataOf = ({ name = 'tiny', uid, createdAt = '2026-01-01T00:00:00Z', labels }: Metadata) => ({
  name,
  namespace: 'default',
  uid: uid ?? `uid-of-${name}`,
  generation: 1,
  ...(labels && { labels }),
  // As it comes from the wire.
  creationTimestamp: createdAt as never,
});

/** With the defaults that the API server fills in. */
export function baseModel(spec: Partial<BaseModel['spec']> = {}, metadata: Metadata = {}): BaseModel {
  return {
    apiVersion: 'motet.dev/v1alpha1',
    kind: 'BaseModel',
    metadata: metadataOf(metadata),
    spec: {
      source: { uri: 'file:///models/tiny.gguf' },
      replicas: 1,
      quantization: 'keep',
      kv: { dtype: 'auto', prefixCache: true, eviction: 'cost' },
      adapterQuantization: 'keep',
      pooling: 'last',
      accelerator: { type: 'cpu', count: 1, runtimeClassName: 'nvidia' },
      memory: { device: '1Gi', host: 0, disk: 0, weights: 0 },
      limits: { maxBatchTokens: 256, maxSequences: 64, maxWaiting: 256, maxLoraRank: 256 },
      drainSeconds: 30,
      rollout: { maxSurge: 1, maxUnavailable: 0 },
      disruption: { maxUnavailable: 1 },
      ...spec,
    },
  };
}

export function loraAdapter(spec: Partial<LoraAdapter['spec']> = {}, metadata: Metadata = {}): LoraAdapter {
  return {
    apiVersion: 'motet.dev/v1alpha1',
    kind: 'LoraAdapter',
    metadata: metadataOf({ name: 'sql', ...metadata }),
    spec: {
      baseModel: 'tiny',
      source: { uri: 'file:///motet/adapters/sql' },
      copies: 1,
      pin: false,
      ...spec,
    },
  };
}

export function adapterRoute(
  spec: Partial<AdapterRoute['spec']> = {},
  metadata: Metadata = {},
): AdapterRoute {
  return {
    apiVersion: 'motet.dev/v1alpha1',
    kind: 'AdapterRoute',
    metadata: metadataOf({ name: 'route', ...metadata }),
    spec: { targets: [{ adapter: 'sql', weight: 1, shadowPercent: 0 }], warmCopies: 1, ...spec },
  };
}

export function adapterGroup(
  spec: Partial<AdapterGroup['spec']> = {},
  metadata: Metadata = {},
): AdapterGroup {
  return {
    apiVersion: 'motet.dev/v1alpha1',
    kind: 'AdapterGroup',
    metadata: metadataOf({ name: 'group', ...metadata }),
    spec: { baseModel: 'tiny', selector: {}, weights: 'equal', maxMembers: 8, ...spec },
  };
}

/** An engine pod that takes requests; `container` is the status of its engine, `conditions` are more of the pod's. */
export function pod({
  name = 'tiny-abc',
  baseModel = 'tiny',
  isReady = true,
  container = {},
  status = {},
}: {
  name?: string;
  baseModel?: string;
  isReady?: boolean;
  container?: Partial<V1ContainerStatus>;
  status?: V1Pod['status'];
} = {}): V1Pod {
  return {
    metadata: { name, uid: `uid-of-${name}`, labels: { 'motet.dev/base-model': baseModel } },
    spec: { nodeName: 'node-a' } as never,
    status: {
      phase: 'Running',
      conditions: [
        { type: 'PodScheduled', status: 'True' },
        { type: 'Ready', status: isReady ? 'True' : 'False' },
      ],
      containerStatuses: [
        {
          name: 'engine',
          ready: isReady,
          restartCount: 0,
          image: '',
          imageID: '',
          state: { running: {} },
          ...container,
        },
      ],
      ...status,
    },
  };
}
