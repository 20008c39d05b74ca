import { describe, expect, test } from 'vitest';
import { type LoadOptions, OptionError, parseOptions } from '../bench/load/options.ts';

function parsed(args: string[], env: Record<string, string> = {}): LoadOptions {
  const options = parseOptions(args, env);
  if ('help' in options) throw new Error('expected options, got help');
  return options;
}

const url = ['--url', 'http://127.0.0.1:8000'];

test('without options 64 requests of 128 and 64 tokens by 8 clients go to a server of its own', () => {
  expect(parsed([])).toEqual({
    server: {
      own: {
        modelPath: null,
        through: 'gateway',
        numRegistered: 0,
        rank: 8,
        targets: ['q_proj', 'v_proj'],
        engineArgs: [],
      },
    },
    endpoint: 'completions',
    model: null,
    adapters: { kind: 'all' },
    adapterField: 'model',
    popularity: { kind: 'uniform' },
    baseShare: 0,
    promptTokens: { kind: 'fixed', tokens: 128 },
    outputTokens: { kind: 'fixed', tokens: 64 },
    sharedPrefixTokens: 0,
    numPrefixes: 1,
    vocabSize: 8192,
    conversations: null,
    pacing: { kind: 'closed', concurrency: 8 },
    numRequests: 64,
    durationSeconds: null,
    numWarmup: 8,
    seed: 1,
    temperature: 0,
    ignoresEos: true,
    timeoutMs: 300_000,
    slo: {},
    jsonPath: null,
    hasJsonSamples: false,
  });
});

test.each<[string, string, keyof LoadOptions, unknown]>([
  ['--prompt-tokens', '512', 'promptTokens', { kind: 'fixed', tokens: 512 }],
  ['--prompt-tokens', '64:256', 'promptTokens', { kind: 'uniform', low: 64, high: 256 }],
  ['--output-tokens', '100~20', 'outputTokens', { kind: 'normal', mean: 100, deviation: 20 }],
  ['--adapters', '3', 'adapters', { kind: 'first', count: 3 }],
  ['--adapters', 'sql, dates', 'adapters', { kind: 'named', names: ['sql', 'dates'] }],
  ['--adapters', 'none', 'adapters', { kind: 'named', names: [] }],
  ['--adapter-popularity', 'zipf:1.1', 'popularity', { kind: 'zipf', exponent: 1.1 }],
  ['--adapter-popularity', 'each-client-its-own', 'popularity', { kind: 'each-client-its-own' }],
  ['--slo', 'ttft=500,itl=50.5', 'slo', { ttft: 500, itl: 50.5 }],
  ['--concurrency', '32', 'pacing', { kind: 'closed', concurrency: 32 }],
  ['--rate', '2.5', 'pacing', { kind: 'open', ratePerSecond: 2.5, burstiness: 1, maxInFlight: 1024 }],
  ['--base-share', '0.25', 'baseShare', 0.25],
])('%s %s', (flag, value, key, expected) => {
  expect(parsed([flag, value])[key]).toEqual(expected);
});

test('a switch takes its value with = only', () => {
  expect(parsed(['--ignore-eos=false']).ignoresEos).toBe(false);
  expect(parsed(['--json', 'x.json', '--json-samples']).hasJsonSamples).toBe(true);
});

test('a duration alone does not bound the number of requests to 64', () => {
  expect(parsed(['--duration', '30'])).toMatchObject({ durationSeconds: 30, numRequests: 1_000_000 });
  expect(parsed(['--duration', '30', '--requests', '5'])).toMatchObject({
    durationSeconds: 30,
    numRequests: 5,
  });
});

describe('--turns', () => {
  test('makes conversations of chats, one a client, whose later messages are as long as the first', () => {
    expect(parsed(['--turns', '6', '--concurrency', '50', '--prompt-tokens', '40'])).toMatchObject({
      endpoint: 'chat',
      conversations: {
        numTurns: 6,
        thinkTime: { kind: 'fixed', meanSeconds: 0 },
        followUpTokens: { kind: 'fixed', tokens: 40 },
      },
      numRequests: 50,
    });
  });

  test('with think times and messages of their own', () => {
    const think = ['--think-time', 'exp:2.5', '--follow-up-tokens', '5:9', '--conversations', '7'];
    expect(parsed(['--turns', '2', ...think])).toMatchObject({
      conversations: {
        thinkTime: { kind: 'exponential', meanSeconds: 2.5 },
        followUpTokens: { kind: 'uniform', low: 5, high: 9 },
      },
      numRequests: 7,
    });
    expect(parsed(['--turns', '2', '--think-time', '3']).conversations!.thinkTime).toEqual({
      kind: 'fixed',
      meanSeconds: 3,
    });
  });

  test('as many as arrive, or as a report can hold beside a duration', () => {
    expect(parsed(['--turns', '5', '--rate', '2']).numRequests).toBe(64);
    expect(parsed(['--turns', '5', '--duration', '9']).numRequests).toBe(200_000);
  });
});

test('a path is meant from where npm was called', () => {
  const { server, jsonPath } = parsed(['--serve', 'a.gguf', '--json', '/x.json'], { INIT_CWD: '/home/me' });
  expect(server).toMatchObject({ own: { modelPath: '/home/me/a.gguf' } });
  expect(jsonPath).toBe('/x.json');
});

test('what follows -- goes to the engine', () => {
  const { server } = parsed(['--register', '9', '--', '--device-memory', '4GiB', '--help']);
  expect(server).toMatchObject({
    own: { numRegistered: 9, engineArgs: ['--device-memory', '4GiB', '--help'] },
  });
});

describe('a server at a URL', () => {
  test.each([
    ['http://localhost:8000', 'http://localhost:8000'],
    ['http://localhost:8000/v1/', 'http://localhost:8000'],
    ['https://models.example/team/v1', 'https://models.example/team'],
  ])('%s is %s', (given, expected) => {
    expect(parsed(['--url', given]).server).toEqual({ url: expected, apiKey: null });
  });

  test('has its key from the option or from MOTET_API_KEY; the option wins', () => {
    const env = { MOTET_API_KEY: 'of-env' };
    expect(parsed(url, env).server).toMatchObject({ apiKey: 'of-env' });
    expect(parsed([...url, '--api-key', 'given'], env).server).toMatchObject({ apiKey: 'given' });
  });
});

test.each<[string, string[], string]>([
  ['an unknown option', ['--requets', '3'], '--requets: unknown option; --help lists all'],
  ['a word', ['bench'], 'expected an option, got "bench"; --help lists them'],
  ['a missing value', ['--requests'], '--requests: expected COUNT, got nothing'],
  ['an option twice', ['--seed', '1', '--seed', '2'], '--seed: expected once, got it twice'],
  ['no request', ['--requests', '0'], '--requests: expected an integer from 1 to 1000000, got "0"'],
  ['half a request', ['--requests', '1.5'], '--requests: expected an integer from 1 to 1000000, got "1.5"'],
  ['no rate', ['--rate', '0'], '--rate: expected a number from 0.001 to 100000, got "0"'],
  ['a rate in words', ['--rate', 'inf'], '--rate: expected a number from 0.001 to 100000, got "inf"'],
  [
    'a range upside down',
    ['--prompt-tokens', '9:3'],
    '--prompt-tokens: expected N, LO:HI or MEAN~SD of tokens from 1 to 1000000, got "9:3"',
  ],
  [
    'an endless tail',
    ['--output-tokens', '1000~300000'],
    '--output-tokens: expected N, LO:HI or MEAN~SD of tokens from 1 to 1000000, got "1000~300000"',
  ],
  [
    'an unknown promise',
    ['--slo', 'ttft=500,latency=3'],
    '--slo: expected ttft=MS, itl=MS, tpot=MS or e2e=MS above 0, each at most once, with commas, got "ttft=500,latency=3"',
  ],
  [
    'a promise twice',
    ['--slo', 'e2e=1,e2e=2'],
    '--slo: expected ttft=MS, itl=MS, tpot=MS or e2e=MS above 0, each at most once, with commas, got "e2e=1,e2e=2"',
  ],
  [
    'an adapter twice',
    ['--adapters', 'sql,sql'],
    '--adapters: expected all, none, a count from 1 to 999999, or different names with commas, got "sql,sql"',
  ],
  [
    'zipf without exponent',
    ['--adapter-popularity', 'zipf'],
    '--adapter-popularity: expected uniform, zipf:S with S from 0 to 10, or each-client-its-own, got "zipf"',
  ],
  [
    'an unknown target',
    ['--register', '2', '--register-targets', 'q_proj,lm_head'],
    '--register-targets: expected all-linear, or different ones of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, got "q_proj,lm_head"',
  ],
  ['a conversation of one turn', ['--turns', '1'], '--turns: expected an integer from 2 to 1000, got "1"'],
  [
    'a think time of an unknown kind',
    ['--turns', '2', '--think-time', 'poisson:3'],
    '--think-time: expected S or exp:S with S from 0 to 86400, got "poisson:3"',
  ],
  [
    'more turns than a report holds',
    ['--turns', '1000', '--conversations', '2000'],
    '--conversations: expected at most 1000 of 1000 turns, got 2000',
  ],
  [
    'conversations of completions',
    ['--turns', '2', '--endpoint', 'completions'],
    '--endpoint: expected chat beside --turns, got completions',
  ],
  ['a path as URL', ['--url', '/v1'], '--url: expected http://HOST:PORT or https://HOST, got "/v1"'],
  [
    'llama-server and names',
    [...url, '--adapter-field', 'llama', '--adapters', 'sql'],
    '--adapters: expected ids beside --adapter-field llama, got "sql"',
  ],
])('refuses %s', (_name, args, message) => {
  expect(() => parsed(args)).toThrow(new OptionError(message));
});

test('a URL with credentials is refused without repeating them to a log', () => {
  expect(() => parsed(['--url', 'http://me:secret@host'])).toThrow(/a URL without credentials/);
  expect(() => parsed(['--url', 'http://me:secret@host'])).not.toThrow(/secret/);
});

test.each<[string, string[], string]>([
  ['clients and a rate', ['--rate', '1', '--concurrency', '2'], '--concurrency: expected only one of'],
  ['bursts of clients', ['--burstiness', '2'], '--burstiness: expected only beside --rate'],
  ['a bound of clients', ['--max-in-flight', '2'], '--max-in-flight: expected only beside --rate'],
  [
    'clients of a rate',
    ['--rate', '1', '--adapter-popularity', 'each-client-its-own'],
    '--adapter-popularity: expected only uniform or zipf:S',
  ],
  [
    'many prefixes of nothing',
    ['--num-prefixes', '2'],
    '--num-prefixes: expected only beside --shared-prefix-tokens',
  ],
  ['ids of words', ['--endpoint', 'chat', '--vocab', '99'], '--vocab: expected only beside --endpoint comp'],
  [
    'ids of a conversation',
    ['--turns', '2', '--vocab', '99'],
    '--vocab: expected only beside --endpoint comp',
  ],
  ['thinking about one answer', ['--think-time', '1'], '--think-time: expected only beside --turns'],
  [
    'requests of conversations',
    ['--turns', '2', '--requests', '9'],
    '--requests: expected only without --turns',
  ],
  ['samples of no file', ['--json-samples'], '--json-samples: expected only beside --json'],
  [
    'a share of no adapters',
    ['--adapters', 'none', '--base-share', '0.5'],
    '--base-share: expected only beside',
  ],
  ['a rank of no adapters', ['--register-rank', '4'], '--register-rank: expected only beside --register'],
  ['a model for a server of others', [...url, '--serve', 'x.gguf'], '--serve: expected only without --url'],
  ['adapters for a server of others', [...url, '--register', '4'], '--register: expected only without --url'],
  ['engine arguments for it', [...url, '--', '--threads', '2'], '--: expected engine arguments only without'],
  ['a key for nobody', ['--api-key', 'k'], '--api-key: expected only beside --url'],
])('refuses %s: it would have no effect', (_name, args, message) => {
  expect(() => parsed(args)).toThrow(message);
});

test('--help names every option that is parsed, with its unit and default', () => {
  const { help } = parseOptions(['--help'], {}) as { help: string };
  const flags = [...help.matchAll(/^ {2}--([a-z0-9-]+)/gm)].map(([, flag]) => flag!);
  expect(flags).toHaveLength(36);
  expect(help).toMatch(/--timeout-ms MS .*\n?.*default 300000/);
  for (const line of help.split('\n')) expect(line.length, line).toBeLessThanOrEqual(120);
});
