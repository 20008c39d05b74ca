import { createHash } from 'node:crypto';
import { open, readFile, writeFile } from 'node:fs/promises';
import type { IncomingMessage, ServerResponse } from 'node:http';
import { join } from 'node:path';
import { describe, expect, onTestFinished, test } from 'vitest';
import { type DownloadOptions, download, httpsAgent } from '../../engine/download.ts';
import { EngineError } from '../../engine/errors.ts';
import { certificates, sendTruncated, startHttpsSource } from '../fixtures/https-source.ts';
import { temporaryFolder } from '../fixtures/source-files.ts';

const sha256 = (bytes: Uint8Array) => createHash('sha256').update(bytes).digest('hex');

/** Bytes that differ from place to place. */
function someBytes(size: number): Buffer {
  return Buffer.from(Uint8Array.from({ length: size }, (_, i) => (i * 31 + (i >> 8)) & 255));
}
const content = someBytes(3 * 2 ** 20 + 17);

/** Downloads into a new file, or into one that has `before` in it. */
async function fetchTo(
  url: string,
  options: Partial<DownloadOptions> = {},
  before: Uint8Array = Buffer.alloc(0),
) {
  const path = join(await temporaryFolder(), 'file');
  await writeFile(path, before);
  const dispatcher = httpsAgent(2000, certificates().ca);
  onTestFinished(() => dispatcher.destroy());
  const file = await open(path, 'r+');
  try {
    const result = await download(new URL(url), file, {
      dispatcher,
      limits: { stallMs: 5000, maxTries: 3, backoffMs: 1 },
      maxBytes: 2 ** 30,
      signal: new AbortController().signal,
      ...options,
    });
    return { ...result, bytes: await readFile(path) };
  } finally {
    await file.close();
  }
}

/** Serves `content` at /file, once `faults` are used up: one for each request. */
async function startSource(...faults: ((request: IncomingMessage, response: ServerResponse) => void)[]) {
  const source = await startHttpsSource({ '/file': content });
  source.fault = (request, response) => {
    const fault = faults.shift();
    fault?.(request, response);
    return fault !== undefined;
  };
  return { ...source, requests: source.requests, url: `${source.url}/file` };
}

const always = (fault: (request: IncomingMessage, response: ServerResponse) => void) =>
  startSource(...Array.from({ length: 100 }, () => fault));
const answer =
  (status: number, headers: Record<string, string | number> = {}) =>
  (_request: IncomingMessage, response: ServerResponse) =>
    void response.writeHead(status, headers).end();
const truncate = (numBytes: number) => (_request: IncomingMessage, response: ServerResponse) =>
  sendTruncated(response, content, numBytes);

describe('a download', () => {
  test('gives the bytes, their number and their sha256, and tells how far it is', async () => {
    const source = await startSource();
    const told: number[] = [];
    const result = await fetchTo(source.url, { onProgress: (done, size) => told.push(done / size!) });
    expect(result.bytes.equals(content)).toBe(true);
    expect(result).toMatchObject({ sizeBytes: content.length, sha256: sha256(content) });
    expect(told.at(-1)).toBe(1);
  });

  test('that is cut off goes on where it stopped', async () => {
    const source = await startSource(truncate(2 ** 20), answer(503));
    const result = await fetchTo(source.url);
    expect(result.sha256).toBe(sha256(content));
    expect(source.requests.map(({ range }) => range)[0]).toBe(undefined);
    expect(source.requests.at(-1)?.range).toMatch(/^bytes=[1-9]\d*-$/);
  });

  test('begins anew when the server knows no ranges', async () => {
    const whole = (_request: IncomingMessage, response: ServerResponse) =>
      void response.writeHead(200, { 'content-length': content.length }).end(content);
    const source = await startSource(truncate(1000), whole);
    const result = await fetchTo(source.url);
    expect(result.bytes.equals(content)).toBe(true);
  });

  test('begins anew when the file has changed in between', async () => {
    const changed = someBytes(5000).reverse();
    const versions: unknown[] = [];
    const source = await startSource(truncate(2 ** 20), (request, response) => {
      versions.push(request.headers['if-range']);
      response.writeHead(200, { 'content-length': changed.length, etag: '"two"' }).end(changed);
    });
    expect((await fetchTo(source.url)).sha256).toBe(sha256(changed));
    expect(versions).toEqual(['"one"']);
  });

  test('begins anew when another range comes than was asked for', async () => {
    const wrong = answer(206, { 'content-range': `bytes 7-9/${content.length}` });
    const source = await startSource(truncate(2000), wrong);
    expect((await fetchTo(source.url)).sha256).toBe(sha256(content));
  });

  test('goes on with what an earlier process left', async () => {
    const source = await startSource();
    const result = await fetchTo(source.url, {}, content.subarray(0, 2 ** 20 + 1));
    expect(result.sha256).toBe(sha256(content));
    expect(source.requests).toEqual([{ url: '/file', range: `bytes=${2 ** 20 + 1}-` }]);
  });

  test('needs no byte when an earlier process left all', async () => {
    const source = await startSource();
    expect((await fetchTo(source.url, {}, content)).sha256).toBe(sha256(content));
  });

  test.each([500, 503, 429, 408])('tries again after %d', async (status) => {
    const source = await startSource(answer(status), answer(status));
    expect((await fetchTo(source.url)).sha256).toBe(sha256(content));
    expect(source.requests.length).toBe(3);
  });

  test('tries a bounded number of times', async () => {
    const source = await always(answer(500));
    await expect(fetchTo(source.url)).rejects.toThrow(`${source.url}: the server answered 500`);
    expect(source.requests.length).toBe(3);
  });

  test('counts only tries that bring little', async () => {
    // Four cuts, each after more than a MiB: more than maxTries, and still no failure.
    const big = someBytes(8 * 2 ** 20);
    const source = await startHttpsSource({ '/file': big });
    let numCuts = 0;
    source.fault = (request, response) => {
      if (numCuts++ >= 4) return false;
      const begin = Number(/\d+/.exec(request.headers.range ?? '0')![0]);
      const part = big.subarray(begin);
      const range = `bytes ${begin}-${big.length - 1}/${big.length}`;
      response.writeHead(begin > 0 ? 206 : 200, { 'content-length': part.length, 'content-range': range });
      response.write(part.subarray(0, 1.5 * 2 ** 20), () => response.socket?.end());
      return true;
    };
    const result = await fetchTo(`${source.url}/file`, {
      limits: { stallMs: 5000, maxTries: 2, backoffMs: 1 },
    });
    expect(result.sha256).toBe(sha256(big));
    expect(source.requests.length).toBe(5);
  });

  test.each([404, 401, 403, 410])('does not try again after %d', async (status) => {
    const source = await always(answer(status));
    await expect(fetchTo(source.url)).rejects.toMatchObject({
      code: 'source_unavailable',
      message: `${source.url}: the server answered ${status}`,
    });
    expect(source.requests.length).toBe(1);
  });

  test.each([
    ['the headers', () => {}],
    ['the body', (_request: IncomingMessage, response: ServerResponse) => sendStalled(response)],
  ])('ends when no byte comes of %s', async (_name, fault) => {
    const source = await always(fault);
    const limits = { stallMs: 100, maxTries: 2, backoffMs: 1 };
    await expect(fetchTo(source.url, { limits })).rejects.toThrow('no byte came for 0.1 s');
    expect(source.requests.length).toBe(2);
  });

  test('ends when its time is over, though bytes trickle', async () => {
    const source = await always((_request, response) => {
      response.writeHead(200);
      const timer = setInterval(() => response.write('x'), 5);
      response.on('close', () => clearInterval(timer));
    });
    await expect(fetchTo(source.url, { signal: AbortSignal.timeout(300) })).rejects.toMatchObject({
      code: 'source_unavailable',
      message: expect.stringContaining('it took too long'),
    });
  });

  test('ends with the reason of who ends it, also while it waits to try again', async () => {
    const closing = new AbortController();
    const source = await always((request, response) => {
      answer(500)(request, response);
      setTimeout(() => closing.abort(new EngineError('draining', 'the engine is shutting down')), 20);
    });
    const limits = { stallMs: 5000, maxTries: 3, backoffMs: 60_000 };
    await expect(fetchTo(source.url, { signal: closing.signal, limits })).rejects.toMatchObject({
      code: 'draining',
    });
  });

  test('says which network error it met', async () => {
    const source = await startHttpsSource();
    await source.stop();
    await expect(fetchTo(`${source.url}/file`)).rejects.toThrow(`${source.url}/file: ECONNREFUSED`);
  });

  test('refuses a certificate that nobody it trusts has signed', async () => {
    const source = await startSource();
    const dispatcher = httpsAgent(2000);
    onTestFinished(() => dispatcher.destroy());
    await expect(fetchTo(source.url, { dispatcher })).rejects.toThrow(/its certificate is refused \(\w+\)/);
    expect(source.requests.length).toBe(0);
  });
});

describe('redirects', () => {
  test('are followed, five of them', async () => {
    const source = await startSource(...Array.from({ length: 5 }, () => answer(302, { location: '/file' })));
    expect((await fetchTo(source.url)).sha256).toBe(sha256(content));
    const endless = await always(answer(302, { location: '/file' }));
    await expect(fetchTo(endless.url)).rejects.toThrow('more than 5 redirects');
    expect(endless.requests.length).toBe(6);
  });

  test.each([
    ['to http', 'http://localhost/file', 'a redirect to http:'],
    ['to a file', 'file:///etc/passwd', 'a redirect to file:'],
    ['to nonsense', 'https://', 'a redirect to nowhere'],
  ])('are not followed %s', async (_name, location, message) => {
    const source = await always(answer(302, { location }));
    await expect(fetchTo(source.url)).rejects.toThrow(message);
    expect(source.requests.length).toBe(1);
  });
});

describe('sizes', () => {
  test('are checked before a byte is written', async () => {
    const source = await always((_request, response) => {
      response.writeHead(200, { 'content-length': '999999999999999999' });
      response.write('x');
    });
    await expect(fetchTo(source.url, { maxBytes: 1000 })).rejects.toMatchObject({
      code: 'adapter_invalid',
      message: expect.stringContaining('expected at most 1000 bytes, got 1000000000000000000'),
    });
  });

  test('hold where the server does not say how much comes', async () => {
    const source = await always((_request, response) => void response.writeHead(200).end(content));
    await expect(fetchTo(source.url, { maxBytes: 1000 })).rejects.toThrow('at most 1000 bytes, got more');
    expect((await fetchTo(source.url)).sha256).toBe(sha256(content));
  });

  test.each(['-1', 'abc', '1e3'])('that are no numbers (%s) are refused', async (length) => {
    const source = await always((_request, response) => {
      response.socket!.write(`HTTP/1.1 200 OK\r\ncontent-length: ${length}\r\n\r\nxyz`);
    });
    await expect(fetchTo(source.url)).rejects.toMatchObject({ code: 'source_unavailable' });
  });

  test('are told before the first byte, and may be refused', async () => {
    const source = await startSource();
    const onSize = async (sizeBytes: number, missingBytes: number) => {
      throw new EngineError('source_unavailable', `no room for ${sizeBytes}, ${missingBytes} missing`);
    };
    const before = content.subarray(0, 10);
    await expect(fetchTo(source.url, { onSize }, before)).rejects.toThrow(
      `no room for ${content.length}, ${content.length - 10} missing`,
    );
  });

  test('are of the bytes as they are: encodings are refused', async () => {
    const source = await always((_request, response) => {
      response.writeHead(200, { 'content-encoding': 'gzip' }).end('x');
    });
    await expect(fetchTo(source.url)).rejects.toThrow('content-encoding gzip, expected none');
  });
});

test('messages carry neither query nor password', async () => {
  const source = await always(answer(404));
  const thrown = await fetchTo(`${source.url}?signature=secret#secret`).catch((error) => error);
  expect(thrown.message).toBe(`${source.url}: the server answered 404`);
  expect(source.requests).toEqual([{ url: '/file?signature=secret', range: undefined }]);
});

function sendStalled(response: ServerResponse): void {
  response.writeHead(200, { 'content-length': 1000 });
  response.write('x');
}
