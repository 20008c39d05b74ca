// Prints the digest of an adapter, as engines report it and as LoraAdapter's spec.source.digest wants it:
//
//   npm run digest -- FOLDER
//
// FOLDER is what PEFT wrote: adapter_config.json and adapter_model.safetensors. Needs no base model.

import { digestOfFolder } from '../engine/adapters/adapter-file.ts';

const [folder, ...more] = process.argv.slice(2);
if (folder === undefined || more.length > 0) {
  process.stderr.write('usage: npm run digest -- FOLDER\n');
  process.exit(2);
}
try {
  process.stdout.write(`${await digestOfFolder(folder)}\n`);
} catch (error) {
  process.stderr.write(`digest: ${(error as Error).message}\n`);
  process.exit(2);
}
