// Merges LoRA adapters of one base model and one rank into a new one, by their weights:
//
//   npm run merge -- --method ties --density 0.5 --out FOLDER ADAPTER=WEIGHT ADAPTER=WEIGHT ...
//
// Methods: ties, dare_ties, dare_linear, magnitude_prune, on A and B as PEFT's add_weighted_adapter has them
// (engine/adapters/merge.ts). --density is the share of the values of each adapter that stays (default 0.5), --majority-sign how a
// sign is elected: total (default) or frequency. The same adapters and words give the same bytes. Prints the new digest.

import { parseArgs } from 'node:util';
import { type MergeRule, majoritySigns, mergeMethods } from '../engine/adapters/merge.ts';
import { type MergeMember, mergeFolders } from '../engine/adapters/merge-folders.ts';

/** As many as a request composes. */
const maxMembers = 8;

try {
  const { members, rule, out } = parse(process.argv.slice(2));
  process.stdout.write(`${await mergeFolders(members, rule, out)}\n`);
} catch (error) {
  process.stderr.write(`merge: ${(error as Error).message}\n`);
  process.exit(2);
}

function parse(args: string[]): { members: MergeMember[]; rule: MergeRule; out: string } {
  const { values, positionals } = parseArgs({
    args,
    allowPositionals: true,
    options: {
      method: { type: 'string' },
      density: { type: 'string', default: '0.5' },
      'majority-sign': { type: 'string', default: 'total' },
      out: { type: 'string' },
    },
  });
  if (values.out === undefined) throw new Error('--out: expected the folder to make, got none');
  const density = Number(values.density);
  if (!(density > 0 && density <= 1))
    throw new Error(`--density: expected a number above 0 and at most 1, got ${values.density}`);
  if (positionals.length < 2 || positionals.length > maxMembers)
    throw new Error(`expected 2 to ${maxMembers} adapters, each as FOLDER=WEIGHT, got ${positionals.length}`);
  return {
    members: positionals.map(parseMember),
    rule: {
      method: oneOf(mergeMethods, '--method', values.method),
      density,
      majoritySign: oneOf(majoritySigns, '--majority-sign', values['majority-sign']),
    },
    out: values.out,
  };
}

function parseMember(text: string): MergeMember {
  const at = text.lastIndexOf('=');
  const weight = Number(text.slice(at + 1));
  if (at < 1 || text.length === at + 1 || !Number.isFinite(weight) || weight === 0)
    throw new Error(`${text}: expected FOLDER=WEIGHT with a weight that is not 0`);
  return { folder: text.slice(0, at), weight };
}

function oneOf<T extends string>(words: readonly T[], field: string, given: string | undefined): T {
  const word = words.find((one) => one === given);
  if (word === undefined)
    throw new Error(`${field}: expected one of ${words.join(', ')}, got ${given ?? 'none'}`);
  return word;
}
