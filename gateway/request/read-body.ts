// The body of a request, whole and bounded.

import type { IncomingMessage } from 'node:http';
import { GatewayError } from '../errors.ts';
import type { Arrival } from './arrival.ts';

/**
 * @throws unsupported_content_encoding, body_too_large, incomplete_body. What is left of a body that is too large is not read: the
 *   connection is to be closed.
 */
export async function readBody({ req, facts }: Arrival, maxBytes: number): Promise<Buffer> {
  const encoding = req.headers['content-encoding'] ?? 'identity';
  if (encoding.toLowerCase() !== 'identity') {
    throw new GatewayError(
      'unsupported_content_encoding',
      'Content-Encoding: expected none, got a compressed body',
    );
  }
  const length = Number(req.headers['content-length'] ?? 0);
  if (length > maxBytes) throw tooLarge(maxBytes, `${length} bytes`);
  const body = await readAll(req, maxBytes);
  facts.requestBytes = body.length;
  return body;
}

function readAll(req: IncomingMessage, maxBytes: number): Promise<Buffer> {
  return new Promise((resolve, reject) => {
    const chunks: Buffer[] = [];
    let numBytes = 0;
    req.on('data', (chunk: Buffer) => {
      chunks.push(chunk);
      numBytes += chunk.length;
      if (numBytes <= maxBytes) return;
      req.removeAllListeners('data');
      req.pause();
      reject(tooLarge(maxBytes, 'more'));
    });
    req.on('end', () => resolve(chunks.length === 1 ? chunks[0]! : Buffer.concat(chunks, numBytes)));
    // The client is gone, or broke the rules of HTTP.
    req.on('error', (cause) => {
      reject(new GatewayError('incomplete_body', 'request body: ended before its Content-Length', { cause }));
    });
  });
}

function tooLarge(maxBytes: number, actual: string): GatewayError {
  return new GatewayError(
    'body_too_large',
    `request body: expected at most ${maxBytes} bytes, got ${actual}`,
  );
}
