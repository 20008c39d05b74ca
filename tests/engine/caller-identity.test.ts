import { mkdir, rm, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { exportJWK, generateKeyPair, type JWTPayload, SignJWT } from 'jose';
import { pino } from 'pino';
import { describe, expect, test } from 'vitest';
import { CallerIdentity, type CallerIdentityOptions } from '../../engine/caller-identity.ts';
import { createNamespace, kubectl, sharedControlPlane } from '../fixtures/control-plane.ts';
import { certificates, type HttpsSource, startHttpsSource } from '../fixtures/https-source.ts';
import { temporaryFolder } from '../fixtures/source-files.ts';

const issuer = 'https://kubernetes.default.svc.cluster.local';
const startMs = Date.UTC(2030, 0, 1);
type Key = Awaited<ReturnType<typeof generateKeyPair>> & { kid: string };

async function newKey(kid: string, alg = 'RS256'): Promise<Key> {
  return { kid, ...(await generateKeyPair(alg)) };
}

/** What an API server serves of itself: its issuer and these keys. Like a real one it wants to know who asks. */
async function startApiServer(
  keys: Key[],
): Promise<HttpsSource & { setKeys: (keys: Key[]) => Promise<void> }> {
  const server = await startHttpsSource();
  server.fault = (request, response) => {
    if (request.headers.authorization === 'Bearer engine-token') return false;
    response.writeHead(401).end();
    return true;
  };
  const json = (value: unknown) => Buffer.from(JSON.stringify(value));
  server.files.set('/.well-known/openid-configuration', json({ issuer, jwks_uri: 'https://elsewhere/jwks' }));
  const setKeys = async (held: Key[]) => {
    const jwks = held.map(async ({ kid, publicKey }) => ({
      ...(await exportJWK(publicKey)),
      kid,
      use: 'sig',
    }));
    server.files.set('/openid/v1/jwks', json({ keys: await Promise.all(jwks) }));
  };
  await setKeys(keys);
  return Object.assign(server, { setKeys });
}

/** A token as the API server makes it for a pod, with claims replaced; undefined takes one out. */
async function token(key: Key, claims: JWTPayload = {}, alg = 'RS256'): Promise<string> {
  const nowSeconds = startMs / 1000;
  return new SignJWT({
    iss: issuer,
    aud: ['motet-engine'],
    sub: 'system:serviceaccount:motet:gateway',
    iat: nowSeconds - 60,
    nbf: nowSeconds - 60,
    exp: nowSeconds + 3600,
    ...claims,
  })
    .setProtectedHeader({ alg, kid: key.kid })
    .sign(key.privateKey);
}

async function startIdentity(server: HttpsSource, options: Partial<CallerIdentityOptions> = {}) {
  const serviceAccountDir = await temporaryFolder();
  await mkdir(serviceAccountDir, { recursive: true });
  await writeFile(join(serviceAccountDir, 'token'), 'engine-token\n');
  await writeFile(join(serviceAccountDir, 'ca.crt'), certificates().ca);
  const clock = { ms: startMs };
  const identity = new CallerIdentity({
    trusted: ['motet/gateway', 'motet/operator'],
    apiUrl: server.url,
    serviceAccountDir,
    log: pino({ level: 'silent' }),
    wallClock: () => clock.ms,
    ...options,
  });
  return { identity, clock, serviceAccountDir };
}

const numQuestions = ({ requests }: HttpsSource) => requests.filter(({ url }) => url.includes('jwks')).length;

describe('a token', () => {
  test('of a trusted ServiceAccount is accepted, and the keys are asked for once', async () => {
    const key = await newKey('one');
    const server = await startApiServer([key]);
    const { identity } = await startIdentity(server);
    const operator = { sub: 'system:serviceaccount:motet:operator' };
    await Promise.all([identity.check(await token(key)), identity.check(await token(key, operator))]);
    await identity.check(await token(key));
    expect(numQuestions(server)).toBe(1);
  });

  test.each(['ES256', 'ES384', 'EdDSA'])('may be signed by %s', async (alg) => {
    const key = await newKey('one', alg);
    const { identity } = await startIdentity(await startApiServer([key]));
    await identity.check(await token(key, {}, alg));
  });

  test.each([
    ['for another audience', { aud: 'https://kubernetes.default.svc' }, 'expected another aud'],
    ['for no audience', { aud: undefined }, 'expected another aud'],
    ['of another issuer', { iss: 'https://elsewhere' }, 'expected another iss'],
    ['that has expired', { exp: startMs / 1000 - 11 }, 'has expired'],
    ['that never expires', { exp: undefined }, 'expected another exp'],
    ['that is not yet valid', { nbf: startMs / 1000 + 11 }, 'expected another nbf'],
    ['of nobody', { sub: undefined }, 'expected another sub'],
  ])('%s is refused', async (_name, claims, message) => {
    const key = await newKey('one');
    const { identity } = await startIdentity(await startApiServer([key]));
    await expect(identity.check(await token(key, claims as JWTPayload))).rejects.toMatchObject({
      code: 'unauthorized',
      message: expect.stringContaining(message),
    });
  });

  test.each([
    'system:serviceaccount:motet:default',
    'system:serviceaccount:other:gateway',
    'system:serviceaccount:motet:gateway:x',
    'system:node:gateway',
    'motet/gateway',
  ])('of %s is good, and forbidden', async (sub) => {
    const key = await newKey('one');
    const { identity } = await startIdentity(await startApiServer([key]));
    const given = await token(key, { sub });
    for (const _ of [1, 2]) {
      await expect(identity.check(given)).rejects.toMatchObject({ code: 'forbidden', status: 403 });
    }
  });

  test('may be off by ten seconds, as clocks are', async () => {
    const key = await newKey('one');
    const { identity } = await startIdentity(await startApiServer([key]));
    await identity.check(await token(key, { exp: startMs / 1000 - 5 }));
    await identity.check(await token(key, { nbf: startMs / 1000 + 5 }));
  });

  test('that was accepted is refused once it has expired', async () => {
    const key = await newKey('one');
    const { identity, clock } = await startIdentity(await startApiServer([key]));
    const given = await token(key, { exp: startMs / 1000 + 60 });
    await identity.check(given);
    clock.ms += 59_000;
    await identity.check(given);
    clock.ms += 20_000;
    await expect(identity.check(given)).rejects.toThrow('has expired');
  });

  test.each([
    ['signed by a key of the same name', async (key: Key) => token(await newKey(key.kid))],
    ['with another payload', async (key: Key) => changedPayload(await token(key))],
    ['signed with the public key as a shared secret', async (key: Key) => signedByHmac(key)],
    ['that is not signed', async () => `${encoded({ alg: 'none' })}.${encoded({ sub: 'x' })}.`],
    ['that is no token', async () => 'secret-key'],
    ['that is too long', async (key: Key) => token(key, { x: 'x'.repeat(16 * 1024) })],
    ['of nonsense', async () => 'a.b.c'],
  ])('%s is refused', async (_name, make) => {
    const key = await newKey('one');
    const { identity } = await startIdentity(await startApiServer([key]));
    await expect(identity.check(await make(key))).rejects.toMatchObject({ code: 'unauthorized' });
  });
});

describe('keys', () => {
  test('are asked for again when a token has a new one', async () => {
    const [old, fresh] = [await newKey('old'), await newKey('fresh')];
    const server = await startApiServer([old]);
    const { identity, clock } = await startIdentity(server);
    await identity.check(await token(old));
    await server.setKeys([old, fresh]);
    clock.ms += 10_000;
    await identity.check(await token(fresh));
    await identity.check(await token(old, { jti: 'another' }));
    expect(numQuestions(server)).toBe(2);
  });

  test('are asked for at a bounded rate, whatever tokens come', async () => {
    const key = await newKey('one');
    const server = await startApiServer([key]);
    const { identity, clock } = await startIdentity(server, { minRefreshMs: 5000 });
    const attempts = Array.from({ length: 20 }, async (_, i) =>
      token(await newKey(`made-up-${i}`, 'ES256'), {}, 'ES256'),
    );
    for (const attempt of await Promise.all(attempts)) {
      await expect(identity.check(attempt)).rejects.toMatchObject({ code: 'unauthorized' });
      clock.ms += 1000;
    }
    expect(numQuestions(server)).toBeLessThanOrEqual(5);
  });

  test('that are known go on working while the API server is away', async () => {
    const [known, fresh] = [await newKey('known'), await newKey('fresh')];
    const server = await startApiServer([known]);
    const { identity, clock } = await startIdentity(server);
    await identity.check(await token(known));
    await server.stop();
    const dayMs = 24 * 3600_000;
    clock.ms += dayMs;
    await identity.check(await token(known, { exp: (clock.ms + 60_000) / 1000 }));
    const unknown = await token(fresh, { exp: (clock.ms + 60_000) / 1000 });
    await expect(identity.check(unknown)).rejects.toMatchObject({ code: 'not_ready', status: 503 });

    await server.setKeys([known, fresh]);
    await server.start();
    clock.ms += 10_000;
    await identity.check(unknown);
  });

  test('that are not there yet are waited for, and nobody is let in', async () => {
    const key = await newKey('one');
    const server = await startApiServer([key]);
    await server.stop();
    const { identity, clock } = await startIdentity(server);
    await identity.warmUp();
    await expect(identity.check(await token(key))).rejects.toMatchObject({ code: 'not_ready' });
    await server.start();
    clock.ms += 10_000;
    await identity.check(await token(key));
  });

  test('that were withdrawn end within an hour of the next question', async () => {
    const key = await newKey('one');
    const server = await startApiServer([key]);
    const { identity, clock } = await startIdentity(server);
    const later = (jti: string) => token(key, { jti, exp: startMs / 1000 + 1e6 });
    await identity.check(await later('a'));
    await server.setKeys([]);
    clock.ms += 3601_000;
    await identity.check(await later('b')); // asks beside the work
    await expect.poll(() => numQuestions(server)).toBe(2);
    await expect
      .poll(async () => identity.check(await later(`c${Math.random()}`)).catch(({ code }) => code))
      .toBe('unauthorized');
  });

  test.each([
    ['without a token of its own', (folder: string) => rm(join(folder, 'token'))],
    ['with a token that is refused', (folder: string) => writeFile(join(folder, 'token'), 'another')],
    ['with another CA', (folder: string) => writeFile(join(folder, 'ca.crt'), '')],
  ])('cannot be had %s', async (_name, spoil) => {
    const key = await newKey('one');
    const { identity, serviceAccountDir } = await startIdentity(await startApiServer([key]));
    await spoil(serviceAccountDir);
    await expect(identity.check(await token(key))).rejects.toMatchObject({ code: 'not_ready' });
  });
});

const encoded = (value: object) => Buffer.from(JSON.stringify(value)).toString('base64url');

function changedPayload(given: string): string {
  const [header, payload, signature] = given.split('.');
  const claims = JSON.parse(Buffer.from(payload!, 'base64url').toString());
  return `${header}.${encoded({ ...claims, sub: 'system:serviceaccount:motet:operator' })}.${signature}`;
}

async function signedByHmac(key: Key): Promise<string> {
  const secret = Buffer.from(JSON.stringify(await exportJWK(key.publicKey)));
  const claims = { iss: issuer, aud: 'motet-engine', sub: 'system:serviceaccount:motet:gateway' };
  return new SignJWT({ ...claims, exp: startMs / 1000 + 60 })
    .setProtectedHeader({ alg: 'HS256', kid: key.kid })
    .sign(secret);
}

test('takes the keys of a real API server, and the tokens that it makes', { timeout: 60_000 }, async () => {
  const plane = await sharedControlPlane();
  const namespace = await createNamespace(plane);
  const makeToken = async (account: string, ...options: string[]) => {
    await kubectl(plane, ['create', 'serviceaccount', '-n', namespace, account]);
    return (await kubectl(plane, ['create', 'token', '-n', namespace, account, ...options])).trim();
  };
  const { clusters } = JSON.parse(await kubectl(plane, ['config', 'view', '--raw', '-o', 'json']));
  const { server, 'certificate-authority-data': ca } = clusters[0].cluster;
  const serviceAccountDir = await temporaryFolder();
  await mkdir(serviceAccountDir, { recursive: true });
  await writeFile(join(serviceAccountDir, 'token'), await makeToken('engine'));
  await writeFile(join(serviceAccountDir, 'ca.crt'), Buffer.from(ca, 'base64'));
  const identity = new CallerIdentity({
    trusted: [`${namespace}/gateway`],
    apiUrl: server,
    serviceAccountDir,
    log: pino({ level: 'silent' }),
    wallClock: Date.now,
  });

  await identity.check(await makeToken('gateway', '--audience=motet-engine'));
  const stranger = await makeToken('stranger', '--audience=motet-engine');
  await expect(identity.check(stranger)).rejects.toMatchObject({ code: 'forbidden' });
  const forTheApiServer = (await kubectl(plane, ['create', 'token', '-n', namespace, 'gateway'])).trim();
  await expect(identity.check(forTheApiServer)).rejects.toMatchObject({ code: 'unauthorized' });
});
