// A real OpenID Connect provider (oidc-provider, which is certified) in this process: machines get access tokens by client
// credentials, people ID tokens by the code flow. It stops with the test.

import { createHash, randomBytes } from 'node:crypto';
import { once } from 'node:events';
import { createServer, type RequestListener } from 'node:http';
import type { AddressInfo } from 'node:net';
import { exportJWK } from 'jose';
import { type Configuration, Provider } from 'oidc-provider';
import { onTestFinished } from 'vitest';
import type { Key } from './issuer.ts';

/** Of the gateway, as the provider knows it: what machines ask a token for. */
const resource = 'https://motet.example';
const redirectUri = 'https://client.example/back';
/** Client of the people's tool; the audience of their ID tokens. */
export const webClientId = 'web';
const secret = 'a-secret-of-a-client';

export type OidcProvider = {
  url: string;
  /** Signs with this key from now on and shows no other. */
  signWith(key: Key): Promise<void>;
  /** Until it is started again, nobody listens. */
  stop(): Promise<void>;
  start(): Promise<void>;
  /** An access token for audience `motet`, with claim team `red`. `sub` is the client. */
  machineToken(): Promise<string>;
  /** An ID token for audience `web` of somebody in the groups `people` and `staff`. */
  personToken(): Promise<string>;
};

export async function startProvider(first: Key): Promise<OidcProvider> {
  let answer: RequestListener = (_req, res) => void res.writeHead(503).end();
  const server = createServer((req, res) => answer(req, res)).listen(0, '127.0.0.1');
  await once(server, 'listening');
  const { port } = server.address() as AddressInfo;
  const url = `http://127.0.0.1:${port}`;
  const stop = async () => {
    server.close();
    server.closeAllConnections();
    if (server.listening) await once(server, 'close');
  };
  onTestFinished(stop);

  const signWith = async (key: Key) => {
    const provider = new Provider(url, configuration({ ...(await exportJWK(key.privateKey)), kid: key.kid }));
    const handle = provider.callback();
    answer = (req, res) => {
      // Who comes to log in is let in, without a page.
      if (req.url?.startsWith('/interaction/')) {
        const result = { login: { accountId: 'alice' } };
        void provider.interactionFinished(req, res, result, { mergeWithLastSubmission: false });
      } else void handle(req, res);
    };
  };
  await signWith(first);

  const ask = async (form: Record<string, string>, client: string) => {
    const authorization = `Basic ${Buffer.from(`${client}:${secret}`).toString('base64')}`;
    const body = new URLSearchParams(form);
    const answer = await fetch(`${url}/token`, { method: 'POST', headers: { authorization }, body });
    const tokens = (await answer.json()) as { access_token?: string; id_token?: string };
    if (answer.status !== 200) throw new Error(`expected tokens, got ${JSON.stringify(tokens)}`);
    return tokens;
  };
  return {
    url,
    signWith,
    stop,
    async start() {
      server.listen(port, '127.0.0.1');
      await once(server, 'listening');
    },
    async machineToken() {
      const { access_token } = await ask({ grant_type: 'client_credentials', resource }, 'machine');
      return access_token!;
    },
    async personToken() {
      const verifier = randomBytes(32).toString('base64url');
      const code = await codeOf(url, createHash('sha256').update(verifier).digest('base64url'));
      const form = {
        grant_type: 'authorization_code',
        code,
        redirect_uri: redirectUri,
        code_verifier: verifier,
      };
      return (await ask(form, webClientId)).id_token!;
    },
  };
}

/** Goes where a browser would be sent, with its cookies, until it comes back to the client with a code. */
async function codeOf(url: string, challenge: string): Promise<string> {
  const query = new URLSearchParams({
    client_id: webClientId,
    response_type: 'code',
    scope: 'openid',
    redirect_uri: redirectUri,
    code_challenge: challenge,
    code_challenge_method: 'S256',
  });
  const cookies = new Map<string, string>();
  let at = `${url}/auth?${query}`;
  for (let step = 0; step < 8; step += 1) {
    const cookie = [...cookies].map(([name, value]) => `${name}=${value}`).join('; ');
    const answer = await fetch(at, { redirect: 'manual', headers: { cookie } });
    for (const line of answer.headers.getSetCookie()) {
      const [, name = '', value = ''] = /^([^=]+)=([^;]*)/.exec(line) ?? [];
      cookies.set(name, value);
    }
    const next = answer.headers.get('location');
    if (next === null) throw new Error(`expected to be sent on, got ${answer.status} ${await answer.text()}`);
    at = new URL(next, url).href;
    if (at.startsWith(redirectUri)) return new URL(at).searchParams.get('code')!;
  }
  throw new Error('expected a code after 8 redirects');
}

function configuration(key: object): Configuration {
  return {
    jwks: { keys: [key] } as NonNullable<Configuration['jwks']>,
    cookies: { keys: ['a-key-for-cookies'] },
    clients: [
      {
        client_id: 'machine',
        client_secret: secret,
        grant_types: ['client_credentials'],
        redirect_uris: [],
        response_types: [],
      },
      {
        client_id: webClientId,
        client_secret: secret,
        redirect_uris: [redirectUri],
      },
    ],
    clientDefaults: { id_token_signed_response_alg: 'ES256' },
    claims: { openid: ['sub', 'groups'] },
    conformIdTokenClaims: false,
    findAccount: (_ctx, accountId) => ({
      accountId,
      claims: () => ({ sub: accountId, groups: ['people', 'staff'] }),
    }),
    async loadExistingGrant({ oidc }) {
      const grant = new oidc.provider.Grant({
        accountId: oidc.session!.accountId!,
        clientId: oidc.client!.clientId,
      });
      grant.addOIDCScope('openid');
      await grant.save();
      return grant;
    },
    extraTokenClaims: () => ({ team: 'red' }),
    features: {
      devInteractions: { enabled: false },
      clientCredentials: { enabled: true },
      resourceIndicators: {
        enabled: true,
        getResourceServerInfo: () => ({
          scope: '',
          audience: 'motet',
          accessTokenFormat: 'jwt',
          accessTokenTTL: 300,
          jwt: { sign: { alg: 'ES256' } },
        }),
      },
    },
  };
}
