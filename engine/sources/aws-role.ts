/**
 * Keys of an AWS role, for s3:// sources of pods that have a role and no keys. Two ways, both as AWS's own tools go them:
 *
 *   - Web identity (EKS's IAM roles for service accounts): the token in AWS_WEB_IDENTITY_TOKEN_FILE is posted to STS, which
 *     answers with keys of AWS_ROLE_ARN (AssumeRoleWithWebIdentity). The request is not signed: the token is who asks.
 *   - Container credentials (EKS Pod Identity, ECS): an agent on the node is asked over HTTP, with the token in
 *     AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE where there is one.
 *
 * Keys live for an hour or so. They are had once for all downloads, anew before they expire, and the old ones serve on while
 * new ones cannot be had. Token files are read at each use, as the kubelet renews them. Why not AWS's SDK:
 * docs/decisions/2026-11-28-roles-without-the-sdk.md.
 */
import { hostname } from 'node:os';
import { type RequestOptions, readReply, unavailable } from '../download.ts';
import { readIfThere } from './read-if-there.ts';

export interface S3Keys {
  accessKeyId: string;
  secretAccessKey: string;
  sessionToken?: string | undefined;
  /** Whose they are, where that is a role; for messages. */
  role?: string | undefined;
}

export interface WebIdentity {
  kind: 'web identity';
  /** Of STS. */
  endpoint: string;
  roleArn: string | null;
  tokenFile: string;
  sessionName: string;
}

export interface ContainerCredentials {
  kind: 'container';
  uri: string;
  tokenFile: string | null;
  token: string | null;
}

/** Where keys of a role come from. */
export type RoleSource = WebIdentity | ContainerCredentials;

/** @param region of STS.  @returns null: the pod has no role */
export function roleSource(env: Record<string, string | undefined>, region: string): RoleSource | null {
  if (env.AWS_WEB_IDENTITY_TOKEN_FILE) {
    const isGlobal = env.AWS_STS_REGIONAL_ENDPOINTS === 'legacy';
    return {
      kind: 'web identity',
      endpoint:
        env.AWS_ENDPOINT_URL_STS ||
        env.AWS_ENDPOINT_URL ||
        `https://sts.${isGlobal ? '' : `${region}.`}amazonaws.com${region.startsWith('cn-') ? '.cn' : ''}`,
      roleArn: env.AWS_ROLE_ARN || null,
      tokenFile: env.AWS_WEB_IDENTITY_TOKEN_FILE,
      // Audit logs of the account show it: the pod's name says most.
      sessionName: (env.AWS_ROLE_SESSION_NAME || `motet-${hostname()}`)
        .replace(/[^\w+=,.@-]/g, '-')
        .slice(0, 64),
    };
  }
  const relative = env.AWS_CONTAINER_CREDENTIALS_RELATIVE_URI;
  const uri = relative ? `http://169.254.170.2${relative}` : env.AWS_CONTAINER_CREDENTIALS_FULL_URI;
  if (!uri) return null;
  return {
    kind: 'container',
    uri,
    tokenFile: env.AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE || null,
    token: env.AWS_CONTAINER_AUTHORIZATION_TOKEN || null,
  };
}

/** Keys with this much left are asked for anew, as AWS's tools do. */
const renewBeforeMs = 5 * 60_000;
/** What is asked right before the end may arrive after it. */
const uselessBeforeMs = 30_000;
/** After new keys could not be had, while the old ones still serve. */
const retryAfterMs = 30_000;
/** All tries for new keys together. */
const askTimeoutMs = 30_000;
const maxReplyBytes = 64 * 2 ** 10;

interface Timed {
  keys: S3Keys;
  /** Unix milliseconds. */
  expiresMs: number;
}

/** The keys of one role: one request for all who ask at the same time. */
export class AwsRole {
  readonly source: RoleSource;
  readonly #now: () => number;
  #have: Timed | null = null;
  #asking: Promise<Timed> | null = null;
  #retryAtMs = 0;

  /** @param now Unix milliseconds */
  constructor(source: RoleSource, now: () => number = Date.now) {
    this.source = source;
    this.#now = now;
  }

  /** @throws EngineError source_unavailable, without a token or a key in it */
  async keys({ dispatcher, limits, signal }: RequestOptions): Promise<S3Keys> {
    signal.throwIfAborted();
    const have = this.#have;
    const leftMs = () => (have ? have.expiresMs - this.#now() : 0);
    const mayWait = leftMs() > uselessBeforeMs && this.#now() < this.#retryAtMs;
    if (leftMs() > renewBeforeMs || mayWait) return have!.keys;
    this.#asking ??= this.#ask({ dispatcher, limits, signal: AbortSignal.timeout(askTimeoutMs) });
    try {
      return (await untilAborted(this.#asking, signal)).keys;
    } catch (error) {
      if (signal.aborted || leftMs() < uselessBeforeMs) throw error;
      return have!.keys;
    }
  }

  async #ask(options: RequestOptions): Promise<Timed> {
    const { source } = this;
    try {
      const reply = source.kind === 'container' ? askContainer(source, options) : askSts(source, options);
      this.#have = timed(await reply, this.#now());
      return this.#have;
    } catch (error) {
      this.#retryAtMs = this.#now() + retryAfterMs;
      throw error;
    } finally {
      this.#asking = null;
    }
  }
}

/** Fields of a reply, as they came. */
interface Reply {
  where: string;
  accessKeyId: unknown;
  secretAccessKey: unknown;
  sessionToken: unknown;
  expiration: unknown;
  role: string | undefined;
}

function timed(reply: Reply, nowMs: number): Timed {
  const { where, accessKeyId, secretAccessKey, sessionToken, role } = reply;
  const expiresMs = Date.parse(String(reply.expiration));
  if (
    ![accessKeyId, secretAccessKey, sessionToken].every((text) => typeof text === 'string' && text !== '') ||
    Number.isNaN(expiresMs)
  ) {
    throw unavailable(
      `${where}: expected keys with a session token and when they expire, got something else`,
    );
  }
  if (expiresMs <= nowMs) {
    throw unavailable(
      `${where}: expected keys that are good for a while, got some that expired at ${new Date(expiresMs).toISOString()}; is the clock of this machine right?`,
    );
  }
  return {
    keys: {
      accessKeyId: accessKeyId as string,
      secretAccessKey: secretAccessKey as string,
      sessionToken: sessionToken as string,
      role,
    },
    expiresMs,
  };
}

async function askSts(source: WebIdentity, options: RequestOptions): Promise<Reply> {
  const { roleArn, tokenFile, sessionName } = source;
  if (roleArn === null) {
    throw unavailable('AWS_ROLE_ARN: expected the role beside AWS_WEB_IDENTITY_TOKEN_FILE, got nothing');
  }
  const endpoint = checkUrl(
    source.endpoint,
    isLoopback,
    'the endpoint of STS',
    'https, or a loopback address',
  );
  const where = `keys of ${roleArn} from ${endpoint.origin}`;
  const token = await readToken(tokenFile, 'AWS_WEB_IDENTITY_TOKEN_FILE');
  const form = new URLSearchParams({
    Action: 'AssumeRoleWithWebIdentity',
    Version: '2011-06-15',
    RoleArn: roleArn,
    RoleSessionName: sessionName,
    WebIdentityToken: token,
  });
  const { status, body } = await readReply(endpoint, {
    ...options,
    name: where,
    form: form.toString(),
    maxBytes: maxReplyBytes,
  });
  const xml = body.toString();
  const field = (name: string) => new RegExp(`<${name}>\\s*([^<]+?)\\s*</${name}>`).exec(xml)?.[1];
  if (status !== 200) {
    const code = field('Code')?.match(/^\w{1,64}$/)?.[0];
    throw unavailable(
      `${where}: it answered ${status}${code ? ` (${code})` : ''}; ${adviceOf(code, source)}`,
    );
  }
  return {
    where,
    accessKeyId: field('AccessKeyId'),
    secretAccessKey: field('SecretAccessKey'),
    sessionToken: field('SessionToken'),
    expiration: field('Expiration'),
    role: roleArn,
  };
}

function adviceOf(code: string | undefined, { roleArn, tokenFile }: WebIdentity): string {
  switch (code) {
    case 'AccessDenied':
      return `the trust policy of ${roleArn} must allow sts:AssumeRoleWithWebIdentity to this ServiceAccount, and the role must exist`;
    case 'ExpiredTokenException':
      return `the token in ${tokenFile} is too old; the kubelet should have renewed it`;
    case 'InvalidIdentityToken':
      return "the account has no identity provider for the cluster's issuer, or the token has another audience than sts.amazonaws.com";
    default:
      return "check the role, its trust policy, and the account's identity provider";
  }
}

/** Hosts that are spoken to without TLS: of this machine, and the agents of ECS and of EKS. */
const agents = ['169.254.170.2', '169.254.170.23', '[fd00:ec2::23]'];
const isLoopback = ({ hostname }: URL) =>
  hostname === 'localhost' || hostname === '[::1]' || /^127(\.\d+){3}$/.test(hostname);

async function askContainer(
  { uri, tokenFile, token }: ContainerCredentials,
  options: RequestOptions,
): Promise<Reply> {
  const url = checkUrl(
    uri,
    (url) => isLoopback(url) || agents.includes(url.hostname),
    'AWS_CONTAINER_CREDENTIALS_FULL_URI',
    `https, or a loopback address, or one of ${agents.join(', ')}`,
  );
  // The path may be a secret.
  const where = `keys from ${url.origin}`;
  const authorization =
    tokenFile === null ? token : await readToken(tokenFile, 'AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE');
  const { status, body } = await readReply(url, {
    ...options,
    name: where,
    ...(authorization !== null && { authorize: async () => ({ authorization }) }),
    accept: 'application/json',
    maxBytes: maxReplyBytes,
  });
  let json: Record<string, unknown> = {};
  try {
    json = JSON.parse(body.toString()) ?? {};
  } catch {
    // What came is judged below.
  }
  if (status !== 200) {
    const code = String(json.code ?? json.Code ?? '').match(/^\w{1,64}$/)?.[0];
    throw unavailable(
      `${where}: it answered ${status}${code ? ` (${code})` : ''}; check that this ServiceAccount is associated with a role`,
    );
  }
  const { RoleArn } = json;
  return {
    where,
    accessKeyId: json.AccessKeyId,
    secretAccessKey: json.SecretAccessKey,
    sessionToken: json.Token,
    expiration: json.Expiration,
    role: typeof RoleArn === 'string' && /^arn:[\w:/+=,.@-]{1,256}$/.test(RoleArn) ? RoleArn : 'a role',
  };
}

/** What is sent there is a secret. */
function checkUrl(text: string, mayBePlain: (url: URL) => boolean, what: string, expected: string): URL {
  const url = URL.canParse(text) ? new URL(text) : null;
  const isSafe = url?.protocol === 'https:' || (url?.protocol === 'http:' && mayBePlain(url));
  if (url === null || !isSafe) {
    const got = url === null ? 'no address' : url.origin;
    throw unavailable(`${what}: expected ${expected}, got ${got}`);
  }
  return url;
}

async function readToken(path: string, variable: string): Promise<string> {
  const token = (await readIfThere(path))?.trim();
  if (!token) throw unavailable(`${path}: expected a token there, as ${variable} says, got nothing`);
  if (!/^[\x21-\x7e]+$/.test(token))
    throw unavailable(`${path}: expected one line of ASCII, got something else`);
  return token;
}

/** Who hangs up waits no longer; the others do. */
async function untilAborted<T>(work: Promise<T>, signal: AbortSignal): Promise<T> {
  const { promise: aborted, reject } = Promise.withResolvers<never>();
  const abort = () => reject(signal.reason);
  signal.addEventListener('abort', abort, { once: true });
  try {
    return await Promise.race([work, aborted]);
  } finally {
    signal.removeEventListener('abort', abort);
  }
}
