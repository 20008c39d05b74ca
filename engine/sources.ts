/**
 * What a base model or an adapter is named by, to a path on this machine. One row a scheme: a new one is a row here, a row in
 * source-uri.ts, and what lists its files, in sources/. What is fetched is kept under its digest, and checked against it.
 */
import { createHash } from 'node:crypto';
import { mkdir, readdir, rename, stat } from 'node:fs/promises';
import { join } from 'node:path';
import type { Logger } from 'pino';
import type { Dispatcher } from 'undici';
import { AdapterCache, type AdapterCacheOptions, type FetchEvent } from './adapters/adapter-cache.ts';
import { resolveAdapterPath } from './adapters/adapter-path.ts';
import { type AdapterSource, folderSource } from './adapters/adapter-tiers.ts';
import { type DownloadLimits, httpsAgent, type RequestOptions } from './download.ts';
import { EngineError } from './errors.ts';
import { InputError, ioError } from './input-error.ts';
import { pathOf, pvcParts, type SchemeName, schemeOf, shownUri } from './source-uri.ts';
import { type SourceAccess, sourceAccess } from './sources/access.ts';
import { type FetchOptions, fetchFile, fetchFiles } from './sources/fetch-files.ts';
import { listHttps } from './sources/https.ts';
import { hfVersion, listHuggingFace } from './sources/hugging-face.ts';
import { listOci, ociVersion } from './sources/oci-registry.ts';
import { chooseFiles, type RemoteFile, type RemoteFiles, type SourceKind } from './sources/remote-files.ts';
import { listS3 } from './sources/s3.ts';
import { Throttle } from './sources/throttle.ts';
import { Versions, versionKey } from './sources/versions.ts';
import {
  adoptTemporary,
  hashFile,
  publishFile,
  removeTemporary,
  sweepTemporaries,
  syncFolder,
  temporaryPath,
} from './temporary-files.ts';

export interface SourceOptions {
  /** Models go to `sources/` in it, adapters to `adapters/`, and what versions stand for to `versions/`. */
  cacheFolder: string;
  /** Of all fetched adapters. */
  maxAdapterBytes: number;
  /** Adapters on this machine may be loaded from below it only; null: from anywhere. */
  adapterRoot: string | null;
  /** Where claims are mounted, each under its name; null: nowhere. */
  claimRoot?: string | null;
  /** Addresses and credentials; without: the public ones, and none. */
  access?: SourceAccess;
  log: Logger;
  onFetch?: (event: FetchEvent) => void;
  /** Instead of one that trusts the system's certificates. */
  dispatcher?: Dispatcher;
  modelLimits?: DownloadLimits;
  adapterFetches?: Pick<AdapterCacheOptions, 'limits' | 'maxFetchMs' | 'maxFetches' | 'maxQueuedFetches'>;
}

/** A model is worth waiting for; a load has someone waiting. */
const patient: DownloadLimits = { stallMs: 60_000, maxTries: 8, backoffMs: 1000 };
const brisk = {
  limits: { stallMs: 20_000, maxTries: 4, backoffMs: 500 },
  maxFetchMs: 15 * 60_000,
  maxFetches: 4,
  maxQueuedFetches: 64,
};
const connectMs = 10_000;

/** What a fetched scheme has of a URI. Requests go as the options say. */
export type ListFiles = (uri: string, kind: SourceKind, options: RequestOptions) => Promise<RemoteFiles>;

/** Where a scheme's bytes are: on this machine, or behind a listing of files. */
type Scheme =
  | { path: (uri: string, options: SourceOptions) => string }
  | {
      list: (
        uri: string,
        kind: SourceKind,
        access: SourceAccess,
        options: RequestOptions,
      ) => Promise<RemoteFiles>;
      /** The version that `list` would say, for a URI that fixes it; null: it has to be asked for. */
      version: (uri: string, access: SourceAccess) => string | null;
    };

const schemeTable: Record<SchemeName, Scheme> = {
  file: { path: pathOf },
  pvc: { path: claimPath },
  https: { list: listHttps, version: () => null },
  s3: { list: listS3, version: () => null },
  hf: { list: listHuggingFace, version: hfVersion },
  oci: { list: listOci, version: ociVersion },
};

function claimPath(uri: string, { claimRoot = null }: SourceOptions): string {
  const { claim, path } = pvcParts(uri);
  if (claimRoot !== null) return join(claimRoot, claim, path);
  const message = `${shownUri(uri)}: expected --claim-root, the folder in which claims are mounted, got none`;
  throw new EngineError('adapter_path_refused', message, { param: 'lora_path' });
}

export class Sources {
  readonly options: SourceOptions;
  readonly dispatcher: Dispatcher;
  readonly adapters: AdapterCache;
  readonly versions: Versions;
  readonly access: SourceAccess;
  readonly throttle: Throttle | null;

  constructor(options: SourceOptions) {
    this.options = options;
    this.access = options.access ?? sourceAccess({});
    this.dispatcher = options.dispatcher ?? httpsAgent(connectMs, this.access.ca ?? undefined);
    const { bytesPerSecond } = this.access;
    this.throttle = bytesPerSecond === null ? null : new Throttle(bytesPerSecond);
    this.versions = new Versions(join(options.cacheFolder, 'versions'));
    this.adapters = new AdapterCache({
      folder: join(options.cacheFolder, 'adapters'),
      maxBytes: options.maxAdapterBytes,
      dispatcher: this.dispatcher,
      throttle: this.throttle,
      list: (uri, kind, request) => this.list(uri, kind, request),
      versionOf: (uri) => this.versionOf(uri),
      versions: this.versions,
      onFetch: (event) => options.onFetch?.(event),
      ...(options.adapterFetches ?? brisk),
    });
  }

  /**
   * @param digest of what is fetched, `sha256:<hex>`, where the scheme needs one or the caller wants it checked: the sha256 of
   *   a file, or of what `sha256sum` prints for the files of a folder in the order of their names
   * @returns the path of a GGUF file or a folder of safetensors
   * @throws InputError model_invalid when it has another digest, io_failed; EngineError source_unavailable
   */
  async model(uri: string, digest: string | null): Promise<string> {
    const scheme = schemeTable[schemeOf(uri)];
    return 'path' in scheme ? scheme.path(uri, this.options) : fetchModel(this, uri, digest);
  }

  /**
   * @param digest of the adapter, where the scheme needs one or the caller wants it checked
   * @throws EngineError adapter_file_not_found, adapter_path_refused. What fetching throws comes with the load
   */
  async adapter(uri: string, digest: string | null): Promise<AdapterSource> {
    const scheme = schemeTable[schemeOf(uri)];
    if (!('path' in scheme)) return this.adapters.source(uri, digest);
    const path = scheme.path(uri, this.options);
    return folderSource(await resolveAdapterPath(path, this.options.adapterRoot), uri, digest);
  }

  /** @throws EngineError source_unavailable */
  async list(uri: string, kind: SourceKind, request: RequestOptions): Promise<RemoteFiles> {
    const scheme = schemeTable[schemeOf(uri)];
    if ('path' in scheme) throw new Error(`${schemeOf(uri)}: has nothing to list`);
    return scheme.list(uri, kind, this.access, request);
  }

  versionOf(uri: string): string | null {
    const scheme = schemeTable[schemeOf(uri)];
    return 'path' in scheme ? null : scheme.version(uri, this.access);
  }

  close(): Promise<void> {
    return this.adapters.close();
  }
}

/**
 * A file kept as `sources/<hex>`, or a folder of that name. What a start that was cut off has fetched is gone on with.
 * @returns its path
 */
async function fetchModel(sources: Sources, uri: string, pin: string | null): Promise<string> {
  const { options, versions, dispatcher, throttle } = sources;
  const { cacheFolder, log } = options;
  const folder = join(cacheFolder, 'sources');
  const where = shownUri(uri);
  const beginMs = performance.now();
  const tell = (result: FetchEvent['result'], bytes: number) => {
    const seconds = (performance.now() - beginMs) / 1000;
    options.onFetch?.({ kind: 'model', result, seconds, bytes });
  };
  /** Its path, when it is here and whole. */
  const findCached = async (digest: string | null) => {
    if (digest === null) return null;
    const path = join(folder, hexOf(digest));
    if ((await digestOfEntry(path)) !== digest) return null;
    log.info({ digest }, 'model source is in the cache');
    tell('cached', 0);
    return path;
  };
  try {
    await mkdir(folder, { recursive: true });
    let known = pin ?? (await versions.find('model', sources.versionOf(uri)));
    const here = await findCached(known);
    if (here !== null) return here;

    const request: RequestOptions = {
      dispatcher,
      limits: options.modelLimits ?? patient,
      signal: new AbortController().signal,
      ...(throttle && { throttle }),
    };
    const remote = await sources.list(uri, 'model', request);
    const { version } = remote;
    if (version !== null) log.info({ source: where, version: version.split('\n') }, 'model source resolved');
    const file = soleFile(remote);
    if (known === null) {
      const named = file?.hash?.algorithm === 'sha256' ? `sha256:${file.hash.hex}` : null;
      known = (await versions.find('model', version)) ?? named;
      const cached = await findCached(known);
      if (cached !== null) return cached;
    }
    const key = known === null ? versionKey('model', version ?? uri) : hexOf(known);
    const fetchOptions: FetchOptions = {
      ...{ kind: 'model', where, request, maxBytes: () => Number.POSITIVE_INFINITY },
      onProgress: progressLog(log),
    };
    const bring = async (path: string) => {
      if (file === null) {
        await mkdir(path, { recursive: true });
        const files = await fetchFiles(remote, path, fetchOptions);
        return {
          path,
          digest: digestOfFiles(files),
          bytes: files.reduce((sum, { sizeBytes }) => sum + sizeBytes, 0),
        };
      }
      const { sizeBytes, sha256 } = await fetchFile(file, path, remote, fetchOptions);
      return { path, digest: `sha256:${sha256}`, bytes: sizeBytes };
    };
    const left = await adoptModel(folder, key, file === null);
    await sweepTemporaries(folder);
    let fetched = await bring(left ?? temporaryPath(folder, key));
    if (pin !== null && fetched.digest !== pin && left !== null) {
      log.warn('what an earlier start left does not fit; fetching from the beginning');
      await removeTemporary(left);
      fetched = await bring(temporaryPath(folder, key));
    }
    if (pin !== null && fetched.digest !== pin) {
      await removeTemporary(fetched.path);
      tell('refused', fetched.bytes);
      throw new InputError('model_invalid', `${where}: expected digest ${pin}, got ${fetched.digest}`);
    }
    const path = join(folder, hexOf(fetched.digest));
    const isWhole = async () => (await digestOfEntry(path)) === fetched.digest;
    if (file !== null) await publishFile(fetched.path, path, isWhole);
    else await publishFolder(fetched.path, path, isWhole);
    await removeTemporary(fetched.path);
    await versions.remember('model', version, fetched.digest);
    tell('fetched', fetched.bytes);
    log.info({ digest: fetched.digest, bytes: fetched.bytes }, 'model source fetched');
    return path;
  } catch (error) {
    if (error instanceof EngineError) tell('unavailable', 0);
    throw error instanceof EngineError || error instanceof InputError
      ? error
      : ioError(`write ${folder}`, error);
  }
}

const hexOf = (digest: string) => digest.slice('sha256:'.length);

/** The file that a model is; null: it is a folder, or has to be unpacked first. */
function soleFile({ files }: RemoteFiles): RemoteFile | null {
  const [file] = files;
  return files.length === 1 && file!.form === 'file' && /\.gguf$/i.test(file!.name) ? file! : null;
}

/** A line for every twentieth of what there is to fetch. */
function progressLog(log: Logger): (doneBytes: number, sizeBytes: number | null) => void {
  let shownPercent = -5;
  return (doneBytes, sizeBytes) => {
    if (sizeBytes === null || sizeBytes === 0) return;
    const percent = Math.floor((doneBytes / sizeBytes) * 100);
    if (percent < shownPercent + 5) return;
    shownPercent = percent;
    log.info({ fraction: doneBytes / sizeBytes }, 'fetching');
  };
}

/** What an earlier start left of the model. */
async function adoptModel(folder: string, key: string, isFolder: boolean): Promise<string | null> {
  const left = await adoptTemporary(folder, key);
  if (left === null || (await stat(left)).isDirectory() === isFolder) return left;
  await removeTemporary(left);
  return null;
}

/** Of a folder with these files: sha256 of what `sha256sum` prints for them in the order of their names. */
function digestOfFiles(files: { name: string; sha256: string }[]): string {
  const lines = files.map(({ name, sha256 }) => ({ name, line: `${sha256}  ${name}\n` }));
  lines.sort((a, b) => Buffer.compare(Buffer.from(a.name), Buffer.from(b.name)));
  const text = lines.map(({ line }) => line).join('');
  return `sha256:${createHash('sha256').update(text).digest('hex')}`;
}

/** Of a file, or of the files right in a folder; null: there is none. */
export async function digestOfEntry(path: string): Promise<string | null> {
  const info = await stat(path).catch(() => null);
  if (info === null) return null;
  if (!info.isDirectory()) return `sha256:${await hashFile(path)}`;
  const files: { name: string; sha256: string }[] = [];
  for (const entry of await readdir(path, { withFileTypes: true })) {
    const isFile = entry.isFile() || (await stat(join(path, entry.name))).isFile();
    if (isFile) files.push({ name: entry.name, sha256: (await hashFile(join(path, entry.name)))! });
  }
  return digestOfFiles(files);
}

/**
 * What a source of this model would be pinned by: of a folder, the files count that are fetched of one.
 * @throws EngineError source_unavailable, when there is no model
 */
export async function digestOfModel(path: string): Promise<string | null> {
  const info = await stat(path).catch(() => null);
  if (!info?.isDirectory()) return digestOfEntry(path);
  const { names } = chooseFiles('model', await readdir(path), path);
  if (names.length === 1) return digestOfEntry(join(path, names[0]!));
  const files = names.map(async (name) => ({ name, sha256: (await hashFile(join(path, name)))! }));
  return digestOfFiles(await Promise.all(files));
}

/** Puts a finished folder under its name. When another process was faster, its folder stays if it is whole. */
async function publishFolder(
  temporary: string,
  path: string,
  isWhole: () => Promise<boolean>,
): Promise<void> {
  await syncFolder(temporary);
  if (!(await isWhole())) {
    const damaged = temporaryPath(join(path, '..'), path.slice(path.lastIndexOf('/') + 1));
    await rename(path, damaged).catch(() => {}); // there may be none
    await removeTemporary(damaged);
    await rename(temporary, path).catch(async (error) => {
      if (!(await isWhole())) throw error;
    });
  }
  await syncFolder(join(path, '..'));
}
