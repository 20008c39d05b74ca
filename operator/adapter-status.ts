/**
 * The status of a LoraAdapter from what is known about it (pure). Nothing in it changes by itself, so that a world that
 * rests needs no write. The checks are an ordered list; the first that has something to say is the reason.
 */
import { conditionTypes, loraAdapterReasons as reasons } from '../crds/names.ts';
import type { LoraAdapter, LoraAdapterStatus } from '../crds/types.ts';
import type { Failure } from './adapter-loads.ts';
import { type Finding, seconds, setCondition, withoutCondition } from './conditions.ts';
import type { Engine } from './engines.ts';

export interface AdapterFacts {
  adapter: LoraAdapter;
  /** The newest status that is known. */
  before: LoraAdapterStatus | undefined;
  baseModelExists: boolean;
  /** Another resource has one of its names: a sentence about it. */
  nameConflict: string | null;
  /** A claim that its source names and the base model does not. */
  missingClaim: string | null;
  /** It is to be loaded now. */
  isWanted: boolean;
  /** Served names that are its own. */
  names: readonly string[];
  /** The wanted version; null while nobody knows it. */
  digest: string | null;
  /** Engines that can be counted on. */
  engines: readonly Engine[];
  /** Why an engine that is ready does not answer; null: all do. */
  silence: string | null;
  /** Engines that should hold it, and that hold the wanted version. */
  numDesired: number;
  numReady: number;
  /** Of these, where it stays on the device. */
  numPinned: number;
  /** Copies that no engine has room for. */
  numWithoutRoom: number;
  /** Of one copy, as known or estimated. */
  bytes: number;
  /** Loads and pins that failed where it should be. */
  failures: readonly Failure[];
  now: Date;
}

type Verdict = Pick<Finding, 'status' | 'reason' | 'message'>;

export function adapterStatus(facts: AdapterFacts): LoraAdapterStatus {
  const { adapter, before, digest, numDesired, numReady, now } = facts;
  const { generation } = adapter.metadata;
  const placements = placementsOf(facts);
  const finding = (type: string, verdict: Verdict): Finding => ({
    type,
    ...verdict,
    observedGeneration: generation!,
  });
  const ready = setCondition(before?.conditions, finding(conditionTypes.ready, isServed(facts)), now);
  return {
    observedGeneration: generation!,
    ...(digest !== null && { digest, ...contentOf(digest, facts) }),
    desiredCopies: numDesired,
    readyCopies: numReady,
    copies: `${Math.min(numReady, numDesired)}/${numDesired}`,
    ...(placements.length > 0 && { tier: lowestTier(placements) }),
    placements,
    conditions: adapter.spec.pin
      ? setCondition(ready, finding(conditionTypes.pinned, isPinned(facts)), now)
      : withoutCondition(ready, conditionTypes.pinned),
  };
}

function isServed(facts: AdapterFacts): Verdict {
  const { adapter, numDesired, numReady, numWithoutRoom } = facts;
  const failures = facts.failures.filter(({ call }) => call === 'load');
  const { baseModel } = adapter.spec;
  const no = (reason: string, message: string): Verdict => ({ status: 'False', reason, message });

  if (facts.nameConflict !== null) {
    return no(
      reasons.nameConflict,
      `${facts.nameConflict}. Take another name, or delete the other resource.`,
    );
  }
  if (!facts.baseModelExists) {
    return no(
      reasons.baseModelNotFound,
      `There is no BaseModel ${baseModel} in this namespace. Create it, or delete this adapter: its baseModel cannot be changed.`,
    );
  }
  if (facts.missingClaim !== null) {
    return no(
      reasons.claimNotMounted,
      `Engines of BaseModel ${baseModel} do not mount the claim ${facts.missingClaim}. Add it to its spec.adapterClaims.`,
    );
  }
  if (!facts.isWanted) {
    return no(reasons.notAsked, 'Nobody asked for it lately. It is loaded when somebody does.');
  }
  if (numDesired === 0 && facts.silence !== null) {
    return no(
      reasons.noEngineReady,
      `No engine of BaseModel ${baseModel} answers the operator. ${facts.silence}`,
    );
  }
  if (numDesired === 0) {
    return no(
      reasons.noEngineReady,
      `No engine of BaseModel ${baseModel} is ready; its conditions say why. The adapter is loaded as soon as one is.`,
    );
  }
  const have = `${Math.min(numReady, numDesired)} of ${numDesired} copies are resident`;
  if (numReady >= numDesired) return { status: 'True', reason: reasons.resident, message: have };

  // What somebody must change comes first, then what passes.
  for (const reason of [reasons.refused, reasons.digestMismatch, reasons.sourceUnavailable]) {
    const failure = failures.find((one) => one.reason === reason);
    if (failure) return no(reason, failure.message);
  }
  if (numWithoutRoom > 0) return no(reasons.noRoom, sayNoRoom(facts));
  const trouble = failures.find(({ reason }) => reason !== reasons.noRoom);
  return no(reasons.loading, trouble ? `${have}; ${trouble.pod}: ${trouble.message}` : have);
}

function isPinned({ adapter, numDesired, numPinned, failures }: AdapterFacts): Verdict {
  const have = `${Math.min(numPinned, numDesired)} of ${numDesired} copies stay on the device`;
  if (numDesired > 0 && numPinned >= numDesired) {
    return { status: 'True', reason: reasons.pinned, message: have };
  }
  const no = (reason: string, message: string): Verdict => ({ status: 'False', reason, message });
  const pins = failures.filter(({ call }) => call === 'pin');
  const refusal = pins.find(({ reason }) => reason === reasons.noRoom);
  if (refusal) {
    return no(
      reasons.noRoom,
      `${have}; ${refusal.pod}: ${refusal.message}. Unpin others of BaseModel ${adapter.spec.baseModel}, add replicas, or raise its memory.device.`,
    );
  }
  const [trouble] = pins;
  return no(reasons.pinning, trouble ? `${have}; ${trouble.pod}: ${trouble.message}` : have);
}

function sayNoRoom({ adapter, numWithoutRoom, numDesired, bytes, failures }: AdapterFacts): string {
  const said = failures.find(({ call, reason }) => call === 'load' && reason === reasons.noRoom);
  const start = `No engine has room for ${numWithoutRoom} of ${numDesired} copies`;
  const why = said ? `: ${said.message}` : `, of about ${bytes} bytes each`;
  return `${start}${why}. Add replicas to BaseModel ${adapter.spec.baseModel}, raise its memory.device, or delete adapters.`;
}

/** What the engines say about the content; what was last known, while nobody has it. */
function contentOf(digest: string, { engines, before }: AdapterFacts): Partial<LoraAdapterStatus> {
  const held = engines.flatMap(({ adapters }) => adapters).find((one) => one.digest === digest);
  const { rank, kind, modules, bytes } = held ?? (before?.digest === digest ? before : {});
  return {
    ...(rank !== undefined && { rank }),
    ...(kind !== undefined && { kind }),
    ...(modules !== undefined && { modules }),
    ...(bytes !== undefined && { bytes }),
  };
}

type Placements = NonNullable<LoraAdapterStatus['placements']>;

/** Where it is served from, in whatever version. */
function placementsOf({ engines, names, digest }: AdapterFacts): Placements {
  return engines.flatMap((engine) => {
    const digests = names.map((name) => engine.names.get(name)).filter((one) => one !== undefined);
    // While names change over one by one, it is the old version that some still get.
    const served = digests.find((one) => one !== digest) ?? digests[0];
    const content = engine.adapters.find((one) => one.digest === served);
    if (content === undefined) return [];
    const since = seconds(new Date(content.since * 1000));
    const { pinned } = content;
    const where = { pod: engine.pod, tier: content.tier, since, digest: content.digest };
    return [{ ...where, ...(pinned !== undefined && { pinned }) }];
  });
}

function lowestTier(placements: Placements): string {
  return ['disk', 'host', 'device'].find((tier) => placements.some((one) => one.tier === tier))!;
}
