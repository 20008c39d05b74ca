import { describe, expect, test } from 'vitest';
import { chooseFiles, safeName } from '../../../engine/sources/remote-files.ts';

const adapter = ['adapter_config.json', 'adapter_model.safetensors'];
const inFolder = (folder: string, names: string[]) => names.map((name) => `${folder}/${name}`);

describe('the one model or adapter of a source', () => {
  test.each([
    ['an adapter at the top', 'adapter', [...adapter, 'README.md'], '', adapter],
    [
      'an adapter at the top beside others',
      'adapter',
      [...adapter, ...inFolder('checkpoint-1', adapter)],
      '',
      adapter,
    ],
    ['an adapter in a folder', 'adapter', inFolder('a/b', adapter), 'a/b/', adapter],
    ['a GGUF file', 'model', ['README.md', 'q4/m.GGUF'], 'q4/', ['m.GGUF']],
    [
      'safetensors and their config',
      'model',
      ['config.json', 'weights.safetensors', 'a.bin', 'x.py'],
      '',
      ['config.json', 'weights.safetensors'],
    ],
    [
      'shards without the same weights beside them',
      'model',
      [
        'config.json',
        'model-1-of-2.safetensors',
        'model-2-of-2.safetensors',
        'consolidated.safetensors',
        'adapter_model.safetensors',
        'chat_template.jinja',
      ],
      '',
      ['chat_template.jinja', 'config.json', 'model-1-of-2.safetensors', 'model-2-of-2.safetensors'],
    ],
    [
      'safetensors rather than a GGUF file',
      'model',
      ['config.json', 'model.safetensors', 'm.gguf'],
      '',
      ['config.json', 'model.safetensors'],
    ],
  ] as const)('is %s', (_name, kind, names, folder, files) => {
    expect(chooseFiles(kind, names, 'x')).toEqual({ folder, names: files });
  });

  test.each([
    [
      'nothing',
      'adapter',
      [],
      'expected one folder with adapter_config.json and adapter_model.safetensors, got no files',
    ],
    [
      'half of an adapter',
      'adapter',
      ['adapter_config.json', 'adapter_model.bin'],
      'got adapter_config.json, adapter_model.bin',
    ],
    [
      'two adapters',
      'adapter',
      [...inFolder('a', adapter), ...inFolder('b', adapter)],
      'got a/, b/; a URI may name the path of one',
    ],
    ['two GGUF files', 'model', ['a.gguf', 'b.gguf', 'README.md'], 'got a.gguf, b.gguf; a URI'],
    ['pickled weights', 'model', ['config.json', 'pytorch_model.bin'], 'got config.json, pytorch_model.bin'],
    ['many files', 'model', ['a', 'b', 'c', 'd', 'e', 'f', 'g'], 'got a, b, c, d, e and 2 more'],
  ] as const)('is refused when it is %s', (_name, kind, names, message) => {
    expect(() => chooseFiles(kind, names, 'hf://o/n')).toThrow(message);
  });
});

test.each([
  ['./a/b', 'a/b'],
  ['/a', 'a'],
  ['a/', 'a'],
  ['../a', null],
  ['a/../b', null],
  ['a//b', null],
  ['a\\b', null],
  ['a\0b', null],
  ['', null],
  ['a'.repeat(256), null],
])('the name %j from afar is the path %j', (name, path) => {
  expect(safeName(name)).toBe(path);
});
