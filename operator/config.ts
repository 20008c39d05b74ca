// Every setting of the operator, parsed once. A setting is a flag (`--resync-seconds 60`) or an environment variable
// (`MOTET_RESYNC_SECONDS=60`); the flag wins. A wrong value ends the start with one line that says which setting, what
// was expected and what came.

import { randomBytes } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { hostname } from 'node:os';
import { parseArgs } from 'node:util';
import { z } from 'zod';

const seconds = (defaultSeconds: number) =>
  z.coerce.number().int().min(1).max(86_400).default(defaultSeconds);
const dnsName = z.string().regex(/^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$/, 'expected a name of Kubernetes');

/** Name of each setting as a flag -> what it may be. The description is what `--help` prints. */
export const settings = {
  namespace: dnsName.optional().describe("namespace to work in; default, the pod's own"),
  kubeconfig: z.string().optional().describe("path of a kubeconfig; default, the pod's service account"),
  'engine-image': z.string().min(1).describe('image of engines whose BaseModel names none'),
  'engine-command': z
    .string()
    .min(1)
    .default('node /app/engine/main.ts')
    .describe('command that starts the engine in its image, split at spaces'),
  'engine-service-account': dnsName.default('motet-engine').describe('ServiceAccount of engine pods'),
  'trusted-service-accounts': z
    .string()
    .regex(/^[^/,\s]+\/[^/,\s]+(,[^/,\s]+\/[^/,\s]+)*$/, 'expected NAMESPACE/NAME, or a comma list of them')
    .describe('who may call engines: comma list of NAMESPACE/NAME, passed on to them'),
  'token-file': z.string().optional().describe('file with the token that the operator shows engines'),
  'lease-name': dnsName.default('motet-operator').describe('Lease by which one operator of several acts'),
  'lease-seconds': z.coerce
    .number()
    .int()
    .min(3)
    .max(3600)
    .default(15)
    .describe('a leader not heard of for this long is replaced; it stops by itself after two thirds'),
  'resync-seconds': seconds(300).describe('every object is looked at again after this long'),
  'engine-check-seconds': seconds(5).describe('engines are asked for their adapters again after this long'),
  concurrency: z.coerce.number().int().min(1).max(64).default(4).describe('reconciles of a kind at a time'),
  host: z.string().min(1).default('0.0.0.0').describe('address of probes and metrics'),
  port: z.coerce
    .number()
    .int()
    .min(0)
    .max(65_535)
    .default(8081)
    .describe('port of probes and metrics; 0 takes a free one'),
  'log-level': z
    .enum(['trace', 'debug', 'info', 'warn', 'error', 'fatal', 'silent'])
    .default('info')
    .describe('least severe line to log'),
};

export interface Config {
  namespace: string;
  /** Path; null for the service account of the pod. */
  kubeconfig: string | null;
  engineImage: string;
  engineCommand: string[];
  engineServiceAccount: string;
  trustedServiceAccounts: string;
  /** Path; null when engines want no token. */
  tokenFile: string | null;
  /** Of this process among several operators. */
  identity: string;
  leaseName: string;
  leaseSeconds: number;
  resyncSeconds: number;
  engineCheckSeconds: number;
  concurrency: number;
  host: string;
  port: number;
  logLevel: string;
}

/** A setting that cannot be used. Its message is for the person who started the operator. */
export class ConfigError extends Error {
  override name = 'ConfigError';
}

const namespaceFile = '/var/run/secrets/kubernetes.io/serviceaccount/namespace';

export function parseConfig(args: readonly string[], env: NodeJS.ProcessEnv): Config {
  const given = z.object(settings).safeParse({ ...fromEnvironment(env), ...fromFlags(args) });
  if (!given.success) {
    const { path, message } = given.error.issues[0]!;
    throw new ConfigError(`--${path.join(' ')} (${environmentName(String(path[0]))}): ${message}`);
  }
  const values = given.data;
  return {
    namespace: values.namespace ?? podNamespace(),
    kubeconfig: values.kubeconfig ?? null,
    engineImage: values['engine-image'],
    engineCommand: values['engine-command'].split(' ').filter((word) => word !== ''),
    engineServiceAccount: values['engine-service-account'],
    trustedServiceAccounts: values['trusted-service-accounts'],
    tokenFile: values['token-file'] ?? null,
    // A pod that is started again in its place is another holder: it does not know what the former one was about.
    identity: `${hostname()}_${randomBytes(4).toString('hex')}`,
    leaseName: values['lease-name'],
    leaseSeconds: values['lease-seconds'],
    resyncSeconds: values['resync-seconds'],
    engineCheckSeconds: values['engine-check-seconds'],
    concurrency: values.concurrency,
    host: values.host,
    port: values.port,
    logLevel: values['log-level'],
  };
}

/** The text of `--help`: one line a setting. */
export function helpText(): string {
  const lines = Object.entries(settings).map(
    ([name, schema]) => `  --${name.padEnd(26)} ${schema.description} [${environmentName(name)}]`,
  );
  return ['Usage: node operator/main.ts --engine-image IMAGE [setting ...]', '', ...lines].join('\n');
}

function podNamespace(): string {
  try {
    return readFileSync(namespaceFile, 'utf8').trim();
  } catch (cause) {
    const { code } = cause as NodeJS.ErrnoException;
    throw new ConfigError(
      `--namespace (MOTET_NAMESPACE): expected a namespace, since ${namespaceFile}: ${code}`,
      {
        cause,
      },
    );
  }
}

function fromFlags(args: readonly string[]): Record<string, unknown> {
  const options = Object.fromEntries(
    Object.keys(settings).map((name) => [name, { type: 'string' as const }]),
  );
  try {
    return { ...parseArgs({ args: [...args], options }).values };
  } catch (cause) {
    throw new ConfigError((cause as Error).message, { cause });
  }
}

function fromEnvironment(env: NodeJS.ProcessEnv): Record<string, unknown> {
  const found: Record<string, unknown> = {};
  for (const name of Object.keys(settings)) {
    const value = env[environmentName(name)];
    if (value !== undefined && value !== '') found[name] = value;
  }
  return found;
}

function environmentName(setting: string): string {
  return `MOTET_${setting.replaceAll('-', '_').toUpperCase()}`;
}
