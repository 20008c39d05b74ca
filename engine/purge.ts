/**
 * Removes an adapter and everything that was made with it: its names, the sequences on it, its pages in both arenas, KV blocks in
 * every tier, our copy of its files, and the merges that it took part in; then writes zeros over all pages that are free. Nothing of it is left but its source,
 * which is not ours. AdapterSwap asks for such a guarantee (2024, deletion of data that an adapter learnt).
 */
import type { Adapter, AdapterTiers } from './adapters/adapter-tiers.ts';
import type { Merges } from './adapters/merges.ts';
import type { Engine } from './engine.ts';
import { EngineError } from './errors.ts';
import type { Arena } from './ladder/arena.ts';
import type { PurgeReport } from './protocol.ts';
import type { Sources } from './sources.ts';

/** Who keeps KV. */
export interface KvKeeper {
  /** Gives back every page and file of KV that was made with the adapter, and tells their bytes. */
  purge(digest: string): Promise<PurgeReport['kvBytes']>;
}

export interface PurgeParts {
  engine: Engine;
  tiers: AdapterTiers;
  merges: Merges | null;
  arena: Arena;
  hostArena: Arena | null;
  sources: Pick<Sources, 'adapters'>;
  kvKeepers: readonly KvKeeper[];
}

/**
 * @returns what was removed
 * @throws EngineError adapter_not_loaded, when there was nothing of it; what a keeper throws, when all the rest is done
 */
export async function purgeAdapter(parts: PurgeParts, digest: string): Promise<PurgeReport> {
  const { engine, tiers, merges, arena, hostArena, sources, kvKeepers } = parts;
  const ended = new EngineError('adapter_purged', `the adapter ${digest} was removed while this request ran`);
  const endSequences = (adapter: Adapter) => engine.endSequences(adapter, ended);
  const purged = await tiers.purge(digest, endSequences);
  const { names } = purged;
  // Nobody is given one of these from now on. One that has a name is an adapter that somebody prepared, and stays.
  for (const { digest: made, merge, names } of [...tiers.adapters]) {
    if (names.size > 0 || !merge?.members.some((member) => member.digest === digest)) continue;
    const { deviceBytes, hostBytes } = await tiers.purge(made, endSequences);
    purged.deviceBytes += deviceBytes;
    purged.hostBytes += hostBytes;
  }
  await merges?.settle();
  const kvBytes = { device: 0, host: 0, disk: 0 };
  const failures: unknown[] = [];
  for (const keeper of kvKeepers) {
    try {
      const bytes = await keeper.purge(digest);
      for (const tier of ['device', 'host', 'disk'] as const) kvBytes[tier] += bytes[tier];
    } catch (error) {
      failures.push(error);
    }
  }
  const diskBytes = await sources.adapters.purge(digest);
  await arena.clearFree();
  await hostArena?.clearFree();
  if (failures.length > 0) throw failures[0];
  const report: PurgeReport = {
    digest,
    names,
    adapterBytes: { device: purged.deviceBytes, host: purged.hostBytes, disk: diskBytes },
    kvBytes,
  };
  const numBytes = [...Object.values(report.adapterBytes), ...Object.values(kvBytes)].reduce(
    (a, b) => a + b,
    0,
  );
  if (names.length === 0 && numBytes === 0) throw notHere(digest);
  return report;
}

export function notHere(digest: string): EngineError {
  return new EngineError('adapter_not_loaded', `The adapter '${digest}' cannot be found.`, {
    param: 'digest',
  });
}
