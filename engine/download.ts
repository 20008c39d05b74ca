/**
 * One file over https, into an open file, with its sha256. Every wait is bounded; what may pass is tried again a bounded
 * number of times, and goes on where it stopped when the server can (Range, guarded by If-Range, so that a file that changed
 * in between begins anew). A large file comes in pieces over several connections. The file on disk grows from its beginning
 * only, so that whatever is there can be gone on with; pieces that are ahead wait in memory.
 *
 * Redirects lead from https to https only, and credentials go to the host that they are for, never along.
 *
 * Certificates are checked against the system's roots; NODE_EXTRA_CA_CERTS and --source-ca, PEM files, add to them.
 */
import { createHash, type Hash } from 'node:crypto';
import type { FileHandle } from 'node:fs/promises';
import { setTimeout as sleep } from 'node:timers/promises';
import { getCACertificates } from 'node:tls';
import { Agent, type Dispatcher, request } from 'undici';
import { EngineError } from './errors.ts';
import { shownUri } from './source-uri.ts';
import type { Throttle } from './sources/throttle.ts';
import { freeBytesAt, hashRange } from './temporary-files.ts';

export interface DownloadLimits {
  /** Without a byte, of the connection, the headers or the body. */
  stallMs: number;
  /** Tries in a row that bring less than a MiB. */
  maxTries: number;
  /** Before the second try; it doubles up to half a minute. */
  backoffMs: number;
}

/** How requests of one source are made. */
export interface RequestOptions {
  dispatcher: Dispatcher;
  limits: DownloadLimits;
  /** Ends it; its reason decides the error. */
  signal: AbortSignal;
  /** Headers that say who asks. Called for each request to the source's own host. */
  authorize?: (url: URL) => Promise<Record<string, string>>;
  /** How messages name it; without: by its address, without what follows `?`. */
  name?: string;
  /** What a refusal means, from its headers and the beginning of its body, for the message. */
  explain?: (status: number, headers: Headers, body: string) => string | null;
  /** Holds all downloads of the process together to a pace. */
  throttle?: Throttle;
}

export interface DownloadOptions extends RequestOptions {
  /** Of the file. */
  maxBytes: number;
  /** How many it has, where that is known before. */
  sizeBytes?: number | null;
  /** At once, for this file. Default 1. */
  maxConnections?: number;
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
/** What one connection fetches at a time of a file that several fetch: all but one of them are held in memory. */
const pieceBytes = 4 * 2 ** 20;
const maxExplanationBytes = 16 * 2 ** 10;

/** What makes connections. One per process: it keeps them. `ca` is trusted beside the system's roots. */
export function httpsAgent(connectMs: number, ca?: string): Agent {
  return new Agent({
    allowH2: false,
    connect: { timeout: connectMs, ...(ca && { ca: [...getCACertificates('default'), ca] }) },
  });
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
  const progress: Progress = { doneBytes: 0, hash: createHash('sha256'), version: null };
  progress.doneBytes = await hashRange(progress.hash, file, 0, Number.POSITIVE_INFINITY);
  await tryOften(
    url,
    options,
    () => progress.doneBytes,
    () => tryOnce(url, file, progress, options),
  );
  await file.sync();
  return { sizeBytes: progress.doneBytes, sha256: progress.hash.digest('hex') };
}

export interface Reply {
  status: number;
  headers: Headers;
  body: Buffer;
}

/**
 * A small reply, whole: a listing, a manifest, a token. Whatever its status, once that is not one that may pass.
 * With a `form` (of a URL's encoding) it is posted, to that address and to no other.
 * @throws EngineError source_unavailable
 */
export function readReply(
  url: URL,
  options: RequestOptions & { accept?: string; maxBytes: number; form?: string },
): Promise<Reply> {
  return tryOften(
    url,
    options,
    () => 0,
    async () => {
      const { accept, form } = options;
      const { statusCode: status, headers, body } = await follow(url, options, { accept, form });
      try {
        if (mayPass(status)) throw new Failure(`the server answered ${status}`, true);
        return { status, headers, body: await readAll(body, options) };
      } finally {
        body.on('error', () => {}).destroy();
      }
    },
  );
}

/** Tries until it works, or what fails will not pass, or too many tries in a row brought next to nothing. */
async function tryOften<T>(
  url: URL,
  { limits, signal, name }: RequestOptions,
  doneBytes: () => number,
  attempt: () => Promise<T>,
): Promise<T> {
  let numFailures = 0;
  for (;;) {
    const before = doneBytes();
    try {
      return await attempt();
    } catch (thrown) {
      if (signal.aborted) throw abortError(name ?? shownUri(url), signal);
      const error = toFailure(thrown, limits);
      if (!(error instanceof Failure)) throw error;
      numFailures = doneBytes() - before >= progressBytes ? 1 : numFailures + 1;
      if (!error.mayPass || numFailures >= limits.maxTries) {
        throw unavailable(`${name ?? shownUri(url)}: ${error.message}`, error.cause);
      }
    }
    const backoffMs = Math.min(maxBackoffMs, limits.backoffMs * 2 ** (numFailures - 1));
    await sleep(backoffMs, undefined, { signal }).catch(() => {}); // the next try says why it ends
  }
}

const mayPass = (status: number) => status >= 500 || status === 429 || status === 408;

/** What went wrong in one try. */
class Failure extends Error {
  readonly mayPass: boolean;

  constructor(message: string, mayPass: boolean, cause?: unknown) {
    super(message, { cause });
    this.mayPass = mayPass;
  }
}

/** What is there now is not what the beginning is from. */
class Changed extends Failure {}

/** @throws Failure; or EngineError, which no other try would change */
async function tryOnce(
  url: URL,
  file: FileHandle,
  progress: Progress,
  options: DownloadOptions,
): Promise<void> {
  const { maxBytes, maxConnections = 1, onSize } = options;
  const { doneBytes } = progress;
  const known = options.sizeBytes ?? null;
  if (known !== null && doneBytes === known && known > 0) return;
  if (known !== null && doneBytes > known) await beginAnew(file, progress);
  const isLarge = (sizeBytes: number | null) =>
    maxConnections > 1 && sizeBytes !== null && sizeBytes - progress.doneBytes > 2 * pieceBytes;
  const first = await follow(url, options, {
    begin: progress.doneBytes,
    end: isLarge(known) ? progress.doneBytes + pieceBytes : null,
    version: progress.version,
  });
  const { statusCode, headers, body } = first;
  try {
    if (isWhole(statusCode, headers, progress)) return;
    await explainRefusal(first, options);
    const sizeBytes = await begin(statusCode, headers, file, progress);
    if (sizeBytes !== null) {
      if (known !== null && sizeBytes !== known) {
        throw new Failure(`expected ${known} bytes, as its listing says, got ${sizeBytes}`, false);
      }
      if (sizeBytes > maxBytes) throw tooLarge(url, maxBytes, `${sizeBytes}`);
      await onSize?.(sizeBytes, sizeBytes - progress.doneBytes);
    }
    const isSplit = isLarge(sizeBytes) && (statusCode === 206 || headers['accept-ranges'] === 'bytes');
    await readPieces(url, file, progress, options, first, sizeBytes, isSplit ? maxConnections : 1);
    if (sizeBytes !== null && progress.doneBytes !== sizeBytes) {
      throw new Failure(`expected ${sizeBytes} bytes, got ${progress.doneBytes}`, true);
    }
  } finally {
    body.on('error', () => {}).destroy();
  }
}

/**
 * Reads the rest of the file, from `first` on, over as many connections. Each takes the next piece; what arrives in its turn
 * is written, what arrives before it is held. So all but one piece may be in memory, and no more. When one fails, those
 * before it are still finished, as the next try begins behind them; those after it end.
 */
async function readPieces(
  url: URL,
  file: FileHandle,
  progress: Progress,
  options: DownloadOptions,
  first: Dispatcher.ResponseData,
  sizeBytes: number | null,
  numConnections: number,
): Promise<void> {
  const end = sizeBytes ?? Number.POSITIVE_INFINITY;
  const length = numConnections > 1 ? pieceBytes : Number.POSITIVE_INFINITY;
  /** Pieces under way, by where they begin. `wake` says that it is a piece's turn, or that it ends. */
  const running = new Map<number, { stop: AbortController; wake: () => void }>();
  let next = progress.doneBytes;
  let failure: Error | null = null;

  const write = async (bytes: Buffer) => {
    if (progress.doneBytes + bytes.length > options.maxBytes) throw tooLarge(url, options.maxBytes, 'more');
    await writeAll(file, bytes, progress.doneBytes);
    progress.hash.update(bytes);
    progress.doneBytes += bytes.length;
    options.onProgress?.(progress.doneBytes, sizeBytes);
  };
  const fail = (error: Error, from: number) => {
    const mayGoOn = error instanceof Failure && error.mayPass && !(error instanceof Changed);
    if (failure === null || !mayGoOn) failure = error;
    next = end;
    for (const [begin, { stop, wake }] of running) {
      if (mayGoOn && begin < from) continue;
      stop.abort();
      wake();
    }
  };
  const work = async (response: Dispatcher.ResponseData | null) => {
    /** What came of a piece before its turn, from the piece's beginning. One buffer serves all pieces of a connection. */
    let held: Buffer | null = null;
    for (let now = response; next < end; now = null) {
      const from = next;
      const to = Math.min(from + length, end);
      next = to;
      const piece = { stop: new AbortController(), wake: () => {} };
      const signal = AbortSignal.any([options.signal, piece.stop.signal]);
      running.set(from, piece);
      let at = from;
      let numHeld = 0;
      const writeHeld = async () => {
        if (numHeld > 0) await write(held!.subarray(0, numHeld));
        numHeld = 0;
      };
      try {
        const { body } =
          now ?? (await requestPiece(url, { ...options, signal }, from, to, sizeBytes, progress));
        try {
          for await (const chunk of body as AsyncIterable<Buffer>) {
            const part = chunk.subarray(0, to - at);
            at += part.length;
            await options.throttle?.take(part.length, signal);
            if (progress.doneBytes >= from) {
              await writeHeld();
              await write(part);
            } else {
              held ??= Buffer.allocUnsafeSlow(pieceBytes);
              part.copy(held, numHeld);
              numHeld += part.length;
            }
            if (at === to) break;
          }
        } finally {
          body.on('error', () => {}).destroy();
        }
        if (Number.isFinite(to) && at < to) {
          throw new Failure(`expected ${sizeBytes} bytes, and it ended before byte ${at}`, true);
        }
        signal.throwIfAborted();
        if (progress.doneBytes < from) {
          await new Promise<void>((resolve) => {
            piece.wake = resolve;
          });
        }
        signal.throwIfAborted();
        await writeHeld();
        running.get(to)?.wake();
      } catch (error) {
        // What another's failure has ended says nothing of its own.
        if (!piece.stop.signal.aborted) fail(toFailure(error, options.limits), from);
        return;
      } finally {
        running.delete(from);
      }
    }
  };

  await Promise.all(Array.from({ length: numConnections }, (_, i) => work(i === 0 ? first : null)));
  if (failure === null) return;
  if ((failure as Error) instanceof Changed) await beginAnew(file, progress);
  throw failure;
}

async function requestPiece(
  url: URL,
  options: DownloadOptions,
  begin: number,
  end: number,
  sizeBytes: number | null,
  { version }: Progress,
): Promise<Dispatcher.ResponseData> {
  const response = await follow(url, options, { begin, end, version });
  const { statusCode, headers, body } = response;
  if (statusCode === 206 && headers['content-range'] === `bytes ${begin}-${end - 1}/${sizeBytes}`) {
    return response;
  }
  try {
    await explainRefusal(response, options);
    throw statusCode === 200 || statusCode === 206 || statusCode === 416
      ? new Changed(`the server answered ${statusCode} with another range than was asked for`, true)
      : new Failure(`the server answered ${statusCode}`, mayPass(statusCode));
  } finally {
    body.on('error', () => {}).destroy();
  }
}

interface Asked {
  accept?: string | undefined;
  form?: string | undefined;
  begin?: number;
  /** null: to the end. */
  end?: number | null;
  /** What bytes before `begin` are from. */
  version?: string | null;
}

/** The first reply that is not a redirect. */
async function follow(
  url: URL,
  { dispatcher, limits, signal, authorize }: RequestOptions,
  { accept, form, begin = 0, end = null, version = null }: Asked,
): Promise<Dispatcher.ResponseData> {
  let current = url;
  for (let numRedirects = 0; ; numRedirects++) {
    const isRange = begin > 0 || end !== null;
    const response = await request(current, {
      dispatcher,
      signal,
      method: form === undefined ? 'GET' : 'POST',
      body: form ?? null,
      headersTimeout: limits.stallMs,
      bodyTimeout: limits.stallMs,
      headers: {
        'accept-encoding': 'identity',
        'user-agent': 'motet',
        ...(accept !== undefined && { accept }),
        ...(form !== undefined && { 'content-type': 'application/x-www-form-urlencoded' }),
        ...(isRange && { range: `bytes=${begin}-${end === null ? '' : end - 1}` }),
        ...(isRange && version !== null && { 'if-range': version }),
        ...(current.origin === url.origin && (await authorize?.(current))),
      },
    });
    const { statusCode, headers, body } = response;
    if (![301, 302, 303, 307, 308].includes(statusCode) || headers.location === undefined) return response;
    body.on('error', () => {}).destroy();
    if (form !== undefined) throw new Failure('a redirect, and what is posted goes to one address', false);
    if (numRedirects === maxRedirects) throw new Failure(`more than ${maxRedirects} redirects`, false);
    const location = String(headers.location);
    const next = URL.canParse(location, current.href) ? new URL(location, current.href) : null;
    // A source that is spoken to in the clear may go on so; nothing else may fall back to it.
    if (next?.protocol !== 'https:' && !(next?.protocol === 'http:' && current.protocol === 'http:')) {
      throw new Failure(`a redirect to ${next?.protocol ?? 'nowhere'}, and only https: is followed`, false);
    }
    next.username = '';
    next.password = '';
    current = next;
  }
}

/** @throws Failure, when the reply is one and the source can say what it means */
async function explainRefusal(
  { statusCode: status, headers, body }: Dispatcher.ResponseData,
  options: RequestOptions,
): Promise<void> {
  if (status < 300 || status === 416 || !options.explain) return;
  const text = await readAll(body, { ...options, maxBytes: maxExplanationBytes }).catch(() =>
    Buffer.alloc(0),
  );
  const reason = options.explain(status, headers, text.toString());
  throw new Failure(`the server answered ${status}${reason === null ? '' : ` (${reason})`}`, mayPass(status));
}

async function readAll(
  body: Dispatcher.ResponseData['body'],
  { maxBytes, throttle, signal }: RequestOptions & { maxBytes: number },
): Promise<Buffer> {
  const chunks: Buffer[] = [];
  let sizeBytes = 0;
  for await (const chunk of body as AsyncIterable<Buffer>) {
    await throttle?.take(chunk.length, signal);
    sizeBytes += chunk.length;
    if (sizeBytes > maxBytes) throw new Failure(`expected at most ${maxBytes} bytes, got more`, false);
    chunks.push(chunk);
  }
  return Buffer.concat(chunks);
}

function tooLarge(url: URL, maxBytes: number, got: string): EngineError {
  return new EngineError(
    'adapter_invalid',
    `${shownUri(url)}: expected at most ${maxBytes} bytes, got ${got}`,
    {
      param: 'lora_path',
    },
  );
}

export type Headers = Dispatcher.ResponseData['headers'];

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
    if (status === 206 && Number(start) === progress.doneBytes) {
      progress.version ??= strongTag(headers);
      return Number(total);
    }
    await beginAnew(file, progress);
    throw new Failure(`the server answered ${status} with another range than was asked for`, true);
  }
  if (status !== 200) {
    throw new Failure(`the server answered ${status}`, mayPass(status));
  }
  const encoding = headers['content-encoding'] ?? 'identity';
  if (encoding !== 'identity') throw new Failure(`content-encoding ${encoding}, expected none`, false);
  await beginAnew(file, progress);
  progress.version = strongTag(headers);
  const length = headers['content-length'];
  return length === undefined ? null : Number(length);
}

/** Only a strong tag stands for the same bytes. */
function strongTag(headers: Headers): string | null {
  const tag = headers.etag ?? headers['last-modified'];
  return typeof tag === 'string' && !tag.startsWith('W/') ? tag : null;
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

function abortError(name: string, { reason }: AbortSignal): EngineError {
  if (reason instanceof EngineError) return reason;
  return unavailable(`${name}: it took too long`, reason);
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
