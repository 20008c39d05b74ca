// The authorisation matrix: every caller with every name on every path. The table of rights below is written by hand.

import type { Tenant } from '../../../crds/types.ts';
import type { FakeEngine } from '../../fixtures/fake-engine.ts';
import { until } from '../start-gateway.ts';

type Access = Tenant['spec']['access'];

/** `stowaway` is on the engine and no resource declares it; `made-up` is nowhere. */
export const names = ['base', 'red-sql', 'red-docs', 'blue-sql', 'red-route', 'stowaway', 'made-up'] as const;
export type Name = (typeof names)[number];

const red = { matchLabels: { team: 'red' } };
export type Rights = { access: Access; may: Name[]; hears?: Name[] };

/** Tenant -> what it is given, and the names that this opens. It `hears` of the targets of its routes. */
export const tenants: Record<string, Rights> = {
  nothing: { access: {}, may: [] },
  red: { access: { adapters: red }, may: ['red-sql', 'red-docs'] },
  blue: { access: { adapters: { matchLabels: { team: 'blue' } } }, may: ['blue-sql'] },
  'red-sql-alone': {
    access: {
      adapters: {
        ...red,
        matchExpressions: [{ key: 'task', operator: 'In', values: ['sql'] }],
      },
    },
    may: ['red-sql'],
  },
  'not-red': {
    access: { adapters: { matchExpressions: [{ key: 'team', operator: 'NotIn', values: ['red'] }] } },
    may: ['blue-sql'],
  },
  bases: { access: { baseModels: {} }, may: ['base'] },
  routes: { access: { routes: red }, may: ['red-route'], hears: ['blue-sql'] },
  everything: {
    access: { adapters: {}, baseModels: {}, routes: {} },
    may: ['base', 'red-sql', 'red-docs', 'blue-sql', 'red-route'],
  },
};
/** Callers who are nobody: a key of no tenant, one of a Tenant whose Secret is missing, none, and other schemes. */
const nobodies: Record<string, string | undefined> = {
  'no header': undefined,
  'a key of no tenant': 'Bearer key-of-nobody-at-all-00',
  'a Tenant without its Secret': 'Bearer key-of-keyless-000000',
  'the name of a tenant': 'Bearer red',
  'Basic with a good key': `Basic ${Buffer.from('red:key-of-red-000000').toString('base64')}`,
  'a good key with a letter more': 'Bearer key-of-red-000000x',
  'a good key in other letters': 'Bearer KEY-OF-RED-000000',
};
export const keyOf = (name: string) => `key-of-${name}-000000`;

const paths = ['/v1/chat/completions', '/v1/completions', '/tokenize', '/detokenize'] as const;

/** Asks all of it of a gateway with files and batches, before one engine that has every adapter. */
export async function runMatrix(
  { url }: { url: string },
  engine: FakeEngine,
  tenants: Record<string, Rights>,
): Promise<{ numCases: number; wrong: string[] }> {
  const ask = async (method: string, path: string, authorization: string | undefined, body?: object) => {
    const response = await fetch(url + path, {
      method,
      headers: { ...(authorization && { authorization }), 'content-type': 'application/json' },
      ...(body && { body: JSON.stringify(body) }),
    });
    return {
      status: response.status,
      text: await response.text(),
      id: response.headers.get('x-request-id'),
    };
  };
  const use = (path: string, model: string, authorization: string | undefined) =>
    ask('POST', path, authorization, { model, messages: [], prompt: '', tokens: [] });
  const everything = `Bearer ${keyOf('everything')}`;
  for (const name of tenants.everything!.may) {
    await until(
      () => use(paths[0], name, everything),
      ({ status }) => status === 200,
    );
  }

  // A file of red's, that nobody else may see.
  const form = new FormData();
  form.set('purpose', 'batch');
  form.set('file', new Blob(['{}\n']), 'lines.jsonl');
  const upload = await fetch(`${url}/v1/files`, {
    method: 'POST',
    body: form,
    headers: { authorization: `Bearer ${keyOf('red')}` },
  });
  const { id: fileId } = (await upload.json()) as { id: string };

  let numCases = 0;
  const wrong: string[] = [];
  const check = (what: string, got: unknown, expected: unknown) => {
    numCases += 1;
    if (JSON.stringify(got) !== JSON.stringify(expected))
      wrong.push(`${what}: expected ${JSON.stringify(expected)}, got ${JSON.stringify(got)}`);
  };

  for (const [name, { may, hears = [] }] of Object.entries(tenants)) {
    const authorization = `Bearer ${keyOf(name)}`;
    for (const model of names) {
      const status = may.includes(model) ? 200 : 404;
      const answers = await Promise.all(
        paths.map(async (path) => [path, await use(path, model, authorization)] as const),
      );
      for (const [path, answer] of answers) {
        check(`${name} ${path} ${model}`, answer.status, status);
        const reached = engine.received.filter(({ headers }) => headers['x-request-id'] === answer.id);
        check(`${name} ${path} ${model}, engine`, reached.length, status === 200 ? 1 : 0);
      }
      const card = await ask('GET', `/v1/models/${model}`, authorization);
      check(`${name} /v1/models/${model}`, card.status, status);
    }
    const list = JSON.parse((await ask('GET', '/v1/models', authorization)).text) as {
      data: { id: string }[];
    };
    check(`${name} /v1/models`, list.data.map(({ id }) => id).sort(), [...may].sort());
    const ofRed = name === 'red';
    check(
      `${name} reads red's file`,
      (await ask('GET', `/v1/files/${fileId}`, authorization)).status,
      ofRed ? 200 : 404,
    );
    const content = await ask('GET', `/v1/files/${fileId}/content`, authorization);
    check(`${name} reads what is in it`, content.status, ofRed ? 200 : 404);
    const files = await ask('GET', '/v1/files', authorization);
    check(`${name} lists red's file`, files.text.includes(fileId), ofRed);
    const batch = { input_file_id: fileId, endpoint: paths[0], completion_window: '24h' };
    if (!ofRed)
      check(`${name} runs it`, (await ask('POST', '/v1/batches', authorization, batch)).status, 404);
    if (!ofRed)
      check(`${name} deletes it`, (await ask('DELETE', `/v1/files/${fileId}`, authorization)).status, 404);
    const data = await ask('GET', '/console/data', authorization);
    const mayHear = new Set<Name>(['base', ...may, ...hears]);
    const shown = names.filter((model) => data.text.includes(`"${model}"`) && !mayHear.has(model));
    check(`${name} /console/data`, shown, []);
    check(`${name} no such path`, (await ask('GET', '/v1/elsewhere', authorization)).status, 404);
    check(`${name} another method`, (await ask('DELETE', '/v1/models', authorization)).status, 405);
  }

  const numAsked = engine.received.length;
  for (const [who, authorization] of Object.entries(nobodies)) {
    for (const path of paths)
      check(`${who} ${path}`, (await use(path, 'red-sql', authorization)).status, 401);
    for (const path of [
      ...['/v1/models', '/v1/models/red-sql', '/console/data', '/v1/elsewhere'],
      ...['/v1/files', `/v1/files/${fileId}`, `/v1/files/${fileId}/content`, '/v1/batches'],
    ])
      check(`${who} ${path}`, (await ask('GET', path, authorization)).status, 401);
    check(`${who} DELETE`, (await ask('DELETE', `/v1/files/${fileId}`, authorization)).status, 401);
    for (const path of ['/livez', '/readyz', '/metrics'])
      check(`${who} ${path}`, (await ask('GET', path, authorization)).status, 200);
  }
  check('nobody reaches the engine', engine.received.length, numAsked);

  return { numCases, wrong };
}
