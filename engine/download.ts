/**
 * One file over https, into an open file, with its sha256. Every wait is bounded; what may pass is tried again a bounded
 * number of times, and goes on where it stopped when the server can (Range, guarded by If-Range, so that a file that changed
 * in between begins anew). Redirects lead to https only.
 *
 * Certificates are checked against the system's roots; NODE_EXTRA_CA_CERTS, a PEM file, adds to them.
 */
import { createHash, type Hash } from 'node:crypto';
import type { FileHandle } from 'node:fs/promises';
import { setTimeout as sleep } from 'node:timers/promises';
import { Agent, type Dispatcher, request } from 'undici';
import { EngineError } from './errors.ts';
import { shownUri } from './source-uri.ts';
import { freeBytesAt, hashRange } from './temporary-files.ts';

export interface DownloadLimits {
  /** Without a byte, of the connection, the headers or the body. */
  stallMs: number;
  /** Tries in a row that bring less than a MiB. */
  maxTries: number;
  /** Before the second try; it doubles up to half a minute. */
  backoffMs: number;
}

export interface DownloadOptions {
  dispatcher: Dispatcher;
  limits: DownloadLimits;
  /** Of the file. */
  maxBytes: number;
  /** Ends it; its reason decides the error. */
  signal: AbortSignal;
  /** Before bytes are written, when the server says how many there are: makes room, or throws. */
  onSize?: (sizeBytes: number, missingBytes: number) => Promise<void>;
  /** After each part; null: the server does not say how many there are. */
  onProgress?: (doneBytes: number, sizeBytes: number | null) => void;
}

export interface Downloaded {
  sizeBytes: number;
  /** Hex. */
  sha256: string;
}

const maxRedirects = 5;
const maxBackoffMs = 30_000;
const progressBytes = 2 ** 20;

/** What makes connections. One per process: it keeps them. `ca` replaces the trusted roots. */
export function httpsAgent(connectMs: number, ca?: string): Agent {
  return new Agent({ allowH2: false, connect: { timeout: connectMs, ...(ca && { ca }) } });
}

/** How far a download is. */
interface Progress {
  doneBytes: number;
  hash: Hash;
  /** ETag or date of what the bytes are from; null: unknown. */
  version: string | null;
}

/**
 * @param file what is in it already is taken for the file's beginning
 * @throws EngineError source_unavailable with the cause; adapter_invalid when it is larger than maxBytes; draining
 */
export async function download(url: URL, file: FileHandle, options: DownloadOptions): Promise<Downloaded> {
  const { limits, signal } = options;
  const progress: Progress = { doneBytes: 0, hash: createHash('sha256'), version: null };
  progress.doneBytes = await hashRange(progress.hash, file, 0, Number.POSITIVE_INFINITY);
  let numFailures = 0;
  for (;;) {
    const before = progress.doneBytes;
    try {
      await tryOnce(url, file, progress, options);
      await file.sync();
      return { sizeBytes: progress.doneBytes, sha256: progress.hash.digest('hex') };
    } catch (error) {
      if (signal.aborted) throw abortError(url, signal);
      if (!(error instanceof Failure)) throw error;
      numFailures = progress.doneBytes - before >= progressBytes ? 1 : numFailures + 1;
      if (!error.mayPass || numFailures >= limits.maxTries) {
        throw unavailable(`${shownUri(url)}: ${error.message}`, error.cause);
      }
    }
    const backoffMs = Math.min(maxBackoffMs, limits.backoffMs * 2 ** (numFailures - 1));
    await sleep(backoffMs, undefined, { signal }).catch(() => {}); // the next try says why it ends
  }
}

/** What went wrong in one try. */
class Failure extends Error {
  readonly mayPass: boolean;

  constructor(message: string, mayPass: boolean, cause?: unknown) {
    super(message, { cause });
    this.mayPass = mayPass;
  }
}

/** @throws Failure; or EngineError, which no other try would change */
async function tryOnce(
  url: URL,
  file: FileHandle,
  progress: Progress,
  options: DownloadOptions,
): Promise<void> {
  const { limits, maxBytes, onSize, onProgress } = options;
  const { statusCode, headers, body } = await follow(url, progress, options);
  try {
    if (isWhole(statusCode, headers, progress)) return;
    const sizeBytes = await begin(statusCode, headers, file, progress);
    const tooLarge = (got: string) =>
      new EngineError('adapter_invalid', `${shownUri(url)}: expected at most ${maxBytes} bytes, got ${got}`, {
        param: 'lora_path',
      });
    if (sizeBytes !== null) {
      if (sizeBytes > maxBytes) throw tooLarge(`${sizeBytes}`);
      await onSize?.(sizeBytes, sizeBytes - progress.doneBytes);
    }
    for await (const chunk of body as AsyncIterable<Buffer>) {
      if (progress.doneBytes + chunk.length > maxBytes) throw tooLarge('more');
      await writeAll(file, chunk, progress.doneBytes);
      progress.hash.update(chunk);
      progress.doneBytes += chunk.length;
      onProgress?.(progress.doneBytes, sizeBytes);
    }
    if (sizeBytes !== null && progress.doneBytes !== sizeBytes) {
      throw new Failure(`expected ${sizeBytes} bytes, got ${progress.doneBytes}`, true);
    }
  } catch (error) {
    throw toFailure(error, limits);
  } finally {
    body.on('error', () => {}).destroy();
  }
}

/** The first reply that is not a redirect. */
async function follow(
  url: URL,
  { doneBytes, version }: Progress,
  { dispatcher, limits, signal }: DownloadOptions,
): Promise<Dispatcher.ResponseData> {
  let current = url;
  for (let numRedirects = 0; ; numRedirects++) {
    const response = await request(current, {
      dispatcher,
      signal,
      headersTimeout: limits.stallMs,
      bodyTimeout: limits.stallMs,
      headers: {
        'accept-encoding': 'identity',
        ...(doneBytes > 0 && { range: `bytes=${doneBytes}-`, ...(version && { 'if-range': version }) }),
      },
    }).catch((error) => {
      throw toFailure(error, limits);
    });
    const { statusCode, headers, body } = response;
    if (![301, 302, 303, 307, 308].includes(statusCode)) return response;
    body.on('error', () => {}).destroy();
    if (numRedirects === maxRedirects) throw new Failure(`more than ${maxRedirects} redirects`, false);
    const location = String(headers.location ?? '');
    const next = URL.canParse(location, current.href) ? new URL(location, current.href) : null;
    if (next?.protocol !== 'https:') {
      throw new Failure(`a redirect to ${next?.protocol ?? 'nowhere'}, and only https: is followed`, false);
    }
    next.username = '';
    next.password = '';
    current = next;
  }
}

type Headers = Dispatcher.ResponseData['headers'];

/** The server has no more than we have: it was all there. */
function isWhole(status: number, headers: Headers, { doneBytes }: Progress): boolean {
  return status === 416 && doneBytes > 0 && headers['content-range'] === `bytes */${doneBytes}`;
}

/**
 * Judges the reply, and goes back to the beginning when it is not what is missing.
 * @returns bytes of the whole file; null: not said
 */
async function begin(
  status: number,
  headers: Headers,
  file: FileHandle,
  progress: Progress,
): Promise<number | null> {
  if (status === 206 || status === 416) {
    const [, start, total] = /^bytes (\d+)-\d+\/(\d+)$/.exec(String(headers['content-range'])) ?? [];
    if (status === 206 && Number(start) === progress.doneBytes) return Number(total);
    await beginAnew(file, progress);
    throw new Failure(`the server answered ${status} with another range than was asked for`, true);
  }
  if (status !== 200) {
    const mayPass = status >= 500 || status === 429 || status === 408;
    throw new Failure(`the server answered ${status}`, mayPass);
  }
  const encoding = headers['content-encoding'] ?? 'identity';
  if (encoding !== 'identity') throw new Failure(`content-encoding ${encoding}, expected none`, false);
  await beginAnew(file, progress);
  const tag = headers.etag ?? headers['last-modified'];
  // Only a strong tag stands for the same bytes.
  progress.version = typeof tag === 'string' && !tag.startsWith('W/') ? tag : null;
  const length = headers['content-length'];
  return length === undefined ? null : Number(length);
}

async function beginAnew(file: FileHandle, progress: Progress): Promise<void> {
  progress.doneBytes = 0;
  progress.hash = createHash('sha256');
  progress.version = null;
  await file.truncate(0);
}

async function writeAll(file: FileHandle, bytes: Buffer, position: number): Promise<void> {
  for (let done = 0; done < bytes.length; ) {
    done += (await file.write(bytes, done, bytes.length - done, position + done)).bytesWritten;
  }
}

/** Anything thrown in a try: ours as it is, the disk's and the network's as a Failure. */
function toFailure(error: unknown, { stallMs }: DownloadLimits): Error {
  if (error instanceof Failure || error instanceof EngineError) return error;
  const { code, syscall, name, message } = error as NodeJS.ErrnoException;
  if (syscall === 'write' || syscall === 'ftruncate') {
    return new Failure(`the cache folder cannot be written (${code})`, false, error);
  }
  if (code === 'UND_ERR_HEADERS_TIMEOUT' || code === 'UND_ERR_BODY_TIMEOUT') {
    return new Failure(`no byte came for ${stallMs / 1000} s`, true, error);
  }
  if (code === undefined && name === 'TypeError') return error as Error;
  const isUntrusted = /CERT|SELF_SIGNED|UNABLE_TO|ERR_TLS/.test(code ?? '');
  return new Failure(
    isUntrusted ? `its certificate is refused (${code})` : (code ?? message),
    !isUntrusted,
    error,
  );
}

function abortError(url: URL, { reason }: AbortSignal): EngineError {
  if (reason instanceof EngineError) return reason;
  return unavailable(`${shownUri(url)}: it took too long`, reason);
}

/** @throws EngineError source_unavailable, when the disk of `path` has less */
export async function checkFreeSpace(path: string, neededBytes: number): Promise<void> {
  const freeBytes = await freeBytesAt(path);
  if (freeBytes >= neededBytes) return;
  throw unavailable(`the disk of the cache: expected ${neededBytes} bytes free, got ${freeBytes}`);
}

/** @param cause for the log */
export function unavailable(message: string, cause?: unknown): EngineError {
  return new EngineError('source_unavailable', message, { param: 'lora_path', retryAfterSeconds: 5, cause });
}
