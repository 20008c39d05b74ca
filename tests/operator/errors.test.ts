import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { KubeConfig } from '@kubernetes/client-node';
import { expect, test } from 'vitest';
import { ApiError, callApi } from '../../crds/api.ts';
import { errorTable, OperatorError, toOperatorError } from '../../operator/errors.ts';

test('each code is documented', () => {
  const readme = readFileSync(join(import.meta.dirname, '../../operator/README.md'), 'utf8');
  for (const [code, { outcome }] of Object.entries(errorTable))
    expect(readme).toContain(`| \`${code}\` | ${outcome} |`);
});

test.each([
  [new ApiError(500, 'InternalError', 'etcd is away'), 'api_refused'],
  [new ApiError(409, 'Conflict', 'the object was changed'), 'api_conflict'],
  [new TypeError('a bug'), 'internal'],
  [new OperatorError('not_leader', 'not us'), 'not_leader'],
])('%s is %s', (thrown, code) => {
  const error = toOperatorError(thrown);
  expect(error).toMatchObject({ code, message: thrown.message });
});

test('an API server that does not answer is away, and no bug of ours', async () => {
  const kubeConfig = new KubeConfig();
  // Nothing listens on port 1.
  kubeConfig.loadFromClusterAndUser(
    { name: 'c', server: 'https://127.0.0.1:1', skipTLSVerify: false },
    { name: 'u' },
  );
  const thrown = await callApi(kubeConfig, { path: '/api/v1/namespaces/default/pods' }).catch(
    (error) => error,
  );
  expect(toOperatorError(thrown)).toMatchObject({ code: 'api_unreachable', cause: thrown });
});
