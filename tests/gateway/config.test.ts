import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { expect, onTestFinished, test } from 'vitest';
import {
  ConfigError,
  helpText,
  parseApiKeys,
  parseConfig,
  parseLimits,
  settings,
} from '../../gateway/config.ts';
import type { Limits } from '../../gateway/quota/limits.ts';

const engine = ['--engine', 'http://127.0.0.1:9000'];

test('takes engines from flags, and from a comma list in the environment', () => {
  const urls = ['http://a:1', 'http://b:2'];
  expect(parseConfig(['--engine', 'http://a:1', '--engine', 'http://b:2/'], {}).engineUrls).toEqual(urls);
  expect(parseConfig([], { MOTET_ENGINES: 'http://a:1, http://b:2' }).engineUrls).toEqual(urls);
});

test('an engine given twice counts once', () => {
  const twice = ['http://a:80', 'http://A/', 'http://a//'].flatMap((url) => ['--engine', url]);
  expect(parseConfig(twice, {}).engineUrls).toEqual(['http://a']);
});

test('prefers a flag over the environment, and the environment over the default', () => {
  const env = { MOTET_MAX_QUEUED: '7', MOTET_PORT: '9' };
  const { maxQueued, port, host } = parseConfig([...engine, '--port', '8'], env);
  expect({ maxQueued, port, host }).toEqual({ maxQueued: 7, port: 8, host: '127.0.0.1' });
});

test.each([
  ['no engine', [], 'MOTET_ENGINES'],
  ['an engine that is no URL', ['--engine', 'somewhere'], '--engine 0'],
  ['an engine with credentials', ['--engine', 'http://me:secret@a:1'], 'without credentials'],
  ['an engine with a query', ['--engine', 'http://a:1/?b'], 'without ?'],
  ['a port out of range', [...engine, '--port', '70000'], '--port'],
  ['a limit that is no number', [...engine, '--max-queued', 'many'], '--max-queued'],
  ['an issuer without TLS', [...engine, '--oidc-issuer', 'http://example.org'], '--oidc-issuer'],
  ['an issuer without an audience', [...engine, '--oidc-issuer', 'https://example.org'], '--oidc-audience'],
  ['a flag that does not exist', [...engine, '--colour', 'red'], '--colour'],
])('refuses %s and names the setting', (_, args, named) => {
  expect(() => parseConfig(args, {})).toThrow(ConfigError);
  expect(() => parseConfig(args, {})).toThrow(named);
});

test.each(['0.0.0.0', '::', '10.0.0.1', 'example.org'])('refuses to listen on %s without keys', (host) => {
  expect(() => parseConfig([...engine, '--host', host], {})).toThrow('no API keys are configured');
  expect(parseConfig([...engine, '--host', host, '--insecure'], {}).host).toBe(host);
});

test('listens anywhere with tokens', () => {
  const tokens = ['--oidc-issuer', 'https://example.org', '--oidc-audience', 'motet'];
  expect(parseConfig([...engine, '--host', '0.0.0.0', ...tokens], {}).oidc).toEqual({
    issuer: 'https://example.org',
    audience: 'motet',
    tenantClaim: 'sub',
  });
});

test('listens anywhere with keys', () => {
  const folder = mkdtempSync(join(tmpdir(), 'motet-'));
  onTestFinished(() => rmSync(folder, { recursive: true }));
  const file = join(folder, 'keys');
  writeFileSync(file, 'team-a key-0123456789abcdef\n');
  const { apiKeys } = parseConfig([...engine, '--host', '0.0.0.0', '--api-keys-file', file], {});
  expect(apiKeys).toEqual(new Map([['team-a', 'key-0123456789abcdef']]));
});

test('reads keys line by line and leaves out comments', () => {
  const keys = parseApiKeys('# teams\n\n  a  0123456789abcdef \nb\tfedcba9876543210\n', 'keys');
  expect([...keys.keys()]).toEqual(['a', 'b']);
});

test.each([
  ['a key without a name', '0123456789abcdef', 'line 1: expected NAME KEY'],
  ['a short key', 'a short', 'shorter than 16'],
  ['a name used twice', 'a 0123456789abcdef\na fedcba9876543210', 'line 2'],
  ['an empty file', '', 'at least one'],
])('refuses %s in the keys file without showing a key', (_, text, message) => {
  expect(() => parseApiKeys(text, 'keys')).toThrow(message);
  expect(() => parseApiKeys(text, 'keys')).not.toThrow('fedcba9876543210');
});

test('reads limits by name of a key, as YAML or JSON', () => {
  const keys = new Map([['team-a', 'key-0123456789abcdef']]);
  const limits = { requestsPerMinute: 60, tokensPerMinute: 9000, concurrency: 4 };
  const text = `# who may use how much\nteam-a: ${JSON.stringify(limits)}\n'*':\n  concurrency: 1\n`;
  expect(parseLimits(text, 'limits', keys)).toEqual(
    new Map<string, Limits>([
      ['team-a', limits],
      ['*', { concurrency: 1 }],
    ]),
  );
});

test.each([
  ['a name without a key', 'team-b: { concurrency: 1 }', 'team-b: expected the name of an API key'],
  ['a limit of nothing', 'team-a: { concurrency: 0 }', 'team-a.concurrency'],
  ['a limit that is not known', 'team-a: { perHour: 1 }', 'perHour'],
  ['text that is neither', 'team-a: {', 'expected YAML or JSON'],
])('refuses %s in the limits file', (_, text, message) => {
  const keys = new Map([['team-a', 'key-0123456789abcdef']]);
  expect(() => parseLimits(text, 'limits', keys)).toThrow(ConfigError);
  expect(() => parseLimits(text, 'limits', keys)).toThrow(message);
});

test('refuses limits without keys that they are of', () => {
  expect(() => parseConfig([...engine, '--limits-file', '/nowhere'], {})).toThrow(
    '--api-keys-file beside it',
  );
});

test('takes a Redis, and refuses a password where many read it', () => {
  const at = (url: string, ...more: string[]) => parseConfig([...engine, '--redis-url', url, ...more], {});
  const redis = { url: 'redis://localhost', password: null, ca: null, timeoutMs: 100 };
  expect(at('redis://localhost').redis).toEqual(redis);
  expect(() => at('redis://u:secret@localhost')).toThrow('use --redis-password-file');
  expect(() => at('http://localhost')).toThrow('--redis-url');
  expect(() => at('redis://localhost', '--redis-ca-file', '/nowhere')).toThrow('rediss://');
  expect(() => parseConfig([...engine, '--redis-password-file', '/nowhere'], {})).toThrow('--redis-url');
});

const cluster = ['--kubernetes', '--namespace', 'motet'];

test('takes a namespace of a cluster in place of engines, and listens anywhere without keys of its own', () => {
  const env = { MOTET_KUBERNETES: 'true', MOTET_NAMESPACE: 'motet', MOTET_HOST: '0.0.0.0' };
  const expected = { cluster: { namespace: 'motet', kubeconfig: null }, engineUrls: [], isInsecure: false };
  expect(parseConfig([], env)).toMatchObject(expected);
  expect(parseConfig(cluster, {})).toMatchObject(expected);
  expect(parseConfig([...cluster, '--insecure'], {}).isInsecure).toBe(true);
  expect(parseConfig(engine, { MOTET_KUBERNETES: 'false' }).cluster).toBeNull();
});

test.each([
  ['engines', [...cluster, ...engine], '--engine: expected nothing beside --kubernetes'],
  ['a namespace that nobody says', ['--kubernetes'], '--namespace'],
  ['a kubeconfig that is not there', [...cluster, '--kubeconfig', '/nowhere'], '--kubeconfig: cannot read'],
  ['a token file that is not there', [...cluster, '--engine-token-file', '/nowhere'], '--engine-token-file'],
])('in a cluster it refuses %s', (_, args, named) => {
  expect(() => parseConfig(args, {})).toThrow(ConfigError);
  expect(() => parseConfig(args, {})).toThrow(named);
});

test('refuses two files that say who the gateway is', () => {
  const folder = mkdtempSync(join(tmpdir(), 'motet-'));
  onTestFinished(() => rmSync(folder, { recursive: true }));
  const file = join(folder, 'key');
  writeFileSync(file, 'key-0123456789abcdef\n');
  const both = ['--engine-key-file', file, '--engine-token-file', file];
  expect(() => parseConfig([...engine, ...both], {})).toThrow('got both');
  expect(parseConfig([...engine, ...both.slice(2)], {}).engineTokenFile).toBe(file);
});

test('the help names every setting, as a flag and as a variable', () => {
  for (const name of Object.keys(settings)) expect(helpText()).toContain(`--${name} `);
  expect(helpText()).toContain('[MOTET_FIRST_BYTE_TIMEOUT_MS]');
});

test('a tenants file stands alone: keys, limits and a cluster have their own places', () => {
  const folder = mkdtempSync(join(tmpdir(), 'motet-config-'));
  onTestFinished(() => rmSync(folder, { recursive: true }));
  const [tenants, keys] = [join(folder, 'tenants.yaml'), join(folder, 'keys')];
  writeFileSync(tenants, 'tenants: {}');
  writeFileSync(keys, 'a key-0123456789abcdef');
  const given = ['--tenants-file', tenants];
  expect(parseConfig([...engine, ...given, '--host', '0.0.0.0'], {})).toMatchObject({
    tenantsFile: tenants,
    apiKeys: null,
  });
  for (const [more, message] of [
    [['--api-keys-file', keys], '--api-keys-file: expected nothing beside --tenants-file'],
    [['--insecure'], '--insecure: expected nothing beside --tenants-file'],
    [['--limits-file', keys], '--limits-file: expected nothing beside --tenants-file'],
    [['--kubernetes', '--namespace', 'x'], '--engine: expected nothing beside --kubernetes'],
  ] as const) {
    expect(() => parseConfig([...engine, ...given, ...more], {})).toThrow(message);
  }
  const inCluster = ['--kubernetes', '--namespace', 'x', ...given];
  expect(() => parseConfig(inCluster, {})).toThrow('--tenants-file: expected nothing beside --kubernetes');
  expect(() => parseConfig([...engine, '--tenants-file', join(folder, 'none')], {})).toThrow(
    '--tenants-file: cannot read',
  );
});
