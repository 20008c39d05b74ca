/** How a base model or an adapter may be named: the schemes, and what makes a good URI of each. Reads nothing. */
import { basename } from 'node:path';
import { fileURLToPath } from 'node:url';

interface SchemeRow {
  shape: string;
  /** Whether its bytes come over the network. */
  isFetched: boolean;
  /** Whether what is fetched must be said with it: the scheme itself does not. */
  needsDigest: boolean;
}

/** How sources.ts brings each is in its table. */
export const schemes = {
  /** A path on this machine, also without the scheme. */
  file: { shape: 'file:///PATH', isFetched: false, needsDigest: false },
  /** A path in a volume that is mounted under the name of its claim. */
  pvc: { shape: 'pvc://CLAIM/PATH', isFetched: false, needsDigest: false },
  /** The bytes come from elsewhere: what they must be has to be said. */
  https: { shape: 'https://HOST/PATH', isFetched: true, needsDigest: true },
  /** An object may be replaced at any time, and its tag need not be a hash. */
  s3: { shape: 's3://BUCKET/KEY', isFetched: true, needsDigest: true },
  /** A revision becomes a commit, and a commit names its files' hashes. */
  hf: { shape: 'hf://ORG/NAME@REVISION[/PATH]', isFetched: true, needsDigest: false },
  /** A tag becomes a manifest's digest, and a manifest names its layers' digests. */
  oci: { shape: 'oci://REGISTRY/REPOSITORY[:TAG|@DIGEST]', isFetched: true, needsDigest: false },
} as const satisfies Record<string, SchemeRow>;

export type SchemeName = keyof typeof schemes;

const prefixOf = (uri: string) => /^([a-z][a-z0-9+.-]*):\/\//i.exec(uri)?.[1]?.toLowerCase();

/** Of a URI without problems. */
export const schemeOf = (uri: string) => (prefixOf(uri) ?? 'file') as SchemeName;

export const needsDigest = (uri: string) => schemes[schemeOf(uri)].needsDigest;

export const isFetched = (uri: string) => schemes[schemeOf(uri)].isFetched;

/** `sha256:` and 64 hex digits. */
export const isDigest = (text: string) => /^sha256:[0-9a-f]{64}$/.test(text);

/** What is wrong with a URI; null: nothing. */
export function uriProblem(uri: string): { expected: string; got: string } | null {
  const prefix = prefixOf(uri);
  if (prefix === undefined) return null;
  const shapes = ['a path', ...Object.values(schemes).map(({ shape }) => shape)].join(' or ');
  if (!Object.hasOwn(schemes, prefix)) return { expected: shapes, got: `${prefix}://` };
  const scheme = prefix as SchemeName;
  if (scheme !== 'file' && scheme !== 'https') return partsProblem(uri, scheme);
  if (!URL.canParse(uri)) return { expected: shapes, got: 'something else' };
  const { username, password, host, pathname } = new URL(uri);
  if (username !== '' || password !== '') return { expected: 'no user and password in it', got: 'some' };
  if (scheme === 'file' && host !== '') return { expected: schemes.file.shape, got: `the host ${host}` };
  if (scheme === 'file' && /%2f|%00|%(?![0-9a-f]{2})/i.test(pathname)) {
    return { expected: 'a path without encoded slashes and NUL', got: 'one with them' };
  }
  return null;
}

function partsProblem(uri: string, scheme: keyof typeof parts): { expected: string; got: string } | null {
  const expected = schemes[scheme].shape;
  // biome-ignore lint/suspicious/noControlCharactersInRegex: they are what is looked for
  if (/[?#\u0000-\u001f\u007f]/.test(uri)) return { expected, got: 'one with ? or # or control characters' };
  if (/(^|\/)\.\.?(\/|$)/.test(uri)) return { expected, got: 'one with . or .. as a part' };
  return parts[scheme].test(afterScheme(uri)) ? null : { expected, got: 'something else' };
}

const afterScheme = (uri: string) => uri.slice(uri.indexOf('://') + '://'.length);

/** What follows the scheme. */
const parts = {
  pvc: /^(?<claim>[a-z0-9](?:[-a-z0-9.]*[a-z0-9])?)\/(?<path>[^/].*)$/,
  s3: /^(?<bucket>[A-Za-z0-9][\w.-]{1,62})\/(?<key>[^/].*)$/,
  hf: /^(?<repository>[\w.-]+\/[\w.-]+)(?:@(?<revision>[^/@]+))?(?:\/(?<path>[^/].*))?$/,
  oci: /^(?<registry>[a-z0-9.-]+(?::\d+)?)\/(?<repository>[a-z0-9]+(?:[._/-]+[a-z0-9]+)*)(?::(?<tag>\w[\w.-]{0,127})|@(?<digest>sha256:[0-9a-f]{64}))?$/,
};

/** @returns named parts of a URI without problems; '' for one that is not there */
function partsOf<Name extends string>(uri: string, scheme: keyof typeof parts): Record<Name, string> {
  const { groups } = parts[scheme].exec(afterScheme(uri))!;
  return Object.fromEntries(Object.entries(groups!).map(([name, value]) => [name, value ?? ''])) as Record<
    Name,
    string
  >;
}

/** The claim, and the path in it. */
export const pvcParts = (uri: string) => partsOf<'claim' | 'path'>(uri, 'pvc');

/** The bucket and the key, without slashes at its end. */
export function s3Parts(uri: string): { bucket: string; key: string } {
  const { bucket, key } = partsOf<'bucket' | 'key'>(uri, 's3');
  return { bucket, key: key.replace(/\/+$/, '') };
}

/** The revision is `main` when none is named; it may have slashes, encoded. */
export function hfParts(uri: string): { repository: string; revision: string; path: string } {
  const { repository, revision, path } = partsOf<'repository' | 'revision' | 'path'>(uri, 'hf');
  return {
    repository,
    revision: revision === '' ? 'main' : decode(revision),
    path: path.replace(/\/+$/, ''),
  };
}

/** What a manifest is asked for by: its digest, its tag, or `latest`. */
export function ociParts(uri: string): { registry: string; repository: string; reference: string } {
  const { registry, repository, tag, digest } = partsOf<'registry' | 'repository' | 'tag' | 'digest'>(
    uri,
    'oci',
  );
  return { registry, repository, reference: digest || tag || 'latest' };
}

function decode(text: string): string {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

/** The path that a bare path or a file URI names. */
export const pathOf = (uri: string) => (prefixOf(uri) === 'file' ? fileURLToPath(uri) : uri);

/** A model's name when it is given none: the last part of its path, or its repository's. */
export function nameOf(uri: string): string {
  const scheme = schemeOf(uri);
  const path = {
    file: () => pathOf(uri),
    pvc: () => pvcParts(uri).path,
    https: () => new URL(uri).pathname,
    s3: () => s3Parts(uri).key,
    hf: () => hfParts(uri).path || hfParts(uri).repository,
    oci: () => ociParts(uri).repository,
  }[scheme]();
  return basename(path).replace(/\.gguf$/i, '');
}

/** A URI as messages and listings may show it: what follows `?` may be a credential. */
export function shownUri(uri: URL | string): string {
  const text = String(uri);
  return prefixOf(text) === undefined ? text : text.replace(/[?#].*$/s, '');
}
