/**
 * Who answers to a served name. BaseModels, LoraAdapters, AdapterRoutes and AdapterGroups of a namespace share one space of names; the
 * oldest resource that claims a name has it (creationTimestamp, then uid), so that a newcomer never takes what is served.
 */
import { servedNameOf, servedNamesOf } from '../crds/names.ts';
import type { AdapterGroup, AdapterRoute, BaseModel, LoraAdapter } from '../crds/types.ts';

export type Claimant = BaseModel | LoraAdapter | AdapterRoute | AdapterGroup;

/** Served name -> the resource that has it. */
export type NameHolders = ReadonlyMap<string, Claimant>;

export function nameHolders(claimants: readonly Claimant[]): NameHolders {
  const holders = new Map<string, Claimant>();
  for (const claimant of claimants.toSorted(byAge)) {
    for (const name of namesOf(claimant)) if (!holders.has(name)) holders.set(name, claimant);
  }
  return holders;
}

export function namesOf(claimant: Claimant): string[] {
  return claimant.kind === 'LoraAdapter' ? servedNamesOf(claimant) : [servedNameOf(claimant)];
}

/** Names that the claimant asks for and another resource has, with that resource. */
export function takenNames(claimant: Claimant, holders: NameHolders): { name: string; holder: Claimant }[] {
  return namesOf(claimant).flatMap((name) => {
    const holder = holders.get(name);
    return holder === undefined || holder.metadata.uid === claimant.metadata.uid ? [] : [{ name, holder }];
  });
}

/** E.g. `the name sql is LoraAdapter/sql's, which is older`. */
export function sayTaken(taken: readonly { name: string; holder: Claimant }[]): string {
  return taken
    .map(
      ({ name, holder }) =>
        `the name ${name} is that of ${holder.kind} ${holder.metadata.name}, which is older`,
    )
    .join('; ');
}

function byAge(a: Claimant, b: Claimant): number {
  return createdAtMs(a) - createdAtMs(b) || (a.metadata.uid! < b.metadata.uid! ? -1 : 1);
}

/** What comes from the wire is text, whatever the library's type says. */
function createdAtMs({ metadata }: Claimant): number {
  return new Date(metadata.creationTimestamp!).getTime();
}
