// Whether a value may be the spec of a resource, by the schema of its CRD, where there is no API server to say so. What the API
// server would drop, a field that it does not know, is refused here: a file is written by a person, who is to hear of it.
// tests/crds/validation.test.ts holds the verdicts to those of a real API server.

import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { parse } from 'yaml';
import { type Kind, plurals } from './types.ts';

/** What the schemas of crds/ are made of, as far as it is understood here: OpenAPI's words, and rules in CEL. */
export type Schema = {
  type: 'object' | 'array' | 'string' | 'integer';
  description?: string;
  format?: string;
  properties?: Record<string, Schema>;
  required?: string[];
  additionalProperties?: Schema;
  minProperties?: number;
  maxProperties?: number;
  items?: Schema;
  minItems?: number;
  maxItems?: number;
  minimum?: number;
  maximum?: number;
  minLength?: number;
  maxLength?: number;
  pattern?: string;
  enum?: string[];
  default?: unknown;
  'x-kubernetes-validations'?: { rule: string; message: string }[];
};

/** What is wrong with a value, where, as `tenants.acme.weight: expected …, got …`. Long texts are never in it: one may be a key. */
export class SpecError extends Error {
  constructor(at: string, problem: string) {
    super(at === '' ? problem : `${at}: ${problem}`);
  }
}

/** The schema of a kind's `spec`. */
export function specSchema(kind: Kind): Schema {
  const text = readFileSync(join(import.meta.dirname, `${plurals[kind]}.yaml`), 'utf8');
  const schema: Schema = parse(text).spec.versions[0].schema.openAPIV3Schema.properties.spec;
  assertUnderstood(schema, `${kind}.spec`);
  return schema;
}

/**
 * A copy of the value, with the schema's defaults.
 *
 * @param at  what messages call the value
 * @throws SpecError at the first fault
 */
export function checkSpec(value: unknown, schema: Schema, at: string): unknown {
  const checked = checkers[schema.type](value, schema, at);
  for (const { rule, message } of schema['x-kubernetes-validations'] ?? []) {
    if (!rules[rule]!(checked)) throw new SpecError(at, message);
  }
  return checked;
}

type Checker = (value: unknown, schema: Schema, at: string) => unknown;

const checkers: Record<Schema['type'], Checker> = {
  object(value, schema, at) {
    const { properties, additionalProperties, required = [], minProperties = 0, maxProperties } = schema;
    if (typeof value !== 'object' || value === null || Array.isArray(value))
      throw new SpecError(at, `expected an object, got ${shown(value)}`);
    const given = Object.entries(value);
    assertCount(given.length, [minProperties, maxProperties], 'fields', at);
    const checked: [string, unknown][] = [];
    for (const [name, field] of given) {
      const known = properties !== undefined && Object.hasOwn(properties, name) ? properties[name] : null;
      const own = known ?? additionalProperties;
      if (own === undefined) throw new SpecError(at, unknownField(name, Object.keys(properties ?? {})));
      checked.push([name, checkSpec(field, own, below(at, name))]);
    }
    const names = new Set(given.map(([name]) => name));
    for (const name of required) {
      if (!names.has(name)) throw new SpecError(below(at, name), 'expected a value, got none');
    }
    for (const [name, own] of Object.entries(properties ?? {})) {
      if (own.default === undefined || names.has(name)) continue;
      checked.push([name, checkSpec(own.default, own, below(at, name))]);
    }
    return Object.fromEntries(checked);
  },
  array(value, { items, minItems = 0, maxItems }, at) {
    if (!Array.isArray(value)) throw new SpecError(at, `expected a list, got ${shown(value)}`);
    assertCount(value.length, [minItems, maxItems], 'items', at);
    return value.map((item, index) => checkSpec(item, items!, `${at}[${index}]`));
  },
  string(value, { enum: allowed, minLength = 0, maxLength, pattern }, at) {
    if (typeof value !== 'string') throw new SpecError(at, `expected a text, got ${shown(value)}`);
    if (allowed !== undefined && !allowed.includes(value))
      throw new SpecError(at, `expected ${allowed.join(' or ')}, got ${shown(value)}`);
    assertCount([...value].length, [minLength, maxLength], 'characters', at);
    if (pattern !== undefined && !new RegExp(pattern).test(value))
      throw new SpecError(at, `expected a text like ${pattern}, got ${shown(value)}`);
    return value;
  },
  integer(value, { minimum = Number.MIN_SAFE_INTEGER, maximum = Number.MAX_SAFE_INTEGER }, at) {
    if (!Number.isInteger(value) || (value as number) < minimum || (value as number) > maximum)
      throw new SpecError(at, `expected an integer from ${minimum} to ${maximum}, got ${shown(value)}`);
    return value;
  },
};

function assertCount(
  count: number,
  [least, most = Number.POSITIVE_INFINITY]: [number, number | undefined],
  of: string,
  at: string,
) {
  if (count < least) throw new SpecError(at, `expected at least ${least} ${of}, got ${count}`);
  if (count > most) throw new SpecError(at, `expected at most ${most} ${of}, got ${count}`);
}

function below(at: string, name: string): string {
  return at === '' ? name : `${at}.${name}`;
}

/** Whoever wrote a key in the wrong place is not to find it in a log: keys have 16 characters at least. */
const maxShownCharacters = 15;

export function shown(value: unknown): string {
  if (value === null || value === undefined) return 'nothing';
  if (Array.isArray(value)) return 'a list';
  if (typeof value === 'object') return 'an object';
  if (typeof value !== 'string') return String(value).slice(0, maxShownCharacters);
  return value.length <= maxShownCharacters
    ? JSON.stringify(value)
    : `a text of ${[...value].length} characters`;
}

function unknownField(name: string, known: readonly string[]): string {
  const meant = known.find((one) => isNear(name.slice(0, 64), one));
  const expected = meant === undefined ? `expected one of ${known.join(', ')}` : `did you mean ${meant}?`;
  return `${shown(name)} is no field here; ${expected}`;
}

/** One or two letters are wrong, missing or too many (Levenshtein), or all that differs is their case. */
function isNear(given: string, known: string): boolean {
  if (given.toLowerCase() === known.toLowerCase()) return true;
  let above = Array.from({ length: known.length + 1 }, (_, column) => column);
  for (const [row, letter] of [...given].entries()) {
    const line = [row + 1];
    for (let column = 1; column <= known.length; column++) {
      const replaced = above[column - 1]! + Number(letter !== known[column - 1]);
      line.push(Math.min(replaced, above[column]! + 1, line[column - 1]! + 1));
    }
    above = line;
  }
  return above[known.length]! <= Math.min(2, Math.floor(known.length / 3));
}

type Oidc = { issuer?: string; audience?: string; claims?: object };

/** What the rules of the schemas say, in CEL and here. */
// biome-ignore lint/suspicious/noExplicitAny: each is given what its own schema has checked.
const rules: Record<string, (self: any) => boolean> = {
  'self.keys.size() > 0 || has(self.oidc)': ({ keys, oidc }) => keys.length > 0 || oidc !== undefined,
  'self.all(a, self.filter(b, a.secretRef == b.secretRef).size() == 1)': (
    keys: { secretRef: { name: string; key: string } }[],
  ) => new Set(keys.map(({ secretRef: { name, key } }) => `${name}/${key}`)).size === keys.length,
  'has(self.issuer) == has(self.audience)': ({ issuer, audience }: Oidc) =>
    (issuer === undefined) === (audience === undefined),
  '!has(self.issuer) || has(self.claims)': ({ issuer, claims }: Oidc) =>
    issuer === undefined || claims !== undefined,
  "(self.operator in ['In', 'NotIn']) == (has(self.values) && self.values.size() > 0)": ({
    operator,
    values = [],
  }: {
    operator: string;
    values?: string[];
  }) => ['In', 'NotIn'].includes(operator) === values.length > 0,
};

const understood: ReadonlySet<string> = new Set<keyof Schema>([
  ...(['type', 'description', 'format', 'properties', 'required', 'additionalProperties'] as const),
  ...(['minProperties', 'maxProperties', 'items', 'minItems', 'maxItems', 'minimum', 'maximum'] as const),
  ...(['minLength', 'maxLength', 'pattern', 'enum', 'default', 'x-kubernetes-validations'] as const),
]);

/** A schema that says more than is looked at here would let in what the API server refuses. */
export function assertUnderstood(schema: Schema, at: string): void {
  const words = Object.keys(schema).filter((word) => !understood.has(word));
  const said = (schema['x-kubernetes-validations'] ?? []).map(({ rule }) => rule);
  const strange = [...words, ...said.filter((rule) => !Object.hasOwn(rules, rule))];
  if (strange.length > 0 || !Object.hasOwn(checkers, schema.type))
    throw new Error(`crds/check-spec.ts knows nothing of ${strange.join(', ') || schema.type} in ${at}`);
  for (const [name, own] of Object.entries(schema.properties ?? {})) assertUnderstood(own, `${at}.${name}`);
  for (const own of [schema.items, schema.additionalProperties]) if (own) assertUnderstood(own, `${at}[]`);
}
