import { writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { describe, expect, test } from 'vitest';
import { readSafetensors } from '../../../engine/model/safetensors.ts';
import { f32Tensor, safetensorsBytes, temporaryFolder } from '../../fixtures/source-files.ts';

async function read(bytes: Uint8Array) {
  const path = join(await temporaryFolder(), 'x.safetensors');
  await writeFile(path, bytes);
  return readSafetensors(path);
}

test('finds each tensor at its place in the file', async () => {
  const tensors = { b: f32Tensor([2, 3]), a: { dtype: 'BF16', shape: [4], bytes: new Uint8Array(8) } };
  const bytes = safetensorsBytes(tensors);
  const file = await read(bytes);
  const dataBegin = bytes.length - 24 - 8;
  expect([...file.tensors.values()]).toEqual([
    { name: 'b', dtype: 'F32', shape: [2, 3], offsetBytes: dataBegin, sizeBytes: 24 },
    { name: 'a', dtype: 'BF16', shape: [4], offsetBytes: dataBegin + 24, sizeBytes: 8 },
  ]);
});

test('reads a scalar, a tensor without elements, and names that look like nothing else', async () => {
  const file = await read(
    safetensorsBytes({
      'quote " colon : \\': f32Tensor([]),
      __proto__x: f32Tensor([0, 5]),
      ключ: f32Tensor([1]),
    }),
  );
  expect([...file.tensors.keys()].sort()).toEqual(['__proto__x', 'quote " colon : \\', 'ключ'].sort());
});

/** One F32 tensor `w` of 2 elements, with the entry changed. */
const withEntry = (entry: object, dataBytes = 8) =>
  safetensorsBytes({}, { header: JSON.stringify({ w: entry }), data: new Uint8Array(dataBytes) });
const entry = { dtype: 'F32', shape: [2], data_offsets: [0, 8] };

const lengthOf = (value: bigint, rest: number) => {
  const bytes = Buffer.alloc(8 + rest);
  bytes.writeBigUInt64LE(value);
  return bytes;
};

describe('refuses by name', () => {
  const hostile: [string, Uint8Array, RegExp][] = [
    ['an empty file', new Uint8Array(), /header length: expected 8 bytes, got a file of 0/],
    [
      'a header beyond the file',
      lengthOf(100n, 20),
      /header length: expected at most the file's other 20 bytes, got 100/,
    ],
    ['a header of 2^64 − 1 bytes', lengthOf(2n ** 64n - 1n, 20), /header length/],
    ['a header that is no JSON', safetensorsBytes({}, { header: '{"w":' }), /header: expected JSON/],
    [
      'a header that is a list',
      safetensorsBytes({}, { header: '[]' }),
      /header: expected a JSON object, got \[\]/,
    ],
    [
      'a tensor twice',
      safetensorsBytes(
        {},
        { header: `{"w":${JSON.stringify(entry)},"w":${JSON.stringify(entry)}}`, data: new Uint8Array(8) },
      ),
      /header: expected each key once, got a repeated key/,
    ],
    [
      'a field twice',
      safetensorsBytes(
        {},
        {
          header: '{"w":{"dtype":"F32","shape":[2],"shape":[2],"data_offsets":[0,8]}}',
          data: new Uint8Array(8),
        },
      ),
      /each key once/,
    ],
    [
      'metadata of numbers',
      safetensorsBytes({}, { header: '{"__metadata__":{"a":1}}' }),
      /__metadata__: expected an object of strings/,
    ],
    [
      'an entry that is null',
      safetensorsBytes({}, { header: '{"w":null}' }),
      /tensor "w": expected an object, got null/,
    ],
    [
      'an unknown dtype',
      withEntry({ ...entry, dtype: 'F33' }),
      /tensor "w" dtype: expected one of BOOL.*got "F33"/,
    ],
    ['a dtype from the prototype', withEntry({ ...entry, dtype: 'constructor' }), /tensor "w" dtype/],
    ['no dtype', withEntry({ shape: [2], data_offsets: [0, 8] }), /tensor "w" dtype: .*got nothing/],
    [
      'a negative size',
      withEntry({ ...entry, shape: [-2] }),
      /tensor "w" shape: expected up to 8 non-negative integers/,
    ],
    ['a fractional size', withEntry({ ...entry, shape: [1.5] }), /tensor "w" shape/],
    [
      'sizes whose product wraps',
      withEntry({ ...entry, shape: [2 ** 40, 2 ** 40] }),
      /tensor "w" data_offsets: expected .* bytes for F32/,
    ],
    ['nine dimensions', withEntry({ ...entry, shape: [1, 1, 1, 1, 1, 1, 1, 1, 2] }), /tensor "w" shape/],
    [
      'one offset',
      withEntry({ ...entry, data_offsets: [0] }),
      /tensor "w" data_offsets: expected \[begin, end\]/,
    ],
    ['offsets as text', withEntry({ ...entry, data_offsets: ['0', '8'] }), /tensor "w" data_offsets/],
    [
      'an end before its begin',
      withEntry({ ...entry, data_offsets: [8, 0] }),
      /tensor "w" data_offsets: expected begin ≤ end ≤ 8/,
    ],
    [
      'an end beyond the data',
      withEntry({ ...entry, data_offsets: [0, 16], shape: [4] }),
      /tensor "w" data_offsets: expected begin ≤ end ≤ 8/,
    ],
    [
      'too few bytes for the shape',
      withEntry({ ...entry, data_offsets: [0, 4] }),
      /tensor "w" data_offsets: expected 8 bytes for F32 \[2\], got 4/,
    ],
    [
      'a gap before a tensor',
      withEntry({ ...entry, data_offsets: [4, 12] }, 12),
      /tensor "w" data_offsets: expected to begin at 0.*got a gap/,
    ],
    [
      'data that no tensor has',
      withEntry(entry, 12),
      /data: expected 8 bytes, the sum of all tensors, got 12/,
    ],
    [
      'tensors that overlap',
      safetensorsBytes(
        {},
        {
          header: JSON.stringify({ v: entry, w: { ...entry, data_offsets: [4, 12] } }),
          data: new Uint8Array(12),
        },
      ),
      /tensor "w" data_offsets: expected to begin at 8.*got an overlap/,
    ],
    ['control characters in a name', withEntry({ ...entry, dtype: '\u001b[2J' }), /got "\\u001b\[2J"/],
  ];
  test.each(hostile)('%s', async (_name, bytes, message) => {
    const error = await read(bytes).then(
      () => null,
      (thrown) => thrown,
    );
    expect(error).toMatchObject({ name: 'InputError', code: 'safetensors_invalid' });
    expect(error.message).toMatch(message);
  });
});

test('names the path of a file that is not there', async () => {
  await expect(readSafetensors('/nowhere/x.safetensors')).rejects.toMatchObject({
    code: 'io_failed',
    message: 'open /nowhere/x.safetensors: expected it to work, got ENOENT',
  });
});
