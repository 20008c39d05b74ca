// The routes of LoRAX's and TGI's clients. Who may use which model is judged as for OpenAI's: only bodies are others.

import { randomInt } from 'node:crypto';
import type { IncomingMessage, ServerResponse } from 'node:http';
import type { Express, Response } from 'express';
import type { ModelCard } from '../../engine/protocol.ts';
import { type GatewayError, sendJson } from '../errors.ts';
import { parseContentType, parseJsonObject } from '../openai.ts';
import { type LoraxRequest, loraxError, parseLorax } from './lorax.ts';
import { noClassifier, parseEmbed } from './lorax-embed.ts';

/** By path, whether the answer is a stream; null: as the body says. */
const generatePaths = { '/generate': false, '/generate_stream': true, '/': null } as const;

/** Known, and answered by a refusal. */
const classifyPaths = ['/classify', '/classify_batch'];

/** Of the paths below, those that take a body. */
export const loraxPostPaths: string[] = [...Object.keys(generatePaths), '/embed', ...classifyPaths];
export const loraxPaths: readonly string[] = [...loraxPostPaths, '/info', '/health'];

export type LoraxParts = {
  readBody(res: Response): Promise<Buffer>;
  /** Of the models that the caller of this request may use. */
  cards(res: Response): ModelCard[];
  /** Sends it to an engine and the answer to the client. */
  send(request: LoraxRequest, res: Response): Promise<void>;
};

/** Before the door: it tells nothing but whether requests are taken, which they are when `notReady` says null. */
export function addHealth(app: Express, notReady: () => GatewayError | null): void {
  app.get('/health', (_req, res) => {
    if (notReady() === null) res.end();
    else res.status(503).json({ error: 'unhealthy', error_type: 'healthcheck' });
  });
}

/** Behind the door. */
export function addLoraxRoutes(app: Express, { readBody, cards, send }: LoraxParts): void {
  const newSeed = () => randomInt(2 ** 32);
  for (const [path, wantsStream] of Object.entries(generatePaths)) {
    app.post(path, async (req, res) => {
      const body = bodyOf(req, await readBody(res));
      await send(parseLorax(body, basesOf(cards(res)), wantsStream, newSeed), res);
    });
  }
  app.post('/embed', async (req, res) => {
    const body = bodyOf(req, await readBody(res));
    await send(parseEmbed(body, basesOf(cards(res))), res);
  });
  app.post(classifyPaths, (req) => {
    throw noClassifier(req.path);
  });
  app.get('/info', (_req, res) => {
    const bases = cards(res).filter(({ parent }) => parent === null);
    const [first] = bases;
    res.json({
      model_id: first?.id ?? '',
      model_sha: null,
      model_dtype: '',
      model_device_type: '',
      model_pipeline_tag: 'text-generation',
      max_total_tokens: first?.max_model_len ?? 0,
      max_input_length: Math.max(0, (first?.max_model_len ?? 0) - 1),
      max_best_of: 16,
      max_stop_sequences: 16,
      version: 'motet',
      router: 'motet',
    });
  });
}

function bodyOf({ headers }: IncomingMessage, body: Buffer): Record<string, unknown> {
  parseContentType(headers['content-type']);
  return parseJsonObject(body);
}

/** Whether an error on this path is told in this protocol. */
export function isLoraxPath(path: string): boolean {
  return loraxPaths.includes(path);
}

export function sendLoraxError(res: ServerResponse, failure: GatewayError): void {
  const { status, body } = loraxError(failure);
  const { retryAfterS } = failure.row;
  sendJson(res, status, body, {
    ...(retryAfterS !== undefined && { 'Retry-After': String(retryAfterS) }),
    ...(status === 401 && { 'WWW-Authenticate': 'Bearer' }),
  });
}

function basesOf(cards: readonly ModelCard[]): string[] {
  return cards.filter(({ parent }) => parent === null).map(({ id }) => id);
}
