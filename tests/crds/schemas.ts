/** The schemas of crds/ as a flat list of fields, for tests that ask something of each. */
import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { parse } from 'yaml';
import type { Kind } from '../../crds/types.ts';
import { crdFolder } from './install-crds.ts';

export interface Schema {
  type?: string;
  description?: string;
  default?: unknown;
  required?: string[];
  properties?: Record<string, Schema>;
  items?: Schema;
  additionalProperties?: Schema;
  'x-kubernetes-validations'?: { rule: string; message: string }[];
  [constraint: string]: unknown;
}

export interface Field {
  kind: Kind;
  /** E.g. `spec.targets[].weight`; the values of a map are `[]` too. */
  path: string;
  schema: Schema;
  /** Of the object that it is a field of; items and values of maps are. */
  isRequired: boolean;
}

export const definitions = readdirSync(crdFolder)
  .filter((name) => name.endsWith('.yaml'))
  .map((name) => parse(readFileSync(join(crdFolder, name), 'utf8')));

export const fields: Field[] = definitions.flatMap(({ spec }) => {
  const { spec: ofSpec, status } = spec.versions[0].schema.openAPIV3Schema.properties;
  return [
    ...fieldsOf(spec.names.kind, 'spec', ofSpec, true),
    ...fieldsOf(spec.names.kind, 'status', status, false),
  ];
});

function fieldsOf(kind: Kind, path: string, schema: Schema, isRequired: boolean): Field[] {
  const { properties = {}, required = [], items, additionalProperties } = schema;
  const element = items ?? additionalProperties;
  return [
    { kind, path, schema, isRequired },
    ...Object.entries(properties).flatMap(([name, property]) =>
      fieldsOf(kind, `${path}.${name}`, property, required.includes(name)),
    ),
    ...(element ? fieldsOf(kind, `${path}[]`, element, true) : []),
  ];
}
