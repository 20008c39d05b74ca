// Makes what helm/motet has from elsewhere: the custom resource definitions from crds/, the version from package.json, and
// the table of values in its README from the comments in values.yaml.
//
//   node scripts/chart.ts                writes the files
//   import { chartFiles } from ...       path -> text, for the test that holds them together

import { readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { isMap, isScalar, parseDocument, type YAMLMap } from 'yaml';

const root = join(import.meta.dirname, '..');
const chart = 'helm/motet';

/** Path from the root of the project -> text that should be there. */
export function chartFiles(): Map<string, string> {
  const { version } = JSON.parse(read('package.json')) as { version: string };
  return new Map([
    [
      `${chart}/Chart.yaml`,
      read(`${chart}/Chart.yaml`).replace(/^(version|appVersion): .*/gm, `$1: ${version}`),
    ],
    [`${chart}/README.md`, withTable(read(`${chart}/README.md`), valuesTable(read(`${chart}/values.yaml`)))],
    ...readdirSync(join(root, 'crds'))
      .filter((name) => name.endsWith('.yaml'))
      .map((name) => [`${chart}/templates/crds/${name}`, crdTemplate(name)] as const),
  ]);
}

/**
 * The definition as it is, with the release's labels. It is a template, since Helm installs what is in a folder `crds`
 * once and never upgrades it.
 */
function crdTemplate(name: string): string {
  const text = read(`crds/${name}`);
  if (text.includes('{{')) throw new Error(`crds/${name}: {{ would be read as a template`);
  const [head, ...rest] = text.split(/^metadata:\n/m);
  if (rest.length !== 1)
    throw new Error(`crds/${name}: expected one line \`metadata:\` at the start of a line`);
  return [
    `{{- /* Made by scripts/chart.ts from crds/${name}. Do not edit: change that and run \`npm run chart\`. */}}\n`,
    '{{- if .Values.crds.enabled }}\n',
    `${head}metadata:\n`,
    '  {{- include "motet.crdMetadata" . | nindent 2 }}\n',
    rest[0],
    '{{- end }}\n',
  ].join('');
}

/** One row for each value, with the comment above it in values.yaml. */
export function valuesTable(yaml: string): string {
  const rows = valueRows(parseDocument(yaml).contents as YAMLMap, '').map(
    ({ name, about, fallback }) => `| \`${name}\` | ${about} | ${fallback} |`,
  );
  return ['| value | what it is | default |', '|---|---|---|', ...rows].join('\n');
}

type Row = { name: string; about: string; fallback: string };

function valueRows(map: YAMLMap, path: string): Row[] {
  return map.items.flatMap(({ key, value }, index): Row[] => {
    const { value: name, commentBefore } = key as { value: string; commentBefore?: string };
    // The comment above the first key of a map belongs to the map in the parser's eyes.
    const about = commentBefore ?? (index === 0 ? map.commentBefore : undefined);
    const full = path + name;
    const isGroup = isMap(value) && value.items.length > 0;
    // `resources` says what it is; its parts need no words each.
    if (about === undefined && !isGroup) throw new Error(`values.yaml: ${full} has no comment`);
    const row = { name: full, about: oneLine(about?.split(/\n\s*\n/).at(-1) ?? ''), fallback: '' };
    if (isGroup) return [...(row.about === '' ? [] : [row]), ...valueRows(value, `${full}.`)];
    const plain = isScalar(value) ? value.value : (value as YAMLMap).toJSON();
    return [{ ...row, fallback: plain === '' ? '' : `\`${JSON.stringify(plain)}\`` }];
  });
}

function oneLine(comment: string): string {
  return comment.replaceAll('|', '\\|').split('\n').join(' ').replace(/\s+/g, ' ').trim();
}

function withTable(readme: string, table: string): string {
  const [before, after] = readme.split(/<!-- values:[^>]*-->[\s\S]*<!-- end of values -->/);
  if (after === undefined) throw new Error('README.md of the chart: expected the marks around the values');
  return `${before}<!-- values: made by \`npm run chart\` -->\n\n${table}\n\n<!-- end of values -->${after}`;
}

function read(path: string): string {
  return readFileSync(join(root, path), 'utf8');
}

if (import.meta.main) {
  for (const [path, text] of chartFiles()) writeFileSync(join(root, path), text);
}
