// forward.ts PORT HOST:PORT
// Listens on 127.0.0.1:PORT of this machine and passes each connection to an address on the cluster's network. That network is a
// namespace of the kernel and a process is in one, so there are two: this one outside, and one that `cluster.sh exec`
// starts inside. They meet at a socket in the file system, which both see.

import { spawn } from 'node:child_process';
import { mkdtempSync, rmSync } from 'node:fs';
import { connect, createServer, type NetConnectOpts, type Server } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { pipeline } from 'node:stream';

const [portOrSocket = '', address = '', side = 'outside'] = process.argv.slice(2);

if (side === 'inside') {
  const [host = '', port = ''] = address.split(':');
  passConnections({ host, port: Number(port) }).listen(portOrSocket, () => console.log('ready'));
  // Our end is that of the other side.
  process.stdin.resume().once('end', () => process.exit());
} else {
  if (!/^\d{1,5}$/.test(portOrSocket) || Number(portOrSocket) > 65_535) {
    console.error(`cluster: expected a port, not ${portOrSocket}`);
    process.exit(2);
  }
  const folder = mkdtempSync(join(tmpdir(), 'motet-forward-'));
  process.once('exit', () => rmSync(folder, { recursive: true }));
  for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) process.once(signal, () => process.exit());
  const path = join(folder, 'socket');
  const inside = spawn(
    join(import.meta.dirname, '../tests/cluster/cluster.sh'),
    ['exec', process.execPath, import.meta.filename, path, address, 'inside'],
    { stdio: ['pipe', 'pipe', 'inherit'] },
  );
  inside.once('exit', (code) => process.exit(code ?? 1));
  inside.stdout.once('data', () => {
    const server = passConnections({ path }).listen(Number(portOrSocket), '127.0.0.1', () =>
      console.log(`http://127.0.0.1:${portOrSocket} is ${address}. Ctrl-C ends it.`),
    );
    server.once('error', ({ message }) => {
      console.error(`cluster: port ${portOrSocket} cannot be used (${message})`);
      process.exit(1);
    });
  });
}

function passConnections(target: NetConnectOpts): Server {
  return createServer({ allowHalfOpen: true }, (from) => {
    const to = connect({ ...target, allowHalfOpen: true });
    // An error of one side closes the other; there is nobody to tell.
    pipeline(from, to, () => {});
    pipeline(to, from, () => {});
  });
}
