import { expect, test } from 'vitest';
import { parseLine, splitLines } from '../../../gateway/batches/lines.ts';

async function split(text: string, { chunk = 1000, maxLineBytes = 1000 } = {}) {
  async function* chunks() {
    const bytes = Buffer.from(text);
    for (let i = 0; i < bytes.length; i += chunk) yield bytes.subarray(i, i + chunk);
  }
  const lines = await Array.fromAsync(splitLines(chunks(), maxLineBytes));
  return lines.map(({ number, offset, length, bytes }) => [
    number,
    offset,
    length,
    bytes?.toString() ?? null,
  ]);
}

test.each([1, 2, 3, 1000])('lines are found wherever chunks of %i bytes end', async (chunk) => {
  expect(await split('ab\nc\n\n \r\ndéf', { chunk })).toEqual([
    [1, 0, 2, 'ab'],
    [2, 3, 1, 'c'],
    [5, 9, 4, 'déf'],
  ]);
});

test.each([1, 4, 1000])(
  'a line that is too long is not kept, and those around it are (%i)',
  async (chunk) => {
    expect(await split(`ab\n${'x'.repeat(50)}\ncd\n`, { chunk, maxLineBytes: 10 })).toEqual([
      [1, 0, 2, 'ab'],
      [2, 3, 50, null],
      [3, 54, 2, 'cd'],
    ]);
  },
);

test('an empty file has no lines', async () => {
  expect(await split('')).toEqual([]);
  expect(await split('\n\n')).toEqual([]);
});

const good = {
  custom_id: 'one',
  method: 'POST',
  url: '/v1/chat/completions',
  body: { model: 'a', messages: [] },
};
const parse = (value: unknown) =>
  parseLine(Buffer.from(typeof value === 'string' ? value : JSON.stringify(value)), '/v1/chat/completions');

test('a line is a request', () => {
  expect(parse(good)).toEqual({ customId: 'one', model: 'a', body: good.body });
  expect(parse({ ...good, body: { ...good.body, stream: false } })).toHaveProperty('model', 'a');
});

test.each([
  ['invalid_json_line', '{"a": a secret}'],
  ['invalid_json_line', '[]'],
  ['invalid_json_line', `{"body": ${'['.repeat(100_000)}${']'.repeat(100_000)}}`],
  ['invalid_custom_id', { ...good, custom_id: undefined }],
  ['invalid_custom_id', { ...good, custom_id: 7 }],
  ['invalid_custom_id', { ...good, custom_id: 'x'.repeat(513) }],
  ['invalid_method', { ...good, method: 'GET' }],
  ['mismatched_url', { ...good, url: '/v1/completions' }],
  ['invalid_body', { ...good, body: 'text' }],
  ['missing_model', { ...good, body: {} }],
  ['stream_not_supported', { ...good, body: { ...good.body, stream: true } }],
  ['invalid_adapters', { ...good, body: { ...good.body, adapters: [{ name: 'a secret', weight: 0 }] } }],
  ['invalid_adapters', { ...good, body: { ...good.body, adapters: 'a secret' } }],
  ['missing_model', { ...good, body: { model: 7, adapters: [{ name: 'a', weight: 1 }] } }],
])('%s (%#)', (code, value) => {
  expect(parse(value)).toHaveProperty('code', code);
  expect(JSON.stringify(parse(value))).not.toContain('a secret');
});

test('a line may name several adapters, in place of a model', () => {
  const adapters = [
    { name: 'b', weight: 0.5 },
    { name: 'a', weight: -1 },
  ];
  const body = { adapters, messages: [] };
  expect(parse({ ...good, body })).toEqual({ customId: 'one', model: 'b+a', adapters, body });
  expect(parse({ ...good, body: { ...body, model: 'm' } })).toMatchObject({ model: 'm', adapters });
});

test('a line that is not UTF-8 is not JSON', () => {
  expect(parseLine(Buffer.from([0x22, 0xff, 0x22]), '/v1/chat/completions')).toHaveProperty(
    'code',
    'invalid_json_line',
  );
});
