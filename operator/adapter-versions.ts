/**
 * Which version of an adapter is the wanted one. With spec.source.digest that is said. Without it, it is whatever the source
 * holds, and nobody knows before an engine has loaded it: then the first that did tells, and a later load that finds new
 * content makes that the version, which the other engines follow. An engine that finds again what was there before the newest
 * (two nodes with different files at one path) does not turn it back; it disagrees, and is told so.
 */
import type { LoraAdapter, LoraAdapterStatus } from '../crds/types.ts';

interface Version {
  uri: string;
  digest: string;
  /** When it was last loaded. */
  atMs: number;
  /** All digests that this source was found to have. */
  seen: Set<string>;
}

export class AdapterVersions {
  readonly #byUid = new Map<string, Version>();

  /**
   * @param status the last that was written: what an operator before this one had learned
   * @returns null while nobody knows
   */
  wanted({ metadata, spec }: LoraAdapter, status: LoraAdapterStatus | undefined): string | null {
    if (spec.source.digest !== undefined) return spec.source.digest;
    const uid = metadata.uid!;
    const known = this.#byUid.get(uid);
    if (known?.uri === spec.source.uri) return known.digest;
    if (status?.digest === undefined || status.observedGeneration !== metadata.generation) return null;
    this.#set(uid, spec.source.uri, status.digest, Number.NEGATIVE_INFINITY);
    return status.digest;
  }

  /**
   * A load of the adapter's source at `atMs` brought the digest.
   * @returns false when it disagrees with what others found later than it was last seen
   */
  learn({ metadata, spec }: LoraAdapter, digest: string, atMs: number): boolean {
    const { uri, digest: said } = spec.source;
    if (said !== undefined) return said === digest;
    const known = this.#byUid.get(metadata.uid!);
    if (known?.uri !== uri) {
      this.#set(metadata.uid!, uri, digest, atMs);
      return true;
    }
    // An older load has older content, which is loaded anew for that reason.
    if (atMs <= known.atMs) return true;
    if (digest !== known.digest && known.seen.has(digest)) return false;
    known.digest = digest;
    known.atMs = atMs;
    known.seen.add(digest);
    return true;
  }

  retain(uids: ReadonlySet<string>): void {
    for (const uid of [...this.#byUid.keys()]) if (!uids.has(uid)) this.#byUid.delete(uid);
  }

  #set(uid: string, uri: string, digest: string, atMs: number): void {
    this.#byUid.set(uid, { uri, digest, atMs, seen: new Set([digest]) });
  }
}
