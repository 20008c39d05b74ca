import { once } from 'node:events';
import { createServer, type Server } from 'node:http';
import type { AddressInfo, Socket } from 'node:net';
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';
import { Connections } from '../../gateway/connections.ts';
import { Exchange } from '../../gateway/exchange.ts';

/** Answers /now at once and /held when `release` is called; counts the connections. */
let server: Server;
let origin: string;
let open: Set<Socket>;
let numOpened: number;
let held: (() => void)[];
let connections: Connections;

beforeEach(async () => {
  open = new Set();
  numOpened = 0;
  held = [];
  server = createServer((req, res) => {
    if (req.url === '/now') res.end('now');
    else held.push(() => res.end('held'));
  });
  server.on('connection', (socket) => {
    numOpened += 1;
    open.add(socket);
    socket.on('close', () => open.delete(socket));
  });
  await once(server.listen(0, '127.0.0.1'), 'listening');
  origin = `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
  connections = new Connections({ connect: { timeout: 1000 } });
});

afterEach(async () => {
  await connections.destroy();
  server.closeAllConnections();
  server.close();
});

function begin(path: string): Exchange {
  const exchange = new Exchange(connections, origin);
  exchange.send({ path, method: 'GET' });
  return exchange;
}

async function ask(path: string): Promise<string> {
  const exchange = begin(path);
  await exchange.head;
  return exchange.take().toString();
}

const hold = async (count: number) => {
  const exchanges = Array.from({ length: count }, () => begin('/held'));
  await vi.waitFor(() => expect(held).toHaveLength(count));
  return exchanges;
};

describe('connections', () => {
  it('carry one request after another', async () => {
    for (let i = 0; i < 5; i++) expect(await ask('/now')).toBe('now');
    expect(numOpened).toBe(1);
  });

  it('carry one request at a time', async () => {
    const exchanges = await hold(3);
    expect(await ask('/now')).toBe('now');
    expect(numOpened).toBe(4);
    for (const release of held) release();
    for (const exchange of exchanges) expect((await exchange.head).status).toBe(200);
    await ask('/now');
    expect(numOpened).toBe(4);
  });

  it('are closed when their request is not wanted any more, and the others stay', async () => {
    const [first, second] = await hold(2);
    first!.abort(new Error('not wanted'));
    await expect(first!.head).rejects.toThrow('not wanted');
    await vi.waitFor(() => expect(open.size).toBe(1));
    held[1]!();
    expect((await second!.head).status).toBe(200);
    expect(await ask('/now')).toBe('now');
    expect(numOpened).toBe(2);
  });

  it('are closed when the request was let go before they stood', async () => {
    const exchange = begin('/held');
    exchange.abort(new Error('too late'));
    await expect(exchange.head).rejects.toThrow('too late');
    await vi.waitFor(() => expect(open.size).toBe(0));
    expect(await ask('/now')).toBe('now');
  });

  it('that the engine closed while they were free are not taken', async () => {
    await ask('/now');
    server.closeAllConnections();
    await vi.waitFor(() => expect(open.size).toBe(0));
    for (let i = 0; i < 3; i++) expect(await ask('/now')).toBe('now');
    expect(numOpened).toBe(2);
  });

  it('stay open in a bounded number when they are free', async () => {
    await hold(300);
    for (const release of held) release();
    await vi.waitFor(() => expect(open.size).toBe(256));
    expect(await ask('/now')).toBe('now');
    expect(numOpened).toBe(300);
  });

  it('that cannot be made fail the request with what the system says', async () => {
    server.close();
    await once(server, 'close');
    const exchange = begin('/now');
    await expect(exchange.head).rejects.toMatchObject({ code: 'ECONNREFUSED' });
  });

  it('end with what they carry when all are destroyed', async () => {
    const [exchange] = await hold(1);
    await connections.destroy();
    await expect(exchange!.head).rejects.toThrow();
    await vi.waitFor(() => expect(open.size).toBe(0));
  });
});
