/**
 * Every metric with name, unit and help. The `vllm:` names are those that endpoint pickers and dashboards read; what
 * has no vLLM word is `motet_`. Gauges are read at scrape time from the parts that own the facts, so they cannot lag.
 */
import { Counter, Gauge, Histogram, Registry } from 'prom-client';
import type { Runtime } from '../native/index.ts';
import type { FetchEvent } from './adapters/adapter-cache.ts';
import type { Adapter, AdapterTiers } from './adapters/adapter-tiers.ts';
import type { Merges } from './adapters/merges.ts';
import { type Arena, pageOwners } from './ladder/arena.ts';
import type { BlockPool, CachedTokens } from './ladder/block-pool.ts';
import type { KvDisk } from './ladder/kv-disk.ts';
import type { Tier } from './protocol.ts';
import { yieldReasons } from './scheduler.ts';
import type { FinishReason } from './stop.ts';

/** What the gauges read. */
export interface MetricSources {
  arena: Arena;
  blocks: BlockPool;
  hostArena: Arena | null;
  tiers: AdapterTiers;
  engine: {
    numRunning: number;
    numWaiting: number;
    numUnusedPositions: number;
    waitingAdapters: ReadonlySet<Adapter>;
  };
  blockSizeTokens: number;
  /** Unix seconds. */
  unixSeconds: () => number;
}

export interface SequenceTimes {
  finishReason: FinishReason;
  numPromptTokens: number;
  numOutputTokens: number;
  /** null: never got that far. */
  queueSeconds: number | null;
  prefillSeconds: number | null;
  decodeSeconds: number | null;
  totalSeconds: number;
}

// Histogram bounds: vLLM's, so that its dashboards' queries give the same resolution.
const ttftBounds = [
  0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80,
];
const tokenBounds = [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5];
const requestBounds = [0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240];
const stepBounds = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5];
const gapBounds = [1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1];
const tierBounds = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60];
const fetchBounds = [0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 900];
const sizeBounds = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096];

export class EngineMetrics {
  readonly registry = new Registry();

  readonly preemptions = this.#counter('vllm:num_preemptions_total', 'Sequences preempted, cumulative.');
  readonly yields = this.#labelled(
    'motet_yields_total',
    'Running sequences that gave their place to one that waited, by why: it was of the lowest priority, or its tenant had more than its share.',
    ['reason'],
  );
  readonly promptTokens = this.#counter(
    'vllm:prompt_tokens_total',
    'Prompt tokens computed, of sequences that ended.',
  );
  readonly kvStreamedBytes = this.#counter(
    'motet_kv_streamed_bytes_total',
    'Bytes of KV that steps read from the host arena, for sequences with more than the device arena has room for.',
  );
  readonly generationTokens = this.#counter('vllm:generation_tokens_total', 'Tokens generated.');
  readonly prefixCacheQueries = this.#counter(
    'vllm:prefix_cache_queries_total',
    'Prompt tokens looked up in the prefix cache.',
  );
  readonly prefixCacheHits = this.#counter(
    'vllm:prefix_cache_hits_total',
    'Prompt tokens that the prefix cache had.',
  );
  readonly #cachedTokens = this.#labelled(
    'motet_kv_hit_tokens_total',
    'Prompt tokens that the prefix cache had, by the tier in which they were when the sequence came.',
    ['tier'],
  );
  readonly #kvMoveSeconds = new Histogram({
    name: 'motet_kv_move_seconds',
    help: 'One copy of KV blocks between tiers, in seconds.',
    labelNames: ['from', 'to'],
    buckets: tierBounds,
    registers: [this.registry],
  });
  readonly #kvMoveBytes = this.#labelled(
    'motet_kv_move_bytes_total',
    'Bytes of KV blocks that were copied between tiers.',
    ['from', 'to'],
  );
  readonly #kvWaitSeconds = this.#histogram(
    'motet_kv_wait_seconds',
    'From when KV blocks were asked of the host arena until they were on the device, in seconds.',
    tierBounds,
  );
  readonly kvDiskWaitSeconds = this.#histogram(
    'motet_kv_disk_wait_seconds',
    'How long a sequence waited for KV blocks that only the disk had, in seconds.',
    tierBounds,
  );
  readonly #kvDiskReadSeconds = this.#histogram(
    'motet_kv_disk_read_seconds',
    'Reading one KV block from the disk and checking it, in seconds.',
    tierBounds,
  );
  readonly rejected = this.#counter(
    'motet_requests_rejected_total',
    'Requests refused because the queue was full.',
  );
  readonly timeToFirstToken = this.#histogram(
    'vllm:time_to_first_token_seconds',
    'From arrival to the first token, in seconds.',
    ttftBounds,
  );
  readonly interTokenLatency = new TokenHistogram(
    'vllm:inter_token_latency_seconds',
    'Between two tokens of a sequence, in seconds.',
    tokenBounds,
    this.registry,
  );
  readonly #timePerOutputToken = this.#histogram(
    'vllm:time_per_output_token_seconds',
    'Mean over a sequence of the time between its tokens, in seconds.',
    tokenBounds,
  );
  readonly #endToEnd = this.#histogram('vllm:e2e_request_latency_seconds', 'Arrival to end.', requestBounds);
  readonly #queue = this.#histogram(
    'vllm:request_queue_time_seconds',
    'Arrival to first step.',
    requestBounds,
  );
  readonly #prefill = this.#histogram(
    'vllm:request_prefill_time_seconds',
    'First step to first token.',
    requestBounds,
  );
  readonly #decode = this.#histogram(
    'vllm:request_decode_time_seconds',
    'First to last token.',
    requestBounds,
  );
  readonly #inference = this.#histogram(
    'vllm:request_inference_time_seconds',
    'First step to last token.',
    requestBounds,
  );
  readonly #iterationTokens = this.#histogram('vllm:iteration_tokens_total', 'Tokens per step.', sizeBounds);
  readonly #stepSeconds = this.#histogram('motet_step_duration_seconds', 'One step, in seconds.', stepBounds);
  readonly #stepGapSeconds = this.#histogram(
    'motet_step_gap_seconds',
    'From the end of a step to the begin of the next while there was work, in seconds.',
    gapBounds,
  );
  readonly #batchSize = this.#histogram('motet_step_sequences', 'Sequences per step.', sizeBounds);
  readonly adapterLoadSeconds = this.#histogram(
    'vllm:lora_adapter_load_seconds',
    'Verifying and copying one adapter, in seconds.',
    stepBounds,
  );
  readonly #adapterLookups = this.#labelled(
    'motet_adapter_lookups_total',
    'Sequences that came for an adapter, by the tier in which it was: device is a hit.',
    ['tier'],
  );
  readonly #adapterWaitSeconds = this.#histogram(
    'motet_adapter_wait_seconds',
    'How long the queue waited for an adapter that was not on the device, in seconds.',
    tierBounds,
  );
  readonly #moveSeconds = new Histogram({
    name: 'motet_adapter_move_seconds',
    help: 'One move of an adapter between tiers, in seconds, without the wait for pages.',
    labelNames: ['from', 'to'],
    buckets: tierBounds,
    registers: [this.registry],
  });
  readonly #moveBytes = this.#labelled(
    'motet_adapter_move_bytes_total',
    'Bytes of adapters that moved between tiers, whole pages.',
    ['from', 'to'],
  );
  readonly #adapterEvictions = this.#labelled(
    'motet_adapter_evictions_total',
    'Adapters that left a tier to make room, by tier.',
    ['tier'],
  );
  readonly #adapterFailures = this.#labelled(
    'motet_adapter_failures_total',
    'Adapters that the queue waited for and that could not be brought to the device, by error code.',
    ['code'],
  );
  readonly #mergeRequests = this.#labelled(
    'motet_merge_requests_total',
    'Requests for adapters that are merged, by what became of the merge: kept (it was there), made (it was waited for), refused.',
    ['result'],
  );
  readonly #mergeSeconds = this.#histogram(
    'motet_merge_seconds',
    'Making one merge of adapters, in seconds.',
    fetchBounds,
  );
  readonly #success = new Counter({
    name: 'vllm:request_success_total',
    help: 'Sequences that ended, by reason.',
    labelNames: ['finished_reason'],
    registers: [this.registry],
  });

  readonly #fetches = new Counter({
    name: 'motet_source_fetches_total',
    help: 'Models and adapters asked of a remote source, by kind and by result: fetched, cached, unavailable, refused.',
    labelNames: ['kind', 'result'],
    registers: [this.registry],
  });
  readonly #fetchSeconds = new Histogram({
    name: 'motet_source_fetch_seconds',
    help: 'Fetching and verifying one model or adapter that was not cached, in seconds, by kind.',
    labelNames: ['kind'],
    buckets: fetchBounds,
    registers: [this.registry],
  });
  readonly #fetchBytes = new Counter({
    name: 'motet_source_fetch_bytes_total',
    help: 'Bytes of files that were fetched whole, by kind.',
    labelNames: ['kind'],
    registers: [this.registry],
  });

  readonly #grammarSeconds = new Histogram({
    name: 'motet_grammar_compile_seconds',
    help: 'Compiling one grammar that was not kept, in seconds, by result: compiled, refused.',
    labelNames: ['result'],
    buckets: [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1],
    registers: [this.registry],
  });

  constructor(modelName: string) {
    this.registry.setDefaultLabels({ model_name: modelName, engine: '0' });
    for (const reason of yieldReasons) this.yields.inc({ reason }, 0);
  }

  /** @param gapSeconds  null: nothing was to be computed before it */
  observeStep(seconds: number, gapSeconds: number | null, numSequences: number, numTokens: number): void {
    this.#stepSeconds.observe(seconds);
    if (gapSeconds !== null) this.#stepGapSeconds.observe(gapSeconds);
    this.#batchSize.observe(numSequences);
    this.#iterationTokens.observe(numTokens);
  }

  observeFetch({ kind, result, seconds, bytes }: FetchEvent): void {
    this.#fetches.inc({ kind, result });
    if (result === 'cached') return;
    this.#fetchSeconds.observe({ kind }, seconds);
    this.#fetchBytes.inc({ kind }, bytes);
  }

  observeSequence(times: SequenceTimes): void {
    const { queueSeconds, prefillSeconds, decodeSeconds, numOutputTokens } = times;
    this.#success.inc({ finished_reason: times.finishReason });
    this.#endToEnd.observe(times.totalSeconds);
    if (queueSeconds !== null) this.#queue.observe(queueSeconds);
    if (prefillSeconds === null || decodeSeconds === null) return;
    this.promptTokens.inc(times.numPromptTokens);
    this.#prefill.observe(prefillSeconds);
    this.#decode.observe(decodeSeconds);
    this.#inference.observe(prefillSeconds + decodeSeconds);
    if (numOutputTokens > 1) this.#timePerOutputToken.observe(decodeSeconds / (numOutputTokens - 1));
  }

  /** Once. @param merges  null: none are made */
  watchMerges(merges: Merges | null): void {
    this.#gauge('motet_merges', 'Merges of adapters that are kept.', () => merges?.numKept ?? 0);
    this.#gauge('motet_merge_bytes', 'Files of merges that are kept, in bytes.', () => merges?.numBytes ?? 0);
    for (const result of ['kept', 'made', 'refused'] as const) this.#mergeRequests.inc({ result }, 0);
    if (!merges) return;
    merges.onRequest = (result) => this.#mergeRequests.inc({ result });
    merges.onMade = (seconds) => this.#mergeSeconds.observe(seconds);
  }

  #gauge(name: string, help: string, read: () => number): void {
    new Gauge({
      name,
      help,
      registers: [this.registry],
      collect() {
        this.set(read());
      },
    });
  }

  /** Adds the gauges. Once, when the parts exist. */
  watch({ arena, blocks, hostArena, tiers, engine, blockSizeTokens, unixSeconds }: MetricSources): void {
    const gauge = (name: string, help: string, read: () => number) => this.#gauge(name, help, read);
    const numOn = (tier: 'device' | 'host') =>
      [...tiers.adapters].filter((adapter) => adapter[tier] !== null).length;
    const residentNames = () =>
      [...tiers.names]
        .filter(([, { device }]) => device !== null)
        .map(([name]) => name)
        .sort();
    /** How many adapters there may be: those that are, and as many of their mean size as the free pages hold. */
    const maxAdapters = () => {
      const numResident = numOn('device');
      const meanPages = arena.numUsed('adapter') / Math.max(1, numResident);
      return numResident + Math.floor((arena.numFree + blocks.numReclaimablePages) / Math.max(1, meanPages));
    };

    gauge('vllm:num_requests_running', 'Sequences that run.', () => engine.numRunning);
    gauge('vllm:num_requests_waiting', 'Sequences that wait.', () => engine.numWaiting);
    gauge(
      'vllm:kv_cache_usage_perc',
      'Part of the pages that adapters leave to KV that sequences hold, 0 to 1.',
      () => blocks.numHeldPages / Math.max(1, arena.numPages - arena.numUsed('adapter')),
    );
    gauge('vllm:num_gpu_loaded_lora_adapters', 'Adapters in the device tier.', () => numOn('device'));
    gauge(
      'vllm:num_cpu_loaded_lora_adapters',
      'Adapters in the host tier, those that are in the device tier as well included.',
      () => numOn('host'),
    );
    gauge(
      'motet_adapters_registered',
      'Adapters that have a name or a sequence, in whatever tier.',
      () => [...tiers.adapters].length,
    );
    gauge(
      'vllm:max_gpu_lora_adapters',
      'Adapters that the device tier may hold at their mean size.',
      maxAdapters,
    );

    new Gauge({
      name: 'vllm:cache_config_info',
      help: 'Blocks of the arena; the value is 1.',
      labelNames: ['block_size', 'num_gpu_blocks'],
      registers: [this.registry],
    }).set({ block_size: blockSizeTokens, num_gpu_blocks: arena.numPages }, 1);

    new Gauge({
      name: 'vllm:lora_requests_info',
      help: 'Resident adapters, and those that sequences or loads wait for; the value is Unix time in seconds.',
      labelNames: ['max_lora', 'running_lora_adapters', 'waiting_lora_adapters'],
      registers: [this.registry],
      collect() {
        // Every new set of labels is a new series: only the present one may live.
        this.reset();
        const { waitingAdapters } = engine;
        const waiting = new Set(tiers.loadingNames);
        for (const [name, adapter] of tiers.names) if (waitingAdapters.has(adapter)) waiting.add(name);
        this.set(
          {
            max_lora: maxAdapters(),
            running_lora_adapters: residentNames().join(','),
            waiting_lora_adapters: [...waiting].sort().join(','),
          },
          unixSeconds(),
        );
      },
    });

    new Gauge({
      name: 'vllm:lora_adapter_loaded',
      help: '1 while the adapter is resident in that tier.',
      labelNames: ['adapter_name', 'level', 'pinned', 'rank'],
      registers: [this.registry],
      collect() {
        this.reset();
        for (const [name, { device, host, isPinned, file }] of tiers.names) {
          const rest = { pinned: `${isPinned}`, rank: file.rank };
          if (device) this.set({ adapter_name: name, level: 'gpu', ...rest }, 1);
          if (host) this.set({ adapter_name: name, level: 'cpu', ...rest }, 1);
        }
      },
    });

    new Gauge({
      name: 'motet_arena_bytes',
      help: 'Bytes of the device arena by what holds them: kv (of sequences), cached (KV that is only kept), adapter, free.',
      labelNames: ['kind'],
      registers: [this.registry],
      collect() {
        this.set({ kind: 'kv' }, blocks.numHeldPages * arena.pageBytes);
        this.set({ kind: 'cached' }, blocks.numReclaimablePages * arena.pageBytes);
        this.set({ kind: 'adapter' }, arena.numUsed('adapter') * arena.pageBytes);
        this.set({ kind: 'free' }, arena.numFree * arena.pageBytes);
      },
    });
    new Gauge({
      name: 'motet_arena_unused_bytes',
      help: 'Bytes in taken pages of the device arena that hold nothing, by kind: kv (the last blocks of sequences), adapter (their last pages). All fragmentation that there is, since pages are equal.',
      labelNames: ['kind'],
      registers: [this.registry],
      collect() {
        this.set({ kind: 'kv' }, (engine.numUnusedPositions * arena.pageBytes) / blockSizeTokens);
        let unused = 0;
        for (const { device, numPages, usedBytes } of tiers.adapters)
          if (device) unused += numPages * arena.pageBytes - usedBytes;
        this.set({ kind: 'adapter' }, unused);
      },
    });
    new Gauge({
      name: 'motet_tier_bytes',
      help: 'Bytes by tier (device, host, disk) and by what they hold (kv, adapter, free); disk: the files of registered adapters, and those of KV blocks of all models that share the folder.',
      labelNames: ['tier', 'kind'],
      registers: [this.registry],
      collect() {
        for (const [tier, pages] of [
          ['device', arena],
          ['host', hostArena],
        ] as const) {
          for (const kind of pageOwners)
            this.set({ tier, kind }, pages ? pages.numUsed(kind) * pages.pageBytes : 0);
          this.set({ tier, kind: 'free' }, pages ? pages.numFree * pages.pageBytes : 0);
        }
        let fileBytes = 0;
        for (const { file } of tiers.adapters) fileBytes += file.sizeBytes;
        this.set({ tier: 'disk', kind: 'adapter' }, fileBytes);
        this.set({ tier: 'disk', kind: 'kv' }, blocks.disk?.numBytes ?? 0);
      },
    });
    new Counter({
      name: 'motet_kv_evictions_total',
      help: 'Kept KV blocks that left a tier because their pages were wanted, by tier.',
      labelNames: ['tier'],
      registers: [this.registry],
      collect() {
        this.reset();
        this.inc({ tier: 'device' }, blocks.numEvicted);
        this.inc({ tier: 'host' }, blocks.host?.numEvicted ?? 0);
      },
    });
    new Counter({
      name: 'motet_kv_refused_total',
      help: 'KV blocks that were not copied to the host arena, since all that it held was worth more.',
      registers: [this.registry],
      collect() {
        this.reset();
        this.inc(blocks.host?.numRefused ?? 0);
      },
    });
    if (blocks.disk) this.#watchDisk(blocks.disk);
    blocks.onFetched = (numBytes, seconds, waitSeconds) => {
      this.#observeKvMove({ from: 'host', to: 'device' }, numBytes, seconds);
      this.#kvWaitSeconds.observe(waitSeconds);
    };
    if (blocks.host) {
      blocks.host.onCopied = (numBytes, seconds) =>
        this.#observeKvMove({ from: 'device', to: 'host' }, numBytes, seconds);
    }
    tiers.onLoaded = (seconds) => this.adapterLoadSeconds.observe(seconds);
    tiers.onLookup = (tier) => this.#adapterLookups.inc({ tier });
    tiers.onWaited = (seconds) => this.#adapterWaitSeconds.observe(seconds);
    tiers.residency.onMove = ({ from, to, seconds, bytes }) => {
      this.#moveSeconds.observe({ from, to }, seconds);
      this.#moveBytes.inc({ from, to }, bytes);
    };
    tiers.residency.onEviction = (tier) => this.#adapterEvictions.inc({ tier });
  }

  /** Counters that the disk tier keeps by itself. */
  #watchDisk(disk: KvDisk): void {
    const { registry } = this;
    const counts = <Label extends string>(
      name: string,
      help: string,
      label: Label,
      read: () => Record<string, number>,
    ) =>
      new Counter({
        name,
        help,
        labelNames: [label],
        registers: [registry],
        collect() {
          this.reset();
          for (const [value, count] of Object.entries(read()))
            this.inc({ [label]: value } as Record<Label, string>, count);
        },
      });
    const gauge = (name: string, help: string, read: () => number) =>
      new Gauge({
        name,
        help,
        registers: [registry],
        collect() {
          this.set(read());
        },
      });
    gauge('motet_kv_disk_blocks', "KV blocks of this engine's model on disk.", () => disk.numBlocks);
    for (const what of ['reads', 'writes'] as const) {
      gauge(
        `motet_kv_disk_${what}_failing`,
        `1 while ${what} of KV on disk fail, and are tried now and then only.`,
        () => Number(disk.resting[what]),
      );
    }
    new Counter({
      name: 'motet_kv_disk_written_total',
      help: 'KV blocks written to disk.',
      registers: [registry],
      collect() {
        this.reset();
        this.inc(disk.counts.written);
      },
    });
    counts(
      'motet_kv_disk_reads_total',
      'KV blocks asked of the disk, by result: hit, damaged, gone (another engine removed it), late, busy (too many wait), failed.',
      'result',
      () => disk.counts.reads,
    );
    counts(
      'motet_kv_disk_dropped_total',
      'KV blocks that were not written to disk, by reason: line_full, resting, failed, worth_least.',
      'reason',
      () => disk.counts.dropped,
    );
    counts(
      'motet_kv_disk_removed_total',
      'Files of KV blocks that were removed, by reason: budget, damaged, purged.',
      'reason',
      () => disk.counts.removed,
    );
    disk.onRead = (seconds) => this.#kvDiskReadSeconds.observe(seconds);
  }

  #observeKvMove(way: { from: Tier; to: Tier }, numBytes: number, seconds: number): void {
    this.#kvMoveSeconds.observe(way, seconds);
    this.#kvMoveBytes.inc(way, numBytes);
  }

  observeGrammar(seconds: number, isGood: boolean): void {
    this.#grammarSeconds.observe({ result: isGood ? 'compiled' : 'refused' }, seconds);
  }

  observeCached({ device, host, disk }: CachedTokens): void {
    this.#cachedTokens.inc({ tier: 'device' }, device);
    this.#cachedTokens.inc({ tier: 'host' }, host);
    this.#cachedTokens.inc({ tier: 'disk' }, disk);
  }

  /** Adds what layers that stream cost: nothing where all weights are mapped. Once. */
  watchWeights(runtime: Pick<Runtime, 'weightStream' | 'stepParts'>): void {
    const counter = (name: string, help: string, read: () => number) =>
      new Counter({
        name,
        help,
        registers: [this.registry],
        collect() {
          this.reset();
          this.inc(read());
        },
      });
    counter(
      'motet_weight_read_bytes_total',
      'Bytes of weights read because of --weight-memory: those that stay once, layers that stream for each step.',
      () => runtime.weightStream()?.readBytes ?? 0,
    );
    counter(
      'motet_weight_read_seconds_total',
      'How long these reads took, beside the steps, in seconds.',
      () => runtime.weightStream()?.readSeconds ?? 0,
    );
    counter(
      'motet_weight_wait_seconds_total',
      'How long steps waited for layers that stream, in seconds.',
      () => runtime.stepParts().weights / 1000,
    );
  }

  observeAdapterFailure(code: string): void {
    this.#adapterFailures.inc({ code });
  }

  #labelled<Label extends string>(name: string, help: string, labelNames: Label[]): Counter<Label> {
    return new Counter({ name, help, labelNames, registers: [this.registry] });
  }

  #counter(name: string, help: string): Counter {
    return new Counter({ name, help, registers: [this.registry] });
  }

  #histogram(name: string, help: string, buckets: number[]): Histogram {
    return new Histogram({ name, help, buckets, registers: [this.registry] });
  }
}

/** A histogram that is observed for every token: prom-client's makes objects each time, and this one none. */
class TokenHistogram {
  readonly name: string;
  readonly #help: string;
  readonly #bounds: readonly number[];
  /** By bound, and those above the last. */
  readonly #counts: Float64Array;
  readonly #sum = new Float64Array(1);

  constructor(name: string, help: string, bounds: readonly number[], registry: Registry) {
    this.name = name;
    this.#help = help;
    this.#bounds = bounds;
    this.#counts = new Float64Array(bounds.length + 1);
    // A registry needs a name and `get` of a metric.
    registry.registerMetric(this as unknown as Histogram);
  }

  observe(value: number): void {
    let i = 0;
    while (i < this.#bounds.length && value > this.#bounds[i]!) i++;
    this.#counts[i]!++;
    this.#sum[0]! += value;
  }

  /** As prom-client's metrics answer a registry. */
  async get() {
    const { name } = this;
    let count = 0;
    const values = [...this.#bounds, '+Inf'].map((le, i) => {
      count += this.#counts[i]!;
      return { metricName: `${name}_bucket`, labels: { le }, value: count };
    });
    return {
      name,
      help: this.#help,
      type: 'histogram',
      aggregator: 'sum',
      values: [
        ...values,
        { metricName: `${name}_sum`, labels: {}, value: this.#sum[0]! },
        { metricName: `${name}_count`, labels: {}, value: count },
      ],
    };
  }
}
