// The processes that the chart starts: each accepts the settings that it is given, and they fit each other.
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { expect, onTestFinished, test, vi } from 'vitest';
import { parse } from 'yaml';
import type { BaseModel } from '../../crds/types.ts';
import { parseConfig as parseEngineConfig } from '../../engine/config.ts';
import { parseConfig as parseGatewayConfig } from '../../gateway/config.ts';
import { parseConfig as parseOperatorConfig } from '../../operator/config.ts';
import { desiredObjects } from '../../operator/desired.ts';
import { everything, find, type Manifest, renderObjects } from './chart.ts';

test('the gateway accepts its settings', async () => {
  // As in every pod.
  vi.stubEnv('KUBERNETES_SERVICE_HOST', '10.96.0.1');
  onTestFinished(() => void vi.unstubAllEnvs());
  const config = parseGatewayConfig([], envOf(find(await renderObjects(), 'Deployment', 'motet-gateway')));
  expect(config).toMatchObject({
    cluster: { namespace: 'motet' },
    host: '0.0.0.0',
    port: 8080,
    isInsecure: false,
  });
  const changed = find(await renderObjects({}, everything), 'Deployment', 'choir-gateway');
  const { drainTimeoutMs, maxBodyBytes, maxQueued, logLevel } = parseGatewayConfig([], envOf(changed));
  expect({ drainTimeoutMs, maxBodyBytes, maxQueued, logLevel }).toEqual({
    ...{ drainTimeoutMs: 20_000, maxBodyBytes: 67_108_864, maxQueued: 4096, logLevel: 'warn' },
  });
});

test('the operator accepts its settings, and its engines accept those that it passes on', async () => {
  const objects = await renderObjects({ engine: { trustedServiceAccounts: ['envoy/proxy'] } });
  const config = parseOperatorConfig([], envOf(find(objects, 'Deployment', 'motet-operator')));
  expect(config).toMatchObject({ namespace: 'motet', port: 8081, engineImage: 'motet:0.1.0' });
  find(objects, 'Lease', config.leaseName);
  find(objects, 'ServiceAccount', config.engineServiceAccount);

  const { env } = desiredObjects(aBaseModel, config).deployment.spec!.template.spec!.containers[0]!;
  const engine = parseEngineConfig([], {
    ...Object.fromEntries(env!.map(({ name, value }) => [name, value])),
    ...{ KUBERNETES_SERVICE_HOST: '10.96.0.1', KUBERNETES_SERVICE_PORT: '443' },
  });
  const trusted = 'callers' in engine ? engine.callers!.trusted : [];
  expect(trusted).toEqual(['motet/motet-gateway', 'motet/motet-operator', 'envoy/proxy']);
  for (const account of trusted.slice(0, 2)) find(objects, 'ServiceAccount', account.split('/')[1]!);
});

test('the address that `helm test` asks is that of the gateway', async () => {
  const objects = await renderObjects({ gateway: { service: { port: 8000 } } });
  const { GATEWAY } = envOf(find(objects, 'Pod', 'motet-test'));
  const { metadata, spec } = find(objects, 'Service', 'motet-gateway');
  expect(GATEWAY).toBe(`http://${metadata.name}.${metadata.namespace}.svc:${spec.ports[0].port}`);
  const { template } = find(objects, 'Deployment', 'motet-gateway').spec;
  expect(template.metadata.labels).toMatchObject(spec.selector);
  expect(template.spec.containers[0].ports[0].name).toBe(spec.ports[0].targetPort);
});

test.each([
  {
    what: 'is there, with a key,',
    status: 200,
    key: 'a-key-of-a-tenant\n',
    paths: ['/readyz', '/v1/models'],
    exitCode: 0,
  },
  { what: 'is there', status: 200, key: '', paths: ['/readyz'], exitCode: 0 },
  { what: 'is not ready', status: 503, key: '', paths: ['/readyz'], exitCode: 1 },
])('`helm test` where the gateway $what ends with $exitCode', async ({ status, key, paths, exitCode }) => {
  const asked: string[] = [];
  const server = createServer((req, res) => {
    asked.push(req.url!);
    if (req.url === '/v1/models') expect(req.headers.authorization).toBe(`Bearer ${key.trim()}`);
    res.writeHead(status).end('{}');
  }).listen(0, '127.0.0.1');
  onTestFinished(() => void server.close());
  await once(server, 'listening');
  const [command, ...args] = find(await renderObjects(), 'Pod', 'motet-test').spec.containers[0].command;
  expect(command).toBe('node');
  const gateway = `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
  const child = spawn(process.execPath, args, { env: { GATEWAY: gateway, KEY: key } });
  expect((await once(child, 'close'))[0]).toBe(exitCode);
  expect(asked).toEqual(paths);
});

/** Environment of the only container of a pod or of a Deployment's pods, with a token in the file that it names. */
function envOf({ kind, spec }: Manifest): Record<string, string> {
  const [container] = (kind === 'Pod' ? spec : spec.template.spec).containers;
  const folder = mkdtempSync(join(tmpdir(), 'motet-token-'));
  onTestFinished(() => rmSync(folder, { recursive: true }));
  const token = join(folder, 'token');
  writeFileSync(token, 'a token');
  const entries = (container.env as { name: string; value?: string }[]).map(({ name, value = 'motet' }) => [
    name,
    // What the kubelet or a Secret would bring.
    name.endsWith('_FILE') ? token : value,
  ]);
  return Object.fromEntries(entries);
}

const aBaseModel: BaseModel = parse(`
apiVersion: motet.dev/v1alpha1
kind: BaseModel
metadata: { name: small, namespace: motet, uid: 11111111-1111-1111-1111-111111111111 }
spec:
  source: { uri: 'file:///models/small.gguf' }
  replicas: 1
  quantization: keep
  kv: { dtype: auto, prefixCache: true, eviction: cost }
  adapterQuantization: keep
  pooling: last
  accelerator: { type: cpu, count: 1, runtimeClassName: nvidia }
  memory: { device: 1Gi, host: 0, disk: 0, weights: 0 }
  limits: { maxBatchTokens: 256, maxSequences: 64, maxWaiting: 256, maxLoraRank: 256 }
  drainSeconds: 30
  rollout: { maxSurge: 1, maxUnavailable: 0 }
  disruption: { maxUnavailable: 1 }
`);
