/**
 * Says in the words that the grammar library knows what a JSON schema says in some others: `unevaluatedProperties`, `unevaluatedItems`,
 * `dependentRequired`, `dependentSchemas`, `dependencies`, `propertyNames`, `not`, `if` with `then` and `else`, and `oneOf` whose parts overlap. A keyword is replaced where the
 * instances are the same ones before and after; where that cannot be told it stays, and the library refuses it by name.
 *
 *   a node → the node without those keywords, and `allOf` with what they come to
 */

type Node = Record<string, unknown>;
type Schema = Node | boolean;

/** What stands below these is schemas: one, a list, or one for each name. */
const inOne = ['additionalProperties', 'items', 'additionalItems'];
const inList = ['allOf', 'anyOf', 'oneOf', 'prefixItems', 'items'];
const inMap = ['properties', 'patternProperties', '$defs', 'definitions'];

const annotations = new Set([
  ...['$comment', 'title', 'description', 'default', 'examples', 'readOnly', 'writeOnly', 'deprecated'],
]);
const types = ['null', 'boolean', 'number', 'string', 'array', 'object'];

const maxDepth = 128;
/** Of nodes looked at and names written; what takes more stays as it is. */
const maxWork = 100_000;
const maxWordCharacters = 4096;
/** Each part of a `oneOf` is said together with all others. */
const maxOverlapping = 6;

interface Around {
  root: Node;
  /** How `items` and `$ref` are read. */
  draft: 'old' | '2019-09' | '2020-12';
  /** A `$ref` is a path from the root. */
  hasOneBase: boolean;
  workLeft: number;
}

export function lowerSchema(root: Node): Node {
  const { $schema } = root;
  const of = typeof $schema === 'string' ? $schema : '';
  const draft = /draft-0[3467]/.test(of) ? 'old' : of.includes('2019-09') ? '2019-09' : '2020-12';
  const hasOneBase = !/"\$id":|"id":"#/.test(JSON.stringify({ ...root, $id: undefined }));
  return lower(root, { root, draft, hasOneBase, workLeft: maxWork }, 0) as Node;
}

function lower(schema: unknown, around: Around, depth: number): unknown {
  if (!isObject(schema) || depth > maxDepth || --around.workLeft < 0) return schema;
  // What stands beside a $ref of an old draft counts for nothing.
  if (around.draft === 'old' && '$ref' in schema) return schema;
  if (depth > 0 && '$schema' in schema) return schema;
  const node = { ...schema };
  const extra: Schema[] = [];
  dropEmpty(node);
  lowerExclusive(node);
  if (around.draft !== 'old') {
    lowerUnevaluatedProperties(schema, node, extra, around);
    lowerUnevaluatedItems(schema, node, extra, around);
  }
  lowerDependencies(node, extra);
  lowerNot(node, extra, around);
  lowerIf(node, extra, around);
  lowerPropertyNames(node, extra);
  lowerOneOf(node, extra, around);
  if (extra.length > 0) node.allOf = [...(Array.isArray(node.allOf) ? node.allOf : []), ...extra];

  const below = (part: unknown) => lower(part, around, depth + 1);
  for (const key of inOne) if (isObject(node[key])) node[key] = below(node[key]);
  for (const key of inList) if (Array.isArray(node[key])) node[key] = node[key].map(below);
  for (const key of inMap) {
    const map = node[key];
    if (isObject(map))
      node[key] = fromEntries(Object.entries(map).map(([name, part]) => [name, below(part)]));
  }
  return node;
}

/** Keywords that say nothing where they stand. */
function dropEmpty(node: Node): void {
  if (node.uniqueItems === false) delete node.uniqueItems;
  if (node.minContains === 0 && !('maxContains' in node)) delete node.contains;
  if (!('contains' in node)) {
    delete node.minContains;
    delete node.maxContains;
  }
  if (!('if' in node)) {
    delete node.then;
    delete node.else;
  } else if (!('then' in node) && !('else' in node)) delete node.if;
}

/**
 * Bounds that a number is not to reach: the library lets 2 through where more than 2 is asked, and less than a number below 3. The next number that
 * a double can be is a bound that may be reached; next to 0 it is the least with as many digits as the library can compare.
 */
function lowerExclusive(node: Node): void {
  const { type, minimum, maximum, exclusiveMinimum: above, exclusiveMaximum: below } = node;
  if (type === 'integer') return;
  if (isWhole(above) && above >= 0) {
    const least = above === 0 ? leastAboveZero : nextAbove(above);
    node.minimum = typeof minimum === 'number' ? Math.max(minimum, least) : least;
    delete node.exclusiveMinimum;
  }
  if (isWhole(below) && below <= 0) {
    const most = below === 0 ? -leastAboveZero : -nextAbove(-below);
    node.maximum = typeof maximum === 'number' ? Math.min(maximum, most) : most;
    delete node.exclusiveMaximum;
  }
}

const leastAboveZero = 1e-18;

/** Doubles above it are no whole numbers. */
const isWhole = (value: unknown): value is number =>
  Number.isInteger(value) && Math.abs(value as number) < 2 ** 52;

/** @param value  a whole number above 0 */
function nextAbove(value: number): number {
  const [bits] = new BigInt64Array(new Float64Array([value]).buffer);
  return new Float64Array(new BigInt64Array([bits! + 1n]).buffer)[0]!;
}

/** What a schema has looked at in an object that follows it. */
interface Names {
  names: Set<string>;
  patterns: Set<string>;
  isAll: boolean;
}

function lowerUnevaluatedProperties(schema: Node, node: Node, extra: Schema[], around: Around): void {
  const { unevaluatedProperties: rest, ...others } = schema;
  if (!isSchema(rest)) return;
  const seen: Names = { names: new Set(), patterns: new Set(), isAll: rest === true };
  if (!seen.isAll && !addNames(others, seen, around, [])) return;
  delete node.unevaluatedProperties;
  if (seen.isAll) return;
  const allowed = (names: Set<string>) => fromEntries([...names].map((name) => [name, true]));
  extra.push({
    properties: allowed(seen.names),
    ...(seen.patterns.size > 0 && { patternProperties: allowed(seen.patterns) }),
    additionalProperties: rest,
  });
}

/** @returns false: it depends on the instance */
function addNames(schema: unknown, seen: Names, around: Around, refs: readonly string[]): boolean {
  if (!isObject(schema)) return true;
  const { properties, patternProperties } = schema;
  const names = isObject(properties) ? Object.keys(properties) : [];
  around.workLeft -= 1 + names.length;
  if (around.workLeft < 0) return false;
  for (const name of names) seen.names.add(name);
  for (const name of isObject(patternProperties) ? Object.keys(patternProperties) : [])
    seen.patterns.add(name);
  if ('additionalProperties' in schema || 'unevaluatedProperties' in schema) seen.isAll = true;
  const add = (part: unknown, to: Names, via: readonly string[]) => addNames(part, to, around, via);
  const isNone = ({ names, patterns, isAll }: Names) => !isAll && names.size + patterns.size === 0;
  const none = () => ({ names: new Set<string>(), patterns: new Set<string>(), isAll: false });
  return inPlace(schema, around, refs, seen, { add, none, isNone });
}

/** How many items a schema has looked at in an array that follows it. */
interface Items {
  count: number;
  isAll: boolean;
}

function lowerUnevaluatedItems(schema: Node, node: Node, extra: Schema[], around: Around): void {
  const { unevaluatedItems: rest, ...others } = schema;
  if (!isSchema(rest)) return;
  const seen: Items = { count: 0, isAll: rest === true };
  if (!seen.isAll && !addItems(others, seen, around, [])) return;
  delete node.unevaluatedItems;
  if (seen.isAll) return;
  const first = Array.from({ length: seen.count }, () => true);
  if (seen.count === 0) extra.push({ items: rest });
  else if (around.draft === '2020-12') extra.push({ prefixItems: first, items: rest });
  else extra.push({ items: first, additionalItems: rest });
}

/** @returns false: it depends on the instance */
function addItems(schema: unknown, seen: Items, around: Around, refs: readonly string[]): boolean {
  if (!isObject(schema)) return true;
  const { items, prefixItems } = schema;
  const first = around.draft === '2020-12' ? prefixItems : items;
  const count = Array.isArray(first) ? first.length : 0;
  around.workLeft -= 1 + count;
  // From 2020-12 on, an item that `contains` has found is looked at.
  if (around.workLeft < 0 || (around.draft === '2020-12' && 'contains' in schema)) return false;
  seen.count = Math.max(seen.count, count);
  const isAll =
    around.draft === '2020-12'
      ? 'items' in schema
      : isSchema(items) || (Array.isArray(items) && 'additionalItems' in schema);
  if (isAll || 'unevaluatedItems' in schema) seen.isAll = true;
  const add = (part: unknown, to: Items, via: readonly string[]) => addItems(part, to, around, via);
  const isNone = ({ count, isAll }: Items) => !isAll && count === 0;
  return inPlace(schema, around, refs, seen, { add, none: () => ({ count: 0, isAll: false }), isNone });
}

/** Adds what the schemas see that are applied to the same instance: of those that may not hold, only nothing is known. */
function inPlace<Seen>(
  schema: Node,
  around: Around,
  refs: readonly string[],
  seen: Seen,
  how: {
    add(part: unknown, to: Seen, refs: readonly string[]): boolean;
    none(): Seen;
    isNone(seen: Seen): boolean;
  },
): boolean {
  if ('$dynamicRef' in schema || '$recursiveRef' in schema) return false;
  if ('$ref' in schema) {
    const { $ref } = schema;
    const target = resolve($ref, around);
    if (target === undefined || refs.includes($ref as string)) return false;
    if (!how.add(target, seen, [...refs, $ref as string])) return false;
  }
  const { allOf, anyOf, oneOf, dependentSchemas, dependencies } = schema;
  for (const part of Array.isArray(allOf) ? allOf : []) if (!how.add(part, seen, refs)) return false;
  const perhaps: unknown[] = [anyOf, oneOf].flatMap((list) => (Array.isArray(list) ? list : []));
  for (const map of [dependentSchemas, dependencies]) if (isObject(map)) perhaps.push(...Object.values(map));
  perhaps.push(schema.if, schema.then, schema.else);
  return perhaps.every((part) => {
    const there = how.none();
    return how.add(part, there, refs) && how.isNone(there);
  });
}

/** "When there is a name": there is none, or what follows from it. */
function lowerDependencies(node: Node, extra: Schema[]): void {
  for (const key of ['dependentRequired', 'dependentSchemas', 'dependencies']) {
    const map = node[key];
    if (!isObject(map)) continue;
    const isGood = Object.values(map).every((part) => isSchema(part) || isNames(part));
    if (!isGood) continue;
    delete node[key];
    for (const [name, then] of Object.entries(map)) {
      const follows = Array.isArray(then) ? { required: then } : (then as Schema);
      extra.push({ anyOf: [{ properties: { [name]: false } }, follows] });
    }
  }
}

function lowerNot(node: Node, extra: Schema[], around: Around): void {
  if (!('not' in node)) return;
  const negated = negate(node.not, around, 0);
  if (negated === null) return;
  delete node.not;
  if (negated !== true) extra.push(negated);
}

function lowerIf(node: Node, extra: Schema[], around: Around): void {
  if (!isSchema(node.if)) return;
  const otherwise = negate(node.if, around, 0);
  if (otherwise === null) return;
  const both = (a: Schema, b: unknown) => (b === undefined ? a : { allOf: [a, b] });
  extra.push({ anyOf: [both(node.if, node.then), both(otherwise, node.else)] });
  delete node.if;
  delete node.then;
  delete node.else;
}

/** One part, and none of the others. Parts that cannot overlap the library takes as they are. */
function lowerOneOf(node: Node, extra: Schema[], around: Around): void {
  const { oneOf: parts } = node;
  if (!Array.isArray(parts) || parts.length > maxOverlapping) return;
  const isApart = parts.every((a, i) => parts.slice(i + 1).every((b) => areApart(a, b, around, 0)));
  if (isApart) return;
  const others = parts.map((part) => negate(part, around, 0));
  if (others.includes(null)) return;
  const only = (part: unknown, i: number) => ({ allOf: [part, ...others.filter((_, j) => j !== i)] });
  extra.push({ anyOf: parts.map(only) });
  delete node.oneOf;
}

/** Whether no instance of the one is one of the other; false also when that does not meet the eye. */
function areApart(a: unknown, b: unknown, around: Around, depth: number): boolean {
  const [one, other] = [a, b].map((part) =>
    isObject(part) && '$ref' in part ? resolve(part.$ref, around) : part,
  );
  if (!isObject(one) || !isObject(other) || depth > 4) return false;
  const [values, otherValues] = [valuesOf(one), valuesOf(other)];
  if (values && otherValues) return !values.some((value) => otherValues.includes(value));
  const [kinds, otherKinds] = [typesOf(one), typesOf(other)];
  if (!kinds || !otherKinds) return false;
  if (!kinds.some((type) => otherKinds.includes(type))) return true;
  if (kinds.length > 1 || otherKinds.length > 1 || kinds[0] !== 'object') return false;
  const required = [one.required, other.required].flatMap((list) => (isNames(list) ? list : []));
  const below = (of: Node, name: string) => (isObject(of.properties) ? of.properties[name] : undefined);
  return required.some((name) => areApart(below(one, name), below(other, name), around, depth + 1));
}

function valuesOf({ const: value, enum: list }: Node): unknown[] | null {
  const values = value !== undefined ? [value] : Array.isArray(list) ? list : null;
  return values?.every((one) => typeof one !== 'object' || one === null) ? values : null;
}

function typesOf({ type, ...rest }: Node): string[] | null {
  const types = Array.isArray(type) ? type : [type];
  if (isNames(types)) return types.map((name) => (name === 'integer' ? 'number' : name));
  return valuesOf(rest)?.map((value) => (value === null ? 'null' : typeof value)) ?? null;
}

/** Names that are a list, or those of a pattern, and no other. */
function lowerPropertyNames(node: Node, extra: Schema[]): void {
  const { propertyNames: of } = node;
  if (!isSchema(of)) return;
  const asked = typeof of === 'boolean' ? {} : withoutAnnotations(of);
  if (asked.type === 'string') delete asked.type;
  const keys = Object.keys(asked);
  const names = 'const' in asked ? [asked.const] : asked.enum;
  const { pattern, minLength: least = 0, maxLength: most = '' } = asked as { [key: string]: unknown };
  if (of === false) extra.push({ maxProperties: 0 });
  else if (keys.length === 1 && isNames(names)) {
    extra.push({
      properties: fromEntries(names.map((name) => [name, true])),
      additionalProperties: false,
    });
  } else if (keys.length === 1 && typeof pattern === 'string') {
    extra.push({ patternProperties: { [pattern]: true }, additionalProperties: false });
  } else if (keys.length > 0) {
    if (!keys.every((key) => key === 'minLength' || key === 'maxLength')) return;
    const form = `^[\\s\\S]{${least},${most}}$`;
    extra.push({ patternProperties: { [form]: true }, additionalProperties: false });
  }
  delete node.propertyNames;
}

/** A schema of all that is no instance of another; null: none is known. */
function negate(schema: unknown, around: Around, depth: number): Schema | null {
  if (typeof schema === 'boolean') return !schema;
  if (!isObject(schema) || depth > 16 || --around.workLeft < 0) return null;
  if (around.draft === 'old' && '$ref' in schema) return negateRef(schema.$ref, around, depth);
  const asked = withoutAnnotations(schema);
  const parts = Object.entries(asked).map(([key, value]) => negateKeyword(key, value, around, depth + 1));
  return parts.includes(null) ? null : anyOf(parts as Schema[]);
}

function negateKeyword(key: string, value: unknown, around: Around, depth: number): Schema | null {
  const of = (part: unknown) => negate(part, around, depth);
  if (key === 'type') return negateType(Array.isArray(value) ? value : [value]);
  if (key === 'const') return negateValues([value]);
  if (key === 'enum') return Array.isArray(value) ? negateValues(value) : null;
  if (key === 'not') return isSchema(value) ? value : null;
  if (key === '$ref') return negateRef(value, around, depth);
  if (key === 'required' && isNames(value)) {
    return anyOf(value.map((name) => ({ type: 'object', properties: { [name]: false } })));
  }
  if (key === 'properties' && isObject(value)) {
    const parts = Object.entries(value).map(([name, part]) => {
      const negated = of(part);
      if (negated === null || negated === false) return negated;
      return { type: 'object', required: [name], properties: { [name]: negated } };
    });
    return parts.includes(null) ? null : anyOf(parts as Schema[]);
  }
  if (key === 'allOf' || key === 'anyOf') {
    const parts = Array.isArray(value) ? value.map(of) : [null];
    if (parts.includes(null)) return null;
    return key === 'allOf' ? anyOf(parts as Schema[]) : { allOf: parts };
  }
  return typeof value === 'number' ? negateBound(key, value) : null;
}

function negateRef(ref: unknown, around: Around, depth: number): Schema | null {
  const target = resolve(ref, around);
  return target === undefined ? null : negate(target, around, depth + 1);
}

function negateType(named: readonly unknown[]): Schema | null {
  if (named.includes('integer') && !named.includes('number')) return null;
  if (!named.every((type) => type === 'integer' || types.includes(type as string))) return null;
  return ofTypes(types.filter((type) => !named.includes(type)));
}

function negateBound(key: string, value: number): Schema | null {
  if (key === 'minimum') return { type: 'number', exclusiveMaximum: value };
  if (key === 'maximum') return { type: 'number', exclusiveMinimum: value };
  if (key === 'exclusiveMinimum') return { type: 'number', maximum: value };
  if (key === 'exclusiveMaximum') return { type: 'number', minimum: value };
  const [, side, what] = /^(min|max)(Length|Items|Properties)$/.exec(key) ?? [];
  if (side === undefined || !Number.isInteger(value) || value < 0) return null;
  const type = { Length: 'string', Items: 'array', Properties: 'object' }[what!]!;
  if (side === 'max') return { type, [`min${what}`]: value + 1 };
  return value === 0 ? false : { type, [`max${what}`]: value - 1 };
}

/** All values but some. */
function negateValues(values: readonly unknown[]): Schema | null {
  const typeOf = (value: unknown) => (value === null ? 'null' : typeof value);
  const named = new Set<string>(values.map(typeOf));
  // Arrays and objects are objects to JavaScript.
  if (named.has('object')) return null;
  const parts: Schema[] = [ofTypes(types.filter((type) => !named.has(type)))];
  if (named.has('boolean')) {
    parts.push(...[true, false].filter((one) => !values.includes(one)).map((one) => ({ const: one })));
  }
  if (named.has('number')) {
    const sorted = (values.filter((value) => typeof value === 'number') as number[]).sort((a, b) => a - b);
    for (const [i, least] of [undefined, ...sorted].entries()) {
      const most = sorted[i];
      if (least === most) continue;
      parts.push({
        ...{ type: 'number' },
        ...(least !== undefined && { exclusiveMinimum: least }),
        ...(most !== undefined && { exclusiveMaximum: most }),
      });
    }
  }
  if (named.has('string')) {
    const pattern = patternOfOthers(values.filter((value) => typeof value === 'string') as string[]);
    if (pattern === null) return null;
    parts.push({ type: 'string', pattern });
  }
  return anyOf(parts);
}

/** An expression for all texts but some words; null: they are too many, or have characters that it would be unwise to write. */
export function patternOfOthers(words: readonly string[]): string | null {
  const numCharacters = words.reduce((sum, { length }) => sum + length, 0);
  if (numCharacters > maxWordCharacters || words.some((word) => word.length > 256)) return null;
  if (words.some((word) => !/^[^\p{Cc}\p{Cs}\p{Cn}]*$/u.test(word))) return null;
  /** @param ends  of the words that have begun as the text has */
  const others = (ends: readonly string[]): string => {
    const byFirst = Map.groupBy(
      ends.filter((end) => end !== ''),
      (end) => String.fromCodePoint(end.codePointAt(0)!),
    );
    const firsts = [...byFirst.keys()];
    const any = firsts.length === 0 ? '[\\s\\S]+' : `[^${firsts.map(escapedInClass).join('')}][\\s\\S]*`;
    const longer = [...byFirst].map(
      ([first, of]) => escaped(first) + others(of.map((end) => end.slice(first.length))),
    );
    const all = [any, ...longer, ...(ends.includes('') ? [] : [''])];
    return `(?:${all.join('|')})`;
  };
  return `^${others([...new Set(words)])}$`;
}

const escaped = (character: string) => character.replace(/[\\^$.*+?()[\]{}|]/, '\\$&');

const escapedInClass = (character: string) => (character === '-' ? '\\-' : escaped(character));

const ofTypes = (some: string[]): Schema => (some.length === 0 ? false : { type: some });

function anyOf(parts: readonly Schema[]): Schema {
  if (parts.includes(true)) return true;
  const left = parts.filter((part) => part !== false);
  return left.length > 1 ? { anyOf: left } : (left[0] ?? false);
}

/** What a path from the root leads to. */
function resolve(ref: unknown, { root, hasOneBase }: Around): Schema | undefined {
  if (typeof ref !== 'string' || !hasOneBase || (ref !== '#' && !ref.startsWith('#/'))) return undefined;
  let at: unknown = root;
  for (const step of ref.split('/').slice(1)) {
    if (!isObject(at) && !Array.isArray(at)) return undefined;
    const key = decode(step);
    at = key !== null && Object.hasOwn(at, key) ? (at as Node)[key] : undefined;
  }
  return isSchema(at) ? at : undefined;
}

function decode(step: string): string | null {
  try {
    return decodeURIComponent(step).replaceAll('~1', '/').replaceAll('~0', '~');
  } catch {
    return null;
  }
}

function withoutAnnotations(node: Node): Node {
  return fromEntries(Object.entries(node).filter(([key]) => !annotations.has(key)));
}

/** `__proto__` is a name as others are. */
const fromEntries = (entries: [string, unknown][]): Node => Object.fromEntries(entries);

const isNames = (value: unknown): value is string[] =>
  Array.isArray(value) && value.every((name) => typeof name === 'string');

const isSchema = (value: unknown): value is Schema => typeof value === 'boolean' || isObject(value);

const isObject = (value: unknown): value is Node =>
  typeof value === 'object' && value !== null && !Array.isArray(value);
