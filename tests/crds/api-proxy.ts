/**
 * A TCP proxy before a real API server, to lose the server in the ways a network does: refused, cut, or silent. TLS
 * passes through it, so what is behind it is verified as ever.
 */
import { once } from 'node:events';
import { type AddressInfo, connect, createServer, type Socket } from 'node:net';
import { KubeConfig } from '@kubernetes/client-node';
import { onTestFinished } from 'vitest';
import type { ControlPlane } from '../fixtures/control-plane.ts';

export interface ApiProxy {
  /** Administrator, through the proxy. */
  kubeConfig: KubeConfig;
  /** Connections taken so far. */
  numConnections: number;
  /** Connections now open. */
  numOpen: number;
  /** Ends every connection and, until `restore`, each new one at once. */
  cut(): void;
  /** Takes connections and bytes and, until `restore`, passes nothing on. What was open stays silent for ever. */
  stall(): void;
  restore(): void;
}

export function kubeConfigOf(plane: ControlPlane): KubeConfig {
  const kubeConfig = new KubeConfig();
  kubeConfig.loadFromFile(plane.kubeconfig);
  return kubeConfig;
}

export async function startApiProxy(plane: ControlPlane): Promise<ApiProxy> {
  const target = new URL(kubeConfigOf(plane).getCurrentCluster()!.server);
  const sockets = new Set<Socket>();
  let state: 'open' | 'cut' | 'stalled' = 'open';
  const server = createServer((client) => {
    proxy.numConnections++;
    proxy.numOpen++;
    client.on('close', () => proxy.numOpen--);
    hold(client);
    if (state === 'cut') client.destroy();
    if (state !== 'open') return;
    const upstream = hold(connect({ port: Number(target.port), host: target.hostname, noDelay: true }));
    client.setNoDelay();
    client.pipe(upstream).pipe(client);
    client.on('close', () => upstream.destroy());
    upstream.on('close', () => client.destroy());
  });
  const hold = (socket: Socket) => {
    sockets.add(socket);
    return socket.on('error', () => {}).on('close', () => sockets.delete(socket));
  };
  server.listen(0, '127.0.0.1');
  await once(server, 'listening');
  onTestFinished(() => {
    server.close();
    for (const socket of sockets) socket.destroy();
  });
  const { clusters, users, contexts, currentContext } = kubeConfigOf(plane);
  const kubeConfig = new KubeConfig();
  kubeConfig.loadFromOptions({
    clusters: clusters.map((cluster) => ({
      ...cluster,
      server: `https://127.0.0.1:${(server.address() as AddressInfo).port}`,
    })),
    users,
    contexts,
    currentContext,
  });
  const proxy: ApiProxy = {
    kubeConfig,
    numConnections: 0,
    numOpen: 0,
    cut() {
      state = 'cut';
      for (const socket of sockets) socket.destroy();
    },
    stall() {
      state = 'stalled';
      for (const socket of sockets) socket.unpipe().pause();
    },
    restore() {
      state = 'open';
    },
  };
  return proxy;
}
