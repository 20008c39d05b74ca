/**
 * What a base model or an adapter is named by, to a path on this machine. One row a scheme: a new one is a row here, a row in
 * source-uri.ts, and the functions that fetch.
 */
import { mkdir, open } from 'node:fs/promises';
import { join } from 'node:path';
import type { Logger } from 'pino';
import type { Dispatcher } from 'undici';
import { AdapterCache, type AdapterCacheOptions, type FetchEvent } from './adapters/adapter-cache.ts';
import { resolveAdapterPath } from './adapters/adapter-path.ts';
import { type AdapterSource, folderSource } from './adapters/adapter-tiers.ts';
import { checkFreeSpace, type DownloadLimits, download, httpsAgent } from './download.ts';
import { EngineError } from './errors.ts';
import { InputError, ioError } from './input-error.ts';
import { pathOf, type SchemeName, schemeOf, shownUri } from './source-uri.ts';
import {
  adoptTemporary,
  hashFile,
  publishFile,
  removeTemporary,
  sweepTemporaries,
  temporaryPath,
} from './temporary-files.ts';

export interface SourceOptions {
  /** Models go to `sources/` in it, adapters to `adapters/`. */
  cacheFolder: string;
  /** Of all fetched adapters. */
  maxAdapterBytes: number;
  /** Adapters on this machine may be loaded from below it only; null: from anywhere. */
  adapterRoot: string | null;
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

/** A digest is there where source-uri.ts says that the scheme needs one. */
interface Scheme {
  /** @returns a GGUF file or a folder of safetensors */
  model: (sources: Sources, uri: string, digest: string | null) => Promise<string>;
  adapter: (sources: Sources, uri: string, digest: string | null) => Promise<AdapterSource>;
}

const bringers: Record<SchemeName, Scheme> = {
  file: {
    model: async (_sources, uri) => pathOf(uri),
    async adapter({ options }, uri, digest) {
      return folderSource(await resolveAdapterPath(pathOf(uri), options.adapterRoot), uri, digest);
    },
  },
  https: {
    model: (sources, uri, digest) => fetchModel(sources, uri, digest!),
    adapter: async ({ adapters }, uri, digest) => adapters.source(uri, digest!),
  },
};

export class Sources {
  readonly options: SourceOptions;
  readonly dispatcher: Dispatcher;
  readonly adapters: AdapterCache;

  constructor(options: SourceOptions) {
    this.options = options;
    this.dispatcher = options.dispatcher ?? httpsAgent(connectMs);
    this.adapters = new AdapterCache({
      folder: join(options.cacheFolder, 'adapters'),
      maxBytes: options.maxAdapterBytes,
      dispatcher: this.dispatcher,
      onFetch: (event) => options.onFetch?.(event),
      ...(options.adapterFetches ?? brisk),
    });
  }

  /**
   * @param digest sha256 of the file, `sha256:<hex>`, where the scheme needs one
   * @returns the path of a GGUF file or a folder of safetensors
   * @throws InputError model_invalid when it has another sha256, io_failed; EngineError source_unavailable
   */
  model(uri: string, digest: string | null): Promise<string> {
    return bringers[schemeOf(uri)].model(this, uri, digest);
  }

  /**
   * @param digest of the adapter, where the scheme needs one or the caller wants it checked
   * @throws EngineError adapter_file_not_found, adapter_path_refused. What fetching throws comes with the load
   */
  adapter(uri: string, digest: string | null): Promise<AdapterSource> {
    return bringers[schemeOf(uri)].adapter(this, uri, digest);
  }

  close(): Promise<void> {
    return this.adapters.close();
  }
}

/** One file, kept as `sources/<hex>`. What a start that was cut off has fetched is gone on with. */
async function fetchModel(sources: Sources, uri: string, digest: string): Promise<string> {
  const { cacheFolder, log } = sources.options;
  const folder = join(cacheFolder, 'sources');
  const hex = digest.slice('sha256:'.length);
  const path = join(folder, hex);
  const beginMs = performance.now();
  const tell = (result: FetchEvent['result'], bytes: number) => {
    const seconds = (performance.now() - beginMs) / 1000;
    sources.options.onFetch?.({ kind: 'model', result, seconds, bytes });
  };
  try {
    await mkdir(folder, { recursive: true });
    if ((await hashFile(path)) === hex) {
      log.info({ digest }, 'model source is in the cache');
      tell('cached', 0);
      return path;
    }
    const left = await adoptTemporary(folder, hex);
    await sweepTemporaries(folder);
    let fetched = await fetchTo(left ?? temporaryPath(folder, hex), sources, uri);
    if (fetched.sha256 !== hex && left !== null) {
      log.warn('what an earlier start left does not fit; fetching from the beginning');
      await removeTemporary(left);
      fetched = await fetchTo(temporaryPath(folder, hex), sources, uri);
    }
    if (fetched.sha256 !== hex) {
      await removeTemporary(fetched.path);
      tell('refused', fetched.sizeBytes);
      throw new InputError(
        'model_invalid',
        `${shownUri(uri)}: expected digest ${digest}, got sha256:${fetched.sha256}`,
      );
    }
    await publishFile(fetched.path, path, async () => (await hashFile(path)) === hex);
    await removeTemporary(fetched.path);
    tell('fetched', fetched.sizeBytes);
    log.info({ digest, bytes: fetched.sizeBytes }, 'model source fetched');
    return path;
  } catch (error) {
    if (error instanceof EngineError) tell('unavailable', 0);
    throw error instanceof EngineError || error instanceof InputError
      ? error
      : ioError(`write ${folder}`, error);
  }
}

async function fetchTo(path: string, { options, dispatcher }: Sources, uri: string) {
  let shownPercent = -5;
  const file = await open(path, 'a+').then(async (made) => {
    await made.close();
    return open(path, 'r+'); // appending would ignore positions
  });
  try {
    const fetched = await download(new URL(uri), file, {
      dispatcher,
      limits: options.modelLimits ?? patient,
      maxBytes: Number.POSITIVE_INFINITY,
      signal: new AbortController().signal,
      onSize: (_sizeBytes, missingBytes) => checkFreeSpace(path, missingBytes),
      onProgress(doneBytes, sizeBytes) {
        if (sizeBytes === null) return;
        const percent = Math.floor((doneBytes / sizeBytes) * 100);
        if (percent < shownPercent + 5) return;
        shownPercent = percent;
        options.log.info({ fraction: doneBytes / sizeBytes }, 'fetching');
      },
    });
    return { path, ...fetched };
  } finally {
    await file.close();
  }
}
