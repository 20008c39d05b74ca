// Merges LoRA adapters of one base model and one rank into a new one, by their weights:
//
//   npm run merge -- --method ties --density 0.5 --out FOLDER ADAPTER=WEIGHT ADAPTER=WEIGHT ...
//
// Methods: ties, dare_ties, dare_linear, magnitude_prune, on A and B as PEFT's add_weighted_adapter has them
// (engine/adapters/merge.ts). --density is the share of the values of each adapter that stays (default 0.5), --majority-sign how a
// sign is elected: total (default) or frequency. The same adapters and words give the same bytes. Prints the new digest.

import { parseArgs } from 'node:util';
import { type MergeMember, mergeFolders } from '../engine/adapters/merge-folders.ts';
import { type MergeRule, majoritySigns, maxComposed, mergeMethods } from '../engine/protocol.ts';

try {
  const { members, rule, out } = parse(process.argv.slice(2));
  const { digest } = await mergeFolders(members, rule, out);
  process.stdout.write(`${digest}\n`);
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
  if (positionals.length < 2 || positionals.length > maxComposed)
    throw new Error(
      `expected 2 to ${maxComposed} adapters, each as FOLDER=WEIGHT, got ${positionals.length}`,
    );
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
