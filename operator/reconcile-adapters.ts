/**
 * One pass for all LoraAdapters of a base model: ask its engines, decide who should hold what, begin the loads and unloads
 * that are missing, write what is. Engines tell nobody when they change, so a pass comes back soon; one that finds the
 * world as it should be writes nothing.
 */
import { isMember } from '../crds/label-selector.ts';
import { loraAdapterReasons } from '../crds/names.ts';
import type { BaseModel, LoraAdapter, LoraAdapterStatus } from '../crds/types.ts';
import type { LoadSource } from './adapter-loads.ts';
import { isResident, planSteps, type WantedAdapter } from './adapter-plan.ts';
import { adapterStatus } from './adapter-status.ts';
import type { Parts, ReconcileResult } from './cluster.ts';
import { conditionOf } from './conditions.ts';
import { claimOf } from './engine-client.ts';
import { type Engine, type EngineMemory, type Look, lifeOf } from './engines.ts';
import { namesOf, sayTaken, takenNames } from './names.ts';
import { isWanted } from './on-demand.ts';
import { inParallel } from './parallel.ts';
import { type PlacementAdapter, place } from './placement.ts';

/** Of an arena, what stays for KV when adapters come: an engine full of adapters could serve none of them. */
const kvReserveShare = 0.25;
/** Of an arena, what an adapter is taken to need when no adapter of the base model has been loaded yet. */
const firstGuessShare = 1 / 64;
/** All calls are taken and others end soon. */
const fullRetryMs = 1_000;
const statusWritesAtOnce = 8;

/** A LoraAdapter, and what the pass found out about it. */
interface Found {
  adapter: LoraAdapter;
  before: LoraAdapterStatus | undefined;
  source: LoadSource;
  /** Served names that are its own. */
  names: string[];
  missingClaim: string | null;
  /** It is to be loaded now: always, or since somebody asks for it. */
  isWanted: boolean;
  /** Every engine is to hold it, since a group may compose it with others. */
  isComposed: boolean;
  wanted: WantedAdapter;
  bytes: number;
  numDesired: number;
  numWithoutRoom: number;
}

/** @throws as `Cluster.write` */
export async function reconcileAdapters(name: string, parts: Parts): Promise<ReconcileResult> {
  const { cluster, engines: allEngines, clock, config } = parts;
  const baseModel = cluster.baseModels.get(name);
  const adapters = cluster.adaptersOf(name).filter(({ metadata }) => !metadata.deletionTimestamp);
  if (baseModel === undefined) {
    allEngines.forget(name);
    cluster.report(name, null);
    const found = adapters.map((adapter) => lookAt(adapter, undefined, parts));
    await report(name, found, { engines: [], silence: null }, null, parts);
    return {};
  }

  const memory = allEngines.memoryOf(name);
  const pods = cluster.podsOf(name);
  const look = await allEngines.look(pods, memory);
  const { engines } = look;
  const found = adapters.map((adapter) => lookAt(adapter, baseModel, parts));
  retain(memory, new Set(pods.map(lifeOf)), found, clock.nowMs());
  learnVersions(found, engines, memory);
  decide(found, engines, memory, clock.nowMs());
  const retryInMs = act(found, engines, memory, parts);
  await report(name, found, look, memory, parts);
  return { requeueAfterMs: Math.min(config.engineCheckSeconds * 1000, retryInMs) };
}

function lookAt(adapter: LoraAdapter, baseModel: BaseModel | undefined, { cluster, clock }: Parts): Found {
  const { metadata, spec } = adapter;
  const claim = claimOf(spec.source.uri);
  const taken = new Set(takenNames(adapter, cluster.nameHolders).map(({ name }) => name));
  const names = namesOf(adapter).filter((name) => !taken.has(name));
  const id = `${metadata.name}/${metadata.uid}`;
  return {
    adapter,
    before: cluster.lastStatus('LoraAdapter', adapter),
    source: {
      adapterUid: metadata.uid!,
      generation: metadata.generation!,
      uri: spec.source.uri,
      digest: spec.source.digest,
    },
    names,
    missingClaim: claim === null || baseModel?.spec.adapterClaims?.includes(claim) ? null : claim,
    isWanted: isWanted(adapter, clock.date()),
    isComposed: cluster.adapterGroups.list().some((group) => isMember(group, adapter)),
    wanted: { id, names, digest: null, pods: [], isPinned: spec.pin },
    bytes: 0,
    numDesired: 0,
    numWithoutRoom: 0,
  };
}

function retain(
  { loads, versions, heat }: EngineMemory,
  lives: ReadonlySet<string>,
  found: readonly Found[],
  nowMs: number,
): void {
  const uids = new Set(found.map(({ source }) => source.adapterUid));
  loads.retain(lives, uids);
  versions.retain(uids);
  heat.retain(lives, nowMs);
}

/** What loads brought since the last pass says which versions are wanted. */
function learnVersions(found: readonly Found[], engines: readonly Engine[], memory: EngineMemory): void {
  const { loads, versions } = memory;
  for (const one of found) {
    const { adapter, before, source, names } = one;
    const loaded = engines
      .flatMap((engine) => names.map((name) => ({ engine, name, load: loads.lastLoad(engine, name) })))
      .filter(({ engine, load }) => load && engine.isFresh && load.atMs < engine.askedAtMs)
      .filter(({ load }) => load!.source.adapterUid === source.adapterUid && load!.source.uri === source.uri)
      .sort((a, b) => a.load!.atMs - b.load!.atMs);
    for (const { engine, name, load } of loaded) {
      const digest = engine.names.get(name);
      if (digest === undefined || versions.learn(adapter, digest, load!.atMs)) continue;
      const wanted = versions.wanted(adapter, before);
      const message = `${engine.pod} finds ${digest} at ${source.uri}, where other engines found ${wanted} later`;
      loads.reject(engine, name, source, message);
    }
    one.wanted.digest = versions.wanted(adapter, before);
  }
}

/** Chooses the engines of each adapter. */
function decide(found: Found[], engines: readonly Engine[], memory: EngineMemory, nowMs: number): void {
  const sizes = new Map(
    engines.flatMap(({ adapters }) => adapters.map(({ digest, bytes }) => [digest, bytes])),
  );
  const guess = median([...sizes.values()]) ?? (engines[0]?.arena.totalBytes ?? 0) * firstGuessShare;
  // One whose names are all somebody else's cannot be loaded at all.
  const placed = found.filter(({ names, isWanted }) => names.length > 0 && isWanted);
  for (const one of placed) {
    const { digest } = one.wanted;
    const known = digest === null ? undefined : (sizes.get(digest) ?? knownBytes(one.before, digest));
    one.bytes = Math.max(1, Math.round(known ?? guess));
  }
  const placement = place(
    placed.map((one): PlacementAdapter => {
      const { digest, id } = one.wanted;
      const { copies } = one.adapter.spec;
      return {
        id,
        copies: typeof copies === 'number' && !one.isComposed ? copies : 'all',
        bytes: one.bytes,
        heat: digest === null ? 0 : memory.heat.of(digest, nowMs),
        avoid: memory.loads.podsWithoutRoom(one.source),
      };
    }),
    // What the device arena has no room for waits in the host arena until it is asked for.
    engines.map(({ pod, arena, hostArena }) => ({
      id: pod,
      totalBytes: arena.totalBytes + hostArena.totalBytes,
      budgetBytes: arena.totalBytes * (1 - kvReserveShare) + hostArena.totalBytes,
    })),
    new Map(placed.map((one) => [one.wanted.id, podsNow(one, engines, memory)])),
  );
  for (const one of placed) {
    one.numWithoutRoom = placement.withoutRoom.get(one.wanted.id) ?? 0;
    one.wanted.pods = placement.holders.get(one.wanted.id)!;
    one.numDesired = one.wanted.pods.length + one.numWithoutRoom;
  }
}

/** Where it is, comes to be, or would be had it not failed. */
function podsNow({ source, names }: Found, engines: readonly Engine[], { loads }: EngineMemory): Set<string> {
  const holding = engines.filter((engine) => names.some((name) => engine.names.has(name)));
  return new Set([...holding.map(({ pod }) => pod), ...loads.podsInvolved(source)]);
}

/** Begins what is to be done. @returns when to look again at the latest */
function act(
  found: readonly Found[],
  engines: readonly Engine[],
  { loads }: EngineMemory,
  parts: Parts,
): number {
  const { cluster, clock } = parts;
  const sources = new Map(found.map(({ wanted, source }) => [wanted.id, source]));
  const byPod = new Map(engines.map((engine) => [engine.pod, engine]));
  // What is not wanted now is not in the list, so it goes from wherever it is.
  const wanted = found
    .filter((one) => one.isWanted)
    .map((one) => (one.missingClaim === null ? one.wanted : { ...one.wanted, pods: [] }));
  let isFull = false;
  for (const step of planSteps(
    wanted,
    engines.filter(({ isFresh }) => isFresh),
  )) {
    cluster.assertLeader();
    const engine = byPod.get(step.pod)!;
    const source = step.do === 'unload' ? null : sources.get(step.adapterId)!;
    const start = loads.start(engine, step, source, engine.askedAtMs);
    if (start === 'full') isFull = true;
  }
  const retryAtMs = loads.nextRetryAtMs() ?? Number.POSITIVE_INFINITY;
  return Math.min(retryAtMs - clock.nowMs(), isFull ? fullRetryMs : Number.POSITIVE_INFINITY);
}

/** Writes what is known about each adapter and about the base model. */
async function report(
  baseModel: string,
  found: readonly Found[],
  look: Look,
  memory: EngineMemory | null,
  parts: Parts,
): Promise<void> {
  const { cluster, metrics } = parts;
  const copies = { ready: 0, wanted: 0 };
  const counts = new Map<string, number>(Object.values(loraAdapterReasons).map((reason) => [reason, 0]));
  const statuses = found.map((one) => {
    const status = statusOf(one, look, memory, parts);
    const { reason } = conditionOf({ status }, 'Ready')!;
    counts.set(reason, counts.get(reason)! + 1);
    copies.wanted += one.numDesired;
    copies.ready += Math.min(status.readyCopies!, one.numDesired);
    return { one, status };
  });

  if (memory !== null) {
    const said = look.engines.map(
      ({ pod, arena, adapters }) => [pod, { ...arena, adapters: adapters.length }] as const,
    );
    cluster.report(baseModel, { engines: new Map(said), copies });
  }
  if (memory === null && found.length === 0) metrics.forgetBaseModel(baseModel);
  else {
    for (const [reason, count] of counts) metrics.adapters.set({ base_model: baseModel, reason }, count);
    metrics.adapterCopies.set({ base_model: baseModel, state: 'ready' }, copies.ready);
    metrics.adapterCopies.set({ base_model: baseModel, state: 'wanted' }, copies.wanted);
  }
  await inParallel(statuses, statusWritesAtOnce, async ({ one, status }) => {
    if (await cluster.writeStatus('LoraAdapter', one.adapter, status)) tellTransition(one, status, parts);
  });
}

function statusOf(
  one: Found,
  { engines, silence }: Look,
  memory: EngineMemory | null,
  { cluster, clock }: Parts,
): LoraAdapterStatus {
  const { adapter, before, source, wanted, names, numWithoutRoom } = one;
  const taken = takenNames(adapter, cluster.nameHolders);
  const isHere = (pod: string) => wanted.pods.includes(pod);
  const failures = memory?.loads.failuresOf(source) ?? [];
  const resident = names.length === 0 ? [] : engines.filter((engine) => isResident(wanted, engine));
  return adapterStatus({
    adapter,
    before,
    baseModelExists: memory !== null,
    nameConflict: taken.length > 0 ? sayTaken(taken) : null,
    missingClaim: one.missingClaim,
    isWanted: one.isWanted,
    names,
    digest: memory === null ? (before?.digest ?? null) : wanted.digest,
    engines,
    silence,
    numDesired: one.numDesired,
    numReady: resident.length,
    numPinned: resident.filter(({ pins }) => pins.get(wanted.digest!) === true).length,
    numWithoutRoom,
    bytes: one.bytes,
    failures: failures.filter(({ pod, reason }) => isHere(pod) || reason === loraAdapterReasons.noRoom),
    now: clock.date(),
  });
}

/** A base model's own events tell of engines that are not ready; that each of its adapters waits for them is no news. */
const untold: string[] = [
  loraAdapterReasons.loading,
  loraAdapterReasons.noEngineReady,
  loraAdapterReasons.notAsked,
];

function tellTransition({ adapter, before }: Found, now: LoraAdapterStatus, { cluster, log }: Parts): void {
  const { reason, message } = conditionOf({ status: now }, 'Ready')!;
  if (before && conditionOf({ status: before }, 'Ready')?.reason === reason) return;
  log.info({ adapter: adapter.metadata.name, baseModel: adapter.spec.baseModel, reason }, message);
  if (untold.includes(reason)) return;
  const type = reason === loraAdapterReasons.resident ? 'Normal' : 'Warning';
  cluster.event(adapter, type, reason, message);
}

function knownBytes(status: LoraAdapterStatus | undefined, digest: string): number | undefined {
  return status?.digest === digest ? status.bytes : undefined;
}

function median(values: number[]): number | undefined {
  return values.toSorted((a, b) => a - b)[values.length >> 1];
}
