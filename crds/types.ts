// Made by scripts/crd-types.ts from the YAML beside it. Do not edit: change the YAML and run `npm run crds`.

import type { V1ObjectMeta } from '@kubernetes/client-node';

export const group = 'motet.dev';
export const version = 'v1alpha1';
export const apiVersion = 'motet.dev/v1alpha1';

/** Kind -> its name in the paths of the API. */
export const plurals = {
  AdapterGroup: 'adaptergroups',
  AdapterRoute: 'adapterroutes',
  BaseModel: 'basemodels',
  LoraAdapter: 'loraadapters',
  Tenant: 'tenants',
} as const;

export type Kind = keyof typeof plurals;

/** A served name, and the adapters that answer to it together, to each tenant those that it may use. */
export interface AdapterGroup {
  apiVersion: string;
  kind: 'AdapterGroup';
  metadata: V1ObjectMeta;
  spec: AdapterGroupSpec;
  status?: AdapterGroupStatus;
}

/** What should be. */
export interface AdapterGroupSpec {
  /** The name that clients use as `model`. Default, the name of this resource. */
  servedName?: string;
  /** Name of the BaseModel of this namespace whose adapters are meant. */
  baseModel: string;
  /**
   * Selects the members among the LoraAdapters of the base model by their labels. `{}` selects all. Every
   * engine of the base model holds them, whatever their `copies` say, so that any of them may be composed.
   */
  selector: {
    /** Labels that must be there with these values. Default, none. */
    matchLabels?: Record<string, string>;
    /** Further requirements; all must hold. Default, none. */
    matchExpressions?: {
      /** Key of the label. */
      key: string;
      /** How its value relates to `values`. */
      operator: 'In' | 'NotIn' | 'Exists' | 'DoesNotExist';
      /** Values, for In and NotIn. Default, none. */
      values?: string[];
    }[];
  };
  /**
   * What each of the adapters that are composed counts: `equal`, one over their number, so that together
   * they change the base as much as one of them; `sum`, 1 each. Default equal.
   */
  weights: 'equal' | 'sum';
  /**
   * Merges the adapters that a tenant may use into one, instead of summing what they change. They need one
   * rank in each module, and neither DoRA nor trained biases; engines make such a merge when it is first
   * asked for. Default, a sum.
   */
  merge?: {
    /** How, as PEFT has it. */
    method: 'ties' | 'dare_ties' | 'dare_linear' | 'magnitude_prune';
    /** Share of the values of each adapter that stays, in percent. Default 50. */
    densityPercent: number;
    /**
     * Of ties and dare_ties, how the sign of a value is elected: by the sum of the values, or by their
     * number. Default total.
     */
    majoritySign: 'total' | 'frequency';
  };
  /**
   * Most adapters that a request composes. A tenant that may use more of the members gets an error, never
   * some of them. Default 8.
   */
  maxMembers: number;
}

/** What is, as the operator last saw it. */
export interface AdapterGroupStatus {
  /** Generation of the spec that this status is about. */
  observedGeneration?: number;
  /** Adapters that an engine holds, of those that are selected, as `3/4`. */
  members?: string;
  /** Names of the LoraAdapters that are selected, sorted; the first 100. */
  adapters?: string[];
  /**
   * `Ready`: every member is held by an engine. `Bounded`: no more members than a request composes; where
   * it is False, a tenant that may use more than that is refused.
   */
  conditions?: {
    /** What it is about. */
    type: string;
    /** Whether it holds. */
    status: 'True' | 'False' | 'Unknown';
    /** Why, as one word in CamelCase. */
    reason: string;
    /** Why, for a person, and what to do. */
    message: string;
    /** When `status` last changed. */
    lastTransitionTime: string;
    /** Generation of the spec that it is about. */
    observedGeneration?: number;
  }[];
}

/** A served name, and the adapters that answer to it. */
export interface AdapterRoute {
  apiVersion: string;
  kind: 'AdapterRoute';
  metadata: V1ObjectMeta;
  spec: AdapterRouteSpec;
  status?: AdapterRouteStatus;
}

/** What should be. */
export interface AdapterRouteSpec {
  /** The name that clients use as `model`. Default, the name of this resource. */
  servedName?: string;
  /**
   * Who answers. A request goes to a target with the probability weight / (sum of the weights of targets
   * that get requests). The first is the stable one; the others are on trial.
   */
  targets: {
    /** Name of a LoraAdapter of this namespace. Default, none; then baseModel is required. */
    adapter?: string;
    /** Name of a BaseModel of this namespace, served without an adapter. Default, none. */
    baseModel?: string;
    /** Share of the requests, relative to the other targets. 0 gets none. Default 1. */
    weight: number;
    /**
     * Percent of the route's requests that are also asked of this target when another answers. Such a copy
     * goes when an engine has room and nobody waits, its answer is dropped, and nobody is billed. Default
     * 0.
     */
    shadowPercent: number;
  }[];
  /**
   * What keeps a client with one target. When weights change, only as many clients change their target as
   * must. Default, each request is drawn by itself.
   */
  sticky?: {
    /**
     * `User`, the field `user` of the body; `Header`, a request header; `Tenant`, whose key it is. A
     * request without it is drawn by itself. User and Header count within a tenant.
     */
    by: 'User' | 'Header' | 'Tenant';
    /** Name of the header, with Header alone. Default, none. */
    header?: string;
  };
  /**
   * Copies of a target's adapter that must be in memory (device or host arena) of ready engines before it
   * gets requests, a number from 1 to 1000, or `all`: every engine that holds it. More than there are
   * copies means all. Until then its share goes to the others. Default 1.
   */
  warmCopies: number | string;
  /**
   * When a target on trial loses its share to the first one, until the spec changes. Each gateway judges
   * the requests that it passes on; the first to find a target too bad decides for all. Default, never.
   */
  abort?: {
    /**
     * Most requests in percent that engines may fail: a status of 500 or more, an answer that breaks off,
     * or none. Default, no bound.
     */
    maxErrorPercent?: number;
    /**
     * Longest time to the first token that 95 of 100 streamed requests may take, from when they are sent to
     * an engine, in milliseconds. Default, no bound.
     */
    maxTtftMs?: number;
    /** Over how many of the last seconds it is judged. Default 60. */
    windowSeconds: number;
    /** With fewer requests in the window nothing is decided. Default 20. */
    minRequests: number;
  };
  /**
   * Shares of the second target, one after the other; the first target has the rest, and weights do not
   * count. A step lasts while the target is warm, and none follows one that was aborted. Default, none.
   */
  steps?: {
    /** Share of the second target in percent. */
    percent: number;
    /** How long it lasts; unused for the last one, which stays. Default 10. */
    minutes: number;
  }[];
}

/** What is, as the operator last saw it. */
export interface AdapterRouteStatus {
  /** Generation of the spec that this status is about. */
  observedGeneration?: number;
  /** Targets and their shares, as `sql-v1 90%, sql-v2 10%`. */
  summary?: string;
  /** One entry for each target, in the order of the spec. */
  targets?: {
    /** Name of the LoraAdapter or BaseModel. */
    name: string;
    /** Weight as in the spec. */
    weight: number;
    /** Share of the requests in percent, rounded, over the targets that are ready. */
    percent: number;
    /** Whether an engine holds it. */
    ready: boolean;
  }[];
  /** The step that is taken. Not there without `spec.steps`. */
  step?: {
    /** Its place in the spec, from 0. */
    index: number;
    /** When it began. */
    since: string;
    /** Generation of the spec whose steps they are; another one begins anew. */
    generation: number;
  };
  /** Targets that lost their share. The gateways write it. */
  aborted?: {
    /** Name of the LoraAdapter or BaseModel. */
    target: string;
    /** Generation of the spec that it was aborted under; under another one it has its share again. */
    generation: number;
    /** What was measured, and what is allowed. */
    message: string;
    /** When it was decided. */
    at: string;
  }[];
  /** `Ready`: every target with a share above 0 gets requests. */
  conditions?: {
    /** What it is about. */
    type: string;
    /** Whether it holds. */
    status: 'True' | 'False' | 'Unknown';
    /** Why, as one word in CamelCase. */
    reason: string;
    /** Why, for a person, and what to do. */
    message: string;
    /** When `status` last changed. */
    lastTransitionTime: string;
    /** Generation of the spec that it is about. */
    observedGeneration?: number;
  }[];
}

/** A base model, and how many engines serve it. */
export interface BaseModel {
  apiVersion: string;
  kind: 'BaseModel';
  metadata: V1ObjectMeta;
  spec: BaseModelSpec;
  status?: BaseModelStatus;
}

/** What should be. */
export interface BaseModelSpec {
  /** Where the weights come from. Cannot be changed; another model is another BaseModel. */
  source: {
    /**
     * `pvc://CLAIM/PATH` (a PersistentVolumeClaim of this namespace), `hostpath:///PATH` (a path on the
     * node; the namespace must allow hostPath volumes), `file:///PATH` (a path in the engine's image),
     * `https://HOST/FILE.gguf`, `s3://BUCKET/KEY`, `hf://ORG/NAME@REVISION[/PATH]` (a repository on the
     * Hugging Face Hub), or `oci://REGISTRY/REPOSITORY[:TAG|@DIGEST]` (an artifact or image). It names a
     * GGUF file, or (not for https) a folder of safetensors.
     */
    uri: string;
    /**
     * What it must be: the sha256 of a file, or of what sha256sum prints for the files of a folder,
     * `sha256:` and 64 hex digits. Required for https and s3, checked for hf and oci, refused for the
     * others. Default, none.
     */
    digest?: string;
  };
  /** The name that clients use as `model`. Default, the name of this resource. */
  servedName?: string;
  /** Engine pods. A HorizontalPodAutoscaler may set it through the scale subresource. Default 1. */
  replicas: number;
  /**
   * Weights in memory, `keep` as the file has them, or quantised to `int8` or `int4` groups. Default keep.
   */
  quantization: 'keep' | 'int8' | 'int4';
  /** Keys and values of sequences, running and ended. Default, those of its fields. */
  kv: {
    /**
     * `f16`, or `int8`, which holds twice the tokens in the same memory and changes answers a little.
     * `auto` is f16. Default auto.
     */
    dtype: 'auto' | 'f16' | 'int8';
    /**
     * Keeps the KV of prompts and answers while there is room, and shares it with requests of the same
     * adapter that begin alike. Default true.
     */
    prefixCache: boolean;
    /**
     * What leaves a full arena, KV and adapters weighed alike: by `cost`, what is worth least by the time
     * to bring it back, use and size; by `lru`, what was not used for longest. Default cost.
     */
    eviction: 'cost' | 'lru';
  };
  /**
   * Adapters in memory, `keep` as their files have them, or rounded to `int8`, half the bytes of 16 bits.
   * Default keep.
   */
  adapterQuantization: 'keep' | 'int8';
  /**
   * How `/v1/embeddings` makes one vector of a text: the hidden state of its `last` token, or the `mean`
   * over its tokens. Default last.
   */
  pooling: 'last' | 'mean';
  /** What the engines compute on. Default, the CPU. */
  accelerator: {
    /**
     * `cpu`, or `nvidia`: each pod asks for GPUs, tolerates their taint and uses the NVIDIA runtime class.
     * Default cpu.
     */
    type: 'cpu' | 'nvidia';
    /** GPUs of a pod (`nvidia.com/gpu`), at present not more than 1. Unused on cpu. Default 1. */
    count: number;
    /** RuntimeClass of GPU pods; empty for the cluster's default. Unused on cpu. Default nvidia. */
    runtimeClassName: string;
  };
  /** Byte budgets of an engine. Default, those of its fields. */
  memory: {
    /** The device arena, which holds KV blocks and adapters. A Kubernetes quantity in bytes. Default 1Gi. */
    device: number | string;
    /**
     * The host arena, which holds KV and adapters that the device arena has no room for; without it KV is
     * computed again and adapters come back from their files. A Kubernetes quantity in bytes. Default 0.
     */
    host: number | string;
    /**
     * KV that the host arena has no room for, on disk in the cache folder, of all engines that share the
     * folder together. It outlives an engine as long as the folder does. Needs memory.host and
     * kv.prefixCache. A Kubernetes quantity in bytes. Default 0.
     */
    disk: number | string;
    /**
     * Most memory for the model's weights. Layers beyond it are read from the prepared file for each step,
     * so that a model larger than memory runs, slower; with 0 all stay mapped, and engines on a node share
     * them. A Kubernetes quantity in bytes. Default 0.
     */
    weights: number | string;
  };
  /** Bounds of an engine. Default, those of its fields. */
  limits: {
    /** Tokens of one sequence, prompt and output. Default, what model and arena allow. */
    maxModelLen?: number;
    /** Tokens in one step. Default 256. */
    maxBatchTokens: number;
    /** Sequences in one step. Default 64. */
    maxSequences: number;
    /** Sequences that may wait in an engine; more are answered 429. Default 256. */
    maxWaiting: number;
    /** Largest rank of an adapter. It protects; memory is paid for the rank that is loaded. Default 256. */
    maxLoraRank: number;
  };
  /**
   * Where engines keep the packed weights and fetched files. All replicas on a node that see the same
   * folder map the same file, so its weights are in memory once. Default, an emptyDir of each pod.
   */
  cache?: {
    /** A PersistentVolumeClaim of this namespace, writable by user and group 65532. Default, none. */
    claimName?: string;
    /**
     * A folder on the node, writable by user 65532. The namespace must allow hostPath volumes. Default,
     * none.
     */
    hostPath?: string;
    /** Bound on the emptyDir when neither is given. A Kubernetes quantity in bytes. Default, none. */
    sizeLimit?: number | string;
  };
  /**
   * How engines reach the sources of this model and of its adapters: addresses, and Secrets and ConfigMaps
   * of this namespace. Changing it replaces the pods. Default, the public addresses, without credentials.
   */
  sourceAccess?: {
    /**
     * `s3://` sources. Default, AWS, with the role of the engines' ServiceAccount if it has one, else
     * anonymous.
     */
    s3?: {
      /**
       * A ServiceAccount of this namespace that the engines run as, for its AWS role (EKS Pod Identity, or
       * IAM roles for service accounts). Default, the one that the operator was installed with.
       */
      serviceAccountName?: string;
      /** Address of an S3-compatible server, which is asked path style. Default, AWS. */
      endpoint?: string;
      /** Region of the buckets. Default, us-east-1. */
      region?: string;
      /**
       * A Secret with AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, if there is one, AWS_SESSION_TOKEN.
       * They become variables, so pods have them from their start on. Default, none.
       */
      secretName?: string;
    };
    /** `hf://` sources. Default, the public Hub, without a token. */
    hf?: {
      /** Address of a Hub. Default, https://huggingface.co. */
      endpoint?: string;
      /**
       * A Secret whose HF_TOKEN is an access token. It is a file in the pods, so a new token takes effect
       * by itself. Default, none.
       */
      secretName?: string;
    };
    /** `oci://` sources. Default, no login. */
    oci?: {
      /**
       * A Secret of type kubernetes.io/dockerconfigjson, as for imagePullSecrets. It is a file in the pods,
       * so a new login takes effect by itself. Default, none.
       */
      secretName?: string;
      /** Registries that are spoken to without TLS, as HOST or HOST:PORT. Default, none. */
      plainHttp?: string[];
    };
    /** A ConfigMap whose `ca.crt` has certificates in PEM, trusted beside the system's. Default, none. */
    caConfigMapName?: string;
    /** What all downloads of one engine together may take, as a Kubernetes quantity. Default, no cap. */
    bytesPerSecond?: number | string;
  };
  /**
   * Engines that there are while somebody asks for the model or its adapters, where `replicas` is less:
   * with replicas 0 the model wakes by a request, which waits for it. Default, `replicas` alone counts.
   */
  onDemand?: {
    /** Engine pods while somebody asks. Default 1. */
    replicas: number;
    /** Minutes without a request after which they end. Default 30. */
    idleMinutes: number;
  };
  /**
   * Names of adapters that no resource declares and that may be asked for. The first request for such a
   * name declares a LoraAdapter that is loaded on demand. Only a Tenant whose access selects the rule's
   * labels may ask. The gateway needs the right to create LoraAdapters (chart: gateway.autoLoad). Default,
   * none.
   */
  autoLoad?: {
    /**
     * The names, with one `*` that stands for a part of letters, digits, dots, dashes and underscores, as
     * `acme/*`.
     */
    names: string;
    /** Where the adapter is, as in a LoraAdapter's source, with `{name}` for what `*` stands for. */
    uri: string;
    /** Labels of the adapter, by which Tenants select. Default, none. */
    labels?: Record<string, string>;
    /** Most adapters that the rule may declare; delete some to make room. Default 100. */
    most: number;
    /** Minutes without a request after which such an adapter is unloaded. Default 60. */
    idleMinutes: number;
  }[];
  /**
   * PersistentVolumeClaims of this namespace that adapters may be loaded from, mounted read-only into every
   * engine. Only these may stand in a LoraAdapter's `pvc://CLAIM/PATH`. Changing the list replaces the
   * pods. Default, none.
   */
  adapterClaims?: string[];
  /** Seconds that running requests have to end when a pod is stopped. Default 30. */
  drainSeconds: number;
  /** How pods are replaced when the engine changes. Default, one new pod at a time and none missing. */
  rollout: {
    /** Pods above `replicas` during a rollout. Set 0 where there is no spare GPU. Default 1. */
    maxSurge: number;
    /** Pods that may be missing during a rollout. Default 0. */
    maxUnavailable: number;
  };
  /** The PodDisruptionBudget of the engines. Default, one pod at a time. */
  disruption: {
    /** Pods that may be evicted at a time, by a node drain for example. Default 1. */
    maxUnavailable: number;
  };
  /** Image of the engine. Default, the one that the operator was installed with. */
  image?: string;
  /**
   * What engine pods have besides. Fields have the meaning that they have in a Kubernetes Pod. Default,
   * nothing.
   */
  podTemplate?: {
    /**
     * More labels. Those of motet.dev and app.kubernetes.io are the operator's and refused. Default, none.
     */
    labels?: Record<string, string>;
    /** More annotations. Default, none. */
    annotations?: Record<string, string>;
    /**
     * Requests and limits of the engine's container. The CPU limit is also the number of the engine's
     * threads. Default, requests of 1 CPU and of the memory that the arena and the weights need at least.
     */
    resources?: {
      /** What the scheduler sets aside, as Kubernetes quantities. Default as said above. */
      requests?: Record<string, number | string>;
      /** What the container may use at most, as Kubernetes quantities. Default, none. */
      limits?: Record<string, number | string>;
    };
    /**
     * More environment variables of the engine's container. MOTET_ ones override the engine's settings.
     * Default, none.
     */
    env?: {
      /** Name of the variable. */
      name: string;
      [field: string]: unknown;
    }[];
    /** More volumes. Default, none. */
    volumes?: {
      /** Name of the volume. */
      name: string;
      [field: string]: unknown;
    }[];
    /** More mounts of the engine's container. Default, none. */
    volumeMounts?: {
      /** Name of the volume. */
      name: string;
      /** Where it is in the container. */
      mountPath: string;
      [field: string]: unknown;
    }[];
    /** Labels that a node must have. Default, none. */
    nodeSelector?: Record<string, string>;
    /** Taints that are tolerated, beside that of GPU nodes. Default, none. */
    tolerations?: Record<string, unknown>[];
    /** Affinity. Default, pods of one base model prefer different nodes. */
    affinity?: Record<string, unknown>;
    /** Secrets of this namespace for the registry. Default, none. */
    imagePullSecrets?: {
      /** Name of the Secret. */
      name: string;
    }[];
    /** PriorityClass of the pods. Default, none. */
    priorityClassName?: string;
  };
}

/** What is, as the operator last saw it. */
export interface BaseModelStatus {
  /** Generation of the spec that this status is about. */
  observedGeneration?: number;
  /**
   * When somebody last asked for it, to a minute or a quarter of idleMinutes. The gateways write it, with
   * `spec.onDemand` alone.
   */
  askedAt?: string;
  /** Engine pods that exist. */
  replicas?: number;
  /** Engine pods that are ready. */
  readyReplicas?: number;
  /** Label selector of the engine pods, for the scale subresource. */
  selector?: string;
  /** Ready of wanted engine pods, as `2/2`. */
  engines?: string;
  /** Resident of wanted adapter copies, as `10/10`. */
  adapters?: string;
  /**
   * The device arenas of the ready engines together, in bytes. KV is left out, since it changes with every
   * request.
   */
  memory?: {
    /** All of the arenas. */
    totalBytes?: number;
    /** What adapters hold. */
    adapterBytes?: number;
  };
  /** One entry for each engine pod. */
  pods?: {
    /** Name of the pod. */
    name: string;
    /** Node that it runs on. */
    node?: string;
    /** Whether it takes requests. */
    ready?: boolean;
    /** Adapters in its device arena. */
    adapters?: number;
    /** Bytes that they hold. */
    adapterBytes?: number;
    /** Why it is not ready, in the words of the kubelet or of the engine. */
    message?: string;
  }[];
  /** `Ready`: every wanted engine takes requests. `Progressing`: pods are being made or replaced. */
  conditions?: {
    /** What it is about. */
    type: string;
    /** Whether it holds. */
    status: 'True' | 'False' | 'Unknown';
    /** Why, as one word in CamelCase. */
    reason: string;
    /** Why, for a person, and what to do. */
    message: string;
    /** When `status` last changed. */
    lastTransitionTime: string;
    /** Generation of the spec that it is about. */
    observedGeneration?: number;
  }[];
}

/** A LoRA adapter, and on how many engines it is kept. */
export interface LoraAdapter {
  apiVersion: string;
  kind: 'LoraAdapter';
  metadata: V1ObjectMeta;
  spec: LoraAdapterSpec;
  status?: LoraAdapterStatus;
}

/** What should be. */
export interface LoraAdapterSpec {
  /** Name of the BaseModel that it was trained on, in this namespace. Cannot be changed. */
  baseModel: string;
  /**
   * Where the weights come from. A change loads the new version beside the old, which ends with its last
   * request.
   */
  source: {
    /**
     * A folder that PEFT wrote. `pvc://CLAIM/PATH` (CLAIM is one of the base model's adapterClaims),
     * `file:///PATH` (a folder in the engine's image below /motet/adapters), `https://HOST/FOLDER`,
     * `s3://BUCKET/FOLDER`, below which adapter_config.json and adapter_model.safetensors are fetched,
     * `hf://ORG/NAME@REVISION[/FOLDER]` (a repository on the Hugging Face Hub), or
     * `oci://REGISTRY/REPOSITORY[:TAG|@DIGEST]` (an artifact or image). The base model's sourceAccess says
     * how they are reached.
     */
    uri: string;
    /**
     * The adapter's digest, over config and weights. What has another digest is refused. Required for https
     * and s3. Default, whatever is there.
     */
    digest?: string;
  };
  /** Names that clients use as `model`. Default, the name of this resource. */
  servedNames?: string[];
  /**
   * Engines that hold it, a number from 1 to 1000, or `all`. More than there are engines means all. Default
   * 1.
   */
  copies: number | string;
  /**
   * Keep every copy in the device arena, also while nobody asks for it. Pins leave less room for all
   * others; an engine that would have too little left refuses, the adapter is served without, and the
   * condition Pinned says so. Default false.
   */
  pin: boolean;
  /**
   * Load it when somebody asks for it, and unload it when nobody has for a while. Who asks first waits for
   * the load. Default, it is always loaded.
   */
  onDemand?: {
    /** Minutes without a request after which it is unloaded. Default 60. */
    idleMinutes: number;
  };
}

/** What is, as the engines last said. */
export interface LoraAdapterStatus {
  /** Generation of the spec that this status is about. */
  observedGeneration?: number;
  /**
   * When somebody last asked for it, to a minute or a quarter of idleMinutes. The gateways write it, with
   * `spec.onDemand` alone.
   */
  askedAt?: string;
  /** What the adapter is, sha256 over its config and weights. */
  digest?: string;
  /** Largest rank of its modules. */
  rank?: number;
  /** `lora`, `rslora` or `dora`. */
  kind?: string;
  /** Target modules that it changes, sorted. */
  modules?: string[];
  /** Bytes that one copy takes in the device arena or in the host arena. */
  bytes?: number;
  /** Engines that should hold it, given how many are ready. */
  desiredCopies?: number;
  /** Engines that hold the wanted version. */
  readyCopies?: number;
  /** Ready of desired copies, as `2/2`. */
  copies?: string;
  /** The lowest tier that a copy is in. */
  tier?: string;
  /** One entry for each engine that holds it. */
  placements?: {
    /** Name of the engine pod. */
    pod: string;
    /** Where the bytes are, `device`, `host` or `disk`. */
    tier: string;
    /** When it came to this tier. */
    since: string;
    /** Version that the engine serves under the adapter's names. */
    digest: string;
    /** Whether it stays on the device. Not there for engines that know no pins. */
    pinned?: boolean;
  }[];
  /**
   * `Ready`: every wanted copy is resident in the wanted version. `Pinned`, with `spec.pin` alone: every
   * wanted copy stays on the device.
   */
  conditions?: {
    /** What it is about. */
    type: string;
    /** Whether it holds. */
    status: 'True' | 'False' | 'Unknown';
    /** Why, as one word in CamelCase. */
    reason: string;
    /** Why, for a person, and what to do; for a refused adapter, the engine's own words. */
    message: string;
    /** When `status` last changed. */
    lastTransitionTime: string;
    /** Generation of the spec that it is about. */
    observedGeneration?: number;
  }[];
}

/** A tenant, its keys and its rights. */
export interface Tenant {
  apiVersion: string;
  kind: 'Tenant';
  metadata: V1ObjectMeta;
  spec: TenantSpec;
  status?: TenantStatus;
}

/** What should be. */
export interface TenantSpec {
  /**
   * Bearer keys of the tenant. A second one lets clients change over. A Secret that changes is seen at once
   * by a gateway that may watch Secrets, else within 15 seconds. Default, none.
   */
  keys: {
    /** The Secret of this namespace that holds the key. */
    secretRef: {
      /** Name of the Secret. */
      name: string;
      /**
       * Entry of the Secret. Its value, without white space around it, is the key, of 16 to 512 printable
       * ASCII characters. Default key.
       */
      key: string;
    };
    /** How much may be used by this key, beside the limits of the tenant. Default, without limits. */
    limits?: {
      /** Requests a minute. Default, no limit. */
      requestsPerMinute?: number;
      /** Tokens a minute, of prompts and of answers. Default, no limit. */
      tokensPerMinute?: number;
      /** Requests at a time, those that wait for an engine among them. Default, no limit. */
      concurrency?: number;
    };
  }[];
  /**
   * Which tokens of OpenID Connect are the tenant's, beside its keys. A token that is of two tenants is
   * refused. Default, and by `{}`: those whose claim --oidc-tenant-claim of the gateway names it.
   */
  oidc?: {
    /**
     * Issuer of the tenant's own, as tokens have it in `iss`: an https URL, or http to the gateway's
     * machine. It speaks for tenants that name it and for no others. Default, --oidc-issuer of the gateway.
     */
    issuer?: string;
    /** What its tokens must have in `aud`. Default, --oidc-audience of the gateway. */
    audience?: string;
    /**
     * Claims that a token must have, all of them, by name: this text, or a list with it, as groups are.
     * Tokens are then the tenant's by these alone. Default, none.
     */
    claims?: Record<string, string>;
  };
  /**
   * How much the tenant may use, by all its keys together. Default, without limits. What is over a limit is
   * refused with 429 and told when to come back. A limit a minute may be used at once and comes back
   * evenly.
   */
  limits?: {
    /** Requests a minute. Default, no limit. */
    requestsPerMinute?: number;
    /**
     * Tokens a minute, of prompts and of answers; estimated when a request comes, counted when it has
     * ended. Default, no limit.
     */
    tokensPerMinute?: number;
    /** Requests at a time, those that wait for an engine among them. Default, no limit. */
    concurrency?: number;
  };
  /** The tenant's share of busy engines against others that wait; 2 gets twice what 1 gets. Default 1. */
  weight?: number;
  /**
   * Requests of a higher priority go first when engines are busy. One that waits rises by one with every
   * second in which no request of its priority was sent, so that none waits for ever. Default 0.
   */
  priority?: number;
  /** What the tenant sees, lists and calls. Default, nothing. */
  access: {
    /** Selects LoraAdapters by their labels. `{}` selects all. Default, none. */
    adapters?: {
      /** Labels that must be there with these values. Default, none. */
      matchLabels?: Record<string, string>;
      /** Further requirements; all must hold. Default, none. */
      matchExpressions?: {
        /** Key of the label. */
        key: string;
        /** How its value relates to `values`. */
        operator: 'In' | 'NotIn' | 'Exists' | 'DoesNotExist';
        /** Values, for In and NotIn. Default, none. */
        values?: string[];
      }[];
    };
    /** Selects BaseModels by their labels. `{}` selects all. Default, none. */
    baseModels?: {
      /** Labels that must be there with these values. Default, none. */
      matchLabels?: Record<string, string>;
      /** Further requirements; all must hold. Default, none. */
      matchExpressions?: {
        /** Key of the label. */
        key: string;
        /** How its value relates to `values`. */
        operator: 'In' | 'NotIn' | 'Exists' | 'DoesNotExist';
        /** Values, for In and NotIn. Default, none. */
        values?: string[];
      }[];
    };
    /**
     * Selects AdapterRoutes by their labels. `{}` selects all. Default, none. A route grants its targets
     * through its own name.
     */
    routes?: {
      /** Labels that must be there with these values. Default, none. */
      matchLabels?: Record<string, string>;
      /** Further requirements; all must hold. Default, none. */
      matchExpressions?: {
        /** Key of the label. */
        key: string;
        /** How its value relates to `values`. */
        operator: 'In' | 'NotIn' | 'Exists' | 'DoesNotExist';
        /** Values, for In and NotIn. Default, none. */
        values?: string[];
      }[];
    };
    /**
     * Selects AdapterGroups by their labels. `{}` selects all. Default, none. A group composes those of its
     * adapters that `adapters` selects too; it grants none.
     */
    groups?: {
      /** Labels that must be there with these values. Default, none. */
      matchLabels?: Record<string, string>;
      /** Further requirements; all must hold. Default, none. */
      matchExpressions?: {
        /** Key of the label. */
        key: string;
        /** How its value relates to `values`. */
        operator: 'In' | 'NotIn' | 'Exists' | 'DoesNotExist';
        /** Values, for In and NotIn. Default, none. */
        values?: string[];
      }[];
    };
  };
}

/** What is, as the gateway last saw it. */
export interface TenantStatus {
  /** Generation of the spec that this status is about. */
  observedGeneration?: number;
  /** Accepted of named keys, as `1/1`. */
  keys?: string;
  /** Served names that the tenant may use. */
  models?: number;
  /**
   * What the tenant uses, by all gateways together. Absent, nothing so far. It is looked at once a minute
   * and written when it is new.
   */
  usage?: {
    /**
     * Requests that an engine answered, by the minute; those whose client hung up are among them, and lines
     * of batches are not.
     */
    requestsPerMinute: number;
    /** Tokens of prompts and of answers, by the minute, those of batches among them. */
    tokensPerMinute: number;
    /** Requests under way, those that wait for an engine among them. */
    inFlight: number;
    /** Requests that were refused, by the minute, for whatever reason. */
    rejectedPerMinute: number;
    /** The same by gateway. One that says nothing for three minutes is taken out. */
    gateways: {
      /** Name of the gateway's pod. */
      name: string;
      /** When it was written. What stays as it is is written again after a minute and a half. */
      time: string;
      /** Requests that an engine answered, by the minute. */
      requestsPerMinute: number;
      /** Tokens of prompts and of answers, by the minute. */
      tokensPerMinute: number;
      /** Requests under way. */
      inFlight: number;
      /**
       * Requests that were refused, by the minute and by why: a limit, as `tenant-tokensPerMinute` or
       * `key-concurrency`; `queue_full`, `tenant_full`, `made_room`, `deadline` or `timeout` where there
       * was no room.
       */
      rejected: Record<string, number>;
    }[];
  };
  /** `Ready`: every key that is named was found and is accepted, and so are the tokens of `oidc`. */
  conditions?: {
    /** What it is about. */
    type: string;
    /** Whether it holds. */
    status: 'True' | 'False' | 'Unknown';
    /** Why, as one word in CamelCase. */
    reason: string;
    /** Why, for a person, and what to do. */
    message: string;
    /** When `status` last changed. */
    lastTransitionTime: string;
    /** Generation of the spec that it is about. */
    observedGeneration?: number;
  }[];
}
