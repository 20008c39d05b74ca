import { hostname } from 'node:os';
import { expect, test } from 'vitest';
import { ConfigError, helpText, parseConfig, settings } from '../../operator/config.ts';

const needed = [
  ...['--namespace', 'motet', '--engine-image', 'motet/engine:1'],
  ...['--trusted-service-accounts', 'motet/motet-gateway,motet/motet-operator'],
];

test('prefers a flag over the environment, and the environment over the default', () => {
  const env = { MOTET_RESYNC_SECONDS: '7', MOTET_PORT: '9', MOTET_LEASE_NAME: '' };
  const { resyncSeconds, port, leaseName } = parseConfig([...needed, '--port', '8'], env);
  expect({ resyncSeconds, port, leaseName }).toEqual({
    resyncSeconds: 7,
    port: 8,
    leaseName: 'motet-operator',
  });
});

test('splits the command of engines at spaces', () => {
  expect(parseConfig(needed, {}).engineCommand).toEqual(['node', '/app/engine/main.ts']);
  expect(parseConfig([...needed, '--engine-command', ' /bin/engine  --a b '], {}).engineCommand).toEqual([
    '/bin/engine',
    '--a',
    'b',
  ]);
});

test('each process is another holder of the lease, named after its pod', () => {
  const [a, b] = [parseConfig(needed, {}), parseConfig(needed, {})];
  expect(a!.identity.startsWith(`${hostname()}_`)).toBe(true);
  expect(a!.identity).not.toBe(b!.identity);
});

test.each([
  ['no image of engines', needed.slice(0, 2), '--engine-image (MOTET_ENGINE_IMAGE)'],
  ['nobody who may call engines', needed.slice(0, 4), '--trusted-service-accounts'],
  [
    'a caller without a namespace',
    [...needed.slice(0, 4), '--trusted-service-accounts', 'gateway'],
    'expected NAMESPACE/NAME',
  ],
  ['a namespace that is none', [...needed, '--namespace', 'My Space'], '--namespace'],
  ['a port out of range', [...needed, '--port', '70000'], '--port'],
  ['a lease that is shorter than its renewal', [...needed, '--lease-seconds', '1'], '--lease-seconds'],
  ['no reconciles at all', [...needed, '--concurrency', '0'], '--concurrency'],
  ['a flag that does not exist', [...needed, '--colour', 'red'], '--colour'],
  ['no namespace outside of a pod', needed.slice(2), '--namespace (MOTET_NAMESPACE): expected a namespace'],
])('refuses %s and names the setting', (_, args, named) => {
  expect(() => parseConfig(args, {})).toThrow(ConfigError);
  expect(() => parseConfig(args, {})).toThrow(named);
});

test('help names every setting, as a flag and as a variable', () => {
  const help = helpText();
  for (const name of Object.keys(settings)) {
    expect(help).toContain(`--${name} `);
    expect(help).toContain(`[MOTET_${name.replaceAll('-', '_').toUpperCase()}]`);
  }
});
