// STS, the agents of nodes, and an S3 that knows session tokens are fakes (tests/fixtures/fake-aws.ts): there is no AWS here.
import { writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { Agent } from 'undici';
import { describe, expect, onTestFinished, test } from 'vitest';
import type { RequestOptions } from '../../../engine/download.ts';
import { s3Keys, sourceAccess } from '../../../engine/sources/access.ts';
import { AwsRole, roleSource } from '../../../engine/sources/aws-role.ts';
import { type FakeAws, startFakeAws, startFakeS3 } from '../../fixtures/fake-aws.ts';
import { adapterFilesOf, fetchAdapter, startSources } from '../../fixtures/remote-models.ts';
import { temporaryFolder } from '../../fixtures/source-files.ts';

const roleArn = 'arn:aws:iam::123456789012:role/motet';
const minuteMs = 60_000;

function requestOptions(signal = new AbortController().signal): RequestOptions {
  const dispatcher = new Agent();
  onTestFinished(() => dispatcher.destroy());
  return { dispatcher, limits: { stallMs: 10_000, maxTries: 2, backoffMs: 1 }, signal };
}

/** Variables as EKS's webhook sets them for a ServiceAccount with a role, with a token in the file. */
async function webIdentity(fake: FakeAws, more: Record<string, string> = {}) {
  const folder = await temporaryFolder();
  const tokenFile = join(folder, 'token');
  await writeFile(tokenFile, 'header.one.signature\n');
  const env: Record<string, string> = {
    HOME: folder,
    AWS_ROLE_ARN: roleArn,
    AWS_WEB_IDENTITY_TOKEN_FILE: tokenFile,
    AWS_REGION: 'eu-central-1',
    AWS_ENDPOINT_URL_STS: fake.url,
    ...more,
  };
  return { folder, tokenFile, env };
}

/** The same for EKS Pod Identity. */
async function podIdentity(fake: FakeAws, more: Record<string, string> = {}) {
  const folder = await temporaryFolder();
  const tokenFile = join(folder, 'pod-token');
  await writeFile(tokenFile, 'pod.one.signature');
  const env: Record<string, string> = {
    HOME: folder,
    AWS_CONTAINER_CREDENTIALS_FULL_URI: `${fake.url}/v1/credentials`,
    AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE: tokenFile,
    ...more,
  };
  return { folder, tokenFile, env };
}

const roleOf = (env: Record<string, string>, now?: () => number) =>
  new AwsRole(roleSource(env, env.AWS_REGION ?? 'us-east-1')!, now);

describe('an adapter in a bucket', () => {
  test.each([
    ['a web identity', webIdentity, 'POST'],
    ['a container', podIdentity, 'GET'],
  ])('comes with keys of %s, had once, and the session token signed', async (_name, setUp, method) => {
    const fake = await startFakeAws();
    const { env } = await setUp(fake);
    const { files, digest } = await adapterFilesOf();
    const paths = Object.entries(files).map(([name, content]) => [`/voices/poet/${name}`, content]);
    const s3Endpoint = await startFakeS3(fake.keys, Object.fromEntries(paths));
    const { sources, lines } = await startSources({ env, given: { s3Endpoint } });
    expect(await fetchAdapter(sources, 's3://voices/poet', digest)).toBe(digest);
    expect(fake.asked.map((one) => one.method)).toEqual([method]);
    expect(JSON.stringify(lines)).not.toMatch(/session|signature/);
  });

  test('that may not be read says whose keys were sent', async () => {
    const fake = await startFakeAws();
    const { env } = await webIdentity(fake);
    const s3Endpoint = await startFakeS3({ ...fake.keys, secretAccessKey: 'another' }, {});
    const { sources } = await startSources({ env, given: { s3Endpoint } });
    await expect(fetchAdapter(sources, 's3://voices/poet', `sha256:${'0'.repeat(64)}`)).rejects.toThrow(
      `answered 403 (SignatureDoesNotMatch; keys of ${roleArn} were sent)`,
    );
  });
});

describe('a web identity', () => {
  test('is shown to STS as AssumeRoleWithWebIdentity wants it', async () => {
    const fake = await startFakeAws();
    const { env } = await webIdentity(fake, { AWS_ROLE_SESSION_NAME: 'engine pod/7' });
    expect(await roleOf(env).keys(requestOptions())).toEqual({
      accessKeyId: 'ASIAONE',
      secretAccessKey: 'secret/one',
      sessionToken: 'session+one==',
      role: roleArn,
    });
    expect(fake.asked).toEqual([
      {
        method: 'POST',
        path: '/',
        authorization: undefined,
        form: {
          Action: 'AssumeRoleWithWebIdentity',
          Version: '2011-06-15',
          RoleArn: roleArn,
          RoleSessionName: 'engine-pod-7',
          WebIdentityToken: 'header.one.signature',
        },
      },
    ]);
  });

  test.each([
    [{}, 'us-east-1', 'https://sts.us-east-1.amazonaws.com'],
    [{}, 'cn-north-1', 'https://sts.cn-north-1.amazonaws.com.cn'],
    [{ AWS_STS_REGIONAL_ENDPOINTS: 'legacy' }, 'us-east-1', 'https://sts.amazonaws.com'],
    [{ AWS_ENDPOINT_URL: 'https://all' }, 'us-east-1', 'https://all'],
    [{ AWS_ENDPOINT_URL: 'https://all', AWS_ENDPOINT_URL_STS: 'https://sts' }, 'us-east-1', 'https://sts'],
  ])('with %j in %s asks %s', (env, region, endpoint) => {
    expect(roleSource({ AWS_WEB_IDENTITY_TOKEN_FILE: '/t', ...env }, region)).toMatchObject({ endpoint });
  });

  test('of the region where the pod runs, whatever that of the buckets', () => {
    const env = { AWS_WEB_IDENTITY_TOKEN_FILE: '/t', AWS_REGION: 'eu-west-1' };
    const { s3 } = sourceAccess(env, { s3Region: 'us-west-2' });
    expect(s3.region).toBe('us-west-2');
    expect(s3.role!.source).toMatchObject({ endpoint: 'https://sts.eu-west-1.amazonaws.com' });
  });

  test.each([
    ['AccessDenied', 403, /answered 403 \(AccessDenied\); the trust policy of arn:\S+ must allow sts:Assume/],
    ['InvalidIdentityToken', 400, /no identity provider for the cluster's issuer/],
    ['ExpiredTokenException', 400, /the token in \S+ is too old/],
    ['IDPRejectedClaim', 403, /\(IDPRejectedClaim\); check the role/],
  ])('that is refused with %s is told what to do', async (code, status, message) => {
    const fake = await startFakeAws();
    const { env } = await webIdentity(fake);
    const secret = 'Not authorized: header.one.signature';
    const body = `<ErrorResponse><Error><Type>Sender</Type><Code>${code}</Code><Message>${secret}</Message></Error></ErrorResponse>`;
    fake.refusal = { status, body };
    const error = await roleOf(env)
      .keys(requestOptions())
      .catch((thrown) => thrown);
    expect(error).toMatchObject({ code: 'source_unavailable', message: expect.stringMatching(message) });
    expect(error.message).toContain(`keys of ${roleArn} from ${fake.url}`);
    expect(`${error.message} ${error.cause}`).not.toContain('signature');
  });

  test.each<[string, Record<string, string>, RegExp]>([
    ['a role', { AWS_ROLE_ARN: '' }, /^AWS_ROLE_ARN: expected the role beside/],
    ['its file', { AWS_WEB_IDENTITY_TOKEN_FILE: '/none' }, /^\/none: expected a token there, as AWS_WEB_ID/],
    ['TLS to STS', { AWS_ENDPOINT_URL_STS: 'http://sts.example' }, /STS: expected https, or a loopback/],
  ])('without %s is told so and sent nowhere', async (_name, more, message) => {
    const fake = await startFakeAws();
    const { env } = await webIdentity(fake, more);
    await expect(roleOf(env).keys(requestOptions())).rejects.toThrow(message);
    expect(fake.asked).toEqual([]);
  });

  test('follows no redirect: the token goes to STS alone', async () => {
    const [fake, other] = [await startFakeAws(), await startFakeAws()];
    const { env } = await webIdentity(fake);
    fake.refusal = { status: 307, body: '', headers: { location: other.url } };
    await expect(roleOf(env).keys(requestOptions())).rejects.toThrow('a redirect');
    expect(other.asked).toEqual([]);
  });
});

describe('a container', () => {
  test('shows the token that its file has now', async () => {
    const fake = await startFakeAws();
    const { env, tokenFile } = await podIdentity(fake);
    const now = Date.now();
    let laterMs = 0;
    const role = roleOf(env, () => now + laterMs);
    expect(await role.keys(requestOptions())).toMatchObject({ accessKeyId: 'ASIAONE', role: roleArn });
    await writeFile(tokenFile, 'pod.two.signature\n');
    laterMs = 59 * minuteMs;
    fake.keys.expiration = new Date(now + 120 * minuteMs).toISOString();
    await role.keys(requestOptions());
    expect(fake.asked).toMatchObject([
      { method: 'GET', path: '/v1/credentials', authorization: 'pod.one.signature' },
      { authorization: 'pod.two.signature' },
    ]);
  });

  test('of ECS is asked at its fixed address', () => {
    const env = { AWS_CONTAINER_CREDENTIALS_RELATIVE_URI: '/v2/credentials/1234' };
    expect(roleSource(env, 'us-east-1')).toEqual({
      kind: 'container',
      uri: 'http://169.254.170.2/v2/credentials/1234',
      tokenFile: null,
      token: null,
    });
  });

  test.each([
    'http://169.254.169.254/latest',
    'http://agent.example/x',
    'http://127.0.0.1.example/x',
    'ftp://127.0.0.1/x',
    'nowhere',
  ])('is not asked at %s', async (uri) => {
    const { env } = await podIdentity(await startFakeAws(), { AWS_CONTAINER_CREDENTIALS_FULL_URI: uri });
    await expect(roleOf(env).keys(requestOptions())).rejects.toThrow(
      /^AWS_CONTAINER_CREDENTIALS_FULL_URI: expected https, or a loopback address, or one of 169.254.170.2, /,
    );
  });

  test('that refuses is told with its code, and without the path, which may be a secret', async () => {
    const fake = await startFakeAws();
    const { env } = await podIdentity(fake);
    fake.refusal = { status: 403, body: '{"code":"AccessDeniedException","message":"pod.one.signature"}' };
    await expect(roleOf(env).keys(requestOptions())).rejects.toThrow(
      `keys from ${fake.url}: it answered 403 (AccessDeniedException); check that this ServiceAccount is associated with a role`,
    );
    fake.refusal = { status: 500, body: '' };
    await expect(roleOf(env).keys(requestOptions())).rejects.toThrow(
      `keys from ${fake.url}: the server answered 500`,
    );
    expect(fake.asked).toHaveLength(3); // what may pass is tried again
  });

  test.each([
    [
      'without a session token',
      { sessionToken: '' },
      /expected keys with a session token and when they expire/,
    ],
    ['without an end', { expiration: 'soon' }, /expected keys with a session token and when they expire/],
    [
      'of the past',
      { expiration: '2020-01-01T00:00:00Z' },
      /expired at 2020-01-01T00:00:00.000Z; is the clock/,
    ],
  ])('that answers with keys %s is told so', async (_name, keys, message) => {
    const fake = await startFakeAws();
    Object.assign(fake.keys, keys);
    const { env } = await podIdentity(fake);
    const error = await roleOf(env)
      .keys(requestOptions())
      .catch((thrown) => thrown);
    expect(error.message).toMatch(message);
    expect(error.message).not.toContain('secret');
  });
});

describe('keys of a role', () => {
  async function startRole() {
    const fake = await startFakeAws();
    const { env } = await webIdentity(fake);
    const beginMs = Date.now();
    fake.keys.expiration = new Date(beginMs + 60 * minuteMs).toISOString();
    const clock = { ms: beginMs };
    return { fake, role: roleOf(env, () => clock.ms), clock };
  }

  test('are asked for once by all who want them at the same time', async () => {
    const { fake, role } = await startRole();
    const options = requestOptions();
    await Promise.all(Array.from({ length: 8 }, () => role.keys(options)));
    expect(fake.asked).toHaveLength(1);
  });

  test('serve until five minutes before their end, then there are new ones', async () => {
    const { fake, role, clock } = await startRole();
    const options = requestOptions();
    await role.keys(options);
    clock.ms += 54 * minuteMs;
    await role.keys(options);
    expect(fake.asked).toHaveLength(1);
    clock.ms += 2 * minuteMs;
    fake.keys.accessKeyId = 'ASIATWO';
    fake.keys.expiration = new Date(clock.ms + 60 * minuteMs).toISOString();
    expect(await role.keys(options)).toMatchObject({ accessKeyId: 'ASIATWO' });
  });

  test('serve on while new ones cannot be had, which is tried now and then, until they end', async () => {
    const { fake, role, clock } = await startRole();
    const options = requestOptions();
    await role.keys(options);
    clock.ms += 56 * minuteMs;
    fake.refusal = { status: 403, body: '' };
    for (let i = 0; i < 3; i++) expect(await role.keys(options)).toMatchObject({ accessKeyId: 'ASIAONE' });
    expect(fake.asked).toHaveLength(2);
    clock.ms += minuteMs;
    await role.keys(options);
    expect(fake.asked).toHaveLength(3);
    clock.ms += 3 * minuteMs;
    await expect(role.keys(options)).rejects.toThrow('it answered 403');
  });

  test('are waited for by those that stay when the one who asked goes', async () => {
    const { fake, role } = await startRole();
    const leaves = new AbortController();
    const first = role.keys(requestOptions(leaves.signal));
    const second = role.keys(requestOptions());
    leaves.abort(new Error('gone'));
    await expect(first).rejects.toThrow('gone');
    expect(await second).toMatchObject({ accessKeyId: 'ASIAONE' });
    expect(fake.asked).toHaveLength(1);
  });
});

test('keys come from variables, a web identity, the credentials file and a container, in this order', async () => {
  const fake = await startFakeAws();
  const { folder, env: web } = await webIdentity(fake);
  const { env: container } = await podIdentity(fake, { HOME: folder });
  const credentials = join(folder, 'credentials');
  await writeFile(credentials, '[default]\naws_access_key_id = FILE\naws_secret_access_key = f\n');
  const file = { AWS_SHARED_CREDENTIALS_FILE: credentials };
  const variables = { AWS_ACCESS_KEY_ID: 'VARIABLE', AWS_SECRET_ACCESS_KEY: 'v' };
  const idOf = async (env: Record<string, string>) => {
    const keys = await s3Keys(sourceAccess({ HOME: folder, ...env }), requestOptions());
    return keys && `${keys.accessKeyId} ${fake.asked.splice(0).map(({ method }) => method)}`.trim();
  };
  expect(await idOf({ ...variables, ...web, ...file, ...container })).toBe('VARIABLE');
  expect(await idOf({ ...web, ...file, ...container })).toBe('ASIAONE POST');
  expect(await idOf({ ...file, ...container })).toBe('FILE');
  expect(await idOf({ ...container, AWS_SHARED_CREDENTIALS_FILE: '/none' })).toBe('ASIAONE GET');
  expect(await idOf({ AWS_SHARED_CREDENTIALS_FILE: '/none' })).toBe(null);
});
