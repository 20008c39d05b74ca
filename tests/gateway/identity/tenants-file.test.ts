import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { SpecError } from '../../../crds/check-spec.ts';
import { selects } from '../../../crds/label-selector.ts';
import { digestOfKey } from '../../../gateway/identity/keys.ts';
import { holdersOf, maxKeyFiles, parseTenantsFile } from '../../../gateway/identity/tenants-file.ts';
import { seededRandom } from '../../fixtures/seeded-random.ts';

const key = 'key-0123456789abcdef';
const sha256 = digestOfKey(key);
const parse = (value: unknown) => parseTenantsFile(typeof value === 'string' ? value : JSON.stringify(value));
const one = (tenant: object) => ({ tenants: { a: { keys: [{ sha256 }], ...tenant } } });

test('reads tenants as resources have them, and what their selectors select', () => {
  const { keys, ...file } = parse(`
# Who may use what.
tenants:
  red:
    keys:
      - { sha256: ${sha256}, limits: { concurrency: 2 } }
      - file: red.key
    weight: 2
    priority: -1
    limits: { requestsPerMinute: 60 }
    access:
      adapters: { matchLabels: { team: red } }
      groups: {}
  blue:
    oidc: { claims: { groups: blue } }
adapters:
  red-sql: { baseModel: base, labels: { team: red } }
  plain: { baseModel: base }
baseModels:
  base: {}
groups:
  helpdesk: { baseModel: base, selector: {}, labels: { team: red }, maxMembers: 3 }
`);
  expect(file).toEqual({
    tenants: [
      {
        name: 'red',
        weight: 2,
        priority: -1,
        limits: { requestsPerMinute: 60 },
        access: { adapters: { matchLabels: { team: 'red' } }, groups: {} },
      },
      { name: 'blue', oidc: { claims: { groups: 'blue' } }, access: {} },
    ],
    adapters: [
      { name: 'red-sql', baseModel: 'base', labels: { team: 'red' } },
      { name: 'plain', baseModel: 'base', labels: {} },
    ],
    baseModels: { base: {} },
    groups: [
      {
        metadata: { name: 'helpdesk', labels: { team: 'red' } },
        spec: { baseModel: 'base', selector: {}, weights: 'equal', maxMembers: 3 },
      },
    ],
  });
  expect(holdersOf(keys, () => Buffer.from(' key-of-the-file-0123\n'))).toEqual({
    holders: [
      { name: 'red', digest: sha256, limits: { concurrency: 2 } },
      { name: 'red', digest: digestOfKey('key-of-the-file-0123') },
    ],
    problems: [],
  });
});

test('JSON says the same', () => {
  expect(parse(one({ weight: 3 })).tenants).toEqual([{ name: 'a', weight: 3, access: {} }]);
});

const deep = (depth: number) => `tenants: ${'{ a: '.repeat(depth)}1${' }'.repeat(depth)}`;
const bomb = `a: &a [x, x, x]\n${Array.from({ length: 8 }, (_, i) => `b${i}: &b${i} [${`*${i === 0 ? 'a' : `b${i - 1}`}, `.repeat(9)}]`).join('\n')}`;

test.each<[string, unknown, string]>([
  ['nothing', '', 'expected an object, got nothing'],
  ['no tenants', 'groups: {}', 'tenants: expected a value, got none'],
  ['a list of tenants', 'tenants: []', 'tenants: expected an object, got a list'],
  ['a tenant of nothing', 'tenants: { a: }', 'tenants.a: expected an object, got nothing'],
  [
    'what is not YAML',
    'tenants: { a: [',
    'line 1, column 16: expected YAML or JSON, got a fault (BAD_INDENT)',
  ],
  ['a second document', 'tenants: {}\n---\ntenants: {}', '(MULTIPLE_DOCS)'],
  ['a tag', 'tenants: !!js/function "x"', '(TAG_RESOLVE_FAILED)'],
  [
    'a tenant twice',
    'tenants:\n  a: { oidc: {} }\n  a: { oidc: {} }',
    'line 3, column 3: "a" stands here twice',
  ],
  [
    'a field twice, in JSON',
    '{"tenants": {}, "tenants": {}}',
    'line 1, column 17: "tenants" stands here twice',
  ],
  ['a number as a name', 'tenants: { 1: {} }', 'expected texts as names'],
  ['a list as a name', 'tenants: { [a]: {} }', 'expected texts as names'],
  ['an alias', 'tenants: &t {}\ngroups: *t', 'line 2, column 9: expected no alias'],
  ['a bomb of aliases', bomb, 'expected no alias'],
  ['more levels than there are', deep(40), 'expected at most 32 levels'],
  ['more levels than anybody parses', deep(20_000), '(RESOURCE_EXHAUSTION)'],
  ['a tenant without a way in', { tenants: { a: {} } }, 'tenants.a: expected a key, or oidc'],
  ['a misspelt field', one({ wieght: 2 }), 'tenants.a: "wieght" is no field here; did you mean weight?'],
  ['a misspelt part', { ...one({}), adapter: {} }, '"adapter" is no field here; did you mean adapters?'],
  ['a weight of nothing', one({ weight: 0 }), 'tenants.a.weight: expected an integer from 1 to 1000, got 0'],
  ['rights to routes', one({ access: { routes: {} } }), 'tenants.a.access: "routes" is no field here'],
  [
    'a Secret',
    one({ keys: [{ secretRef: { name: 's' } }] }),
    'tenants.a.keys[0]: "secretRef" is no field here',
  ],
  [
    'two ways of one key',
    one({ keys: [{ sha256, file: 'f' }] }),
    'tenants.a.keys[0]: expected sha256 or file, and one of them',
  ],
  ['a key of nothing', one({ keys: [{}] }), 'tenants.a.keys[0]: expected sha256 or file'],
  [
    'a digest in capitals',
    one({ keys: [{ sha256: sha256.toUpperCase() }] }),
    'tenants.a.keys[0].sha256: expected a text like ^[0-9a-f]{64}$, got a text of 64 characters',
  ],
  [
    'a key as it is',
    one({ keys: [{ sha256: key }] }),
    'tenants.a.keys[0].sha256: expected a text like ^[0-9a-f]{64}$, got a text of 20 characters',
  ],
  [
    'a key of two tenants',
    { tenants: { a: { keys: [{ sha256 }] }, b: { keys: [{ sha256 }] } } },
    'tenants.b.keys[0].sha256: it is also a key of a',
  ],
  ['a name that no tenant has', { tenants: { 'a b': { oidc: {} } } }, 'tenants: expected names like'],
  ['a name of objects', '{"tenants": {"__proto__": {"oidc": {}}}}', 'tenants: expected names like'],
  [
    'an adapter without a base',
    { tenants: {}, adapters: { s: {} } },
    'adapters.s.baseModel: expected a value, got none',
  ],
  [
    'a name of two',
    {
      tenants: {},
      adapters: { s: { baseModel: 'b' } },
      groups: { g: { baseModel: 'b', selector: {}, servedName: 's' } },
    },
    'groups.s: the name is also one of adapters',
  ],
  [
    'an issuer of http',
    one({ oidc: { issuer: 'http://a.example', audience: 'm', claims: { a: 'b' } } }),
    'tenants.a.oidc.issuer: expected a text like',
  ],
  [
    'an issuer alone',
    one({ oidc: { issuer: 'https://a.example' } }),
    'tenants.a.oidc: expected issuer and audience, or neither',
  ],
])('refuses %s', (_, value, message) => {
  expect(() => parse(value)).toThrow(message);
});

test('refuses more files with keys than are looked at', () => {
  const tenants = Object.fromEntries(
    Array.from({ length: maxKeyFiles + 1 }, (_, i) => [`t${i}`, { keys: [{ file: `f${i}` }] }]),
  );
  expect(() => parse({ tenants })).toThrow(
    `tenants.t${maxKeyFiles}.keys[0].file: expected at most 64 files with keys; use sha256`,
  );
});

test('refuses more tenants than there may be', () => {
  const tenants = Array.from({ length: 10_001 }, (_, i) => `"t${i}":{"oidc":{}}`).join();
  expect(() => parse(`{"tenants":{${tenants}}}`)).toThrow(
    'tenants: expected at most 10000 fields, got 10001',
  );
});

test.each([
  `tenants: { a: { keys: [ ${key} ] } }`,
  `tenants: { a: { keys: ${key} } }`,
  `tenants: { a: { keys: [ { ${key}: 1 } ] } }`,
  `tenants: { a: { keys: [ { key: ${key} } ] } }`,
  `tenants: { a: { keys: [ { sha256: ${key} } ] } }`,
  `tenants: { a: { keys: [ { sha256: *${key} } ] } }`,
  `tenants: { a: { keys: [ { sha256: !${key} x } ] } }`,
  `tenants: { a: { keys: [ { sha256: ${key} ] } }`,
  `tenants: { a: { keys: [ { sha256: "${key} } ] } }`,
  `tenants: { a: { keys: [ { ${key}: 1, ${key}: 2 } ] } }`,
  `tenants: { a: { keys: [ { sha256: ${key}: ${key} } ] } }`,
  `tenants:\n  ${key}\n a: 1`,
  `@${key}`,
  key,
])('no refusal shows a key that stands where none belongs: %#', (text) => {
  expect(() => parse(text)).toThrow();
  expect(() => parse(text)).not.toThrow(key);
});

test('a key of a file is refused by itself, and never shown', () => {
  const { keys } = parse({
    tenants: {
      a: { keys: [{ sha256 }] },
      b: { keys: ['gone', 'short', 'taken', 'good'].map((file) => ({ file })) },
    },
  });
  const files: Record<string, string> = { short: 'secret', taken: key, good: `${key}-of-b` };
  const { holders, problems } = holdersOf(keys, (file) => (files[file] ? Buffer.from(files[file]) : null));
  expect(holders.map(({ name, digest }) => [name, digest])).toEqual([
    ['a', sha256],
    ['b', digestOfKey(files.good!)],
  ]);
  expect(problems).toEqual([
    'tenants.b.keys[0].file: gone: there is no such file that can be read',
    'tenants.b.keys[1].file: short: expected at least 16 characters, got 6',
    'tenants.b.keys[2]: it is also a key of a, which keeps it',
  ]);
});

const seed = Number(process.env.MOTET_FUZZ_SEED ?? 1);
const numRounds = Number(process.env.MOTET_FUZZ_ROUNDS ?? 300);

test(`whatever becomes of a file, it is read or refused, and shows no key (seed ${seed})`, () => {
  const random = seededRandom(seed);
  const whole = JSON.stringify(
    { ...one({ weight: 2, access: { adapters: {} } }), adapters: { s: { baseModel: 'b' } } },
    null,
    1,
  ).replace(sha256, key);
  const pieces = [...'{}[]:,"\'&*!|>#-\t\n ', '__proto__', 'null', '- ', '? ', '<<: ', key, '"sha256"'];
  let numRefused = 0;
  for (let round = 0; round < numRounds; round++) {
    let text = whole;
    for (let change = random.from(1, 4); change > 0; change--) {
      const at = random.below(text.length);
      text = text.slice(0, at) + random.pick(pieces) + text.slice(at + random.below(12));
    }
    try {
      parse(text);
    } catch (error) {
      numRefused += 1;
      expect(error, text).toBeInstanceOf(SpecError);
      expect((error as Error).message).not.toContain(key);
    }
  }
  expect(numRefused).toBeGreaterThan(numRounds / 2);
});

test('the example is one, and gives its tenants the example adapters', () => {
  const examples = join(import.meta.dirname, '../../../examples');
  const { tenants, adapters } = parseTenantsFile(
    readFileSync(join(examples, 'tenants/tenants.yaml'), 'utf8'),
  );
  const index = JSON.parse(readFileSync(join(examples, 'adapters/index.json'), 'utf8'));
  const names = (index as { adapters: { name: string }[] }).adapters.map(({ name }) => name);
  expect(adapters.map(({ name }) => name).sort()).toEqual(names.sort());
  const mayUse = tenants.map(({ name, access }) => [
    name,
    adapters.filter(({ labels }) => selects(access.adapters, labels)).map((adapter) => adapter.name),
  ]);
  expect(mayUse).toEqual([
    ['analytics', ['sql', 'dates']],
    ['support', ['sql', 'dates', 'contacts', 'triage']],
  ]);
});
