/**
 * Files of an OCI artifact or image, over the distribution API. The reference is resolved to a manifest, whose bytes are
 * checked against its digest, and the manifest names the digest of every layer. A layer with a title is a file (ORAS); a layer
 * that is a tar archive, as images have them, is unpacked.
 *
 *   GET /v2/REPOSITORY/manifests/REFERENCE    GET /v2/REPOSITORY/blobs/DIGEST
 *
 * A registry that wants to know who asks says how: Basic, or Bearer with a token that its realm gives for the same login.
 */
import { createHash } from 'node:crypto';
import { type Headers, type Reply, type RequestOptions, readReply, unavailable } from '../download.ts';
import { ociParts, shownUri } from '../source-uri.ts';
import { type RegistryLogin, registryLogin, type SourceAccess } from './access.ts';
import {
  chooseFiles,
  isWanted,
  type LayerForm,
  type RemoteFile,
  type RemoteFiles,
  type SourceKind,
  safeName,
} from './remote-files.ts';

const manifestTypes = [
  'application/vnd.oci.image.manifest.v1+json',
  'application/vnd.docker.distribution.manifest.v2+json',
];
const indexTypes = [
  'application/vnd.oci.image.index.v1+json',
  'application/vnd.docker.distribution.manifest.list.v2+json',
];
/** What registries take at most. */
const maxManifestBytes = 4 * 2 ** 20;
const maxTokenBytes = 2 ** 20;
/** Of a token that does not say how long it is good. */
const defaultTokenSeconds = 60;
const titleKey = 'org.opencontainers.image.title';
const unpackKey = 'io.deis.oras.content.unpack';

interface Descriptor {
  mediaType?: string;
  digest: string;
  size: number;
  annotations?: Record<string, string>;
  platform?: { os?: string; architecture?: string };
}

interface Manifest {
  mediaType?: string;
  layers?: Descriptor[];
  manifests?: Descriptor[];
}

/** What stands for the URI's content, when that can be told without asking. */
export function ociVersion(uri: string): string | null {
  const { registry, repository, reference } = ociParts(uri);
  return reference.startsWith('sha256:') ? ['oci', registry, repository, reference].join('\n') : null;
}

export async function listOci(
  uri: string,
  kind: SourceKind,
  access: SourceAccess,
  options: RequestOptions,
): Promise<RemoteFiles> {
  const { registry, repository, reference } = ociParts(uri);
  const where = shownUri(uri);
  const client = new Registry(registry, repository, access, options);
  const top = await client.manifest(reference, where);
  let { manifest } = top;
  if (manifest.manifests) {
    const one = ofThisMachine(manifest.manifests);
    if (one === undefined)
      throw unavailable(
        `${where}: expected a manifest for linux/${architecture()}, got an index without one`,
      );
    ({ manifest } = await client.manifest(one.digest, where));
  }
  const layers = (manifest.layers ?? []).flatMap((layer) => fileOf(layer, client, where));
  const { authorize, explain } = client;
  const version = ['oci', registry, repository, top.digest].join('\n');
  const titled = layers.filter(({ form }) => form === 'file');
  if (titled.length < layers.length) {
    const files = layers.filter(({ form, name }) => form !== 'file' || isWanted(kind, name));
    return { version, files, authorize, explain };
  }
  const { folder, names } = chooseFiles(
    kind,
    titled.map(({ name }) => name),
    where,
  );
  const files = names.map((name) => ({ ...titled.find((file) => file.name === folder + name)!, name }));
  return { version, files, authorize, explain };
}

/** A layer as a file, or none when it is neither titled nor an archive. */
function fileOf(layer: Descriptor, client: Registry, where: string): RemoteFile[] {
  const { mediaType = '', digest, size, annotations = {} } = layer;
  if (!/^sha256:[0-9a-f]{64}$/.test(digest) || !Number.isSafeInteger(size)) {
    throw unavailable(
      `${where}: expected layers with a sha256 digest and a size, got ${JSON.stringify(digest)?.slice(0, 100)}`,
    );
  }
  const title = annotations[titleKey];
  const isPacked = title === undefined || annotations[unpackKey] === 'true';
  const form = isPacked ? layerForm(mediaType) : 'file';
  const name = title === undefined ? digest.slice('sha256:'.length) : safeName(title);
  if (form === null || name === null) return [];
  const hash = { algorithm: 'sha256' as const, hex: digest.slice('sha256:'.length) };
  return [{ name, url: client.url(`blobs/${digest}`), sizeBytes: size, hash, form }];
}

function layerForm(mediaType: string): LayerForm | null {
  const [, compression = ''] = /\.tar(?:[+.](gzip|zstd))?$/.exec(mediaType) ?? [null, 'none'];
  return compression === 'none' ? null : compression === '' ? 'tar' : `tar+${compression as 'gzip' | 'zstd'}`;
}

const architecture = () => (process.arch === 'x64' ? 'amd64' : process.arch);

/** Files are the same for all machines; images are often built for several. */
function ofThisMachine(manifests: Descriptor[]): Descriptor | undefined {
  const isOurs = ({ platform }: Descriptor) =>
    platform?.os === 'linux' && platform.architecture === architecture();
  const isForAll = ({ platform }: Descriptor) => platform === undefined;
  return manifests.find(isOurs) ?? manifests.find(isForAll);
}

class Registry {
  readonly #registry: string;
  readonly #access: SourceAccess;
  readonly #options: RequestOptions;
  readonly #root: string;
  readonly #repository: string;
  #login: RegistryLogin | null = null;
  /** How the registry wants to be told who asks; null: it has not asked, or does not. */
  #challenge: { realm: URL; service: string | null } | 'basic' | null = null;
  #token: { value: string; untilMs: number } | null = null;

  constructor(registry: string, repository: string, access: SourceAccess, options: RequestOptions) {
    this.#registry = registry;
    this.#access = access;
    this.#options = options;
    // The official images' short names are Docker Hub's own.
    const host = registry === 'docker.io' ? 'registry-1.docker.io' : registry;
    this.#repository =
      registry === 'docker.io' && !repository.includes('/') ? `library/${repository}` : repository;
    this.#root = `${this.#isPlain ? 'http' : 'https'}://${host}/v2/${this.#repository}/`;
  }

  get #isPlain(): boolean {
    return this.#access.oci.plainHttp.includes(this.#registry);
  }

  url(path: string): URL {
    return new URL(this.#root + path);
  }

  /** @returns it, and its digest, by which it can be asked for again */
  async manifest(reference: string, where: string): Promise<{ manifest: Manifest; digest: string }> {
    const url = this.url(`manifests/${reference}`);
    let reply = await this.#get(url);
    if (reply.status === 401 && this.#challenge === null) {
      await this.#accept(String(reply.headers['www-authenticate'] ?? ''), where);
      reply = await this.#get(url);
    }
    if (reply.status !== 200) {
      const reason = this.explain(reply.status, reply.headers, reply.body.toString());
      throw unavailable(
        `${where}: ${url.host} answered ${reply.status}${reason === null ? '' : ` (${reason})`}`,
      );
    }
    const digest = `sha256:${createHash('sha256').update(reply.body).digest('hex')}`;
    if (reference.startsWith('sha256:') && digest !== reference) {
      throw unavailable(`${where}: expected a manifest with digest ${reference}, got ${digest}`);
    }
    return { manifest: parse(reply.body, where), digest };
  }

  /** Headers for one request. */
  authorize = async (): Promise<Record<string, string>> => {
    if (this.#challenge === null) return {};
    if (this.#challenge === 'basic') {
      const { basic = null } = this.#login ?? {};
      return basic === null ? {} : { authorization: basicHeader(basic) };
    }
    if (this.#login?.bearer != null) return { authorization: `Bearer ${this.#login.bearer}` };
    if (this.#token === null || performance.now() > this.#token.untilMs) {
      this.#token = await this.#fetchToken(this.#challenge);
    }
    return { authorization: `Bearer ${this.#token.value}` };
  };

  explain = (status: number, _headers: Headers, body: string): string | null => {
    const code = /"code"\s*:\s*"([A-Z_]{1,64})"/.exec(body)?.[1];
    const asked = this.#login === null ? 'no login was sent' : 'a login was sent';
    return [...(code ? [code] : []), ...(status === 401 || status === 403 ? [asked] : [])].join('; ') || null;
  };

  #get(url: URL): Promise<Reply> {
    return readReply(url, {
      ...this.#options,
      authorize: this.authorize,
      accept: [...manifestTypes, ...indexTypes].join(', '),
      maxBytes: maxManifestBytes,
    });
  }

  async #accept(header: string, where: string): Promise<void> {
    this.#login = await registryLogin(this.#access, this.#registry);
    if (/^basic\b/i.test(header)) {
      this.#challenge = 'basic';
      return;
    }
    const fields = new Map(
      Array.from(header.matchAll(/(\w+)="([^"]*)"/g), ([, name, value]) => [name!.toLowerCase(), value!]),
    );
    const realm = fields.get('realm') ?? '';
    const url = /^bearer\b/i.test(header) && URL.canParse(realm) ? new URL(realm) : null;
    // The login goes there, so it goes encrypted, unless the registry itself is spoken to in the clear.
    if (url === null || (url.protocol !== 'https:' && !(this.#isPlain && url.protocol === 'http:'))) {
      throw unavailable(
        `${where}: expected a challenge of Basic, or Bearer with an https realm, got ${JSON.stringify(header.slice(0, 100))}`,
      );
    }
    this.#challenge = { realm: url, service: fields.get('service') ?? null };
  }

  async #fetchToken({ realm, service }: { realm: URL; service: string | null }) {
    const url = new URL(realm);
    if (service !== null) url.searchParams.set('service', service);
    url.searchParams.set('scope', `repository:${this.#repository}:pull`);
    const basic = this.#login?.basic ?? null;
    const { authorize: _, explain: __, ...options } = this.#options;
    const reply = await readReply(url, {
      ...options,
      ...(basic !== null && { authorize: async () => ({ authorization: basicHeader(basic) }) }),
      maxBytes: maxTokenBytes,
    });
    const asked = basic === null ? 'no login was sent' : 'a login was sent';
    const what = `${url.origin}${url.pathname}`;
    if (reply.status !== 200)
      throw unavailable(`${what}: asked for a token, it answered ${reply.status} (${asked})`);
    let json: { token?: unknown; access_token?: unknown; expires_in?: unknown } | null = null;
    try {
      json = JSON.parse(reply.body.toString());
    } catch {}
    const value = json?.token ?? json?.access_token;
    if (typeof value !== 'string')
      throw unavailable(`${what}: expected JSON with a token, got something else`);
    const seconds = typeof json?.expires_in === 'number' ? json.expires_in : defaultTokenSeconds;
    return { value, untilMs: performance.now() + seconds * 800 };
  }
}

const basicHeader = (login: string) => `Basic ${Buffer.from(login).toString('base64')}`;

function parse(body: Buffer, where: string): Manifest {
  let json: Manifest | null = null;
  try {
    json = JSON.parse(body.toString());
  } catch {}
  const isList = (value: unknown) =>
    value === undefined ||
    (Array.isArray(value) && value.every((entry) => typeof entry === 'object' && entry !== null));
  if (typeof json !== 'object' || json === null || !isList(json.layers) || !isList(json.manifests)) {
    throw unavailable(`${where}: expected an image manifest or index, got something else`);
  }
  return json;
}
