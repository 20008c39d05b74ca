// Builders of the resources that the gateway reads, for tests of pure functions and as bodies for a real API server.

import { labels } from '../../crds/names.ts';
import {
  type AdapterGroup,
  type AdapterRoute,
  apiVersion,
  type BaseModel,
  type LoraAdapter,
  type Tenant,
} from '../../crds/types.ts';

type Meta = { labels?: Record<string, string>; ageS?: number; uid?: string; generation?: number };

/** `ageS`: seconds before an hour of our choice, so that the oldest has the greatest. */
function metadata(name: string, { ageS = 0, uid = `uid-of-${name}`, labels, generation = 1 }: Meta) {
  const creationTimestamp = new Date(Date.UTC(2026, 0, 1, 12) - ageS * 1000).toISOString() as never;
  return { name, uid, generation, creationTimestamp, ...(labels && { labels }) };
}

export function baseModel(name: string, { servedName, ...meta }: Meta & { servedName?: string } = {}) {
  const spec = { source: { uri: 'file:///model.gguf' }, ...(servedName && { servedName }) };
  return { apiVersion, kind: 'BaseModel', metadata: metadata(name, meta), spec } as unknown as BaseModel;
}

export function loraAdapter(
  name: string,
  { baseModel = 'base', servedNames, ...meta }: Meta & { baseModel?: string; servedNames?: string[] } = {},
) {
  const source = { uri: `file:///motet/adapters/${name}` };
  const spec = { baseModel, source, ...(servedNames && { servedNames }) };
  return { apiVersion, kind: 'LoraAdapter', metadata: metadata(name, meta), spec } as unknown as LoraAdapter;
}

type RouteTargets = { adapter?: string; baseModel?: string; weight?: number; shadowPercent?: number }[];
type RouteMore = Partial<Pick<AdapterRoute['spec'], 'sticky' | 'abort' | 'steps' | 'warmCopies'>>;

export function adapterRoute(name: string, targets: RouteTargets, meta: Meta = {}, more: RouteMore = {}) {
  const spec = {
    warmCopies: 1,
    targets: targets.map((target) => ({ weight: 1, shadowPercent: 0, ...target })),
    ...more,
  };
  return { apiVersion, kind: 'AdapterRoute', metadata: metadata(name, meta), spec } as AdapterRoute;
}

export function adapterGroup(name: string, spec: Partial<AdapterGroup['spec']> = {}, meta: Meta = {}) {
  const defaults = { baseModel: 'base', selector: {}, weights: 'equal', maxMembers: 8 };
  return {
    apiVersion,
    kind: 'AdapterGroup',
    metadata: metadata(name, meta),
    spec: { ...defaults, ...spec },
  } as AdapterGroup;
}

/** @param secrets  names of the Secrets that hold its keys, or `NAME/ENTRY` */
export function tenant(
  name: string,
  {
    secrets = [name],
    access = {},
    ...meta
  }: Meta & { secrets?: string[]; access?: Tenant['spec']['access'] } = {},
) {
  const keys = secrets.map((secret) => {
    const [secretName = '', key = 'key'] = secret.split('/');
    return { secretRef: { name: secretName, key } };
  });
  const spec = { keys, access };
  return { apiVersion, kind: 'Tenant', metadata: metadata(name, meta), spec } as Tenant;
}

/** An engine pod as a controller would make it, before it runs. */
export function enginePod(name: string, baseModel: string) {
  return {
    apiVersion: 'v1',
    kind: 'Pod',
    metadata: { name, labels: { [labels.baseModel]: baseModel } },
    spec: { containers: [{ name: 'engine', image: 'none', ports: [{ name: 'http', containerPort: 8000 }] }] },
  };
}
