// An issuer of OpenID Connect that serves its configuration and keys on loopback, and tokens of it.

import { once } from 'node:events';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { exportJWK, generateKeyPair, type JWTPayload, SignJWT } from 'jose';
import { onTestFinished } from 'vitest';

export type Key = Awaited<ReturnType<typeof generateKeyPair>> & { kid: string };

export const newKey = async (kid: string, alg = 'ES256'): Promise<Key> => ({
  kid,
  ...(await generateKeyPair(alg, { extractable: true })),
});

export async function startIssuer(...keys: Key[]) {
  const issuer = { url: '', keys, numAsked: 0, isAway: false };
  const server = createServer(async (req, res) => {
    issuer.numAsked += 1;
    if (issuer.isAway) return void res.writeHead(500).end();
    if (req.url !== '/jwks')
      return void res.end(JSON.stringify({ issuer: issuer.url, jwks_uri: `${issuer.url}/jwks` }));
    const list = issuer.keys.map(async ({ kid, publicKey }) => ({
      ...(await exportJWK(publicKey)),
      kid,
      use: 'sig',
    }));
    res.end(JSON.stringify({ keys: await Promise.all(list) }));
  }).listen(0, '127.0.0.1');
  await once(server, 'listening');
  issuer.url = `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
  onTestFinished(() => void server.close());
  return issuer;
}

/** undefined takes a claim out. */
export type Claims = { [name in keyof JWTPayload]?: JWTPayload[name] | undefined };

export const startMs = Date.UTC(2030, 0, 1);

/** A good token at `startMs` with claims replaced; undefined takes one out. */
export function sign(
  issuer: { url: string },
  key: Key,
  claims: Claims = {},
  { alg = 'ES256', nowMs = startMs } = {},
) {
  const nowSeconds = Math.floor(nowMs / 1000);
  const payload = {
    iss: issuer.url,
    aud: 'motet',
    sub: 'someone',
    team: 'red',
    exp: nowSeconds + 300,
    ...claims,
  };
  return new SignJWT(payload as JWTPayload).setProtectedHeader({ alg, kid: key.kid }).sign(key.privateKey);
}
