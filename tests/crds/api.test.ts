import { once } from 'node:events';
import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { KubeConfig } from '@kubernetes/client-node';
import { beforeAll, describe, expect, onTestFinished, test, vi } from 'vitest';
import { type ApiCall, ApiError, apiChannel, callApi, motetPath, watchApi } from '../../crds/api.ts';
import {
  type ControlPlane,
  createNamespace,
  kubectl,
  sharedControlPlane,
} from '../fixtures/control-plane.ts';
import { kubeConfigOf, startApiProxy } from './api-proxy.ts';
import { installCrds } from './install-crds.ts';

let plane: ControlPlane;
let namespace: string;
beforeAll(async () => {
  plane = await sharedControlPlane();
  await installCrds(plane);
  namespace = await createNamespace(plane);
});

const tenant = (name: string) => ({
  apiVersion: 'motet.dev/v1alpha1',
  kind: 'Tenant',
  metadata: { name },
  spec: { keys: [{ secretRef: { name: 's' } }] },
});

describe('an answer', () => {
  test('of the API server that refuses has its status, its reason and its words', async () => {
    const path = motetPath('Tenant', namespace);
    const missing = callApi(kubeConfigOf(plane), { path: `${path}/nobody` });
    await expect(missing).rejects.toThrow(ApiError);
    await expect(missing).rejects.toMatchObject({
      status: 404,
      reason: 'NotFound',
      message: 'tenants.motet.dev "nobody" not found',
    });
    const create = { method: 'POST', path, body: tenant('twice') } as const;
    await callApi(kubeConfigOf(plane), create);
    await expect(callApi(kubeConfigOf(plane), create)).rejects.toMatchObject({
      status: 409,
      reason: 'AlreadyExists',
    });
  });

  test('that is no Status is told as it is', async () => {
    const kubeConfig = await serve((_, response) => response.writeHead(502).end('<p>bad gateway'));
    await expect(callApi(kubeConfig, { path: '/version' })).rejects.toMatchObject({
      status: 502,
      reason: 'Unknown',
      message: '502 <p>bad gateway',
    });
  });

  test('that does not come in time is an error that says who did not answer what', async () => {
    const kubeConfig = await serve(() => {});
    await expect(callApi(kubeConfig, { path: '/version', timeoutMs: 50 })).rejects.toThrow(
      /^no answer from the API server at http:\/\/127\.0\.0\.1:\d+ to GET \/version: .*timeout/,
    );
  });

  test('that breaks off is an error, and one half of it is no answer', async () => {
    const kubeConfig = await serve((_, response) => {
      response.writeHead(200, { 'content-length': 1000 }).write('{');
      setImmediate(() => response.destroy());
    });
    await expect(callApi(kubeConfig, { path: '/version' })).rejects.toThrow(/^no answer from the API server/);
  });

  test('that nobody waits for any more is given up with the reason of the one who gave up', async () => {
    const kubeConfig = await serve(() => {});
    const reason = new Error('the operator stops');
    const controller = new AbortController();
    const call = callApi(kubeConfig, { path: '/version', signal: controller.signal });
    controller.abort(reason);
    await expect(call).rejects.toBe(reason);
  });
});

test('a watch is read line by line, however the lines are cut', async () => {
  const events = ['ä', 'b'].map((name) => ({ type: 'ADDED', object: { metadata: { name } } }));
  const bytes = Buffer.from(events.map((event) => `${JSON.stringify(event)}\n`).join(''));
  const kubeConfig = await serve(async (_, response) => {
    for (const byte of bytes) {
      response.write(Buffer.of(byte));
      await new Promise(setImmediate);
    }
    response.end();
  });
  const seen = [];
  const watch = { path: '/api/v1/namespaces/x/pods', query: {}, signal: new AbortController().signal };
  for await (const event of await watchApi(kubeConfig, { ...watch, maxSilenceMs: 10_000 })) seen.push(event);
  expect(seen).toEqual(events);
});

describe('connections', () => {
  test('are shared by the requests of a kubeconfig, one after another and at once', async () => {
    const proxy = await startApiProxy(plane);
    const get = () => callApi(proxy.kubeConfig, { path: motetPath('Tenant', namespace) });
    for (let i = 0; i < 20; i++) await get();
    // The first of them may have been closed by the server that sent its certificate.
    expect(proxy.numConnections).toBeLessThanOrEqual(2);
    await Promise.all(Array.from({ length: 300 }, get));
    expect(proxy.numConnections).toBeLessThanOrEqual(130);
  });

  test('stop and start with the API server', async () => {
    const proxy = await startApiProxy(plane);
    const get = () => callApi(proxy.kubeConfig, { path: '/version', timeoutMs: 1_000 });
    await get();
    proxy.cut();
    await expect(get()).rejects.toThrow(/no answer from the API server/);
    proxy.restore();
    await get();
    proxy.stall();
    await expect(get()).rejects.toThrow(/no answer from the API server.*timeout/);
    proxy.restore();
    await get();
  });
});

describe('in a pod', () => {
  test('the rotated token is read again, and so is the CA', async () => {
    const { kubeConfig, caFile, tokenFile } = await inPod();
    writeFileSync(tokenFile, await token('first'));
    writeFileSync(caFile, clusterCa());
    const accounts = `system:serviceaccount:${namespace}`;
    expect(await whoAmI(kubeConfig)).toBe(`${accounts}:first`);

    writeFileSync(tokenFile, await token('second'));
    vi.useFakeTimers({ toFake: ['Date'], now: Date.now() + 61_000 });
    onTestFinished(() => void vi.useRealTimers());
    expect(await whoAmI(kubeConfig)).toBe(`${accounts}:second`);

    writeFileSync(caFile, otherCa());
    await expect(whoAmI(kubeConfig)).rejects.toThrow(
      /no answer from the API server.*(certificate|self-signed)/,
    );
    writeFileSync(caFile, clusterCa());
    expect(await whoAmI(kubeConfig)).toBe(`${accounts}:second`);
  });

  test('an API server with a certificate of another CA is not spoken to', async () => {
    const { kubeConfig, caFile, tokenFile } = await inPod();
    writeFileSync(tokenFile, 'secret-token');
    writeFileSync(caFile, otherCa());
    await expect(whoAmI(kubeConfig)).rejects.toThrow(/certificate|self-signed/);
  });
});

test('each request is told on motet:api, the one without an answer too', async () => {
  const proxy = await startApiProxy(plane);
  const calls: ApiCall[] = [];
  const record = (message: unknown) => void calls.push(message as ApiCall);
  apiChannel.subscribe(record);
  onTestFinished(() => void apiChannel.unsubscribe(record));
  const path = motetPath('Tenant', namespace);
  const call = (request: Parameters<typeof callApi>[1]) =>
    callApi(proxy.kubeConfig, request).catch(() => undefined);
  const patch = { method: 'PATCH', contentType: 'application/merge-patch+json', body: {} } as const;
  await call({ path });
  await call({ method: 'POST', path, body: tenant('told') });
  await call({ path: `${path}/told` });
  await call({ ...patch, path: `${path}/told/status` });
  await call({ ...patch, path: `${path}/told` });
  await call({ method: 'PUT', path: `${path}/told`, body: tenant('told') });
  await call({ method: 'DELETE', path: `${path}/told` });
  await call({ path: '/api/v1/nodes/nowhere' });
  await call({ path: `/api/v1/namespaces/${namespace}` });
  await call({ path: `/api/v1/namespaces/${namespace}/secrets/none` });
  const controller = new AbortController();
  await watchApi(proxy.kubeConfig, { path, query: {}, signal: controller.signal, maxSilenceMs: 10_000 });
  controller.abort();
  proxy.cut();
  await call({ path });
  expect(calls.map(({ verb, resource, status }) => `${verb} ${resource} ${status}`)).toEqual([
    'list tenants 200',
    'create tenants 201',
    'get tenants 200',
    'patch tenants/status 200',
    'patch tenants 200',
    'update tenants 422',
    'delete tenants 200',
    'get nodes 404',
    'get namespaces 200',
    'get secrets 404',
    'watch tenants 200',
    'list tenants 0',
  ]);
  expect(calls.every(({ durationMs }) => durationMs > 0)).toBe(true);
});

test('a kubeconfig without a current context is refused by name', async () => {
  await expect(callApi(new KubeConfig(), { path: '/version' })).rejects.toThrow(
    'the kubeconfig has no current context',
  );
});

/** What a pod finds at its mount, with the API server of the plane. The files are for the test to write. */
async function inPod() {
  const root = mkdtempSync(join(tmpdir(), 'motet-pod-'));
  onTestFinished(() => rmSync(root, { recursive: true }));
  const folder = join(root, 'var/run/secrets/kubernetes.io/serviceaccount');
  mkdirSync(folder, { recursive: true });
  const { hostname, port } = new URL(kubeConfigOf(plane).getCurrentCluster()!.server);
  vi.stubEnv('KUBERNETES_SERVICE_HOST', hostname);
  vi.stubEnv('KUBERNETES_SERVICE_PORT', port);
  onTestFinished(() => void vi.unstubAllEnvs());
  const kubeConfig = new KubeConfig();
  kubeConfig.loadFromCluster(root);
  return { kubeConfig, caFile: join(folder, 'ca.crt'), tokenFile: join(folder, 'token') };
}

async function token(account: string): Promise<string> {
  await kubectl(plane, ['-n', namespace, 'create', 'serviceaccount', account]);
  return (await kubectl(plane, ['-n', namespace, 'create', 'token', account])).trim();
}

async function whoAmI(kubeConfig: KubeConfig): Promise<string> {
  type Review = { status: { userInfo: { username: string } } };
  const path = '/apis/authentication.k8s.io/v1/selfsubjectreviews';
  const body = { apiVersion: 'authentication.k8s.io/v1', kind: 'SelfSubjectReview' };
  return (await callApi<Review>(kubeConfig, { method: 'POST', path, body })).status.userInfo.username;
}

function clusterCa(): string {
  return Buffer.from(kubeConfigOf(plane).getCurrentCluster()!.caData!, 'base64').toString();
}

/** A CA that signed nothing here: the one of the API server's front proxy. */
function otherCa(): string {
  return readFileSync(plane.kubeconfig.replace('admin.kubeconfig', 'pki/front-proxy-ca.crt'), 'utf8');
}

/** A server that is no API server. */
async function serve(answer: Parameters<typeof createServer>[1]): Promise<KubeConfig> {
  const server = createServer(answer as never).listen(0, '127.0.0.1');
  await once(server, 'listening');
  onTestFinished(() => {
    server.closeAllConnections();
    server.close();
  });
  const kubeConfig = new KubeConfig();
  kubeConfig.loadFromClusterAndUser(
    { name: 'c', server: `http://127.0.0.1:${(server.address() as AddressInfo).port}`, skipTLSVerify: true },
    { name: 'u' },
  );
  return kubeConfig;
}
