/** How a base model or an adapter may be named: the schemes, and what makes a good URI of each. Reads nothing. */
import { basename } from 'node:path';
import { fileURLToPath } from 'node:url';

/** How sources.ts brings each is in its table. */
export const schemes = {
  /** A path on this machine, also without the scheme. */
  file: { shape: 'file:///PATH', needsDigest: false },
  /** The bytes come from elsewhere: what they must be has to be said. */
  https: { shape: 'https://HOST/PATH', needsDigest: true },
} as const;

export type SchemeName = keyof typeof schemes;

const prefixOf = (uri: string) => /^([a-z][a-z0-9+.-]*):\/\//i.exec(uri)?.[1]?.toLowerCase();

/** Of a URI without problems. */
export const schemeOf = (uri: string) => (prefixOf(uri) ?? 'file') as SchemeName;

export const needsDigest = (uri: string) => schemes[schemeOf(uri)].needsDigest;

/** `sha256:` and 64 hex digits. */
export const isDigest = (text: string) => /^sha256:[0-9a-f]{64}$/.test(text);

/** What is wrong with a URI; null: nothing. */
export function uriProblem(uri: string): { expected: string; got: string } | null {
  const prefix = prefixOf(uri);
  if (prefix === undefined) return null;
  const shapes = ['a path', ...Object.values(schemes).map(({ shape }) => shape)].join(' or ');
  if (!Object.hasOwn(schemes, prefix)) return { expected: shapes, got: `${prefix}://` };
  if (!URL.canParse(uri)) return { expected: shapes, got: 'something else' };
  const { username, password, host, pathname } = new URL(uri);
  if (username !== '' || password !== '') return { expected: 'no user and password in it', got: 'some' };
  if (prefix === 'file' && host !== '') return { expected: schemes.file.shape, got: `the host ${host}` };
  if (prefix === 'file' && /%2f|%00|%(?![0-9a-f]{2})/i.test(pathname)) {
    return { expected: 'a path without encoded slashes and NUL', got: 'one with them' };
  }
  return null;
}

/** The path that a bare path or a file URI names. */
export const pathOf = (uri: string) => (prefixOf(uri) === 'file' ? fileURLToPath(uri) : uri);

/** A model's name when it is given none: the last part of its path. */
export function nameOf(uri: string): string {
  const path = schemeOf(uri) === 'file' ? pathOf(uri) : new URL(uri).pathname;
  return basename(path).replace(/\.gguf$/i, '');
}

/** A URI as messages and listings may show it: what follows `?` may be a credential. */
export function shownUri(uri: URL | string): string {
  const text = String(uri);
  return prefixOf(text) === undefined ? text : text.replace(/[?#].*$/s, '');
}
