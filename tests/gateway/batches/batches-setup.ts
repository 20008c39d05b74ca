// A gateway with a folder for batches, the official client of a tenant, and lines to send.

import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import OpenAI, { toFile } from 'openai';
import { onTestFinished } from 'vitest';
import type { BatchSettings } from '../../../gateway/batches/start.ts';
import type { Config } from '../../../gateway/config.ts';
import type { FakeEngine, Script } from '../../fixtures/fake-engine.ts';
import { gatewayFor, until } from '../start-gateway.ts';

export function tempFolder(): string {
  const folder = mkdtempSync(join(tmpdir(), 'motet-batches-'));
  onTestFinished(() => rmSync(folder, { recursive: true, force: true }));
  return folder;
}

export function batchSettings(settings: Partial<BatchSettings> = {}): BatchSettings {
  return {
    ...{ store: tempFolder(), maxJobs: 4, linesPerEngine: 4, keepSeconds: 30 * 86_400, leaseMs: 1_000 },
    ...{ maxFileBytes: 1 << 20, maxTenantBytes: 4 << 20 },
    ...settings,
  };
}

export const keys = new Map([
  ['team-a', 'key-of-team-a-0123'],
  ['team-b', 'key-of-team-b-0123'],
]);

export async function gatewayWithBatches(
  engines: FakeEngine[],
  batches: Partial<BatchSettings> = {},
  settings: Partial<Config> = {},
) {
  return gatewayFor(engines, { apiKeys: keys, batches: batchSettings(batches), ...settings });
}

export function clientOf({ url }: { url: string }, tenant = 'team-a'): OpenAI {
  return new OpenAI({ baseURL: `${url}/v1`, apiKey: keys.get(tenant) ?? 'none', maxRetries: 0 });
}

export const endpoint = '/v1/chat/completions' as const;

export function line(id: string, fields: { model?: string; content?: string; url?: string } = {}): object {
  const { model = 'base', content = `question ${id}`, url = endpoint } = fields;
  const body = { model, messages: [{ role: 'user', content }] };
  return { custom_id: id, method: 'POST', url, body };
}

export const jsonl = (lines: unknown[]) => lines.map((each) => JSON.stringify(each)).join('\n');

/** Uploads the lines and begins a batch of them. */
export async function begin(client: OpenAI, lines: unknown[] | string, completionWindow = '24h') {
  const text = typeof lines === 'string' ? lines : jsonl(lines);
  const file = await client.files.create({
    purpose: 'batch',
    file: await toFile(Buffer.from(text), 'lines.jsonl'),
  });
  const completion_window = completionWindow as '24h';
  return client.batches.create({ input_file_id: file.id, endpoint, completion_window });
}

const ends = new Set(['completed', 'failed', 'expired', 'cancelled']);

export function ended(client: OpenAI, id: string, timeoutMs = 30_000) {
  return until(
    () => client.batches.retrieve(id),
    ({ status }) => ends.has(status),
    timeoutMs,
  );
}

export interface OutputLine {
  id: string;
  custom_id: string;
  // biome-ignore lint/suspicious/noExplicitAny: an engine's reply, whose fields the tests assert
  response: { status_code: number; request_id: string; body: any } | null;
  error: { code: string; message: string } | null;
}

export async function linesOf(client: OpenAI, fileId: string | undefined | null): Promise<OutputLine[]> {
  if (!fileId) return [];
  const text = await (await client.files.content(fileId)).text();
  return text
    .trimEnd()
    .split('\n')
    .map((each) => JSON.parse(each));
}

/** Answers with what was asked, so that an answer shows whose it is. */
export const echo: Script = ({ body, res }) => {
  const { model, messages } = JSON.parse(body.toString());
  const { content } = messages.at(-1);
  const choices = [{ index: 0, message: { role: 'assistant', content: `answer to ${content}` } }];
  const usage = { prompt_tokens: 7, completion_tokens: 2, prompt_tokens_details: { cached_tokens: 5 } };
  res.setHeader('content-type', 'application/json');
  res.end(JSON.stringify({ id: 'fake-1', object: 'chat.completion', model, choices, usage }));
};

/** The contents of the messages that an engine was asked, in order. */
export const asked = ({ received }: FakeEngine): string[] =>
  received.map(({ body }) => JSON.parse(body.toString()).messages.at(-1).content);
