/**
 * The Kubernetes objects that a BaseModel should have: a Deployment of engines, a Service to look at them, a
 * PodDisruptionBudget. They have the BaseModel as their owner, so they go when it goes. Pods comply with pod security
 * `restricted` unless the BaseModel names a hostPath. Why no StatefulSet:
 * docs/decisions/2026-11-25-engines-are-a-deployment.md.
 */
import { createHash } from 'node:crypto';
import { posix } from 'node:path';
import type {
  V1Container,
  V1Deployment,
  V1EnvVar,
  V1ObjectMeta,
  V1PodDisruptionBudget,
  V1PodSpec,
  V1PodTemplateSpec,
  V1ResourceRequirements,
  V1Service,
  V1Volume,
  V1VolumeMount,
} from '@kubernetes/client-node';
import { adapterRoot, components, enginePort, labels, servedNameOf } from '../crds/names.ts';
import { apiVersion, type BaseModel } from '../crds/types.ts';
import type { Config } from './config.ts';
import { parseQuantity } from './quantity.ts';

/** What is the same for all base models. */
export type EngineSettings = Pick<
  Config,
  'engineImage' | 'engineCommand' | 'engineServiceAccount' | 'trustedServiceAccounts'
>;

export interface DesiredObjects {
  deployment: V1Deployment;
  service: V1Service;
  podDisruptionBudget: V1PodDisruptionBudget;
}

export const managedBy = 'motet-operator';

/** Name of the engine's container. */
export const engineContainer = 'engine';

/** User and group of the image. */
const userId = 65532;
const sourceFolder = '/motet/source';
const cacheFolder = '/motet/cache';
const credentialsFolder = '/motet/credentials';
/** What an engine needs beside its arenas and weights: Node, tokenizer, buffers. */
const overheadBytes = 512 * 2 ** 20;
/** After the drain: time to close, before the kubelet kills. */
const closeSeconds = 15;
/** Fetching and packing the weights of a large model may take this long. */
const startSeconds = 3600;

export function desiredObjects(baseModel: BaseModel, settings: EngineSettings): DesiredObjects {
  const name = baseModel.metadata.name!;
  const { replicas, rollout, disruption } = baseModel.spec;
  const metadata: V1ObjectMeta = {
    name,
    namespace: baseModel.metadata.namespace!,
    labels: labelsOf(name),
    ownerReferences: [
      {
        apiVersion,
        kind: 'BaseModel',
        name,
        uid: baseModel.metadata.uid!,
        controller: true,
        blockOwnerDeletion: true,
      },
    ],
  };
  const selector = { matchLabels: selectorOf(name) };
  return {
    deployment: {
      apiVersion: 'apps/v1',
      kind: 'Deployment',
      metadata,
      spec: {
        replicas,
        selector,
        revisionHistoryLimit: 2,
        progressDeadlineSeconds: startSeconds + 600,
        strategy: { type: 'RollingUpdate', rollingUpdate: { ...rollout } },
        template: podTemplate(baseModel, settings),
      },
    },
    service: {
      apiVersion: 'v1',
      kind: 'Service',
      metadata: { ...metadata, name: serviceName(name) },
      spec: {
        type: 'ClusterIP',
        selector: selectorOf(name),
        ports: [
          {
            name: enginePort.name,
            port: enginePort.number,
            targetPort: enginePort.name,
            protocol: 'TCP',
          },
        ],
      },
    },
    podDisruptionBudget: {
      apiVersion: 'policy/v1',
      kind: 'PodDisruptionBudget',
      metadata,
      spec: {
        selector,
        maxUnavailable: disruption.maxUnavailable,
        // An engine that is not ready serves nobody; it must not hold up a node that is drained.
        unhealthyPodEvictionPolicy: 'AlwaysAllow',
      },
    },
  };
}

/** Labels that choose the engine pods of a base model. A Deployment's can never change. */
export function selectorOf(baseModelName: string): Record<string, string> {
  return { [labels.baseModel]: baseModelName };
}

/** Names of Services have no dots and begin with a letter. */
export function serviceName(baseModelName: string): string {
  const name = baseModelName.replaceAll('.', '-');
  return /^[a-z]/.test(name) ? name : `model-${name}`;
}

function labelsOf(baseModelName: string): Record<string, string> {
  return {
    [labels.name]: 'motet',
    [labels.instance]: baseModelName,
    [labels.component]: components.engine,
    [labels.managedBy]: managedBy,
    [labels.baseModel]: baseModelName,
  };
}

function podTemplate(baseModel: BaseModel, settings: EngineSettings): V1PodTemplateSpec {
  const { podTemplate: more = {} } = baseModel.spec;
  const isOurs = ([key]: [string, string]) => /^(motet\.dev|app\.kubernetes\.io)\//.test(key);
  const theirs = Object.entries(more.labels ?? {}).filter((label) => !isOurs(label));
  return {
    metadata: {
      labels: { ...Object.fromEntries(theirs), ...labelsOf(baseModel.metadata.name!) },
      ...(more.annotations && { annotations: more.annotations }),
    },
    spec: podSpec(baseModel, settings),
  };
}

function podSpec(baseModel: BaseModel, settings: EngineSettings): V1PodSpec {
  const { accelerator, drainSeconds, podTemplate: more = {} } = baseModel.spec;
  const isGpu = accelerator.type === 'nvidia';
  const { volumes, mounts } = storage(baseModel);
  const tolerations = [
    ...(isGpu ? [{ key: 'nvidia.com/gpu', operator: 'Exists', effect: 'NoSchedule' }] : []),
    ...lostNodeTolerations,
    ...(more.tolerations ?? []),
  ];
  return {
    serviceAccountName: baseModel.spec.sourceAccess?.s3?.serviceAccountName ?? settings.engineServiceAccount,
    // With it the engine reads the keys by which it checks the tokens of gateway and operator.
    automountServiceAccountToken: true,
    // A Service named `motet` would set MOTET_PORT in every pod of the namespace.
    enableServiceLinks: false,
    terminationGracePeriodSeconds: drainSeconds + closeSeconds,
    securityContext: {
      runAsNonRoot: true,
      runAsUser: userId,
      runAsGroup: userId,
      fsGroup: userId,
      fsGroupChangePolicy: 'OnRootMismatch',
      seccompProfile: { type: 'RuntimeDefault' },
    },
    ...(isGpu && accelerator.runtimeClassName !== '' && { runtimeClassName: accelerator.runtimeClassName }),
    tolerations,
    ...(more.nodeSelector && { nodeSelector: more.nodeSelector }),
    affinity: more.affinity ?? preferOtherNodes(baseModel.metadata.name!),
    ...(more.imagePullSecrets && { imagePullSecrets: more.imagePullSecrets }),
    ...(more.priorityClassName && { priorityClassName: more.priorityClassName }),
    volumes: [...volumes, ...((more.volumes ?? []) as V1Volume[])],
    containers: [
      {
        ...container(baseModel, settings),
        volumeMounts: [...mounts, ...((more.volumeMounts ?? []) as V1VolumeMount[])],
      },
    ],
  };
}

function container(
  baseModel: BaseModel,
  { engineImage, engineCommand, ...settings }: EngineSettings,
): V1Container {
  const { image, podTemplate: more = {} } = baseModel.spec;
  const [command, ...args] = engineCommand;
  const probe = (path: string) => ({ httpGet: { path, port: enginePort.name, scheme: 'HTTP' } });
  const settled = {
    ...engineEnv(baseModel),
    MOTET_TRUSTED_SERVICE_ACCOUNTS: settings.trustedServiceAccounts,
  };
  const ours: V1EnvVar[] = [
    ...Object.entries(settled).map(([name, value]) => ({ name, value })),
    ...accessOf(baseModel).secretEnv,
  ];
  const theirs = (more.env ?? []) as V1EnvVar[];
  const isReplaced = (name: string) => theirs.some((one) => one.name === name);
  return {
    name: engineContainer,
    image: image ?? engineImage,
    command: [command!],
    ...(args.length > 0 && { args }),
    env: [...ours.filter(({ name }) => !isReplaced(name)), ...theirs],
    ports: [{ name: enginePort.name, containerPort: enginePort.number, protocol: 'TCP' }],
    resources: resources(baseModel),
    startupProbe: {
      ...probe('/livez'),
      periodSeconds: 2,
      timeoutSeconds: 5,
      failureThreshold: startSeconds / 2,
    },
    livenessProbe: { ...probe('/livez'), periodSeconds: 10, timeoutSeconds: 5, failureThreshold: 6 },
    readinessProbe: { ...probe('/readyz'), periodSeconds: 1, timeoutSeconds: 2, failureThreshold: 2 },
    // What the engine says last is what the condition EngineFailing says.
    terminationMessagePolicy: 'FallbackToLogsOnError',
    securityContext: {
      allowPrivilegeEscalation: false,
      readOnlyRootFilesystem: true,
      capabilities: { drop: ['ALL'] },
    },
  };
}

/** Settings of engine/config.ts, as variables: podTemplate.env can override them by name. */
function engineEnv(baseModel: BaseModel): Record<string, string> {
  const {
    source,
    accelerator,
    memory,
    quantization,
    kv,
    adapterQuantization,
    pooling,
    limits,
    drainSeconds,
    podTemplate: more,
  } = baseModel.spec;
  const cpuLimit = more?.resources?.limits?.cpu;
  return {
    MOTET_MODEL: locate(source.uri).path,
    ...(source.digest && { MOTET_MODEL_DIGEST: source.digest }),
    MOTET_SERVED_NAME: servedNameOf(baseModel),
    MOTET_HOST: '0.0.0.0',
    MOTET_PORT: String(enginePort.number),
    MOTET_CACHE: cacheFolder,
    MOTET_ADAPTER_ROOT: adapterRoot,
    MOTET_DEVICE: accelerator.type,
    MOTET_DEVICE_MEMORY: String(bytesOf(memory.device)),
    MOTET_HOST_MEMORY: String(bytesOf(memory.host)),
    MOTET_KV_DISK: String(bytesOf(memory.disk)),
    MOTET_WEIGHT_MEMORY: String(bytesOf(memory.weights)),
    MOTET_QUANTIZATION: quantization,
    MOTET_KV_CACHE_DTYPE: kv.dtype,
    MOTET_PREFIX_CACHE: kv.prefixCache ? 'on' : 'off',
    MOTET_EVICTION: kv.eviction,
    MOTET_ADAPTER_QUANTIZATION: adapterQuantization,
    MOTET_POOLING: pooling,
    ...(limits.maxModelLen !== undefined && { MOTET_MAX_MODEL_LEN: String(limits.maxModelLen) }),
    MOTET_MAX_BATCH_TOKENS: String(limits.maxBatchTokens),
    MOTET_MAX_SEQUENCES: String(limits.maxSequences),
    MOTET_MAX_WAITING: String(limits.maxWaiting),
    MOTET_MAX_LORA_RANK: String(limits.maxLoraRank),
    ...(cpuLimit !== undefined && { MOTET_THREADS: String(Math.ceil(parseQuantity(cpuLimit))) }),
    MOTET_DRAIN_SECONDS: String(drainSeconds),
    ...accessOf(baseModel).env,
  };
}

interface Access {
  env: Record<string, string>;
  secretEnv: V1EnvVar[];
  files: { volume: V1Volume; mountPath: string; readOnly: true }[];
}

/**
 * How engines reach remote sources. What they read again at each use is a file, so that it can be renewed under them; AWS's
 * keys are variables, as its own tools have them.
 */
function accessOf({ spec: { sourceAccess } }: BaseModel): Access {
  const { s3 = {}, hf = {}, oci = {}, caConfigMapName, bytesPerSecond } = sourceAccess ?? {};
  const mountPath = (name: string) => posix.join(credentialsFolder, name);
  const key = (name: string, optional?: true): V1EnvVar => ({
    name,
    valueFrom: { secretKeyRef: { name: s3.secretName!, key: name, ...(optional && { optional }) } },
  });
  const secretFile = (name: string, secretName: string, secretKey: string, path: string) => ({
    volume: { name: `source-${name}`, secret: { secretName, items: [{ key: secretKey, path }] } },
    mountPath: mountPath(name),
    readOnly: true as const,
  });
  return {
    env: {
      ...(s3.endpoint !== undefined && { MOTET_S3_ENDPOINT: s3.endpoint }),
      ...(s3.region !== undefined && { MOTET_S3_REGION: s3.region }),
      ...(hf.endpoint !== undefined && { MOTET_HF_ENDPOINT: hf.endpoint }),
      ...(hf.secretName !== undefined && { HF_TOKEN_PATH: posix.join(mountPath('hf'), 'token') }),
      ...(oci.secretName !== undefined && { DOCKER_CONFIG: mountPath('oci') }),
      ...(oci.plainHttp && oci.plainHttp.length > 0 && { MOTET_OCI_PLAIN_HTTP: oci.plainHttp.join(',') }),
      ...(caConfigMapName !== undefined && { MOTET_SOURCE_CA: posix.join(mountPath('ca'), 'ca.crt') }),
      ...(bytesPerSecond !== undefined && {
        MOTET_SOURCE_BANDWIDTH: String(Math.floor(parseQuantity(bytesPerSecond))),
      }),
    },
    secretEnv:
      s3.secretName === undefined
        ? []
        : [key('AWS_ACCESS_KEY_ID'), key('AWS_SECRET_ACCESS_KEY'), key('AWS_SESSION_TOKEN', true)],
    files: [
      ...(hf.secretName === undefined ? [] : [secretFile('hf', hf.secretName, 'HF_TOKEN', 'token')]),
      ...(oci.secretName === undefined
        ? []
        : [secretFile('oci', oci.secretName, '.dockerconfigjson', 'config.json')]),
      ...(caConfigMapName === undefined
        ? []
        : [
            {
              volume: {
                name: 'source-ca',
                configMap: { name: caConfigMapName, items: [{ key: 'ca.crt', path: 'ca.crt' }] },
              },
              mountPath: mountPath('ca'),
              readOnly: true as const,
            },
          ]),
    ],
  };
}

type Place = { path: string; volume: V1Volume | null; mountPath: string };

/** @returns where the engine finds the source, and what has to be mounted where for that */
function locate(uri: string): Place {
  const [, scheme, rest] = /^([a-z0-9]+):\/\/(.*)$/s.exec(uri)!;
  // No `..` leads out of what is mounted.
  if (scheme === 'pvc') {
    const slash = rest!.indexOf('/');
    const path = posix.join(sourceFolder, posix.normalize(rest!.slice(slash)));
    return { path, volume: claimVolume(rest!.slice(0, slash)), mountPath: sourceFolder };
  }
  if (scheme === 'hostpath') {
    // Just what is named, and not its folder: a link leads to where it leads on the node, and neighbours stay unseen.
    const hostPath = posix.normalize(rest!);
    const type = /\.gguf$/i.test(hostPath) ? 'File' : 'Directory';
    const path = posix.join(sourceFolder, posix.basename(hostPath));
    return { path, volume: { name: 'source', hostPath: { path: hostPath, type } }, mountPath: path };
  }
  return { path: scheme === 'file' ? rest! : uri, volume: null, mountPath: '' };
}

function storage(baseModel: BaseModel): { volumes: V1Volume[]; mounts: V1VolumeMount[] } {
  const { source, cache = {}, memory, adapterClaims = [] } = baseModel.spec;
  const { volume: sourceVolume, mountPath } = locate(source.uri);
  const cacheVolume: V1Volume =
    cache.claimName !== undefined
      ? claimVolume(cache.claimName)
      : cache.hostPath !== undefined
        ? { name: 'cache', hostPath: { path: cache.hostPath, type: 'Directory' } }
        : {
            name: 'cache',
            emptyDir:
              cache.sizeLimit === undefined ? {} : { sizeLimit: cacheLimit(cache.sizeLimit, memory.disk) },
          };
  const all = [
    { volume: { name: 'tmp', emptyDir: {} }, mountPath: '/tmp' },
    { volume: cacheVolume, mountPath: cacheFolder },
    ...(sourceVolume ? [{ volume: sourceVolume, mountPath, readOnly: true }] : []),
    ...accessOf(baseModel).files,
    ...adapterClaims.map((claim) => ({
      volume: claimVolume(claim),
      mountPath: posix.join(adapterRoot, claim),
      readOnly: true,
    })),
  ];
  return {
    // A claim that serves several purposes is one volume.
    volumes: [...new Map(all.map(({ volume }) => [volume.name, volume])).values()],
    mounts: all.map(({ volume, ...mount }) => ({ name: volume.name, ...mount })),
  };
}

/** The limit is for weights and fetched files; KV is beside them in the same folder, and has its own. */
function cacheLimit(sizeLimit: number | string, disk: number | string): string {
  return bytesOf(disk) === 0 ? String(sizeLimit) : String(bytesOf(sizeLimit) + bytesOf(disk));
}

function claimVolume(claimName: string): V1Volume {
  // Names of volumes are shorter than those of claims, and have no dots.
  const isName = /^[-a-z0-9]{1,50}$/.test(claimName);
  const suffix = isName ? claimName : createHash('sha256').update(claimName).digest('hex').slice(0, 16);
  return { name: `claim-${suffix}`, persistentVolumeClaim: { claimName } };
}

function resources(baseModel: BaseModel): V1ResourceRequirements {
  const { accelerator, memory, cache = {}, podTemplate: more = {} } = baseModel.spec;
  const theirs = more.resources ?? {};
  const gpus = accelerator.type === 'nvidia' ? { 'nvidia.com/gpu': accelerator.count } : {};
  // Weights that are mapped are the node's to keep; those with a bound are the engine's own memory.
  const ownBytes = bytesOf(memory.device) + bytesOf(memory.host) + bytesOf(memory.weights);
  const isOnNode = cache.claimName === undefined && cache.hostPath === undefined;
  const diskBytes = isOnNode ? bytesOf(memory.disk) : 0;
  const needed = {
    cpu: 1,
    memory: ownBytes + overheadBytes,
    ...(diskBytes > 0 && { 'ephemeral-storage': diskBytes }),
  };
  // Where only a limit is given, it is also the request; ours might be above it.
  const defaults = Object.entries(needed).filter(([name]) => theirs.limits?.[name] === undefined);
  const requests = { ...Object.fromEntries(defaults), ...theirs.requests, ...gpus };
  const limits = { ...theirs.limits, ...gpus };
  return {
    ...(Object.keys(requests).length > 0 && { requests: toText(requests) }),
    ...(Object.keys(limits).length > 0 && { limits: toText(limits) }),
  };
}

const bytesOf = (quantity: number | string) => Math.floor(parseQuantity(quantity));

/** Seconds until an engine on a node that is lost is given up and made elsewhere. Kubernetes' own default is 300. */
const lostNodeSeconds = 30;
const lostNodeTolerations = ['not-ready', 'unreachable'].map((state) => ({
  key: `node.kubernetes.io/${state}`,
  operator: 'Exists',
  effect: 'NoExecute',
  tolerationSeconds: lostNodeSeconds,
}));

function toText(quantities: Record<string, number | string>): Record<string, string> {
  return Object.fromEntries(Object.entries(quantities).map(([name, quantity]) => [name, String(quantity)]));
}

function preferOtherNodes(baseModelName: string): NonNullable<V1PodSpec['affinity']> {
  return {
    podAntiAffinity: {
      preferredDuringSchedulingIgnoredDuringExecution: [
        {
          weight: 100,
          podAffinityTerm: {
            topologyKey: 'kubernetes.io/hostname',
            labelSelector: { matchLabels: selectorOf(baseModelName) },
          },
        },
      ],
    },
  };
}
