/**
 * What has to be done on the engines of a base model so that each holds what it should (pure): every step with its
 * reason, in the order in which to begin them. It is made anew from what engines say each time, so a step that is lost
 * with an operator, an engine or a connection comes again, and a name that no resource wants any more goes wherever it is.
 *
 *   - A move is a load first and an unload after it: a copy goes from where it should not be once every copy is resident
 *     where it should be.
 *   - Another version is loaded in place: the engine points the name at it when it is there, and the old one ends with
 *     its last request.
 *   - Pins are set on what is there, so that an adapter is served although an engine refuses to pin it. An engine pins
 *     content and not names, so of several adapters with the same content one that wants a pin is enough.
 */
export interface WantedAdapter {
  id: string;
  /** Served names that are its own; names that another resource has are left out. */
  names: readonly string[];
  /** The version; null while nobody knows what is at its source. */
  digest: string | null;
  /** Pods that should hold it. */
  pods: readonly string[];
  /** Every copy stays on the device. */
  isPinned: boolean;
}

export interface EngineNames {
  pod: string;
  /** Served name -> digest. */
  names: ReadonlyMap<string, string>;
  /** Digest -> whether it stays on the device; others cannot be pinned. */
  pins: ReadonlyMap<string, boolean>;
}

export type LoadReason = 'missing' | 'another version' | 'unknown version';
export type PinReason = 'to be pinned' | 'not to be pinned';
export type UnloadReason = 'nobody wants it' | 'moved';

export type Step =
  | { do: 'load'; pod: string; name: string; adapterId: string; reason: LoadReason }
  | {
      do: 'pin';
      pod: string;
      name: string;
      adapterId: string;
      reason: PinReason;
      digest: string;
      isPinned: boolean;
    }
  | { do: 'unload'; pod: string; name: string; reason: UnloadReason };

/**
 * @param engines those that answered just now; about others nothing is known and so nothing is done
 */
export function planSteps(wanted: readonly WantedAdapter[], engines: readonly EngineNames[]): Step[] {
  const byPod = new Map(engines.map((engine) => [engine.pod, engine]));
  const loads = wanted.map((adapter) => planLoads(adapter, byPod));
  return [
    // They make room for what comes.
    ...planUnwanted(wanted, engines),
    ...wanted.flatMap((adapter) => planMoved(adapter, engines, byPod)),
    // First copies before second ones: an adapter that is nowhere cannot be used at all.
    ...loads
      .flat()
      .sort((a, b) => a.rank - b.rank)
      .map(({ step }) => step),
    ...engines.flatMap((engine) => planPins(wanted, engine)),
  ];
}

/** Whether the engine has the wanted version under each of the adapter's names. */
export function isResident(
  { names, digest }: Pick<WantedAdapter, 'names' | 'digest'>,
  engine: Pick<EngineNames, 'names'>,
): boolean {
  return digest !== null && names.every((name) => engine.names.get(name) === digest);
}

function planLoads(
  adapter: WantedAdapter,
  byPod: ReadonlyMap<string, EngineNames>,
): { rank: number; step: Step }[] {
  const engines = adapter.pods.map((pod) => byPod.get(pod)).filter((engine) => engine !== undefined);
  const numResident = engines.filter((engine) => isResident(adapter, engine)).length;
  return engines
    .filter((engine) => !isResident(adapter, engine))
    .flatMap((engine, index) =>
      adapter.names
        .map((name) => ({ name, reason: reasonToLoad(adapter, engine.names.get(name)) }))
        .filter((load) => load.reason !== null)
        .map(({ name, reason }) => ({
          rank: numResident + index,
          step: { do: 'load', pod: engine.pod, name, adapterId: adapter.id, reason: reason! },
        })),
    );
}

function reasonToLoad({ digest }: WantedAdapter, held: string | undefined): LoadReason | null {
  if (held === undefined) return 'missing';
  if (digest === null) return 'unknown version';
  return held === digest ? null : 'another version';
}

function planPins(wanted: readonly WantedAdapter[], engine: EngineNames): Step[] {
  /** Digest -> who speaks for it. */
  const speakers = new Map<string, WantedAdapter>();
  for (const adapter of wanted) {
    if (!isResident(adapter, engine)) continue;
    if (adapter.isPinned || !speakers.has(adapter.digest!)) speakers.set(adapter.digest!, adapter);
  }
  return [...speakers]
    .filter(([digest, { isPinned }]) => engine.pins.get(digest) === !isPinned)
    .map(([digest, { id, names, isPinned }]) => ({
      do: 'pin',
      pod: engine.pod,
      name: names[0]!,
      adapterId: id,
      reason: isPinned ? 'to be pinned' : 'not to be pinned',
      digest,
      isPinned,
    }));
}

function planMoved(
  adapter: WantedAdapter,
  engines: readonly EngineNames[],
  byPod: ReadonlyMap<string, EngineNames>,
): Step[] {
  const isThere = (pod: string) => {
    const engine = byPod.get(pod);
    return engine !== undefined && isResident(adapter, engine);
  };
  // Without a place it stays where it is: served from the wrong engine is better than not served.
  if (adapter.pods.length === 0 || !adapter.pods.every(isThere)) return [];
  return engines
    .filter(({ pod }) => !adapter.pods.includes(pod))
    .flatMap(({ pod, names }) =>
      adapter.names
        .filter((name) => names.has(name))
        .map((name) => ({ do: 'unload', pod, name, reason: 'moved' }) as const),
    );
}

function planUnwanted(wanted: readonly WantedAdapter[], engines: readonly EngineNames[]): Step[] {
  const names = new Set(wanted.flatMap((adapter) => adapter.names));
  return engines.flatMap((engine) =>
    [...engine.names.keys()]
      .filter((name) => !names.has(name))
      .map((name) => ({ do: 'unload', pod: engine.pod, name, reason: 'nobody wants it' }) as const),
  );
}
