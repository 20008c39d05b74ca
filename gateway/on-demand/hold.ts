// Holds the client of a stream whose request waits long for an engine: after a while the answer is begun and comments are sent,
// `: waiting for an engine, 20 s`, which clients of server-sent events leave out. So nothing between us gives up on a
// connection that is silent. From then on an error can only be an event.

import type { ServerResponse } from 'node:http';

export type HoldLimits = {
  /** How long the client of a stream waits for the head of its answer. */
  holdAfterMs: number;
  everyMs: number;
};

/** Comments come this often: less than the minute after which most proxies give up. */
export const commentEveryMs = 5_000;

/**
 * @param isWaiting  the request has no engine yet
 * @returns ends the comments; to be called when the answer begins and in the end
 */
export function holdStream(
  res: ServerResponse,
  headers: Record<string, string>,
  isWaiting: () => boolean,
  { holdAfterMs, everyMs }: HoldLimits,
): () => void {
  const startMs = performance.now();
  let timer: NodeJS.Timeout;
  const say = () => {
    timer = setTimeout(say, everyMs);
    // A client that does not read gets no more of them.
    if (!isWaiting() || res.destroyed || res.writableNeedDrain) return;
    if (!res.headersSent) {
      res.writeHead(200, { ...headers, 'Content-Type': 'text/event-stream', 'Cache-Control': 'no-cache' });
    }
    res.write(`: waiting for an engine, ${Math.round((performance.now() - startMs) / 1000)} s\n\n`);
  };
  timer = setTimeout(say, holdAfterMs);
  return () => clearTimeout(timer);
}
