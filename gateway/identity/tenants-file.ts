// The tenants of a gateway outside of a cluster, as one file in YAML or JSON says them: tenants, and what their selectors select by
// labels. A tenant is the spec of a Tenant and a group that of an AdapterGroup, by the same schemas (crds/check-spec.ts), but for two
// things: a key is a digest or a file with the key, since there are no Secrets, and there are no AdapterRoutes. Whatever is wrong
// refuses all of the file: half a file would take rights from some and leave others what they lost.

import { isAlias, isCollection, isMap, isScalar, LineCounter, parseDocument, visit } from 'yaml';
import { checkSpec, type Schema, SpecError, shown, specSchema } from '../../crds/check-spec.ts';
import { servedNameOf } from '../../crds/names.ts';
import type { AdapterGroup, TenantSpec } from '../../crds/types.ts';
import type { Holder } from '../auth.ts';
import type { Limits } from '../quota/limits.ts';
import { type KeyState, readKey } from './keys.ts';

/** A key as the file names it. */
type NamedKey = { sha256?: string; file?: string; limits?: Limits };

export type FileTenant = Omit<TenantSpec, 'keys'> & { name: string };

/** An adapter as engines call it, and the base that it belongs to, as they call that. */
export type LabelledAdapter = { name: string; baseModel: string; labels: Record<string, string> };

export type TenantsFile = {
  tenants: FileTenant[];
  adapters: LabelledAdapter[];
  /** Name -> labels. */
  baseModels: Record<string, Record<string, string>>;
  /** As resources, named as clients name them. */
  groups: Pick<AdapterGroup, 'metadata' | 'spec'>[];
};

/** The file, and the keys that its tenants name. */
export type ParsedFile = TenantsFile & { keys: ({ tenant: string; at: string } & NamedKey)[] };

/** The file with its keys read. Of a key that is not accepted, why. Plain data: it comes from another thread. */
export type ReadFile = TenantsFile & { holders: Holder[]; problems: string[] };

/** Ten thousand tenants of 200 bytes. */
export const maxFileBytes = 2 << 20;
const maxTenants = 10_000;
const maxAdapters = 10_000;
const maxBaseModels = 1_000;
const maxGroups = 1_000;
/** Each is looked at ten times a second. */
export const maxKeyFiles = 64;
const maxDepth = 32;

/** @throws SpecError at the first fault */
export function parseTenantsFile(text: string): ParsedFile {
  const given = checkSpec(parseYaml(text), fileSchema, '') as {
    tenants: Record<string, TenantSpec & { keys: NamedKey[] }>;
    adapters: Record<string, Omit<LabelledAdapter, 'name'>>;
    baseModels: Record<string, { labels: Record<string, string> }>;
    groups: Record<string, AdapterGroup['spec'] & { labels: Record<string, string> }>;
  };
  const tenants = entries(given.tenants, 'tenants', tenantName).map(([name, { keys, ...spec }]) => ({
    name,
    keys: keys.map((key, index) => ({ tenant: name, at: `tenants.${name}.keys[${index}]`, ...key })),
    spec,
  }));
  const keys = tenants.flatMap((tenant) => tenant.keys);
  assertKeys(keys);
  const adapters = entries(given.adapters, 'adapters', servedName);
  const baseModels = entries(given.baseModels, 'baseModels', servedName);
  const groups = entries(given.groups, 'groups', servedName).map(([name, { labels, ...spec }]) => ({
    metadata: { name, labels },
    spec,
  }));
  const taken = new Map<string, string>();
  for (const [names, kind] of [
    [adapters.map(([name]) => name), 'adapters'],
    [baseModels.map(([name]) => name), 'baseModels'],
    [groups.map(servedNameOf), 'groups'],
  ] as const) {
    for (const name of names) {
      const other = taken.get(name);
      if (other !== undefined) throw new SpecError(`${kind}.${name}`, `the name is also one of ${other}`);
      taken.set(name, kind);
    }
  }
  return {
    tenants: tenants.map(({ name, spec }) => ({ name, ...spec })),
    keys,
    adapters: adapters.map(([name, adapter]) => ({ name, ...adapter })),
    baseModels: Object.fromEntries(baseModels.map(([name, { labels }]) => [name, labels])),
    groups,
  };
}

/**
 * Who holds which key. A key that two tenants have is the first's.
 *
 * @param read  what a file with a key has; null: there is no such file, or it cannot be read
 */
export function holdersOf(
  keys: ParsedFile['keys'],
  read: (file: string) => Buffer | null,
): Pick<ReadFile, 'holders' | 'problems'> {
  const holders: Holder[] = [];
  const problems: string[] = [];
  const ownerOf = new Map<string, string>();
  for (const { tenant, at, sha256, file, limits } of keys) {
    const state: KeyState = file === undefined ? { kind: 'key', digest: sha256! } : stateOf(read(file));
    if (state.kind !== 'key') {
      const problem = state.kind === 'invalid' ? state.problem : 'there is no such file that can be read';
      problems.push(`${at}.file: ${file}: ${problem}`);
      continue;
    }
    const owner = ownerOf.get(state.digest) ?? tenant;
    ownerOf.set(state.digest, owner);
    if (owner !== tenant) problems.push(`${at}: it is also a key of ${owner}, which keeps it`);
    else holders.push({ name: tenant, digest: state.digest, ...(limits && { limits }) });
  }
  return { holders, problems };
}

function stateOf(content: Buffer | null): KeyState {
  return content === null ? { kind: 'no_secret' } : readKey(content);
}

/** @throws SpecError that shows nothing of the text */
function parseYaml(text: string): unknown {
  const lines = new LineCounter();
  const at = (offset: number) => {
    const { line, col } = lines.linePos(offset);
    return `line ${line}, column ${col}`;
  };
  // The parser compares each key of a map with all others; below that is done in one pass.
  const document = parseDocument(text, {
    lineCounter: lines,
    prettyErrors: false,
    uniqueKeys: false,
    version: '1.2',
    schema: 'core',
  });
  // Messages of the parser have pieces of the text in them.
  const [fault] = [...document.errors, ...document.warnings];
  if (fault !== undefined)
    throw new SpecError(at(fault.pos[0]), `expected YAML or JSON, got a fault (${fault.code})`);
  visit(document, (_, node, path) => {
    if (path.length > maxDepth * 2 && isCollection(node))
      throw new SpecError(at(node.range![0]), `expected at most ${maxDepth} levels`);
    if (isAlias(node)) throw new SpecError(at(node.range![0]), 'expected no alias (*NAME); write it out');
    if (!isMap(node)) return;
    const names = new Set<string>();
    for (const { key } of node.items) {
      if (!isScalar(key) || typeof key.value !== 'string')
        throw new SpecError(at(node.range![0]), 'expected texts as names of fields; put others in quotes');
      if (names.has(key.value))
        throw new SpecError(at(key.range![0]), `${shown(key.value)} stands here twice`);
      names.add(key.value);
    }
  });
  return document.toJS();
}

/** A tenant's files and batches are kept under its name, and limits counted. */
const tenantName = /^[A-Za-z0-9][\w.@-]{0,62}$/;
/** As resources have them. */
const servedName = /^[A-Za-z0-9]([A-Za-z0-9._:/-]{0,126}[A-Za-z0-9])?$/;

function entries<T>(of: Record<string, T>, at: string, pattern: RegExp): [string, T][] {
  const strange = Object.keys(of).find((name) => !pattern.test(name));
  if (strange !== undefined)
    throw new SpecError(at, `expected names like ${pattern.source}, got ${shown(strange)}`);
  return Object.entries(of);
}

function assertKeys(keys: ParsedFile['keys']): void {
  const ownerOf = new Map<string, string>();
  const files = new Set<string>();
  for (const { at, tenant, sha256, file } of keys) {
    if ((sha256 === undefined) === (file === undefined))
      throw new SpecError(at, 'expected sha256 or file, and one of them');
    if (file !== undefined) files.add(file);
    if (files.size > maxKeyFiles)
      throw new SpecError(`${at}.file`, `expected at most ${maxKeyFiles} files with keys; use sha256`);
    if (sha256 === undefined) continue;
    const owner = ownerOf.get(sha256);
    if (owner !== undefined) throw new SpecError(`${at}.sha256`, `it is also a key of ${owner}`);
    ownerOf.set(sha256, tenant);
  }
}

/** The schema of the whole file. */
const fileSchema = makeSchema();

function makeSchema(): Schema {
  const tenant = specSchema('Tenant');
  const group = specSchema('AdapterGroup');
  const { keys, access, ...others } = tenant.properties!;
  const { secretRef: _, ...ofKey } = keys!.items!.properties!;
  const { routes: _routes, ...selectors } = access!.properties!;
  const labels: Schema = { ...group.properties!.selector!.properties!.matchLabels!, default: {} };
  const base = group.properties!.baseModel!;
  const byName = (of: Schema, maxProperties: number): Schema => ({
    type: 'object',
    additionalProperties: of,
    maxProperties,
    default: {},
  });
  const key: Schema = {
    type: 'object',
    properties: {
      ...ofKey,
      sha256: { type: 'string', pattern: '^[0-9a-f]{64}$' },
      file: { type: 'string', minLength: 1, maxLength: 1024 },
    },
  };
  const ofTenant: Schema = {
    ...tenant,
    properties: {
      ...others,
      // One entry of a Secret may not stand there twice; of digests the same is looked at over all tenants.
      keys: { type: 'array', items: key, maxItems: keys!.maxItems!, default: [] },
      access: { ...access!, properties: selectors },
    },
  };
  return {
    type: 'object',
    required: ['tenants'],
    properties: {
      tenants: { type: 'object', additionalProperties: ofTenant, maxProperties: maxTenants },
      adapters: byName(
        {
          type: 'object',
          required: ['baseModel'],
          properties: { baseModel: { ...base, maxLength: 128 }, labels },
        },
        maxAdapters,
      ),
      baseModels: byName({ type: 'object', properties: { labels } }, maxBaseModels),
      groups: byName(
        {
          ...group,
          properties: { ...group.properties, baseModel: { ...base, maxLength: 128 }, labels },
        },
        maxGroups,
      ),
    },
  };
}
