// The connections to engines: undici's pools, one for each engine. undici's own Agent counts all of a pool's connections whenever one of
// them closes; when thousands of clients hang up at once, that takes longer than all else together.

import { Dispatcher, errors, Pool } from 'undici';

export class EnginePools extends Dispatcher {
  readonly #options: Pool.Options;
  readonly #pools = new Map<string, Pool>();
  #isDestroyed = false;

  constructor(options: Pool.Options) {
    super();
    this.#options = options;
  }

  /** How many engines have one. */
  get size(): number {
    return this.#pools.size;
  }

  override dispatch(options: Dispatcher.DispatchOptions, handler: Dispatcher.DispatchHandler): boolean {
    if (this.#isDestroyed) throw new errors.ClientDestroyedError('the gateway has ended');
    const origin = String(options.origin);
    return (this.#pools.get(origin) ?? this.#open(origin)).dispatch(options, handler);
  }

  /** Those that carry a request, too: it fails. */
  override async destroy(): Promise<void> {
    this.#isDestroyed = true;
    const all = [...this.#pools.values()];
    this.#pools.clear();
    await Promise.all(all.map((pool) => pool.destroy()));
  }

  /** When an engine is new, those that are gone are forgotten: nothing is asked of them, and no connection is left. */
  #open(origin: string): Pool {
    for (const [other, pool] of this.#pools) {
      const { connected, size } = pool.stats;
      if (connected + size > 0) continue;
      this.#pools.delete(other);
      void pool.close();
    }
    const pool = new Pool(origin, this.#options);
    this.#pools.set(origin, pool);
    return pool;
  }
}
