import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { beforeAll, describe, expect, test } from 'vitest';
import { parse } from 'yaml';
import { callApi, motetPath } from '../../crds/api.ts';
import {
  adapterGroupReasons,
  adapterRouteReasons,
  baseModelReasons,
  loraAdapterReasons,
  tenantReasons,
} from '../../crds/names.ts';
import { type Kind, plurals } from '../../crds/types.ts';
import {
  type ControlPlane,
  createNamespace,
  kubectl,
  sharedControlPlane,
} from '../fixtures/control-plane.ts';
import { kubeConfigOf } from './api-proxy.ts';
import { crdFolder, installCrds } from './install-crds.ts';
import { fields } from './schemas.ts';

const readme = readFileSync(join(crdFolder, 'README.md'), 'utf8');
const kinds = Object.keys(plurals) as Kind[];
const sections = Object.fromEntries(
  readme.split(/^## /m).map((section) => [section.split('\n')[0]!, section]),
);
const reasons: Record<Kind, Record<string, string>> = {
  BaseModel: baseModelReasons,
  LoraAdapter: loraAdapterReasons,
  AdapterRoute: adapterRouteReasons,
  AdapterGroup: adapterGroupReasons,
  Tenant: tenantReasons,
};

let plane: ControlPlane;
let namespace: string;
beforeAll(async () => {
  plane = await sharedControlPlane();
  await installCrds(plane);
  namespace = await createNamespace(plane);
});

describe.for(kinds)('%s', (kind) => {
  const section = sections[kind]!;
  const examples = [...section.matchAll(/^```yaml\n(.*?)^```/gms)].map(([, yaml]) => parse(yaml!));

  test('has a row for each reason, and no other', () => {
    const rows = [...section.matchAll(/^\|[^|]*\| `(\w+)` \|/gm)].map(([, reason]) => reason);
    expect(rows.toSorted()).toEqual(Object.values(reasons[kind]).toSorted());
  });

  test('has a small example and one with everything, which the API server takes', async () => {
    expect(examples).toHaveLength(2);
    for (const body of examples) {
      expect(body.kind).toBe(kind);
      const query = { dryRun: 'All', fieldValidation: 'Strict' };
      await callApi(kubeConfigOf(plane), { method: 'POST', path: motetPath(kind, namespace), query, body });
    }
    const given = [...pathsOf('spec', examples[1].spec), ...namesInComments(section)];
    const names = fields
      .filter((field) => field.kind === kind && /^spec\..*[^\]]$/.test(field.path))
      .map(({ path }) => path.split('.').at(-1)!);
    expect(names.filter((name) => !given.includes(name))).toEqual([]);
  });

  test('is shown as kubectl shows it', async () => {
    const heads = section.match(/\$ kubectl get \w+\n +(NAME .*)/)![1]!.split(/\s+/);
    const name = `shown-${kind.toLowerCase()}`;
    const body = { ...examples[0], metadata: { name } };
    await callApi(kubeConfigOf(plane), { method: 'POST', path: motetPath(kind, namespace), body });
    const shown = await kubectl(plane, ['-n', namespace, 'get', plurals[kind], name]);
    expect(heads).toEqual(shown.split('\n')[0]!.trim().split(/\s+/));
  });
});

/** Names of fields at any depth. */
function pathsOf(name: string, value: unknown): string[] {
  if (Array.isArray(value)) return [name, ...value.flatMap((item) => pathsOf(name, item))];
  if (typeof value !== 'object' || value === null) return [name];
  return [name, ...Object.entries(value).flatMap(([key, inner]) => pathsOf(key, inner))];
}

/** Of which only one may be given, the others are in a comment: `# or hostPath: /var/lib/motet`. */
function namesInComments(text: string): string[] {
  return [...text.matchAll(/#.*?\bor (.*)$/gm)].flatMap(([, rest]) =>
    [...rest!.matchAll(/(\w+):/g)].map(([, name]) => name!),
  );
}
