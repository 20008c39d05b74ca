// How the gateway says to engines who it is: with a key that is set once, or with a token of its ServiceAccount, which
// the kubelet replaces in its file before it runs out.

import { readFileSync } from 'node:fs';
import { senderHeader } from '../engine/protocol.ts';

/** The headers of a request to an engine, as of now. */
export type EngineHeaders = () => Record<string, string>;

/** The kubelet writes a new token when a fifth of the old one's life is left, which is minutes at least. */
const rereadMs = 10_000;

export function keyHeaders(key: string | null): EngineHeaders {
  const headers: Record<string, string> = key === null ? {} : bearer(key);
  return () => headers;
}

/** @throws when the file cannot be read now; later the token that was read last is kept */
export function tokenFileHeaders(path: string, nowMs: () => number = Date.now): EngineHeaders {
  let readMs = nowMs();
  let headers = bearer(readFileSync(path, 'utf8'));
  return () => {
    if (nowMs() - readMs < rereadMs) return headers;
    readMs = nowMs();
    try {
      headers = bearer(readFileSync(path, 'utf8'));
    } catch {
      // It is being replaced, or the volume is gone. An engine says when the old token is no longer good.
    }
    return headers;
  };
}

/** With the name of this gateway, by which engines tell its requests from those of others. */
export function withSender(sender: string, headers: EngineHeaders): EngineHeaders {
  let given: Record<string, string> | null = null;
  let all: Record<string, string> = {};
  return () => {
    const now = headers();
    if (now !== given) [given, all] = [now, { ...now, [senderHeader]: sender }];
    return all;
  };
}

function bearer(token: string): Record<string, string> {
  return { authorization: `Bearer ${token.trim()}` };
}
