// Makes helm/motet/dashboards/motet.json, the Grafana dashboard, from the description below.
//
//   node scripts/dashboard.ts            writes the file
//   import { dashboardJson } from ...    the text, for the test that holds the two together
//
// Every panel says what it shows and what is normal. Every query has an answer as soon as the system runs: what counts
// rare events starts at 0 (`orZero`), and loads of adapters, which end before the first scrape, are taken since the
// start of the engines.

import { writeFileSync } from 'node:fs';
import { join } from 'node:path';

type Unit = 's' | 'bytes' | 'Bps' | 'reqps' | 'ops' | 'percentunit' | 'short' | 'bool';

/** PromQL, and the words for each series. */
type Query = [expr: string, legend: string];

interface Panel {
  kind: 'stat' | 'graph' | 'stack' | 'table';
  title: string;
  description: string;
  unit: Unit;
  queries: Query[];
  /** Of 24 columns. */
  width: number;
}

const path = join(import.meta.dirname, '../helm/motet/dashboards/motet.json');
const statHeight = 4;
const graphHeight = 8;

const here = 'namespace="$namespace"';
/** Of what knows the name of its BaseModel. */
const ofBase = `${here}, base_model=~"$base_model"`;
/** Requests of clients; probes and scrapes are counted by the gateway too. */
const asked = `${here}, route!~"/livez|/readyz|/metrics|/console.*"`;

// --- PromQL -----------------------------------------------------------------------------------------------------------

const rate = (metric: string, matchers: string) => `rate(${metric}{${matchers}}[$__rate_interval])`;

const sumBy = (labels: string, expr: string) =>
  labels === '' ? `sum(${expr})` : `sum by (${labels}) (${expr})`;

/** Per second, summed. */
const perSecond = (metric: string, matchers: string, labels = '') => sumBy(labels, rate(metric, matchers));

/** 0 where nothing has been counted yet, as long as `whole` is there: a count that begins with its first event. */
const orZero = (expr: string, whole: string) => `${expr} or 0 * ${whole}`;

/** The same for a count by a label. */
const orNone = (label: string, expr: string, whole: string) =>
  `${expr} or label_replace(0 * ${whole}, "${label}", "none", "", "")`;

const quantile = (q: number, metric: string, matchers: string, labels = '') =>
  `histogram_quantile(${q}, ${perSecond(`${metric}_bucket`, matchers, labels === '' ? 'le' : `le, ${labels}`)})`;

const mean = (metric: string, matchers: string, labels = '') =>
  `${perSecond(`${metric}_sum`, matchers, labels)} / ${perSecond(`${metric}_count`, matchers, labels)}`;

/** Of a gauge that only the operator's leader has true numbers of. */
const fromLeader = (labels: string, metric: string, matchers: string) =>
  `max by (${labels}) (${metric}{${ofBase}, ${matchers}})`;

/** The median and the 95th of a hundred. */
const medianAnd95 = (metric: string, matchers: string, labels = '', legend = ''): Query[] => [
  [quantile(0.5, metric, matchers, labels), `${legend}median`],
  [quantile(0.95, metric, matchers, labels), `${legend}p95`],
];

// --- the description --------------------------------------------------------------------------------------------------

/** 0 where gateways have nowhere to keep batches. */
const unlessOff = (expr: string) => orZero(expr, sumBy('', `motet_gateway_requests_in_flight{${here}}`));
const requestsPerSecond = perSecond('motet_gateway_requests_total', asked);
const failuresPerSecond = orZero(
  perSecond('motet_gateway_requests_total', `${asked}, status=~"5.."`),
  requestsPerSecond,
);

const fleet: Panel[] = [
  stat('Engines', 'short', 'Engine pods that take requests, and those that the BaseModels want.', [
    [`sum(${fromLeader('base_model', 'motet_operator_base_model_engines', 'state="ready"')})`, 'ready'],
    [`sum(${fromLeader('base_model', 'motet_operator_base_model_engines', 'state="wanted"')})`, 'wanted'],
  ]),
  stat(
    'Adapter copies',
    'short',
    'Copies of adapters that are resident, and those that the LoraAdapters want.',
    [
      [`sum(${fromLeader('base_model', 'motet_operator_adapter_copies', 'state="ready"')})`, 'ready'],
      [`sum(${fromLeader('base_model', 'motet_operator_adapter_copies', 'state="wanted"')})`, 'wanted'],
    ],
  ),
  stat('Requests', 'reqps', 'Requests of clients that ended, all gateways together.', [
    [requestsPerSecond, ''],
  ]),
  stat('Failed', 'percentunit', 'Part of the requests that ended with 5xx. The objective is below 0.1 %.', [
    [`(${failuresPerSecond}) / (${requestsPerSecond})`, ''],
  ]),
  stat(
    'First token, p95',
    's',
    'Arrival at the engine to the first token; one request in twenty waits longer.',
    [[quantile(0.95, 'vllm:time_to_first_token_seconds', ofBase), '']],
  ),
  stat('Tokens generated', 'ops', 'Tokens per second, all engines together.', [
    [perSecond('vllm:generation_tokens_total', ofBase), ''],
  ]),
  stack(
    'Requests by status',
    'reqps',
    'Requests of clients by HTTP status. 499: the client hung up. 429: refused for lack of room or by a limit.',
    [[perSecond('motet_gateway_requests_total', asked, 'status'), '{{status}}']],
  ),
  graph(
    'Failed requests',
    'percentunit',
    'Part of the requests that ended with 5xx. 1.44 % for an hour wakes somebody.',
    [
      [`(${failuresPerSecond}) / (${requestsPerSecond})`, 'now'],
      [`namespace:motet_gateway_request_errors:ratio_rate1h{${here}}`, 'over 1 h'],
    ],
  ),
  graph(
    'Duration of requests',
    's',
    'At the gateway, from arrival to the last byte. Long answers take long; the shape over time tells more than the height.',
    medianAnd95('motet_gateway_request_duration_seconds', asked),
  ),
  graph(
    'Time to first token',
    's',
    'In the engine: waiting, then computing the prompt.',
    medianAnd95('vllm:time_to_first_token_seconds', ofBase, 'base_model', '{{base_model}} '),
  ),
  graph(
    'Time between tokens',
    's',
    'Of one sequence: what a reader of a stream feels. It grows with the batch.',
    medianAnd95('vllm:inter_token_latency_seconds', ofBase, 'base_model', '{{base_model}} '),
  ),
  graph('Tokens', 'ops', 'Prompt tokens computed and tokens generated per second.', [
    [perSecond('vllm:prompt_tokens_total', ofBase, 'base_model'), '{{base_model}} prompt'],
    [perSecond('vllm:generation_tokens_total', ofBase, 'base_model'), '{{base_model}} generated'],
  ]),
];

const queues: Panel[] = [
  graph('In flight', 'short', 'Requests that have arrived and not ended, by gateway.', [
    [sumBy('pod', `motet_gateway_requests_in_flight{${here}}`), '{{pod}}'],
  ]),
  graph('Queued at the gateway', 'short', 'Requests that no engine has room for. 0 but for moments.', [
    [sumBy('pod', `motet_gateway_queued_requests{${here}}`), '{{pod}}'],
  ]),
  graph('Queued by tenant', 'short', 'The same by whose they are.', [
    [sumBy('tenant', `motet_gateway_queued_requests_by_tenant{${here}}`), '{{tenant}}'],
  ]),
  graph('Shed', 'reqps', 'Requests that were not let wait for an engine, or not any longer, by reason.', [
    [perSecond('motet_gateway_shed_total', here, 'reason'), '{{reason}}'],
  ]),
  graph('Waiting in engines', 'short', 'Sequences that the engine has accepted and not started.', [
    [sumBy('pod', `vllm:num_requests_waiting{${ofBase}}`), '{{pod}}'],
  ]),
  graph(
    'First byte at the gateway',
    's',
    "From a request's arrival at the gateway to the first byte of the engine's answer: the gateway's queue is in it.",
    medianAnd95('motet_gateway_time_to_first_byte_seconds', asked),
  ),
  graph(
    'Engines as the gateway sees them',
    'short',
    'Engines that a gateway sends requests to, and those that it cannot use. Of the gateway that sees the fewest.',
    [
      [`min by (base_model) (motet_gateway_engines{${ofBase}, state="ready"})`, '{{base_model}} ready'],
      [`max by (base_model) (motet_gateway_engines{${ofBase}, state="away"})`, '{{base_model}} away'],
    ],
  ),
  graph(
    'Requests that an engine failed',
    'reqps',
    'By reason; those that another engine then answered are in it.',
    [
      [
        orNone('reason', perSecond('motet_gateway_engine_errors_total', here, 'reason'), requestsPerSecond),
        '{{reason}}',
      ],
    ],
  ),
  graph(
    'Why this engine',
    'reqps',
    'Requests sent to an engine, by why to it: its KV (prefix), the adapter is nearer to its device, a better one was hot (bounded), load, turn, or it was the only one with room.',
    [[perSecond('motet_gateway_picks_total', here, 'reason'), '{{reason}}']],
  ),
  graph(
    'KV that was expected',
    'short',
    'Prompt tokens per second that an engine was expected to have when it was picked: those that it had (true), and had not (false).',
    [[perSecond('motet_gateway_expected_cached_tokens_total', here, 'found'), '{{found}}']],
  ),
  graph(
    'Asked again, left alone',
    'ops',
    'Requests whose engine broke off before the first byte and that another was asked for, or not because too many were; streams that a second engine was asked for; engines left alone because they failed.',
    [
      [perSecond('motet_gateway_retries_total', `${here}, allowed="true"`), 'asked again'],
      [perSecond('motet_gateway_retries_total', `${here}, allowed="false"`), 'not asked again'],
      [perSecond('motet_gateway_hedges_total', `${here}, result=~"won|lost"`), 'asked of a second'],
      [orZero(perSecond('motet_gateway_engine_ejections_total', here), requestsPerSecond), 'left alone'],
    ],
  ),
  graph('Requests by tenant', 'reqps', 'The ten tenants with the most requests.', [
    [`topk(10, ${perSecond('motet_gateway_requests_total', asked, 'tenant')})`, '{{tenant}}'],
  ]),
  graph('Tokens by tenant', 'ops', 'Prompt and answer tokens per second, of the ten tenants with the most.', [
    [
      orNone(
        'tenant',
        `topk(10, ${perSecond('motet_gateway_tokens_total', `${here}, kind!="cached"`, 'tenant')})`,
        requestsPerSecond,
      ),
      '{{tenant}}',
    ],
  ]),
  graph(
    'Refused by a limit',
    'reqps',
    'Requests that were over a limit, by tenant and limit. 0 but for tenants that want more than they have.',
    [
      [
        orNone(
          'tenant',
          perSecond('motet_gateway_rate_limited_total', here, 'tenant, limit'),
          requestsPerSecond,
        ),
        '{{tenant}} {{limit}}',
      ],
    ],
  ),
  graph(
    'Used of limits',
    'percentunit',
    'Of the last minute, the ten that are nearest to a limit, all gateways together. 90 % for half an hour is told by an alert.',
    [
      [
        orNone(
          'tenant',
          `topk(10, ${sumBy('tenant, limit', `motet_gateway_quota_used_ratio{${here}}`)})`,
          requestsPerSecond,
        ),
        '{{tenant}} {{limit}}',
      ],
    ],
  ),
  graph(
    'Limits kept alone',
    'short',
    '1 while Redis, in which gateways share limits, does not answer one of them. 0 without Redis.',
    [[`motet_gateway_quota_store_away{${here}}`, '{{pod}}']],
  ),
  graph('Keys refused', 'reqps', 'Requests without a good key, by reason.', [
    [perSecond('motet_gateway_auth_failures_total', here, 'reason'), '{{reason}}'],
  ]),
  graph('Tenants', 'short', 'Tenants whose keys a gateway accepts. All gateways agree but for moments.', [
    [`motet_gateway_tenants{${here}}`, '{{pod}}'],
  ]),
  graph(
    'Lines of batches',
    'ops',
    'Lines that were answered, failed, or are tried again, per second. Lines run in what online traffic leaves.',
    [[perSecond('motet_gateway_batch_lines_total', here, 'result'), '{{result}}']],
  ),
  graph(
    'Batches',
    'short',
    'Batches that have not ended, those of them that run, and the age of the oldest in hours: beyond its window it expires.',
    [
      [unlessOff(`max(motet_gateway_batches_unfinished{${here}})`), 'not ended'],
      [unlessOff(`sum(motet_gateway_batches_running{${here}})`), 'running'],
      [unlessOff(`max(motet_gateway_batch_oldest_seconds{${here}}) / 3600`), 'age of the oldest, h'],
    ],
  ),
];

const engines: Panel[] = [
  graph(
    'Batch',
    'short',
    'Sequences in a step, mean. More is better use of the weights that each step reads.',
    [[mean('motet_step_sequences', ofBase, 'pod'), '{{pod}}']],
  ),
  graph(
    'Step time',
    's',
    'One forward pass of the batch.',
    medianAnd95('motet_step_duration_seconds', ofBase, 'pod', '{{pod}} '),
  ),
  graph(
    'Between steps',
    's',
    'From the end of a step to the begin of the next while there was work. Far below the step time, or the engine lacks a CPU.',
    medianAnd95('motet_step_gap_seconds', ofBase, 'pod', '{{pod}} '),
  ),
  graph('Tokens in a step', 'short', 'Prompt and output tokens together, mean. Prompts in parts raise it.', [
    [mean('vllm:iteration_tokens_total', ofBase, 'pod'), '{{pod}}'],
  ]),
  graph('Running', 'short', 'Sequences that take part in steps.', [
    [sumBy('pod', `vllm:num_requests_running{${ofBase}}`), '{{pod}}'],
  ]),
  graph(
    'KV use',
    'percentunit',
    'Of the pages that adapters leave to KV. At 100 % sequences are preempted.',
    [[`max by (pod) (vllm:kv_cache_usage_perc{${ofBase}})`, '{{pod}}']],
  ),
  graph(
    'Preempted and refused',
    'ops',
    'Sequences whose pages were taken for others, and requests refused because the queue was full. Normally 0.',
    [
      [perSecond('vllm:num_preemptions_total', ofBase, 'pod'), '{{pod}} preempted'],
      [perSecond('motet_requests_rejected_total', ofBase, 'pod'), '{{pod}} refused'],
    ],
  ),
  graph(
    'Places given to others',
    'ops',
    'Running sequences that gave their place to one that waited: share, because their tenant had more than its share of the seats; priority, because they had the lowest.',
    [[perSecond('motet_yields_total', ofBase, 'reason'), '{{reason}}']],
  ),
  stack('Device arenas', 'bytes', 'What holds the bytes of the device arenas, all engines together.', [
    [sumBy('kind', `motet_arena_bytes{${ofBase}}`), '{{kind}}'],
  ]),
  stack('Where the time goes', 's', 'Mean of a request: waiting, computing the prompt, generating.', [
    [mean('vllm:request_queue_time_seconds', ofBase), 'waiting'],
    [mean('vllm:request_prefill_time_seconds', ofBase), 'prompt'],
    [mean('vllm:request_decode_time_seconds', ofBase), 'generating'],
  ]),
  stack(
    'How requests end',
    'reqps',
    'stop: the model ended; length: a bound was met; abort: the client hung up.',
    [[perSecond('vllm:request_success_total', ofBase, 'finished_reason'), '{{finished_reason}}']],
  ),
];

/** There as soon as an engine is. */
const anyTokens = perSecond('vllm:generation_tokens_total', ofBase);

const ladder: Panel[] = [
  stack(
    'Where prompt tokens come from',
    'ops',
    'Prompt tokens by the tier whose KV served them, and those that were computed.',
    [
      [
        orNone('tier', perSecond('motet_kv_hit_tokens_total', ofBase, 'tier'), anyTokens),
        'from the {{tier}} tier',
      ],
      [
        `${perSecond('vllm:prefix_cache_queries_total', ofBase)} - ${perSecond('vllm:prefix_cache_hits_total', ofBase)}`,
        'computed',
      ],
    ],
  ),
  stack('KV by tier', 'bytes', 'KV of sequences, running and ended, all engines together.', [
    [sumBy('tier', `motet_tier_bytes{${ofBase}, kind="kv"}`), '{{tier}}'],
  ]),
  graph(
    'KV that left a tier',
    'ops',
    'Blocks whose room was wanted, and those that the host arena did not take, since all that it held was worth more.',
    [
      [orNone('tier', perSecond('motet_kv_evictions_total', ofBase, 'tier'), anyTokens), 'left {{tier}}'],
      [perSecond('motet_kv_refused_total', ofBase), 'not taken by host'],
    ],
  ),
  graph(
    'KV that moved',
    'Bps',
    'Bytes of KV that were copied between tiers, and that steps read from the host arena for contexts longer than the device holds.',
    [
      [
        orNone('from', perSecond('motet_kv_move_bytes_total', ofBase, 'from, to'), anyTokens),
        '{{from}} to {{to}}',
      ],
      [perSecond('motet_kv_streamed_bytes_total', ofBase), 'read by steps'],
    ],
  ),
  graph(
    'Time of KV copies',
    'percentunit',
    'Part of the time that copies of KV between tiers run, beside the steps; of all engines together, so it may be above 100 %.',
    [
      [
        orNone('from', perSecond('motet_kv_move_seconds_sum', ofBase, 'from, to'), anyTokens),
        '{{from}} to {{to}}',
      ],
    ],
  ),
  graph(
    'Waiting for KV',
    'short',
    'Requests for KV of lower tiers that are under way at a time, on average. Normally well below 1.',
    [
      [perSecond('motet_kv_wait_seconds_sum', ofBase, 'base_model'), '{{base_model}} host'],
      [perSecond('motet_kv_disk_wait_seconds_sum', ofBase, 'base_model'), '{{base_model}} disk'],
    ],
  ),
  graph(
    'KV on disk',
    'ops',
    'Blocks read from disk, by result; written; and those that were not written, by reason. damaged, late and failed: a disk that is ill.',
    [
      [
        orNone('result', perSecond('motet_kv_disk_reads_total', ofBase, 'result'), anyTokens),
        'read: {{result}}',
      ],
      [orZero(perSecond('motet_kv_disk_written_total', ofBase), anyTokens), 'written'],
      [
        orNone('reason', perSecond('motet_kv_disk_dropped_total', ofBase, 'reason'), anyTokens),
        'not written: {{reason}}',
      ],
    ],
  ),
  graph(
    'Weights read',
    'Bps',
    'Weights that are not in memory and are read for each step; 0 without memory.weights.',
    [[perSecond('motet_weight_read_bytes_total', ofBase, 'base_model'), '{{base_model}}']],
  ),
  graph(
    'Steps that wait for weights',
    'percentunit',
    'Part of the time that an engine computes nothing since the next layer is still being read.',
    [[perSecond('motet_weight_wait_seconds_total', ofBase, 'pod'), '{{pod}}']],
  ),
];

const adapters: Panel[] = [
  graph(
    'Resident by tier',
    'short',
    'Adapters in the device tier and in the host tier, all engines together. A copy on each of two engines counts two.',
    [
      [sumBy('base_model', `vllm:num_gpu_loaded_lora_adapters{${ofBase}}`), '{{base_model}} device'],
      [sumBy('base_model', `vllm:num_cpu_loaded_lora_adapters{${ofBase}}`), '{{base_model}} host'],
    ],
  ),
  stack(
    'Bytes of adapters by tier',
    'bytes',
    'Pages of device and host arenas, and files of registered adapters.',
    [[sumBy('tier', `motet_tier_bytes{${ofBase}, kind="adapter"}`), '{{tier}}']],
  ),
  graph(
    'Where requests find their adapter',
    'reqps',
    'By tier. One that is on the host or on disk comes to the device first: a working set beyond the device shows here.',
    [[orNone('tier', perSecond('motet_adapter_lookups_total', ofBase, 'tier'), anyTokens), '{{tier}}']],
  ),
  graph(
    'Waiting for adapters',
    'short',
    'Adapters that the queue waits for at a time, on average, until they are on the device. Normally well below 1.',
    [[perSecond('motet_adapter_wait_seconds_sum', ofBase, 'base_model'), '{{base_model}}']],
  ),
  graph('Adapters that moved', 'Bps', 'Bytes of adapters between tiers.', [
    [
      orNone('from', perSecond('motet_adapter_move_bytes_total', ofBase, 'from, to'), anyTokens),
      '{{from}} to {{to}}',
    ],
  ]),
  graph(
    'Room for adapters',
    'short',
    'Adapters that the device arena could hold at the mean size of those that it holds, and those that it holds.',
    [
      [sumBy('pod', `vllm:max_gpu_lora_adapters{${ofBase}}`), '{{pod}} at most'],
      [sumBy('pod', `vllm:num_gpu_loaded_lora_adapters{${ofBase}}`), '{{pod}} now'],
    ],
  ),
  graph('Copies', 'short', 'Resident in the wanted version, and wanted.', [
    [fromLeader('base_model', 'motet_operator_adapter_copies', 'state="ready"'), '{{base_model}} ready'],
    [fromLeader('base_model', 'motet_operator_adapter_copies', 'state="wanted"'), '{{base_model}} wanted'],
  ]),
  stack(
    'LoraAdapters by reason',
    'short',
    'Reason of the condition Ready. Anything but Resident and, for a while, Loading wants a person.',
    [
      [
        `sum by (reason) (${fromLeader('base_model, reason', 'motet_operator_adapters', 'reason!=""')})`,
        '{{reason}}',
      ],
    ],
  ),
  graph('Loads', 's', 'Verifying and copying one adapter into the arena, since the engines started.', [
    [
      `histogram_quantile(0.5, sum by (le, base_model) (vllm:lora_adapter_load_seconds_bucket{${ofBase}}))`,
      '{{base_model}} median',
    ],
    [
      `histogram_quantile(0.95, sum by (le, base_model) (vllm:lora_adapter_load_seconds_bucket{${ofBase}}))`,
      '{{base_model}} p95',
    ],
  ]),
  {
    ...graph(
      'Requests by served name',
      'reqps',
      'The ten names with the most requests, and which adapter or base model answered. Of all base models.',
      [
        [
          `topk(10, ${perSecond('motet_gateway_requests_total', `${asked}, model!=""`, 'model, target')})`,
          '{{model}} by {{target}}',
        ],
      ],
    ),
    width: 12,
  },
  {
    kind: 'table',
    title: 'Where each adapter is',
    description: 'Engines that hold it, by name, tier and rank. level gpu is the device tier.',
    unit: 'short',
    queries: [[`count by (adapter_name, base_model, level, rank) (vllm:lora_adapter_loaded{${ofBase}})`, '']],
    width: 12,
  },
  {
    ...graph(
      'Fetches',
      'ops',
      'Models and adapters that engines asked a remote source for. cached: they had it.',
      [
        [
          orNone('result', perSecond('motet_source_fetches_total', ofBase, 'kind, result'), anyTokens),
          '{{kind}} {{result}}',
        ],
      ],
    ),
    width: 12,
  },
  {
    ...graph('Bytes fetched', 'Bps', 'Of files that engines fetched whole from remote sources, per second.', [
      [orNone('kind', perSecond('motet_source_fetch_bytes_total', ofBase, 'kind'), anyTokens), '{{kind}}'],
    ]),
    width: 12,
  },
];

const operator: Panel[] = [
  graph('Leader', 'bool', 'The operator that acts. One, but for seconds when the lease changes hands.', [
    [`motet_operator_is_leader{${here}}`, '{{pod}}'],
  ]),
  graph('Reconciles', 'ops', 'Passes over a resource, by kind and result. An unchanged world needs few.', [
    [perSecond('motet_operator_reconcile_total', here, 'kind, result'), '{{kind}} {{result}}'],
  ]),
  graph('Reconcile time', 's', 'One pass; one in twenty takes longer.', [
    [quantile(0.95, 'motet_operator_reconcile_seconds', here, 'kind'), '{{kind}}'],
  ]),
  graph('Queue', 'short', 'Keys that wait for a pass. 0 but for moments.', [
    [sumBy('kind', `motet_operator_queue_depth{${here}}`), '{{kind}}'],
  ]),
  graph(
    'API requests',
    'reqps',
    'Requests to the API server; code none: no answer came. An unchanged world needs no writes.',
    [[perSecond('motet_operator_api_requests_total', here, 'verb, code'), '{{verb}} {{code}}']],
  ),
  graph('Calls to engines', 'reqps', 'refused: the engine said no. unreachable: no answer.', [
    [perSecond('motet_operator_engine_calls_total', here, 'call, result'), '{{call}} {{result}}'],
  ]),
  graph(
    'API server not heard',
    's',
    'How long operator and gateways have heard nothing about a resource. 0 while they do.',
    [
      [`max by (resource) (motet_operator_watch_stale_seconds{${here}})`, 'operator {{resource}}'],
      [`max by (resource) (motet_gateway_watch_stale_seconds{${here}})`, 'gateway {{resource}}'],
    ],
  ),
  graph(
    'Memory',
    'bytes',
    'Resident bytes of operator, gateways and engines. Engines on one node share the bytes of the weights.',
    [[`process_resident_memory_bytes{${here}, job=~"motet-.+"}`, '{{pod}}']],
  ),
  graph('CPU', 'short', 'CPUs that operator, gateways and engines use.', [
    [rate('process_cpu_seconds_total', `${here}, job=~"motet-.+"`), '{{pod}}'],
  ]),
];

const rows: [title: string, panels: Panel[]][] = [
  ['Fleet', fleet],
  ['Gateway and queues', queues],
  ['Engines', engines],
  ['KV in the memory ladder', ladder],
  ['Adapters', adapters],
  ['Operator and processes', operator],
];

function stat(title: string, unit: Unit, description: string, queries: Query[]): Panel {
  return { kind: 'stat', title, description, unit, queries, width: 4 };
}

function graph(title: string, unit: Unit, description: string, queries: Query[]): Panel {
  return { kind: 'graph', title, description, unit, queries, width: 8 };
}

function stack(title: string, unit: Unit, description: string, queries: Query[]): Panel {
  return { kind: 'stack', title, description, unit, queries, width: 8 };
}

// --- Grafana's JSON ---------------------------------------------------------------------------------------------------

const datasource = { type: 'prometheus', uid: '$datasource' };

/** The text of the file. */
export function dashboardJson(): string {
  const dashboard = {
    uid: 'motet',
    title: 'Motet',
    description: 'Many LoRA adapters on shared base models: fleet, queues, engines, adapters, operator.',
    tags: ['motet'],
    schemaVersion: 39,
    editable: true,
    graphTooltip: 1,
    refresh: '30s',
    time: { from: 'now-1h', to: 'now' },
    timezone: 'browser',
    templating: { list: variables() },
    annotations: { list: [] },
    panels: layOut(),
  };
  return `${JSON.stringify(dashboard, null, 2)}\n`;
}

function variables() {
  const labelValues = (name: string, label: string, query: string, more: object) => ({
    type: 'query',
    name,
    label,
    datasource,
    query: { query, refId: name },
    definition: query,
    // When the range of time changes: names come and go.
    refresh: 2,
    sort: 1,
    ...more,
  });
  return [
    { type: 'datasource', name: 'datasource', label: 'Prometheus', query: 'prometheus' },
    labelValues('namespace', 'Namespace', 'label_values(motet_gateway_requests_in_flight, namespace)', {}),
    labelValues('base_model', 'Base model', `label_values(motet_arena_bytes{${here}}, base_model)`, {
      multi: true,
      includeAll: true,
      allValue: '.*',
      current: { text: ['All'], value: ['$__all'] },
    }),
  ];
}

/** Rows below each other, the panels of each from left to right in lines of 24 columns. */
function layOut(): object[] {
  const laidOut: object[] = [];
  let id = 1;
  let y = 0;
  for (const [title, panels] of rows) {
    laidOut.push({
      id: id++,
      type: 'row',
      title,
      collapsed: false,
      panels: [],
      gridPos: { x: 0, y, w: 24, h: 1 },
    });
    y += 1;
    let x = 0;
    let lineHeight = 0;
    for (const panel of panels) {
      const h = panel.kind === 'stat' ? statHeight : graphHeight;
      if (x + panel.width > 24) {
        x = 0;
        y += lineHeight;
      }
      laidOut.push(grafanaPanel(panel, id++, { x, y, w: panel.width, h }));
      x += panel.width;
      lineHeight = h;
    }
    y += lineHeight;
  }
  return laidOut;
}

function grafanaPanel(
  { kind, title, description, unit, queries }: Panel,
  id: number,
  gridPos: object,
): object {
  const targets = queries.map(([expr, legendFormat], i) => ({
    refId: String.fromCharCode('A'.charCodeAt(0) + i),
    datasource,
    expr,
    legendFormat,
    ...(kind === 'table' ? { format: 'table', instant: true } : {}),
  }));
  const defaults = {
    unit,
    min: 0,
    // Shares need their small digits: 0.05 % is not 0 %.
    ...(unit === 'percentunit' ? { decimals: 2 } : {}),
  };
  const common = { id, title, description, datasource, gridPos, targets };
  switch (kind) {
    case 'stat':
      return {
        ...common,
        type: 'stat',
        fieldConfig: {
          defaults: { ...defaults, color: { mode: 'fixed', fixedColor: 'text' } },
          overrides: [],
        },
        options: {
          reduceOptions: { calcs: ['lastNotNull'], fields: '', values: false },
          colorMode: 'value',
          graphMode: 'area',
          textMode: queries.length > 1 ? 'value_and_name' : 'value',
        },
      };
    case 'table':
      return {
        ...common,
        type: 'table',
        fieldConfig: { defaults: { unit }, overrides: [] },
        options: { showHeader: true, sortBy: [{ displayName: 'adapter_name' }] },
        transformations: [
          {
            id: 'organize',
            options: {
              excludeByName: { Time: true },
              renameByName: {
                adapter_name: 'adapter',
                base_model: 'base model',
                level: 'tier',
                Value: 'engines',
              },
            },
          },
        ],
      };
    case 'graph':
    case 'stack':
      return {
        ...common,
        type: 'timeseries',
        fieldConfig: {
          defaults: {
            ...defaults,
            custom:
              kind === 'stack'
                ? { fillOpacity: 30, lineWidth: 1, showPoints: 'never', stacking: { mode: 'normal' } }
                : { fillOpacity: 5, lineWidth: 1, showPoints: 'never' },
          },
          overrides: [],
        },
        options: {
          legend: { displayMode: 'table', placement: 'bottom', calcs: ['mean', 'max', 'lastNotNull'] },
          tooltip: { mode: 'multi', sort: 'desc' },
        },
      };
  }
}

if (import.meta.main) writeFileSync(path, dashboardJson());
