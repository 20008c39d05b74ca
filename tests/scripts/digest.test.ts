import { execFileSync, spawnSync } from 'node:child_process';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { readAdapterFile } from '../../engine/adapters/adapter-file.ts';
import { readBaseModel } from '../../engine/model/base-model.ts';
import { goldensFolder } from '../fixtures/golden.ts';
import { writeFolder } from '../fixtures/source-files.ts';

const script = join(import.meta.dirname, '../../scripts/digest.ts');

test.each(['llama3', 'qwen2', 'qwen3'])(
  'prints the digest that an engine gives the adapter of %s',
  async (name) => {
    const folder = join(goldensFolder, 'tiny', name);
    const { dims } = await readBaseModel(folder);
    const { digest } = await readAdapterFile(join(folder, 'adapter'), dims, { maxRank: 64 });
    const printed = execFileSync(process.execPath, [script, join(folder, 'adapter')], { encoding: 'utf8' });
    expect(printed).toBe(`${digest}\n`);
  },
);

test('prints what sha256sum does of a GGUF file, and of the files that a folder of safetensors is read from', async () => {
  const files = {
    'config.json': '{}',
    'model.safetensors': 'weights',
    'README.md': 'x',
    'tiny.gguf': 'gguf',
  };
  const folder = await writeFolder(files);
  const print = (path: string) => execFileSync(process.execPath, [script, path], { encoding: 'utf8' }).trim();
  const sha256sum = (command: string) =>
    `sha256:${execFileSync('bash', ['-c', command], { cwd: folder, encoding: 'utf8' }).slice(0, 64)}`;
  expect(print(join(folder, 'tiny.gguf'))).toBe(sha256sum('sha256sum tiny.gguf'));
  expect(print(folder)).toBe(sha256sum('sha256sum config.json model.safetensors | sha256sum'));
});

test.each([
  [[], 'usage: npm run digest -- FOLDER|FILE\n'],
  [['a', 'b'], 'usage: npm run digest -- FOLDER|FILE\n'],
  [['/none'], 'digest: /none/adapter_config.json: expected a readable file, got ENOENT\n'],
])('refuses %j in one line', (args, message) => {
  const { status, stderr, stdout } = spawnSync(process.execPath, [script, ...args], { encoding: 'utf8' });
  expect([status, stderr, stdout]).toEqual([2, message, '']);
});
