/**
 * How remote sources are reached: addresses, and where credentials come from. The variables and files are those of each
 * service's own tools. Files are read at each use, so a mounted Secret that is renewed takes effect by itself. Nothing that
 * is secret goes into a message or a log.
 */
import { homedir } from 'node:os';
import { join } from 'node:path';
import { type RequestOptions, unavailable } from '../download.ts';
import { AwsRole, roleSource, type S3Keys } from './aws-role.ts';
import { readIfThere } from './read-if-there.ts';

export interface SourceAccess {
  /** Of all downloads together; null: no cap. */
  bytesPerSecond: number | null;
  /** PEM, trusted beside the system's roots. */
  ca: string | null;
  hf: { endpoint: string; token: string | null; tokenFile: string };
  s3: {
    /** Of an S3-compatible server, which is asked path style; null: AWS's. */
    endpoint: string | null;
    region: string;
    keys: S3Keys | null;
    role: AwsRole | null;
    credentialsFile: string;
    profile: string;
  };
  oci: {
    /** Docker's config.json. */
    configFile: string;
    /** Registries that are spoken to without TLS, as HOST:PORT. */
    plainHttp: string[];
  };
}

/** What settings say; the rest is the environment's. */
export interface GivenAccess {
  bytesPerSecond?: number | null;
  ca?: string | null;
  hfEndpoint?: string | null;
  s3Endpoint?: string | null;
  s3Region?: string | null;
  ociPlainHttp?: string[] | null;
}

export function sourceAccess(env: Record<string, string | undefined>, given: GivenAccess = {}): SourceAccess {
  const home = env.HOME || homedir();
  const hfHome = env.HF_HOME || join(env.XDG_CACHE_HOME || join(home, '.cache'), 'huggingface');
  const { AWS_ACCESS_KEY_ID: accessKeyId, AWS_SECRET_ACCESS_KEY: secretAccessKey } = env;
  const ownRegion = env.AWS_REGION || env.AWS_DEFAULT_REGION;
  const region = given.s3Region || ownRegion || 'us-east-1';
  const role = roleSource(env, ownRegion || region);
  return {
    bytesPerSecond: given.bytesPerSecond ?? null,
    ca: given.ca ?? null,
    hf: {
      endpoint: withoutSlash(given.hfEndpoint || env.HF_ENDPOINT || 'https://huggingface.co'),
      token: env.HF_TOKEN?.trim() || null,
      tokenFile: env.HF_TOKEN_PATH || join(hfHome, 'token'),
    },
    s3: {
      endpoint:
        withoutSlash(given.s3Endpoint || env.AWS_ENDPOINT_URL_S3 || env.AWS_ENDPOINT_URL || '') || null,
      region,
      keys:
        accessKeyId && secretAccessKey
          ? { accessKeyId, secretAccessKey, sessionToken: env.AWS_SESSION_TOKEN || undefined }
          : null,
      role: role && new AwsRole(role),
      credentialsFile: env.AWS_SHARED_CREDENTIALS_FILE || join(home, '.aws', 'credentials'),
      profile: env.AWS_PROFILE || 'default',
    },
    oci: {
      configFile: join(env.DOCKER_CONFIG || join(home, '.docker'), 'config.json'),
      plainHttp: given.ociPlainHttp ?? [],
    },
  };
}

const withoutSlash = (url: string) => url.replace(/\/+$/, '');

/** Of the variable, or of the file; null: neither is there. */
export async function hfToken({ hf }: SourceAccess): Promise<string | null> {
  return hf.token ?? ((await readIfThere(hf.tokenFile))?.trim() || null);
}

/**
 * The first there are, in the order of AWS's own tools: of the variables, of a web identity's role, of the profile in AWS's
 * credentials file, of a container's role; null: requests are anonymous.
 */
export async function s3Keys({ s3 }: SourceAccess, options: RequestOptions): Promise<S3Keys | null> {
  if (s3.keys !== null) return s3.keys;
  if (s3.role?.source.kind === 'web identity') return s3.role.keys(options);
  return (await profileKeys(s3)) ?? (await s3.role?.keys(options)) ?? null;
}

async function profileKeys({ credentialsFile, profile: name }: SourceAccess['s3']): Promise<S3Keys | null> {
  const text = await readIfThere(credentialsFile);
  if (text === null) return null;
  const profile = parseIni(text).get(name);
  const accessKeyId = profile?.get('aws_access_key_id');
  const secretAccessKey = profile?.get('aws_secret_access_key');
  if (!accessKeyId || !secretAccessKey) return null;
  return { accessKeyId, secretAccessKey, sessionToken: profile?.get('aws_session_token') };
}

/** Sections of `name = value` lines. */
function parseIni(text: string): Map<string, Map<string, string>> {
  const sections = new Map<string, Map<string, string>>();
  let section = new Map<string, string>();
  for (const line of text.split(/\r?\n/)) {
    const header = /^\s*\[\s*(.+?)\s*\]/.exec(line)?.[1];
    const [, name, value] = /^\s*([^#;=\s]+)\s*=\s*(.*?)\s*$/.exec(line) ?? [];
    if (header !== undefined) {
      section = new Map();
      sections.set(header, section);
    } else if (name !== undefined) {
      section.set(name.toLowerCase(), value!);
    }
  }
  return sections;
}

export interface RegistryLogin {
  /** `user:password`; null: none. */
  basic: string | null;
  /** Sent as it is. */
  bearer: string | null;
}

/** What Docker's config.json has for a registry. Credential helpers are programs, which are not run. */
export async function registryLogin({ oci }: SourceAccess, registry: string): Promise<RegistryLogin | null> {
  const text = await readIfThere(oci.configFile);
  if (text === null) return null;
  let auths: Record<string, Record<string, unknown>>;
  try {
    auths = JSON.parse(text)?.auths ?? {};
  } catch {
    // The parser's own message would quote the file.
    throw unavailable(`${oci.configFile}: expected JSON as docker login writes it, got something else`);
  }
  const names = [registry, `https://${registry}`, `http://${registry}`];
  if (registry === 'docker.io') names.push('https://index.docker.io/v1/', 'index.docker.io');
  const found = names.map((name) => auths[name] ?? auths[`${name}/`]).find((entry) => entry != null);
  if (!found) return null;
  const { auth, username, password, registrytoken } = found;
  if (typeof registrytoken === 'string') return { basic: null, bearer: registrytoken };
  if (typeof username === 'string' && typeof password === 'string') {
    return { basic: `${username}:${password}`, bearer: null };
  }
  if (typeof auth !== 'string' || auth === '') return null;
  return { basic: Buffer.from(auth, 'base64').toString(), bearer: null };
}
