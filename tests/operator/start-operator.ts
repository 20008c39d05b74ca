// Starts operators against a real API server, and makes and reads what they work on.

import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { pino } from 'pino';
import { expect, onTestFinished, vi } from 'vitest';
import type { BaseModel } from '../../crds/types.ts';
import { parseConfig } from '../../operator/config.ts';
import { startOperator } from '../../operator/main.ts';
import { type ControlPlane, kubectl } from '../fixtures/control-plane.ts';

const crdFolder = join(import.meta.dirname, '../../crds');

export async function applyCrds(plane: ControlPlane): Promise<void> {
  const kinds = ['basemodels', 'loraadapters', 'adapterroutes', 'adaptergroups', 'tenants'];
  await kubectl(plane, [
    'apply',
    '--server-side',
    ...kinds.flatMap((kind) => ['-f', join(crdFolder, `${kind}.yaml`)]),
  ]);
  const names = kinds.map((kind) => `crd/${kind}.motet.dev`);
  await kubectl(plane, ['wait', '--for=condition=Established', '--timeout=60s', ...names]);
}

/** An operator that ends with the test. */
export async function startTestOperator(plane: ControlPlane, namespace: string, args: string[] = []) {
  const config = parseConfig(
    [
      ...['--kubeconfig', plane.kubeconfig, '--namespace', namespace, '--engine-image', 'motet/engine:test'],
      ...['--trusted-service-accounts', `${namespace}/motet-gateway,${namespace}/motet-operator`],
      ...['--host', '127.0.0.1', '--port', '0', ...args],
    ],
    {},
  );
  const operator = await startOperator(config, pino({ level: process.env.MOTET_TEST_LOG ?? 'silent' }));
  onTestFinished(() => operator.stop());
  return operator;
}

export interface Namespace {
  name: string;
  kubectl: (args: string[], input?: object) => Promise<string>;
  get: <T>(kind: string, name: string) => Promise<T>;
  /** Lines of the audit log about writes in it. */
  writes: () => AuditLine[];
}

export interface AuditLine {
  verb: string;
  user: { username: string };
  userAgent?: string;
  objectRef: { resource: string; subresource?: string; name?: string; namespace?: string };
  responseStatus?: { code: number };
  stage: string;
}

export function namespaceOf(plane: ControlPlane, name: string): Namespace {
  const run = (args: string[], input?: object) =>
    kubectl(plane, ['-n', name, ...args], input === undefined ? '' : JSON.stringify(input));
  return {
    name,
    kubectl: run,
    get: async (kind, object) => JSON.parse(await run(['get', kind, object, '-o', 'json'])),
    writes: () =>
      readFileSync(plane.auditLog, 'utf8')
        .split('\n')
        .filter((line) => line.includes(`"namespace":"${name}"`))
        .map((line) => JSON.parse(line) as AuditLine),
  };
}

export function baseModelOf(name: string, spec: object = {}): object {
  return {
    apiVersion: 'motet.dev/v1alpha1',
    kind: 'BaseModel',
    metadata: { name },
    spec: { source: { uri: 'file:///models/tiny.gguf' }, ...spec },
  };
}

/** Waits until the condition has the reason, and returns the object. */
export function untilReason(
  namespace: Namespace,
  name: string,
  reason: string,
  type = 'Ready',
): Promise<BaseModel> {
  return vi.waitFor(
    async () => {
      const baseModel = await namespace.get<BaseModel>('basemodel', name);
      const condition = baseModel.status?.conditions?.find((one) => one.type === type);
      expect(condition?.reason, JSON.stringify(baseModel.status)).toBe(reason);
      expect(condition?.observedGeneration).toBe(baseModel.metadata.generation);
      return baseModel;
    },
    { timeout: 30_000, interval: 200 },
  );
}
