import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { asGatewayError, errorBody, errorTable, GatewayError } from '../../gateway/errors.ts';

const folder = import.meta.dirname;
const readme = readFileSync(join(folder, '../../gateway/README.md'), 'utf8');
const otherTests = readdirSync(folder, { recursive: true, encoding: 'utf8' })
  .filter((name) => name.endsWith('.test.ts') && name !== 'errors.test.ts')
  .map((name) => readFileSync(join(folder, name), 'utf8'))
  .join('\n');

test.each(Object.entries(errorTable))('%s is documented with its status', (code, { status }) => {
  expect(readme).toContain(`| \`${code}\` | ${status} |`);
});

test.each(Object.keys(errorTable).filter((code) => code !== 'internal_error'))(
  '%s is reached by a test',
  (code) => {
    expect(otherTests).toContain(`'${code}'`);
  },
);

test('an error has the shape of OpenAI', () => {
  const error = new GatewayError('model_not_found', 'no such model', { param: 'model' });
  expect(errorBody(error)).toEqual({
    error: {
      message: 'no such model',
      type: 'invalid_request_error',
      param: 'model',
      code: 'model_not_found',
    },
  });
});

test('an error that was not foreseen tells nothing of its cause', () => {
  const error = asGatewayError(new TypeError('cannot read /etc/secret'));
  expect(error.code).toBe('internal_error');
  expect(JSON.stringify(errorBody(error))).not.toContain('secret');
});
