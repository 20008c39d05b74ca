import { once } from 'node:events';
import { createServer, type Server } from 'node:http';
import type { AddressInfo } from 'node:net';
import { setImmediate as nextTurn } from 'node:timers/promises';
import { expect, onTestFinished, test, vi } from 'vitest';
import { EnginePools } from '../../gateway/engine-pools.ts';
import { Exchange } from '../../gateway/exchange.ts';
import { Turns } from '../../gateway/turns.ts';

/** Answers `/now` at once and anything else never. */
async function startEngine(): Promise<{
  server: Server;
  origin: string;
  numOpened(): number;
  numHeld(): number;
}> {
  let numOpened = 0;
  let numHeld = 0;
  const server = createServer((req, res) => {
    if (req.url === '/now') res.end('now');
    else numHeld += 1;
  });
  server.on('connection', () => {
    numOpened += 1;
  });
  await once(server.listen(0, '127.0.0.1'), 'listening');
  onTestFinished(() => {
    server.closeAllConnections();
    server.close();
  });
  const origin = `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
  return { server, origin, numOpened: () => numOpened, numHeld: () => numHeld };
}

function startPools(): EnginePools {
  const pools = new EnginePools({ connect: { timeout: 1000 } });
  onTestFinished(() => pools.destroy());
  return pools;
}

function begin(pools: EnginePools, origin: string, path: string): Exchange {
  const exchange = new Exchange(new Turns());
  exchange.send(pools, { origin, path, method: 'GET' });
  return exchange;
}

async function ask(pools: EnginePools, origin: string): Promise<string> {
  const exchange = begin(pools, origin, '/now');
  await exchange.head;
  // The answer is here a moment before its connection is free.
  await nextTurn();
  return exchange.take().toString();
}

test('a connection carries one request after another, also after others were closed', async () => {
  const [pools, engine] = [startPools(), await startEngine()];
  for (let i = 0; i < 5; i++) expect(await ask(pools, engine.origin)).toBe('now');
  expect(engine.numOpened()).toBe(1);
  const held = Array.from({ length: 20 }, () => begin(pools, engine.origin, '/held'));
  await vi.waitFor(() => expect(engine.numHeld()).toBe(20), { timeout: 5_000 });
  const numOpened = engine.numOpened();
  for (const exchange of held) {
    exchange.abort(new Error('not wanted'));
    await expect(exchange.head).rejects.toThrow('not wanted');
  }
  for (let i = 0; i < 10; i++) expect(await ask(pools, engine.origin)).toBe('now');
  // undici tries another one where the first is not closed yet.
  expect(engine.numOpened()).toBeLessThanOrEqual(numOpened + 2);
});

test('the pool of an engine that is gone is forgotten when another is new', async () => {
  const pools = startPools();
  const [first, second, third, fourth] = [
    await startEngine(),
    await startEngine(),
    await startEngine(),
    await startEngine(),
  ];
  await ask(pools, first.origin);
  await ask(pools, second.origin);
  const held = begin(pools, third.origin, '/held');
  expect(pools.size).toBe(3);
  first.server.closeAllConnections();
  // Seen when its connections have closed on this side too.
  await vi.waitFor(async () => {
    await ask(pools, fourth.origin);
    fourth.server.closeAllConnections();
    const fifth = await startEngine();
    await ask(pools, fifth.origin);
    fifth.server.closeAllConnections();
    expect(pools.size).toBeLessThanOrEqual(4);
  });
  // One that comes back is asked again; one that is free or carries a request stayed.
  expect(await ask(pools, first.origin)).toBe('now');
  await ask(pools, second.origin);
  expect(second.numOpened()).toBe(1);
  expect(third.numOpened()).toBe(1);
  const failed = expect(held.head).rejects.toMatchObject({ code: 'UND_ERR_DESTROYED' });
  await pools.destroy();
  await failed;
  await expect(begin(pools, first.origin, '/now').head).rejects.toMatchObject({ code: 'UND_ERR_DESTROYED' });
  expect(pools.size).toBe(0);
});
