import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { crdTypes } from '../../scripts/crd-types.ts';
import { definitions } from '../crds/schemas.ts';

const types = readFileSync(join(import.meta.dirname, '../../crds/types.ts'), 'utf8');

test('crds/types.ts is what `npm run crds` makes of the YAML', () => {
  expect(types).toBe(crdTypes());
});

test('every kind is a type, and what has a default is always there, with what it is for', () => {
  for (const { spec } of definitions) expect(types).toContain(`export interface ${spec.names.kind} {`);
  expect(types).toMatch(/Default 1\. \*\/\n {2}replicas: number;/);
  expect(types).toMatch(/\n {2}servedName\?: string;/);
  expect(types).toMatch(/\n {2}quantization: 'keep' \| 'int8' \| 'int4';/);
});
