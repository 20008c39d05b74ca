// Every name that operator, gateway and people meet beside the fields: labels, ports, paths, conditions, reasons.
// A reason is part of the API: people and scripts look for it. Each is documented in crds/README.md.

import type { BaseModel, LoraAdapter } from './types.ts';

export const labels = {
  /** On engine pods and what belongs to them: the name of their BaseModel. */
  baseModel: 'motet.dev/base-model',
  /** On LoraAdapters that a request declared: the name of the BaseModel whose `spec.autoLoad` let the name in. */
  autoLoad: 'motet.dev/auto-load',
  name: 'app.kubernetes.io/name',
  instance: 'app.kubernetes.io/instance',
  component: 'app.kubernetes.io/component',
  managedBy: 'app.kubernetes.io/managed-by',
} as const;

/** Values of `app.kubernetes.io/component`. */
export const components = { engine: 'engine', gateway: 'gateway', operator: 'operator' } as const;

/** Port of an engine: its name in the pod and its number. */
export const enginePort = { name: 'http', number: 8000 } as const;

/** Who a token is for when gateway or operator shows it to an engine. */
export const engineAudience = 'motet-engine';

/** Where engines find adapters: claims are mounted below, as adapterRoot/CLAIM. */
export const adapterRoot = '/motet/adapters';

export const conditionTypes = {
  ready: 'Ready',
  progressing: 'Progressing',
  pinned: 'Pinned',
  bounded: 'Bounded',
} as const;

/** Reasons of BaseModel's conditions. */
export const baseModelReasons = {
  /** Ready: every wanted engine takes requests. */
  enginesReady: 'EnginesReady',
  /** Not ready: some engines are not there yet; the message says which and why. */
  enginesStarting: 'EnginesStarting',
  /** Not ready: engines end soon after their start; the message has the engine's last words. */
  engineFailing: 'EngineFailing',
  /** Not ready: pods cannot be scheduled or their image or volumes cannot be had. */
  podsPending: 'PodsPending',
  /** Not ready: replicas is 0, and nobody asks. */
  scaledToZero: 'ScaledToZero',
  /** Not ready: another resource has its served name. */
  nameConflict: 'NameConflict',
  /** Not ready: the API server refused what the operator wanted to make; the message has its words. */
  applyRefused: 'ApplyRefused',
  /** Progressing: pods are being made or replaced. */
  rollingOut: 'RollingOut',
  /** Not progressing: nothing is left to do. */
  rolledOut: 'RolledOut',
} as const;

/** Reasons of LoraAdapter's conditions. */
export const loraAdapterReasons = {
  /** Every wanted copy is resident. */
  resident: 'Resident',
  /** Copies are being loaded. */
  loading: 'Loading',
  /** An engine refused it; the message has the engine's words. */
  refused: 'Refused',
  /** The source cannot be had now; it is tried again. The message has the cause. */
  sourceUnavailable: 'SourceUnavailable',
  /** The source has another digest than spec.source.digest. */
  digestMismatch: 'DigestMismatch',
  /** The claim of its source is not among the base model's adapterClaims. */
  claimNotMounted: 'ClaimNotMounted',
  /** There is no such BaseModel. */
  baseModelNotFound: 'BaseModelNotFound',
  /** No engine of the base model is ready. */
  noEngineReady: 'NoEngineReady',
  /** Not ready: no engine has room for it. Not pinned: pins would leave an engine too little; the message has its words. */
  noRoom: 'NoRoom',
  /** Nobody asked for it lately, and it is loaded on demand. */
  notAsked: 'NotAsked',
  /** Another resource has one of its served names; the older one keeps it. */
  nameConflict: 'NameConflict',
  /** Pinned: every wanted copy stays on the device. */
  pinned: 'Pinned',
  /** Not pinned: copies are still to be loaded or pinned. */
  pinning: 'Pinning',
} as const;

/** Reasons of AdapterRoute's condition Ready. */
export const adapterRouteReasons = {
  targetsReady: 'TargetsReady',
  /** A target that exists is not resident. */
  targetNotReady: 'TargetNotReady',
  /** Too few copies of a target are in memory. */
  targetWarming: 'TargetWarming',
  /** A target was too bad and lost its share; the message has what was measured. */
  targetAborted: 'TargetAborted',
  /** There is no such LoraAdapter or BaseModel. */
  targetNotFound: 'TargetNotFound',
  nameConflict: 'NameConflict',
} as const;

/** Reasons of AdapterGroup's conditions. */
export const adapterGroupReasons = {
  membersReady: 'MembersReady',
  /** No engine holds a member that exists, or none holds all of them. */
  memberNotReady: 'MemberNotReady',
  /** The selector selects no LoraAdapter of the base model. */
  noMembers: 'NoMembers',
  baseModelNotFound: 'BaseModelNotFound',
  nameConflict: 'NameConflict',
  /** Bounded: a request may compose all members. */
  withinBound: 'WithinBound',
  /** Not bounded: there are more members than a request composes; who may use too many of them is refused. */
  tooManyMembers: 'TooManyMembers',
} as const;

/** Reasons of Tenant's condition Ready. */
export const tenantReasons = {
  keysAccepted: 'KeysAccepted',
  /** There is no such Secret, it has no such entry, or the gateway may not read it. */
  secretNotFound: 'SecretNotFound',
  /** A key is shorter than 16 or longer than 512 characters, or has others than printable ASCII in it. */
  keyInvalid: 'KeyInvalid',
  /** Another, older tenant has the same key. */
  keyTaken: 'KeyTaken',
  /** Every key is accepted, and so are tokens by spec.oidc. */
  tokensAccepted: 'TokensAccepted',
  /** The gateway has no issuer of tokens, and spec.oidc names none. */
  issuerMissing: 'IssuerMissing',
  /** Every token of this tenant is also one of another, so that it is refused. */
  tokensAmbiguous: 'TokensAmbiguous',
} as const;

/** An entry of status.conditions. */
export interface Condition {
  type: string;
  status: 'True' | 'False' | 'Unknown';
  reason: string;
  message: string;
  /** RFC 3339. */
  lastTransitionTime: string;
  observedGeneration?: number;
}

export function servedNameOf({
  spec,
  metadata,
}: {
  spec: { servedName?: string };
  metadata: BaseModel['metadata'];
}): string {
  return spec.servedName ?? metadata.name!;
}

export function servedNamesOf({ spec, metadata }: LoraAdapter): string[] {
  return spec.servedNames ?? [metadata.name!];
}
