import type { V1Pod } from '@kubernetes/client-node';
import { expect, test } from 'vitest';
import { readPod, trimPod } from '../../gateway/discovery.ts';
import { enginePod } from './resources.ts';

type Fields = {
  ip?: string;
  ready?: string;
  phase?: string;
  deleted?: boolean;
  labels?: Record<string, string>;
  port?: number;
};

function pod({
  ip = '10.0.0.7',
  ready = 'True',
  phase = 'Running',
  deleted = false,
  labels,
  port,
}: Fields = {}): V1Pod {
  const made = enginePod('engine-0', 'base');
  if (port !== undefined) made.spec.containers[0]!.ports = [{ name: 'http', containerPort: port }];
  return {
    ...made,
    metadata: {
      ...made.metadata,
      uid: 'a-uid',
      ...(labels && { labels }),
      ...(deleted && { deletionTimestamp: '2026-01-01T00:00:00Z' as never }),
    },
    status: {
      phase,
      podIP: ip,
      conditions: [
        { type: 'ContainersReady', status: 'True' },
        { type: 'Ready', status: ready },
      ],
    },
  };
}

test('a pod takes requests at its address and port, under its uid', () => {
  expect(readPod(pod())).toEqual({
    spec: { id: 'a-uid', name: 'engine-0', url: 'http://10.0.0.7:8000', baseModel: 'base' },
    isTaking: true,
  });
  expect(readPod(pod({ port: 9000 }))?.spec.url).toBe('http://10.0.0.7:9000');
  expect(readPod(pod({ ip: 'fd00::7' }))?.spec.url).toBe('http://[fd00::7]:8000');
});

test('a pod that is being deleted takes no new requests', () => {
  expect(readPod(pod({ deleted: true }))).toMatchObject({
    isTaking: false,
    reason: 'its pod is being deleted',
  });
});

test.each(['False', 'Unknown'])(
  'a pod whose condition Ready is %s is asked itself: the condition is older than its answer',
  (ready) => {
    expect(readPod(pod({ ready }))).toMatchObject({ isTaking: true });
  },
);

test.each<[string, Fields]>([
  ['without an address', { ip: '' }],
  ['without the label of a base model', { labels: {} }],
  ['that has failed', { phase: 'Failed' }],
  ['that has succeeded', { phase: 'Succeeded' }],
])('a pod %s is no engine', (_, fields) => {
  expect(readPod(pod(fields))).toBeNull();
});

test('what is kept of a pod says the same as the pod', () => {
  for (const fields of [{}, { phase: 'Failed' }, { deleted: true }, { ip: '' }, { port: 9000 }]) {
    const whole = pod(fields);
    expect(readPod(trimPod(structuredClone(whole)))).toEqual(readPod(whole));
  }
});
