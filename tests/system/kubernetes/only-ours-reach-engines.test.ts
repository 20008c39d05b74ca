/** Engines serve the gateway and the operator and nobody else: by network, and by identity when the network lets them. */
import type { V1Pod } from '@kubernetes/client-node';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { motetImage, poll, restrictedContainer, restrictedPod } from '../../fixtures/cluster.ts';
import {
  baseModel,
  type InstalledMotet,
  installMotet,
  readyEngines,
  untilReady,
} from '../../fixtures/installed-motet.ts';

let motet: InstalledMotet;
let engineAddress: string;
beforeAll(async () => {
  motet = await installMotet();
  await motet.apply(baseModel({ replicas: 1 }));
  await untilReady(motet, 'basemodel', 'smollm2');
  engineAddress = (await readyEngines(motet))[0]!.status!.podIP!;
}, 300_000);
afterAll(() => motet?.uninstall(), 300_000);

/** A pod with a token for engines of the ServiceAccount `default`, and these labels. */
async function startPod(name: string, labels: Record<string, string>): Promise<void> {
  await motet.apply({
    apiVersion: 'v1',
    kind: 'Pod',
    metadata: { name, labels },
    spec: {
      ...restrictedPod,
      terminationGracePeriodSeconds: 0,
      containers: [
        {
          name: 'node',
          image: motetImage,
          imagePullPolicy: 'Never',
          command: ['node', '-e', 'setInterval(() => {}, 1000)'],
          volumeMounts: [{ name: 'token', mountPath: '/token' }],
          ...restrictedContainer,
        },
      ],
      volumes: [
        {
          name: 'token',
          projected: { sources: [{ serviceAccountToken: { path: 'token', audience: 'motet-engine' } }] },
        },
      ],
    },
  });
  await motet.kubectl(['wait', 'pod', name, '--for=condition=Ready', '--timeout=60s']);
}

/** The status of GET /v1/adapters, or the code of the failure. */
async function askEngine(pod: string, authorization: string): Promise<string> {
  const code = `
    const authorization = ${authorization};
    fetch('http://${engineAddress}:8000/v1/adapters', { headers: authorization ? { authorization } : {}, signal: AbortSignal.timeout(3000) })
      .then((response) => response.status, (error) => error.cause?.code ?? error.name)
      .then((answer) => process.stdout.write(String(answer)));`;
  return motet.kubectl(['exec', pod, '--', 'node', '-e', code]);
}

const ownToken = `'Bearer ' + require('node:fs').readFileSync('/token/token', 'utf8')`;

test('a pod of another kind does not get through the network', async () => {
  await startPod('stranger', { app: 'stranger' });
  // Refused by the agent that enforces the policy; others let it time out.
  expect(await askEngine('stranger', 'null')).toMatch(/ECONNREFUSED|Timeout|TIMEOUT/);
  await motet.kubectl(['delete', 'pod', 'stranger', '--timeout=60s']);
}, 120_000);

test('a pod that calls itself a gateway gets through the network and is refused by its identity', async () => {
  const [gateway] = await motet.list<V1Pod>('pods', 'app.kubernetes.io/component=gateway');
  const { 'pod-template-hash': _, ...labels } = gateway!.metadata!.labels!;
  await startPod('impostor', labels);
  const answer = await poll(
    () => askEngine('impostor', 'null'),
    (status) => status === '401',
    { timeoutMs: 30_000 },
  );
  expect(answer).toBe('401');
  expect(await askEngine('impostor', `'Bearer ' + 'x'.repeat(40)`)).toBe('401');
  expect(await askEngine('impostor', ownToken)).toBe('403');
  await motet.kubectl(['delete', 'pod', 'impostor', '--timeout=60s']);
}, 120_000);

test('the gateway itself is let in', async () => {
  const [gateway] = await motet.list<V1Pod>('pods', 'app.kubernetes.io/component=gateway');
  const token = `'Bearer ' + require('node:fs').readFileSync('/var/run/secrets/motet.dev/engine/token', 'utf8')`;
  expect(await askEngine(gateway!.metadata!.name!, token)).toBe('200');
}, 60_000);

test('every pod of ours was accepted by a namespace that enforces pod security restricted', async () => {
  const namespace = await motet.get<{ metadata: { labels: Record<string, string> } }>('namespace', 'motet');
  expect(namespace.metadata.labels['pod-security.kubernetes.io/enforce']).toBe('restricted');
  const pods = await motet.list<V1Pod>('pods', 'app.kubernetes.io/name=motet');
  const components = pods.map(({ metadata }) => metadata!.labels!['app.kubernetes.io/component']);
  expect(new Set(components)).toEqual(new Set(['operator', 'gateway', 'engine']));
});
