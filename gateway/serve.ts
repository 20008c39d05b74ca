// The HTTP server, and how it ends without losing a request. On drain the port is closed, and what comes in on
// connections that are open is still answered, with `Connection: close`. A connection that is idle is not cut at once: a
// request may be on its way.

import { once } from 'node:events';
import { createServer, type RequestListener, type ServerResponse } from 'node:http';
import { type AddressInfo, Server, type Socket } from 'node:net';
import { setImmediate as nextTurn, setTimeout as sleep } from 'node:timers/promises';
import { Bag } from './bag.ts';

export type Serving = {
  port: number;
  /**
   * Takes no more connections; resolves when the last one has ended. `cutOff` is called when requests in flight have had
   * `timeoutMs`: they get a moment to say so to their clients and are then ended.
   */
  drain(timeoutMs: number, cutOff: () => void): Promise<void>;
};

/**
 * How long a connection may be idle, as its client is told; the server waits a second longer. Longer than the 60 s of most
 * load balancers: whoever closes first must be the side that knows whether it is about to send.
 */
const keepAliveMs = 75_000;
/** The same on drain. What is idle for so long then is not about to be used. */
const drainKeepAliveMs = 5_000;
/** A client may have opened a connection ahead of need; what it sends on it at once is still answered. */
const unusedGraceMs = 500;
/** For error events to leave, and for what was cut off to be noted. */
const farewellMs = 500;

/** What one client may take of the server. Beyond it the answer is 408 or 431, and its connection is closed. */
export type ClientBounds = {
  /** Request line and headers together. */
  maxHeaderBytes: number;
  /** From the connection, or the end of the request before, to the last header; also for a client that sends nothing. */
  headersMs: number;
  /** From there to the last byte of the body. A file of 200 MB needs 5.3 Mbit/s. */
  requestMs: number;
  /** Between two looks at who is too slow. */
  checkMs: number;
};

const clientBounds: ClientBounds = {
  maxHeaderBytes: 16 << 10,
  headersMs: 20_000,
  requestMs: 300_000,
  checkMs: 5_000,
};

export async function serve(
  listener: RequestListener,
  port: number,
  host: string,
  { maxHeaderBytes, headersMs, requestMs, checkMs }: ClientBounds = clientBounds,
): Promise<Serving> {
  const server = createServer(
    {
      keepAliveTimeout: keepAliveMs,
      maxHeaderSize: maxHeaderBytes,
      headersTimeout: headersMs,
      requestTimeout: requestMs,
      connectionsCheckingInterval: checkMs,
      insecureHTTPParser: false,
      requireHostHeader: true,
    },
    listener,
  );
  // Connections on which nothing was asked yet.
  const unused = new Set<Socket>();
  const unanswered = new Bag<ServerResponse>();
  let isDraining = false;
  server.on('connection', (socket) => {
    unused.add(socket);
    socket.on('close', () => unused.delete(socket));
  });
  server.prependListener('request', (req, res) => {
    unused.delete(req.socket);
    if (isDraining) res.shouldKeepAlive = false;
    res.on('close', unanswered.add(res));
  });
  server.listen(port, host);
  await once(server, 'listening');

  return {
    port: (server.address() as AddressInfo).port,
    async drain(timeoutMs, cutOff) {
      isDraining = true;
      server.keepAliveTimeout = drainKeepAliveMs;
      for (const res of unanswered.values()) if (!res.headersSent) res.shouldKeepAlive = false;
      const closed = once(server, 'close');
      // Not the HTTP server's own `close`: it would cut idle connections.
      Server.prototype.close.call(server);
      const unusedTimer = setTimeout(() => {
        for (const socket of unused) socket.destroy();
      }, unusedGraceMs);
      const idleTimer = setTimeout(() => server.closeIdleConnections(), drainKeepAliveMs);
      const timeLeft = new AbortController();
      const inTime = await Promise.race([
        closed.then(() => true),
        sleep(timeoutMs, false, { signal: timeLeft.signal }).catch(() => false),
      ]);
      timeLeft.abort();
      clearTimeout(unusedTimer);
      clearTimeout(idleTimer);
      if (!inTime) {
        cutOff();
        const sweep = setInterval(() => server.closeIdleConnections(), 10);
        await Promise.race([closed, sleep(farewellMs, undefined, { ref: false })]);
        clearInterval(sweep);
        server.closeAllConnections();
        await closed;
      }
      // The answers on the last connections end a little after them, and are still to be noted.
      for (const endMs = performance.now() + farewellMs; unanswered.size > 0 && performance.now() < endMs; )
        await nextTurn();
      // Ends its own timers.
      server.close();
    },
  };
}
