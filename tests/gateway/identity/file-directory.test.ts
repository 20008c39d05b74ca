// A gateway with a tenants file, in front of fake engines: who may what, and what a change of the file changes.

import { execFileSync } from 'node:child_process';
import { mkdtempSync, renameSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { expect, onTestFinished, test } from 'vitest';
import { adaptersHeader } from '../../../engine/protocol.ts';
import { Endpoints } from '../../../gateway/endpoints.ts';
import { keyHeaders } from '../../../gateway/engine-headers.ts';
import { fileDirectory } from '../../../gateway/identity/file-directory.ts';
import { FollowedTenants } from '../../../gateway/identity/follow-tenants.ts';
import { digestOfKey } from '../../../gateway/identity/keys.ts';
import { startFakeEngine } from '../../fixtures/fake-engine.ts';
import { batchSettings } from '../batches/batches-setup.ts';
import { bearer, metricOf, modelIds } from '../start-cluster.ts';
import { chatBody, errorOf, gatewayFor, type TestGateway, until } from '../start-gateway.ts';
import { newKey, sign, startIssuer } from './issuer.ts';
import { keyOf, type Rights, tenants as rights, runMatrix } from './matrix.ts';

type File = { tenants: Record<string, object>; [part: string]: object };

/** A folder with a tenants file, that goes with the test. */
function tenantsFile(file: File) {
  const folder = mkdtempSync(join(tmpdir(), 'motet-tenants-'));
  onTestFinished(() => rmSync(folder, { recursive: true }));
  const path = join(folder, 'tenants.yaml');
  const write = (text: string) => writeFileSync(path, text);
  write(JSON.stringify(file));
  return {
    ...{ folder, path, write },
    put: (next: File) => write(JSON.stringify(next)),
    /** As editors and Kubernetes do: another file takes its name. */
    replace(next: File) {
      writeFileSync(`${path}.new`, JSON.stringify(next));
      renameSync(`${path}.new`, path);
    },
  };
}

const withKey = (name: string, tenant: object = {}) => ({
  keys: [{ sha256: digestOfKey(keyOf(name)) }],
  ...tenant,
});
const everything = { adapters: {}, baseModels: {}, groups: {} };
const statusOf = async (gateway: TestGateway, name: string, model = 'base') =>
  (await gateway.chat(chatBody({ model }), bearer(keyOf(name)))).status;

const red = { baseModel: 'base', labels: { team: 'red' } };
const adapters = {
  'red-sql': { baseModel: 'base', labels: { team: 'red', task: 'sql' } },
  'red-docs': { baseModel: 'base', labels: { team: 'red', task: 'docs' } },
  'blue-sql': { baseModel: 'base', labels: { team: 'blue', task: 'sql' } },
};

test('every caller may do what its tenant gives it, and nothing else', { timeout: 120_000 }, async () => {
  // There are no routes, and what an engine has and the file does not name has no labels.
  const { routes: _, ...given } = rights;
  const tenants: Record<string, Rights> = {
    ...given,
    everything: {
      access: everything,
      may: ['base', 'red-sql', 'red-docs', 'blue-sql', 'stowaway'],
    },
    'not-red': { ...given['not-red']!, may: ['blue-sql', 'stowaway'] },
  };
  const ofFile = Object.entries(tenants).map(([name, { access }]) => [name, withKey(name, { access })]);
  const keyless = { keys: [{ file: 'none.key' }], access: everything };
  const { path } = tenantsFile({ tenants: { ...Object.fromEntries(ofFile), keyless }, adapters });
  const engine = await startFakeEngine({ adapters: [...Object.keys(adapters), 'stowaway'] });
  const gateway = await gatewayFor([engine], { tenantsFile: path, batches: batchSettings() });

  const { numCases, wrong } = await runMatrix(gateway, engine, tenants);
  console.log(`${numCases} cases of the matrix`);
  expect(wrong).toEqual([]);
  expect(numCases).toBeGreaterThan(400);
  expect(await metricOf(gateway, 'motet_gateway_tenants')).toBe(7);
  const log = JSON.stringify(await gateway.wholeLog());
  expect(log).toContain('tenants.keyless.keys[0].file: none.key: there is no such file that can be read');
  for (const name of Object.keys(tenants)) expect(log).not.toContain(keyOf(name));
});

test.each(['put', 'replace'] as const)(
  'a key, a right and a tenant that the file has no more are refused within a second (%s)',
  async (how) => {
    const tenants = { a: withKey('a', { access: everything }), b: withKey('b', { access: everything }) };
    const file = tenantsFile({ tenants });
    const gateway = await gatewayFor([await startFakeEngine()], { tenantsFile: file.path });
    const becomes = async (name: string, status: number) => {
      const startMs = performance.now();
      await until(
        () => statusOf(gateway, name),
        (got) => got === status,
      );
      return Math.round(performance.now() - startMs);
    };
    expect([await statusOf(gateway, 'a'), await statusOf(gateway, 'b')]).toEqual([200, 200]);
    const tookMs: number[] = [];
    file[how]({ tenants: { ...tenants, a: withKey('a', { access: { adapters: {} } }) } });
    tookMs.push(await becomes('a', 404));
    file[how]({ tenants: { ...tenants, a: withKey('another', { access: everything }) } });
    tookMs.push(await becomes('a', 401));
    file[how]({ tenants: { a: tenants.a } });
    tookMs.push(await becomes('b', 401));
    expect(await statusOf(gateway, 'a')).toBe(200);
    console.log(`taken away after ${tookMs.join(', ')} ms`);
  },
);

test('a file that is wrong or gone changes nothing, and the log says why without showing it', async () => {
  const tenants = { acme: withKey('acme', { access: everything }) };
  const file = tenantsFile({ tenants });
  const gateway = await gatewayFor([await startFakeEngine()], { tenantsFile: file.path });
  const said = () => gateway.logLines.filter(({ msg }) => String(msg).includes('cannot be taken over'));
  const becomesWrong = async (problem: string) => {
    const numSaid = said().length;
    const [line] = await until(
      () => said().slice(numSaid),
      (lines) => lines.length > 0,
    );
    expect(line).toMatchObject({ level: 40, problem: expect.stringContaining(problem) });
    expect(await statusOf(gateway, 'acme')).toBe(200);
    expect((await fetch(`${gateway.url}/readyz`)).status).toBe(200);
    const stale = await metricOf(gateway, 'motet_gateway_watch_stale_seconds{resource="tenants-file"}');
    expect(stale).toBeGreaterThan(0);
  };
  file.write(`tenants: { acme: { keys: [ ${keyOf('acme')} ] } }`);
  await becomesWrong('tenants.acme.keys[0]: expected an object');
  file.write('');
  await becomesWrong('expected an object, got nothing');
  file.write(`tenants: ${'['.repeat(200_000)}`);
  await becomesWrong('expected YAML or JSON');
  file.write(`# ${'x'.repeat(2 << 20)}`);
  await becomesWrong('expected at most 2097152 bytes');
  rmSync(file.path);
  await becomesWrong('ENOENT');
  // A pipe that nobody writes to would be waited for.
  execFileSync('mkfifo', [file.path]);
  await becomesWrong('expected a file, got something else');
  file.replace({ tenants: { ...tenants, b: withKey('b', { access: everything }) } });
  await until(
    () => statusOf(gateway, 'b'),
    (status) => status === 200,
  );
  expect(await metricOf(gateway, 'motet_gateway_watch_stale_seconds{resource="tenants-file"}')).toBe(0);
  expect(JSON.stringify(await gateway.wholeLog())).not.toContain(keyOf('acme'));
});

test('does not start with a file that is wrong', async () => {
  const { path } = tenantsFile({ tenants: { a: { keys: [], weight: 1 } } });
  await expect(gatewayFor([], { tenantsFile: path })).rejects.toThrow(
    `--tenants-file ${path}: tenants.a: expected a key, or oidc`,
  );
});

test('a file with a key is followed as the tenants file is', async () => {
  const file = tenantsFile({ tenants: { a: { keys: [{ file: 'a.key' }], access: everything } } });
  const put = (name: string) => writeFileSync(join(file.folder, 'a.key'), `${keyOf(name)}\n`);
  put('old');
  const gateway = await gatewayFor([await startFakeEngine()], { tenantsFile: file.path });
  expect(await statusOf(gateway, 'old')).toBe(200);
  put('new');
  await until(
    () => statusOf(gateway, 'new'),
    (status) => status === 200,
  );
  expect(await statusOf(gateway, 'old')).toBe(401);
  rmSync(join(file.folder, 'a.key'));
  await until(
    () => statusOf(gateway, 'new'),
    (status) => status === 401,
  );
});

test('a group is answered by those of its adapters that the tenant may use', async () => {
  const access = { adapters: { matchLabels: { team: 'red' } }, groups: {} };
  const groups = { helpdesk: { baseModel: 'base', selector: {} } };
  const file = {
    tenants: {
      red: withKey('red', { access }),
      all: withKey('all', { access: everything }),
      alone: withKey('alone', { access: { adapters: {} } }),
      none: withKey('none', { access: { groups: {} } }),
    },
    ...{ adapters, groups },
  };
  const engine = await startFakeEngine({ adapters: Object.keys(adapters) });
  const followed = tenantsFile(file);
  const gateway = await gatewayFor([engine], { tenantsFile: followed.path });
  const ask = (name: string) => gateway.chat(chatBody({ model: 'helpdesk' }), bearer(keyOf(name)));
  const whoAnswers = async (name: string) => (await ask(name)).headers.get(adaptersHeader);
  expect(await whoAnswers('red')).toBe('red-docs=0.5,red-sql=0.5');
  expect(engine.received.at(-1)!.headers).toMatchObject({ [adaptersHeader]: 'red-docs=0.5,red-sql=0.5' });
  expect((await whoAnswers('all'))?.split(',')).toHaveLength(3);
  for (const name of ['alone', 'none']) expect((await ask(name)).status).toBe(404);
  expect(await modelIds(gateway, keyOf('red'))).toEqual(['helpdesk', 'red-docs', 'red-sql']);
  const composed = (names: string[]) => {
    const body = { model: 'x', adapters: names.map((name) => ({ name, weight: 1 })) };
    return gateway.chat(chatBody(body), bearer(keyOf('red')));
  };
  expect((await composed(['red-sql', 'red-docs'])).status).toBe(200);
  expect(await errorOf(await composed(['red-sql', 'blue-sql']))).toMatchObject({ status: 404 });

  // One of them is on no engine: what is left would be another answer.
  followed.put({ ...file, adapters: { ...adapters, 'red-new': red } });
  await until(
    async () => (await ask('red')).status,
    (status) => status === 503,
  );
  expect(await errorOf(await ask('red'))).toMatchObject({ code: 'model_unavailable' });
  engine.adapters.set('red-new', 'device');
  await until(
    () => whoAnswers('red'),
    (answered) => answered?.includes('red-new') === true,
  );
  followed.put({ ...file, adapters, groups: { helpdesk: { ...groups.helpdesk, maxMembers: 1 } } });
  await until(
    async () => (await ask('red')).status,
    (status) => status === 400,
  );
  expect(await errorOf(await ask('red'))).toMatchObject({ code: 'group_too_large' });
});

test('labels are those of an adapter over its base: another of that name has none of its rights', async () => {
  const access = { adapters: { matchLabels: { team: 'red' } } };
  const { path } = tenantsFile({ tenants: { red: withKey('red', { access }) }, adapters: { sql: red } });
  const ours = await startFakeEngine({ adapters: ['sql'] });
  const other = await startFakeEngine({ base: 'other', adapters: ['sql'] });
  const gateway = await gatewayFor([other, ours], { tenantsFile: path });
  for (let i = 0; i < 8; i++) expect(await statusOf(gateway, 'red', 'sql')).toBe(200);
  expect([ours.received.length, other.received.length]).toEqual([8, 0]);
});

test('an adapter can be used right after an engine loaded it, and is judged by what it is', async () => {
  const access = { adapters: { matchLabels: { team: 'red' } } };
  const { path } = tenantsFile({ tenants: { red: withKey('red', { access }) }, adapters: { late: red } });
  const engine = await startFakeEngine();
  const gateway = await gatewayFor([engine], { tenantsFile: path, pollIntervalMs: 60_000 });
  expect(await statusOf(gateway, 'red', 'late')).toBe(404);
  engine.adapters.set('late', 'device').set('other', 'device');
  expect(await statusOf(gateway, 'red', 'late')).toBe(200);
  expect(await statusOf(gateway, 'red', 'other')).toBe(404);
});

test('no engine that was ever seen is not a name that does not exist', async () => {
  const { path } = tenantsFile({ tenants: { a: withKey('a', { access: everything }) } });
  const engine = await startFakeEngine();
  await engine.kill();
  const gateway = await gatewayFor([engine], { tenantsFile: path });
  const answer = await gateway.chat(chatBody(), bearer(keyOf('a')));
  expect(await errorOf(answer)).toMatchObject({ status: 503, code: 'no_engine_ready' });
});

test('limits of a tenant and of one key hold', async () => {
  const two = [
    { sha256: digestOfKey(keyOf('tight')), limits: { requestsPerMinute: 1 } },
    { sha256: digestOfKey(keyOf('wide')) },
  ];
  const a = { keys: two, limits: { requestsPerMinute: 3 }, access: everything };
  const { path } = tenantsFile({ tenants: { a } });
  const gateway = await gatewayFor([await startFakeEngine()], { tenantsFile: path });
  const statuses: number[] = [];
  for (const key of ['tight', 'tight', 'wide', 'wide', 'wide']) statuses.push(await statusOf(gateway, key));
  expect(statuses).toEqual([200, 429, 200, 200, 429]);
});

test('weight and priority come with a tenant', async () => {
  const { path } = tenantsFile({
    tenants: { a: withKey('a', { weight: 4, priority: -2 }), b: withKey('b', { access: everything }) },
  });
  const log = { info: () => {}, warn: () => {} };
  const followed = await FollowedTenants.open(path, null, log);
  const endpoints = new Endpoints(keyHeaders(null), 1_000, 1_000, log);
  const directory = fileDirectory(endpoints, followed, log);
  onTestFinished(() => directory.close());
  expect(directory.standingOf('a')).toEqual({ weight: 4, priority: -2 });
  expect(directory.standingOf('b')).toEqual({ weight: 1, priority: 0 });
  expect(directory.standingOf('nobody')).toEqual({ weight: 1, priority: 0 });
});

test('a tenant is known by its tokens, as long as the file says so', async () => {
  const signer = await newKey('k');
  const issuer = await startIssuer(signer);
  const oidc = { issuer: issuer.url, audience: 'motet', claims: { team: 'red' } };
  const file = tenantsFile({ tenants: { red: { oidc, access: everything } } });
  const gateway = await gatewayFor([await startFakeEngine()], { tenantsFile: file.path });
  const token = await sign(issuer, signer, {}, { nowMs: Date.now() });
  const ask = async () => (await gateway.chat(chatBody(), bearer(token))).status;
  expect(await ask()).toBe(200);
  expect((await gateway.wholeLog()).find(({ msg }) => msg === 'request')).toMatchObject({ tenant: 'red' });
  file.put({ tenants: { red: { oidc: { ...oidc, claims: { team: 'blue' } }, access: everything } } });
  await until(ask, (status) => status === 401);
  file.put({ tenants: { red: { oidc: {}, access: everything } } });
  await until(
    () => gateway.logLines.filter(({ problem }) => String(problem).includes('no issuer is trusted')),
    (lines) => lines.length > 0,
  );
});
