/**
 * Events, which `kubectl describe` shows below an object. They are told once: the same words about the same object are
 * left out for ten minutes, an object may say 25 at a time and then one every half minute, and what cannot be sent is
 * dropped; conditions hold the truth, events only its story.
 */
import { randomBytes } from 'node:crypto';
import type { KubeConfig, KubernetesObject } from '@kubernetes/client-node';
import type { Logger } from 'pino';
import { callApi } from '../crds/api.ts';
import type { Clock } from './clock.ts';

export type EventType = 'Normal' | 'Warning';

const repeatMs = 10 * 60_000;
/** Of one object. */
const burst = { most: 25, refillMs: 30_000 };
/** Objects and sentences remembered; beyond it the oldest are forgotten, and may be told again. */
const maxRemembered = 10_000;
const maxInFlight = 16;
/** Limit of the API server. */
const maxNoteLength = 1024;

export interface EventsParts {
  kubeConfig: KubeConfig;
  namespace: string;
  /** Name of this process, as in the lease. */
  identity: string;
  clock: Clock;
  log: Logger;
}

export class Events {
  readonly #parts: EventsParts;
  readonly #toldAtMs = new Map<string, number>();
  readonly #tokens = new Map<string, { left: number; atMs: number }>();
  readonly #inFlight = new Set<Promise<void>>();

  constructor(parts: EventsParts) {
    this.#parts = parts;
  }

  /** @param reason  one word in CamelCase, as in the object's condition */
  tell(object: KubernetesObject, type: EventType, reason: string, message: string): void {
    const note = message.length > maxNoteLength ? `${message.slice(0, maxNoteLength - 3)}...` : message;
    const uid = object.metadata!.uid!;
    if (!this.#isNew(`${uid} ${reason} ${note}`) || !this.#takeToken(uid)) return;
    if (this.#inFlight.size >= maxInFlight) return;
    const sent = this.#send(object, type, reason, note).catch((error: Error) => {
      this.#parts.log.debug({ reason, error: error.message }, 'an event could not be sent');
    });
    this.#inFlight.add(sent);
    sent.finally(() => this.#inFlight.delete(sent));
  }

  /** Resolves when nothing is on its way any more. */
  async flushed(): Promise<void> {
    await Promise.all(this.#inFlight);
  }

  #send(object: KubernetesObject, type: EventType, reason: string, note: string): Promise<void> {
    const { kubeConfig, namespace, identity, clock } = this.#parts;
    const { name, uid, resourceVersion } = object.metadata!;
    return callApi(kubeConfig, {
      method: 'POST',
      path: `/apis/events.k8s.io/v1/namespaces/${namespace}/events`,
      body: {
        apiVersion: 'events.k8s.io/v1',
        kind: 'Event',
        metadata: { namespace, name: `${name}.${randomBytes(8).toString('hex')}` },
        // MicroTime, with six digits.
        eventTime: clock.date().toISOString().replace('Z', '000Z'),
        reportingController: 'motet.dev/operator',
        reportingInstance: identity.slice(0, 128),
        action: 'Reconcile',
        type,
        reason,
        note,
        regarding: {
          apiVersion: object.apiVersion,
          kind: object.kind,
          namespace,
          name,
          uid,
          resourceVersion,
        },
      },
    });
  }

  #isNew(sentence: string): boolean {
    const nowMs = this.#parts.clock.nowMs();
    const toldAtMs = this.#toldAtMs.get(sentence);
    if (toldAtMs !== undefined && nowMs - toldAtMs < repeatMs) return false;
    remember(this.#toldAtMs, sentence, nowMs);
    return true;
  }

  #takeToken(uid: string): boolean {
    const nowMs = this.#parts.clock.nowMs();
    const before = this.#tokens.get(uid) ?? { left: burst.most, atMs: nowMs };
    const left = Math.min(burst.most, before.left + (nowMs - before.atMs) / burst.refillMs);
    remember(this.#tokens, uid, { left: Math.max(0, left - 1), atMs: nowMs });
    return left >= 1;
  }
}

/** Sets it as the newest, and forgets the oldest at the bound. */
function remember<V>(map: Map<string, V>, key: string, value: V): void {
  map.delete(key);
  map.set(key, value);
  if (map.size > maxRemembered) map.delete(map.keys().next().value!);
}
