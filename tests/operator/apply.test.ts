import type { KubernetesObject } from '@kubernetes/client-node';
import { expect, test } from 'vitest';
import { decideApply, driftOf, withHash } from '../../operator/apply.ts';
import { desiredObjects } from '../../operator/desired.ts';
import { baseModel } from './builders.ts';

const settings = {
  engineImage: 'motet/engine:1',
  engineCommand: ['node', '/app/engine/main.ts'],
  engineServiceAccount: 'motet-engine',
  trustedServiceAccounts: 'default/motet-gateway',
};

const wish = (spec: Parameters<typeof baseModel>[0] = {}) =>
  withHash(desiredObjects(baseModel(spec), settings).deployment);

/** What the API server makes of it: an object of its own, with defaults, without apiVersion and kind. */
function liveOf(object: ReturnType<typeof wish>): ReturnType<typeof wish> {
  const { apiVersion: _, kind: __, ...live } = structuredClone(object);
  live.metadata!.uid = 'uid-of-deployment';
  live.metadata!.resourceVersion = '7';
  const { containers } = live.spec!.template.spec!;
  live.spec!.template.spec!.restartPolicy = 'Always';
  containers[0]!.imagePullPolicy = 'IfNotPresent';
  return live;
}

const drifted = (change: (live: ReturnType<typeof wish>) => void) => {
  const live = liveOf(wish());
  change(live);
  return driftOf(wish(), live).map(({ path }) => path);
};
const containerOf = (live: ReturnType<typeof wish>) => live.spec!.template.spec!.containers[0]!;

test('creates what is not there', () => {
  expect(decideApply(wish(), undefined, undefined)).toEqual({
    action: 'apply',
    uid: null,
    reason: 'there is none',
  });
});

test('writes nothing when nothing changed', () => {
  expect(decideApply(wish(), liveOf(wish()), undefined)).toEqual({ action: 'none' });
});

test('applies when the wish changed, and says what', () => {
  expect(decideApply(wish({ replicas: 2 }), liveOf(wish()), undefined)).toMatchObject({
    action: 'apply',
    uid: 'uid-of-deployment',
    reason: expect.stringContaining('.spec.replicas'),
  });
});

test('applies when the wish has less than before, although nothing that is left differs', () => {
  const before = liveOf(wish({ adapterClaims: ['team-a'] }));
  expect(driftOf(wish(), before).map(({ path }) => path)).toEqual([
    '.metadata.annotations.motet.dev/applied',
  ]);
  expect(decideApply(wish(), before, undefined).action).toBe('apply');
});

test.each<[string, (live: ReturnType<typeof wish>) => void]>([
  ['labels and annotations', ({ metadata }) => Object.assign(metadata!.labels!, { team: 'a' })],
  ['an environment variable', (live) => void containerOf(live).env!.push({ name: 'EXTRA', value: '1' })],
  [
    'a container beside ours',
    (live) => void live.spec!.template.spec!.containers.unshift({ name: 'sidecar' }),
  ],
  ['a field that we do not set', (live) => void Object.assign(live.spec!, { paused: true })],
  ['the order of lists with keys', (live) => void containerOf(live).env!.reverse()],
])('leaves alone what others add: %s', (_, change) => {
  expect(drifted(change)).toEqual([]);
});

test.each<[string, (live: ReturnType<typeof wish>) => void, string]>([
  ['a number', (live) => void Object.assign(live.spec!, { replicas: 5 }), '.spec.replicas'],
  [
    'a field that is gone',
    ({ metadata }) => void delete metadata!.labels!['motet.dev/base-model'],
    '.metadata.labels.motet.dev/base-model',
  ],
  [
    'an entry with a key',
    (live) => void Object.assign(containerOf(live).env![0]!, { value: '/else' }),
    '.spec.template.spec.containers[engine].env[MOTET_MODEL].value',
  ],
  [
    'an entry that is gone',
    (live) => void containerOf(live).env!.shift(),
    '.spec.template.spec.containers[engine].env[MOTET_MODEL]',
  ],
  [
    'more in a list that is one value',
    (live) => void containerOf(live).args!.push('--insecure'),
    '.spec.template.spec.containers[engine].args',
  ],
  [
    'another order in a list that is one value',
    (live) => void containerOf(live).command!.splice(0, 1, 'sh'),
    '.spec.template.spec.containers[engine].command[0]',
  ],
  [
    'another kind of volume',
    (live) => {
      const [tmp] = live.spec!.template.spec!.volumes!;
      delete tmp!.emptyDir;
      tmp!.hostPath = { path: '/' };
    },
    '.spec.template.spec.volumes[tmp].emptyDir',
  ],
  [
    'a quantity',
    (live) => void Object.assign(containerOf(live).resources!.requests!, { memory: '1Gi' }),
    '.spec.template.spec.containers[engine].resources.requests.memory',
  ],
])('sees that others changed what is ours: %s', (_, change, path) => {
  expect(drifted(change)).toEqual([path]);
});

test('a quantity is the same however it is written', () => {
  expect(
    drifted(
      (live) =>
        void Object.assign(containerOf(live).resources!.requests!, { memory: '1536Mi', cpu: '1000m' }),
    ),
  ).toEqual([]);
});

test('empty text is the same as none', () => {
  const desired = wish({ podTemplate: { env: [{ name: 'EMPTY', value: '' }] } });
  const live = liveOf(desired);
  delete containerOf(live).env!.at(-1)!.value;
  expect(driftOf(desired, live)).toEqual([]);
});

test('does not write for ever what the API server writes its own way', () => {
  const desired = wish();
  const live = liveOf(desired);
  live.spec!.revisionHistoryLimit = 3;
  const settled = JSON.stringify([
    desired.metadata!.annotations!['motet.dev/applied'],
    driftOf(desired, live),
  ]);
  expect(decideApply(desired, live, settled)).toEqual({ action: 'none' });
  live.spec!.revisionHistoryLimit = 4;
  expect(decideApply(desired, live, settled).action).toBe('apply');
});

test('leaves alone an object of its name that is not its own, and says whose it is', () => {
  const foreign: KubernetesObject = { metadata: { name: 'tiny', uid: '1' } };
  expect(decideApply(wish(), foreign, undefined)).toEqual({
    action: 'refuse',
    message:
      "there is a Deployment tiny that is not the operator's; delete it, or name the base model differently",
  });
  const owner = { apiVersion: 'v1', kind: 'Widget', name: 'w', uid: '2', controller: true };
  const owned = { metadata: { ...foreign.metadata, ownerReferences: [owner] } };
  expect(decideApply(wish(), owned, undefined)).toEqual({
    action: 'refuse',
    message: 'Deployment tiny belongs to Widget w',
  });
});

test('takes up again what lost its owner', () => {
  const orphan = liveOf(wish());
  delete orphan.metadata!.ownerReferences;
  expect(decideApply(wish(), orphan, undefined).action).toBe('apply');
});

test('waits for the end of what is going, and of what a former base model of the name had', () => {
  const going = liveOf(wish());
  going.metadata!.deletionTimestamp = '2026-01-01T00:00:00Z' as never;
  const former = liveOf(wish());
  former.metadata!.ownerReferences![0]!.uid = 'former';
  for (const live of [going, former]) {
    expect(decideApply(wish(), live, undefined)).toEqual({
      action: 'wait',
      message: 'waiting for the end of the former Deployment tiny',
    });
  }
});
