import type { V1ContainerStateTerminated } from '@kubernetes/client-node';
import { expect, test } from 'vitest';
import { lastWords, troubleOf } from '../../operator/pod-trouble.ts';
import { pod } from './builders.ts';

const ended = (more: Partial<V1ContainerStateTerminated> = {}): V1ContainerStateTerminated => ({
  exitCode: 78,
  reason: 'Error',
  message: 'motet engine: /motet/source/a.gguf: expected a GGUF file, got 4 bytes\n',
  ...more,
});
const words = '/motet/source/a.gguf: expected a GGUF file, got 4 bytes (exit code 78)';

test('a pod that takes requests has none', () => {
  expect(troubleOf(pod())).toBeNull();
});

test('a pod that ends takes no requests, although it is ready', () => {
  const ending = pod();
  ending.metadata!.deletionTimestamp = '2026-01-01T00:00:00Z' as never;
  expect(troubleOf(ending)).not.toBeNull();
});

test.each([
  ['waits to be started again', { waiting: { reason: 'CrashLoopBackOff', message: 'back-off 10s' } }],
  ['is started again, and has not shown yet that it stays', { running: {} }],
])('an engine that ended fails in its own words, also while it %s', (_, state) => {
  const failing = pod({ isReady: false, container: { state, lastState: { terminated: ended() } } });
  expect(troubleOf(failing)).toEqual({ kind: 'failing', message: words });
});

test('an engine that just ended fails', () => {
  const failing = pod({ isReady: false, container: { state: { terminated: ended() } } });
  expect(troubleOf(failing)).toEqual({ kind: 'failing', message: words });
});

test('an engine that ended in order, with its node for example, starts', () => {
  const again = pod({ isReady: false, container: { lastState: { terminated: ended({ exitCode: 0 }) } } });
  expect(troubleOf(again)).toEqual({ kind: 'starting', message: 'prepares its weights' });
});

test('a pod that no node has room for is pending, in the words of the scheduler', () => {
  const message = '0/2 nodes are available: 2 Insufficient nvidia.com/gpu.';
  const conditions = [{ type: 'PodScheduled', status: 'False', reason: 'Unschedulable', message }];
  const pending = pod({ isReady: false, status: { phase: 'Pending', conditions } });
  expect(troubleOf(pending)).toEqual({ kind: 'pending', message });
});

test.each([
  ['ImagePullBackOff', 'Back-off pulling image "nowhere/engine:1"'],
  ['CreateContainerConfigError', 'secret "a" not found'],
])('a container that cannot be made is pending: %s', (reason, message) => {
  const pending = pod({ isReady: false, container: { state: { waiting: { reason, message } } } });
  expect(troubleOf(pending)).toEqual({ kind: 'pending', message: `${reason}: ${message}` });
});

test('a container that the runtime could not start is pending, since no engine said anything', () => {
  const terminated = ended({ exitCode: 128, reason: 'StartError', message: 'exec: "node": not found' });
  const pending = pod({ isReady: false, container: { state: { terminated } } });
  expect(troubleOf(pending)).toEqual({ kind: 'pending', message: 'StartError: exec: "node": not found' });
});

test.each(['ContainerCreating', 'PodInitializing'])('%s is on its way', (reason) => {
  const starting = pod({ isReady: false, container: { state: { waiting: { reason } } } });
  expect(troubleOf(starting)).toEqual({ kind: 'starting', message: 'its container engine is being made' });
});

test('a pod that was just made waits for a node', () => {
  const fresh = pod({ isReady: false, status: { phase: 'Pending' } });
  delete fresh.status!.conditions;
  delete fresh.status!.containerStatuses;
  expect(troubleOf(fresh)).toEqual({ kind: 'starting', message: 'waits for a node' });
});

test('an engine that is up on a node that went says so', () => {
  const conditions = [{ type: 'Ready', status: 'False' }];
  const lost = pod({ status: { phase: 'Running', conditions } });
  lost.status!.containerStatuses = pod().status!.containerStatuses!;
  expect(troubleOf(lost)).toEqual({ kind: 'starting', message: 'its node node-a does not answer' });
});

test.each<[string, Partial<V1ContainerStateTerminated>, string]>([
  [
    'the last line of its own, among those of the log',
    { message: '{"level":30,"msg":"starting"}\nmotet engine: no GPU here\n    at somewhere\n' },
    'no GPU here (exit code 78)',
  ],
  [
    'the last line of the log when it said none',
    {
      exitCode: 1,
      message: '{"level":60,"err":{"message":"step 3 failed"},"msg":"the engine cannot go on"}',
    },
    'the engine cannot go on: step 3 failed (exit code 1)',
  ],
  [
    'a line that is no JSON as it is',
    { message: 'Segmentation fault\n\n' },
    'Segmentation fault (exit code 78)',
  ],
  ['that it said nothing', { message: '', signal: 9 }, 'ended with signal 9 and without a word'],
  [
    'what to do when memory ran out',
    { exitCode: 137, reason: 'OOMKilled', message: 'motet engine: anything' },
    'ran out of memory (exit code 137); raise podTemplate.resources.limits.memory, or lower memory.device',
  ],
])('the last words of an engine are %s', (_, more, expected) => {
  expect(lastWords(ended(more))).toBe(expected);
});

test('long last words are cut', () => {
  expect(lastWords(ended({ message: `motet engine: ${'x'.repeat(2000)}` })).length).toBeLessThan(600);
});
