import type { V1Deployment, V1Pod } from '@kubernetes/client-node';
import { expect, test } from 'vitest';
import { baseModelStatus, type Observed } from '../../operator/base-model-status.ts';
import { conditionOf } from '../../operator/conditions.ts';
import { baseModel, pod } from './builders.ts';

const deployment = (status: V1Deployment['status'] = {}): V1Deployment => ({
  metadata: { generation: 2 },
  status: { observedGeneration: 2, replicas: 2, updatedReplicas: 2, availableReplicas: 2, ...status },
});

const observed = (more: Partial<Observed> = {}): Observed => ({
  baseModel: baseModel({ replicas: 2 }),
  before: undefined,
  deployment: deployment(),
  pods: [pod({ name: 'tiny-a' }), pod({ name: 'tiny-b' })],
  report: undefined,
  nameConflict: null,
  refusals: [],
  waits: [],
  now: new Date('2026-01-01T00:00:00Z'),
  ...more,
});

const statusOf = (more?: Partial<Observed>) => baseModelStatus(observed(more));
const conditions = (more?: Partial<Observed>) => {
  const status = statusOf(more);
  return Object.fromEntries(
    ['Ready', 'Progressing'].map((type) => {
      const { status: holds, reason, message } = conditionOf({ status }, type)!;
      return [type, [holds, reason, message]];
    }),
  );
};

const unready = (name: string, trouble: 'failing' | 'pending' | 'starting'): V1Pod => {
  const terminated = { exitCode: 78, message: 'motet engine: no such file' };
  const state = {
    failing: { waiting: { reason: 'CrashLoopBackOff' } },
    pending: { waiting: { reason: 'ErrImagePull', message: 'not found' } },
    starting: { running: {} },
  }[trouble];
  const lastState = trouble === 'failing' ? { terminated } : {};
  return pod({ name, isReady: false, container: { state, lastState } });
};

test('says how many engines there are, and how to find them', () => {
  expect(statusOf()).toMatchObject({
    observedGeneration: 1,
    replicas: 2,
    readyReplicas: 2,
    engines: '2/2',
    selector: 'motet.dev/base-model=tiny',
    pods: [
      { name: 'tiny-a', node: 'node-a', ready: true },
      { name: 'tiny-b', node: 'node-a', ready: true },
    ],
  });
});

test('is ready when every wanted engine takes requests, and is done', () => {
  expect(conditions()).toEqual({
    Ready: ['True', 'EnginesReady', '2 of 2 engines take requests'],
    Progressing: ['False', 'RolledOut', '2 pods, all of the newest version'],
  });
});

test('pods that end, and those that were evicted, are no engines', () => {
  const ending = pod({ name: 'ending' });
  ending.metadata!.deletionTimestamp = '2026-01-01T00:00:00Z' as never;
  const evicted = pod({ name: 'evicted', isReady: false, status: { phase: 'Failed' } });
  const status = statusOf({ pods: [pod({ name: 'tiny-a' }), ending, evicted] });
  expect(status).toMatchObject({ replicas: 1, readyReplicas: 1, engines: '1/2' });
  expect(status.pods!.map(({ name }) => name)).toEqual(['tiny-a']);
});

test('surplus engines of a rollout do not count for more than are wanted', () => {
  const pods = ['a', 'b', 'c'].map((name) => pod({ name }));
  expect(statusOf({ pods })).toMatchObject({ readyReplicas: 3, engines: '2/2' });
});

test.each<[string, Partial<Observed>, [string, string, string]]>([
  [
    'pods are being made',
    { pods: [] },
    ['False', 'EnginesStarting', '0 of 2 engines take requests. Pods are being made.'],
  ],
  [
    'some start',
    { pods: [pod({ name: 'a' }), unready('b', 'starting')] },
    ['False', 'EnginesStarting', '1 of 2 engines take requests. b: prepares its weights'],
  ],
  [
    'some cannot be had',
    { pods: [unready('a', 'starting'), unready('b', 'pending')] },
    ['False', 'PodsPending', '0 of 2 engines take requests. b: ErrImagePull: not found'],
  ],
  [
    'some fail, which is worse than all else',
    { pods: [unready('a', 'pending'), unready('b', 'failing')] },
    ['False', 'EngineFailing', '0 of 2 engines take requests. b: no such file (exit code 78)'],
  ],
  [
    'pods are refused, by a quota for example',
    {
      pods: [],
      deployment: deployment({
        conditions: [
          { type: 'ReplicaFailure', status: 'True', message: 'pods "tiny-" is forbidden: exceeded quota' },
        ],
      }),
    },
    ['False', 'PodsPending', '0 of 2 engines take requests. pods "tiny-" is forbidden: exceeded quota'],
  ],
  [
    'none is wanted',
    { baseModel: baseModel({ replicas: 0 }), pods: [] },
    ['False', 'ScaledToZero', 'replicas is 0'],
  ],
  [
    'something was refused',
    { refusals: ['Deployment tiny belongs to X y'] },
    ['False', 'ApplyRefused', 'Deployment tiny belongs to X y'],
  ],
  [
    'the name is taken',
    { nameConflict: 'the name tiny is that of BaseModel old, which is older' },
    [
      'False',
      'NameConflict',
      'the name tiny is that of BaseModel old, which is older. Delete one of the two; the name of a base model cannot be changed.',
    ],
  ],
])('is not ready when %s', (_, more, expected) => {
  expect(conditions(more).Ready).toEqual(expected);
});

test('tells of three pods, and counts the others', () => {
  const pods = ['a', 'b', 'c', 'd', 'e'].map((name) => unready(name, 'failing'));
  const [, , message] = conditions({ pods, baseModel: baseModel({ replicas: 5 }) }).Ready!;
  expect(message).toMatch(/; c: no such file \(exit code 78\); and 2 more$/);
});

test.each<[string, Partial<Observed>]>([
  ['the Deployment is not there yet', { deployment: undefined }],
  ['its controller has not seen the change', { deployment: deployment({ observedGeneration: 1 }) }],
  ['new pods are missing', { deployment: deployment({ updatedReplicas: 1 }) }],
  ['former pods are to end', { deployment: deployment({ replicas: 3 }) }],
  ['new pods are not ready', { deployment: deployment({ availableReplicas: 1 }) }],
  ['a former Deployment is going', { waits: ['waiting for the end of the former Deployment tiny'] }],
])('is progressing while %s', (_, more) => {
  expect(conditions(more).Progressing!.slice(0, 2)).toEqual(['True', 'RollingOut']);
});

test('a rollout in which enough engines serve is ready and progressing', () => {
  const { Ready, Progressing } = conditions({ deployment: deployment({ replicas: 3, updatedReplicas: 1 }) });
  expect([Ready![0], Progressing![0]]).toEqual(['True', 'True']);
});

test('says what engines hold, and adds it up', () => {
  const engines = new Map([
    ['tiny-a', { totalBytes: 100, adapterBytes: 10, adapters: 2 }],
    ['tiny-b', { totalBytes: 100, adapterBytes: 5, adapters: 1 }],
  ]);
  const status = statusOf({ report: { engines, copies: { ready: 3, wanted: 4 } } });
  expect(status).toMatchObject({ adapters: '3/4', memory: { totalBytes: 200, adapterBytes: 15 } });
  expect(status.pods!.map(({ adapters, adapterBytes }) => [adapters, adapterBytes])).toEqual([
    [2, 10],
    [1, 5],
  ]);
});

test('says what engines held last until they are asked, as after a start of the operator', () => {
  const engines = new Map([['tiny-a', { totalBytes: 100, adapterBytes: 10, adapters: 2 }]]);
  const before = statusOf({ report: { engines, copies: { ready: 2, wanted: 2 } } });
  expect(statusOf({ before })).toEqual(before);
});
