/**
 * The whole way of a platform team: helm install, apply the examples, chat through the gateway's Service, look at what
 * kubectl shows, helm upgrade under load, helm uninstall. The tests are steps of one story, in order.
 */
import { execFile } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { promisify } from 'node:util';
import type { V1Pod } from '@kubernetes/client-node';
import OpenAI from 'openai';
import { afterAll, beforeAll, expect, test } from 'vitest';
import type { Tenant } from '../../../crds/types.ts';
import { motetImage, poll, realCluster } from '../../fixtures/cluster.ts';
import { kubectl } from '../../fixtures/control-plane.ts';
import {
  answersRightly,
  chartFolder,
  chartValues,
  type InstalledMotet,
  installMotet,
  modelsVolume,
  namespace,
  readyEngines,
  underLoad,
  untilConverged,
  untilReady,
} from '../../fixtures/installed-motet.ts';
import { exampleAdapters } from '../../fixtures/processes.ts';

const root = join(import.meta.dirname, '../../..');
const example = (name: string) => join(root, 'examples/kubernetes', name);
const models = ['smollm2', ...exampleAdapters.map(({ name }) => name)];
const cluster = realCluster();

let motet: InstalledMotet;
let before: string[];
beforeAll(async () => {
  before = await allObjects();
  // By default a tenant's usage is told once a minute.
  motet = await installMotet(['gateway.settings.usageIntervalMs=2000']);
}, 300_000);
afterAll(() => motet?.uninstall(), 300_000);

test('helm test passes on a fresh installation without any base model', async () => {
  expect(await motet.helm(['test', 'motet', '-n', namespace, '--timeout', '120s'])).toMatch(
    /Phase:\s+Succeeded/,
  );
}, 150_000);

test('the examples become ready: a base model on two engines, its adapters, a tenant, a route', async () => {
  for (const file of ['base-model.yaml', 'adapters.yaml', 'tenant.yaml', 'route.yaml']) {
    await motet.kubectl(['apply', '-f', example(file)]);
  }
  await untilReady(motet, 'basemodel', 'smollm2');
  for (const name of [...exampleAdapters.map(({ name }) => name), 'sql-v2']) {
    await untilReady(motet, 'loraadapter', name);
  }
  await untilReady(motet, 'adapterroute', 'sql-stable');
  await untilReady(motet, 'tenant', 'acme');
}, 300_000);

test('each adapter gives its right answer through the Service, whichever gateway and engine take the request', async () => {
  for (const adapter of exampleAdapters) {
    for (let turn = 0; turn < 4; turn++)
      expect(await answersRightly(motet, adapter), adapter.name).toBe(true);
  }
  const sql = exampleAdapters.find(({ name }) => name === 'sql')!;
  expect(await answersRightly(motet, sql, 'sql-stable')).toBe(true);
}, 120_000);

test('a tenant sees and calls what it selects, and for it nothing else exists', async () => {
  const acme = new OpenAI({
    baseURL: `${motet.url}/v1`,
    apiKey: 'change-me-change-me-change-me',
    maxRetries: 0,
  });
  const seen = (await acme.models.list()).data.map(({ id }) => id).sort();
  expect(seen).toEqual(['contacts', 'dates', 'phrases', 'smollm2', 'sql', 'sql-stable', 'sql-v2']);
  const ask = (client: OpenAI, model: string) =>
    client.chat.completions.create({ model, messages: [{ role: 'user', content: 'Hello' }], max_tokens: 4 });
  expect((await ask(acme, 'dates')).choices).toHaveLength(1);
  await expect(ask(acme, 'triage')).rejects.toMatchObject({ status: 404, code: 'model_not_found' });
  const nobody = new OpenAI({ baseURL: `${motet.url}/v1`, apiKey: 'a-key-that-nobody-has', maxRetries: 0 });
  await expect(ask(nobody, 'dates')).rejects.toMatchObject({ status: 401 });
}, 60_000);

test('kubectl get tenants shows what a tenant uses, and its status by which gateway', async () => {
  const dates = exampleAdapters.find(({ name }) => name === 'dates')!;
  const usage = await poll(
    async () => {
      await answersRightly(motet, dates);
      return (await motet.get<Tenant>('tenant', 'everybody')).status?.usage;
    },
    (usage) => usage !== undefined && usage.requestsPerMinute > 0 && usage.tokensPerMinute > 0,
  );
  expect(Math.min(usage!.requestsPerMinute, usage!.tokensPerMinute)).toBeGreaterThan(0);
  const gateways = await motet.list<V1Pod>('pods', 'app.kubernetes.io/component=gateway');
  const pods = gateways.map(({ metadata }) => metadata!.name!);
  for (const { name } of usage!.gateways) expect(pods).toContain(name);
  expect(await motet.kubectl(['get', 'tenants'])).toMatch(/^NAME +KEYS +MODELS +REQUESTS\/MIN +TOKENS\/MIN /);
}, 90_000);

/** The block of README.md that begins with this command, without the command. */
function shownInReadme(command: string): string {
  const readme = readFileSync(join(root, 'README.md'), 'utf8');
  const at = readme.indexOf(`    $ ${command}\n`);
  if (at < 0) throw new Error(`README.md does not show ${command}`);
  const [, ...lines] = readme.slice(at).split('\n');
  const end = lines.findIndex((line) => line !== '' && !line.startsWith('    '));
  return lines
    .slice(0, end)
    .map((line) => line.slice(4))
    .join('\n')
    .trim();
}

/** Ages differ from run to run, and with them the width of a column. */
const withoutAges = (table: string) =>
  table
    .trim()
    .split('\n')
    .map((line) => line.replace(/\b(\d+[dhms]){1,2}\s*$/, 'AGE').trimEnd())
    .join('\n');

test('kubectl shows what README.md says it shows', async () => {
  const shown = await poll(
    async () => withoutAges(await motet.kubectl(['get', 'basemodel,lora,ar'])),
    (table) => table === withoutAges(shownInReadme('kubectl -n motet get basemodel,lora,ar')),
    { timeoutMs: 20_000 },
  );
  expect(shown).toBe(withoutAges(shownInReadme('kubectl -n motet get basemodel,lora,ar')));
}, 60_000);

test('helm upgrade under load replaces gateways, operator and engines, and loses no request', async () => {
  const image = await tagImageAgain();
  const uids = async () => {
    const pods = await motet.list<V1Pod>('pods', 'app.kubernetes.io/name=motet');
    return pods.filter(({ metadata }) => !metadata!.deletionTimestamp).map(({ metadata }) => metadata!.uid!);
  };
  const old = await uids();
  const load = await underLoad(motet, models, async () => {
    const values = chartValues([`image.tag=${image.slice(image.lastIndexOf(':') + 1)}`]);
    await motet.helm([
      'upgrade',
      'motet',
      chartFolder,
      '-n',
      namespace,
      ...values,
      '--wait',
      '--timeout',
      '180s',
    ]);
    await poll(
      async () => (await uids()).filter((uid) => old.includes(uid)),
      (left) => left.length === 0,
      { timeoutMs: 180_000, intervalMs: 1_000 },
    );
    await untilConverged(motet);
  });
  expect(load.failures).toEqual([]);
  expect(load.numDone).toBeGreaterThan(50);
  expect((await uids()).filter((uid) => old.includes(uid))).toEqual([]);
  for (const { spec } of await readyEngines(motet)) expect(spec!.containers[0]!.image).toBe(image);
}, 400_000);

test('helm uninstall leaves nothing of ours', async () => {
  await motet.helm(['uninstall', 'motet', '-n', namespace, '--wait', '--timeout', '180s']);
  // What this test made itself.
  await kubectl(cluster, ['delete', 'namespace', namespace, '--timeout=120s']);
  await kubectl(cluster, ['delete', 'pv', modelsVolume, '--timeout=60s']);
  const left = await poll(
    async () => (await allObjects()).filter((object) => !before.includes(object)),
    (objects) => objects.length === 0,
    { timeoutMs: 120_000, intervalMs: 2_000 },
  );
  expect(left).toEqual([]);
}, 400_000);

/** Every object of the cluster, as `kind/namespace/name`; events apart, which nobody owns. */
async function allObjects(): Promise<string[]> {
  const kinds = (await kubectl(cluster, ['api-resources', '--verbs=list', '-o', 'name']))
    .trim()
    .split('\n')
    .filter((kind) => !kind.startsWith('events'));
  const columns = 'custom-columns=K:.kind,S:.metadata.namespace,N:.metadata.name';
  const lists = await Promise.all(
    kinds.map((kind) => kubectl(cluster, ['get', kind, '-A', '--no-headers', '-o', columns]).catch(() => '')),
  );
  return lists
    .join('\n')
    .split('\n')
    .filter((line) => line.trim() !== '')
    .map((line) => line.trim().split(/\s+/).join('/'));
}

/** The image under test by a second name, on every node: for the cluster a new version. */
async function tagImageAgain(): Promise<string> {
  const again = `${motetImage}-again`;
  for (const node of ['node0', 'node1']) {
    const socket = join(cluster.folder, node, 'run/containerd/containerd.sock');
    await promisify(execFile)('ctr', [
      '-a',
      socket,
      '-n',
      'k8s.io',
      'images',
      'tag',
      '--force',
      motetImage,
      again,
    ]);
  }
  return again;
}
