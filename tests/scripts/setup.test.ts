import { spawnSync } from 'node:child_process';
import { join } from 'node:path';
import { expect, test } from 'vitest';

const script = join(import.meta.dirname, '../../scripts/setup.sh');

test('says which folder it needs when that cannot be written', () => {
  const { status, stderr } = spawnSync('bash', [script, '--native-only'], {
    env: { ...process.env, MOTET_CACHE: '/proc/motet' },
    encoding: 'utf8',
  });
  expect(stderr).toContain('setup: /proc/motet cannot be written; MOTET_CACHE=FOLDER chooses another');
  expect(status).toBe(1);
});

test('refuses an argument that it does not know', () => {
  const { status, stderr } = spawnSync('bash', [script, '--tests'], { encoding: 'utf8' });
  expect(stderr).toContain('unknown argument --tests');
  expect(status).toBe(2);
});
