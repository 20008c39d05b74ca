import { writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { Agent } from 'undici';
import { describe, expect, test } from 'vitest';
import { hfToken, registryLogin, s3Keys, sourceAccess } from '../../../engine/sources/access.ts';
import { temporaryFolder } from '../../fixtures/source-files.ts';

/** What follows from the variables, with a home that has the files. */
async function accessWith(env: Record<string, string>, files: Record<string, string> = {}) {
  const home = await temporaryFolder();
  for (const [name, text] of Object.entries(files)) await writeFile(join(home, name), text);
  const inHome = {
    AWS_SHARED_CREDENTIALS_FILE: join(home, 'aws'),
    HF_TOKEN_PATH: join(home, 'hf'),
    DOCKER_CONFIG: home,
  };
  return { home, access: sourceAccess({ HOME: home, ...inHome, ...env }) };
}

const nobodyIsAsked = {
  dispatcher: new Agent(),
  limits: { stallMs: 1, maxTries: 1, backoffMs: 1 },
  signal: AbortSignal.abort(),
};

describe('a token of the hub', () => {
  test('is the variable, or what the file has now, or none', async () => {
    const { home, access } = await accessWith({});
    expect(await hfToken(access)).toBe(null);
    await writeFile(join(home, 'hf'), ' hf_one\n');
    expect(await hfToken(access)).toBe('hf_one');
    await writeFile(join(home, 'hf'), 'hf_two');
    expect(await hfToken(access)).toBe('hf_two');
    expect(await hfToken((await accessWith({ HF_TOKEN: 'hf_three' }, { hf: 'hf_one' })).access)).toBe(
      'hf_three',
    );
  });

  test('in a file that cannot be read is an error without it', async () => {
    const { home, access } = await accessWith({});
    access.hf.tokenFile = home; // a folder
    await expect(hfToken(access)).rejects.toThrow(
      `${home}: expected a readable file of credentials, got EISDIR`,
    );
  });
});

describe('keys of S3', () => {
  const file = [
    '# as `aws configure` writes it',
    '[default]',
    'aws_access_key_id = one',
    'aws_secret_access_key=s=1',
    '',
    '[ other ]',
    'AWS_ACCESS_KEY_ID=two',
    'aws_secret_access_key = s2',
    'aws_session_token = t2',
    '[half]',
    'aws_access_key_id = three',
  ].join('\r\n');

  test.each([
    [
      'of the variables',
      { AWS_ACCESS_KEY_ID: 'a', AWS_SECRET_ACCESS_KEY: 'b', AWS_SESSION_TOKEN: 'c' },
      { accessKeyId: 'a', secretAccessKey: 'b', sessionToken: 'c' },
    ],
    ['of the default profile', {}, { accessKeyId: 'one', secretAccessKey: 's=1', sessionToken: undefined }],
    [
      'of a profile',
      { AWS_PROFILE: 'other' },
      { accessKeyId: 'two', secretAccessKey: 's2', sessionToken: 't2' },
    ],
    ['of half a profile', { AWS_PROFILE: 'half' }, null],
    ['of a profile that is not there', { AWS_PROFILE: 'none' }, null],
  ])('are those %s', async (_name, env, keys) => {
    const { access } = await accessWith(env, { aws: file });
    expect(await s3Keys(access, nobodyIsAsked)).toEqual(keys);
  });

  test('are none without a file', async () => {
    expect(await s3Keys((await accessWith({})).access, nobodyIsAsked)).toBe(null);
  });
});

describe('the login of a registry', () => {
  const base64 = (text: string) => Buffer.from(text).toString('base64');
  test.each([
    [
      'by its name',
      'ghcr.io',
      { 'ghcr.io': { auth: base64('me:secret') } },
      { basic: 'me:secret', bearer: null },
    ],
    [
      'by its address',
      'h:5000',
      { 'https://h:5000/': { auth: base64('a:b') } },
      { basic: 'a:b', bearer: null },
    ],
    ['in the clear', 'h', { h: { username: 'a', password: 'b' } }, { basic: 'a:b', bearer: null }],
    [
      'of Docker Hub',
      'docker.io',
      { 'https://index.docker.io/v1/': { auth: base64('a:b') } },
      { basic: 'a:b', bearer: null },
    ],
    ['as a token', 'h', { h: { registrytoken: 't' } }, { basic: null, bearer: 't' }],
    ['of another', 'h', { other: { auth: base64('a:b') } }, null],
    ['kept by a helper', 'h', { h: {} }, null],
  ])('%s is found', async (_name, registry, auths, login) => {
    const { access } = await accessWith({}, { 'config.json': JSON.stringify({ auths }) });
    expect(await registryLogin(access, registry)).toEqual(login);
  });

  test('in a file that is damaged is an error without what the file has', async () => {
    const { access } = await accessWith({}, { 'config.json': '{"auths": secret' });
    const error = await registryLogin(access, 'h').catch((thrown) => thrown);
    expect(error.message).toMatch(
      /config.json: expected JSON as docker login writes it, got something else$/,
    );
    expect(String(error.cause)).not.toContain('secret');
  });
});
