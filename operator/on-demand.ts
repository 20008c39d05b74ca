/**
 * What is there only while somebody asks for it (pure). The gateways write when somebody last asked; the time without a
 * request after which it goes again is the resource's own.
 */
import type { BaseModel, LoraAdapter } from '../crds/types.ts';

/** True without `spec.onDemand`. */
export function isWanted({ spec, status }: BaseModel | LoraAdapter, now: Date): boolean {
  if (spec.onDemand === undefined) return true;
  if (status?.askedAt === undefined) return false;
  return now.getTime() < new Date(status.askedAt).getTime() + spec.onDemand.idleMinutes * 60_000;
}

/** Engine pods that there should be, and when that is to be asked again; null: at the next change. */
export function wantedReplicas(
  baseModel: BaseModel,
  now: Date,
): { replicas: number; askAgainInMs: number | null } {
  const { replicas, onDemand } = baseModel.spec;
  if (onDemand === undefined || onDemand.replicas <= replicas || !isWanted(baseModel, now)) {
    return { replicas, askAgainInMs: null };
  }
  const endsMs = new Date(baseModel.status!.askedAt!).getTime() + onDemand.idleMinutes * 60_000;
  return { replicas: onDemand.replicas, askAgainInMs: endsMs - now.getTime() };
}
