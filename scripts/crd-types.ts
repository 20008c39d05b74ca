// Makes crds/types.ts from the YAML in crds/: one type for each kind, with the schema's descriptions as comments.
//
//   node scripts/crd-types.ts            writes the file
//   import { crdTypes } from ...         the text, for the test that holds the two together

import { readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { parse } from 'yaml';

type Schema = {
  type?: string;
  description?: string;
  properties?: Record<string, Schema>;
  required?: string[];
  items?: Schema;
  additionalProperties?: Schema;
  enum?: string[];
  default?: unknown;
  'x-kubernetes-int-or-string'?: boolean;
  'x-kubernetes-preserve-unknown-fields'?: boolean;
};
type Definition = {
  spec: {
    group: string;
    names: { kind: string; plural: string };
    versions: { name: string; schema: { openAPIV3Schema: Schema } }[];
  };
};

const folder = join(import.meta.dirname, '../crds');

/** The text of crds/types.ts. */
export function crdTypes(): string {
  const definitions = readdirSync(folder)
    .filter((name) => name.endsWith('.yaml'))
    .sort()
    .map((name) => parse(readFileSync(join(folder, name), 'utf8')) as Definition);
  const { group, versions } = definitions[0]!.spec;
  return [
    '// Made by scripts/crd-types.ts from the YAML beside it. Do not edit: change the YAML and run `npm run crds`.',
    '',
    "import type { V1ObjectMeta } from '@kubernetes/client-node';",
    '',
    `export const group = '${group}';`,
    `export const version = '${versions[0]!.name}';`,
    `export const apiVersion = '${group}/${versions[0]!.name}';`,
    '',
    '/** Kind -> its name in the paths of the API. */',
    `export const plurals = {\n${definitions.map(({ spec }) => `  ${spec.names.kind}: '${spec.names.plural}',`).join('\n')}\n} as const;`,
    '',
    'export type Kind = keyof typeof plurals;',
    '',
    ...definitions.flatMap(kindTypes),
  ].join('\n');
}

function kindTypes({ spec: { names, versions } }: Definition): string[] {
  const schema = versions[0]!.schema.openAPIV3Schema;
  const { spec, status } = schema.properties!;
  const { kind } = names;
  return [
    comment(schema.description, ''),
    `export interface ${kind} {`,
    '  apiVersion: string;',
    `  kind: '${kind}';`,
    '  metadata: V1ObjectMeta;',
    `  spec: ${kind}Spec;`,
    `  status?: ${kind}Status;`,
    '}',
    '',
    comment(spec!.description, ''),
    `export interface ${kind}Spec ${objectType(spec!, '')}`,
    '',
    comment(status!.description, ''),
    `export interface ${kind}Status ${objectType(status!, '')}`,
    '',
  ];
}

/** A field with a default is there in whatever the API server returns, so it is not optional. */
function objectType(schema: Schema, indent: string): string {
  const inner = `${indent}  `;
  const fields = Object.entries(schema.properties ?? {}).flatMap(([name, property]) => {
    const isThere = schema.required?.includes(name) || property.default !== undefined;
    const key = /^[A-Za-z_]\w*$/.test(name) ? name : `'${name}'`;
    return [
      comment(property.description, inner),
      `${inner}${key}${isThere ? '' : '?'}: ${typeOf(property, inner)};`,
    ];
  });
  if (schema['x-kubernetes-preserve-unknown-fields']) fields.push(`${inner}[field: string]: unknown;`);
  return `{\n${fields.filter((line) => line !== '').join('\n')}\n${indent}}`;
}

function typeOf(schema: Schema, indent: string): string {
  if (schema['x-kubernetes-int-or-string']) return 'number | string';
  if (schema.enum) return schema.enum.map((value) => `'${value}'`).join(' | ');
  switch (schema.type) {
    case 'string':
      return 'string';
    case 'boolean':
      return 'boolean';
    case 'integer':
    case 'number':
      return 'number';
    case 'array': {
      const item = typeOf(schema.items!, indent);
      return item.includes(' | ') && !item.startsWith('{') ? `(${item})[]` : `${item}[]`;
    }
    case 'object':
      if (schema.properties) return objectType(schema, indent);
      return schema.additionalProperties
        ? `Record<string, ${typeOf(schema.additionalProperties, indent)}>`
        : 'Record<string, unknown>';
    default:
      throw new Error(`a schema of type ${schema.type} has no type in TypeScript here`);
  }
}

/** Wrapped at 110 columns, as the formatter would not. */
function comment(text: string | undefined, indent: string): string {
  if (text === undefined) return '';
  const words = text.replaceAll('*/', '* /').split(/\s+/);
  const lines: string[] = [];
  for (const word of words) {
    const last = lines.at(-1);
    if (last !== undefined && indent.length + 3 + last.length + 1 + word.length <= 108) {
      lines[lines.length - 1] = `${last} ${word}`;
    } else lines.push(word);
  }
  if (lines.length === 1 && indent.length + lines[0]!.length + 8 <= 110) return `${indent}/** ${lines[0]} */`;
  return [`${indent}/**`, ...lines.map((line) => `${indent} * ${line}`), `${indent} */`].join('\n');
}

if (import.meta.main) writeFileSync(join(folder, 'types.ts'), crdTypes());
