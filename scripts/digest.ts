// Prints the digest of an adapter or a base model, as `spec.source.digest`, `digest` of a load and --model-digest want it:
//
//   npm run digest -- FOLDER|FILE
//
// An adapter is a folder that PEFT wrote: adapter_config.json and adapter_model.safetensors; its digest is also what engines
// report. A base model is a GGUF file, or a folder of safetensors with its config.json. An adapter needs no base model.

import { access } from 'node:fs/promises';
import { join } from 'node:path';
import { digestOfFolder } from '../engine/adapters/adapter-file.ts';
import { digestOfModel } from '../engine/sources.ts';

const [path, ...more] = process.argv.slice(2);
if (path === undefined || more.length > 0) {
  process.stderr.write('usage: npm run digest -- FOLDER|FILE\n');
  process.exit(2);
}
try {
  const hasConfig = await access(join(path, 'config.json')).then(
    () => true,
    () => false,
  );
  const isModel = hasConfig || path.endsWith('.gguf');
  const digest = isModel ? await digestOfModel(path) : await digestOfFolder(path);
  if (digest === null) throw new Error(`${path}: expected a file or a folder, got none`);
  process.stdout.write(`${digest}\n`);
} catch (error) {
  process.stderr.write(`digest: ${(error as Error).message}\n`);
  process.exit(2);
}
