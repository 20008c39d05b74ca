/** The chart of this tree, rendered by the real helm. */
import { execFile } from 'node:child_process';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { parseAllDocuments } from 'yaml';
import { type ControlPlane, controlPlaneEnv, sharedControlPlane } from '../fixtures/control-plane.ts';

export const chartFolder = join(import.meta.dirname, '../../helm/motet');
/** Values with every optional part on. */
export const everything = join(import.meta.dirname, 'everything.yaml');

export interface Manifest {
  apiVersion: string;
  kind: string;
  metadata: {
    name: string;
    namespace?: string;
    labels: Record<string, string>;
    annotations?: Record<string, string>;
  };
  // biome-ignore lint/suspicious/noExplicitAny: objects of many kinds, of which a test reads a field or two
  [field: string]: any;
}

/** Runs helm against a control plane and returns what it prints; rejects with its message. */
export async function helm(plane: ControlPlane, args: string[], values: object = {}): Promise<string> {
  const running = promisify(execFile)(join(plane.clientsFolder, 'helm'), args, {
    env: controlPlaneEnv(plane),
    maxBuffer: 64 * 1024 * 1024,
  });
  running.child.stdin?.end(JSON.stringify(values));
  return (await running).stdout;
}

/**
 * What `helm template` prints for a release `motet` in a namespace `motet`.
 * @param values  as in a values file
 * @param file    a values file under them
 */
export async function renderText(values: object = {}, file?: string): Promise<string> {
  const files = file === undefined ? [] : ['-f', file];
  const args = ['template', 'motet', chartFolder, '--namespace', 'motet', ...files, '-f', '-'];
  return helm(await sharedControlPlane(), args, values);
}

export async function renderObjects(values: object = {}, file?: string): Promise<Manifest[]> {
  return parseAllDocuments(await renderText(values, file)).flatMap((document) => document.toJS() ?? []);
}

export function find(objects: Manifest[], kind: string, name: string): Manifest {
  const found = objects.find((object) => object.kind === kind && object.metadata.name === name);
  if (found === undefined) throw new Error(`there is no ${kind} ${name}`);
  return found;
}
