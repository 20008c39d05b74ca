// Probes and metrics over HTTP. A standby is ready too: it does what it is there for.

import { once } from 'node:events';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import express from 'express';
import type { Registry } from 'prom-client';

export interface OperatorServer {
  port: number;
  close(): Promise<void>;
}

export async function serve(
  { host, port }: { host: string; port: number },
  registry: Registry,
  isReady: () => boolean,
): Promise<OperatorServer> {
  const app = express().disable('x-powered-by');
  app.get('/livez', (_, res) => void res.send('ok\n'));
  app.get('/readyz', (_, res) => {
    if (isReady()) res.send('ok\n');
    else res.status(503).send('the API server has not been heard yet\n');
  });
  app.get('/metrics', async (_, res) => {
    res.type(registry.contentType).send(await registry.metrics());
  });
  const server = createServer(app);
  server.listen(port, host);
  await once(server, 'listening');
  return {
    port: (server.address() as AddressInfo).port,
    async close() {
      const closed = once(server, 'close');
      server.close();
      server.closeAllConnections();
      await closed;
    },
  };
}
