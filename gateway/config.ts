// Every setting of the gateway, parsed once. A setting is a flag (`--max-body-bytes 1000`) or an environment
// variable (`MOTET_MAX_BODY_BYTES=1000`); the flag wins. A wrong value ends the start with one line that says
// which setting, what was expected and what came.

import { existsSync, readFileSync } from 'node:fs';
import { isIP } from 'node:net';
import { parseArgs } from 'node:util';
import { parse } from 'yaml';
import { z } from 'zod';
import type { BatchSettings } from './batches/start.ts';
import { isSafeUrl, type OidcSettings } from './identity/oidc.ts';
import type { Limits } from './quota/limits.ts';
import { routingRules } from './routing/pick-endpoint.ts';
import type { RouterSettings } from './routing/router.ts';

const milliseconds = (defaultMs: number) => z.coerce.number().int().min(1).max(86_400_000).default(defaultMs);
const count = (defaultCount: number) => z.coerce.number().int().min(1).max(1_000_000).default(defaultCount);

/** Name of each setting as a flag -> what it may be. The description is what `--help` prints. */
export const settings = {
  engine: z
    .array(z.url({ protocol: /^https?$/ }))
    .default([])
    .describe('base URL of an engine; repeat it, or give a comma list in MOTET_ENGINES'),
  kubernetes: z
    .stringbool()
    .default(false)
    .describe('find engines, models and tenants in a Kubernetes namespace, in place of --engine'),
  namespace: z.string().min(1).optional().describe('the namespace; default, the one of this pod'),
  kubeconfig: z
    .string()
    .optional()
    .describe('file that says how to reach the API server; default, the ServiceAccount of this pod'),
  host: z.string().min(1).default('127.0.0.1').describe('address to listen on'),
  port: z.coerce
    .number()
    .int()
    .min(0)
    .max(65_535)
    .default(8080)
    .describe('port to listen on; 0 takes a free one'),
  'engine-key-file': z
    .string()
    .optional()
    .describe('file with the bearer key that the gateway shows the engines'),
  'engine-token-file': z
    .string()
    .optional()
    .describe('the same for a token that is replaced in its file, as the kubelet does'),
  'api-keys-file': z.string().optional().describe('file of bearer keys, one `NAME KEY` a line'),
  'tenants-file': z
    .string()
    .min(1)
    .optional()
    .describe(
      'file of tenants with their keys, rights, limits and weights, and of groups: YAML or JSON, as in examples/tenants; read again when it changes',
    ),
  'limits-file': z
    .string()
    .optional()
    .describe('file of limits by name of a key, `*` for all others: YAML or JSON, as in the README'),
  'gateway-replicas': count(1).describe(
    'gateways that share the limits: each has its part of them, until Redis tells how many there are',
  ),
  'redis-url': z
    .url({ protocol: /^rediss?$/ })
    .optional()
    .describe('Redis or Valkey where gateways share the limits: redis://HOST:PORT, or rediss:// for TLS'),
  'redis-password-file': z.string().optional().describe('file with its password; a user is in the URL'),
  'redis-ca-file': z
    .string()
    .optional()
    .describe('PEM file of who signed its certificate; default, those that Node knows'),
  'redis-timeout-ms': milliseconds(100).describe('longest wait for Redis; then limits are kept alone'),
  'oidc-issuer': z
    .url()
    .refine(isSafeUrl, 'expected an https URL, or http to this machine')
    .optional()
    .describe('issuer of OpenID Connect whose tokens are taken beside keys, as they have it in `iss`'),
  'oidc-audience': z.string().min(1).optional().describe('what tokens must have in `aud`'),
  'oidc-tenant-claim': z
    .string()
    .min(1)
    .default('sub')
    .describe('claim that names the tenant; with --kubernetes, a Tenant'),
  'secret-interval-ms': milliseconds(15_000).describe(
    'longest time until a changed Secret is seen by a gateway that may not watch Secrets',
  ),
  'usage-interval-ms': z.coerce
    .number()
    .int()
    .min(1_000)
    .max(86_400_000)
    .default(60_000)
    .describe(
      'how often it is counted what tenants used, and written into the statuses of Tenants where that is new',
    ),
  insecure: z
    .stringbool()
    .default(false)
    .describe(
      'let everybody in: listen on more than loopback without API keys, or take no notice of Tenants',
    ),
  'max-body-bytes': z.coerce
    .number()
    .int()
    .min(1)
    .max(1 << 30)
    .default(4 << 20)
    .describe('largest request body, in bytes'),
  'max-in-flight-per-engine': count(256).describe('requests that one engine is sent at a time'),
  'max-queued': count(1024).describe('requests that wait for an engine with room; more are refused with 429'),
  'max-queued-per-tenant': count(512).describe('those of them that one tenant may have'),
  'queue-ageing-ms': milliseconds(1_000).describe(
    'a priority that waits rises by one each time that it was sent nothing for this long',
  ),
  'queue-timeout-ms': milliseconds(30_000).describe('longest wait for an engine with room'),
  'model-wait-ms': milliseconds(10_000).describe(
    'longest wait for a declared model that no engine holds, as while pods are replaced',
  ),
  'wake-wait-ms': milliseconds(120_000).describe(
    'longest wait for a model or adapter that comes only when somebody asks (spec.onDemand)',
  ),
  'hold-after-ms': milliseconds(10_000).describe(
    'when a stream that waits for an engine is begun with comments, so that nothing gives up on it',
  ),
  'connect-timeout-ms': milliseconds(2_000).describe('longest wait for a connection to an engine'),
  'first-byte-timeout-ms': milliseconds(300_000).describe("longest wait for an engine's first byte"),
  'idle-timeout-ms': milliseconds(60_000).describe('longest pause within an answer, of engine or client'),
  'poll-interval-ms': milliseconds(500).describe('pause between two looks at an engine'),
  'silent-after-ms': milliseconds(15_000).describe(
    'an engine that answers no look for so long is dead: what it has is asked of another, or ended',
  ),
  routing: z
    .enum(routingRules)
    .default('affinity')
    .describe('how an engine is chosen: by KV, adapters and load; by load; or in turn'),
  'max-load-factor': z.coerce
    .number()
    .min(1)
    .max(100)
    .default(1.5)
    .describe('requests that one engine may have for affinity, over its share of all'),
  'slow-start-ms': z.coerce
    .number()
    .int()
    .min(0)
    .max(86_400_000)
    .default(10_000)
    .describe('an engine that becomes ready gets less than its share for so long; 0 for none of that'),
  'eject-after-failures': count(5).describe('failures in a row after which an engine is left alone'),
  'eject-ms': milliseconds(5_000).describe('how long it is left alone; twice as long each time again'),
  'max-retry-share': z.coerce
    .number()
    .min(0)
    .max(1)
    .default(0.2)
    .describe('requests that may be asked again of another engine, over all'),
  'hedge-after-ms': z.coerce
    .number()
    .int()
    .min(0)
    .max(86_400_000)
    .default(0)
    .describe(
      'a stream whose engine has sent nothing for so long is asked of a second one that has room, and who begins first is heard; 0 for none of that',
    ),
  'max-hedge-share': z.coerce
    .number()
    .min(0)
    .max(1)
    .default(0.05)
    .describe('streams that may be asked of a second engine, over all'),
  'drain-timeout-ms': milliseconds(30_000).describe('longest wait for requests in flight at shutdown'),
  console: z
    .stringbool()
    .default(true)
    .describe('serve the console page at /console; --console false does not'),
  'batch-store': z
    .string()
    .min(1)
    .optional()
    .describe(
      'where /v1/files and /v1/batches keep what they have: a folder, or s3://BUCKET/PREFIX, with keys and endpoint from the variables of AWS; default, nowhere: there are no such routes',
    ),
  'batch-jobs': count(4).describe('batches that this gateway runs at a time'),
  'batch-lines-per-engine': count(48).describe(
    'requests that an engine is sent at a time when lines of batches fill what online traffic leaves; fewer than its --max-sequences, so that an online request finds a seat',
  ),
  'batch-max-file-bytes': z.coerce
    .number()
    .int()
    .min(1)
    .max(2 ** 40)
    .default(200 << 20)
    .describe('largest file of /v1/files, in bytes'),
  'batch-max-tenant-bytes': z.coerce
    .number()
    .int()
    .min(1)
    .max(2 ** 50)
    .default(2 ** 32)
    .describe('all that one tenant may keep, in bytes; also the most that the answers of one batch may be'),
  'batch-keep-hours': count(720).describe('how long files and ended batches are kept, in hours'),
  'batch-lease-ms': milliseconds(10_000).describe(
    'time without a sign of life after which another gateway takes over a batch',
  ),
  'log-level': z
    .enum(['trace', 'debug', 'info', 'warn', 'error', 'fatal', 'silent'])
    .default('info')
    .describe('least severe log line that is written'),
};

export type Config = {
  engineUrls: string[];
  /** Where to find engines, models and tenants. Null: engines are those of `engineUrls`, keys those of `apiKeys`. */
  cluster: { namespace: string; kubeconfig: string | null } | null;
  /** Bearer key for the engines; null when they want none. */
  engineKey: string | null;
  /** File with a bearer token for the engines that is read again and again; null for `engineKey`. */
  engineTokenFile: string | null;
  host: string;
  port: number;
  /** Name of a key -> the key. Null: no keys are configured, everybody may enter. */
  apiKeys: Map<string, string> | null;
  /** Who may enter and use what, in a file that is followed; null: it is said elsewhere. */
  tenantsFile: string | null;
  /** Name of a key -> its limits; `*` is for those that are not named. Empty: none has any. */
  limits: ReadonlyMap<string, Limits>;
  /** Gateways that share the limits. */
  gatewayReplicas: number;
  /** Where they share them; null: each has its part. */
  redis: { url: string; password: string | null; ca: string | null; timeoutMs: number } | null;
  /** Whose tokens are taken beside keys; null: nobody's. */
  oidc: OidcSettings | null;
  secretIntervalMs: number;
  usageIntervalMs: number;
  /** Everybody may enter, and that is meant. */
  isInsecure: boolean;
  maxBodyBytes: number;
  maxInFlightPerEngine: number;
  maxQueued: number;
  maxQueuedPerTenant: number;
  queueAgeingMs: number;
  queueTimeoutMs: number;
  modelWaitMs: number;
  wakeWaitMs: number;
  holdAfterMs: number;
  connectTimeoutMs: number;
  firstByteTimeoutMs: number;
  idleTimeoutMs: number;
  pollIntervalMs: number;
  /** An engine that answers no look for so long is taken for dead. */
  silentAfterMs: number;
  routing: RouterSettings;
  drainTimeoutMs: number;
  /** The page at /console is there. */
  hasConsole: boolean;
  /** Null: no files and batches. */
  batches: BatchSettings | null;
  logLevel: string;
};

/** A setting that cannot be used. Its message is for the person who started the gateway. */
export class ConfigError extends Error {}

export function parseConfig(args: string[], env: NodeJS.ProcessEnv): Config {
  const given = z.object(settings).safeParse({ ...fromEnvironment(env), ...fromFlags(args) });
  if (!given.success) {
    const { path, message } = given.error.issues[0]!;
    const name = path.join(' ');
    throw new ConfigError(`--${name} (${environmentName(String(path[0]))}): ${message}`);
  }
  const values = given.data;

  const { 'api-keys-file': keysFile, 'engine-key-file': engineKeyFile } = values;
  const apiKeys =
    keysFile === undefined ? null : parseApiKeys(readSetting('api-keys-file', keysFile), keysFile);
  const engineKey = engineKeyFile === undefined ? null : readSetting('engine-key-file', engineKeyFile).trim();
  const engineTokenFile = values['engine-token-file'] ?? null;
  if (engineTokenFile !== null) {
    if (engineKey !== null)
      throw new ConfigError('expected --engine-key-file or --engine-token-file, got both');
    readSetting('engine-token-file', engineTokenFile);
  }
  const tenantsFile = parseTenantsFile(values);
  const limitsFile = values['limits-file'];
  if (limitsFile !== undefined && apiKeys === null)
    throw new ConfigError('--limits-file: expected --api-keys-file beside it, whose names it has');
  const cluster = values.kubernetes ? parseCluster(values) : null;
  if (cluster === null && values.engine.length === 0) {
    throw new ConfigError('--engine (MOTET_ENGINES): expected at least one URL, or --kubernetes');
  }
  const oidc = parseOidc(values);
  if (
    cluster === null &&
    apiKeys === null &&
    tenantsFile === null &&
    oidc === null &&
    !values.insecure &&
    !isLoopback(values.host)
  ) {
    throw new ConfigError(
      `no API keys are configured, so anyone who reaches ${values.host} could use every model. ` +
        'Give --api-keys-file or --tenants-file, or listen on 127.0.0.1, or say --insecure if that is meant.',
    );
  }
  return {
    engineUrls: [...new Set(values.engine.map(parseEngineUrl))],
    cluster,
    engineKey,
    engineTokenFile,
    host: values.host,
    port: values.port,
    apiKeys,
    tenantsFile,
    limits:
      limitsFile === undefined
        ? new Map()
        : parseLimits(readSetting('limits-file', limitsFile), limitsFile, apiKeys),
    gatewayReplicas: values['gateway-replicas'],
    redis: parseRedis(values),
    oidc,
    secretIntervalMs: values['secret-interval-ms'],
    usageIntervalMs: values['usage-interval-ms'],
    isInsecure: values.insecure,
    maxBodyBytes: values['max-body-bytes'],
    maxInFlightPerEngine: values['max-in-flight-per-engine'],
    maxQueued: values['max-queued'],
    maxQueuedPerTenant: values['max-queued-per-tenant'],
    queueAgeingMs: values['queue-ageing-ms'],
    queueTimeoutMs: values['queue-timeout-ms'],
    modelWaitMs: values['model-wait-ms'],
    wakeWaitMs: values['wake-wait-ms'],
    holdAfterMs: values['hold-after-ms'],
    connectTimeoutMs: values['connect-timeout-ms'],
    firstByteTimeoutMs: values['first-byte-timeout-ms'],
    idleTimeoutMs: values['idle-timeout-ms'],
    pollIntervalMs: values['poll-interval-ms'],
    silentAfterMs: values['silent-after-ms'],
    routing: {
      rule: values.routing,
      maxLoadFactor: values['max-load-factor'],
      slowStartMs: values['slow-start-ms'],
      afterFailures: values['eject-after-failures'],
      ejectMs: values['eject-ms'],
      maxRetryShare: values['max-retry-share'],
      hedgeAfterMs: values['hedge-after-ms'],
      maxHedgeShare: values['max-hedge-share'],
    },
    drainTimeoutMs: values['drain-timeout-ms'],
    hasConsole: values.console,
    batches: parseBatches(values),
    logLevel: values['log-level'],
  };
}

type Values = z.infer<z.ZodObject<typeof settings>>;

/** Where the kubelet says in which namespace a pod is. */
const namespaceFile = '/var/run/secrets/kubernetes.io/serviceaccount/namespace';

function parseCluster(values: Values): Config['cluster'] {
  for (const other of ['engine', 'api-keys-file', 'tenants-file'] as const) {
    if (values[other] === undefined || values[other].length === 0) continue;
    throw new ConfigError(
      `--${other}: expected nothing beside --kubernetes; engines are pods, keys are Tenants`,
    );
  }
  const kubeconfig = values.kubeconfig ?? null;
  if (kubeconfig !== null) readSetting('kubeconfig', kubeconfig);
  const namespace =
    values.namespace ?? (existsSync(namespaceFile) ? readFileSync(namespaceFile, 'utf8').trim() : '');
  if (namespace === '') {
    throw new ConfigError(
      '--namespace (MOTET_NAMESPACE): expected a name, since this is not a pod that has one',
    );
  }
  return { namespace, kubeconfig };
}

/** It is read where it is followed: gateway/identity/follow-tenants.ts. */
function parseTenantsFile(values: Values): string | null {
  const path = values['tenants-file'];
  if (path === undefined) return null;
  for (const [other, why] of [
    ['api-keys-file', 'a tenant of the file has its keys there'],
    ['limits-file', 'a tenant of the file has its limits there'],
    ['insecure', 'nobody but its tenants may enter'],
  ] as const) {
    if (values[other] === undefined || values[other] === false) continue;
    throw new ConfigError(`--${other}: expected nothing beside --tenants-file; ${why}`);
  }
  readSetting('tenants-file', path);
  return path;
}

function parseOidc(values: Values): OidcSettings | null {
  const { 'oidc-issuer': issuer, 'oidc-audience': audience, 'oidc-tenant-claim': tenantClaim } = values;
  if ((issuer === undefined) !== (audience === undefined)) {
    throw new ConfigError('--oidc-issuer, --oidc-audience: expected both or none, got one');
  }
  return issuer === undefined || audience === undefined ? null : { issuer, audience, tenantClaim };
}

function parseBatches(values: Values): BatchSettings | null {
  const store = values['batch-store'];
  if (store === undefined) return null;
  if (/^[a-z0-9]+:\/\//i.test(store) && !/^s3:\/\/[^/?#@]+(\/[\w.-]+)*\/?$/.test(store)) {
    throw new ConfigError('--batch-store (MOTET_BATCH_STORE): expected a folder or s3://BUCKET/PREFIX');
  }
  return {
    store,
    maxJobs: values['batch-jobs'],
    linesPerEngine: values['batch-lines-per-engine'],
    maxFileBytes: values['batch-max-file-bytes'],
    maxTenantBytes: values['batch-max-tenant-bytes'],
    keepSeconds: values['batch-keep-hours'] * 3600,
    leaseMs: values['batch-lease-ms'],
  };
}

function parseRedis(values: Values): Config['redis'] {
  const { 'redis-url': url, 'redis-password-file': passwordFile, 'redis-ca-file': caFile } = values;
  if (url === undefined) {
    if (passwordFile === undefined && caFile === undefined) return null;
    throw new ConfigError('--redis-url (MOTET_REDIS_URL): expected a URL beside a file about it');
  }
  const { password, protocol } = new URL(url);
  // Environments and process lists are read by many.
  if (password !== '')
    throw new ConfigError('--redis-url (MOTET_REDIS_URL): expected no password; use --redis-password-file');
  if (caFile !== undefined && protocol !== 'rediss:')
    throw new ConfigError('--redis-ca-file: expected --redis-url with rediss://, which is for TLS');
  return {
    url,
    password: passwordFile === undefined ? null : readSetting('redis-password-file', passwordFile).trim(),
    ca: caFile === undefined ? null : readSetting('redis-ca-file', caFile),
    timeoutMs: values['redis-timeout-ms'],
  };
}

/** In one form, so that an engine given twice counts once. */
function parseEngineUrl(text: string): string {
  const url = new URL(text);
  // It is logged, and a label of metrics.
  if (url.username !== '' || url.password !== '')
    throw new ConfigError(
      '--engine (MOTET_ENGINES): expected a URL without credentials; use --engine-key-file',
    );
  if (url.search !== '' || url.hash !== '')
    throw new ConfigError(`--engine (MOTET_ENGINES): expected a URL without ? and #, got ${text}`);
  return url.href.replace(/\/+$/, '');
}

/** The text of `--help`: one line a setting. */
export function helpText(): string {
  const lines = Object.entries(settings).map(
    ([name, schema]) => `  --${name.padEnd(26)} ${schema.description} [${environmentName(name)}]`,
  );
  return [
    'Usage: node gateway/main.ts (--engine URL [--engine URL] | --kubernetes) [setting ...]',
    '',
    ...lines,
  ].join('\n');
}

/** One key a line: a name for the logs, white space, the key. Empty lines and lines from # on are left out. */
export function parseApiKeys(text: string, path: string): Map<string, string> {
  const keys = new Map<string, string>();
  for (const [index, line] of text.split('\n').entries()) {
    if (line.trim() === '' || line.trimStart().startsWith('#')) continue;
    const [name = '', key = '', ...rest] = line.trim().split(/\s+/);
    const at = `${path}, line ${index + 1}`;
    if (key === '' || rest.length > 0) throw new ConfigError(`${at}: expected NAME KEY`);
    if (key.length < 16) throw new ConfigError(`${at}: the key of ${name} is shorter than 16 characters`);
    if (keys.has(name)) throw new ConfigError(`${at}: the name ${name} is used twice`);
    keys.set(name, key);
  }
  if (keys.size === 0) throw new ConfigError(`${path}: expected at least one line NAME KEY`);
  return keys;
}

const limit = z.int().min(1).max(10_000_000);
const limitsSchema = z.record(
  z.string(),
  z.strictObject({
    requestsPerMinute: limit.optional(),
    tokensPerMinute: limit.optional(),
    concurrency: limit.optional(),
  }),
);

/** Limits by name of a key, as `team-a: { requestsPerMinute: 60 }`. */
export function parseLimits(
  text: string,
  path: string,
  apiKeys: ReadonlyMap<string, string> | null,
): Map<string, Limits> {
  let value: unknown;
  try {
    value = parse(text);
  } catch (cause) {
    throw new ConfigError(`${path}: expected YAML or JSON; ${(cause as Error).message}`, { cause });
  }
  const given = limitsSchema.safeParse(value);
  if (!given.success) {
    const { path: field, message } = given.error.issues[0]!;
    throw new ConfigError(`${path}: ${field.join('.')}: ${message}`);
  }
  const limits = new Map(Object.entries(given.data) as [string, Limits][]);
  for (const name of limits.keys()) {
    if (name !== '*' && !apiKeys?.has(name))
      throw new ConfigError(`${path}: ${name}: expected the name of an API key, or *`);
  }
  return limits;
}

function readSetting(name: string, path: string): string {
  try {
    return readFileSync(path, 'utf8');
  } catch (cause) {
    throw new ConfigError(`--${name}: cannot read ${path}: ${(cause as Error).message}`, { cause });
  }
}

function fromFlags(args: string[]): Record<string, unknown> {
  const options = Object.fromEntries(
    Object.keys(settings).map((name) => [
      name,
      isFlag(name) ? { type: 'boolean' as const } : { type: 'string' as const, multiple: name === 'engine' },
    ]),
  );
  try {
    const { values } = parseArgs({ args, options });
    return Object.fromEntries(
      Object.entries(values).map(([name, value]) => [name, isFlag(name) ? String(value) : value]),
    );
  } catch (cause) {
    throw new ConfigError((cause as Error).message, { cause });
  }
}

function fromEnvironment(env: NodeJS.ProcessEnv): Record<string, unknown> {
  const found: Record<string, unknown> = {};
  for (const name of Object.keys(settings)) {
    const value = env[environmentName(name)];
    if (value === undefined || value === '') continue;
    found[name] = name === 'engine' ? value.split(',').map((url) => url.trim()) : value;
  }
  return found;
}

/** It is said without a value. */
function isFlag(setting: string): boolean {
  return setting === 'insecure' || setting === 'kubernetes';
}

function environmentName(setting: string): string {
  return setting === 'engine' ? 'MOTET_ENGINES' : `MOTET_${setting.replaceAll('-', '_').toUpperCase()}`;
}

function isLoopback(host: string): boolean {
  return host === 'localhost' || host === '::1' || (isIP(host) === 4 && host.startsWith('127.'));
}
