// A schema and what it is lowered to have the same instances: Ajv judges values of many kinds by both.

import { Ajv } from 'ajv';
import { Ajv2019 } from 'ajv/dist/2019.js';
import { Ajv2020 } from 'ajv/dist/2020.js';
import { expect, test } from 'vitest';
import { lowerSchema, patternOfOthers } from '../../../engine/grammar/lower-schema.ts';
import { suiteSchemas } from '../../fixtures/schema-conformance.ts';
import { seededRandom } from '../../fixtures/seeded-random.ts';

type Schema = Record<string, unknown>;

const keywords = [
  'oneOf',

  ...['unevaluatedProperties', 'unevaluatedItems', 'dependentRequired', 'dependentSchemas', 'dependencies'],
  ...['propertyNames', 'not', 'if', 'then', 'else'],
];
const isLowered = (schema: unknown) =>
  !keywords.some((keyword) => JSON.stringify(schema).includes(`"${keyword}":`));

const scalars = [null, true, false, 0, 1, 2, 2.5, 10, -3, '', 'a', 'ab', 'foo', 'card', 'cash', 'bar', 'x'];
const names = ['a', 'b', 'c', 'foo', 'bar', 'baz', 'quux', 'x', 'kind', 'foofoo', 'length'];

function makeValue(random: ReturnType<typeof seededRandom>, depth: number): unknown {
  const kind = random.below(depth > 2 ? 1 : 3);
  const count = random.below(4);
  if (kind === 0) return scalars[random.below(scalars.length)];
  if (kind === 1) return Array.from({ length: count }, () => makeValue(random, depth + 1));
  const entries = Array.from({ length: count }, () => [names[random.below(names.length)], null] as const);
  return Object.fromEntries(entries.map(([name]) => [name, makeValue(random, depth + 1)]));
}

const random = seededRandom(7);
const values = [...scalars, ...Array.from({ length: 1500 }, () => makeValue(random, 0))];

/** @returns how many of the values are instances */
function compare(schema: Schema, lowered: Schema, Validator: typeof Ajv = Ajv2020 as never): number {
  const options = { strict: false, validateSchema: false, logger: false, ownProperties: true } as const;
  const [before, after] = [schema, lowered].map((one) => new Validator(options).compile(one));
  const differing = values.filter((value) => before!(value) !== after!(value));
  expect(differing.slice(0, 3), JSON.stringify(lowered)).toEqual([]);
  return values.filter((value) => before!(value)).length;
}

/** An object with `then` would be a promise to await, so lint forbids to write one. */
const conditional = (...parts: unknown[]): Schema =>
  Object.fromEntries(
    ['if', 'then', 'else'].map((key, i) => [key, parts[i]]).filter(([, part]) => part !== undefined),
  );
const card = { properties: { kind: { const: 'card' } }, required: ['kind'] };
const lowered: [string, Schema][] = [
  ['names that must come with another', { dependentRequired: { foo: ['bar', 'baz'], a: ['b'] } }],
  ['a schema that comes with a name', { dependentSchemas: { foo: { required: ['bar'], maxProperties: 2 } } }],
  ['no name but those of the schema', { properties: { a: true }, unevaluatedProperties: false }],
  [
    'names of parts that always hold',
    {
      ...{ type: 'object', $ref: '#/$defs/base', allOf: [{ properties: { b: true } }] },
      ...{ properties: { a: true }, unevaluatedProperties: { type: 'string' } },
      $defs: { base: { patternProperties: { '^foo': true } } },
    },
  ],
  [
    'items of parts that always hold',
    { prefixItems: [true], allOf: [{ prefixItems: [true, { type: 'string' }] }], unevaluatedItems: false },
  ],
  ['nothing left', { allOf: [{ items: { type: 'string' } }], unevaluatedItems: false }],
  ['a pattern of names', { propertyNames: { pattern: '^[a-c]' } }],
  ['names of a list', { propertyNames: { enum: ['a', 'foo'] }, minProperties: 1 }],
  ['names of a length', { propertyNames: { type: 'string', minLength: 2, maxLength: 3 } }],
  ['not some values', { not: { enum: ['a', 'foo', 1, 2, null, true] } }],
  ['not a type', { not: { type: ['string', 'object'] } }],
  ['not a name', { type: 'object', not: { required: ['foo'] } }],
  ['not both', { not: { allOf: [{ minimum: 1 }, { maximum: 5 }] } }],
  ['neither', { not: { anyOf: [{ type: 'array', minItems: 2 }, { maxLength: 1 }] } }],
  ['not a form', { not: { type: 'object', properties: { foo: { type: 'string' } } } }],
  ['one of two forms by a name', conditional(card, { required: ['x'] }, { required: ['a'] })],
  ['only if', conditional({ required: ['foo'] }, { minProperties: 2 })],
  [
    'one of parts that overlap',
    { oneOf: [{ required: ['foo'] }, { required: ['bar'] }, { maxProperties: 1 }] },
  ],
  ['one of two bounds', { type: 'number', oneOf: [{ minimum: 1 }, { maximum: 2 }] }],
  ['only else', conditional({ type: 'array' }, undefined, { not: { const: 'card' } })],
];

test.each(lowered)('%s', (_, schema) => {
  const result = lowerSchema(schema);
  expect(isLowered(result)).toBe(true);
  const numInstances = compare(schema, result);
  expect(numInstances).toBeGreaterThan(0);
  expect(numInstances).toBeLessThan(values.length);
});

test.each([
  [
    'names that a part sees that may not hold',
    { anyOf: [{ properties: { a: true } }], unevaluatedProperties: false },
  ],
  ['an item that is found', { contains: { type: 'string' }, unevaluatedItems: false }],
  [
    'one of parts apart by a value',
    {
      $defs: { card: { type: 'object', properties: { kind: { const: 'card' } }, required: ['kind'] } },
      oneOf: [
        { $ref: '#/$defs/card' },
        { type: 'object', properties: { kind: { enum: ['cash', 'x'] } }, required: ['kind'] },
        { type: 'string' },
      ],
    },
  ],
  ['one of parts that are not known', { oneOf: [{ pattern: 'a' }, { maxLength: 3 }] }],
  ['no integer', { not: { type: 'integer' } }],
  ['no pattern', { not: { pattern: 'a' } }],
  ['a reference to another document', { not: { $ref: 'other.json' } }],
])('%s: the keyword stays, to be refused', (_, schema) => {
  expect(lowerSchema(schema)).toEqual(schema);
});

test('every schema of the public suite has the same instances after as before', () => {
  let numChanged = 0;
  let numRefused = 0;
  for (const { draft, schema } of suiteSchemas()) {
    if (typeof schema === 'boolean') continue;
    const result = lowerSchema(schema as Schema);
    // One that keeps such a keyword is refused whole.
    if (!isLowered(result) || JSON.stringify(result) === JSON.stringify(schema)) continue;
    const Validator = draft === '2020-12' ? Ajv2020 : draft === '2019-09' ? Ajv2019 : Ajv;
    try {
      new Validator({ strict: false, validateSchema: false, logger: false }).compile(schema);
    } catch {
      continue;
    }
    try {
      compare(schema as Schema, result, Validator as typeof Ajv);
      numChanged += 1;
    } catch (error) {
      // A reference to a part that has moved leads nowhere: the library refuses it.
      if (!String(error).includes("can't resolve reference")) throw error;
      numRefused += 1;
    }
  }
  expect(numChanged).toBeGreaterThan(100);
  expect(numRefused).toBeLessThan(10);
});

test.each([
  [
    { exclusiveMinimum: 2, maximum: 2.5 },
    { minimum: 2.0000000000000004, maximum: 2.5 },
  ],
  [{ exclusiveMinimum: 2, minimum: 3 }, { minimum: 3 }],
  [{ exclusiveMinimum: 0 }, { minimum: 1e-18 }],
  [
    { exclusiveMaximum: -2, minimum: -2.5 },
    { maximum: -2.0000000000000004, minimum: -2.5 },
  ],
  [{ exclusiveMaximum: 2 }, { exclusiveMaximum: 2 }],
  [
    { type: 'integer', exclusiveMinimum: 2 },
    { type: 'integer', exclusiveMinimum: 2 },
  ],
])('a bound that is not to be reached becomes the next one that may be: %j', (schema, expected) => {
  expect(lowerSchema(schema)).toEqual(expected);
});

test('data that looks like a schema is left alone', () => {
  const schema = {
    enum: [{ not: {} }],
    default: { if: true, else: false },
    properties: { not: { type: 'null' } },
  };
  expect(lowerSchema(schema)).toEqual(schema);
});

test('a reference that goes round ends', () => {
  const schema = { $ref: '#/$defs/a', unevaluatedProperties: false, $defs: { a: { $ref: '#/$defs/a' } } };
  expect(lowerSchema(schema)).toEqual(schema);
});

test('what would grow without bound stays as it is', () => {
  const $defs: Schema = {};
  for (let i = 0; i < 40; i++) $defs[`a${i}`] = { allOf: [0, 1].map(() => ({ $ref: `#/$defs/a${i + 1}` })) };
  const schema = { $ref: '#/$defs/a0', unevaluatedProperties: false, not: { $ref: '#/$defs/a0' }, $defs };
  expect(lowerSchema(schema)).toEqual(schema);
});

test('an expression for all texts but some matches them and no other', () => {
  const words = ['a', 'ab', 'b-d', '', 'x.y', '(é]'];
  const others = new RegExp(patternOfOthers(words)!, 'u');
  for (const word of words) expect(others.test(word), word).toBe(false);
  for (const text of ['aa', 'abc', 'b', 'b-', 'b-dd', 'xay', 'z', '\n', 'é', '(é'])
    expect(others.test(text), text).toBe(true);
  expect(patternOfOthers(['a\nb'])).toBe(null);
});
