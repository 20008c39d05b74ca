// A store in a bucket of S3, or of what speaks as it does and knows conditional writes (`If-None-Match: *`), as AWS and
// most others do. A log is a folder of objects, one an append, since an object cannot grow. Requests are signed by aws4fetch
// with the keys that engines find too (engine/sources/access.ts).

import { createHash } from 'node:crypto';
import { setTimeout as sleep } from 'node:timers/promises';
import { AwsV4Signer } from 'aws4fetch';
import { type Dispatcher, request } from 'undici';
import { httpsAgent } from '../../engine/download.ts';
import { type SourceAccess, s3Keys } from '../../engine/sources/access.ts';
import type { Appender, Range, Store, Stored } from './store.ts';

export type S3StoreOptions = { bucket: string; prefix: string; access: SourceAccess };

/** The least that S3 takes for a part of a large object, but its last. */
const partBytes = 8 << 20;
const timeoutMs = 30_000;
/** Of one request that fails in a way that passes, with waits of 0.2, 0.4, 0.8 s between. */
const maxTries = 4;
const maxReplyBytes = 4 << 20;
const limits = { stallMs: timeoutMs, maxTries, backoffMs: 200 };

type Reply = {
  status: number;
  headers: Dispatcher.ResponseData['headers'];
  body: Dispatcher.ResponseData['body'];
};
type Ask = { query?: Record<string, string>; headers?: Record<string, string>; body?: Buffer };

export class S3Store implements Store {
  readonly name: string;
  readonly #root: string;
  readonly #prefix: string;
  readonly #access: SourceAccess;
  readonly #agent: Dispatcher;

  constructor({ bucket, prefix, access }: S3StoreOptions) {
    const { endpoint, region } = access.s3;
    this.name = `s3://${bucket}/${prefix}`;
    // Path style: every server knows it, and so does AWS.
    this.#root = `${endpoint ?? `https://s3.${region}.amazonaws.com`}/${bucket}`;
    this.#prefix = prefix === '' ? '' : `${prefix}/`;
    this.#access = access;
    this.#agent = httpsAgent(timeoutMs, access.ca ?? undefined);
  }

  async read(key: string, range?: Range): Promise<AsyncIterable<Buffer> | null> {
    const headers: Record<string, string> =
      range === undefined ? {} : { range: `bytes=${range.offset}-${range.offset + range.length - 1}` };
    const reply = await this.#ask('GET', key, { headers });
    if (reply.status === 200 || reply.status === 206) return reply.body as AsyncIterable<Buffer>;
    if (reply.status !== 404) throw await this.#failure('GET', key, reply);
    await reply.body.dump();
    return null;
  }

  async put(key: string, content: Buffer | AsyncIterable<Buffer>): Promise<number> {
    if (Buffer.isBuffer(content)) {
      await this.#done('PUT', key, { body: content });
      return content.length;
    }
    const parts = inParts(content, partBytes);
    const first = await parts.next();
    if (first.done || first.value.isLast) {
      return this.put(key, first.done ? Buffer.alloc(0) : first.value.bytes);
    }
    return this.#putInParts(key, first.value.bytes, parts);
  }

  async create(key: string, content: Buffer): Promise<boolean> {
    const reply = await this.#ask('PUT', key, { headers: { 'if-none-match': '*' }, body: content });
    // 409: somebody else is writing it right now.
    if (![200, 409, 412].includes(reply.status)) throw await this.#failure('PUT', key, reply);
    await reply.body.dump();
    if (reply.status === 200) return true;
    // The first try may have arrived although its answer was lost.
    const there = await this.read(key);
    return there !== null && Buffer.concat(await Array.fromAsync(there)).equals(content);
  }

  appender(key: string): Appender {
    let numAppends = 0;
    return {
      append: async (bytes) => {
        await this.put(`${key}/${String(numAppends).padStart(8, '0')}`, bytes);
        numAppends += 1;
      },
      close: async () => {},
    };
  }

  async *readLog(key: string): AsyncIterable<Buffer> {
    for (const { key: part } of await this.list(`${key}/`)) {
      const content = await this.read(part);
      if (content !== null) yield* content;
    }
  }

  async list(prefix: string): Promise<Stored[]> {
    const found: Stored[] = [];
    const query: Record<string, string> = { 'list-type': '2', prefix: this.#prefix + prefix };
    for (;;) {
      const text = (await this.#done('GET', '', { query })).toString();
      for (const [, entry] of text.matchAll(/<Contents>(.*?)<\/Contents>/gs)) {
        const key = fieldOf(entry!, 'Key') ?? '';
        if (!key.startsWith(this.#prefix)) continue;
        found.push({ key: key.slice(this.#prefix.length), sizeBytes: Number(fieldOf(entry!, 'Size')) });
      }
      const next = fieldOf(text, 'NextContinuationToken');
      if (next === null || fieldOf(text, 'IsTruncated') !== 'true') return found;
      query['continuation-token'] = unescapeXml(next);
    }
  }

  async remove(key: string): Promise<void> {
    await this.#done('DELETE', key);
    await this.removeAll(`${key}/`);
  }

  async removeAll(prefix: string): Promise<void> {
    for (const { key } of await this.list(prefix)) await this.#done('DELETE', key);
  }

  async close(): Promise<void> {
    await this.#agent.destroy();
  }

  async #putInParts(
    key: string,
    first: Buffer,
    rest: AsyncGenerator<{ bytes: Buffer; isLast: boolean }>,
  ): Promise<number> {
    const begun = (await this.#done('POST', key, { query: { uploads: '' } })).toString();
    const uploadId = unescapeXml(fieldOf(begun, 'UploadId') ?? '');
    if (uploadId === '') throw new Error(`${this.name}/${key}: expected an UploadId, got none`);
    let sizeBytes = 0;
    const etags: string[] = [];
    const putPart = async (body: Buffer) => {
      const query = { partNumber: String(etags.length + 1), uploadId };
      const reply = await this.#ask('PUT', key, { query, body });
      if (reply.status !== 200) throw await this.#failure('PUT', key, reply);
      await reply.body.dump();
      etags.push(String(reply.headers.etag));
      sizeBytes += body.length;
    };
    try {
      await putPart(first);
      for await (const { bytes } of rest) await putPart(bytes);
      const list = etags.map(
        (etag, i) => `<Part><PartNumber>${i + 1}</PartNumber><ETag>${etag}</ETag></Part>`,
      );
      const body = Buffer.from(`<CompleteMultipartUpload>${list.join('')}</CompleteMultipartUpload>`);
      const end = (await this.#done('POST', key, { query: { uploadId }, body })).toString();
      // S3 says 200 before it knows.
      if (end.includes('<Error>')) throw new Error(`${this.name}/${key}: ${fieldOf(end, 'Code')}`);
      return sizeBytes;
    } catch (error) {
      await this.#done('DELETE', key, { query: { uploadId } }).catch(() => undefined);
      throw error;
    }
  }

  async #done(method: Dispatcher.HttpMethod, key: string, ask: Ask = {}): Promise<Buffer> {
    const reply = await this.#ask(method, key, ask);
    const isDone = reply.status < 300 || (method === 'DELETE' && reply.status === 404);
    if (!isDone) throw await this.#failure(method, key, reply);
    return bounded(reply.body);
  }

  /** The reply, once it is not one that may pass: those are tried again. */
  async #ask(method: Dispatcher.HttpMethod, key: string, ask: Ask): Promise<Reply> {
    for (let numTries = 1; ; numTries++) {
      try {
        const reply = await this.#askOnce(method, key, ask);
        if (numTries === maxTries || (reply.status < 500 && reply.status !== 429)) return reply;
        await reply.body.dump();
      } catch (error) {
        if (numTries === maxTries)
          throw new Error(`${method} ${this.name}/${key}: no answer`, { cause: error });
      }
      await sleep(100 * 2 ** numTries);
    }
  }

  async #askOnce(method: Dispatcher.HttpMethod, key: string, ask: Ask): Promise<Reply> {
    const { query = {}, headers = {}, body } = ask;
    const path = key === '' ? '' : `/${encodePath(this.#prefix + key)}`;
    const queryText = Object.entries(query)
      .map(([name, value]) => `${encode(name)}=${encode(value)}`)
      .sort()
      .join('&');
    const url = `${this.#root}${path}${queryText === '' ? '' : `?${queryText}`}`;
    const { statusCode: status, ...rest } = await request(url, {
      method,
      headers: await this.#signed(method, url, headers, body),
      dispatcher: this.#agent,
      headersTimeout: timeoutMs,
      bodyTimeout: timeoutMs,
      ...(body !== undefined && { body }),
    });
    return { status, headers: rest.headers, body: rest.body };
  }

  async #signed(
    method: string,
    url: string,
    headers: Record<string, string>,
    body: Buffer = Buffer.alloc(0),
  ): Promise<Record<string, string>> {
    const signal = AbortSignal.timeout(timeoutMs);
    const keys = await s3Keys(this.#access, { dispatcher: this.#agent, limits, signal });
    if (keys === null) return headers;
    const { accessKeyId, secretAccessKey, sessionToken } = keys;
    const signed = await new AwsV4Signer({
      ...{ url, method, service: 's3', region: this.#access.s3.region, accessKeyId, secretAccessKey },
      ...(sessionToken !== undefined && { sessionToken }),
      headers: { ...headers, 'x-amz-content-sha256': createHash('sha256').update(body).digest('hex') },
    }).sign();
    return Object.fromEntries(signed.headers);
  }

  async #failure(method: string, key: string, { status, body }: Reply): Promise<Error> {
    const code = fieldOf((await bounded(body).catch(() => '')).toString(), 'Code');
    return new Error(
      `${method} ${this.name}/${key}: the server answered ${status}${code ? ` (${code})` : ''}`,
    );
  }
}

async function bounded(body: AsyncIterable<Buffer>): Promise<Buffer> {
  const parts: Buffer[] = [];
  let numBytes = 0;
  for await (const part of body) {
    numBytes += part.length;
    if (numBytes > maxReplyBytes)
      throw new Error(`expected a reply of at most ${maxReplyBytes} bytes, got more`);
    parts.push(part);
  }
  return Buffer.concat(parts);
}

/** The bytes in pieces of one size, but the last. */
async function* inParts(
  content: AsyncIterable<Buffer>,
  sizeBytes: number,
): AsyncGenerator<{ bytes: Buffer; isLast: boolean }> {
  let held: Buffer[] = [];
  let numHeld = 0;
  for await (const bytes of content) {
    held.push(bytes);
    numHeld += bytes.length;
    while (numHeld > sizeBytes) {
      const all = Buffer.concat(held);
      yield { bytes: all.subarray(0, sizeBytes), isLast: false };
      held = [all.subarray(sizeBytes)];
      numHeld -= sizeBytes;
    }
  }
  yield { bytes: Buffer.concat(held), isLast: true };
}

/** As the signature has it. */
const encode = (text: string) =>
  encodeURIComponent(text).replace(/[!'()*]/g, (char) => `%${char.charCodeAt(0).toString(16).toUpperCase()}`);
const encodePath = (path: string) => path.split('/').map(encode).join('/');

const fieldOf = (xml: string, name: string) =>
  new RegExp(`<${name}>([^<]*)</${name}>`).exec(xml)?.[1] ?? null;

const entities: Record<string, string> = { lt: '<', gt: '>', quot: '"', apos: "'", amp: '&' };
const unescapeXml = (text: string) => text.replace(/&(\w+);/g, (whole, name) => entities[name] ?? whole);
