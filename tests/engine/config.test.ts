import { mkdtempSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, expect, test } from 'vitest';
import { type Config, parseConfig } from '../../engine/config.ts';

const parse = (args: string[], env: Record<string, string> = {}) =>
  parseConfig(['--model', 'm', ...args], env) as Config;

describe('engine settings', () => {
  test('have sensible defaults', () => {
    expect(parse([])).toMatchObject({
      model: 'm',
      host: '127.0.0.1',
      port: 8000,
      deviceMemoryBytes: 2 ** 30,
      hostMemoryBytes: 2 ** 30,
      weightMemoryBytes: 0,
      quantization: 'keep',
      activations: 'int8',
      kvCacheDtype: 'auto',
      adapterQuantization: 'keep',
      maxModelLen: null,
      maxBatchTokens: 256,
      maxSequences: 64,
      adapters: [],
      apiKeys: null,
      callers: null,
      modelDigest: null,
      device: 'cpu',
      sourceCacheBytes: 10 * 2 ** 30,
      mergeCacheBytes: 2 ** 30,
    });
  });

  test('may be written with = and a space', () => {
    expect(parse(['--port=1', '--max-waiting', '2'])).toMatchObject({ port: 1, maxWaiting: 2 });
  });

  test('come from the environment, and a flag wins', () => {
    const env = { MOTET_PORT: '5', MOTET_MAX_WAITING: '6' };
    expect(parse(['--port', '7'], env)).toMatchObject({ port: 7, maxWaiting: 6 });
  });

  test.each([
    ['1048576', 2 ** 20],
    ['512MiB', 2 ** 29],
    ['1.5GiB', 1.5 * 2 ** 30],
    ['2GB', 2e9],
  ])('read --device-memory %s', (given, expected) => {
    expect(parse(['--device-memory', given]).deviceMemoryBytes).toBe(expected);
  });

  test('bound the memory of weights', () => {
    expect(parse(['--weight-memory', '3GiB']).weightMemoryBytes).toBe(3 * 2 ** 30);
    expect(() => parse(['--weight-memory', 'half'])).toThrow(/--weight-memory: expected bytes from 0/);
  });

  test('put KV on disk only where there is a way to it', () => {
    expect(parse(['--kv-disk', '5GB']).kvDiskBytes).toBe(5e9);
    expect(parse([]).kvDiskBytes).toBe(0);
    for (const [flag, value] of [
      ['--host-memory', '0'],
      ['--prefix-cache', 'off'],
    ])
      expect(() => parse(['--kv-disk', '5GB', flag!, value!])).toThrow(
        /--kv-disk: expected --prefix-cache on and --host-memory beside it/,
      );
  });

  test('collect adapters', () => {
    const { adapters } = parse(['--adapter', 'a=/x', '--adapter=b=/y=z']);
    expect(adapters).toEqual([
      { name: 'a', path: '/x' },
      { name: 'b', path: '/y=z' },
    ]);
    expect(parse([], { MOTET_ADAPTER: 'a=/x,b=/y' }).adapters.length).toBe(2);
  });

  test.each([
    [['--prot', '1'], '--prot: unknown flag; did you mean --port?'],
    [['--max-sequence', '1'], 'did you mean --max-sequences?'],
    [['--kv-cache-dtype', 'fp8'], '--kv-cache-dtype: expected one of auto, f16, int8, got "fp8"'],
    [
      ['--activations', 'f32', '--kv-cache-dtype', 'int8'],
      '--kv-cache-dtype: expected auto beside --activations f32, which keeps KV in f32 too, got int8',
    ],
    [['stray'], 'expected a flag, got "stray"'],
    [['--port'], '--port: expected PORT, got nothing'],
    [['--port', '70000'], '--port: expected an integer from 0 to 65535, got "70000"'],
    [['--port', '-1'], '--port: expected an integer from 0 to 65535, got "-1"'],
    [['--port', '1e3'], '--port: expected an integer'],
    [['--port', '1', '--port', '2'], '--port: expected once, got it twice'],
    [['--device-memory', '1TiBi'], '--device-memory: expected bytes from'],
    [['--device-memory', '1'], '--device-memory: expected bytes from'],
    [['--quantization', 'int3'], '--quantization: expected one of keep, int4, int8, got "int3"'],
    [['--adapter-quantization', 'int4'], '--adapter-quantization: expected one of keep, int8, got "int4"'],
    [['--adapter', 'a'], '--adapter: expected NAME=PATH, got "a"'],
    [['--insecure=maybe'], '--insecure: expected true or false'],
    [
      ['--max-batch-tokens', '8', '--max-sequences', '9'],
      '--max-sequences: expected at most --max-batch-tokens',
    ],
    [['--host', '0.0.0.0'], '--host 0.0.0.0: expected --api-key-file'],
    [['--host', '0.0.0.0', '--insecure'], 'expected --adapter-root'],
    [['--api-key-file', '/does/not/exist'], '--api-key-file: expected a readable file, got ENOENT'],
  ])('refuse %j', (args, message) => {
    expect(() => parse(args)).toThrow(message);
  });

  const digest = `sha256:${'0123'.repeat(16)}`;
  test('take a model that is fetched, with its digest', () => {
    const config = parseConfig(['--model', 'https://host/m.gguf', '--model-digest', digest], {});
    expect(config).toMatchObject({ model: 'https://host/m.gguf', modelDigest: digest });
    expect(parseConfig(['--model', 'file:///m.gguf'], {})).toMatchObject({ model: 'file:///m.gguf' });
    expect(parseConfig(['--model', 'hf://o/n@main'], {})).toMatchObject({ modelDigest: null });
    expect(parseConfig(['--model', 'oci://h/r', '--model-digest', digest], {})).toMatchObject({
      modelDigest: digest,
    });
  });

  test('say how sources are reached, with the variables of their own tools behind them', () => {
    const env = {
      HOME: '/home/m',
      HF_ENDPOINT: 'https://hub/',
      AWS_REGION: 'eu-1',
      AWS_ACCESS_KEY_ID: 'a',
      AWS_SECRET_ACCESS_KEY: 's',
    };
    const config = parseConfig(
      [
        '--model',
        'm',
        '--source-bandwidth',
        '10MB',
        '--adapter',
        'a=hf://o/n@v1',
        '--s3-endpoint',
        'http://minio:9000',
      ],
      env,
    );
    expect(config).toMatchObject({
      adapters: [{ name: 'a', path: 'hf://o/n@v1' }],
      access: {
        bytesPerSecond: 10e6,
        hf: { endpoint: 'https://hub', token: null, tokenFile: '/home/m/.cache/huggingface/token' },
        s3: {
          endpoint: 'http://minio:9000',
          region: 'eu-1',
          keys: { accessKeyId: 'a', secretAccessKey: 's' },
        },
        oci: { configFile: '/home/m/.docker/config.json', plainHttp: [] },
      },
    });
    expect(parseConfig(['--model', 'm'], {})).toMatchObject({
      access: { bytesPerSecond: null, s3: { keys: null, endpoint: null } },
    });
  });

  test.each([
    [
      ['--model', 'https://host/m.gguf'],
      '--model-digest: expected the digest of the model beside an https or s3 source',
    ],
    [
      ['--model', 'https://host/m', '--model-digest', '00'],
      '--model-digest: expected sha256: and 64 hex digits',
    ],
    [
      ['--model', 'm', '--model-digest', digest],
      '--model-digest: expected only beside a model that is fetched',
    ],
    [
      ['--model', 'gs://bucket/m'],
      '--model: expected a path or file:///PATH or pvc://CLAIM/PATH or https://HOST/PATH or s3://BUCKET/KEY',
    ],
    [
      ['--model', 'm', '--adapter', `a=https://host/a`],
      '--adapter: expected NAME=PATH, or NAME=URI with a scheme',
    ],
    [['--model', 's3://bucket/m.gguf'], '--model-digest: expected the digest of the model'],
    [
      ['--model', 'm', '--s3-endpoint', 'minio:9000'],
      '--s3-endpoint: expected https://HOST[:PORT][/PATH], or http://',
    ],
    [['--model', 'm', '--hf-endpoint', 'https://user:secret@hub'], '--hf-endpoint: expected https://HOST'],
    [['--model', 'm', '--oci-plain-http', 'http://host'], '--oci-plain-http: expected HOST or HOST:PORT'],
    [['--model', 'm', '--source-ca', '/none'], '--source-ca: expected a readable file, got ENOENT'],
    [['--model', 'm', '--source-ca', '/etc/hostname'], '--source-ca: expected certificates in PEM'],
    [['--model', 'm', '--device', 'tpu'], '--device: expected one of cpu, nvidia, got "tpu"'],
  ])('refuse %j', (args, message) => {
    expect(() => parseConfig(args, {})).toThrow(message);
  });

  const pod = { KUBERNETES_SERVICE_HOST: '10.96.0.1', KUBERNETES_SERVICE_PORT: '443' };
  test('know the API server of their pod', () => {
    const args = ['--trusted-service-accounts', 'motet/gateway, motet/operator'];
    expect(parse(args, pod).callers).toEqual({
      trusted: ['motet/gateway', 'motet/operator'],
      apiUrl: 'https://10.96.0.1:443',
      serviceAccountDir: '/var/run/secrets/kubernetes.io/serviceaccount',
    });
    expect(parse(args, { ...pod, KUBERNETES_SERVICE_HOST: 'fd00::1' }).callers?.apiUrl).toBe(
      'https://[fd00::1]:443',
    );
    const more = ['--kubernetes-api-url', 'https://localhost:6443/', '--service-account-dir', '/sa'];
    expect(parse([...args, ...more]).callers).toMatchObject({
      apiUrl: 'https://localhost:6443',
      serviceAccountDir: '/sa',
    });
    expect(parse([], { ...pod, MOTET_TRUSTED_SERVICE_ACCOUNTS: 'a/b' }).callers?.trusted).toEqual(['a/b']);
  });

  test.each([
    [['--trusted-service-accounts', 'a/b'], 'expected --kubernetes-api-url beside it outside of a pod'],
    [['--trusted-service-accounts', 'gateway'], '--trusted-service-accounts: expected NAMESPACE/NAME'],
    [['--trusted-service-accounts', 'a/b,'], '--trusted-service-accounts: expected NAMESPACE/NAME'],
    [
      ['--kubernetes-api-url', 'http://api', '--trusted-service-accounts', 'a/b'],
      'expected https://HOST:PORT',
    ],
  ])('refuse %j', (args, message) => {
    expect(() => parse(args)).toThrow(message);
  });

  test('let others reach an engine that knows its callers', () => {
    const args = ['--host', '0.0.0.0', '--adapter-root', '/adapters'];
    expect(parse([...args, '--trusted-service-accounts', 'a/b'], pod)).toMatchObject({
      host: '0.0.0.0',
      apiKeys: null,
    });
    expect(() => parse(args, pod)).toThrow('expected --api-key-file or --trusted-service-accounts');
  });

  test('name the variable that was wrong', () => {
    expect(() => parse([], { MOTET_PORT: 'x' })).toThrow('MOTET_PORT: expected an integer');
  });

  test('refuse to go without a model', () => {
    expect(() => parseConfig([], {})).toThrow('--model: expected the path of a base model, got nothing');
  });

  test('read keys, one a line', () => {
    const file = join(mkdtempSync(join(tmpdir(), 'motet-')), 'keys');
    writeFileSync(file, 'one\n\n two \n');
    const args = ['--host', '0.0.0.0', '--api-key-file', file, '--adapter-root', '/adapters'];
    expect(parse(args).apiKeys).toEqual(['one', 'two']);
  });

  test('are all listed by --help', () => {
    const { help } = parseConfig(['--help'], {}) as { help: string };
    for (const flag of ['--model', '--adapter-root', '--drain-seconds', '--log-level'])
      expect(help).toContain(flag);
  });
});
