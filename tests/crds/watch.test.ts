import { execFile } from 'node:child_process';
import { subscribe, unsubscribe } from 'node:diagnostics_channel';
import { promisify } from 'node:util';
import { beforeAll, expect, onTestFinished, test } from 'vitest';
import { type ApiCall, apiChannel, callApi, motetPath } from '../../crds/api.ts';
import { apiVersion, type Tenant } from '../../crds/types.ts';
import { ObjectWatch, type WatchOptions } from '../../crds/watch.ts';
import {
  type ControlPlane,
  createNamespace,
  sharedControlPlane,
  startControlPlane,
} from '../fixtures/control-plane.ts';
import { kubeConfigOf, startApiProxy } from './api-proxy.ts';
import { installCrds } from './install-crds.ts';

let plane: ControlPlane;
beforeAll(async () => {
  plane = await sharedControlPlane();
  await installCrds(plane);
});

const soon = { timeout: 15_000, interval: 20 };

test('tells what is there, what comes, what changes and what goes', async () => {
  const { create, change, remove, path } = await tenants();
  await create('old');
  const { watch, changes } = watchOf({ path });
  await watch.synced;
  expect(changes).toEqual(['+old']);
  await create('new');
  await change('new');
  await remove('old');
  await expect.poll(() => changes, soon).toEqual(['+old', '+new', '~new', '-old']);
  expect(watch.list().map(({ metadata }) => metadata!.name)).toEqual(['new']);
  expect(watch.get('new')!.spec.access.adapters).toEqual({});
  expect(watch.get('old')).toBeUndefined();
  expect(watch.staleSinceMs).toBeNull();
});

test('keeps what trim keeps', async () => {
  const { create, path } = await tenants();
  await create('a', { labels: { kept: 'yes' } });
  const { watch } = watchOf({ path, trim: ({ metadata }) => ({ metadata }) as Tenant });
  await watch.synced;
  await create('b', { labels: { kept: 'yes' } });
  await expect.poll(() => watch.get('b'), soon).toBeDefined();
  for (const object of watch.list()) {
    expect(Object.keys(object)).toEqual(['metadata']);
    expect(object.metadata!.labels).toEqual({ kept: 'yes' });
    expect(object.metadata!.managedFields).toBeUndefined();
  }
});

test('lists in pages', async () => {
  const { create, path } = await tenants();
  for (const name of ['a', 'b', 'c', 'd', 'e']) await create(name);
  const calls = recordCalls();
  const { watch, changes } = watchOf({ path, pageSize: 2 });
  await watch.synced;
  expect(changes).toEqual(['+a', '+b', '+c', '+d', '+e']);
  expect(calls.filter(({ verb }) => verb === 'list')).toHaveLength(3);
});

test('an object that its label selector no longer selects is gone', async () => {
  const { create, change, path } = await tenants();
  await create('in', { labels: { colour: 'red' } });
  await create('out', { labels: { colour: 'blue' } });
  const { watch, changes } = watchOf({ path, labelSelector: 'colour=red' });
  await watch.synced;
  await change('in', { metadata: { labels: { colour: null } } });
  await change('out', { metadata: { labels: { colour: 'red' } } });
  await expect.poll(() => changes, soon).toEqual(['+in', '-in', '+out']);
});

test('goes on where it was after a cut, told nothing twice', async () => {
  const proxy = await startApiProxy(plane);
  const { create, remove, path } = await tenants();
  await create('stays');
  await create('goes');
  const calls = recordCalls();
  const { watch, changes, errors } = watchOf({ path, kubeConfig: proxy.kubeConfig });
  await watch.synced;
  await expect.poll(() => calls.some(({ verb }) => verb === 'watch'), soon).toBe(true);
  const heardMs = Date.now();
  proxy.cut();
  await expect.poll(() => watch.staleSinceMs, soon).not.toBeNull();
  expect(watch.staleSinceMs).toBeLessThanOrEqual(heardMs);
  await remove('goes');
  await create('comes');
  expect(watch.list()).toHaveLength(2);
  proxy.restore();
  await expect.poll(() => changes.slice(2), soon).toEqual(['-goes', '+comes']);
  expect(watch.staleSinceMs).toBeNull();
  expect(calls.filter(({ verb }) => verb === 'list')).toHaveLength(1);
  // Why, once for each way to fail and not once for each try.
  expect(errors.length).toBeGreaterThan(0);
  expect(new Set(errors).size).toBe(errors.length);
  expect(errors[0]).toContain('no answer from the API server at https://127.0.0.1:');
});

test('lists again when the version is too old, and tells what went and what was made anew', async () => {
  const own = await startControlPlane({ controllers: false });
  onTestFinished(() => own.stop());
  await installCrds(own);
  const proxy = await startApiProxy(own);
  const { create, change, remove, path } = await tenants(own);
  for (const name of ['stays', 'changes', 'goes', 'comes-again']) await create(name);
  const calls = recordCalls();
  const { watch, changes, seen } = watchOf({ path, kubeConfig: proxy.kubeConfig });
  await watch.synced;
  proxy.cut();
  await expect.poll(() => watch.staleSinceMs, soon).not.toBeNull();
  await remove('goes');
  await remove('comes-again');
  await create('comes-again');
  await create('comes');
  await change('changes');
  // An API server that has just started knows no history: the version from before is too old for it.
  await own.stopApiserver();
  await own.startApiserver();
  calls.length = 0;
  proxy.restore();
  await expect.poll(() => changes.length, soon).toBe(8);
  expect(changes.slice(4).sort()).toEqual(['+comes', '-goes', '~changes', '~comes-again']);
  const [now, before] = seen.find(([now, before]) => now?.metadata.name === 'comes-again' && before)!;
  expect(now!.metadata.uid).not.toBe(before!.metadata.uid);
  expect(calls.map(({ verb }) => verb)).toContain('list');
  expect(watch.staleSinceMs).toBeNull();
});

test('keeps its copy while the API server is away, and has what changed when it is back', {
  timeout: 120_000,
}, async () => {
  const own = await startControlPlane({ controllers: false });
  onTestFinished(() => own.stop());
  await installCrds(own);
  const { create, change, path } = await tenants(own);
  await create('a');
  const { watch, changes, errors } = watchOf({ path, kubeConfig: kubeConfigOf(own) });
  await watch.synced;
  await own.stopApiserver();
  await expect.poll(() => watch.staleSinceMs, soon).not.toBeNull();
  const unsynced = watchOf({ path, kubeConfig: kubeConfigOf(own) });
  await expect.poll(() => unsynced.errors.length, soon).toBeGreaterThan(0);
  expect(watch.list()).toHaveLength(1);
  expect(errors.join()).toContain('no answer from the API server');
  await own.startApiserver();
  await create('b');
  await change('a');
  await expect.poll(() => changes, soon).toHaveLength(3);
  expect([...changes].sort()).toEqual(['+a', '+b', '~a']);
  await expect.poll(() => unsynced.watch.list().length, soon).toBe(2);
  expect(watch.staleSinceMs).toBeNull();
  expect(unsynced.watch.staleSinceMs).toBeNull();
});

test('an API server that takes connections and says nothing is noticed', async () => {
  const proxy = await startApiProxy(plane);
  const { create, path } = await tenants();
  const { watch, changes, errors } = watchOf({ path, kubeConfig: proxy.kubeConfig, maxSilenceMs: 2_000 });
  await watch.synced;
  await create('a');
  await expect.poll(() => changes, soon).toEqual(['+a']);
  proxy.stall();
  await create('b');
  await expect.poll(() => watch.staleSinceMs, soon).not.toBeNull();
  expect(errors[0]).toContain('nothing came for 2000 ms');
  expect(changes).toEqual(['+a']);
  proxy.restore();
  await expect.poll(() => changes, soon).toEqual(['+a', '+b']);
});

test('a quiet watch is no failure, and its bookmarks move the version on', {
  timeout: 60_000,
}, async () => {
  const quiet = await tenants();
  const busy = await tenants();
  const versions: number[] = [];
  const onUndici = (message: unknown) => {
    const { path } = (message as { request: { path: string } }).request;
    const url = new URL(path, 'https://api');
    if (url.pathname === quiet.path && url.searchParams.has('watch'))
      versions.push(Number(url.searchParams.get('resourceVersion')));
  };
  subscribe('undici:request:create', onUndici);
  onTestFinished(() => {
    unsubscribe('undici:request:create', onUndici);
  });
  // The server ends it after 6 s and sends the bookmark 2 s before; one that is busy may leave out a bookmark, not all.
  const { watch, changes, errors } = watchOf({ path: quiet.path, maxSilenceMs: 8_000 });
  await watch.synced;
  await busy.create('elsewhere');
  const later = await callApi<Tenant>(kubeConfigOf(plane), { path: `${busy.path}/elsewhere` });
  await expect
    .poll(() => versions.at(-1), { ...soon, timeout: 45_000 })
    .toBeGreaterThanOrEqual(Number(later.metadata.resourceVersion));
  expect(changes).toEqual([]);
  expect(errors).toEqual([]);
});

test('a callback that throws is told, and misses nothing else', async () => {
  const { create, path } = await tenants();
  await create('bad-list');
  await create('good-list');
  const changes: string[] = [];
  const { watch, errors } = watchOf({
    path,
    onChange: (now) => {
      if (now!.metadata!.name!.startsWith('bad')) throw new Error(`cannot read ${now!.metadata!.name}`);
      changes.push(now!.metadata!.name!);
    },
  });
  await watch.synced;
  await create('bad-event');
  await create('good-event');
  await expect.poll(() => changes, soon).toEqual(['good-list', 'good-event']);
  expect(errors).toEqual(['cannot read bad-list', 'cannot read bad-event']);
  expect(watch.list()).toHaveLength(4);
  expect(watch.staleSinceMs).toBeNull();
});

test('one that may not list says so, and lists when it may', async () => {
  const { namespace, path, create } = await tenants();
  await create('a');
  const kubeConfig = kubeConfigOf(plane);
  const administrator = kubeConfigOf(plane);
  kubeConfig.users = kubeConfig.users.map((user) => ({ ...user, impersonateUser: 'somebody' }));
  const { watch, errors } = watchOf({ path, kubeConfig });
  await expect
    .poll(() => errors, soon)
    .toEqual([expect.stringMatching(/"somebody" cannot list resource "tenants"/)]);
  const rbac = {
    path: `/apis/rbac.authorization.k8s.io/v1/namespaces/${namespace}`,
    method: 'POST',
  } as const;
  const rules = [{ apiGroups: ['motet.dev'], resources: ['tenants'], verbs: ['list', 'watch'] }];
  await callApi(administrator, {
    ...rbac,
    path: `${rbac.path}/roles`,
    body: { metadata: { name: 'r' }, rules },
  });
  await callApi(administrator, {
    ...rbac,
    path: `${rbac.path}/rolebindings`,
    body: {
      metadata: { name: 'r' },
      roleRef: { apiGroup: 'rbac.authorization.k8s.io', kind: 'Role', name: 'r' },
      subjects: [{ apiGroup: 'rbac.authorization.k8s.io', kind: 'User', name: 'somebody' }],
    },
  });
  await watch.synced;
  expect(watch.list()).toHaveLength(1);
});

test.for(['watching', 'between tries', 'on a silent connection'])(
  'tells nothing after close: %s',
  async (when) => {
    const proxy = await startApiProxy(plane);
    const { create, path } = await tenants();
    const { watch, changes, errors } = watchOf({ path, kubeConfig: proxy.kubeConfig });
    await watch.synced;
    if (when === 'between tries') {
      proxy.cut();
      await expect.poll(() => errors.length, soon).toBeGreaterThan(0);
    }
    if (when === 'on a silent connection') proxy.stall();
    const numErrors = errors.length;
    await watch.close();
    proxy.restore();
    // The other watch sees it, so this one would have.
    const other = watchOf({ path });
    await create('late');
    await expect.poll(() => other.changes, soon).toEqual(['+late']);
    expect(changes).toEqual([]);
    expect(errors).toHaveLength(numErrors);
  },
);

test('a process whose watches are closed ends by itself', async () => {
  const { path, create } = await tenants();
  await create('a');
  const { stdout } = await promisify(execFile)(
    process.execPath,
    [
      '--input-type=module-typescript',
      '-e',
      `
      import { KubeConfig } from '@kubernetes/client-node';
      import { ObjectWatch } from './crds/watch.ts';
      const kubeConfig = new KubeConfig();
      kubeConfig.loadFromFile(process.argv[1]);
      const watch = new ObjectWatch({ kubeConfig, path: process.argv[2], onChange() {}, onError(error) { throw error; } });
      await watch.synced;
      await watch.close();
      console.log(watch.list().length);
    `,
      plane.kubeconfig,
      path,
    ],
    { timeout: 20_000 },
  );
  expect(stdout).toBe('1\n');
});

/** A namespace of its own, in which Tenants are made, changed and removed behind the watch's back. */
async function tenants(on: ControlPlane = plane) {
  const kubeConfig = kubeConfigOf(on);
  const namespace = await createNamespace(on);
  const path = motetPath('Tenant', namespace);
  const spec = { keys: [{ secretRef: { name: 'some' } }] };
  return {
    namespace,
    path,
    create: (name: string, metadata: object = {}) =>
      callApi<Tenant>(kubeConfig, {
        method: 'POST',
        path,
        body: { apiVersion, kind: 'Tenant', metadata: { name, ...metadata }, spec },
      }),
    change: (name: string, body: object = { spec: { access: { adapters: {} } } }) =>
      callApi<Tenant>(kubeConfig, {
        method: 'PATCH',
        path: `${path}/${name}`,
        body,
        contentType: 'application/merge-patch+json',
      }),
    remove: (name: string) => callApi(kubeConfig, { method: 'DELETE', path: `${path}/${name}` }),
  };
}

/** A watch that writes down what it is told: `+name` came, `~name` changed, `-name` went. */
function watchOf(options: Partial<WatchOptions<Tenant>> & { path: string }) {
  const changes: string[] = [];
  const seen: [now: Tenant | undefined, before: Tenant | undefined][] = [];
  const errors: string[] = [];
  const watch = new ObjectWatch<Tenant>({
    kubeConfig: kubeConfigOf(plane),
    onChange: (now, before) => {
      changes.push(`${now && before ? '~' : now ? '+' : '-'}${(now ?? before)!.metadata.name}`);
      seen.push([now, before]);
    },
    onError: ({ message }) => errors.push(message),
    ...options,
  });
  onTestFinished(() => watch.close());
  return { watch, changes, seen, errors };
}

/** Requests of this process from here on. */
function recordCalls(): ApiCall[] {
  const calls: ApiCall[] = [];
  const record = (message: unknown) => void calls.push(message as ApiCall);
  apiChannel.subscribe(record);
  onTestFinished(() => void apiChannel.unsubscribe(record));
  return calls;
}
