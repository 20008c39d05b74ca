import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, test } from 'vitest';
import { EngineError, type ErrorCode, errorBody, errorTable, toEngineError } from '../../engine/errors.ts';

const folder = join(import.meta.dirname, '../../engine');
const readme = readFileSync(join(folder, 'README.md'), 'utf8');
const sources = readdirSync(folder, { recursive: true, encoding: 'utf8' })
  .filter((file) => file.endsWith('.ts') && file !== 'errors.ts')
  .map((file) => readFileSync(join(folder, file), 'utf8'))
  .join('\n');
const codes = Object.keys(errorTable) as ErrorCode[];

describe('every error code', () => {
  test.each(codes)('%s is documented with its status, and used', (code) => {
    expect(readme).toContain(`| \`${code}\` | ${errorTable[code].status} |`);
    const isUsed = code === 'internal' || new RegExp(`['"]${code}['"]`).test(sources);
    expect(isUsed).toBe(true);
  });
});

test('a body carries the nested and the flat keys', () => {
  const fields = { message: 'no', type: 'invalid_request_error', param: 'n', code: 'invalid_value' };
  expect(errorBody(new EngineError('invalid_value', 'no', { param: 'n' }))).toEqual({
    error: fields,
    object: 'error',
    ...fields,
  });
});

test('what is not an engine error becomes internal, and its message stays inside', () => {
  const error = toEngineError(new Error('address 0x1234'));
  expect([error.code, error.status]).toEqual(['internal', 500]);
  expect(error.message).not.toContain('0x1234');
  expect(error.cause).toMatchObject({ message: 'address 0x1234' });
});
