import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { applyObjects, nodePod, realCluster } from '../fixtures/cluster.ts';
import { createNamespace, kubectl } from '../fixtures/control-plane.ts';

const cluster = realCluster();
const root = join(import.meta.dirname, '../..');

test.each(['engine', 'gateway', 'operator'].filter((name) => existsSync(join(root, name, 'main.ts'))))(
  'starts the %s as user 65532 with a root that is read-only and no capability',
  async (name) => {
    const namespace = await createNamespace(cluster, { 'pod-security.kubernetes.io/enforce': 'restricted' });
    const pod = nodePod({ name: 'help', code: '' });
    const [container] = pod.spec.containers;
    // It is the image that says who runs it.
    const code = `
    const { spawnSync } = require('node:child_process');
    const { status, stdout, stderr } = spawnSync('node', ['${name}/main.ts', '--help'], { encoding: 'utf8' });
    let write; try { fs.writeFileSync('/app/x', ''); } catch (error) { write = error.code; }
    console.log(JSON.stringify({ status, hasHelp: stdout.includes('--port'), stderr, uid: process.getuid(), write }));`;
    const command = ['node', '-e', code];
    const spec = { ...pod.spec, restartPolicy: 'Never', containers: [{ ...container, command }] };
    await applyObjects(cluster, namespace, [{ ...pod, spec }]);
    await kubectl(cluster, [
      'wait',
      ...['-n', namespace, 'pod/help', '--for=jsonpath={.status.phase}=Succeeded', '--timeout=60s'],
    ]);
    expect(JSON.parse(await kubectl(cluster, ['logs', '-n', namespace, 'help']))).toEqual({
      status: 0,
      hasHelp: true,
      stderr: '',
      uid: 65532,
      write: 'EROFS',
    });
    await kubectl(cluster, ['delete', 'namespace', namespace, '--wait=false']);
  },
);

test('has its files, user and folder from the same place in the Dockerfile and in the tests', () => {
  const dockerfile = readFileSync(join(root, 'Dockerfile'), 'utf8');
  const script = readFileSync(join(root, 'tests/cluster/image.sh'), 'utf8');
  expect(dockerfile).toMatch(/^RUN scripts\/image-files\.sh \/image$/m);
  expect(dockerfile).toMatch(/^FROM scratch AS cpu\nCOPY --from=build \/image \/$/m);
  expect(script).toMatch(/^scripts\/image-files\.sh "\$work"$/m);
  // Both variants run alike.
  const [cuda, cpu] = ['cuda', 'cpu'].map((stage) =>
    [
      ...dockerfile
        .split(` AS ${stage}\n`)[1]!
        .split('\nFROM ')[0]!
        .matchAll(/^(WORKDIR|ENV|USER|CMD) .*$/gm),
    ].map(([line]) => line),
  );
  expect(cpu).toHaveLength(4);
  expect(cuda).toEqual(cpu);
});
