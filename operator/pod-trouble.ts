// Why an engine pod does not take requests, in the words of who knows: the scheduler, the kubelet, or the engine itself.

import type { V1ContainerStateTerminated, V1ContainerStatus, V1Pod } from '@kubernetes/client-node';
import { isReady } from './cluster.ts';

/**
 * `failing`: its engine ended. `pending`: it cannot be scheduled, or its image or volumes cannot be had. `starting`: it is
 * on its way.
 */
export interface PodTrouble {
  kind: 'failing' | 'pending' | 'starting';
  message: string;
}

/** What the engine prints before the reason for which it ends (engine/main.ts). */
const engineWords = 'motet engine:';
const maxWordsLength = 500;
/** While the kubelet is at work and nothing is wrong yet. */
const normalWaiting = ['ContainerCreating', 'PodInitializing'];

/** @returns null when it takes requests */
export function troubleOf(pod: V1Pod): PodTrouble | null {
  if (isReady(pod)) return null;
  const { conditions = [], containerStatuses = [], initContainerStatuses = [] } = pod.status ?? {};
  const scheduled = conditions.find(({ type }) => type === 'PodScheduled');
  if (scheduled?.status === 'False') {
    return { kind: 'pending', message: scheduled.message ?? scheduled.reason ?? 'waits for a node' };
  }
  const containers = [...initContainerStatuses, ...containerStatuses];
  const found = containers.map(troubleOfContainer).filter((trouble) => trouble !== null);
  for (const kind of ['failing', 'pending', 'starting'] as const) {
    const worst = found.find((trouble) => trouble.kind === kind);
    if (worst) return worst;
  }
  if (containers.length > 0 && pod.spec?.nodeName) {
    return { kind: 'starting', message: `its node ${pod.spec.nodeName} does not answer` };
  }
  return { kind: 'starting', message: scheduled ? 'its containers are being made' : 'waits for a node' };
}

function troubleOfContainer({ name, ready, state, lastState }: V1ContainerStatus): PodTrouble | null {
  const { waiting, terminated, running } = state ?? {};
  const ended = [terminated, lastState?.terminated].find((end) => end && end.exitCode !== 0);
  if (ready || (terminated && terminated.exitCode === 0)) return null;
  // Also while it runs again: it has to show first that it stays.
  if (ended && !isMadeInVain(ended)) return { kind: 'failing', message: lastWords(ended) };
  if (waiting && !normalWaiting.includes(waiting.reason ?? '')) {
    return { kind: 'pending', message: [waiting.reason, waiting.message].filter(Boolean).join(': ') };
  }
  if (ended) return { kind: 'pending', message: `${ended.reason}: ${ended.message ?? ''}` };
  if (running) return { kind: 'starting', message: 'prepares its weights' };
  return { kind: 'starting', message: `its container ${name} is being made` };
}

/** The runtime could not start the process at all. */
function isMadeInVain({ reason }: V1ContainerStateTerminated): boolean {
  return reason === 'StartError' || reason === 'ContainerCannotRun';
}

/** What an engine said last, for a person. */
export function lastWords({ exitCode, signal, reason, message = '' }: V1ContainerStateTerminated): string {
  const end = signal ? `signal ${signal}` : `exit code ${exitCode}`;
  if (reason === 'OOMKilled') {
    return `ran out of memory (${end}); raise podTemplate.resources.limits.memory, or lower memory.device`;
  }
  const lines = message.split('\n').filter((line) => line.trim() !== '');
  const said = lines.findLast((line) => line.startsWith(engineWords));
  const words = said?.slice(engineWords.length).trim() ?? fromLog(lines.at(-1) ?? '');
  return words === '' ? `ended with ${end} and without a word` : `${words.slice(0, maxWordsLength)} (${end})`;
}

/** The last line may be one of the log, which is JSON. */
function fromLog(line: string): string {
  try {
    const { msg, err } = JSON.parse(line) as { msg?: string; err?: { message?: string } };
    return [msg, err?.message].filter(Boolean).join(': ') || line;
  } catch {
    return line.trim();
  }
}
