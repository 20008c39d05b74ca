/**
 * A namespace of a real API server with an operator in it, and pods whose engines are simulated: the test makes the pods and
 * says how they are, as no kubelet does. What it waits for it polls.
 */
import { type EventsV1Event, KubeConfig, type V1Pod } from '@kubernetes/client-node';
import { expect, onTestFinished, vi } from 'vitest';
import { type ApiRequest, callApi, motetPath } from '../../crds/api.ts';
import { labels } from '../../crds/names.ts';
import {
  type AdapterGroup,
  type AdapterRoute,
  apiVersion,
  type BaseModel,
  type Kind,
  type LoraAdapter,
} from '../../crds/types.ts';
import type { Operator } from '../../operator/main.ts';
import { type ControlPlane, createNamespace, kubectl } from '../fixtures/control-plane.ts';
import {
  SimulatedEngine,
  type SimulatedEngineOptions,
  SimulatedSources,
} from '../fixtures/simulated-engines.ts';
import { startTestOperator } from './start-operator.ts';

interface Kinds {
  BaseModel: BaseModel;
  LoraAdapter: LoraAdapter;
  AdapterRoute: AdapterRoute;
  AdapterGroup: AdapterGroup;
}

/** Waits this long for what has no deadline of its own. */
const patience = { timeout: 30_000, interval: 50 };

export class World {
  readonly namespace: string;
  readonly sources = new SimulatedSources();
  readonly #plane: ControlPlane;
  readonly #kubeConfig: KubeConfig;
  readonly #engines: SimulatedEngine[] = [];
  #operator: Operator | null = null;

  constructor(plane: ControlPlane, namespace: string) {
    this.namespace = namespace;
    this.#plane = plane;
    this.#kubeConfig = new KubeConfig();
    this.#kubeConfig.loadFromFile(plane.kubeconfig);
  }

  api<T>(request: ApiRequest): Promise<T> {
    return callApi<T>(this.#kubeConfig, request);
  }

  /** Starts an operator in the place of the one that is there; they look at engines each second. */
  async replaceOperator(args: string[] = []): Promise<void> {
    await this.#operator?.stop();
    const seconds = ['--engine-check-seconds', '1', ...args];
    this.#operator = await startTestOperator(this.#plane, this.namespace, seconds);
  }

  async stopEngines(): Promise<void> {
    await Promise.all(this.#engines.map((engine) => engine.stop()));
  }

  /** What was told about the object, oldest first. */
  async events(name: string): Promise<EventsV1Event[]> {
    const path = `/apis/events.k8s.io/v1/namespaces/${this.namespace}/events`;
    const { items } = await this.api<{ items: EventsV1Event[] }>({ path });
    return items
      .filter(({ regarding }) => regarding?.name === name)
      .sort((a, b) => (String(a.eventTime) < String(b.eventTime) ? -1 : 1));
  }

  /** Makes or changes a resource of ours. */
  apply(kind: keyof Kinds, name: string, spec: object): Promise<unknown> {
    return this.api({
      method: 'PATCH',
      path: motetPath(kind, this.namespace, name),
      query: { fieldManager: 'test', force: 'true' },
      contentType: 'application/apply-patch+yaml',
      body: { apiVersion, kind, metadata: { name }, spec },
    });
  }

  get<K extends keyof Kinds>(kind: K, name: string): Promise<Kinds[K]> {
    return this.api<Kinds[K]>({ path: motetPath(kind, this.namespace, name) });
  }

  remove(kind: Kind, name: string): Promise<unknown> {
    return this.api({ method: 'DELETE', path: motetPath(kind, this.namespace, name) });
  }

  /** Waits for what `check` expects of the resource, and returns the resource. */
  until<K extends keyof Kinds>(kind: K, name: string, check: (object: Kinds[K]) => void): Promise<Kinds[K]> {
    return vi.waitFor(async () => {
      const object = await this.get(kind, name);
      check(object);
      return object;
    }, patience);
  }

  /** Waits until the resource is Ready, or is not for this reason; of the spec that it has now. */
  untilReason<K extends keyof Kinds>(kind: K, name: string, reason: string): Promise<Kinds[K]> {
    return this.until(kind, name, (object) => {
      const ready = object.status?.conditions?.find(({ type }) => type === 'Ready');
      expect(ready, JSON.stringify(object.status)).toMatchObject({
        reason,
        observedGeneration: object.metadata.generation,
      });
    });
  }

  /** A base model without pods of its own: the test makes them. */
  async addBaseModel(name: string, spec: object = {}): Promise<void> {
    await this.apply('BaseModel', name, {
      source: { uri: 'file:///models/tiny.gguf' },
      replicas: 0,
      ...spec,
    });
  }

  addAdapter(name: string, baseModel: string, spec: object = {}): Promise<unknown> {
    const source = { uri: `file:///motet/adapters/${name}` };
    return this.apply('LoraAdapter', name, { baseModel, source, ...spec });
  }

  async addEngine(
    pod: string,
    baseModel: string,
    options: Partial<SimulatedEngineOptions> = {},
  ): Promise<EnginePod> {
    const engine = await startSomewhere({ sources: this.sources, ...options });
    this.#engines.push(engine);
    const enginePod = new EnginePod(this, pod, baseModel, engine);
    await enginePod.create();
    return enginePod;
  }
}

/** A pod, and the simulation that answers at its address. */
export class EnginePod {
  readonly name: string;
  readonly engine: SimulatedEngine;
  readonly #world: World;
  readonly #baseModel: string;
  #restartCount = 0;

  constructor(world: World, name: string, baseModel: string, engine: SimulatedEngine) {
    this.#world = world;
    this.name = name;
    this.#baseModel = baseModel;
    this.engine = engine;
  }

  get names(): Record<string, string> {
    return this.engine.names;
  }

  async create(): Promise<void> {
    const body: V1Pod = {
      metadata: { name: this.name, labels: { [labels.baseModel]: this.#baseModel } },
      spec: { containers: [{ name: 'engine', image: 'none' }], automountServiceAccountToken: false },
    };
    await this.#world.api({ method: 'POST', path: this.#collection, body });
    await this.setReady(true);
  }

  async setReady(isReady: boolean): Promise<void> {
    const status: V1Pod['status'] = {
      phase: 'Running',
      podIP: this.engine.address,
      podIPs: [{ ip: this.engine.address }],
      conditions: [{ type: 'Ready', status: isReady ? 'True' : 'False' }],
      containerStatuses: [
        {
          name: 'engine',
          image: 'none',
          imageID: '',
          ready: isReady,
          restartCount: this.#restartCount,
        },
      ],
    };
    await this.#world.api({
      method: 'PATCH',
      path: `${this.#collection}/${this.name}/status`,
      contentType: 'application/strategic-merge-patch+json',
      body: { status },
    });
  }

  /** The container ends and is started again by a kubelet. */
  async restart(): Promise<void> {
    await this.engine.stop();
    this.#restartCount++;
    await this.setReady(false);
    await this.engine.start();
    await this.setReady(true);
  }

  async remove(): Promise<void> {
    await this.#world.api({
      method: 'DELETE',
      path: `${this.#collection}/${this.name}`,
      query: { gracePeriodSeconds: '0' },
    });
    await this.engine.stop();
  }

  get #collection(): string {
    return `/api/v1/namespaces/${this.#world.namespace}/pods`;
  }
}

/** @param args of the operator */
export async function startWorld(plane: ControlPlane, args: string[] = []): Promise<World> {
  const world = await createWorld(plane);
  onTestFinished(() => world.stopEngines());
  await world.replaceOperator(args);
  return world;
}

/** A namespace in which pods can be made, without an operator. */
export async function createWorld(plane: ControlPlane): Promise<World> {
  const world = new World(plane, await createNamespace(plane));
  // A controller makes it, and no pod is taken before.
  const account = ['-n', world.namespace, 'serviceaccount/default'];
  await kubectl(plane, ['wait', '--for=create', ...account, '--timeout=30s']);
  return world;
}

/** Test files run beside each other, so an address may be taken. */
export async function startSomewhere(
  options: Omit<SimulatedEngineOptions, 'address'>,
): Promise<SimulatedEngine> {
  const part = () => 1 + Math.floor(Math.random() * 250);
  for (let tries = 0; ; tries++) {
    const address = `127.${100 + (part() % 100)}.${part()}.${part()}`;
    try {
      return await new SimulatedEngine({ ...options, address }).start();
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'EADDRINUSE' || tries === 20) throw error;
    }
  }
}
