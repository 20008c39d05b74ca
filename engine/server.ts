/**
 * HTTP in, engine out: the route table, bodies in and out, server-sent events. Decides nothing about batches.
 * A reader that stops reading costs at most maxBufferedBytes, a hang-up ends its sequences before the next step, and
 * one place turns whatever was thrown into a reply.
 */
import { createHash, randomUUID, timingSafeEqual } from 'node:crypto';
import type { Server } from 'node:http';
import { createServer as createHttpServer } from 'node:http';
import express, { type NextFunction, type Request, type RequestHandler, type Response } from 'express';
import type { Logger } from 'pino';
import type { CallerIdentity } from './caller-identity.ts';
import { embed, type Pooling } from './embeddings.ts';
import type { SequenceHandle } from './engine.ts';
import { EngineError, errorBody, errorTable, toEngineError } from './errors.ts';
import {
  addJob,
  chatJob,
  chatTokens,
  checkTokens,
  collect,
  completionJob,
  encode,
  holdServed,
  type Job,
  jobUsage,
  namedBy,
  type ServedModel,
} from './generate.ts';
import { ToolCallReader } from './grammar/tool-calls.ts';
import type { Arena } from './ladder/arena.ts';
import { baseVoice } from './ladder/block-hash.ts';
import type { BlockPool } from './ladder/block-pool.ts';
import type { EngineMetrics } from './metrics.ts';
import {
  parseChat,
  parseCompletion,
  parseDetokenize,
  parseEmbeddings,
  parseLoadAdapter,
  parseRemoveAdapter,
  parseServed,
  parseTokenize,
  parseUnloadAdapter,
} from './openai.ts';
import {
  chatFormat,
  chatFormatOf,
  completionFormat,
  doneEvent,
  embeddingsReply,
  eventOf,
  type ReplyFormat,
  type Usage,
  usageOf,
} from './openai-reply.ts';
import {
  type AdapterList,
  type ArenaUse,
  enginePaths,
  formatUsage,
  type ModelCard,
  type ModelList,
  type PurgeReport,
  parseStanding,
  type Standing,
  senderHeader,
  type UnloadReport,
  usageHeader,
} from './protocol.ts';
import { type KvKeeper, notHere, purgeAdapter } from './purge.ts';
import { shownUri } from './source-uri.ts';
import type { Sources } from './sources.ts';

export interface ServerOptions extends ServedModel {
  arena: Arena;
  blocks: BlockPool;
  hostArena: Arena | null;
  /** Of `/v1/embeddings`. */
  pooling: Pooling;
  hiddenSize: number;
  metrics: EngineMetrics;
  log: Logger;
  /** Where the base model came from, path or URI. */
  modelSource: string;
  sources: Sources;
  /** Who has KV that an adapter's removal takes along. */
  kvKeepers: readonly KvKeeper[];
  /** Accepted bearer keys; null: none. Without keys and callers everyone may call. */
  apiKeys: readonly string[] | null;
  /** Judges bearer tokens of the cluster; null: none are accepted. */
  callers: Pick<CallerIdentity, 'check'> | null;
  /** Of a request. */
  maxBodyBytes: number;
  /** Of a stream, not yet taken by its reader. */
  maxBufferedBytes: number;
  /** Unix milliseconds. */
  wallClock: () => number;
  /** False until the adapters named at start are there. */
  isReady: () => boolean;
}

/** The server, not yet listening. */
export function createServer(options: ServerOptions): Server {
  const app = express();
  const startSeconds = options.wallClock() / 1000;
  app.disable('x-powered-by');
  app.disable('etag');
  app.use(requestId, accessLog(options.log));

  route(app, 'get', '/livez', (_request, response) => {
    response.json({ status: 'ok' });
  });
  const readyz: RequestHandler = (_request, response) => {
    if (options.engine.isDraining) throw new EngineError('draining', 'the engine is draining');
    if (!options.isReady()) throw new EngineError('not_ready', 'the engine is loading');
    response.json({ status: 'ok' });
  };
  route(app, 'get', enginePaths.readyz, readyz);
  route(app, 'get', '/health', readyz); // vLLM's name for it
  route(app, 'get', enginePaths.metrics, async (_request, response) => {
    const { registry } = options.metrics;
    response.type(registry.contentType).send(await registry.metrics());
  });

  if (options.apiKeys || options.callers) app.use(bearer(options.apiKeys ?? [], options.callers));
  const body = jsonBody(options.maxBodyBytes);

  route(app, 'post', enginePaths.chat, body, async (request, response) => {
    const body = parseChat(request.body);
    const job = await chatJob(options, body, parseServed(request.headers, body));
    const { toolForm } = options.text;
    const format = body.toolUse ? chatFormatOf(() => new ToolCallReader(toolForm)) : chatFormat;
    await reply(options, job, format, request, response);
  });
  route(app, 'post', enginePaths.completions, body, async (request, response) => {
    const body = parseCompletion(request.body);
    const job = await completionJob(options, body, parseServed(request.headers, body));
    await reply(options, job, completionFormat, request, response);
  });
  route(app, 'post', enginePaths.embeddings, body, async (request, response) => {
    await replyEmbeddings(options, request, response);
  });
  route(app, 'get', enginePaths.models, (_request, response) => {
    response.json(modelList(options, startSeconds));
  });
  route(app, 'get', enginePaths.adapters, (request, response) => {
    response.json(adapterList(options, senderOf(request)));
  });
  route(app, 'delete', `${enginePaths.adapters}/:digest`, async (request, response) => {
    response.json(await removeAdapter(options, request.params.digest as string, request.query));
  });
  route(app, 'post', enginePaths.loadAdapter, body, async (request, response) => {
    response.type('text/plain').send(await loadAdapter(options, request.body));
  });
  route(app, 'post', enginePaths.unloadAdapter, body, (request, response) => {
    const { name } = parseUnloadAdapter(request.body);
    options.tiers.unload(name);
    options.log.info({ name }, 'adapter unloaded');
    response.type('text/plain').send(`Success: LoRA adapter '${name}' removed successfully.`);
  });
  route(app, 'post', enginePaths.tokenize, body, (request, response) => {
    response.json(tokenize(options, request));
  });
  route(app, 'post', enginePaths.detokenize, body, (request, response) => {
    const { tokens } = parseDetokenize(request.body);
    checkTokens(tokens, options.text.vocabSize, 'tokens');
    response.json({ prompt: options.text.decode(tokens, { skipSpecialTokens: false }) });
  });

  app.use((request: Request) => {
    throw new EngineError('path_not_found', `there is no ${request.method} ${request.path}`);
  });
  app.use((thrown: unknown, request: Request, response: Response, _next: NextFunction) => {
    sendError(inFieldsOf(request.path, toEngineError(thrown)), request, response, options.log);
  });

  return createHttpServer({ keepAliveTimeout: 65_000 }, app);
}

/** One path, one method; other methods get 405. */
function route(
  app: express.Express,
  method: 'get' | 'post' | 'delete',
  path: string,
  ...handlers: (RequestHandler | RequestHandler[])[]
): void {
  const allowed = method === 'get' ? ['GET', 'HEAD'] : [method.toUpperCase()];
  app.all(path, (request, response, next) => {
    if (allowed.includes(request.method)) return next();
    response.set('allow', allowed.join(', '));
    throw new EngineError('method_not_allowed', `${path}: expected ${allowed[0]}, got ${request.method}`);
  });
  app[method](path, ...handlers);
}

const requestId: RequestHandler = (request, response, next) => {
  const given = request.get('x-request-id');
  response.set('x-request-id', given && /^[\x21-\x7e]{1,128}$/.test(given) ? given : randomUUID());
  next();
};

/** One line a request at level debug. */
function accessLog(log: Logger): RequestHandler {
  return function accessLog(request, response, next) {
    const { method, path } = request;
    const beginMs = performance.now();
    response.on('close', () => {
      const requestId = response.get('x-request-id');
      const ms = Math.round(performance.now() - beginMs);
      log.debug({ requestId, method, path, status: response.statusCode, ms }, 'request');
    });
    next();
  };
}

/** A known key, or a token of a caller that is trusted. Keys are compared by their hashes, in constant time. */
function bearer(keys: readonly string[], callers: ServerOptions['callers']): RequestHandler {
  const hash = (key: string) => createHash('sha256').update(key).digest();
  const hashes = keys.map(hash);
  return async function bearer(request, _response, next) {
    const [scheme, key = ''] = (request.get('authorization') ?? '').split(' ');
    const isBearer = scheme?.toLowerCase() === 'bearer' && key !== '';
    const given = hash(key);
    const isKnown = hashes.filter((known) => timingSafeEqual(known, given)).length > 0;
    if (isBearer && !isKnown && callers) await callers.check(key);
    else if (!isBearer || !isKnown) {
      throw new EngineError('unauthorized', 'expected Authorization: Bearer with a known key');
    }
    next();
  };
}

/**
 * Reads a JSON body. The media type is required: a web page may send other types here without asking its browser's
 * permission first. UTF-8 is checked: wrong bytes would become other text in silence.
 */
function jsonBody(maxBodyBytes: number): RequestHandler[] {
  return [
    express.raw({ type: () => true, limit: maxBodyBytes }),
    (thrown: unknown, _request: Request, _response: Response, _next: NextFunction) => {
      const { type, limit } = thrown as { type?: string; limit?: number };
      if (type === 'entity.too.large') {
        throw new EngineError('body_too_large', `body: expected at most ${limit} bytes, got more`, {
          cause: thrown,
        });
      }
      if (type === 'encoding.unsupported') {
        throw new EngineError(
          'unsupported_media_type',
          'content-encoding: expected identity, gzip, deflate or br',
        );
      }
      throw new EngineError('invalid_json', 'body: expected it whole and as its headers say', {
        cause: thrown,
      });
    },
    (request: Request, _response: Response, next: NextFunction) => {
      if (!request.is(['json', '+json'])) {
        const got = request.get('content-type') ?? 'none';
        throw new EngineError(
          'unsupported_media_type',
          `content-type: expected application/json, got ${got}`,
        );
      }
      try {
        request.body = JSON.parse(new TextDecoder('utf-8', { fatal: true }).decode(request.body));
      } catch (cause) {
        throw new EngineError('invalid_json', 'body: expected valid JSON in UTF-8', { cause });
      }
      next();
    },
  ] as RequestHandler[];
}

async function replyEmbeddings(options: ServerOptions, request: Request, response: Response): Promise<void> {
  const body = parseEmbeddings(request.body, options.hiddenSize);
  const served = parseServed(request.headers, body);
  const hangUp = new AbortController();
  response.on('close', () => hangUp.abort());
  const { vectors, numPromptTokens, numCachedTokens } = await embed(
    options,
    options.pooling,
    body,
    served,
    originOf(request),
    hangUp.signal,
  );
  if (response.destroyed) return;
  const usage = usageOf(numPromptTokens, 0, numCachedTokens);
  if (tellsUsage(request)) response.set(usageHeader, usageText(usage));
  response.json(embeddingsReply(body, body.model || options.baseName, vectors, usage));
}

/** Runs the job and answers, whole or as a stream. */
async function reply(
  options: ServerOptions,
  asked: Job,
  format: ReplyFormat,
  request: Request,
  response: Response,
): Promise<void> {
  if (response.destroyed) return;
  const job = { ...asked, ...originOf(request) };
  const hangUp = new AbortController();
  response.on('close', () => hangUp.abort());
  const letGo = await holdServed(options, job.served, hangUp.signal);
  let collected: ReturnType<typeof collect>;
  try {
    if (response.destroyed) return;
    if (job.request.stream) return stream(options, job, format, tellsUsage(request), response);
    collected = collect(options, job);
  } finally {
    letGo();
  }
  response.on('close', collected.cancel);
  const { choices: ended, usage } = await collected.choices;
  if (response.destroyed) return;
  if (tellsUsage(request)) response.set(usageHeader, usageText(usage));
  response.json(format.whole(replyHead(options, job, format), ended, usage, options.text));
}

function stream(
  options: ServerOptions,
  job: Job,
  format: ReplyFormat,
  tellsUsage: boolean,
  response: Response,
): void {
  const { text, log, maxBufferedBytes } = options;
  const events = format.stream(replyHead(options, job, format), text, job.request.includeUsage);
  let handles: readonly SequenceHandle[] = [];
  let numOpen = 0;

  const cancel = () => {
    for (const handle of handles) handle.cancel();
  };
  const write = (event: string) => {
    if (event === '' || response.destroyed || response.writableEnded) return;
    response.write(event);
    if (response.writableLength <= maxBufferedBytes) return;
    log.warn({ bytes: response.writableLength }, 'stream dropped: its client does not read');
    response.destroy();
    cancel();
  };
  const end = () => {
    if (tellsUsage) response.addTrailers({ [usageHeader]: usageText(jobUsage(job, handles)) });
    response.end();
  };

  handles = addJob(options, job, (index, output) => {
    if (output.text !== '' || output.logprobs || (output.finishReason && !output.error)) {
      write(events.delta(index, output));
    }
    if (!output.finishReason) return;
    numOpen--;
    if (output.error && !response.writableEnded) {
      // The status is sent: all that is left is an event with the error, then the end.
      write(eventOf(JSON.stringify(errorBody(output.error))));
      end();
      cancel();
    } else if (numOpen === 0) {
      if (job.request.includeUsage) write(events.usage(jobUsage(job, handles)));
      write(doneEvent);
      end();
    }
  });
  numOpen = handles.length;
  response.on('close', cancel);
  response.writeHead(200, {
    'content-type': 'text/event-stream; charset=utf-8',
    'cache-control': 'no-cache',
    'x-accel-buffering': 'no',
    ...(tellsUsage && { trailer: usageHeader }),
  });
  response.flushHeaders();
  for (let index = 0; index < handles.length; index++) write(events.begin(index));
}

/** @throws EngineError invalid_value naming the header */
function originOf(request: Request): { sender: string | null; standing: Standing } {
  const standing = parseStanding((name) => request.get(name));
  if ('at' in standing) {
    const { at, expected, got } = standing;
    throw new EngineError('invalid_value', `${at}: expected ${expected}, got ${got}`, { param: at });
  }
  return { sender: senderOf(request), standing };
}

function senderOf(request: Request): string | null {
  return request.get(senderHeader) ?? null;
}

function tellsUsage(request: Request): boolean {
  return /(?:^|,)\s*trailers\s*(?:,|$)/i.test(request.get('te') ?? '');
}

function usageText({ prompt_tokens, completion_tokens, prompt_tokens_details }: Usage): string {
  return formatUsage({
    promptTokens: prompt_tokens,
    cachedTokens: prompt_tokens_details.cached_tokens,
    completionTokens: completion_tokens,
  });
}

function replyHead({ baseName, wallClock }: ServerOptions, { request }: Job, format: ReplyFormat) {
  return { id: format.newId(), created: Math.floor(wallClock() / 1000), model: request.model || baseName };
}

async function loadAdapter(options: ServerOptions, body: unknown): Promise<string> {
  const { engine, tiers, sources, baseName, log } = options;
  const { name, path, digest, isInPlace, isPinned } = parseLoadAdapter(body);
  if (engine.isDraining)
    throw new EngineError('draining', 'the engine is draining', { retryAfterSeconds: 5 });
  if (name === baseName) {
    throw new EngineError(
      'adapter_already_loaded',
      `The name '${name}' is the base model's; it has already been loaded.`,
      {
        param: 'lora_name',
      },
    );
  }
  const adapter = await tiers.load(name, await sources.adapter(path, digest), isInPlace, isPinned);
  const { file, numPages, loadSeconds } = adapter;
  log.info({ name, digest: adapter.digest, rank: file.rank, pages: numPages, loadSeconds }, 'adapter loaded');
  return `Success: LoRA adapter '${name}' added successfully.`;
}

async function removeAdapter(
  options: ServerOptions,
  digest: string,
  query: unknown,
): Promise<PurgeReport | UnloadReport> {
  const { tiers, log } = options;
  const { isPurge } = parseRemoveAdapter(digest, query);
  if (isPurge) {
    const report = await purgeAdapter(options, digest);
    log.info(report, 'adapter purged');
    return report;
  }
  const names = tiers.unloadDigest(digest);
  if (names.length === 0) throw notHere(digest);
  log.info({ digest, names }, 'adapter unloaded');
  return { digest, names };
}

function modelList({ baseName, tiers, engine, modelSource }: ServerOptions, startSeconds: number): ModelList {
  const card = (id: string, root: string, parent: string | null, created: number): ModelCard => ({
    id,
    object: 'model',
    created: Math.floor(created),
    owned_by: 'motet',
    root,
    parent,
    max_model_len: engine.maxModelLen,
    permission: [],
  });
  const adapters = [...tiers.names].sort(([a], [b]) => (a < b ? -1 : 1));
  return {
    object: 'list',
    data: [
      card(baseName, shownUri(modelSource), null, startSeconds),
      ...adapters.map(([name, adapter]) => card(name, adapter.sourceUri, baseName, adapter.since)),
    ],
  };
}

/** @param sender  which gateway asks; null: nobody says */
function adapterList(
  { arena, baseName, blocks, engine, hostArena, merges, tiers }: ServerOptions,
  sender: string | null,
): AdapterList {
  const prefixCacheOf = (voice: string) => {
    const { queries, hits } = blocks.countsOf(voice);
    return { promptTokens: queries, cachedTokens: hits };
  };
  return {
    object: 'list',
    ...(merges && { merges: true }),
    arena: arenaUse(arena, blocks.numReclaimablePages),
    ...(hostArena && { hostArena: arenaUse(hostArena, 0) }),
    base: { name: baseName, prefixCache: prefixCacheOf(baseVoice), maxSequences: engine.maxSequences },
    data: tiers.statuses().map((status) => ({ ...status, prefixCache: prefixCacheOf(status.digest) })),
    loading: [...tiers.loadingNames].sort(),
    load: engine.load(sender),
  };
}

/** @param numCached  pages of KV that is only kept */
function arenaUse(arena: Arena, numCached: number): ArenaUse {
  const bytes = (numPages: number) => numPages * arena.pageBytes;
  return {
    totalBytes: bytes(arena.numPages),
    freeBytes: bytes(arena.numFree + numCached),
    cachedBytes: bytes(numCached),
    kvBytes: bytes(arena.numUsed('kv') - numCached),
    adapterBytes: bytes(arena.numUsed('adapter')),
  };
}

/** vLLM's shape. */
function tokenize(options: ServerOptions, { body, headers }: Request) {
  const request = parseTokenize(body);
  namedBy(options, parseServed(headers, { ...request, adapters: null, merge: null }));
  const tokens =
    'messages' in request
      ? chatTokens(options, request)
      : encode(options, request.prompt, request.addSpecialTokens);
  return {
    count: tokens.length,
    max_model_len: options.engine.maxModelLen,
    tokens: Array.from(tokens),
    token_strs: null,
  };
}

/** What the fields that become a prompt are called, where that is not `prompt`. */
const promptFields: Partial<Record<string, string>> = {
  [enginePaths.chat]: 'messages',
  [enginePaths.embeddings]: 'input',
};

/** The error as it names the fields of this path: what judges a prompt does not know what it came from. */
function inFieldsOf(path: string, error: EngineError): EngineError {
  const { code, message, retryAfterSeconds, cause } = error;
  const param = promptFields[path];
  if (error.param !== 'prompt' || param === undefined) return error;
  return new EngineError(code, message, { param, retryAfterSeconds, cause });
}

function sendError(error: EngineError, request: Request, response: Response, log: Logger): void {
  const { code } = error;
  const { status, isRetryable } = errorTable[code];
  if (status >= 500) log.warn({ code, path: request.path, err: error.cause }, error.message);
  if (response.headersSent || response.destroyed) {
    response.destroy();
    return;
  }
  // What is left of an unread body would be taken for the next request.
  if (!request.complete) response.set('connection', 'close');
  if (isRetryable) response.set('retry-after', String(error.retryAfterSeconds));
  response.status(status).json(errorBody(error));
}
