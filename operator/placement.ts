/**
 * Which engines hold which adapters (pure). The idea, in the order in which the code applies it:
 *
 *   - Every pair of adapter and engine has a score, −w / ln(h), h its hash in (0, 1) and w the engine's budget. An adapter
 *     belongs on the engines that score highest for it, so nobody has to remember who is where, a new engine attracts its
 *     share and no more, and what a lost engine held spreads over all others.
 *     Rendezvous hashing (Thaler & Ravishankar, 1998), weighted as by Schindelhauer & Schomaker (2005).
 *   - An engine whose load would pass a bound over the average takes nothing new; the adapter goes to its next engine.
 *     Bounded loads (Mirrokni, Thorup & Zadimoghaddam, 2018), here for heat and for bytes; bytes have a hard bound besides.
 *   - A copy stays where it is while that is tolerable; only hardship (no room, too hot) drives it away. What is
 *     missing is repaired before anything is rebalanced, and only an engine that has much less than the others attracts
 *     copies from where they are well. So a world that does not change comes to rest, within a few rounds.
 */
import { hash } from 'node:crypto';

export interface PlacementAdapter {
  /** What it is hashed by; must not change while the adapter lives. */
  id: string;
  /** Engines that should hold it; more than there are means all. */
  copies: number | 'all';
  /** Of one copy in the device arena; a larger rank has more. Above 0. */
  bytes: number;
  /** How much it is asked for, over all copies; any unit. Copies share it evenly. */
  heat: number;
  /** Engines that had no room when asked; they get no new copy. */
  avoid?: ReadonlySet<string>;
}

export interface PlacementEngine {
  id: string;
  /** The device arena. Copies that are there may stay within it. */
  totalBytes: number;
  /** What adapters may take of it when they come, the rest being for KV. It is also the engine's weight. */
  budgetBytes: number;
}

/** Adapter id -> ids of engines. */
export type Holders = ReadonlyMap<string, ReadonlySet<string>>;

export interface Placement {
  /** For every adapter, the engines that should hold it, best first. */
  holders: ReadonlyMap<string, readonly string[]>;
  /** Adapters that should be on more engines than have room -> how many copies have no place. */
  withoutRoom: ReadonlyMap<string, number>;
}

/** Over the average: up to `fill` an engine takes new copies, up to `keep` it keeps those it has. */
const slack = { fill: 1.25, keep: 1.5 };
/** Below this share of the average, an engine attracts copies that score higher on it. */
const hungryBelow = 0.75;

/**
 * One round. Feed the result back (as `current`, once it is carried out) until nothing moves: usually at once, a few rounds
 * after a large change.
 *
 * @param current who holds what now; engines that are not in `engines` are ignored
 */
export function place(
  adapters: readonly PlacementAdapter[],
  engines: readonly PlacementEngine[],
  current: Holders,
): Placement {
  const world = survey(adapters, engines);
  const wishes = adapters.map((adapter) => toWish(adapter, engines, current)).sort(hotAndLargeFirst);

  for (const wish of wishes) keep(wish, world);
  const numFilled = wishes.reduce((sum, wish) => sum + fill(wish, world), 0);
  if (numFilled === 0) rebalance(wishes, world);

  return {
    holders: new Map(wishes.map(({ adapter, chosen, ranking }) => [adapter.id, byRank(ranking, chosen)])),
    withoutRoom: new Map(
      wishes
        .map(({ adapter, numCopies, chosen }) => [adapter.id, numCopies - chosen.size] as const)
        .filter(([, missing]) => missing > 0),
    ),
  };
}

/** How strongly the adapter belongs on the engine, above 0. Twice the weight wins twice as often. */
export function score(adapterId: string, engineId: string, weight: number): number {
  const bits = hash('sha256', `${adapterId}\n${engineId}`, 'buffer').readUIntBE(0, 6);
  return -weight / Math.log((bits + 0.5) / 2 ** 48);
}

/** What an engine has been given so far in this round. */
interface Load {
  engine: PlacementEngine;
  bytes: number;
  heat: number;
  /** Its share of all bytes and heat, were they spread by weight. */
  fairBytes: number;
  fairHeat: number;
}

interface Wish {
  adapter: PlacementAdapter;
  numCopies: number;
  /** Of one copy. */
  heat: number;
  /** All engines, the highest score first. */
  ranking: readonly string[];
  current: ReadonlySet<string>;
  chosen: Set<string>;
}

type World = ReadonlyMap<string, Load>;

function survey(adapters: readonly PlacementAdapter[], engines: readonly PlacementEngine[]): World {
  const totalWeight = engines.reduce((sum, { budgetBytes }) => sum + budgetBytes, 0);
  const bytes = adapters.reduce((sum, adapter) => sum + adapter.bytes * numCopiesOf(adapter, engines), 0);
  const heat = adapters.reduce((sum, adapter) => sum + adapter.heat, 0);
  return new Map(
    engines.map((engine) => {
      const share = engine.budgetBytes / totalWeight;
      return [engine.id, { engine, bytes: 0, heat: 0, fairBytes: bytes * share, fairHeat: heat * share }];
    }),
  );
}

function toWish(adapter: PlacementAdapter, engines: readonly PlacementEngine[], current: Holders): Wish {
  const numCopies = numCopiesOf(adapter, engines);
  const scored = engines.map(({ id, budgetBytes }) => ({ id, score: score(adapter.id, id, budgetBytes) }));
  scored.sort((a, b) => b.score - a.score || (a.id < b.id ? -1 : 1));
  const held = current.get(adapter.id) ?? new Set<string>();
  return {
    adapter,
    numCopies,
    heat: numCopies === 0 ? 0 : adapter.heat / numCopies,
    ranking: scored.map(({ id }) => id),
    current: new Set(engines.map(({ id }) => id).filter((id) => held.has(id))),
    chosen: new Set(),
  };
}

/** Copies stay: in the arena of their engine, and unless it is too hot there for the colder ones. */
function keep(wish: Wish, world: World): void {
  for (const id of wish.ranking) {
    if (wish.chosen.size === wish.numCopies) return;
    const load = world.get(id)!;
    const isThere = wish.current.has(id) && load.bytes + wish.adapter.bytes <= load.engine.totalBytes;
    if (isThere && isWithin(load.heat, wish.heat, load.fairHeat, slack.keep)) choose(wish, load);
  }
}

/** Gives copies without a place the best one, with fewer conditions each time. @returns how many came to a new engine */
function fill(wish: Wish, world: World): number {
  let numNew = 0;
  const tryAll = (ranking: readonly string[], mayTake: (load: Load) => boolean) => {
    for (const id of ranking) {
      if (wish.chosen.size === wish.numCopies) return;
      const load = world.get(id)!;
      if (wish.chosen.has(id) || !hasRoom(wish, load) || !mayTake(load)) continue;
      choose(wish, load);
      if (!wish.current.has(id)) numNew++;
    }
  };
  const isCool = (load: Load) => isWithin(load.heat, wish.heat, load.fairHeat, slack.fill);
  tryAll(wish.ranking, (load) => isCool(load) && isLight(wish, load));
  tryAll(wish.ranking, isCool);
  // It is too hot everywhere else, so a copy that was driven away may as well stay.
  tryAll(byRank(wish.ranking, wish.current), () => true);
  tryAll(wish.ranking, () => true);
  return numNew;
}

/** Engines that have much less than others, new ones above all, get the copies that score higher on them. */
function rebalance(wishes: readonly Wish[], world: World): void {
  const hungry = [...world.values()].filter((load) => load.bytes < hungryBelow * load.fairBytes);
  if (hungry.length === 0) return;
  for (const wish of wishes) {
    for (const load of hungry) {
      if (wish.chosen.size === 0 || wish.chosen.has(load.engine.id) || !hasRoom(wish, load)) continue;
      const worst = byRank(wish.ranking, wish.chosen).at(-1)!;
      const isBetter = wish.ranking.indexOf(load.engine.id) < wish.ranking.indexOf(worst);
      // Not beyond its fair share: otherwise the other engine would be the hungry one next.
      const isGain = load.bytes + wish.adapter.bytes <= load.fairBytes;
      if (!isBetter || !isGain || !isWithin(load.heat, wish.heat, load.fairHeat, slack.fill)) continue;
      drop(wish, world.get(worst)!);
      choose(wish, load);
    }
  }
}

/** An engine below its fair share may always take one: the heaviest copy, too, must be somewhere. */
function isWithin(load: number, added: number, fair: number, slack: number): boolean {
  return added === 0 || load < fair || load + added <= slack * fair;
}

function isLight({ adapter }: Wish, load: Load): boolean {
  return isWithin(load.bytes, adapter.bytes, load.fairBytes, slack.fill);
}

function hasRoom({ adapter, current }: Wish, { engine, bytes }: Load): boolean {
  if (current.has(engine.id)) return bytes + adapter.bytes <= engine.totalBytes;
  return bytes + adapter.bytes <= engine.budgetBytes && !adapter.avoid?.has(engine.id);
}

function choose(wish: Wish, load: Load): void {
  wish.chosen.add(load.engine.id);
  load.bytes += wish.adapter.bytes;
  load.heat += wish.heat;
}

function drop(wish: Wish, load: Load): void {
  wish.chosen.delete(load.engine.id);
  load.bytes -= wish.adapter.bytes;
  load.heat -= wish.heat;
}

function numCopiesOf({ copies }: PlacementAdapter, engines: readonly PlacementEngine[]): number {
  return copies === 'all' ? engines.length : Math.min(copies, engines.length);
}

function byRank(ranking: readonly string[], ids: ReadonlySet<string>): string[] {
  return ranking.filter((id) => ids.has(id));
}

/** Hot ones choose first, then large ones, which fit in fewer places. Sizes count in powers of two: a byte is no reason. */
function hotAndLargeFirst(a: Wish, b: Wish): number {
  return (
    b.heat - a.heat ||
    Math.floor(Math.log2(b.adapter.bytes)) - Math.floor(Math.log2(a.adapter.bytes)) ||
    (a.adapter.id < b.adapter.id ? -1 : 1)
  );
}
