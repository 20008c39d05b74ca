import { beforeAll, expect, onTestFinished, test } from 'vitest';
import { applyObjects, clusterVerb, nodePod, poll, realCluster, runInPod } from '../fixtures/cluster.ts';
import { createNamespace, kubectl } from '../fixtures/control-plane.ts';

const cluster = realCluster();
const nodes = ['node0', 'node1'];
let namespace: string;

const serve = `require('node:http').createServer((_, reply) => reply.end(process.env.HOSTNAME)).listen(8080)`;

/** JavaScript that prints the body at an address, or the code of the error. */
const get = (url: string) =>
  `fetch('${url}', { signal: AbortSignal.timeout(2000) }).then((reply) => reply.text())
     .catch((error) => error.cause?.code ?? error.name).then(console.log)`;

const isReady = async (node: string) =>
  kubectl(cluster, ['get', 'node', node, '-o', 'jsonpath={.status.conditions[?(@.type=="Ready")].status}']);

const addressOf = (pod: string) =>
  kubectl(cluster, ['get', 'pod', '-n', namespace, pod, '-o', 'jsonpath={.status.podIP}']);

// On each node a server with a Service, `server-NODE`, and a client.
beforeAll(async () => {
  namespace = await createNamespace(cluster);
  await applyObjects(
    cluster,
    namespace,
    nodes.flatMap((node) => [
      nodePod({ name: `server-${node}`, node, code: serve, labels: { app: 'server', node } }),
      nodePod({
        name: `client-${node}`,
        node,
        code: 'setInterval(() => {}, 1e6)',
        labels: { app: 'client' },
      }),
      {
        apiVersion: 'v1',
        kind: 'Service',
        metadata: { name: `server-${node}` },
        spec: { selector: { app: 'server', node }, ports: [{ port: 80, targetPort: 8080 }] },
      },
    ]),
  );
  await kubectl(cluster, [
    'wait',
    '-n',
    namespace,
    '--for=condition=Ready',
    'pods',
    '--all',
    '--timeout=60s',
  ]);
  return async () => {
    await kubectl(cluster, ['delete', 'namespace', namespace, '--wait=false']);
  };
});

test('has nodes that are Ready, each in a zone of its own', async () => {
  const zone =
    '{range .items[*]}{.metadata.name} {.metadata.labels.topology\\.kubernetes\\.io/zone}{"\\n"}{end}';
  expect(await kubectl(cluster, ['get', 'nodes', '-o', `jsonpath=${zone}`])).toBe(
    'node0 zone-0\nnode1 zone-1\n',
  );
  for (const node of nodes) expect(await isReady(node)).toBe('True');
});

test('lets pods reach each other on a node and across nodes, by address and by name', async () => {
  for (const from of nodes) {
    for (const to of nodes) {
      for (const host of [`${await addressOf(`server-${to}`)}:8080`, `server-${to}`]) {
        const url = `http://${host}/`;
        const answer = () => runInPod(cluster, namespace, `client-${from}`, get(url));
        expect(await poll(answer, (body) => body === `server-${to}`)).toBe(`server-${to}`);
      }
    }
  }
});

test('lets the tests reach pods and Services', async () => {
  for (const node of nodes) {
    for (const host of [
      `${await addressOf(`server-${node}`)}:8080`,
      `server-${node}.${namespace}.svc.cluster.local`,
    ]) {
      expect(await (await fetch(`http://${host}/`)).text()).toBe(`server-${node}`);
    }
  }
});

test('enforces NetworkPolicies: all is denied, then one label is let in', { timeout: 120_000 }, async () => {
  const policy = (name: string, spec: object) => ({
    apiVersion: 'networking.k8s.io/v1',
    kind: 'NetworkPolicy',
    metadata: { name },
    spec: { podSelector: { matchLabels: { app: 'server' } }, policyTypes: ['Ingress'], ...spec },
  });
  onTestFinished(async () => {
    await kubectl(cluster, ['delete', '-n', namespace, 'networkpolicies', '--all']);
  });
  const expectAnswers = async (expected: (from: string, to: string) => string) => {
    for (const from of nodes) {
      for (const to of nodes) {
        const answer = () => runInPod(cluster, namespace, `client-${from}`, get(`http://server-${to}/`));
        expect(`${from} to ${to}: ${await poll(answer, (body) => body === expected(from, to))}`).toBe(
          `${from} to ${to}: ${expected(from, to)}`,
        );
      }
    }
  };

  await applyObjects(cluster, namespace, [policy('deny', { ingress: [] })]);
  await expectAnswers(() => 'ECONNREFUSED');

  const fromTrusted = {
    from: [{ podSelector: { matchLabels: { trusted: 'yes' } } }],
    ports: [{ port: 8080 }],
  };
  await applyObjects(cluster, namespace, [policy('allow', { ingress: [fromTrusted] })]);
  await kubectl(cluster, ['label', '-n', namespace, 'pod', 'client-node1', 'trusted=yes']);
  await expectAnswers((from, to) => (from === 'node1' ? `server-${to}` : 'ECONNREFUSED'));
});

test('refuses a pod that breaks pod security restricted, and takes one that keeps it', async () => {
  const restricted = await createNamespace(cluster, { 'pod-security.kubernetes.io/enforce': 'restricted' });
  const pod = nodePod({ name: 'kept', code: '' });
  const broken = { ...pod, spec: { ...pod.spec, securityContext: {} } };
  await expect(applyObjects(cluster, restricted, [broken])).rejects.toThrow(
    /violates PodSecurity "restricted/,
  );
  await applyObjects(cluster, restricted, [pod]);
  await kubectl(cluster, ['delete', 'namespace', restricted, '--wait=false']);
});

test('gives each node a /var of its own, which outlives its restart', { timeout: 180_000 }, async () => {
  const own = await createNamespace(cluster);
  const volume = { name: 'data', hostPath: { path: '/var/lib/motet-test', type: 'DirectoryOrCreate' } };
  const withVolume = (name: string, node: string, code: string) => {
    const pod = nodePod({ name, node, code });
    const [container] = pod.spec.containers;
    const mounted = {
      ...container,
      securityContext: { runAsUser: 0 },
      volumeMounts: [{ name: 'data', mountPath: '/data' }],
    };
    return {
      ...pod,
      spec: {
        ...pod.spec,
        securityContext: {},
        restartPolicy: 'Never',
        volumes: [volume],
        containers: [mounted],
      },
    };
  };
  const finished = async (name: string) => {
    await kubectl(cluster, [
      'wait',
      '-n',
      own,
      '--for=jsonpath={.status.phase}=Succeeded',
      `pod/${name}`,
      '--timeout=60s',
    ]);
    return (await kubectl(cluster, ['logs', '-n', own, name])).trim();
  };
  const read = `console.log(fs.readdirSync('/data').join())`;
  await applyObjects(cluster, own, [withVolume('writer', 'node1', `fs.writeFileSync('/data/kept', '')`)]);
  await finished('writer');
  await applyObjects(cluster, own, [withVolume('elsewhere', 'node0', read)]);
  expect(await finished('elsewhere')).toBe('');

  await clusterVerb('kill-node', '1');
  expect(
    await poll(
      () => isReady('node1'),
      (status) => status !== 'True',
    ),
  ).toBe('Unknown');
  await clusterVerb('start-node', '1');
  expect(
    await poll(
      () => isReady('node1'),
      (status) => status === 'True',
    ),
  ).toBe('True');
  await applyObjects(cluster, own, [withVolume('reader', 'node1', read)]);
  expect(await finished('reader')).toBe('kept');
  await kubectl(cluster, ['delete', 'namespace', own, '--wait=false']);
});

test('loses its API server and has it back', { timeout: 120_000 }, async () => {
  await clusterVerb('stop-apiserver');
  await expect(kubectl(cluster, ['get', 'nodes'])).rejects.toThrow(/refused/);
  expect(await (await fetch(`http://server-node0.${namespace}.svc.cluster.local/`)).text()).toBe(
    'server-node0',
  );
  await clusterVerb('start-apiserver');
  expect(await kubectl(cluster, ['get', 'nodes', '-o', 'name'])).toBe('node/node0\nnode/node1\n');
});
