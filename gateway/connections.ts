// The connections to engines: each carries one request at a time, and the one that was free last is taken first, so that those beyond
// what is needed close by themselves. A request finds its connection, and a connection its place, without a look at the others: undici's
// own pool asks all of them at every request and every end, which with thousands of streams takes longer than the request.

import { Client } from 'undici';

/** Free connections to one engine at most; others are closed when their answer has ended. */
const maxFree = 256;

export class Connections {
  readonly #options: Client.Options;
  readonly #free = new Map<string, Client[]>();
  readonly #all = new Set<Client>();
  #isDestroyed = false;

  constructor(options: Client.Options) {
    this.#options = options;
  }

  /** For one request; then it is either given back or dropped. */
  take(origin: string): Client {
    return this.#free.get(origin)?.pop() ?? this.#open(origin);
  }

  /** Its answer has ended. */
  give(origin: string, client: Client): void {
    const free = this.#free.get(origin) ?? [];
    if (this.#isDestroyed || free.length >= maxFree) {
      this.drop(client);
      return;
    }
    if (free.length === 0) this.#free.set(origin, free);
    free.push(client);
  }

  /** Its answer did not come to its end. */
  drop(client: Client): void {
    this.#all.delete(client);
    void client.destroy();
  }

  /** Those that carry a request, too. */
  async destroy(): Promise<void> {
    this.#isDestroyed = true;
    this.#free.clear();
    await Promise.all([...this.#all].map((client) => client.destroy()));
    this.#all.clear();
  }

  #open(origin: string): Client {
    const client = new Client(origin, this.#options);
    this.#all.add(client);
    // Nothing was asked for a while, or the engine closed it.
    client.on('disconnect', () => this.#forget(origin, client));
    return client;
  }

  #forget(origin: string, client: Client): void {
    const free = this.#free.get(origin);
    const at = free?.lastIndexOf(client) ?? -1;
    if (at < 0) return;
    free!.splice(at, 1);
    if (free!.length === 0) this.#free.delete(origin);
    this.drop(client);
  }
}
