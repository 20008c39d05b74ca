// OpenAI's /v1/files and /v1/batches. A tenant sees its own alone: every path of the store begins with the tenant.

import { pipeline } from 'node:stream/promises';
import type { Express, Request, RequestHandler, Response } from 'express';
import { GatewayError } from '../errors.ts';
import { parseContentType, parseJsonObject } from '../openai.ts';
import { arrivalOf } from '../request/arrival.ts';
import { readBody } from '../request/read-body.ts';
import type { Files } from './files.ts';
import type { Jobs, NewBatch } from './jobs.ts';
import { batchObject, fileObject, isId, type Page, unixSeconds } from './objects.ts';
import { keepFrom, receiveUpload } from './upload.ts';

export type BatchRoutes = {
  files: Files;
  jobs: Jobs;
  /** Paths that a line may ask for. */
  endpoints: readonly string[];
  maxFileBytes: number;
  keepSeconds: number;
  /** A batch was made or is to end. */
  onChange(): void;
};

const maxBatchBytes = 64 << 10;
/** At a time, of all tenants: each holds a part of its file in memory. */
const maxUploads = 8;
const maxWindowSeconds = 7 * 86_400;

const paths = {
  files: '/v1/files',
  file: '/v1/files/:id',
  content: '/v1/files/:id/content',
  batches: '/v1/batches',
  batch: '/v1/batches/:id',
  cancel: '/v1/batches/:id/cancel',
} as const;

/** The route of a path, for metrics; null: none of these. */
export function batchRouteOf(path: string): string | null {
  const [, v1, kind, id, rest, ...more] = path.split('/');
  if (v1 !== 'v1' || (kind !== 'files' && kind !== 'batches') || more.length > 0) return null;
  const known = [`/v1/${kind}`, ...(id === undefined ? [] : [':id']), ...(rest === undefined ? [] : [rest])];
  return Object.values<string>(paths).find((route) => route === known.join('/')) ?? null;
}

/** @param callerOf  the tenant of a request; null where nobody needs a key */
export function addBatchRoutes(
  app: Express,
  routes: BatchRoutes,
  callerOf: (res: Response) => string | null,
  onlyMethods: (methods: string) => RequestHandler,
): void {
  const { files, jobs, maxFileBytes, keepSeconds } = routes;
  let numUploads = 0;

  app.post(paths.files, async (req, res) => {
    if (numUploads >= maxUploads) {
      throw new GatewayError('too_many_uploads', `${maxUploads} files are being uploaded already`);
    }
    numUploads += 1;
    try {
      res.json(fileObject(await receiveUpload(req, callerOf(res), files, { maxFileBytes, keepSeconds })));
    } catch (error) {
      // What is left of the body is not read.
      res.set('Connection', 'close');
      throw error;
    } finally {
      numUploads -= 1;
    }
  });
  app.get(paths.files, async (req, res) => {
    const order = queryOf(req, 'order') ?? 'desc';
    if (order !== 'asc' && order !== 'desc') throw invalid('order', '`asc` or `desc`');
    const purpose = queryOf(req, 'purpose');
    const page = {
      after: afterOf(req, 'file-'),
      limit: limitOf(req, 10_000, 10_000),
      order,
      purpose,
    } as const;
    res.json(listOf(await files.list(callerOf(res), page), fileObject));
  });
  app.get(paths.file, async (req, res) => {
    res.json(fileObject(await files.get(callerOf(res), req.params.id)));
  });
  app.delete(paths.file, async (req, res) => {
    const { id } = await files.get(callerOf(res), req.params.id);
    if (await jobs.isInput(callerOf(res), id)) {
      throw new GatewayError(
        'file_in_use',
        'a batch that has not ended reads from this file; cancel it first',
      );
    }
    await files.remove(callerOf(res), id);
    res.json({ id, object: 'file', deleted: true });
  });
  app.get(paths.content, async (req, res) => {
    const file = await files.get(callerOf(res), req.params.id);
    const content = await files.content(callerOf(res), file.id);
    // Made by whoever uploaded it: not for a browser to run.
    res.set({ 'Content-Type': 'application/octet-stream', 'X-Content-Type-Options': 'nosniff' });
    res.set('Content-Length', String(file.bytes));
    await pipeline(content, res).catch((error: unknown) => {
      if (!res.headersSent) throw error;
      res.destroy();
    });
  });

  app.post(paths.batches, async (req, res) => {
    parseContentType(req.get('content-type'));
    const body = parseJsonObject(await readBody(arrivalOf(res), maxBatchBytes));
    const asked = parseNewBatch(body, routes);
    const file = await files.find(callerOf(res), asked.input_file_id);
    if (file === null) {
      const message = `No such File object: ${asked.input_file_id.slice(0, 64)}`;
      throw new GatewayError('file_not_found', message, { param: 'input_file_id' });
    }
    if (file.purpose !== 'batch') throw invalid('input_file_id', 'a file with the purpose `batch`');
    if (file.expires_at < unixSeconds(Date.now()) + asked.windowSeconds) {
      throw invalid('input_file_id', 'a file that is kept until the window ends');
    }
    const parts = await jobs.create(callerOf(res), asked);
    routes.onChange();
    res.json(batchObject(parts));
  });
  app.get(paths.batches, async (req, res) => {
    const page = { after: afterOf(req, 'batch_'), limit: limitOf(req, 20, 100) };
    res.json(listOf(await jobs.list(callerOf(res), page), batchObject));
  });
  app.get(paths.batch, async (req, res) => {
    res.json(batchObject(await jobs.get(callerOf(res), req.params.id)));
  });
  app.post(paths.cancel, async (req, res) => {
    const parts = await jobs.cancel(callerOf(res), req.params.id);
    routes.onChange();
    res.json(batchObject(parts));
  });

  app.all([paths.files, paths.batches], onlyMethods('GET, POST'));
  app.all(paths.file, onlyMethods('GET, DELETE'));
  app.all([paths.content, paths.batch], onlyMethods('GET'));
  app.all(paths.cancel, onlyMethods('POST'));
}

export function parseNewBatch(
  body: Record<string, unknown>,
  { endpoints, keepSeconds }: Pick<BatchRoutes, 'endpoints' | 'keepSeconds'>,
): NewBatch & { windowSeconds: number } {
  const { endpoint, input_file_id, completion_window, metadata, output_expires_after } = body;
  for (const name of ['input_file_id', 'endpoint', 'completion_window'] as const) {
    if (body[name] === undefined) {
      throw new GatewayError('missing_required_parameter', `${name}: expected a string, got nothing`, {
        param: name,
      });
    }
  }
  if (typeof input_file_id !== 'string') throw invalid('input_file_id', 'the id of a file');
  if (typeof endpoint !== 'string' || !endpoints.includes(endpoint)) {
    throw invalid('endpoint', `one of ${endpoints.join(', ')}`);
  }
  const windowSeconds = parseWindow(completion_window);
  const output_seconds =
    output_expires_after === undefined || output_expires_after === null
      ? keepSeconds
      : keepFrom(Object(output_expires_after), keepSeconds, 'output_expires_after');
  return {
    ...{
      endpoint,
      input_file_id,
      completion_window: String(completion_window),
      windowSeconds,
      output_seconds,
    },
    metadata: parseMetadata(metadata),
  };
}

/** OpenAI knows `24h`; others may be shorter or longer. */
function parseWindow(text: unknown): number {
  const [, count, unit] = /^([1-9]\d{0,4})([mhd])$/.exec(typeof text === 'string' ? text : '') ?? [];
  const seconds = Number(count) * { m: 60, h: 3600, d: 86_400 }[(unit ?? 'm') as 'm' | 'h' | 'd'];
  if (!(seconds <= maxWindowSeconds)) {
    throw invalid('completion_window', '`24h`, or another number of m, h or d of 7d at most');
  }
  return seconds;
}

function parseMetadata(value: unknown): Record<string, string> | null {
  if (value === undefined || value === null) return null;
  const expected = 'at most 16 pairs, with keys of at most 64 and strings of at most 512 characters';
  if (typeof value !== 'object' || Array.isArray(value)) throw invalid('metadata', expected);
  const pairs = Object.entries(value);
  const isFine = ([key, text]: [string, unknown]) =>
    key.length <= 64 && typeof text === 'string' && text.length <= 512;
  if (pairs.length > 16 || !pairs.every(isFine)) throw invalid('metadata', expected);
  return Object.fromEntries(pairs);
}

function listOf<T, O extends { id: string }>({ data, hasMore }: Page<T>, objectOf: (item: T) => O) {
  const objects = data.map(objectOf);
  return {
    object: 'list',
    data: objects,
    first_id: objects[0]?.id ?? null,
    last_id: objects.at(-1)?.id ?? null,
    has_more: hasMore,
  };
}

function queryOf(req: Request, name: string): string | null {
  const value = req.query[name];
  if (value === undefined) return null;
  if (typeof value !== 'string') throw invalid(name, 'one value');
  return value;
}

function limitOf(req: Request, defaultLimit: number, maxLimit: number): number {
  const text = queryOf(req, 'limit');
  if (text === null) return defaultLimit;
  const limit = /^\d{1,6}$/.test(text) ? Number(text) : 0;
  if (limit < 1 || limit > maxLimit) throw invalid('limit', `an integer from 1 to ${maxLimit}`);
  return limit;
}

function afterOf(req: Request, prefix: 'file-' | 'batch_'): string | null {
  const after = queryOf(req, 'after');
  if (after !== null && !isId(prefix, after)) throw invalid('after', `an id that begins with ${prefix}`);
  return after;
}

function invalid(param: string, expected: string): GatewayError {
  return new GatewayError('invalid_value', `${param}: expected ${expected}, got something else`, { param });
}
