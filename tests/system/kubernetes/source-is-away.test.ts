/** An adapter's source is away and comes back, and a source that lies: the condition says it, and time or a change heals it. */
import { execFileSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { createServer, type Server } from 'node:https';
import type { AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, test } from 'vitest';
import type { LoraAdapter } from '../../../crds/types.ts';
import {
  answersRightly,
  baseModel,
  type InstalledMotet,
  installMotet,
  loraAdapter,
  untilConverged,
  untilReady,
} from '../../fixtures/installed-motet.ts';
import { examplesFolder } from '../../fixtures/models.ts';
import { exampleAdapters } from '../../fixtures/processes.ts';

/** Of node 0, where the tests run: pods of all nodes reach it. */
const address = '10.99.0.10';
const folder = mkdtempSync(join(tmpdir(), 'motet-source-'));
let motet: InstalledMotet;
let port = 0;
let server: Server | null = null;

beforeAll(async () => {
  makeCertificate();
  port = await serve();
  motet = await installMotet();
  await motet.apply(
    {
      apiVersion: 'v1',
      kind: 'ConfigMap',
      metadata: { name: 'ca' },
      data: { 'ca.crt': readFileSync(join(folder, 'ca.crt'), 'utf8') },
    },
    baseModel({
      replicas: 1,
      podTemplate: {
        resources: { requests: { cpu: '200m', memory: '512Mi' } },
        env: [{ name: 'NODE_EXTRA_CA_CERTS', value: '/etc/motet-ca/ca.crt' }],
        volumes: [{ name: 'ca', configMap: { name: 'ca' } }],
        volumeMounts: [{ name: 'ca', mountPath: '/etc/motet-ca' }],
      },
    }),
    loraAdapter('dates'),
  );
  await untilReady(motet, 'loraadapter', 'dates');
}, 300_000);
afterAll(async () => {
  await motet?.uninstall();
  server?.close();
  server?.closeAllConnections();
  rmSync(folder, { recursive: true });
}, 300_000);

/** The example adapters over https, on the same port each time. */
async function serve(): Promise<number> {
  server = createServer(
    { key: readFileSync(join(folder, 'key')), cert: readFileSync(join(folder, 'crt')) },
    (request, response) => {
      try {
        const [, name, file] = /^\/adapters\/([a-z]+)\/([a-z_.]+)$/.exec(request.url!) ?? [];
        response.end(readFileSync(join(examplesFolder, name!, file!)));
      } catch {
        response.writeHead(404).end();
      }
    },
  );
  await new Promise<void>((resolve) => server!.listen(port, address, resolve));
  return (server.address() as AddressInfo).port;
}

function makeCertificate(): void {
  const openssl = (args: string) => execFileSync('openssl', args.split(' '), { cwd: folder, stdio: 'pipe' });
  const ec = '-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2';
  openssl(`req -x509 ${ec} -keyout ca.key -out ca.crt -subj /CN=test`);
  openssl(
    `req -x509 ${ec} -keyout key -out crt -subj /CN=source -CA ca.crt -CAkey ca.key -addext subjectAltName=IP:${address} -addext basicConstraints=CA:FALSE`,
  );
}

async function digestOf(example: string): Promise<string> {
  // Loaded from the claim first: the status has the digest.
  await motet.apply(loraAdapter(example, { name: `${example}-for-its-digest` }));
  await untilReady(motet, 'loraadapter', `${example}-for-its-digest`);
  const { status } = await motet.get<LoraAdapter>('loraadapter', `${example}-for-its-digest`);
  await motet.kubectl(['delete', 'loraadapter', `${example}-for-its-digest`]);
  return status!.digest!;
}

const overHttps = (example: string, digest: string) =>
  loraAdapter(example, { source: { uri: `https://${address}:${port}/adapters/${example}`, digest } });

test('an adapter whose source is away is SourceUnavailable, and Resident when the source is back', async () => {
  const digest = await digestOf('contacts');
  server!.close();
  server!.closeAllConnections();

  await motet.apply(overHttps('contacts', digest));
  const condition = await untilReady(motet, 'loraadapter', 'contacts', {
    status: 'False',
    reason: 'SourceUnavailable',
  });
  expect(condition.message).toContain(address);

  await serve();
  await untilReady(motet, 'loraadapter', 'contacts', { timeoutMs: 180_000 });
  const contacts = exampleAdapters.find(({ name }) => name === 'contacts')!;
  expect(await answersRightly(motet, contacts)).toBe(true);
}, 400_000);

test('an adapter whose source has another digest is refused by both digests, and loads when the pin is mended', async () => {
  const digest = await digestOf('sql');
  const wrong = `sha256:${'0'.repeat(64)}`;
  await motet.apply(overHttps('sql', wrong));
  const condition = await untilReady(motet, 'loraadapter', 'sql', {
    status: 'False',
    reason: 'DigestMismatch',
  });
  expect(condition.message).toContain(digest);
  expect(condition.message).toContain(wrong);

  await motet.apply(overHttps('sql', digest));
  await untilReady(motet, 'loraadapter', 'sql');
}, 300_000);

test('a folder that is no adapter of this base ends in the words of the engine', async () => {
  await motet.apply(
    loraAdapter('dates', { name: 'nothing', source: { uri: 'pvc://models/adapters/no-such-folder' } }),
  );
  const missing = await untilReady(motet, 'loraadapter', 'nothing', {
    status: 'False',
    reason: 'SourceUnavailable',
  });
  expect(missing.message).toContain('no-such-folder');

  await motet.apply(loraAdapter('dates', { name: 'elsewhere', source: { uri: 'pvc://unknown-claim/x' } }));
  const unmounted = await untilReady(motet, 'loraadapter', 'elsewhere', {
    status: 'False',
    reason: 'ClaimNotMounted',
  });
  expect(unmounted.message).toContain('adapterClaims');

  await motet.kubectl(['delete', 'loraadapter', 'nothing', 'elsewhere']);
  await untilConverged(motet);
}, 300_000);
