/** What gateways and engines say to each other in headers. */
import { describe, expect, test } from 'vitest';
import {
  formatAdapters,
  formatMerge,
  formatStanding,
  type MergeRule,
  parseAdapters,
  parseMerge,
  parseStanding,
  readAdapters,
  readMerge,
  type WeightedName,
} from '../../engine/protocol.ts';

const composition: WeightedName[] = [
  { name: 'sql', weight: 0.7 },
  { name: 'tone', weight: -0.3 },
];

describe('whose a request is, in headers', () => {
  const parse = (headers: Record<string, string>) => parseStanding((name) => headers[name]);

  test.each([
    { tenant: 'team-a', weight: 4, priority: -10 },
    { tenant: 'größe, "x"/y', weight: 0.25, priority: 10 },
    { tenant: '', weight: 1_000, priority: 0 },
  ])('comes back as it was written: %j', (standing) => {
    expect(parse(formatStanding(standing))).toEqual(standing);
  });

  test("is nobody's without them", () => {
    expect(parse({})).toEqual({ tenant: '', weight: 1, priority: 0 });
  });

  test.each([
    ['x-motet-tenant', '%zz'],
    ['x-motet-tenant', 'x'.repeat(1_025)],
    ['x-motet-weight', '0'],
    ['x-motet-weight', '1001'],
    ['x-motet-weight', '1e3'],
    ['x-motet-weight', ''],
    ['x-motet-priority', '11'],
    ['x-motet-priority', '-11'],
    ['x-motet-priority', '0.5'],
  ])('%s: %s is refused', (name, value) => {
    expect(parse({ [name]: value })).toMatchObject({ at: name });
  });
});

describe('the adapters of a composition in a header', () => {
  test('are names and weights', () => {
    expect(formatAdapters(composition)).toBe('sql=0.7,tone=-0.3');
    expect(parseAdapters('sql=0.7,tone=-0.3')).toEqual(composition);
  });

  test('may have spaces around them', () => {
    expect(parseAdapters(' sql=0.7 ,\ttone=-.3')).toEqual(composition);
  });

  test.each([
    [[{ name: 'team/sql, v2=β "new"', weight: 1 }]],
    [
      [
        { name: 'a', weight: 1e-7 },
        { name: 'b', weight: 0.1 + 0.2 },
      ],
    ],
    [Array.from({ length: 8 }, (_, i) => ({ name: `adapter-${i}`, weight: i - 8.5 }))],
  ])('come back as they were written: %j', (adapters) => {
    expect(parseAdapters(formatAdapters(adapters))).toEqual(adapters);
  });

  test.each([
    ['', '[0]', 'something else'],
    ['sql', '[0]', 'something else'],
    ['sql=', '[0]', 'something else'],
    ['=1', '[0]', 'something else'],
    ['sql=1,', '[1]', 'something else'],
    ['sql=1,tone=NaN', '[1]', 'something else'],
    ['sql=0x1', '[0]', 'something else'],
    ['sql=1=2', '[0]', 'something else'],
    ['s%GGl=1', '[0]', 'something else'],
    ['s%ED%A0%80l=1', '[0]', 'something else'],
    ['sql=1,tone=0', '[1].weight', '0'],
    ['sql=1e-60', '[0].weight', '1e-60'],
    ['sql=10', '[0].weight', '10'],
    ['sql=1e400', '[0].weight', 'Infinity'],
    ['sql=1e40', '[0].weight', '1e+40'],
    ['sql=1,sql=2', '[1].name', 'one twice'],
    ['a=1,b=1,c=1,d=1,e=1,f=1,g=1,h=1,i=1', '', '9'],
    ['x'.repeat(4097), '', '4097 characters'],
  ])('%j is refused', (header, at, got) => {
    const problem = parseAdapters(header);
    expect(problem).toMatchObject({ at });
    expect((problem as { got: string }).got).toBe(got);
  });
});

describe('the adapters of a composition in a body', () => {
  test('are a list, and other fields are left out', () => {
    expect(readAdapters(composition.map((adapter) => ({ ...adapter, note: 1 })))).toEqual(composition);
  });

  test.each([
    ['sql', '', 'string'],
    [null, '', 'null'],
    [[], '', '0'],
    [['sql'], '[0].name', 'undefined'],
    [[null], '[0].name', 'undefined'],
    [[{ name: '', weight: 1 }], '[0].name', 'one of 0 characters'],
    [[{ name: 'a'.repeat(257), weight: 1 }], '[0].name', 'one of 257 characters'],
    [[{ name: '\ud800', weight: 1 }], '[0].name', 'one of 1 characters'],
    [[{ name: 'sql' }], '[0].weight', 'undefined'],
    [[{ name: 'sql', weight: '1' }], '[0].weight', 'string'],
    [[{ name: 'sql', weight: Number.NaN }], '[0].weight', 'NaN'],
    [Array.from({ length: 8 }, (_, i) => ({ name: `${i}${'β'.repeat(100)}`, weight: 1 })), '', '4831'],
  ])('%j is refused', (list, at, got) => {
    expect(readAdapters(list)).toMatchObject({ at, got });
  });
});

describe('how adapters are merged', () => {
  test.each<MergeRule>([
    { method: 'ties', density: 0.5, majoritySign: 'frequency' },
    { method: 'dare_ties', density: 1, majoritySign: 'total' },
    { method: 'dare_linear', density: 1 / 3, majoritySign: 'total' },
    { method: 'magnitude_prune', density: 1e-7, majoritySign: 'total' },
  ])('comes back as it was written in a header: %j', (rule) => {
    expect(parseMerge(formatMerge(rule))).toEqual(rule);
  });

  test('has half of the values and the sign of their sum, where nothing else is said', () => {
    const expected = { method: 'ties', density: 0.5, majoritySign: 'total' };
    expect(parseMerge(' ties ')).toEqual(expected);
    expect(readMerge({ method: 'ties', density: null })).toEqual(expected);
    expect(readMerge({ method: 'linear' })).toBe(null);
  });

  test.each([
    ['linear', '.method'],
    ['', '.method'],
    ['ties; density=0', '.density'],
    ['ties; density=1.5', '.density'],
    ['ties; density=0x1', ''],
    ['ties; density=0.5; density=0.5', ''],
    ['ties; majority-sign=most', '.majority_sign'],
    ['dare_linear; majority-sign=total', '.majority_sign'],
    ['ties; secret=1', ''],
    [`ties${' '.repeat(300)}`, ''],
  ])('is refused by name in a header: %s', (header, at) => {
    const problem = parseMerge(header);
    expect(problem).toMatchObject({ at, expected: expect.any(String) });
    expect(JSON.stringify(problem)).not.toContain('secret');
  });
});
